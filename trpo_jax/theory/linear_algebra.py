"""Small linear systems without LAPACK, and root finding, for the exact formulas.

LAPACK calls batched by `vmap` may wait for one another in XLA's CPU thread pool on machines of few cores; plain
elimination is a loop of ordinary array operations, which batches like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from trpo_jax.steps.types import Array, Scalar

# TF32 products would leave three digits of an "exact" formula.
contract = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def product(*matrices: Array) -> Array:
    """Multiply all arguments as matrices."""
    return functools.reduce(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST), matrices)


def solve(matrix: Array, rhs: Array) -> Array:
    """Solve matrix · x = rhs by Gauss–Jordan elimination with partial pivoting, in O(n³).

    Args:
      matrix: [n, n]. If it is singular, the result is not finite.
      rhs: [n] or [n, m].

    Returns:
      x in the shape of rhs. Derivatives of any order and mode solve further systems with the same matrix and do not
      pass through the elimination.
    """
    chex.assert_rank([matrix, rhs], [2, {1, 2}])
    dtype = jnp.result_type(matrix, rhs, float)
    matrix, rhs = jnp.asarray(matrix, dtype), jnp.asarray(rhs, dtype)
    return jax.lax.custom_linear_solve(
        lambda x: contract("ij,j...->i...", matrix, x),
        rhs,
        lambda _, b: _gauss_jordan(matrix, b),
        lambda _, b: _gauss_jordan(matrix.T, b),
    )


def _gauss_jordan(matrix: Array, rhs: Array) -> Array:
    size = matrix.shape[0]

    def eliminate(i: Array, table: Array) -> Array:
        below = jnp.arange(size) >= i
        pivot = jnp.argmax(jnp.where(below, jnp.abs(table[:, i]), -1))
        table = table.at[jnp.array([i, pivot])].set(table[jnp.array([pivot, i])])
        row = table[i] / table[i, i]
        return (table - table[:, i, None] * row).at[i].set(row)

    table = jnp.concatenate([matrix, rhs.reshape(size, -1)], axis=1)
    return jax.lax.fori_loop(0, size, eliminate, table)[:, size:].reshape(rhs.shape)


def decreasing_root(fn: Callable[[Array], Array], low: Scalar, high: Scalar, num_iterations: int = 60) -> Array:
    """Find x in [low, high] with fn(x) = 0 for an elementwise decreasing fn, by bisection; an end if there is none.

    Args:
      fn: arrays [...] -> arrays [...], each entry of the result depending on the same entry of the argument.
      low: lower ends, broadcast against `high` to [...].
      high: upper ends.
      num_iterations: halvings (static); 60 exhaust float64.
    """

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        root_above = fn(middle) > 0
        return jnp.where(root_above, middle, low), jnp.where(root_above, high, middle)

    left, right = jax.lax.fori_loop(0, num_iterations, halve, tuple(jnp.broadcast_arrays(low, high)))
    return (left + right) / 2
