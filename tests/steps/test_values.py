"""Fitting and judging the value function; running statistics of observations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trpo_jax import fit_value_function
from trpo_jax.steps.statistics import init_statistics, normalize, update_statistics
from trpo_jax.steps.values import explained_variance


def linear(params, observation):
    return observation @ params


def fit(target, epochs=50, minibatches=4, batch=(8, 8)):
    observation = jax.random.normal(jax.random.key(0), (*batch, 3))
    params, optimizer = jnp.zeros(3), optax.adam(0.05)
    return observation, fit_value_function(
        linear,
        params,
        optimizer.init(params),
        observation,
        target(observation),
        optimizer=optimizer,
        epochs=epochs,
        minibatches=minibatches,
    )


@pytest.mark.parametrize("minibatches", [1, 4, 64])
def test_recovers_a_linear_function(minibatches):
    weights = jnp.array([1.0, -2.0, 0.5])
    _, (params, _, loss) = fit(lambda o: o @ weights, epochs=200, minibatches=minibatches)
    np.testing.assert_allclose(params, weights, atol=0.02)
    assert loss < 1e-3


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_target_changes_nothing(bad):
    _, (params, state, _) = fit(lambda o: jnp.zeros(o.shape[:-1]).at[0, 0].set(bad), epochs=2)
    np.testing.assert_array_equal(params, 0)
    jax.tree.map(np.testing.assert_array_equal, state, optax.adam(0.05).init(jnp.zeros(3)))


def test_minibatches_must_divide_the_batch():
    with pytest.raises(AssertionError):
        fit(lambda o: o[..., 0], minibatches=5)


def test_explained_variance_known_answers():
    targets = jnp.array([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(targets, targets) == 1
    assert explained_variance(targets + 7, targets) == 1  # a constant error explains the variance
    assert explained_variance(jnp.full(4, 9.0), targets) == 0
    assert explained_variance(-targets, targets) == pytest.approx(-3)
    assert explained_variance(targets, jnp.ones(4)) == 0


def test_statistics_equal_those_of_all_data():
    rng = np.random.default_rng(0)
    batches = [100 * rng.normal(size=(t, 3, 2)) * [1, 1e-3] + [5, 1e3] for t in (4, 1, 9)]
    statistics = init_statistics((2,))
    for batch in batches:
        statistics = jax.jit(update_statistics)(statistics, jnp.asarray(batch, jnp.float32))
    data = np.concatenate([batch.reshape(-1, 2) for batch in batches])
    assert statistics.count == len(data)
    np.testing.assert_allclose(statistics.mean, data.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.variance, data.var(0), rtol=2e-2)
    normal = normalize(statistics, jnp.asarray(data, jnp.float32))
    np.testing.assert_allclose(normal.mean(0), 0, atol=2e-2)
    np.testing.assert_allclose(normal.std(0), 1, rtol=2e-2)


def test_statistics_of_scalars_and_of_nothing():
    statistics = update_statistics(init_statistics(()), jnp.array([[1.0, 3.0]]))
    assert (statistics.count, statistics.mean, statistics.variance) == (2, 2, 1)
    x = jnp.array([0.5, -3.0, 40.0])
    np.testing.assert_array_equal(normalize(init_statistics((3,)), x), [0.5, -3.0, 10.0])


def test_constant_observation_maps_to_zero():
    statistics = update_statistics(init_statistics((2,)), jnp.array([[4.0, 1.0], [4.0, 3.0]]))
    np.testing.assert_array_equal(normalize(statistics, jnp.array([4.0, 3.0])), [0.0, 1.0])
