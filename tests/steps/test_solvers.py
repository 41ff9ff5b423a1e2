"""Conjugate gradient: the right x, also where the matrix or the right-hand side is singular, tiny or broken."""

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trpo_jax import conjugate_gradient


@functools.partial(jax.jit, static_argnames="num_iterations")
def solve(matrix, b, num_iterations=10, tolerance=0.0):
    return conjugate_gradient(lambda v: matrix @ v, b, num_iterations=num_iterations, tolerance=tolerance)


def positive_definite(seed, size, condition=100.0):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return (basis * np.geomspace(1, condition, size)) @ basis.T, rng.normal(size=size)


def rank_two(seed, size, ratio):
    """A rank-2 matrix and its two eigenvectors; the eigenvalues are `ratio` and 1."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, 2)))
    u, v = basis.T
    return ratio * np.outer(u, u) + np.outer(v, v), u, v


@pytest.mark.parametrize("size", [1, 2, 7, 20])
def test_solves_positive_definite_systems(size, x64):
    matrix, b = positive_definite(size, size)
    x, info = solve(matrix, b, num_iterations=3 * size)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-9)
    assert info.converged and info.relative_residual < 1e-12
    np.testing.assert_allclose(info.residual, b - matrix @ x, atol=1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [3, 50, 1000])
@pytest.mark.parametrize("ratio", [1.0, 30.0, 1e3])
@pytest.mark.parametrize("num_iterations", [10, 50])
def test_eigenvector_of_a_rank_two_matrix(dtype, size, ratio, num_iterations, x64):
    # A b = λ b, so x = b/λ and nothing else of minimum norm: steps after convergence would follow rounding errors into
    # the null space, where the residual cannot see them.
    matrix, u, v = rank_two(size, size, ratio)
    for b, eigenvalue in ((u, ratio), (v, 1.0)):
        x, info = solve(matrix.astype(dtype), b.astype(dtype), num_iterations=num_iterations)
        error = np.linalg.norm(np.asarray(x, np.float64) - b / eigenvalue) * eigenvalue
        # Rounding of the larger eigenvalue's products limits what can be known of the smaller one's solution.
        assert error < 50 * ratio / eigenvalue * np.finfo(dtype).eps
        assert info.num_iterations <= 3


def test_frozen_after_convergence():
    matrix, b = (jnp.asarray(a, jnp.float32) for a in positive_definite(0, 6, 10.0))
    reference, info = solve(matrix, b, num_iterations=20)
    assert info.converged and info.num_iterations < 20
    for more in (21, 50, 200):
        x, more_info = solve(matrix, b, num_iterations=more)
        np.testing.assert_array_equal(x, reference)
        assert more_info.num_iterations == info.num_iterations


@pytest.mark.parametrize("exponent", [-100, -40, 3, 60])
def test_powers_of_two_scale_exactly(exponent):
    # In float32 the squared norm of 2⁻¹⁰⁰ b underflows to 0 and that of 2⁶⁰ b overflows together with A.
    matrix, b = (jnp.asarray(a, jnp.float32) for a in positive_definite(1, 12))
    x, info = solve(matrix, b)
    scaled, scaled_info = solve(matrix, jnp.ldexp(b, exponent))
    np.testing.assert_array_equal(scaled, jnp.ldexp(x, exponent))
    assert scaled_info.relative_residual == info.relative_residual


@pytest.mark.parametrize("scale", [1e-4, 1e-20, 1e15])
def test_scale_invariance(scale):
    matrix, b = (jnp.asarray(a, jnp.float32) for a in positive_definite(1, 12, 5.0))
    x, _ = solve(matrix, b)
    scaled, info = solve(matrix, jnp.float32(scale) * b)
    np.testing.assert_allclose(scaled / jnp.float32(scale), x, rtol=1e-4, atol=1e-6)
    assert info.relative_residual < 1e-2


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20])
def test_solution_is_inverse_to_the_scale_of_the_matrix(scale):
    # (c A)⁻¹ b = A⁻¹ b / c, also where the square of x leaves the range of float32.
    scale = np.float32(scale)
    x, info = solve(scale * jnp.diag(jnp.array([1.0, 2.0, 4.0])), jnp.ones(3))
    np.testing.assert_allclose(scale * x, [1.0, 0.5, 0.25], rtol=1e-5)
    assert info.converged and info.relative_residual < 1e-5


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31 - 1), log_condition=st.floats(0, 6), log_scale=st.floats(-15, 15))
def test_error_shrinks_to_the_solution(seed, log_condition, log_scale):
    # In the norm of A the error of conjugate gradient never grows, and size steps end it; in float32 up to rounding.
    with jax.enable_x64(True):
        matrix, b = positive_definite(seed, 6, 10**log_condition)
        b, exact = 10**log_scale * b, 10**log_scale * np.linalg.solve(matrix, b)
        errors = []
        for num_iterations in (1, 3, 6, 30):
            x, info = solve(matrix, b, num_iterations=num_iterations)
            np.testing.assert_allclose(info.residual, b - matrix @ x, atol=1e-10 * np.linalg.norm(b))
            errors.append((x - exact) @ matrix @ (x - exact) / (exact @ matrix @ exact))
        assert all(later <= earlier + 1e-20 for earlier, later in pairwise(errors))
        assert errors[-1] < 1e-14


def test_zero_right_hand_side():
    x, info = solve(jnp.eye(4), jnp.zeros(4))
    np.testing.assert_array_equal(x, 0)
    assert info.converged and info.num_iterations == 0 and info.relative_residual == 0


@pytest.mark.parametrize("size", [8_000, 50_000])
def test_nan_anywhere_in_a_long_right_hand_side_gives_zero(size):
    b = jnp.ones(size).at[size // 2].set(jnp.nan)
    x, info = jax.jit(lambda b: conjugate_gradient(lambda v: 2 * v, b, num_iterations=3))(b)
    assert not x.any()
    assert not info.converged


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_right_hand_side(bad):
    x, info = solve(jnp.eye(3), jnp.array([1.0, bad, 2.0]))
    np.testing.assert_array_equal(x, 0)
    assert not info.converged


def test_non_finite_product_keeps_the_last_x():
    def matvec(v):  # breaks as soon as the search direction has a second component
        return jnp.array([1.0, 2.0]) * v + jnp.where(v[1] != 0, jnp.nan, 0)

    x, info = conjugate_gradient(matvec, jnp.array([1.0, 1.0]), num_iterations=5)
    np.testing.assert_array_equal(x, 0)
    assert not info.converged and info.num_iterations == 0


@pytest.mark.parametrize("eigenvalues", [(-1.0, -2.0), (0.0, 0.0), (2.0, -1.0)])
def test_stops_on_non_positive_curvature(eigenvalues):
    x, _ = solve(jnp.diag(jnp.array(eigenvalues)), jnp.array([0.1, 1.0]))
    assert jnp.isfinite(x).all()
    assert x @ jnp.diag(jnp.array(eigenvalues)) @ x >= 0


def test_tolerance_is_relative():
    matrix, b = (jnp.asarray(a, jnp.float32) for a in positive_definite(2, 30, 1e3))
    loose, loose_info = solve(matrix, b, num_iterations=100, tolerance=0.1)
    _, tight_info = solve(matrix, b, num_iterations=100, tolerance=1e-4)
    assert loose_info.num_iterations < tight_info.num_iterations
    assert loose_info.relative_residual <= 0.1 and tight_info.relative_residual <= 1e-4
    tiny, tiny_info = solve(matrix, 2.0**-27 * b, num_iterations=100, tolerance=0.1)  # a power of two rounds nothing
    assert tiny_info.num_iterations == loose_info.num_iterations
    np.testing.assert_allclose(2.0**27 * tiny, loose, rtol=1e-2, atol=1e-3)


def test_pytrees_equal_flat_vectors():
    matrix, b = (jnp.asarray(a, jnp.float32) for a in positive_definite(3, 10, 5.0))
    flat, _ = solve(matrix, b)
    tree = {"a": b[:6].reshape(2, 3), "b": [b[6:]]}

    def matvec(v):
        product = matrix @ jnp.concatenate([v["a"].ravel(), v["b"][0]])
        return {"a": product[:6].reshape(2, 3), "b": [product[6:]]}

    x, info = conjugate_gradient(matvec, tree, num_iterations=10)
    np.testing.assert_allclose(jnp.concatenate([x["a"].ravel(), x["b"][0]]), flat, rtol=1e-4, atol=1e-6)
    assert jax.tree.structure(info.residual) == jax.tree.structure(tree)


def test_vmap_equals_a_loop():
    systems = [positive_definite(seed, 8) for seed in range(5)]
    matrices, rhs = (jnp.asarray(np.stack(column), jnp.float32) for column in zip(*systems, strict=True))
    rhs = rhs.at[2].set(0)
    batched, _ = jax.vmap(lambda m, b: solve(m, b))(matrices, rhs)
    for i in range(5):
        np.testing.assert_allclose(batched[i], solve(matrices[i], rhs[i])[0], rtol=1e-3, atol=1e-5)


def test_whole_numbers_are_solved_as_floats():
    x, info = conjugate_gradient(lambda v: jnp.array([2.0, 3, 4]) * v, jnp.array([1, 2, 3]))
    np.testing.assert_allclose(x, [1 / 2, 2 / 3, 3 / 4], rtol=1e-6)
    assert info.converged and info.residual.dtype == x.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"num_iterations must be a whole number of at least 1, got 1\.5"):
        conjugate_gradient(lambda v: v, jnp.ones(3), num_iterations=1.5)
