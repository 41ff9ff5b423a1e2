"""A candidate's estimate from a stored batch: consistent, covered by its interval, ranked as the exact return ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from trpo_jax import Categorical, estimate_candidate
from trpo_jax.theory import advantages, expected_return, garnet, softmax_policy, surrogate_return_gain, visitation

MDP = garnet(jax.random.key(0), 6, 3, 3, 0.9)
OLD = 0.5 * jax.random.normal(jax.random.key(1), (6, 3))


def policy_apply(logits, state):
    return Categorical(logits[state])


def batch(key, shape):
    """States from the discounted visitation, actions of the old policy, exact advantages."""
    policy = softmax_policy(OLD)
    occupancy = visitation(policy, MDP)
    key_state, key_action = jax.random.split(key)
    state = jax.random.categorical(key_state, jnp.log(occupancy), shape=shape)
    action = policy_apply(OLD, state).sample(key_action)
    return state, action, advantages(policy, MDP)[state, action]


def exact_gain(candidate):
    """E over the same states: the surrogate's gain is a sum over Σ_s ρ(s) = 1/(1−γ)."""
    return (1 - MDP.gamma) * surrogate_return_gain(softmax_policy(OLD), softmax_policy(candidate), MDP)


@pytest.fixture(scope="module")
def estimate():
    return jax.jit(lambda candidate, key, *data: estimate_candidate(policy_apply, OLD, candidate, *data, key))


def candidates(number, scale):
    return OLD + scale * jax.random.normal(jax.random.key(2), (number, *OLD.shape))


def test_old_policy_gains_nothing(estimate):
    found = estimate(OLD, jax.random.key(0), *batch(jax.random.key(3), (64,)))
    assert found.surrogate_gain == found.low == found.high == 0
    assert found.mean_kl == found.maximum_kl == 0 and found.effective_sample_fraction == 1


def test_both_policies_are_evaluated_in_full_precision():
    data = jnp.ones((4, 6)), jnp.zeros(4, int), jnp.ones(4)

    def estimate(old, candidate):
        return estimate_candidate(lambda w, x: Categorical(x @ w), old, candidate, *data, jax.random.key(0))

    text = str(jax.make_jaxpr(estimate)(OLD, OLD))
    assert text.count("dot_general[") == 2 and text.count("HIGHEST") == 4  # of two products, each with two factors


def test_error_falls_with_the_root_of_the_batch():
    (candidate,) = candidates(1, 0.3)
    errors = []
    for size in (100, 6_400):

        def gain(key, size=size):
            data = batch(key, (size,))
            return estimate_candidate(policy_apply, OLD, candidate, *data, key, resamples=1).surrogate_gain

        found = jax.jit(jax.vmap(gain))(jax.random.split(jax.random.key(7), 100))
        errors.append(jnp.sqrt(jnp.mean((found - exact_gain(candidate)) ** 2)))
    # A root mean square of 100 has a relative standard error of 7 %; the ratio of two, 10 %.
    assert 8 / 1.4 < errors[0] / errors[1] < 8 * 1.4


@pytest.mark.parametrize("shape", [(400,), (8, 100)])
def test_interval_covers(shape):
    (candidate,) = candidates(1, 0.3)

    def covered(key):
        key_batch, key_bootstrap = jax.random.split(key)
        data = batch(key_batch, shape)
        found = estimate_candidate(policy_apply, OLD, candidate, *data, key_bootstrap, resamples=200)
        exact = exact_gain(candidate)
        return (found.low <= exact) & (exact <= found.high)

    share = jnp.mean(jax.jit(jax.vmap(covered))(jax.random.split(jax.random.key(4), 300)))
    # 95 % of 300 has a standard error of 1.3 %; percentile intervals of such batches fall short by a little more.
    assert 0.89 < share < 0.99


def test_environments_are_resampled_whole(estimate):
    # Every step of an environment repeats one sample: the batch knows no more than its 20 environments.
    state, action, advantage = (jnp.broadcast_to(x, (50, 20)) for x in batch(jax.random.key(5), (20,)))
    (candidate,) = candidates(1, 0.3)
    whole = estimate(candidate, jax.random.key(0), state, action, advantage)
    once = estimate(candidate, jax.random.key(0), state[0], action[0], advantage[0])
    np.testing.assert_allclose([whole.low, whole.high], [once.low, once.high], rtol=1e-4)
    samples = (x.ravel() for x in (state, action, advantage))
    flat = estimate(candidate, jax.random.key(0), *samples)
    assert (whole.high - whole.low) > 5 * (flat.high - flat.low)


def test_the_divergence_is_that_of_the_distributions(estimate):
    state, action, advantage = batch(jax.random.key(7), (200,))
    (candidate,) = candidates(1, 0.3)
    found = estimate(candidate, jax.random.key(0), state, action, advantage)
    kl = policy_apply(OLD, state).kl(policy_apply(candidate, state))
    np.testing.assert_allclose([found.mean_kl, found.maximum_kl], [kl.mean(), kl.max()], rtol=1e-4)
    assert kl.max() > 1.1 * kl.mean() > 0


def test_candidates_are_ranked_as_by_the_exact_return():
    near = candidates(60, 0.1)
    data = batch(jax.random.key(6), (20_000,))
    key = jax.random.key(0)
    found = jax.jit(jax.vmap(lambda c: estimate_candidate(policy_apply, OLD, c, *data, key, resamples=2)))(near)
    exact = jax.vmap(lambda c: expected_return(softmax_policy(c), MDP))(near)
    assert found.mean_kl.max() < 0.02
    assert stats.spearmanr(found.surrogate_gain, exact).statistic >= 0.95


@pytest.mark.parametrize("wrong", [{"confidence": 95}, {"confidence": -1.0}, {"resamples": 0}, {"resamples": 1.5}])
def test_shares_and_counts_of_the_bootstrap_are_checked(wrong):
    (name,) = wrong
    observation, action, advantage = jnp.ones((4, 2)), jnp.zeros(4, int), jnp.arange(4.0)
    policy = lambda p, o: Categorical(o @ p)  # noqa: E731
    with pytest.raises(ValueError, match=f"{name} must "):
        estimate_candidate(
            policy, jnp.zeros((2, 2)), jnp.eye(2), observation, action, advantage, jax.random.key(0), **wrong
        )
