"""The subproblem's optimality conditions, and the rules for its radius."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trpo_jax.theory import (
    adapt_radius_by_divergence,
    adapt_radius_by_ratio,
    solve_trust_region,
    trust_region_minimize,
)

solver = jax.jit(solve_trust_region)


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


@jax.jit
def minimize_rosenbrock(start, radius):
    return trust_region_minimize(rosenbrock, start, radius=radius, maximum_radius=100, num_iterations=60)


def check_optimal(gradient, hessian, radius, step, multiplier):
    """The conditions that are necessary and sufficient for the global minimum in the ball."""
    shifted = hessian + multiplier * np.eye(len(gradient))
    assert np.abs(shifted @ step + gradient).max() < 1e-8
    assert multiplier * abs(radius - np.linalg.norm(step)) < 1e-8
    assert multiplier >= 0
    assert np.linalg.eigvalsh(shifted)[0] > -1e-10
    assert np.linalg.norm(step) < radius * (1 + 1e-10)


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("radius", [1e-3, 1.0, 1e3])
def test_subproblem_is_solved_to_its_optimality_conditions(size, radius):
    rng = np.random.default_rng(size)
    for shift in (-3.0, 0.0, 5.0):  # from negative to positive definite
        for _ in range(5):
            matrix, gradient = rng.normal(size=(size, size)), rng.normal(size=size)
            hessian = (matrix + matrix.T) / 2 + shift * np.eye(size)
            check_optimal(gradient, hessian, radius, *solver(gradient, hessian, radius))


def test_inside_the_region_it_is_newtons_step():
    hessian, gradient = jnp.array([[3.0, 1.0], [1.0, 2.0]]), jnp.array([1.0, -1.0])
    step, multiplier = solver(gradient, hessian, 10.0)
    assert multiplier == 0
    np.testing.assert_allclose(step, -np.linalg.solve(hessian, gradient), rtol=1e-14)


@pytest.mark.parametrize(
    ("hessian", "gradient"),
    [
        (np.diag([-2.0, 1.0]), [0.0, 1.0]),  # no slope along the negative curvature: the hard case
        (np.diag([-2.0, 1.0]), [1e-9, 1.0]),  # nearly so
        (np.diag([-2.0, -2.0]), [0.0, 0.0]),  # a maximum
        (np.diag([0.0, 1.0]), [0.0, 1.0]),  # flat, and no reason to go there
        (np.diag([0.0, 1.0]), [1.0, 1.0]),  # flat, downhill
        (np.zeros((2, 2)), [3.0, 4.0]),  # a linear function
    ],
)
@pytest.mark.parametrize("angle", [0.0, 1.0])  # turned, a slope of 0 is one of 1e-17
def test_degenerate_subproblems(hessian, gradient, angle):
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    least = hessian[0, 0]
    hessian, gradient = turn @ hessian @ turn.T, turn @ np.array(gradient)
    step, multiplier = solver(gradient, hessian, 2.0)
    check_optimal(gradient, hessian, 2.0, step, multiplier)
    if least < 0:
        np.testing.assert_allclose(np.linalg.norm(step), 2, rtol=1e-9)


@pytest.mark.parametrize("radius", [1e-3, 1.0, 100.0])  # 100 times too small, about right, 100 times too large
def test_rosenbrock_converges_from_any_radius(radius):
    end, trace = minimize_rosenbrock(jnp.array([-1.2, 1.0]), radius)
    np.testing.assert_allclose(end, 1, atol=1e-8)
    assert np.all(np.linalg.norm(trace.step, axis=1) <= trace.radius * (1 + 1e-9))
    values = jax.vmap(rosenbrock)(trace.position)
    assert np.all(np.diff(values) <= 0)
    np.testing.assert_array_equal(trace.position[1:][~trace.accepted[:-1]], trace.position[:-1][~trace.accepted[:-1]])
    if radius == 100:
        assert not trace.accepted[1:10].all()  # rejections, by which the radius recovers


def test_on_a_quadratic_the_model_is_exact_and_the_radius_grows_to_its_cap():
    hessian = jnp.array([[3.0, 1.0], [1.0, 2.0]])
    start = jnp.array([1e3, -2e3])
    _, trace = trust_region_minimize(
        lambda x: 0.5 * x @ hessian @ x, start, radius=1e-2, maximum_radius=5.0, num_iterations=12
    )
    np.testing.assert_allclose(trace.ratio, 1, atol=1e-6)
    np.testing.assert_allclose(trace.radius, np.minimum(1e-2 * 2.0 ** np.arange(12), 5), rtol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "at_boundary", "factor"),
    [
        (0.24, True, 0.25),
        (0.25, True, 1),
        (0.75, True, 1),
        (0.76, True, 2),
        (0.76, False, 1),
        (-3.0, False, 0.25),
        (np.nan, True, 0.25),
        (np.inf, True, 0.25),
        (-np.inf, True, 0.25),
    ],
)
def test_radius_follows_the_ratio(ratio, at_boundary, factor):
    assert adapt_radius_by_ratio(0.1, ratio, at_boundary, 1e-4, 1.0) == pytest.approx(0.1 * factor)
    traced = jax.jit(adapt_radius_by_ratio)(jnp.float32(0.1), ratio, at_boundary, 1e-4, 1.0)
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, 0.1 * factor, rtol=1e-6)


@pytest.mark.parametrize(
    ("kl", "factor"), [(0.0151, 0.5), (0.0149, 1), (0.0067, 1), (0.0066, 2), (0.0, 2), (np.nan, 0.5), (np.inf, 0.5)]
)
def test_radius_follows_the_divergence(kl, factor):
    assert adapt_radius_by_divergence(0.1, kl, 0.01, 1e-4, 1.0) == pytest.approx(0.1 * factor)
    traced = jax.jit(adapt_radius_by_divergence)(jnp.float32(0.1), kl, 0.01, 1e-4, 1.0)
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, 0.1 * factor, rtol=1e-6)


def test_radius_stays_between_its_bounds():
    assert adapt_radius_by_ratio(0.1, 1.0, True, 0.01, 0.15) == pytest.approx(0.15)
    assert adapt_radius_by_ratio(0.02, 0.0, True, 0.01, 0.15) == pytest.approx(0.01)
    assert adapt_radius_by_divergence(0.1, 0.0, 0.01, 0.01, 0.15) == pytest.approx(0.15)
    assert adapt_radius_by_divergence(0.015, 1.0, 0.01, 0.01, 0.15) == pytest.approx(0.01)
