"""Conjugate gradient over pytrees, safe for every degenerate case of a Fisher matrix."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trpo_jax import backend
from trpo_jax.steps import defaults, trees
from trpo_jax.steps.types import Array, Matvec, PyTree, Scalar, as_float, check_count, check_scalars


class Solver(NamedTuple):
    """Settings for solving (A + λ I) x = b by conjugate gradient.

    Attributes:
      damping: λ ≥ 0, added to the diagonal.
      iterations: largest number k of products (static).
      tolerance: relative residual at which it stops before k products; 0: only where no further product would help.
    """

    damping: Scalar = defaults.CG_DAMPING
    iterations: int = defaults.CG_ITERATIONS
    tolerance: Scalar = defaults.CG_TOLERANCE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConjugateGradientInfo:
    """Result of a solve.

    Attributes:
      residual: b − A x, a pytree like b.
      relative_residual: ‖b − A x‖ / ‖b‖; 0 for b = 0, not finite if b is not.
      num_iterations: steps taken before the solver froze, int32.
      converged: whether the residual reached the tolerance or the limit of the arithmetic, bool.
    """

    residual: PyTree
    relative_residual: Array
    num_iterations: Array
    converged: Array


def conjugate_gradient(
    matvec: Matvec, b: PyTree, *, num_iterations: int = 10, tolerance: Scalar = 0.0
) -> tuple[PyTree, ConjugateGradientInfo]:
    """Solve A x = b for a symmetric positive semi-definite A, starting from x = 0.

    The loop has a fixed length and *freezes* — x no longer changes — once one of these holds:

      - ‖r‖ ≤ tolerance · ‖b‖, or r consists of the rounding errors of A x, so that further steps would be noise: for a
        singular A they would fill x with null-space directions while the residual still looks small;
      - the curvature pᵀA p is not positive, or is zero at working precision compared with the largest curvature so far;
      - a product is not finite.

    b is scaled by a power of two first, so x(c·b) = c·x(b) however small c is, with no ε in any denominator.

    Args:
      matvec: v ↦ A v over pytrees like b.
      b: right-hand side. b = 0, or a b that is not finite, gives x = 0. Whole numbers become floats.
      num_iterations: k, the number of products.
      tolerance: relative residual that counts as solved, ≥ 0.

    Returns:
      x, a pytree like b, and a `ConjugateGradientInfo`.

    Raises:
      ValueError: if `num_iterations` is not a whole number ≥ 1, or `tolerance` not a number.

    Source: Hestenes & Stiefel 1952; Nocedal & Wright 2006, algorithm 5.2; attainable accuracy after Greenbaum 1997.
    """
    check_count("num_iterations", num_iterations)
    check_scalars(tolerance=tolerance)
    b = jax.tree.map(as_float, b)
    largest_entry = trees.max_abs(b)
    solvable = (largest_entry > 0) & jnp.isfinite(largest_entry)
    # A power of two scales without rounding: x(2ⁿ b) = 2ⁿ x(b) to the bit.
    exponent = jnp.frexp(jnp.where(solvable, trees.divisor(largest_entry), 1))[1] - 1
    scale = jnp.ldexp(jnp.ones_like(largest_entry), exponent)
    unit_b = jax.tree.map(lambda leaf: jnp.where(solvable, leaf / scale, 0).astype(leaf.dtype), b)
    b_norm = jnp.sqrt(trees.dot(unit_b, unit_b))
    eps = jnp.finfo(b_norm.dtype).eps
    rounding = 10 * eps

    def step(_: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        x, r, p, r_norm, largest, active, converged, count = carry
        a_p = matvec(p)
        p_a_p, p_squared = trees.dot(p, a_p), trees.dot(p, p)
        rayleigh = p_a_p / jnp.where(active, p_squared, 1)
        largest = jnp.where(active & (rayleigh > largest), rayleigh, largest)
        positive = active & (rayleigh > rounding * largest)  # False for NaN and for 0 > 0
        alpha = jnp.where(positive, r_norm**2 / jnp.where(positive, p_a_p, 1), 0)
        new_x, new_r = trees.add_scaled(x, alpha, p), trees.add_scaled(r, -alpha, a_p)
        new_r_norm = jnp.sqrt(trees.dot(new_r, new_r))
        # A residual made of rounding errors lies mostly outside the range of a singular A. A step along it multiplies
        # the residual by the tangent of its angle to A r, which reveals such a step before it is taken.
        noise = (r_norm <= 1e3 * eps * b_norm) & (new_r_norm > 10 * r_norm)
        moved = positive & jnp.isfinite(new_r_norm) & ~noise
        x, r = trees.select(moved, new_x, x), trees.select(moved, new_r, r)
        beta = jnp.where(moved, (new_r_norm / r_norm) ** 2, 0)
        p = trees.select(moved, trees.add_scaled(r, beta, p), p)
        r_norm = jnp.where(moved, new_r_norm, r_norm)
        x_norm = jnp.sqrt(trees.dot(x, x))  # infinite for tiny A, where it is not used
        floor = rounding * (jnp.where(jnp.isfinite(x_norm), largest * x_norm, 0) + b_norm)
        converged = converged | (active & (noise | (r_norm <= jnp.maximum(tolerance * b_norm, floor))))
        return x, r, p, r_norm, largest, moved & ~converged, converged, count + moved

    def step_if_active(i: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        # Where branches are cheap, a frozen step is skipped. An accelerator would wait for the branch.
        if not backend.branches_are_cheap():
            return step(i, carry)
        return jax.lax.cond(carry[5], lambda: step(i, carry), lambda: carry)

    zero = jax.tree.map(jnp.zeros_like, unit_b)
    start = (zero, unit_b, unit_b, b_norm, jnp.zeros_like(b_norm), solvable, largest_entry == 0, jnp.int32(0))
    x, r, _, r_norm, _, _, converged, count = jax.lax.fori_loop(0, num_iterations, step_if_active, start)

    info = ConjugateGradientInfo(
        residual=jax.tree.map(lambda leaf, b_leaf: jnp.where(solvable, scale * leaf, b_leaf), r, b),
        relative_residual=jnp.where(solvable, r_norm / jnp.where(solvable, b_norm, 1), largest_entry),
        num_iterations=count,
        converged=converged,
    )
    return jax.tree.map(lambda leaf: jnp.where(solvable, scale * leaf, 0).astype(leaf.dtype), x), info
