"""Lower bounds hold on random pairs of policies, and touch where they must."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_problems import random_logits, random_mdps, two_state

from trpo_jax.theory import (
    TabularMDP,
    certify,
    expected_return,
    garnet,
    log_prob_objective,
    mean_state_kl,
    minorizer,
    policy_gradient,
    softmax_policy,
    surrogate_return,
    tabular_trpo_step,
)

BOUNDS = ("maximum_kl_bound", "mean_tv_bound", "mean_kl_bound")


@jax.jit
@jax.vmap
def judge(mdp, old, new):
    """Certificate, minorizer and both returns of two softmax policies."""
    old, new = softmax_policy(old), softmax_policy(new)
    returns = expected_return(old, mdp), expected_return(new, mdp)
    return certify(old, new, mdp), minorizer(old, new, mdp), *returns


@jax.jit
@jax.vmap
def judge_trpo_step(mdp, logits):
    new, _ = tabular_trpo_step(logits, mdp, max_kl=0.01)
    return certify(softmax_policy(logits), softmax_policy(new), mdp)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9, 0.99])
def test_no_bound_exceeds_the_gain_on_random_pairs(gamma):
    # 4 × 2500 pairs, from nearly equal to nearly disjoint: at small γ and change the bounds are close.
    mdps, old = random_mdps(2500, gamma), random_logits(2500, 5, 3)
    size = 10 ** jnp.linspace(-5, 1, 2500)[:, None, None]
    new = old + size * random_logits(2500, 5, 3, seed=3)
    certificate, lower, old_return, new_return = judge(mdps, old, new)
    scale = 1e-12 / (1 - gamma) ** 2
    assert np.all(lower <= new_return + scale)
    np.testing.assert_allclose(old_return + certificate.maximum_kl_bound, lower, rtol=1e-9, atol=scale)
    np.testing.assert_allclose(certificate.true_gain, new_return - old_return, atol=scale)
    for name in BOUNDS:
        bound = getattr(certificate, name)
        assert np.all(bound <= certificate.true_gain + scale), name
        assert np.all(bound <= certificate.surrogate_gain), name
        assert np.any(bound > 0), name  # or it would never promise anything
    assert np.all(certificate.mean_kl_bound <= certificate.mean_tv_bound + scale)
    assert np.all(certificate.mean_tv <= np.sqrt(certificate.mean_kl / 2) + 1e-12)
    assert np.all(certificate.mean_kl <= certificate.maximum_kl + 1e-15)


def test_two_state_certificate_by_hand():
    logits, mdp = two_state()
    old, new = softmax_policy(logits), np.array([[0.3315515114, 0.6684484886], [0.6566523372, 0.3433476628]])
    advantage = np.array([[-0.8505039342, 0.5158567123], [1.0070224810, -1.3593381655]])
    occupancy = np.array([4.7981323375, 5.2018676625])
    certificate = jax.jit(certify)(old, new, mdp)
    expected = np.sum(new * advantage, axis=1)
    gain, largest = occupancy @ expected, np.abs(expected).max()
    mean_tv = 0.1 * occupancy @ np.abs(new - old)[:, 0]  # of two actions, one half of both changes is one change
    check = functools.partial(np.testing.assert_allclose, rtol=1e-8)
    check(certificate.surrogate_gain, gain)
    check(certificate.true_gain, 10.3374129265 - 8.9629901502)
    check(certificate.mean_tv, mean_tv)
    check(certificate.maximum_kl_bound, gain - 4 * 1.3593381655 * 0.9 / 0.01 * 0.0145143095, rtol=1e-7)
    check(certificate.mean_tv_bound, gain - 2 * 0.9 * largest / 0.01 * mean_tv)
    check(certificate.mean_kl_bound, gain - np.sqrt(2) * 0.9 * largest / 0.01 * np.sqrt(0.0097914243), rtol=1e-7)


def test_the_surrogate_alone_is_no_bound():
    # What the penalties are for: without them the gain is overestimated on many pairs.
    mdps, old, new = random_mdps(2500), random_logits(2500, 5, 3), random_logits(2500, 5, 3, seed=2)
    certificate, *_ = judge(mdps, old, new)
    assert 0.2 < np.mean(certificate.surrogate_gain > certificate.true_gain + 1e-3) < 0.8


@pytest.mark.parametrize("objective", [minorizer, surrogate_return])
def test_objective_touches_the_return_at_the_old_policy(objective):
    mdps, logits = random_mdps(20), random_logits(20, 5, 3)

    @jax.jit
    @jax.vmap
    def compute(mdp, theta):
        old = softmax_policy(theta)
        value, slope = jax.value_and_grad(lambda t: objective(old, softmax_policy(t), mdp))(theta)
        return value, slope, expected_return(old, mdp), policy_gradient(theta, mdp)

    value, slope, exact_value, exact_slope = compute(mdps, logits)
    np.testing.assert_allclose(value, exact_value, rtol=1e-12)
    np.testing.assert_allclose(slope, exact_slope, rtol=1e-10, atol=1e-12)


def test_an_unchanged_policy_has_a_certificate_of_zeros():
    logits, mdp = two_state()
    policy = softmax_policy(logits)
    for field, value in dataclasses.asdict(jax.jit(certify)(policy, policy, mdp)).items():
        assert value == 0, field


def test_log_prob_and_ratio_objectives_agree_at_the_old_policy_only():
    logits, mdp = two_state()
    old = softmax_policy(logits)

    @jax.jit
    def slopes(theta):
        ratio = jax.grad(lambda t: surrogate_return(old, softmax_policy(t), mdp))(theta)
        return ratio, jax.grad(lambda t: log_prob_objective(old, softmax_policy(t), mdp))(theta)

    ratio, log_prob = slopes(logits)
    np.testing.assert_allclose(ratio, log_prob, atol=1e-12)
    ratio, log_prob = slopes(logits.at[:, 0].add(0.5))
    assert np.abs(ratio - log_prob).max() > 0.1

    # Against the advantages, the ratio objective is bounded by the best action; log-probabilities are not.
    worst = jnp.eye(2)  # the action of negative advantage

    @jax.jit
    @jax.vmap
    def objectives(k):
        new = softmax_policy(k * (1 - 2 * worst))
        return surrogate_return(old, new, mdp), log_prob_objective(old, new, mdp)

    ratio, log_prob = (np.diff(objective) for objective in objectives(jnp.array([100.0, 200.0, 300.0])))
    assert np.abs(ratio).max() < 1e-9
    assert log_prob[0] > 100
    np.testing.assert_allclose(log_prob[1], log_prob[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("gamma", "maximum_kl_penalty", "mean_tv_penalty"), [(0.5, 1.8, 0.25), (0.9, 18, 2.4), (0.99, 206, 27)]
)
def test_how_much_the_theory_asks_for(gamma, maximum_kl_penalty, mean_tv_penalty):
    # Penalty over predicted gain of steps at KL ≈ .01; the medians depend a little on the distribution of the MDPs.
    mdps, logits = random_mdps(300, gamma), random_logits(300, 5, 3)
    certificate = judge_trpo_step(mdps, logits)
    gain = certificate.surrogate_gain
    np.testing.assert_allclose(np.median(1 - certificate.maximum_kl_bound / gain), maximum_kl_penalty, rtol=0.25)
    np.testing.assert_allclose(np.median(1 - certificate.mean_tv_bound / gain), mean_tv_penalty, rtol=0.25)
    assert 0.97 < np.median(certificate.true_gain / gain) < 1.02


def test_nothing_times_an_infinite_divergence_is_nothing():
    """A state that is never visited, a discount of 0, and a probability of 0."""
    mdp = unreachable(0.9)
    old = jnp.full((4, 3), 1 / 3)
    new = old.at[3].set(jnp.array([1.0, 0, 0])).at[0].set(jnp.array([0.4, 0.3, 0.3]))
    found = certify(old, new, mdp)
    assert np.isfinite(found.mean_kl) and found.mean_kl == mean_state_kl(old, new, mdp) > 0
    assert found.mean_kl_bound <= found.true_gain + 1e-6 and found.maximum_kl_bound == -jnp.inf
    short, deterministic = unreachable(0.0), jnp.eye(3)[jnp.array([0, 1, 2, 0])]
    found = certify(old, deterministic, short)
    for bound in (found.maximum_kl_bound, found.mean_kl_bound, found.mean_tv_bound):
        np.testing.assert_allclose(bound, found.true_gain, rtol=1e-5)
    np.testing.assert_allclose(minorizer(old, deterministic, short), expected_return(deterministic, short), rtol=1e-5)
    assert log_prob_objective(deterministic, deterministic, mdp) == 0
    assert np.isfinite(jax.grad(log_prob_objective, argnums=1)(deterministic, deterministic, mdp)).all()


def unreachable(gamma):
    """An MDP whose last state is never visited."""
    mdp = garnet(jax.random.key(0), 4, 3, 2, gamma)
    transition = mdp.transition.at[:, :, 3].set(0).at[:, :, :3].add(0.1)
    transition /= transition.sum(axis=-1, keepdims=True)
    return TabularMDP(transition, mdp.reward, jnp.array([1 / 3, 1 / 3, 1 / 3, 0]), mdp.gamma)
