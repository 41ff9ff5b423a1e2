"""Distributions between bounds: against scipy, quadrature and autodiff, and at the bounds themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from trpo_jax.steps.bounded import Beta, TanhGaussian
from trpo_jax.steps.distributions import DiagonalGaussian

LOW, HIGH = -1.0, 3.0


def tanh(mean, std, low=LOW, high=HIGH):
    return TanhGaussian(DiagonalGaussian(jnp.array([mean]), jnp.log(jnp.array([std]))), low, high)


def beta(alpha, other, low=LOW, high=HIGH):
    return Beta(jnp.array([alpha]), jnp.array([other]), low, high)


def density(distribution, u):
    """log_prob at the actions that u leads to, of one dimension."""
    return np.asarray(jax.vmap(distribution.log_prob)(jnp.asarray(1 + 2 * np.tanh(u))[:, None]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("alpha, other", [(1.69, 1.69), (0.4, 3.0), (12.0, 2.5), (300.0, 500.0)])
def test_beta_agrees_with_scipy(alpha, other):
    d, expected = beta(alpha, other), scipy.stats.beta(alpha, other, LOW, HIGH - LOW)
    action = np.array([-0.99, 0.2, 1.5, 2.9])
    np.testing.assert_allclose(jax.vmap(d.log_prob)(action[:, None]), expected.logpdf(action), rtol=1e-6)
    np.testing.assert_allclose(d.entropy(), expected.entropy(), rtol=1e-5)
    q, p = (alpha * 1.3, other * 0.8), (alpha, other)
    digamma = scipy.special.digamma
    kl = scipy.special.betaln(*q) - scipy.special.betaln(*p) + (p[0] - q[0]) * digamma(p[0])
    kl += (p[1] - q[1]) * digamma(p[1]) + (sum(q) - sum(p)) * digamma(sum(p))
    np.testing.assert_allclose(d.kl(beta(*q)), kl, rtol=1e-9)
    trigamma = scipy.special.polygamma(1, np.array([alpha, other, alpha + other]))
    product = d.fisher_product(beta(1.0, 0.0))
    np.testing.assert_allclose(
        (product.alpha[0], product.beta[0]), (trigamma[0] - trigamma[2], -trigamma[2]), rtol=1e-9
    )


@pytest.mark.usefixtures("x64")
def test_kl_of_betas_by_quadrature():
    d, other = beta(1.7, 3.0), beta(2.4, 2.2)

    def integrand(a):
        p, q = d.log_prob(jnp.array([a])), other.log_prob(jnp.array([a]))
        return float(jnp.exp(p) * (p - q))

    np.testing.assert_allclose(d.kl(other), scipy.integrate.quad(integrand, LOW, HIGH, epsabs=1e-9)[0], rtol=1e-6)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_kl_of_narrow_betas_keeps_its_digits_in_float32(size):
    # As differences of log Γ, of the size of `size`, it would have none left at 1e6.
    alpha, other = np.float32([size, 2 * size]), np.float32([size + 0.2 * np.sqrt(size), 2 * size])
    found = beta(*alpha).kl(beta(*other))
    digamma, gammaln = scipy.special.digamma, scipy.special.gammaln
    p, q = (np.array([*v, v.sum()]) for v in (alpha.astype(np.float64), other.astype(np.float64)))
    terms = gammaln(q) - gammaln(p) - (q - p) * digamma(p)
    np.testing.assert_allclose(found, terms[0] + terms[1] - terms[2], rtol=2e-3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.7, 0.3), (-2.0, 0.5), (1.0, 2.0), (4.0, 1.0)])
def test_a_squashed_gaussian_by_quadrature(mean, std):
    d = tanh(mean, std)
    u = np.linspace(-5 + 1e-9, 5 - 1e-9, 20_001)
    slope = np.asarray(jax.vmap(jax.grad(lambda u: 1 + 2 * jnp.tanh(u)))(u))
    # The change of variables, with the Jacobian by autodiff.
    expected = scipy.stats.norm(mean, std).logpdf(u) - np.log(slope)
    np.testing.assert_allclose(density(d, u), expected, rtol=1e-9, atol=1e-9)
    # What lies between the ends and at them is all.
    inside = scipy.integrate.trapezoid(np.exp(density(d, u)) * slope, u)
    ends = np.exp(np.asarray(jax.vmap(d.log_prob)(jnp.array([[LOW], [HIGH]]))))
    gaussian = scipy.stats.norm(mean, std)
    np.testing.assert_allclose(ends, [gaussian.cdf(-5), gaussian.sf(5)], rtol=1e-9)
    np.testing.assert_allclose(inside + ends.sum(), 1, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "mean, std, tolerance", [(0.0, 0.1, 1e-6), (0.7, 0.5, 1e-6), (-1.0, 1.0, 1e-4), (0.0, 3.0, 0.05)]
)
def test_kl_is_invariant_under_tanh_and_entropy_is_that_of_the_density(mean, std, tolerance):
    d, other = tanh(mean, std), tanh(mean + 0.3 * std, 0.8 * std)
    z = np.linspace(-10, 10, 20_001)
    u = mean + std * z
    log_slope = np.log(2) + 2 * (np.log(2) - u - np.logaddexp(0, -2 * u))  # log 2 (1 − tanh² u)
    log_p = scipy.stats.norm(mean, std).logpdf(u) - log_slope
    weights = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(d.entropy(), scipy.integrate.trapezoid(-weights * log_p, z), atol=tolerance)
    log_q = scipy.stats.norm(mean + 0.3 * std, 0.8 * std).logpdf(u) - log_slope
    np.testing.assert_allclose(d.kl(other), scipy.integrate.trapezoid(weights * (log_p - log_q), z), rtol=1e-8)
    assert d.kl(other) == d.base.kl(other.base)


@pytest.mark.long
@pytest.mark.parametrize("action", [LOW, HIGH, LOW - 1, HIGH + 1, 1.0, np.nextafter(np.float32(HIGH), np.float32(0))])
def test_log_probabilities_and_scores_are_finite_at_the_bounds_and_beyond(action):
    squashed = TanhGaussian(
        DiagonalGaussian(jnp.array([-50.0, 0.0, 50.0, 9.0]), jnp.array([-8.0, -3.0, 3.0, 8.0])), LOW, HIGH
    )
    narrow = Beta(jnp.array([1.0, 1e-2, 1e6, 1.0]), jnp.array([1.0, 1e6, 1e6, 1e2]), LOW, HIGH)
    for d in (squashed, narrow):
        value, score = jax.value_and_grad(lambda d: d.log_prob(jnp.full(4, action, jnp.float32)))(d)
        assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(score))
        assert np.isfinite(d.entropy()) and np.isfinite(jax.grad(lambda d: d.entropy())(d).low)
        sample = jax.vmap(d.sample)(jax.random.split(jax.random.key(0), 50))
        assert ((sample >= LOW) & (sample <= HIGH)).all()
        assert ((d.mode() >= LOW) & (d.mode() <= HIGH)).all()


def test_the_score_of_a_saturated_policy_has_mean_zero():
    # Nearly all of its actions are the bound: as clipped values of u they would all pull the mean back.
    d = tanh(5.5, 1.0)
    action = jax.vmap(d.sample)(jax.random.split(jax.random.key(0), 20_000))
    assert 0.6 < np.mean(action == HIGH) < 0.8
    score = jax.jit(jax.vmap(lambda a: jax.grad(lambda d: d.log_prob(a))(d).base))(action)
    for leaf in (score.mean, score.log_std):
        leaf = np.asarray(leaf, np.float64)
        assert abs(leaf.mean()) < 4 * leaf.std() / np.sqrt(len(leaf))


@pytest.mark.parametrize("alpha, other", [(1.0, 1.0), (2.0, 5.0), (0.7, 1.5), (400.0, 1e4)])
def test_samples_of_a_beta_have_its_distribution(alpha, other):
    d, expected = beta(alpha, other), scipy.stats.beta(alpha, other, LOW, HIGH - LOW)
    sample = np.asarray(jax.vmap(d.sample)(jax.random.split(jax.random.key(0), 50_000)), np.float64)
    assert scipy.stats.kstest(sample[:, 0], expected.cdf).pvalue > 1e-3
    assert abs(sample.mean() - expected.mean()) < 4 * expected.std() / np.sqrt(len(sample))


def test_what_is_no_number_is_drawn_as_none_and_leaves_the_others_as_they_are():
    good = Beta(jnp.array([2.0, 3.0]), jnp.array([1.0, 2.0]), LOW, HIGH)
    for bad in (np.nan, np.inf, -1.0):
        sample = Beta(good.alpha.at[0].set(bad), good.beta, LOW, HIGH).sample(jax.random.key(0))
        assert sample[1] == good.sample(jax.random.key(0))[1] and (
            sample[0] == HIGH if bad == np.inf else np.isnan(sample[0])
        )


@pytest.mark.parametrize(
    "alpha, other, mode",
    [(2.0, 3.0, LOW + 4 / 3), (1.0, 2.0, LOW), (2.0, 0.5, HIGH), (1.0, 1.0, 1.0), (0.5, 0.5, 1.0), (0.3, 0.9, 0.0)],
)
def test_the_mode_of_a_beta(alpha, other, mode):
    np.testing.assert_allclose(beta(alpha, other).mode(), [mode], rtol=1e-6, atol=1e-6)


def test_the_mode_of_a_squashed_gaussian_is_its_median():
    np.testing.assert_allclose(tanh(0.5, 1.0).mode(), [1 + 2 * np.tanh(0.5)], rtol=1e-6)
    assert tanh(7.0, 1.0).mode() == HIGH and tanh(-7.0, 1.0).mode() == LOW


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0])
def test_the_score_of_a_beta_with_a_pole_at_0_has_mean_0(alpha):
    """A quarter of the samples of Beta(0.1, 5) lie within float32's eps of 0, where floats are dense."""
    alphas = jnp.full((200_000, 1), alpha)
    action = Beta(alphas, jnp.full_like(alphas, 5.0), 0.0, 1.0).sample(jax.random.key(0))
    score = jax.grad(lambda a: Beta(a, jnp.full_like(a, 5.0), 0.0, 1.0).log_prob(action).sum())(alphas)
    assert abs(score.mean()) < 5 * score.std() / np.sqrt(score.size)
    x = np.float32([1e-30, 1e-10, 0.5])
    expected = scipy.stats.beta(alpha, 5).logpdf(x.astype(np.float64))
    found = Beta(jnp.float32([alpha]), jnp.float32([5]), 0.0, 1.0).log_prob(x[:, None])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
