from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats
from jax.flatten_util import ravel_pytree

from trpo_jax.steps.bounded import Beta, TanhGaussian
from trpo_jax.steps.distributions import Categorical, DiagonalGaussian, MultiCategorical
from trpo_jax.steps.objectives import log_barrier

BATCH = 4
KINDS = ("categorical", "gaussian", "shared_log_std", "multi_categorical", "tanh", "beta")
BOUNDS = {"low": (-1.0, 0.0, 2.0), "high": (1.0, 10.0, 2.5)}


def make(kind: str, seed: int, batch: tuple[int, ...] = (BATCH,)):
    rng = np.random.default_rng(seed)

    def normal(*shape: int):
        return jnp.asarray(rng.normal(size=shape), float)

    if kind == "categorical":
        return Categorical(normal(*batch, 5))
    if kind == "gaussian":
        return DiagonalGaussian(normal(*batch, 3), 0.5 * normal(*batch, 3))
    if kind == "shared_log_std":
        return DiagonalGaussian(normal(*batch, 3), 0.5 * normal(3))
    if kind == "tanh":
        return TanhGaussian(DiagonalGaussian(0.5 * normal(*batch, 3), 0.3 * normal(*batch, 3) - 1), **BOUNDS)
    if kind == "beta":
        return Beta(*(1 + jnp.exp(normal(2, *batch, 3))), **BOUNDS)
    return MultiCategorical((normal(*batch, 2), normal(*batch, 3), normal(*batch, 4)))


def softmax(logits) -> np.ndarray:
    return np.asarray(scipy.special.softmax(np.asarray(logits, np.float64), axis=-1))


def draw(distribution, num_samples: int, seed: int = 0):
    """[num_samples, ...] actions."""
    return jax.jit(jax.vmap(distribution.sample))(jax.random.split(jax.random.key(seed), num_samples))


# Against scipy


@pytest.mark.usefixtures("x64")
def test_the_log_barrier_is_minus_the_kl_from_the_uniform_policy_to_this_one():
    d, uniform = make("categorical", 0), Categorical(jnp.zeros(5))
    np.testing.assert_allclose(log_barrier(d), -uniform.kl(d), rtol=1e-12)
    assert log_barrier(uniform) == pytest.approx(0, abs=1e-15)
    slope = jax.grad(lambda logits: log_barrier(Categorical(logits)).sum())(d.logits)
    np.testing.assert_allclose(slope, 1 / 5 - softmax(d.logits), rtol=1e-9)
    several = make("multi_categorical", 0)
    np.testing.assert_allclose(log_barrier(several), sum(log_barrier(c) for c in several.components), rtol=1e-12)
    with pytest.raises(ValueError, match="needs a choice among actions, not a DiagonalGaussian"):
        log_barrier(make("gaussian", 0))


@pytest.mark.parametrize("forbidden", [-jnp.inf, -1e9])
def test_the_log_barrier_leaves_forbidden_actions_out(forbidden):
    free, masked = jnp.array([0.5, -2.0]), jnp.array([0.5, forbidden, -2.0])
    assert log_barrier(Categorical(masked)) == log_barrier(Categorical(free)) < 0
    slope = jax.grad(lambda logits: log_barrier(Categorical(logits)))(masked)
    np.testing.assert_allclose(slope, [0.5 - softmax(free)[0], 0, 0.5 - softmax(free)[1]], atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_categorical_agrees_with_scipy():
    d, other = make("categorical", 0), make("categorical", 1)
    p, q = softmax(d.logits), softmax(other.logits)
    action = jnp.array([0, 3, 4, 2])
    expected = [scipy.stats.multinomial(1, p[n]).logpmf(np.eye(5)[action[n]]) for n in range(BATCH)]
    np.testing.assert_allclose(d.log_prob(action), expected, rtol=1e-12)
    np.testing.assert_allclose(d.entropy(), scipy.stats.entropy(p, axis=-1), rtol=1e-12)
    np.testing.assert_allclose(d.kl(other), scipy.stats.entropy(p, q, axis=-1), rtol=1e-12)
    np.testing.assert_array_equal(d.mode(), p.argmax(-1))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["gaussian", "shared_log_std"])
