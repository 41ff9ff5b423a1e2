"""What the trainer carries from iteration to iteration, and what it says of each.

Shapes: T steps, N environments, P parameters; `...` the shape of one observation or action. What is absent is None.
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
    """What the rollout keeps of each step, [T, N, ...].

    Attributes:
      observation: what the policy saw (raw, not normalised).
      action: what the policy sampled, before any clipping to the action space.
      reward: float32.
      terminated: the episode ended in a terminal state, bool.
      truncated: a time limit cut the episode off, bool.
      next_observation: what the step produced, before any reset; a truncated episode bootstraps from it.
    """

    observation: Array
    action: Array
    reward: Array
    terminated: Array
    truncated: Array
    next_observation: Array


class ReplayBuffer(NamedTuple):
    """Batches side by side as if of more environments, the newest first.

    Attributes:
      batch: transitions [T, K·N, ...].
      log_prob: of the actions under the policies that took them, [T, K·N].
    """

    batch: Transition
    log_prob: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EpisodeTotals:
    """Sums over the episodes that ended in a rollout, by environment, [N] each."""

    count: Array
    total_return: Array
    total_length: Array


class Carry(NamedTuple):
    """What is carried along each running episode, [N, ...].

    Attributes:
      policy: what a recurrent policy remembers; () without a memory.
      value: the same of a recurrent value function.
      discounted_return: discounted return so far, [N]; None unless `normalize_rewards`.
    """

    policy: PyTree
    value: PyTree
    discounted_return: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActorState:
    """Where the N environments and their running episodes stand; every leaf has a leading axis N.

    Attributes:
      env_state: states of the environments.
      observation: current observations, [N, ...].
      carry: what is carried along the episodes. The rollout moves the policy's part, learning from it the rest.
      episode_return: undiscounted return so far, [N].
      episode_length: steps so far, int32 [N].
      ended: of the last rollout in which any episode ended, which did; counts of 0 before that.
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
    """What a batch changes.

    Attributes:
      policy_params: policy parameters θ.
      value_params: value-function parameters.
      update: what the algorithm keeps from update to update, such as an optimizer's state; None if nothing.
      value_fit: the same of the value fit.
      statistics: running mean and variance of observations.
      return_statistics: running mean and variance of the discounted return; None unless `normalize_rewards`.
      buffer: earlier batches that the next update learns from too; None without reuse.
    """

    policy_params: PyTree
    value_params: PyTree
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
      learner: what a batch changes.
      actor: where the environments stand.
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
      episode_return: mean undiscounted return of the episodes that ended; where none did (num_episodes is 0), that of
        the last iteration in which any ended; NaN before that.
      episode_length: mean length of those episodes in steps.
      num_episodes: how many episodes ended in this iteration.
      accepted: 1 if the line search accepted a step, 0 if the policy stayed as it was.
      step_fraction: share αʲ of the full natural step that was taken; 0 if rejected.
      surrogate_gain: L(θ_new) − L(θ_old), in units of the (normalised) advantage.
      predicted_gain: the same by the linear model at the full step, gᵀs.
      divergence: what `constraint` bounds, nats, by default the mean KL; never above `radius` (but with
        line_search=none, and where there is no radius).
      mean_kl: mean KL(old ‖ new) over the batch, nats.
      maximum_kl: largest KL(old ‖ new) of a single sample, nats.
      entropy: mean entropy of the policy that collected the batch, nats.
      effective_sample_fraction: (Σw)²/(B Σw²) of the importance ratios after the step, to the policies that took the
        actions (over all batches that the update learned from); 1 means unchanged.
      gradient_norm: norm of the policy gradient; the largest float32 where that is not finite.
      cg_residual: relative residual that conjugate gradient left.
      value_loss: mean squared error that the fit of the value function leaves, on at most 1024 samples of the batch
        (adam: on all, averaged over its last epoch); NaN where the batch is not finite.
      explained_variance: 1 − Var[return − V]/Var[return] before the fit; 1 is perfect, 0 a constant's worth.
      radius: δ of this update, nats; NaN where the update has none.
      gain_ratio: realised over predicted gain of the update before, measured on this batch; NaN where it was not.
      penalty: coefficient β of the KL in this update; NaN but for kl-penalty.
      finite: 1 if every reward, observation and parameter was a finite number, 0 otherwise.
    """

    episode_return: Array
    episode_length: Array
    num_episodes: Array
    accepted: Array
    step_fraction: Array
    surrogate_gain: Array
    predicted_gain: Array
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
