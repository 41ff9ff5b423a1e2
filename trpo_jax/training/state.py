"""The state of training between iterations, and the metrics of an iteration.

Shapes: T steps, N environments, P parameters; `...` the shape of one observation or action. Absent parts are None.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trpo_jax.sentences import UsageError
from trpo_jax.steps.statistics import RunningStatistics
from trpo_jax.steps.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transition:
    """The record of each step of a rollout, [T, N, ...].

    Attributes:
      observation: the policy's observation (raw, not normalised).
      action: the policy's sample, before any clipping to the action space.
      reward: float32.
      terminated: the episode ended in a terminal state, bool.
      truncated: a time limit ended the episode, bool.
      next_observation: the observation after the step, before any reset; a truncated episode bootstraps from it.
    """

    observation: Array
    action: Array
    reward: Array
    terminated: Array
    truncated: Array
    next_observation: Array


class ReplayBuffer(NamedTuple):
    """Batches side by side, as if from more environments, newest first.

    Attributes:
      batch: transitions [T, K·N, ...].
      log_prob: of the actions under the policies that took them, [T, K·N].
    """

    batch: Transition
    log_prob: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EpisodeTotals:
    """Sums over the episodes that ended in a rollout, per environment, [N] each."""

    count: Array
    total_return: Array
    total_length: Array


class Carry(NamedTuple):
    """Values that each running episode carries, [N, ...].

    Attributes:
      policy: recurrent state of the policy; () if it is not recurrent.
      value: the same of the value function.
      discounted_return: discounted return so far, [N]; None unless `normalize_rewards`.
    """

    policy: PyTree
    value: PyTree
    discounted_return: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActorState:
    """States of the N environments and their running episodes; every leaf has a leading axis N.

    Attributes:
      env_state: states of the environments.
      observation: current observations, [N, ...].
      carry: values that the episodes carry. The rollout updates the policy's part, and learning from it the rest.
      episode_return: undiscounted return so far, [N].
      episode_length: steps so far, int32 [N].
      ended: totals of the last rollout in which any episode ended; counts of 0 before that.
    """

    env_state: PyTree
    observation: Array
    carry: Carry
    episode_return: Array
    episode_length: Array
    ended: EpisodeTotals


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearnerState:
    """The state that learning from a batch changes.

    Attributes:
      policy_params: policy parameters θ.
      value_params: value-function parameters.
      last_step: change of θ by the newest update, flat, [P]; the next batch measures its gain.
      update: state of the algorithm between updates, such as an optimizer's; None if there is none.
      value_fit: the same for the value fit.
      statistics: running mean and variance of observations.
      return_statistics: running mean and variance of the discounted return; None unless `normalize_rewards`.
      buffer: earlier batches that the next update learns from too; None without reuse.
    """

    policy_params: PyTree
    value_params: PyTree
    last_step: Array
    update: PyTree
    value_fit: PyTree
    statistics: RunningStatistics
    return_statistics: RunningStatistics | None
    buffer: ReplayBuffer | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that the next iteration needs, as arrays.

    Attributes:
      iteration: iterations done, int32.
      key: the run's constant PRNG key; iteration i draws from `fold_in(key, i)`.
      learner: the state that learning changes.
      actor: the states of the environments.
    """

    iteration: Array
    key: Array
    learner: LearnerState
    actor: ActorState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Metrics of an iteration: each field is a scalar, which `train` stacks to [num_iterations].

    Attributes:
      episode_return: mean undiscounted return of the episodes that ended in this iteration; if none did (num_episodes
        is 0), that of the last iteration in which any ended; NaN before that.
      episode_length: mean length of those episodes in steps.
      num_episodes: how many episodes ended in this iteration.
      accepted: 1 if the line search accepted a step, 0 if the policy stayed as it was.
      step_fraction: share αʲ of the full natural step that was taken; 0 if rejected.
      surrogate_gain: L(θ_new) − L(θ_old), in units of the (normalised) advantage.
      predicted_gain: the same as predicted by the linear model at the full step, gᵀs.
      held_out_gain: gain of the update before, measured on this batch, which it has not seen: gᵀ(θ − θ_before) with the
        gradient g of this batch, to first order; 0 in the first iteration and after a rejected update; NaN where an
        algorithm of one's own does not measure it. Compare it with `surrogate_gain` of the row before.
      divergence: the divergence that `constraint` bounds, nats, by default the mean KL; never above `radius` (except
        with line_search=none, and where there is no radius).
      mean_kl: mean KL(old ‖ new) over the batch, nats.
      maximum_kl: largest KL(old ‖ new) of a single sample, nats.
      entropy: mean entropy of the policy that collected the batch, nats.
      effective_sample_fraction: (Σw)²/(B Σw²) of the importance ratios after the step, to the policies that took the
        actions (over all batches that the update learned from); 1 means unchanged.
      gradient_norm: norm of the policy gradient; the largest float32 if it is not finite.
      cg_residual: relative residual after conjugate gradient, of the first solve if there are several steps.
      value_loss: mean squared error after the fit of the value function, on at most 1024 samples of the batch (adam: on
        all, averaged over its last epoch); NaN if the batch is not finite.
      explained_variance: 1 − Var[return − V]/Var[return] before the fit; 1 is perfect, 0 no better than a constant.
      radius: δ of this update, nats; NaN where the update has none.
      gain_ratio: realised over predicted gain of the previous update, measured on this batch; NaN where it was not.
      penalty: coefficient β of the KL in this update; NaN except with kl-penalty.
      finite: 1 if every reward, observation and parameter was a finite number, 0 otherwise.
    """

    episode_return: Array
    episode_length: Array
    num_episodes: Array
    accepted: Array
    step_fraction: Array
    surrogate_gain: Array
    predicted_gain: Array
    held_out_gain: Array
    divergence: Array
    mean_kl: Array
    maximum_kl: Array
    entropy: Array
    effective_sample_fraction: Array
    gradient_norm: Array
    cg_residual: Array
    value_loss: Array
    explained_variance: Array
    radius: Array
    gain_ratio: Array
    penalty: Array
    finite: Array


def check_key(key: Array) -> None:
    """Raise `UsageError` unless `key` is a single typed PRNG key."""
    if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key) or jnp.shape(key) != ():
        raise UsageError("key must be one typed PRNG key, jax.random.key(seed); for several seeds vmap over keys.")