def test_gaussian_agrees_with_scipy(kind):
    d, other = make(kind, 0), make(kind, 1)
    action = make(kind, 2).mean
    mean, std = np.asarray(d.mean), np.exp(np.asarray(d.log_std))
    other_mean, other_std = np.asarray(other.mean), np.exp(np.asarray(other.log_std))
    assert std.shape == mean.shape
    np.testing.assert_allclose(d.log_prob(action), scipy.stats.norm(mean, std).logpdf(action).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(d.entropy(), scipy.stats.norm(mean, std).entropy().sum(-1), rtol=1e-12)

    def integral(n: int, i: int) -> float:
        p, q = scipy.stats.norm(mean[n, i], std[n, i]), scipy.stats.norm(other_mean[n, i], other_std[n, i])
        low, high = mean[n, i] - 12 * std[n, i], mean[n, i] + 12 * std[n, i]
        return scipy.integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), low, high, limit=200)[0]

    expected = [sum(integral(n, i) for i in range(3)) for n in range(2)]
    np.testing.assert_allclose(d.kl(other)[:2], expected, rtol=1e-7)
    np.testing.assert_array_equal(d.mode(), d.mean)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("sigma", "expected"), [(1.0, 0.005), (0.1, 0.5), (0.01, 50.0)])
def test_gaussian_kl_of_a_mean_shift(sigma, expected):
    # KL = Δμ² / 2σ² with Δμ = 0.1.
    old = DiagonalGaussian(jnp.zeros(1), jnp.log(jnp.array([sigma])))
    new = DiagonalGaussian(jnp.array([0.1]), old.log_std)
    np.testing.assert_allclose(old.kl(new), expected, rtol=1e-12)


@pytest.mark.parametrize("shift", [1e-2, 1e-3, 1e-4])
def test_gaussian_kl_of_a_tiny_change_of_sigma_keeps_its_digits_in_float32(shift):
    # KL = ½ (e^{2u} − 1) − u with u = −shift: u² + 2u³/3 + … . Cancelling terms of order one would leave nothing of it.
    old = DiagonalGaussian(jnp.zeros(1), jnp.zeros(1))
    new = DiagonalGaussian(jnp.zeros(1), jnp.full(1, shift))
    u = -np.float64(np.float32(shift))
    np.testing.assert_allclose(old.kl(new), 0.5 * np.expm1(2 * u) - u, rtol=2e-2 if shift < 1e-3 else 1e-3)


# Identities over every distribution


@pytest.mark.parametrize("kind", KINDS)
def test_kl_against_itself_is_exactly_zero(kind):
    d = make(kind, 0)
    np.testing.assert_array_equal(d.kl(d), np.zeros(BATCH))
    copy = jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), d)
    np.testing.assert_array_equal(jax.jit(lambda a, b: a.kl(b))(d, copy), np.zeros(BATCH))


@pytest.mark.parametrize("kind", KINDS)
def test_kl_entropy_and_score_by_monte_carlo(kind):
    # KL = E_p[log p − log q], H = −E_p[log p], and the score has mean 0: E_p[∇ log p] = 0.
    d, other = make(kind, 0), make(kind, 1)
    action = draw(d, 20_000)

    @jax.jit
    def terms(action):
        log_prob = jax.vmap(d.log_prob)(action)
        score = jax.vmap(lambda a: jax.grad(lambda q: jnp.sum(q.log_prob(a)))(d))(action)
        difference = log_prob - jax.vmap(other.log_prob)(action)
        return difference - d.kl(other), -log_prob - d.entropy(), score

    assert np.all(np.asarray(d.kl(other)) > 0)
    for term in jax.tree.leaves(terms(action)):
        term = np.asarray(term, np.float64)
        error, deviation = np.abs(term.mean(0)), term.std(0) / np.sqrt(len(term))
        assert np.all(error < 4 * deviation + 1e-6)


