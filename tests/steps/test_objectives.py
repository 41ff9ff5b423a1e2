"""Surrogate, mean KL and effective sample size: known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trpo_jax import Categorical, DiagonalGaussian, mean_kl, surrogate
from trpo_jax.steps.objectives import effective_sample_fraction, surrogate_gain


def test_surrogate_at_the_old_policy_is_the_mean_advantage():
    distribution = Categorical(jax.random.normal(jax.random.key(0), (6, 3)))
    action = distribution.sample(jax.random.key(1))
    advantage = jnp.arange(6.0)
    old = distribution.log_prob(action)
    assert surrogate(distribution, old, action, advantage) == pytest.approx(2.5)
    assert surrogate_gain(distribution, old, action, advantage) == 0


def test_surrogate_by_hand(x64):
    old = jnp.log(jnp.array([0.5, 0.25]))
    new = Categorical(jnp.log(jnp.array([[0.6, 0.4], [0.5, 0.5]])))
    action, advantage = jnp.array([0, 1]), jnp.array([1.0, -2.0])
    # ratios .6/.5 and .5/.25
    assert float(surrogate(new, old, action, advantage)) == pytest.approx((1.2 - 4.0) / 2)
    assert float(surrogate_gain(new, old, action, advantage)) == pytest.approx((0.2 - 2.0) / 2)


def test_gradients_of_ratio_and_log_prob_agree_at_the_old_policy_only(x64):
    theta = jnp.array([[0.3, -0.2, 0.9], [0.0, 1.0, -1.0]])
    action, advantage = jnp.array([2, 0]), jnp.array([1.5, -0.5])
    old = Categorical(theta).log_prob(action)

    def gradients(at):
        ratio = jax.grad(lambda t: surrogate(Categorical(t), old, action, advantage))(at)
        log_prob = jax.grad(lambda t: jnp.mean(Categorical(t).log_prob(action) * advantage))(at)
        return ratio, log_prob

    np.testing.assert_allclose(*gradients(theta), rtol=1e-12)
    ratio, log_prob = gradients(theta + jnp.array([1.0, 0.0, 0.0]))
    assert jnp.abs(ratio - log_prob).max() > 0.05


def test_mean_kl_sums_action_dimensions_and_averages_the_batch(x64):
    old = DiagonalGaussian(jnp.zeros((2, 3)), jnp.zeros(3))
    new = DiagonalGaussian(jnp.array([[0.1, 0.1, 0.1], [0.0, 0.0, 0.0]]), jnp.zeros(3))
    # Δμ = .1 at σ = 1 is .005 nats a dimension: .015 in one sample, 0 in the other.
    assert float(mean_kl(old, new)) == pytest.approx(0.0075, rel=1e-12)
    assert mean_kl(old, old) == 0


@pytest.mark.parametrize("kl", [0.01, 0.04, 0.16])
def test_effective_sample_size_of_gaussians(kl):
    # Equal σ: ESS/N = exp(−2 KL) (.9802, .9231, .7261); averaged over 20 batches of 10⁵ samples.
    shift = np.sqrt(2 * kl)
    old, new = (DiagonalGaussian(jnp.full((100_000, 1), m), jnp.zeros(1)) for m in (0.0, shift))

    def estimate(key):
        action = old.sample(key)
        return effective_sample_fraction(new, old.log_prob(action), action)

    estimates = jax.lax.map(estimate, jax.random.split(jax.random.key(0), 20))
    assert abs(estimates.mean() - np.exp(-2 * kl)) < 3 * estimates.std(ddof=1) / np.sqrt(20) + 1e-5


def test_effective_sample_size_does_not_overflow():
    old, new = Categorical(jnp.zeros((2, 2))), Categorical(jnp.array([[200.0, 0.0], [0.0, 0.0]]))
    action = jnp.array([1, 1])
    assert effective_sample_fraction(new, old.log_prob(action) - 300, action) == pytest.approx(0.5)


def test_shapes_must_agree():
    distribution = Categorical(jnp.zeros((4, 2)))
    with pytest.raises(AssertionError):
        surrogate(distribution, jnp.zeros(4), jnp.zeros(4, int), jnp.zeros(3))
