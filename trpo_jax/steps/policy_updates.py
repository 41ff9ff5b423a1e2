"""The parts that policy updates share: batch, gradient, evaluation of candidates, and report.

Shapes: B is the batch, of any rank; P the number of policy parameters, in any pytree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from trpo_jax.steps import trees
from trpo_jax.steps.blocks import forward_and_gradient
from trpo_jax.steps.distributions import Distribution
from trpo_jax.steps.objectives import (
    Bonus,
    effective_sample_fraction,
    entropy_bonus,
    maximum_kl,
    mean_kl,
    surrogate,
    surrogate_gain,
)
from trpo_jax.steps.types import Array, PolicyApply, PyTree, Scalar, at_least_float32, check_scalars

Divergence = Callable[[Distribution, Distribution], Array]
"""`divergence(old_distribution, distribution)` -> a scalar in nats, such as `mean_kl`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The data of a policy update.

    Attributes:
      observation: [B, ...], an array or a pytree of arrays.
      action: actions taken, [B] or [B, D].
      advantage: advantage estimates, [B], usually normalised by the caller. B may have any rank, such as [T, N].
      behaviour_log_prob: log-probabilities [B] of the actions under the policies that took them, if θ_old did not take
        all. Each sample is then weighted by its per-decision ratio π_θ/π_behaviour; the divergence is the mean over all
        states.
      sample_ndim: number of leading axes of B that index independent samples: all (None), or 1 where B is [N, T] and a
        recurrent policy needs whole sequences (static).
    """

    observation: PyTree
    action: Array
    advantage: Array
    behaviour_log_prob: Array | None = None
    sample_ndim: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of(cls, *parts: Any) -> Batch:
        """A batch with float advantages, from a `Batch` or from an observation, an action and an advantage.

        Raises:
          TypeError: for anything else.
          ValueError: if the batch is empty.
        """
        batch = parts[0] if len(parts) == 1 else cls(*parts) if len(parts) == 3 else None
        if not isinstance(batch, cls):
            raise TypeError("a step takes one Batch, or an observation, an action and an advantage.")
        action, advantage = jnp.asarray(batch.action), at_least_float32(batch.advantage)
        if not advantage.size:
            raise ValueError("the batch of a policy update has no samples")
        return dataclasses.replace(batch, action=action, advantage=advantage)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of the leading axes that index samples."""
        return self.advantage.shape[: self.sample_ndim]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateInfo:
    """Report of one policy update. After a rejected one, gain, KL and step fraction are 0 and θ is unchanged.

    Every number is finite: the largest float of its dtype replaces a `gradient_norm` that is not finite; elsewhere ±
    that float replaces ±∞, and 0 replaces NaN.

    Attributes:
      accepted: whether a candidate passed the line search, bool.
      surrogate_gain: L(θ_new) − L(θ_old), including the entropy bonus if there is one.
      predicted_gain: gain of the linear model at the full step, gᵀs.
      divergence: the divergence that the constraint bounds, nats: the mean KL, unless another one was chosen.
      mean_kl: mean over the batch of KL(old ‖ new), nats.
      maximum_kl: largest KL(old ‖ new) of any sample in the batch, nats.
      entropy: mean entropy of the policy before the update, nats.
      step_fraction: fraction αʲ of the full step that was taken.
      effective_sample_fraction: (Σw)²/(B Σw²) of the ratios w of the new policy to the policies that took the actions;
        1 after a rejected update if θ_old took them.
      gradient_norm: ‖∇L‖₂ at θ_old.
      cg_residual: relative residual after conjugate gradient, of the first solve if there are several steps.
      extra: further numbers, {name: scalar}; `held_out_gain`, `radius`, `gain_ratio` and `penalty` become metrics.
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
    extra: Mapping[str, Array] = dataclasses.field(default_factory=dict)


def held_out_gain(gradient: PyTree, last_step: PyTree | None) -> dict[str, Array]:
    """Measure the step before on a batch that it has not seen: gᵀs, its gain to first order, for `UpdateInfo.extra`.

    The gradient g at θ is an average over samples that did not choose the step s that led to θ, so that their noise
    does not count as a gain. No pass over the batch is needed. Nothing is measured without a step.
    """
    return {} if last_step is None else {"held_out_gain": trees.dot(gradient, last_step)}


def finite_info(info: UpdateInfo) -> UpdateInfo:
    """Replace the numbers of a report that are not finite, see `UpdateInfo`."""
    norm = info.gradient_norm
    info = jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else trees.finite(leaf), info)
    return dataclasses.replace(info, gradient_norm=trees.finite(norm, nan=jnp.finfo(norm.dtype).max))


def surrogate_gradient(
    policy_apply: PolicyApply,
    params: PyTree,
    batch: Batch,
    *,
    entropy_coefficient: Scalar = 0.0,
    bonus: Bonus = entropy_bonus,
) -> tuple[PyTree, Distribution]:
    """Compute the gradient of the surrogate at θ_old and the distributions there, from one forward pass for both.

    Arguments as in `trpo_update`.
    """
    check_scalars(entropy_coefficient=entropy_coefficient)

    def cotangent(old_distribution: Any, advantage: Array, action: Array, *behaviour: Array) -> Any:
        check_action(old_distribution, action)
        log_prob = trees.widened(old_distribution).log_prob(action)
        names = "log_prob(action), advantage and behaviour_log_prob" if behaviour else "log_prob(action) and advantage"
        chex.assert_equal_shape([log_prob, advantage, *behaviour], custom_message=f"{names} differ in shape")
        if behaviour:
            advantage = _reweighted(advantage, log_prob, *behaviour)

        def objective(distribution: Any) -> Array:
            distribution = trees.widened(distribution)
            added = entropy_coefficient * jnp.mean(bonus(distribution))
            return surrogate(distribution, log_prob, action, advantage) + added

        return jax.grad(objective)(old_distribution)

    others = batch.advantage, batch.action
    behaviour = () if batch.behaviour_log_prob is None else (batch.behaviour_log_prob,)
    with jax.default_matmul_precision("highest"):
        old_distribution, gradient = forward_and_gradient(
            policy_apply, params, batch.observation, cotangent, *others, *behaviour
        )
    return gradient, old_distribution


def check_action(distribution: Any, action: Array) -> None:
    """Raise `ValueError` unless actions have the shape of those of the policy: others would be broadcast to it."""
    shape = jax.eval_shape(lambda d: d.mode(), distribution).shape
    if action.shape != shape:
        raise ValueError(f"actions of the policy have the shape {shape}, but those of the batch have {action.shape}")


def of_old_policy(batch: Batch, old_distribution: Distribution) -> tuple[Batch, Any]:
    """Rewrite a batch as if θ_old had taken its actions, and give the effective sample fraction before any step.

    π_θ/π_b · A = π_θ/π_old · (π_old/π_b · A): only the advantages change.
    """
    if batch.behaviour_log_prob is None:
        return batch, 1.0
    old = trees.widened(old_distribution)
    advantage = _reweighted(batch.advantage, old.log_prob(batch.action), batch.behaviour_log_prob)
    fraction = effective_sample_fraction(old, batch.behaviour_log_prob, batch.action)
    return dataclasses.replace(batch, advantage=advantage), fraction


def _reweighted(advantage: Array, log_prob: Array, behaviour_log_prob: Array) -> Array:
    return jnp.exp(log_prob - behaviour_log_prob) * advantage


def make_evaluate(
    policy_apply: PolicyApply,
    old_distribution: Distribution,
    batch: Batch,
    *,
    entropy_coefficient: Scalar = 0.0,
    bonus: Bonus = entropy_bonus,
    constraint: Divergence = mean_kl,
) -> Callable[[PyTree], tuple[Array, ...]]:
    """Make the function that evaluates candidate parameters in the line search.

    It returns (surrogate gain, divergence, mean KL, largest KL, effective sample fraction). Arguments as in
    `trpo_update`, but the advantages are those of θ_old; `old_distribution` is the one from `surrogate_gradient`.
    """
    old_distribution = trees.widened(old_distribution)
    old_log_prob = old_distribution.log_prob(batch.action)
    old_bonus = bonus(old_distribution)
    behaviour = old_log_prob if batch.behaviour_log_prob is None else batch.behaviour_log_prob

    def evaluate(candidate: PyTree) -> tuple[Array, ...]:
        # The KL is as small as the rounding of TF32 and bfloat16 products.
        with jax.default_matmul_precision("highest"):
            distribution = trees.widened(policy_apply(candidate, batch.observation))
        kl = old_distribution.kl(distribution)
        gain = surrogate_gain(distribution, old_log_prob, batch.action, batch.advantage)
        gain += entropy_coefficient * jnp.mean(bonus(distribution) - old_bonus)
        mean, largest = jnp.mean(kl), trees.maximum(kl)
        # XLA does not see that a usual constraint reduces this same KL, and would compute it twice.
        if constraint is mean_kl:
            divergence = mean
        elif constraint is maximum_kl:
            divergence = largest
        else:
            divergence = constraint(old_distribution, distribution)
        chex.assert_shape(divergence, (), custom_message="constraint must give one number for the whole batch")
        fraction = effective_sample_fraction(distribution, behaviour, batch.action)
        return gain, divergence, mean, largest, fraction

    return evaluate