def dense_fisher(d):
    flat, unravel = ravel_pytree(d)
    return jax.jit(jax.vmap(lambda v: ravel_pytree(d.fisher_product(unravel(v)))[0]))(jnp.eye(flat.size)).T


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", [*KINDS[:-1], pytest.param("beta", marks=pytest.mark.long)])
def test_fisher_product_is_the_hessian_of_the_kl_in_both_directions(kind):
    d = make(kind, 0, (2,))
    flat, unravel = ravel_pytree(d)

    @jax.jit
    def derivatives(flat):
        def forward(x):
            return jnp.sum(d.kl(unravel(x)))

        def reverse(x):
            return jnp.sum(unravel(x).kl(d))

        return jax.hessian(forward)(flat), jax.hessian(reverse)(flat), jax.grad(forward)(flat)

    forward, reverse, gradient = derivatives(flat)
    fisher = dense_fisher(d)
    np.testing.assert_allclose(fisher, forward, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(fisher, reverse, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_fisher_metrics_in_closed_form():
    categorical = make("categorical", 0, ())
    p = softmax(categorical.logits)
    np.testing.assert_allclose(dense_fisher(categorical), np.diag(p) - np.outer(p, p), rtol=1e-12, atol=1e-16)
    gaussian = make("gaussian", 0, ())
    expected = np.diag(np.concatenate([np.exp(-2 * np.asarray(gaussian.log_std)), np.full(3, 2.0)]))
    np.testing.assert_allclose(dense_fisher(gaussian), expected, rtol=1e-12)
    multi = make("multi_categorical", 0, ())
    blocks = [np.diag(q) - np.outer(q, q) for q in map(softmax, multi.logits)]
    np.testing.assert_allclose(dense_fisher(multi), scipy.linalg.block_diag(*blocks), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("kind", KINDS)
def test_pytree_through_jit_vmap_and_tree_map(kind):
    d, other = make(kind, 0), make(kind, 1)
    action = d.sample(jax.random.key(0))

    def describe(d, other, action):
        return d.log_prob(action), d.entropy(), d.kl(other), d.mode(), d.fisher_product(other)

    batched = describe(d, other, action)
    for transform in (jax.jit, jax.vmap):
        for a, b in zip(jax.tree.leaves(transform(describe)(d, other, action)), jax.tree.leaves(batched), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    round_trip = jax.jit(lambda d: d)(d)
    assert type(round_trip) is type(d)
    jax.tree.map(np.testing.assert_array_equal, round_trip, d)
    assert type(jax.tree.map(lambda _: None, d)) is type(d)  # placeholders that are not arrays
    assert type(jax.eval_shape(lambda d: d, d)) is type(d)


@pytest.mark.parametrize("batch", [(), (6,), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind, batch):
    d = make(kind, 0, batch)

    @jax.jit
    def describe(d):
        action, mode = d.sample(jax.random.key(1)), d.mode()
        return action, mode, d.log_prob(action), d.log_prob(mode), d.entropy(), d.kl(d)

    action, mode, log_prob, largest, entropy, kl = describe(d)
    assert action.shape == mode.shape == batch + (() if kind == "categorical" else (3,))
    assert jnp.issubdtype(action.dtype, jnp.integer) == ("categorical" in kind)
    assert log_prob.shape == entropy.shape == kl.shape == batch
    if kind not in ("tanh", "beta"):  # whose modes may be at bounds
        assert np.all(np.asarray(largest) >= np.asarray(log_prob))


# Sampling


def test_categorical_frequencies():
    d = make("categorical", 3, ())
    p, n = softmax(d.logits), 50_000
    frequency = np.bincount(np.asarray(draw(d, n)), minlength=5) / n
    assert np.all(np.abs(frequency - p) < 4 * np.sqrt(p * (1 - p) / n))


def test_multi_categorical_components_are_independent():
    d = make("multi_categorical", 3, ())
    n = 50_000
    samples = np.asarray(draw(d, n))
    joint = np.zeros((2, 3, 4))
    np.add.at(joint, tuple(samples.T), 1 / n)
    p = np.einsum("i,j,k->ijk", *map(softmax, d.logits))
    assert np.all(np.abs(joint - p) < 4.5 * np.sqrt(p * (1 - p) / n))


def test_gaussian_moments():
    d = make("gaussian", 3, ())
    n = 50_000
    samples = np.asarray(draw(d, n), np.float64)
    std = np.exp(np.asarray(d.log_std))
    assert np.all(np.abs(samples.mean(0) - d.mean) < 4 * std / np.sqrt(n))
    # Var[s²] = 2σ⁴/n, and the dimensions are uncorrelated.
    expected = np.diag(std**2)
    deviation = np.sqrt(np.outer(std**2, std**2) / n) * np.sqrt(1 + np.eye(3))
    assert np.all(np.abs(np.cov(samples.T) - expected) < 4 * deviation)


# Reductions


@pytest.mark.usefixtures("x64")
def test_multi_categorical_is_the_sum_of_its_parts():
    d, other, tangent = (make("multi_categorical", seed) for seed in (0, 1, 2))
    action = np.stack([np.arange(BATCH) % logits.shape[-1] for logits in d.logits], axis=-1)

    @jax.jit
    def describe(d, other, tangent, action):
        return d.log_prob(action), d.entropy(), d.kl(other), d.mode(), d.fisher_product(tangent)

    log_prob, entropy, kl, mode, product = describe(d, other, tangent, action)
    parts = [
        describe(Categorical(d.logits[k]), Categorical(other.logits[k]), Categorical(tangent.logits[k]), action[:, k])
        for k in range(3)
    ]
    for total, terms in zip((log_prob, entropy, kl), zip(*(part[:3] for part in parts), strict=True), strict=True):
        np.testing.assert_allclose(total, np.sum(terms, axis=0), rtol=1e-12)
    np.testing.assert_array_equal(mode, np.stack([part[3] for part in parts], axis=-1))
    for logits, part in zip(product.logits, parts, strict=True):
        np.testing.assert_allclose(logits, part[4].logits, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_two_actions_are_a_bernoulli():
    # softmax(z, 0) = sigmoid(z); its Fisher matrix on z is p (1 − p).
    z = jnp.linspace(-3, 3, 7)
    d = Categorical(jnp.stack([z, jnp.zeros_like(z)], axis=-1))
    p = np.asarray(jax.nn.sigmoid(z))
    np.testing.assert_allclose(d.entropy(), scipy.stats.bernoulli(p).entropy(), rtol=1e-12)
    tangent = Categorical(jnp.stack([jnp.ones_like(z), jnp.zeros_like(z)], axis=-1))
    np.testing.assert_allclose(d.fisher_product(tangent).logits[:, 0], p * (1 - p), rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shift", [-1e3, 0.3, 1e3])
def test_categorical_does_not_see_a_common_shift_of_its_logits(shift):
    d = make("categorical", 0)
    shifted = Categorical(d.logits + shift)
    np.testing.assert_allclose(d.kl(shifted), 0, atol=1e-12)
    np.testing.assert_allclose(shifted.entropy(), d.entropy(), rtol=1e-10)
    np.testing.assert_allclose(d.fisher_product(Categorical(jnp.full_like(d.logits, shift))).logits, 0, atol=1e-12)


# Forbidden actions

MASK = np.array([True, False, True, True, False])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("quantity", ["log_prob", "entropy", "kl", "reverse_kl", "fisher"])
def test_a_forbidden_action_is_an_action_that_does_not_exist(quantity):
    # Value and gradient with a logit of −∞ are those of the distribution from which the action was removed.
    logits, other, tangent = make("categorical", 0).logits, make("categorical", 1).logits, make("categorical", 2).logits
    allowed = np.flatnonzero(MASK)
    action = jnp.array([0, 2, 1, 1])

    def value(d, other, action, tangent):
        if quantity == "log_prob":
            return d.log_prob(action)
        if quantity == "entropy":
            return d.entropy()
        if quantity == "kl":
            return d.kl(other)
        if quantity == "reverse_kl":
            return other.kl(d)
        return jnp.sum(tangent.logits * d.fisher_product(tangent).logits, axis=-1)

    def masked(logits):
        def forbid(x):
            return Categorical(jnp.where(MASK, x, -jnp.inf))

        return value(forbid(logits), forbid(other), jnp.asarray(allowed)[action], Categorical(tangent))

    def reduced(logits):
        def remove(x):
            return Categorical(x[:, allowed])

        return value(remove(logits), remove(other), action, remove(tangent))

    value_masked = jax.jit(masked)(logits)
    assert np.all(np.isfinite(value_masked))
    np.testing.assert_allclose(value_masked, jax.jit(reduced)(logits), rtol=1e-12)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(masked(x))))(logits)
    expected = jax.jit(jax.grad(lambda x: jnp.sum(reduced(x))))(logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-15)
    assert np.all(gradient[:, ~MASK] == 0)


def test_forbidden_actions_are_never_taken_and_cannot_be_un_or_newly_forbidden_for_free():
    free = make("categorical", 0)
    masked = Categorical(jnp.where(MASK, free.logits, -jnp.inf))
    assert set(np.unique(draw(masked, 2000))) <= set(np.flatnonzero(MASK))
    assert np.all(MASK[np.asarray(masked.mode())])
    np.testing.assert_array_equal(masked.kl(masked), np.zeros(BATCH))
    # p forbids, q allows: finite. q forbids what p takes: infinite, which every trust region rejects.
    assert np.all(np.isfinite(masked.kl(free)))
    assert np.all(np.asarray(free.kl(masked)) == np.inf)
    certain = Categorical(jnp.array([0.0, -jnp.inf, -jnp.inf]))
    assert certain.entropy() == 0
    assert certain.log_prob(jnp.array(0)) == 0
    np.testing.assert_array_equal(certain.fisher_product(Categorical(jnp.array([1.0, jnp.inf, jnp.nan]))).logits, 0)


def test_truth_values_are_actions_0_and_1():
    distribution = Categorical(jnp.array([[0.0, 1.0], [2.0, -1.0], [0.5, 0.0]]))
    action = jnp.array([True, False, True])
    np.testing.assert_array_equal(distribution.log_prob(action), distribution.log_prob(action.astype(int)))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
def test_an_action_that_does_not_exist_has_no_probability(dtype):
    logits = jnp.zeros((4, 3))
    found = jax.jit(Categorical(logits).log_prob)(np.array([0, 2, 3, -1], dtype))
    np.testing.assert_allclose(found, [-np.log(3), -np.log(3), np.nan, np.nan], rtol=1e-6)
    pair = MultiCategorical((logits, logits)).log_prob(np.array([[0, 1], [0, -1], [3, 1], [2, 2]], dtype))
    assert np.isnan(pair).tolist() == [False, True, True, False]
