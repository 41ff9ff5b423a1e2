"""Fitting the value function, and how well it fits; running statistics of observations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trpo_jax import Solver, fit_value_function, gauss_newton_fit
from trpo_jax.steps import defaults
from trpo_jax.steps.statistics import init_statistics, normalize, update_statistics
from trpo_jax.steps.values import explained_variance


def solver(damping, tolerance=defaults.CG_TOLERANCE):
    """The default one with another λ, and another tolerance."""
    return Solver(damping, defaults.VALUE_CG_ITERATIONS, tolerance)


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
    with pytest.raises(ValueError, match="minibatches must divide the 64 samples of the batch, got 5"):
        fit(lambda o: o[..., 0], minibatches=5)
    for name, wrong in (("minibatches", 0), ("minibatches", 2.0), ("epochs", 0), ("epochs", 1.5)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {wrong}"):
            fit(lambda o: o[..., 0], **{name: wrong})


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


def test_gauss_newton_solves_a_linear_problem_at_once(x64):
    observation = jax.random.normal(jax.random.key(0), (10, 4, 3))
    target = jax.random.normal(jax.random.key(1), (10, 4))
    exact = {"solver": solver(0.0, tolerance=0.0), "fisher_fraction": 1.0}
    fit = jax.jit(lambda p: gauss_newton_fit(linear, p, observation, target, **exact))
    params, loss = fit(jnp.array([5.0, -3.0, 2.0]))
    expected, residual, *_ = np.linalg.lstsq(observation.reshape(-1, 3), target.ravel(), rcond=None)
    np.testing.assert_allclose(params, expected, rtol=1e-10)
    assert float(loss) == pytest.approx(residual[0] / target.size)


def test_gauss_newton_damping_is_ridge_regression_towards_the_start(x64):
    # argmin ½ mean (o·p − t)² + ½ λ ‖p − p₀‖²
    observation = jax.random.normal(jax.random.key(0), (40, 3))
    target, start, damping = jax.random.normal(jax.random.key(1), (40,)), jnp.array([1.0, 0.0, -1.0]), 0.7
    exact = {"solver": solver(damping, tolerance=0.0), "fisher_fraction": 1.0}
    params, _ = gauss_newton_fit(linear, start, observation, target, **exact)
    matrix = observation.T @ observation / 40 + damping * jnp.eye(3)
    expected = start + jnp.linalg.solve(matrix, observation.T @ (target - observation @ start) / 40)
    np.testing.assert_allclose(params, expected, rtol=1e-10)


def test_several_gauss_newton_steps_are_as_many_fits_in_turn(x64):
    def value(params, observation):
        return jnp.tanh(observation @ params["w"]) @ params["v"]

    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": jax.random.normal(keys[0], (2, 8)), "v": jax.random.normal(keys[1], (8,))}
    batch = jax.random.normal(keys[2], (40, 2)), 10 * jax.random.normal(keys[3], (40,))
    fit = functools.partial(gauss_newton_fit, value, fisher_fraction=0.5)
    together, final_loss = jax.jit(lambda params: fit(params, *batch, num_steps=3))(params)
    losses = []
    for _ in range(3):
        params, loss = fit(params, *batch)
        losses.append(float(loss))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), together, params)
    assert float(final_loss) == pytest.approx(losses[-1]) and losses[0] > losses[1] > losses[2]
    with pytest.raises(ValueError, match="num_steps of a value fit must be a whole number of at least 1, got 0"):
        fit(params, *batch, num_steps=0)


@pytest.mark.parametrize("fraction, damping", [(1.0, 1e-3), (0.25, 0.3)])
def test_gauss_newton_never_raises_the_loss(fraction, damping):
    def value(params, observation):
        return jnp.tanh(observation @ params["w"]) @ params["v"]

    def run(key):
        keys = jax.random.split(key, 4)
        params = {"w": 3 * jax.random.normal(keys[0], (2, 8)), "v": 3 * jax.random.normal(keys[1], (8,))}
        observation, target = jax.random.normal(keys[2], (16, 2)), 10 * jax.random.normal(keys[3], (16,))
        options = {"solver": solver(damping), "fisher_fraction": fraction}
        new, loss = gauss_newton_fit(value, params, observation, target, **options)
        before, after = (jnp.mean((value(p, observation) - target) ** 2) for p in (params, new))
        return before, after, loss

    before, after, loss = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 200))
    assert (after <= before * (1 + 1e-6)).all() and (after < before).mean() > 0.9  # each rounded by its own program
    np.testing.assert_allclose(loss, after, rtol=1e-3)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_gauss_newton_leaves_parameters_alone_when_not_finite(bad):
    observation, start = jax.random.normal(jax.random.key(0), (40, 3)), jnp.array([1.0, 0.0, -1.0])
    params, _ = gauss_newton_fit(linear, start, observation, jnp.zeros(40).at[3].set(bad))
    np.testing.assert_array_equal(params, start)


def test_non_finite_observations_leave_statistics_alone():
    statistics = update_statistics(init_statistics((2,)), jnp.array([[4.0, 1.0], [2.0, 3.0]]))
    after = update_statistics(statistics, jnp.array([[jnp.nan, 0.0]]))
    jax.tree.map(np.testing.assert_array_equal, after, statistics)
