"""First-order policy updates, TRPO's baselines: the plain policy gradient, PPO, and the KL-penalised objective.

    maximise  mean_n[objective(π_θ, π_old, A_n)] + c · mean entropy

by gradient steps. One step on the surrogate from θ_old is the policy gradient. With several steps per batch the
objective has to limit the change: PPO clips the ratio, the penalty subtracts the KL from the gain.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from trpo_jax.steps import trees
from trpo_jax.steps.minibatches import minibatch_descent
from trpo_jax.steps.objectives import Bonus, Objective, entropy_bonus, surrogate_objective
from trpo_jax.steps.policy_updates import (
    Batch,
    UpdateInfo,
    finite_info,
    held_out_gain,
    make_evaluate,
    of_old_policy,
    surrogate_gradient,
)
from trpo_jax.steps.types import Array, PolicyApply, PyTree, Scalar

if TYPE_CHECKING:
    import optax


def first_order_update(
    policy_apply: PolicyApply,
    params: PyTree,
    optimizer_state: optax.OptState,
    *parts: Any,
    optimizer: optax.GradientTransformation,
    objective: Objective = surrogate_objective,
    epochs: int = 1,
    minibatches: int = 1,
    entropy_coefficient: Scalar = 0.0,
    bonus: Bonus = entropy_bonus,
    key: Array | None = None,
    max_grad_norm: Scalar = 0.0,
    last_step: PyTree | None = None,
) -> tuple[PyTree, optax.OptState, UpdateInfo]:
    """Maximise an objective by gradient steps on a batch that the policy at `params` collected.

    The defaults give one policy-gradient step: REINFORCE if `advantage` is a return, the advantage form if it is an
    advantage.

    Args:
      policy_apply: `policy_apply(params, observation)` -> a distribution.
      params: policy parameters, a pytree of float arrays.
      optimizer_state: `optimizer.init(params)`, or the state that the last call returned.
      parts: observation [B, ...], action [B] or [B, D] and weight of each action [B]; or one `Batch`.
      optimizer: an optax transformation; `optax.sgd(α)` is the plain step θ + α g.
      objective: `surrogate_objective`, `clipped_objective(ε)` or `penalized_objective(β)`.
      epochs: passes over the batch (static).
      minibatches: minibatches per pass, which must divide the number of samples (static).
      entropy_coefficient: c, weight of the mean entropy.
      bonus: what takes its place, see `trpo_update`.
      key: PRNG key that reshuffles the samples in every epoch, as is usual in PPO. None: minibatch m of every epoch
        holds the samples m, m + M, m + 2M, … of the flattened batch, with M minibatches.
      max_grad_norm: largest norm of a minibatch's gradient, to which a longer one is scaled; 0: no limit.
      last_step: the step before, whose gain on this batch the report then has, see `trpo_update`.

    Returns:
      New parameters, new optimizer state, and an `UpdateInfo` with surrogate and KL as in `trpo_update`:
      `step_fraction` is 1, `cg_residual` 0, `predicted_gain` gᵀ(θ_new − θ_old), and `surrogate_gain` may be negative.
      If any new parameter or any number of the report is not finite, parameters and state are returned unchanged and
      `accepted` is False.

    Raises:
      ValueError: if a leaf of `params` is not an array of floats, `epochs` or `minibatches` is not a whole number ≥ 1,
        or `minibatches` does not divide the number of samples.
      TypeError: if the batch is missing.
      AssertionError, ValueError: if the shapes of the batch do not agree.

    Source: Williams 1992 (REINFORCE); Schulman et al. 2017 (PPO).
    """
    trees.check_parameters(params)
    if last_step is not None:
        trees.check_like(last_step, params, "last_step")
    batch = Batch.of(*parts)
    gradient, old_distribution = surrogate_gradient(
        policy_apply, params, batch, entropy_coefficient=entropy_coefficient, bonus=bonus
    )
    batch, untouched = of_old_policy(batch, old_distribution)
    old_log_prob = old_distribution.log_prob(batch.action)

    def loss_fn(new: PyTree, observation: PyTree, action: Array, advantage: Array, old_log_prob: Array) -> Array:
        distribution = policy_apply(new, observation)
        ratio = jnp.exp(distribution.log_prob(action) - old_log_prob)
        value = objective(distribution, policy_apply(params, observation), ratio, advantage)
        return -jnp.mean(value + entropy_coefficient * bonus(distribution))

    new_params, new_state, _ = minibatch_descent(
        loss_fn,
        params,
        optimizer_state,
        (batch.observation, batch.action, batch.advantage, old_log_prob),
        batch.sample_shape,
        optimizer=optimizer,
        epochs=epochs,
        minibatches=minibatches,
        key=key,
        max_grad_norm=max_grad_norm,
    )
    evaluate = make_evaluate(
        policy_apply, old_distribution, batch, entropy_coefficient=entropy_coefficient, bonus=bonus
    )
    evaluation, step = evaluate(new_params), jax.tree.map(jnp.subtract, new_params, params)
    info = _info(gradient, step, evaluation, jnp.mean(old_distribution.entropy()), untouched)
    info = dataclasses.replace(info, extra=held_out_gain(gradient, last_step))
    params, optimizer_state = trees.select(info.accepted, (new_params, new_state), (params, optimizer_state))
    return params, optimizer_state, finite_info(info)


def _info(gradient: PyTree, step: PyTree, evaluation: tuple[Array, ...], entropy: Array, untouched: Any) -> UpdateInfo:
    """The report of a step, which is taken if all of its numbers are finite."""
    predicted, norm = trees.dot(gradient, step), trees.norm(gradient)
    moved = (trees.max_abs(step) > 0) & trees.all_finite((evaluation, predicted, norm))
    gain, divergence, mean_kl, maximum_kl = (jnp.where(moved, value, 0) for value in evaluation[:4])
    return UpdateInfo(
        accepted=moved,
        surrogate_gain=gain,
        predicted_gain=jnp.where(moved, predicted, 0),
        divergence=divergence,
        mean_kl=mean_kl,
        maximum_kl=maximum_kl,
        entropy=entropy,
        step_fraction=moved.astype(gain.dtype),
        effective_sample_fraction=jnp.where(moved, evaluation[4], untouched),
        gradient_norm=norm,
        cg_residual=jnp.zeros_like(gain),
    )
