"""Importance sampling: the identity, its variance in closed form, and both against Monte Carlo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_problems import random_logits

from trpo_jax import DiagonalGaussian, theory
from trpo_jax.theory import (
    effective_fraction,
    gaussian_effective_fraction,
    importance_weights,
    per_decision_fraction,
    softmax_policy,
    trajectory_fraction,
)

effective_sample_size = jax.jit(theory.effective_sample_size)


def monte_carlo_fraction(shift, num_decisions, num_batches=100, batch_size=2000):
    """ESS/N, and its standard error, of the products of ratios of N(shift, 1) to N(0, 1) along so many decisions."""
    old, new = (DiagonalGaussian(jnp.full((1,), mean), jnp.zeros(1)) for mean in (0.0, shift))

    @jax.jit
    def compute(action):
        log_weight = jnp.sum(new.log_prob(action) - old.log_prob(action), axis=-1)
        return effective_sample_size(log_weight) / batch_size

    action = np.random.default_rng(0).normal(size=(num_batches, batch_size, num_decisions, 1))
    fractions = np.asarray(compute(action))
    return fractions.mean(), fractions.std(ddof=1) / np.sqrt(num_batches)


def test_weighted_expectations_are_those_of_the_target():
    target, proposal, f = (
        softmax_policy(random_logits(7, 5)),
        softmax_policy(random_logits(7, 5, seed=2)),
        jnp.arange(5),
    )
    target = target.at[:, 1].set(0)  # never done by the target
    target /= target.sum(-1, keepdims=True)
    weight = importance_weights(target, proposal)
    np.testing.assert_allclose(np.sum(proposal * weight * f, -1), np.sum(target * f, -1), rtol=1e-13)
    np.testing.assert_allclose(effective_fraction(target, proposal), 1 / np.sum(proposal * weight**2, -1), rtol=1e-13)
    np.testing.assert_array_equal(importance_weights(jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0])), [0, 1])


def test_effective_sample_size_of_known_weights():
    assert effective_sample_size(jnp.zeros(8)) == pytest.approx(8)
    assert effective_sample_size(jnp.log(jnp.array([1.0, 2.0, 3.0]))) == pytest.approx(36 / 14)
    assert effective_sample_size(jnp.array([0.0, -jnp.inf, -jnp.inf])) == pytest.approx(1)
    # A common factor cancels, however large; weights themselves would overflow.
    assert effective_sample_size(jnp.array([1000.0, 1000.0])) == pytest.approx(2)


def test_effective_sample_size_tends_to_the_closed_form():
    target, proposal = softmax_policy(random_logits(5)), softmax_policy(random_logits(5, seed=2))
    draws = np.random.default_rng(0).choice(5, size=(100, 10_000), p=np.asarray(proposal))
    fractions = effective_sample_size(jnp.log(importance_weights(target, proposal))[draws]) / 10_000
    error = fractions.std() / 10
    exact = effective_fraction(target, proposal)
    assert exact < 0.8
    assert error < 0.01
    assert abs(fractions.mean() - exact) < 3 * error


@pytest.mark.parametrize(("kl", "fraction"), [(0.01, 0.9802), (0.04, 0.9231), (0.16, 0.7261), (0.64, 0.2780)])
def test_gaussian_fraction(kl, fraction):
    np.testing.assert_allclose(gaussian_effective_fraction(kl), fraction, atol=5e-5)
    shift = np.sqrt(2 * kl)
    standard = DiagonalGaussian(jnp.zeros(1), jnp.zeros(1))
    np.testing.assert_allclose(standard.kl(DiagonalGaussian(jnp.full((1,), shift), jnp.zeros(1))), kl, rtol=1e-12)
    mean, error = monte_carlo_fraction(shift, 1)
    assert error < 0.01
    assert abs(mean - gaussian_effective_fraction(kl)) < 3 * error


def test_decay_of_old_samples_golden_numbers():
    steps = np.array([1, 2, 4, 8])
    np.testing.assert_allclose(per_decision_fraction(steps, 0.01), [0.980, 0.923, 0.726, 0.278], atol=5e-4)
    whole = trajectory_fraction(steps[:3], 0.01, 100)
    np.testing.assert_allclose(np.log10(whole), np.log10([0.135, 3e-4, 1e-14]), atol=0.12)


@pytest.mark.parametrize("num_updates", [1, 2])
def test_decay_of_old_samples_is_that_of_aligned_steps(num_updates):
    # j steps of √(2δ) σ in one direction, on decisions that are independent.
    shift = num_updates * np.sqrt(2 * 0.01)
    mean, error = monte_carlo_fraction(shift, 1)
    assert abs(mean - per_decision_fraction(num_updates, 0.01)) < 3 * error
    mean, error = monte_carlo_fraction(shift, 10)
    assert error < 0.01
    assert abs(mean - trajectory_fraction(num_updates, 0.01, 10)) < 3 * error
