"""The TRPO update: the natural-gradient direction, the length the trust region allows, and a line search.

    maximise  L(θ) = E[π_θ/π_old · A]   subject to   E[KL(π_old ‖ π_θ)] ≤ δ

Shapes: B is the batch; P the number of policy parameters, in any pytree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from trpo_jax.steps import defaults, trees
from trpo_jax.steps.blocks import forward_and_gradient
from trpo_jax.steps.curvature import curvature_sample, fisher_vector_product
from trpo_jax.steps.line_searches import backtracking_line_search
from trpo_jax.steps.objectives import effective_sample_fraction, entropy_bonus, surrogate, surrogate_gain
from trpo_jax.steps.solvers import conjugate_gradient
from trpo_jax.steps.types import Array, DistributionFn, PolicyApply, PyTree, Scalar, at_least_float32

CONSTRAINTS = "mean-kl", "max-kl", "reverse-kl"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NaturalGradientInfo:
    """What the solve for a step says of itself; not finite for a gradient that is not.

    Attributes:
      predicted_gain: gᵀs, the surrogate gain of the linear model at the full step s.
      gradient_norm: ‖g‖₂.
      cg_residual: ‖g − (F + λ_d I) x‖ / ‖g‖.
      cg_iterations: conjugate-gradient steps taken before it froze, int32.
    """

    predicted_gain: Array
    gradient_norm: Array
    cg_residual: Array
    cg_iterations: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateInfo:
    """What one TRPO update did. A rejected update has gain, KL and step fraction 0 and a sample fraction of 1.

    Every number is finite: the largest of its dtype stands for a `gradient_norm` that is not, and elsewhere ± that
    number for ±∞, and 0 for NaN.

    Attributes:
      accepted: whether a candidate passed the line search, bool.
      surrogate_gain: L(θ_new) − L(θ_old), with the entropy bonus if there is one.
      predicted_gain: gain of the linear model at the full step, gᵀs.
      divergence: what the constraint bounds, nats: the mean KL, unless another one was chosen.
      mean_kl: mean over the batch of KL(old ‖ new), nats.
      maximum_kl: largest KL(old ‖ new) of any sample in the batch, nats.
      entropy: mean entropy of the policy before the update, nats.
      step_fraction: fraction αʲ of the full step that was taken.
      effective_sample_fraction: (Σw)²/(B Σw²) of the new ratios w to the policies that took the actions.
      gradient_norm: ‖∇L‖₂ at θ_old.
      cg_residual: relative residual that conjugate gradient left.
    """

    accepted: Array
    surrogate_gain: Array
    predicted_gain: Array
    divergence: Array
    mean_kl: Array
    maximum_kl: Array
    entropy: Array
    step_fraction: Array
    effective_sample_fraction: Array
    gradient_norm: Array
    cg_residual: Array


def natural_gradient(
    distribution_fn: DistributionFn,
    params: PyTree,
    gradient: PyTree,
    *,
    max_kl: Scalar,
    cg_damping: Scalar = defaults.CG_DAMPING,
    cg_iterations: int = defaults.CG_ITERATIONS,
    cg_tolerance: Scalar = defaults.CG_TOLERANCE,
    weight: Array | None = None,
) -> tuple[PyTree, NaturalGradientInfo]:
    """The step s = β x with x ≈ (F + λ_d I)⁻¹ g and β = √(2δ / xᵀF x), so that ½ sᵀF s = δ.

    β uses the *undamped* curvature, which the residual r of conjugate gradient gives without another product:
    xᵀF x = xᵀ(g − r) − λ_d ‖x‖². With the damped one the step would fall short of the trust region.

    Args:
      distribution_fn: `distribution_fn(params)` -> distribution with batch shape [B].
      params: θ_old, a pytree.
      gradient: g = ∇L(θ_old), the direction of ascent, a pytree like params.
      max_kl: δ > 0, in nats.
      cg_damping: λ_d ≥ 0.
      cg_iterations: k (static).
      cg_tolerance: residual ‖g − (F + λ_d I) x‖ / ‖g‖ at which the solver stops before k iterations.
      weight: sample weights [B] for F, see `fisher_vector_product`.

    Returns:
      The full step (zero if g is zero or not finite, or the curvature along x is not positive) and a
      `NaturalGradientInfo`.

    Source: Schulman et al. 2015, Appendix C; Kakade 2001.
    """
    matvec = fisher_vector_product(distribution_fn, params, damping=cg_damping, weight=weight)
    # The step does not depend on the length of g; at length one its square can neither under- nor overflow.
    gradient_norm = trees.norm(gradient)
    usable = (gradient_norm > 0) & jnp.isfinite(gradient_norm)
    length = jnp.where(usable, trees.divisor(gradient_norm), 1)
    unit = jax.tree.map(lambda leaf: jnp.where(usable, leaf / length, 0).astype(leaf.dtype), gradient)
    x, cg = conjugate_gradient(matvec, unit, num_iterations=cg_iterations, tolerance=cg_tolerance)

    applied = jax.tree.map(jnp.subtract, unit, cg.residual)  # (F + λ_d I) x
    curvature = trees.dot(x, applied) - cg_damping * trees.dot(x, x)  # xᵀF x
    positive = (curvature > 0) & jnp.isfinite(curvature)
    # A hair inside the region: where the KL is exactly quadratic, its rounding must not refuse the full step.
    beta = jnp.where(positive, _inside(curvature) * jnp.sqrt(2 * max_kl / jnp.where(positive, curvature, 1)), 0)
    step = jax.tree.map(lambda leaf: jnp.where(positive, beta * leaf, 0).astype(leaf.dtype), x)
    info = NaturalGradientInfo(
        predicted_gain=gradient_norm * trees.dot(unit, step),
        gradient_norm=gradient_norm,
        cg_residual=cg.relative_residual,
        cg_iterations=cg.num_iterations,
    )
    return step, info


def _inside(like: Array) -> Any:
    """Just less than 1, by the rounding of a divergence."""
    return 1 - 16 * jnp.finfo(like.dtype).eps


def surrogate_gradient(
    policy_apply: PolicyApply,
    params: PyTree,
    observation: PyTree,
    action: Array,
    advantage: Array,
    entropy_coefficient: Scalar = 0.0,
    behaviour_log_prob: Array | None = None,
) -> tuple[PyTree, Any]:
    """The gradient of the surrogate at θ_old and the distributions there, from one forward pass for both.

    Arguments as in `trpo_update`.
    """

    def cotangent(old_distribution: Any, advantage: Array, action: Array, *behaviour: Array) -> Any:
        log_prob = trees.widened(old_distribution).log_prob(action)
        chex.assert_equal_shape([log_prob, advantage], custom_message="log_prob(action) and advantage differ in shape")
        if behaviour:
            advantage = _reweighted(advantage, log_prob, *behaviour)

        def objective(distribution: Any) -> Array:
            distribution = trees.widened(distribution)
            bonus = entropy_coefficient * jnp.mean(entropy_bonus(distribution))
            return surrogate(distribution, log_prob, action, advantage) + bonus

        return jax.grad(objective)(old_distribution)

    others = (advantage, action) if behaviour_log_prob is None else (advantage, action, behaviour_log_prob)
    with jax.default_matmul_precision("highest"):
        old_distribution, gradient = forward_and_gradient(policy_apply, params, observation, cotangent, *others)
    return gradient, old_distribution


def _reweighted(advantage: Array, log_prob: Array, behaviour_log_prob: Array) -> Array:
    """π_old/π_b · A, since π_θ/π_b · A = π_θ/π_old · (π_old/π_b · A): the update on other advantages."""
    return jnp.exp(log_prob - behaviour_log_prob) * advantage


def candidate_judge(
    policy_apply: PolicyApply,
    old_distribution: Any,
    observation: PyTree,
    action: Array,
    advantage: Array,
    *,
    entropy_coefficient: Scalar = 0.0,
    constraint: str = "mean-kl",
    behaviour_log_prob: Array | None = None,
) -> Callable[[PyTree], tuple[Array, ...]]:
    """What the line search asks of parameters, as a function of them.

    Its answers: (surrogate gain, divergence, mean KL, largest KL, effective sample fraction). Arguments as in
    `trpo_update`; `old_distribution` is what `surrogate_gradient` returned.
    """
    old_distribution = trees.widened(old_distribution)
    old_log_prob = old_distribution.log_prob(action)
    old_bonus = entropy_bonus(old_distribution)
    behaviour = old_log_prob if behaviour_log_prob is None else behaviour_log_prob

    def evaluate(candidate: PyTree) -> tuple[Array, ...]:
        # The KL is as small as the rounding of TF32 and bfloat16 products.
        with jax.default_matmul_precision("highest"):
            distribution = trees.widened(policy_apply(candidate, observation))
        kl = old_distribution.kl(distribution)
        mean_kl, maximum_kl = jnp.mean(kl), jnp.max(kl)
        match constraint:
            case "mean-kl":
                divergence = mean_kl
            case "max-kl":
                divergence = maximum_kl
            case "reverse-kl":
                divergence = jnp.mean(distribution.kl(old_distribution))
        gain = surrogate_gain(distribution, old_log_prob, action, advantage)
        gain += entropy_coefficient * jnp.mean(entropy_bonus(distribution) - old_bonus)
        return gain, divergence, mean_kl, maximum_kl, effective_sample_fraction(distribution, behaviour, action)

    return evaluate


def trpo_update(
    policy_apply: PolicyApply,
    params: PyTree,
    observation: PyTree,
    action: Array,
    advantage: Array,
    *,
    max_kl: Scalar = defaults.MAX_KL,
    cg_damping: Scalar = defaults.CG_DAMPING,
    cg_iterations: int = defaults.CG_ITERATIONS,
    cg_tolerance: Scalar = defaults.CG_TOLERANCE,
    line_search_shrink: Scalar = defaults.LINE_SEARCH_SHRINK,
    line_search_steps: int = defaults.LINE_SEARCH_STEPS,
    fisher_fraction: Scalar = defaults.FISHER_FRACTION,
    line_search: Callable[..., Any] = backtracking_line_search,
    constraint: str = "mean-kl",
    entropy_coefficient: Scalar = 0.0,
    behaviour_log_prob: Array | None = None,
    sample_ndim: int | None = None,
) -> tuple[PyTree, UpdateInfo]:
    """One trust-region step on a batch that the policy at `params` collected, or policies before it.

    The gradient, the line search's surrogate and its KL use every sample; the Fisher matrix uses an evenly spread
    fraction of them. The step is taken only if the surrogate improves and the mean KL(old ‖ new) stays within
    max_kl; otherwise, and whenever anything is not finite, the parameters come back bit-identical.

    Args:
      policy_apply: `policy_apply(params, observation)` -> `Categorical`, `DiagonalGaussian`, `MultiCategorical` or
        any object with their methods. It may come from linen, nnx, equinox or plain functions.
      params: policy parameters, a pytree of float arrays.
      observation: an array or pytree of arrays, [B, ...].
      action: actions taken, [B] or [B, D].
      advantage: advantage estimates, [B], usually normalised by the caller. B may be of any rank, such as [T, N].
      max_kl: δ > 0, a bound on the divergence (not a target), nats.
      cg_damping: λ_d ≥ 0, added to the Fisher diagonal while solving, not when the step is scaled.
      cg_iterations: Fisher products k (static).
      cg_tolerance: relative residual at which the solver stops before k products; 0 asks for all that help.
      line_search_shrink: α in (0, 1).
      line_search_steps: candidates αʲ tried, j = 0 … steps − 1 (static).
      fisher_fraction: share of the batch that the Fisher matrix is estimated from, in (0, 1]. As a Python number
        it saves the work; as a traced array it weights the very same samples, at full cost.
      line_search: `backtracking_line_search`, `parallel_line_search`, or `full_step`: the natural gradient method.
      constraint: the divergence that δ bounds (static): "mean-kl", the mean of KL(old ‖ new) over the batch; "max-kl",
        its maximum, which the theory asks for; "reverse-kl", the mean of KL(new ‖ old).
      entropy_coefficient: c of a bonus c · mean entropy in the objective.
      behaviour_log_prob: log-probabilities [B] of the actions under the policies that took them, if not all θ_old's.
        Each sample then counts by its per-decision ratio π_θ/π_behaviour; the divergence is the mean over all states.
      sample_ndim: how many leading axes of B tell samples apart that may be evaluated without each other, for
        `fisher_fraction`: all (None), or 1 where B is [N, T] and a recurrent policy needs whole sequences (static).

    Returns:
      The new parameters and an `UpdateInfo` of scalars.

    Raises:
      ValueError: if `fisher_fraction` is a number outside (0, 1], `constraint` is unknown, `line_search` is no
        function, or a leaf of `params` is not an array of floats.
      AssertionError: if the log-probabilities of the actions do not have the shape of the advantages.

    Source: Schulman et al. 2015, section 6 and Appendix C.
    """
    if constraint not in CONSTRAINTS:
        raise ValueError(f"constraint must be one of {', '.join(CONSTRAINTS)}, got {constraint!r}")
    if not callable(line_search):
        raise ValueError(
            "line_search must be a function, backtracking_line_search, parallel_line_search or full_step, "
            f"got {line_search!r}"
        )
    trees.check_parameters(params)
    advantage = at_least_float32(advantage)
    gradient, old_distribution = surrogate_gradient(
        policy_apply, params, observation, action, advantage, entropy_coefficient, behaviour_log_prob
    )
    untouched: Any = 1.0
    if behaviour_log_prob is not None:
        old = trees.widened(old_distribution)
        advantage = _reweighted(advantage, old.log_prob(action), behaviour_log_prob)
        untouched = effective_sample_fraction(old, behaviour_log_prob, action)
    evaluate = candidate_judge(
        policy_apply,
        old_distribution,
        observation,
        action,
        advantage,
        entropy_coefficient=entropy_coefficient,
        constraint=constraint,
        behaviour_log_prob=behaviour_log_prob,
    )
    sample, weight = curvature_sample(observation, advantage.shape[:sample_ndim], fisher_fraction)
    if weight is not None:
        weight = jnp.broadcast_to(weight.reshape(weight.shape + (1,) * (advantage.ndim - weight.ndim)), advantage.shape)
    step, solve = natural_gradient(
        lambda p: policy_apply(p, sample),
        params,
        gradient,
        max_kl=max_kl,
        cg_damping=cg_damping,
        cg_iterations=cg_iterations,
        cg_tolerance=cg_tolerance,
        weight=weight,
    )
    if constraint == "max-kl":
        # The step was scaled for the mean; a KL grows with the square of the step.
        excess = evaluate(trees.add_scaled(params, jnp.ones(()), step))[1] / max_kl
        factor = jnp.where(excess > 1, _inside(excess) / jnp.sqrt(excess), 1)
        step = jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), step)
        solve = dataclasses.replace(solve, predicted_gain=factor * solve.predicted_gain)
    new_params, search = line_search(
        evaluate, params, step, max_kl=max_kl, shrink=line_search_shrink, max_steps=line_search_steps
    )
    mean_kl, maximum_kl, sample_fraction = search.extra
    info = UpdateInfo(
        accepted=search.accepted,
        surrogate_gain=search.surrogate_gain,
        predicted_gain=solve.predicted_gain,
        divergence=search.divergence,
        mean_kl=mean_kl,
        maximum_kl=maximum_kl,
        entropy=jnp.mean(old_distribution.entropy()),
        step_fraction=search.step_fraction,
        effective_sample_fraction=jnp.where(search.accepted, sample_fraction, untouched),
        gradient_norm=solve.gradient_norm,
        cg_residual=solve.cg_residual,
    )
    return new_params, finite_info(info)


def finite_info(info: UpdateInfo) -> UpdateInfo:
    """What an update did, in finite numbers, see `UpdateInfo`."""
    norm = info.gradient_norm
    info = jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else trees.finite(leaf), info)
    return dataclasses.replace(info, gradient_norm=trees.finite(norm, nan=jnp.finfo(norm.dtype).max))
