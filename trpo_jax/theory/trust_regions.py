"""Exact solution of the trust-region subproblem, and a minimiser that uses it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from trpo_jax.steps.radii import adapt_radius_by_ratio
from trpo_jax.steps.types import Array, Scalar
from trpo_jax.theory.linear_algebra import contract, decreasing_root


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrustRegionTrace:
    """The steps of a minimisation, one entry per iteration t < T.

    Attributes:
      position: x_t before the step, [T, n].
      radius: δ_t, the largest length of the step, [T].
      step: Δ_t, [T, n], whether or not it was taken.
      ratio: actual over predicted decrease, [T]; 1 where the model is exact.
      accepted: whether the step was taken, bool [T].
    """

    position: Array
    radius: Array
    step: Array
    ratio: Array
    accepted: Array


def solve_trust_region(gradient: Array, hessian: Array, radius: Scalar) -> tuple[Array, Array]:
    """Minimise gᵀΔ + ½ ΔᵀB Δ over Δ subject to ‖Δ‖ ≤ δ, exactly, also for an indefinite B.

    Δ is the minimiser iff (B + λI) Δ = −g, λ (δ − ‖Δ‖) = 0, λ ≥ 0 and B + λI is positive semidefinite. In the
    eigenbasis of B, ‖Δ(λ)‖ is explicit and decreasing in λ. In the "hard case", where it stays below δ as far down as
    λ = −λ_min, an eigenvector of λ_min fills the gap.

    Args:
      gradient: g, [n].
      hessian: B, symmetric, [n, n].
      radius: δ > 0.

    Returns:
      Δ, [n], and the multiplier λ ≥ 0, a scalar. The eigenvectors come from LAPACK, so solve few problems at a time.

    Source: Moré & Sorensen 1983; Nocedal & Wright 2006, theorem 4.1 and section 4.3.
    """
    eigenvalue, basis = jnp.linalg.eigh(hessian)
    slope = contract("ij,i->j", basis, gradient)
    least = jnp.maximum(-eigenvalue[0], 0)  # the smallest λ that leaves no negative curvature
    curvature = eigenvalue + least
    norm = jnp.linalg.norm(slope)

    def coordinates(extra: Array) -> Array:
        # A direction without a slope is not taken, even if it is flat as well: 0/0.
        return jnp.where(slope == 0, 0, -slope / jnp.where(slope == 0, 1, curvature + extra))

    def length_excess(extra: Array) -> Array:
        return jnp.sum(coordinates(extra) ** 2) - radius**2

    # ‖Δ‖ ≤ ‖g‖/λ. Bisection that goes to 0 exactly needs as many halvings as there are exponents.
    root = decreasing_root(length_excess, jnp.zeros_like(norm), norm / radius, num_iterations=200)
    extra = jnp.where(length_excess(jnp.zeros_like(norm)) <= 0, 0, root)
    step = coordinates(extra)
    gap = jnp.sqrt(jnp.maximum(radius**2 - jnp.sum(step**2), 0))
    hard = (eigenvalue[0] < 0) & (extra == 0)
    step = step.at[0].add(jnp.where(hard, gap, 0))
    return contract("ij,j->i", basis, step), least + extra


def trust_region_minimize(
    fn: Callable[[Array], Array],
    position: Array,
    *,
    radius: Scalar,
    maximum_radius: Scalar,
    num_iterations: int,
    minimum_radius: Scalar = 0.0,
) -> tuple[Array, TrustRegionTrace]:
    """Minimise a smooth function by its exact quadratic models inside a radius that `adapt_radius_by_ratio` sets.

    A step is taken if it lowers the function.

    Args:
      fn: [n] -> scalar, twice differentiable.
      position: x_0, [n].
      radius: δ_0 > 0.
      maximum_radius: δ_max.
      num_iterations: T (static).
      minimum_radius: δ_min.

    Returns:
      x_T, [n], and a `TrustRegionTrace`.

    Source: Nocedal & Wright 2006, algorithm 4.1.
    """

    def iterate(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], TrustRegionTrace]:
        position, radius = carry
        gradient, hessian = jax.grad(fn)(position), jax.hessian(fn)(position)
        step, multiplier = solve_trust_region(gradient, hessian, radius)
        predicted = -(jnp.sum(gradient * step) + 0.5 * contract("i,ij,j->", step, hessian, step))
        actual = fn(position) - fn(position + step)
        ratio = actual / predicted
        accepted = actual > 0
        trace = TrustRegionTrace(position, radius, step, ratio, accepted)
        radius = adapt_radius_by_ratio(radius, ratio, multiplier > 0, minimum_radius, maximum_radius)
        return (jnp.where(accepted, position + step, position), radius), trace

    start = position, jnp.asarray(radius, position.dtype)
    (position, _), trace = jax.lax.scan(iterate, start, None, length=num_iterations)
    return position, trace
