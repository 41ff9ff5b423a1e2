"""The types that the trainer passes around, each field documented.

Shapes: T steps, N environments, P parameters; `...` the shape of one observation or action.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config import Config
from trpo_jax.steps.statistics import RunningStatistics

Array = jax.Array
PyTree = Any

__all__ = ["Config", "Control", "LastUpdate", "Learned", "Memory", "Metrics", "Network", "TrainState", "Transition"]


def _flatten_config(config: Config) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, Any]]:
    leaves, static = {}, []
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        # A static float given as an array is traced after all: `trpo_update` takes a traced fisher_fraction too.
        if field.metadata["static"] and not isinstance(value, (jax.Array, np.ndarray)):
            static.append((field.name, value if _is_hashable(value) else _ByIdentity(value)))
        else:
            leaves[field.name] = value
    # Numbers become strong float32 here, at the one door to every transformation: a Python float and an array, or a
    # weak and a strong type, would otherwise be two traces. A Config with None among its floats is a tree of axes for
    # `jax.vmap`, whose integers must stay.
    if not any(value is None for value in leaves.values()):
        leaves = {name: _as_float32(value) for name, value in leaves.items()}
    return tuple((jax.tree_util.GetAttrKey(n), v) for n, v in leaves.items()), (tuple(static), tuple(leaves))


def _as_float32(value: Any) -> Any:
    if isinstance(value, (int, float, np.number)):
        return np.float32(value)
    if isinstance(value, (jax.Array, np.ndarray)) and (value.dtype != np.float32 or getattr(value, "weak_type", False)):
        return jnp.asarray(value, jnp.float32)
    return value  # a strong float32 already, or a placeholder of a transformation


def _unflatten_config(names: tuple[Any, Any], leaves: Any) -> Config:
    static, traced = names
    config = object.__new__(Config)
    for name, value in (*static, *zip(traced, leaves, strict=True)):
        object.__setattr__(config, name, value.value if isinstance(value, _ByIdentity) else value)
    return config


class _ByIdentity:
    """Stands for a user's object that cannot be hashed (a mutable dataclass, say) among a program's static settings."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


jax.tree_util.register_pytree_with_keys(Config, _flatten_config, _unflatten_config)


class Network(NamedTuple):
    """A function approximator, as two functions; linen modules fit with `Network(module.init, module.apply)`.

    Attributes:
      init: `init(key, observation)` -> params, a pytree of float arrays; `observation` is a single one, [...].
      apply: `apply(params, observation)` -> a distribution (policy) or values (value function) with the batch shape
        of `observation`, which may have any leading batch axes.
      initial_carry: None, or, for a network with a memory, `initial_carry()` -> what it remembers at the start of an
        episode, a pytree of arrays for one environment. It is then `apply(params, carry, observation)` ->
        (carry, output), where the carry has the leading axes of `observation`.
      features: None, or, for a policy whose trunk the value function may share (`shared_trunk`), a function like
        `apply` whose output is what the last layer sees, [..., F].
      on_inputs: None, or, where not all of `apply` may see a changed observation, `on_inputs(change)` -> the network
        whose learned part sees `change(observation)`. Of the default policy with a mask of allowed actions it is this
        part alone that observations are normalised for: the mask is asked about those of the environment.
    """

    init: Callable[[Array, Array], PyTree]
    apply: Callable[..., Any]
    initial_carry: Callable[[], PyTree] | None = None
    features: Callable[..., Any] | None = None
    on_inputs: Callable[[Callable[[Array], Array]], Any] | None = None


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


class LastUpdate(NamedTuple):
    """What the next batch needs to know of an update in order to measure its gain.

    Attributes:
      policy_params: θ before it.
      statistics: of the observations, as that policy had them.
      gain: surrogate gain that it promised, entropy bonus included, in units of the raw advantage; 0 if rejected.
      entropy_weight: what a nat of entropy counts for in it, in the same units.
      at_boundary: whether the radius, not the gain, limited the step, bool.
    """

    policy_params: PyTree
    statistics: RunningStatistics
    gain: Array
    entropy_weight: Array
    at_boundary: Array


class Control(NamedTuple):
    """What adapts from update to update; None where the settings do not ask for it.

    Attributes:
      radius: trust-region radius δ of the next update, nats (`radius_rule`).
      penalty: coefficient β of the KL in the next update (kl-penalty).
      last: what `radius_rule="ratio"` measures on the next batch.
    """

    radius: Any = None
    penalty: Any = None
    last: Any = None


class Memory(NamedTuple):
    """Batches side by side as if of more environments, the newest first.

    Attributes:
      batch: transitions [T, K·N, ...].
      log_prob: of the actions under the policies that took them, [T, K·N].
    """

    batch: Transition
    log_prob: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that the next iteration needs; arrays only.

    Attributes:
      iteration: iterations done, int32.
      key: the run's constant PRNG key; iteration i draws from `fold_in(key, i)`.
      policy_params: policy parameters θ.
      value_params: value-function parameters.
      policy_optimizer: state of the policy's optimizer; () for trpo, which has none.
      value_optimizer: state of the value function's optimizer; () for gauss-newton, which has none.
      control: what adapts from update to update, see `Control`.
      memory: earlier batches that the next update learns from too, see `Memory`; () without reuse.
      statistics: running mean and variance of observations.
      return_statistics: running mean and variance of the discounted return; () unless `normalize_rewards`.
      discounted_return: discounted return of the N running episodes so far, [N]; () unless `normalize_rewards`.
      env_state: states of the N environments.
      observation: the N current observations, [N, ...].
      policy_carry: what a recurrent policy remembers of the N running episodes, [N, ...]; () without a memory.
      value_carry: the same of a recurrent value function.
      episode_return: undiscounted return of the N running episodes, [N].
      episode_length: steps of the N running episodes, int32 [N].
      last_return: mean return of the episodes that ended in the last iteration in which any did; NaN before that.
      last_length: the same of their lengths.
    """

    iteration: Array
    key: Array
    policy_params: PyTree
    value_params: PyTree
    policy_optimizer: PyTree
    value_optimizer: PyTree
    control: Control
    memory: Any
    statistics: RunningStatistics
    return_statistics: Any
    discounted_return: Any
    env_state: PyTree
    observation: Array
    policy_carry: PyTree
    value_carry: PyTree
    episode_return: Array
    episode_length: Array
    last_return: Array
    last_length: Array


class Learned(NamedTuple):
    """The part of a `TrainState` that a batch changes."""

    policy_params: PyTree
    value_params: PyTree
    policy_optimizer: PyTree
    value_optimizer: PyTree
    control: Control
    memory: Any
    statistics: RunningStatistics
    return_statistics: Any
    discounted_return: Any
    value_carry: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """One scalar an iteration each (`train` stacks them to [num_iterations]).

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
