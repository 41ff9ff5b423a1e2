"""The TRPO update: the natural-gradient direction, the length the trust region allows, and a line search.

    maximise  L(θ) = E[π_θ/π_old · A]   subject to   E[KL(π_old ‖ π_θ)] ≤ δ

Shapes: B is the batch; P the number of policy parameters, in any pytree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax.steps import defaults, trees
from trpo_jax.steps.blocks import forward_and_gradient
from trpo_jax.steps.curvature import curvature_sample, fisher_vector_product
from trpo_jax.steps.distributions import Distribution
from trpo_jax.steps.line_searches import Evaluate, backtracking_line_search
from trpo_jax.steps.objectives import Bonus, clipped_objective, entropy_bonus, mean_kl
from trpo_jax.steps.policy_updates import (
    Batch,
    Divergence,
    UpdateInfo,
    finite_info,
    held_out_gain,
    make_evaluate,
    of_old_policy,
    surrogate_gradient,
)
from trpo_jax.steps.solvers import Solver, conjugate_gradient
from trpo_jax.steps.types import Array, DistributionFn, PolicyApply, PyTree, Scalar, check_count, check_scalars

_SOLVER = Solver()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NaturalGradientInfo:
    """Report of the solve for a step; its numbers are not finite if the gradient is not.

    Attributes:
      predicted_gain: gᵀs, the surrogate gain of the linear model at the full step s.
      gradient_norm: ‖g‖₂.
      cg_residual: ‖g − (F + λ_d I) x‖ / ‖g‖.
      cg_iterations: conjugate-gradient steps taken before the solver froze, int32.
    """

    predicted_gain: Array
    gradient_norm: Array
    cg_residual: Array
    cg_iterations: Array


def natural_gradient(
    distribution_fn: DistributionFn,
    params: PyTree,
    gradient: PyTree,
    *,
    max_kl: Scalar,
    kl_penalty: Scalar = 0.0,
    solver: Solver = _SOLVER,
    weight: Array | None = None,
) -> tuple[PyTree, NaturalGradientInfo]:
    """Compute the step s = β x with x ≈ (F + λ_d I)⁻¹ g and β = √(2δ / xᵀF x), so that ½ sᵀF s = δ.

    With a penalty c > 0 the step is no longer than s = x / c, which maximises gᵀs − ½ c sᵀ(F + λ_d I) s. Where little
    is to be gained, g is short, and the step ends well inside the region.

    β uses the *undamped* curvature, which the residual r of conjugate gradient gives without another product:
    xᵀF x = xᵀ(g − r) − λ_d ‖x‖². With the damped curvature the step would end short of the boundary.

    Args:
      distribution_fn: `distribution_fn(params)` -> distribution with batch shape [B].
      params: θ_old, a pytree.
      gradient: g = ∇L(θ_old), the direction of ascent, a pytree like params.
      max_kl: δ > 0, in nats.
      kl_penalty: c ≥ 0, in units of the surrogate per nat; 0: none.
      solver: λ_d, at most k iterations, and the residual ‖g − (F + λ_d I) x‖ / ‖g‖ at which it stops before that.
      weight: sample weights [B] for F, see `fisher_vector_product`.

    Returns:
      The full step (zero if g is zero or not finite, or the curvature along x is not positive) and a
      `NaturalGradientInfo`.

    Source: Schulman et al. 2015, Appendix C; Kakade 2001.
    """
    check_scalars(max_kl=max_kl, kl_penalty=kl_penalty)
    matvec = fisher_vector_product(distribution_fn, params, damping=solver.damping, weight=weight)
    # The step does not depend on the length of g; at length one its square can neither under- nor overflow.
    gradient_norm = trees.norm(gradient)
    usable = (gradient_norm > 0) & jnp.isfinite(gradient_norm)
    length = jnp.where(usable, trees.divisor(gradient_norm), 1)
    unit = jax.tree.map(lambda leaf: jnp.where(usable, leaf / length, 0).astype(leaf.dtype), gradient)
    x, cg = conjugate_gradient(matvec, unit, num_iterations=solver.iterations, tolerance=solver.tolerance)

    applied = jax.tree.map(jnp.subtract, unit, cg.residual)  # (F + λ_d I) x
    curvature = trees.dot(x, applied) - solver.damping * trees.dot(x, x)  # xᵀF x
    positive = (curvature > 0) & jnp.isfinite(curvature)
    # Slightly inside the region: where the KL is exactly quadratic, rounding must not reject the full step.
    beta = jnp.where(positive, _inside(curvature) * jnp.sqrt(2 * max_kl / jnp.where(positive, curvature, 1)), 0)
    penalised = jnp.asarray(kl_penalty) > 0
    longest = gradient_norm / jnp.where(penalised, kl_penalty, 1)  # x belongs to a gradient of length one
    beta = jnp.where(penalised, jnp.minimum(beta, longest), beta)
    step = jax.tree.map(lambda leaf: jnp.where(positive, beta * leaf, 0).astype(leaf.dtype), x)
    info = NaturalGradientInfo(
        predicted_gain=gradient_norm * trees.dot(unit, step),
        gradient_norm=gradient_norm,
        cg_residual=cg.relative_residual,
        cg_iterations=cg.num_iterations,
    )
    return step, info


def _inside(like: Array) -> Any:
    """A factor below 1 by the rounding error of a divergence."""
    return 1 - 16 * jnp.finfo(like.dtype).eps


def trpo_update(
    policy_apply: PolicyApply,
    params: PyTree,
    *parts: Any,
    max_kl: Scalar = defaults.MAX_KL,
    constraint: Divergence = mean_kl,
    fisher_fraction: float = defaults.FISHER_FRACTION,
    solver: Solver = _SOLVER,
    line_search: Callable[..., Any] = backtracking_line_search,
    entropy_coefficient: Scalar = 0.0,
    bonus: Bonus = entropy_bonus,
    kl_penalty: Scalar = 0.0,
    num_steps: int = 1,
    clip_ratio: Scalar = defaults.CLIP_RATIO,
    last_step: PyTree | None = None,
) -> tuple[PyTree, UpdateInfo]:
    """Take one trust-region step on a batch that was collected by the policy at `params`, or by earlier policies.

        trpo_update(policy_apply, params, observation, action, advantage, max_kl=δ)

    The gradient, the line search's surrogate and its KL use every sample; the Fisher matrix uses an evenly spread
    fraction of them. The step is taken only if the surrogate improves and the divergence stays within max_kl.
    Otherwise, or if any number is not finite, the parameters are returned bit for bit.

    One linear step spends much of its divergence on few samples with large advantages. With `num_steps` K > 1 the
    step is the sum of K natural-gradient steps, each from where the one before led and each of δ/K^1.5, on the
    surrogate with clipped ratios, mean_n[min(r_n A_n, clip(r_n, 1 − ε, 1 + ε) A_n)]: a sample whose ratio r_n has moved
    by ε in the direction of its advantage has no further say. No further step begins outside the trust region, a sum
    that ends there is shortened, and the line search treats it as any other step, with the surrogate as it is.

    Args:
      policy_apply: `policy_apply(params, observation)` -> a `Distribution`: `Categorical`, `DiagonalGaussian`,
        `MultiCategorical` or any object with their methods. It may come from linen, nnx, equinox or plain functions.
      params: policy parameters, a pytree of float arrays.
      parts: observation [B, ...], action [B] or [B, D] and advantage [B] of the batch; or one `Batch`.
      max_kl: δ > 0, a bound on the divergence (not a target), nats.
      constraint: the divergence that δ bounds, `constraint(old_distribution, distribution)` -> a scalar: `mean_kl`;
        `maximum_kl`, as in the theory; `reverse_kl`; or another that equals the KL to second order.
      fisher_fraction: share of the batch from which the Fisher matrix is estimated, in (0, 1] (static).
      solver: settings for solving (F + λ_d I) x = g. λ_d damps the direction, not the length of the step.
      line_search: `backtracking_line_search`, `parallel_line_search`, or `full_step` (the natural gradient method). For
        other candidates give `functools.partial(backtracking_line_search, shrink=α, max_steps=n)`.
      entropy_coefficient: c of a bonus c · mean entropy in the objective.
      bonus: the function of a distribution whose mean over the batch c weighs, [B]: its entropy, or `log_barrier`.
      kl_penalty: c ≥ 0: no natural-gradient step is longer than F⁻¹g / c, see `natural_gradient`. Without it, every
        step uses all of δ, even where advantages are small and mostly noise.
      num_steps: K ≥ 1, natural-gradient steps within the trust region; K solves (static).
      clip_ratio: ε > 0, which matters from the second step on.
      last_step: the step that led to `params` from those of another batch, a pytree like params. The report then has
        its gain on this batch, to first order, as `extra["held_out_gain"]`: gᵀ last_step.

    Returns:
      The new parameters and an `UpdateInfo` of scalars.

    Raises:
      ValueError: if `max_kl`, `kl_penalty` or another float is no number, `fisher_fraction` is outside (0, 1],
        `constraint`, `bonus` or `line_search` is no function, `solver` is no `Solver`, `num_steps` is no whole number
        ≥ 1, or a leaf of `params` is not an array of floats.
      TypeError: if an option is unknown, or the batch is missing.
      AssertionError, ValueError: if the shapes of the batch do not agree.

    Source: Schulman et al. 2015, section 6 and Appendix C; the clipped surrogate of further steps is that of Schulman
    et al. 2017, equation 7.
    """
    check_count("num_steps of a policy update", num_steps)
    check_scalars(max_kl=max_kl, clip_ratio=clip_ratio)
    _check_function("constraint", constraint, "mean_kl, maximum_kl or reverse_kl")
    _check_function("bonus", bonus, "log_barrier")
    _check_function("line_search", line_search, "backtracking_line_search, parallel_line_search or full_step")
    if not isinstance(solver, Solver):
        raise ValueError(f"solver must be a Solver(damping, iterations, tolerance), got {solver!r}")
    trees.check_parameters(params)
    if last_step is not None:
        trees.check_like(last_step, params, "last_step")
    batch = Batch.of(*parts)
    gradient, old_distribution = surrogate_gradient(
        policy_apply, params, batch, entropy_coefficient=entropy_coefficient, bonus=bonus
    )
    batch, untouched = of_old_policy(batch, old_distribution)
    evaluate = make_evaluate(
        policy_apply,
        old_distribution,
        batch,
        entropy_coefficient=entropy_coefficient,
        bonus=bonus,
        constraint=constraint,
    )
    sample = curvature_sample(batch.observation, batch.sample_shape, fisher_fraction)

    def solve_at(place: PyTree, gradient: PyTree) -> tuple[PyTree, NaturalGradientInfo]:
        # Steps in one direction add up to K² times the divergence of one, steps at right angles to K times.
        share = max_kl / num_steps**1.5
        return natural_gradient(
            lambda p: policy_apply(p, sample), place, gradient, max_kl=share, kl_penalty=kl_penalty, solver=solver
        )

    step, solve = solve_at(params, gradient)
    if num_steps > 1:
        old = trees.widened(old_distribution)
        step = _walk(
            params,
            step,
            num_steps,
            _clipped_gradient(policy_apply, old_distribution, batch, clip_ratio, entropy_coefficient, bonus),
            solve_at,
            lambda distribution: jnp.all(constraint(old, trees.widened(distribution)) <= max_kl),
        )
        solve = dataclasses.replace(solve, predicted_gain=trees.dot(gradient, step))
    if constraint is not mean_kl or num_steps > 1:  # otherwise the step has its length already
        step, solve = _shortened(evaluate, params, step, solve, max_kl)
    new_params, search = line_search(evaluate, params, step, max_kl=max_kl)
    mean, maximum, sample_fraction = search.extra
    info = UpdateInfo(
        accepted=search.accepted,
        surrogate_gain=search.surrogate_gain,
        predicted_gain=solve.predicted_gain,
        divergence=search.divergence,
        mean_kl=mean,
        maximum_kl=maximum,
        entropy=jnp.mean(old_distribution.entropy()),
        step_fraction=search.step_fraction,
        effective_sample_fraction=jnp.where(search.accepted, sample_fraction, untouched),
        gradient_norm=solve.gradient_norm,
        cg_residual=solve.cg_residual,
        extra=held_out_gain(gradient, last_step),
    )
    return new_params, finite_info(info)


def _walk(
    params: PyTree,
    step: PyTree,
    num_steps: int,
    gradient_at: Callable[[PyTree], tuple[Distribution, PyTree]],
    solve_at: Callable[[PyTree, PyTree], tuple[PyTree, NaturalGradientInfo]],
    is_inside: Callable[[Distribution], Array],
) -> PyTree:
    """Add further steps to the first one; the sum is not finite if the gradient of one of them is not."""

    def further(_: Array, walked: PyTree) -> PyTree:
        place = jax.tree.map(jnp.add, params, walked)
        distribution, gradient = gradient_at(place)
        added, solve = solve_at(place, gradient)
        added = trees.add_scaled(walked, jnp.where(jnp.isfinite(solve.predicted_gain), 1, jnp.nan), added)
        # Where few samples give the curvature, a step may miss its length: none begins outside the region.
        return trees.select(is_inside(distribution), added, walked)

    return jax.lax.fori_loop(1, num_steps, further, step)


def _clipped_gradient(
    policy_apply: PolicyApply,
    old_distribution: Distribution,
    batch: Batch,
    clip_ratio: Scalar,
    entropy_coefficient: Scalar,
    bonus: Bonus,
) -> Callable[[PyTree], tuple[Distribution, PyTree]]:
    """Make the function that gives the policy at other parameters, and the gradient of its clipped surrogate."""
    old_log_prob = trees.widened(old_distribution).log_prob(batch.action)
    clipped = clipped_objective(clip_ratio)

    def cotangent(distribution: Any, advantage: Array, action: Array, old_log_prob: Array) -> Any:
        def objective(distribution: Any) -> Array:
            distribution = trees.widened(distribution)
            ratio = jnp.exp(distribution.log_prob(action) - old_log_prob)
            gain = clipped(distribution, old_distribution, ratio, advantage)
            return jnp.mean(gain + entropy_coefficient * bonus(distribution))

        return jax.grad(objective)(distribution)

    def gradient(params: PyTree) -> tuple[Distribution, PyTree]:
        others = batch.advantage, batch.action, old_log_prob
        with jax.default_matmul_precision("highest"):
            return forward_and_gradient(policy_apply, params, batch.observation, cotangent, *others)

    return gradient


def _shortened(
    evaluate: Evaluate, params: PyTree, step: PyTree, solve: NaturalGradientInfo, max_kl: Scalar
) -> tuple[PyTree, NaturalGradientInfo]:
    """Shorten the step until its divergence meets max_kl: to second order, it grows with the square of the step."""
    excess = evaluate(trees.add_scaled(params, jnp.ones(()), step))[1] / max_kl
    factor = jnp.where(excess > 1, _inside(excess) / jnp.sqrt(excess), 1)
    step = jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), step)
    return step, dataclasses.replace(solve, predicted_gain=factor * solve.predicted_gain)


def _check_function(name: str, value: Any, known: str) -> None:
    if not callable(value):
        raise ValueError(f"{name} must be a function, such as {known}, got {value!r}")
