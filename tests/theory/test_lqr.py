"""Linear-quadratic regulation: golden numbers, SciPy, and the cliff that a limited step does not fall from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from trpo_jax import DiagonalGaussian, theory
from trpo_jax.theory import LQR, kl_limited_gain_step, scalar_lqr, stable_interval

# Compiled once: one operation at a time they take longer.
gain_kl, plain_gain_step, state_moment = map(jax.jit, (theory.gain_kl, theory.plain_gain_step, theory.state_moment))
lqr_gradient, lqr_return, optimal_gain = map(jax.jit, (theory.lqr_gradient, theory.lqr_return, theory.optimal_gain))


def gain(k):
    return jnp.full((1, 1), float(k))


def matrix_problem(gamma=0.95):
    rng = np.random.default_rng(0)
    dynamics, control = 0.7 * rng.normal(size=(3, 3)), rng.normal(size=(3, 2))
    root = rng.normal(size=(3, 3))
    matrices = dynamics, control, np.diag([1.0, 0.5, 2.0]), np.diag([1.0, 0.3]), root @ root.T + np.eye(3)
    return LQR(*(jnp.asarray(matrix) for matrix in matrices), jnp.asarray(gamma))


def test_scalar_golden_numbers():
    problem = scalar_lqr()
    best = optimal_gain(problem)
    np.testing.assert_allclose(best, [[0.6152512457]], atol=1e-10)
    np.testing.assert_allclose(stable_interval(problem), [-0.005038, 2.005038], atol=1e-6)
    np.testing.assert_allclose(lqr_gradient(gain(0.05), problem), [[165.2]], atol=0.05)
    np.testing.assert_allclose(lqr_gradient(gain(0.1), problem), [[44.85]], atol=0.005)
    curvature = jax.hessian(lambda k: lqr_return(k.reshape(1, 1), problem))(best[0, 0])
    np.testing.assert_allclose(curvature, -6.0908, atol=5e-5)
    np.testing.assert_allclose(-2 / curvature, 0.3284, atol=5e-5)
    np.testing.assert_allclose(optimal_gain(scalar_lqr(gamma=1.0)), [[0.6180339887]], atol=1e-10)


def test_scalar_return_is_its_closed_form_inside_the_interval_and_minus_infinity_outside():
    a, b, q, r, gamma = 1.2, -0.7, 2.0, 0.5, 0.9
    problem = scalar_lqr(a, b, q, r, gamma)
    low, high = stable_interval(problem)
    inside = np.linspace(low + 1e-6, high - 1e-6, 50)
    closed = -(q + r * inside**2) / (1 - gamma * (a - b * inside) ** 2)
    returns = jax.vmap(lambda k: lqr_return(k.reshape(1, 1), problem))
    np.testing.assert_allclose(returns(jnp.asarray(inside)), closed, rtol=1e-9)
    outside = jnp.array([low - 1e-6, high + 1e-6, low - 1, 1e10, -1e200])
    np.testing.assert_array_equal(returns(outside), -np.inf)
    assert np.isnan(lqr_gradient(gain(high + 1e-6), problem))
    with pytest.raises(ValueError, match="one state and one control"):
        stable_interval(matrix_problem())


@pytest.mark.parametrize("gamma", [0.8, 1.0])
def test_optimal_gain_is_scipys(gamma):
    problem = matrix_problem(gamma)
    root = np.sqrt(gamma)  # a discount is a shrunken system
    a, b = root * np.asarray(problem.dynamics), root * np.asarray(problem.control)
    value = scipy.linalg.solve_discrete_are(a, b, np.asarray(problem.state_cost), np.asarray(problem.control_cost))
    expected = np.linalg.solve(problem.control_cost + b.T @ value @ b, b.T @ value @ a)
    best = optimal_gain(problem)
    np.testing.assert_allclose(best, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(lqr_return(best, problem), -np.trace(value @ problem.initial), rtol=1e-10)
    np.testing.assert_allclose(lqr_gradient(best, problem), 0, atol=1e-8)


def test_gradient_is_the_derivative():
    problem = matrix_problem()
    near = optimal_gain(problem) + 0.1 * np.random.default_rng(1).normal(size=(2, 3))
    automatic = jax.jit(jax.grad(lqr_return))(near, problem)
    assert np.abs(automatic).max() > 1
    np.testing.assert_allclose(lqr_gradient(near, problem), automatic, rtol=1e-9)


def test_divergence_of_gains_is_that_of_the_policies_along_the_states():
    # Σ_t (1 − γ) γᵗ E[KL(x_t)], the moments of x_t propagated one step at a time.
    problem, std = matrix_problem(), 0.4
    old = optimal_gain(problem)
    new = old + 0.05 * np.random.default_rng(2).normal(size=(2, 3))
    closed_loop = np.asarray(problem.dynamics - problem.control @ old)
    moment, total, density = np.asarray(problem.initial), np.zeros((3, 3)), 1 - 0.95
    for _ in range(1000):
        total += density * moment
        density *= 0.95
        moment = closed_loop @ moment @ closed_loop.T + std**2 * np.asarray(problem.control @ problem.control.T)
    np.testing.assert_allclose(state_moment(old, problem, std), total, rtol=1e-10)
    # For a fixed x the distributions' own KL; its mean over any x with this moment is the same.
    x = np.linalg.cholesky(total).T * np.sqrt(3)  # 3 states, whose mean of x xᵀ is `total`
    log_std = jnp.full(2, jnp.log(std))
    kl = DiagonalGaussian(-x @ old.T, log_std).kl(DiagonalGaussian(-x @ new.T, log_std))
    np.testing.assert_allclose(gain_kl(old, new, problem, std), kl.mean(), rtol=1e-10)


@pytest.mark.parametrize(("std", "kl"), [(1.0, 0.005), (0.1, 0.5), (0.01, 50)])
def test_one_change_is_a_small_or_a_huge_divergence(std, kl):
    # The means move by .1 at every state: γ = 0 and E[x²] = 1 leave only the first.
    np.testing.assert_allclose(gain_kl(gain(0.5), gain(0.6), scalar_lqr(gamma=0.0), std), kl, rtol=1e-12)


def test_a_plain_step_falls_off_the_cliff():
    problem = scalar_lqr()
    _, high = stable_interval(problem)
    new = plain_gain_step(gain(0.05), problem, 0.02)
    assert new > high
    assert lqr_return(new, problem) == -np.inf
    assert np.isnan(plain_gain_step(new, problem, 0.02))
    # A step of 1e-4 is safe here, and crawls elsewhere: after 300 of them a third of the way is left.
    crawl = jax.jit(lambda k: jax.lax.fori_loop(0, 300, lambda _, k: plain_gain_step(k, problem, 1e-4), k))
    assert 0.05 < crawl(gain(0.05)) < optimal_gain(problem) * 2 / 3


def test_a_limited_step_converges_from_the_same_start():
    problem = scalar_lqr()
    best = lqr_return(optimal_gain(problem), problem)
    step = jax.jit(lambda k: kl_limited_gain_step(k, problem, std=0.3, shrink=0.5))
    k, gaps = gain(0.05), []
    for _ in range(10):
        old, (k, info) = k, step(k)
        assert info.accepted
        assert gain_kl(old, k, problem, 0.3) <= 0.01
        np.testing.assert_allclose(info.divergence, 0.01 * info.step_fraction**2, rtol=1e-10)
        gaps.append(float(best - lqr_return(k, problem)))
    assert np.all(np.diff(gaps) < 0)
    assert gaps[0] > 1
    assert gaps[7] < 1e-3


def test_limited_steps_converge_in_several_dimensions():
    problem = matrix_problem()
    best = optimal_gain(problem)
    start = best + 0.15 * np.random.default_rng(3).normal(size=(2, 3))
    assert -np.inf < lqr_return(start, problem) < lqr_return(best, problem) - 1

    def step(k, _):
        return kl_limited_gain_step(k, problem, std=0.3, shrink=0.5)

    end, info = jax.jit(lambda k: jax.lax.scan(step, k, None, length=60))(start)
    assert np.all(info.surrogate_gain[info.accepted] > 0)
    np.testing.assert_allclose(lqr_return(end, problem), lqr_return(best, problem), rtol=1e-4)
