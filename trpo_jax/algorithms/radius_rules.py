"""Rules for the trust-region radius between updates: fixed, adapted to the divergence, or to the realised gain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from trpo_jax.algorithms.base import Experience, bonus_of
from trpo_jax.config import Config
from trpo_jax.steps.policy_updates import UpdateInfo
from trpo_jax.steps.radii import adapt_radius_by_divergence, adapt_radius_by_ratio
from trpo_jax.steps.statistics import RunningStatistics
from trpo_jax.steps.types import Array, PolicyApply, PyTree, Scalar


class RadiusRule(NamedTuple):
    """A radius rule as three functions.

    Attributes:
      init: `init(config, params, statistics)` -> its initial state.
      before: `before(config, policy_apply, params, state, experience)` -> (state, δ of this update, realised over
        predicted gain of the previous update, NaN where it was not measured).
      after: `after(config, params, state, experience, info, radius)` -> the state for the next update. `params` are
        those before this update; `radius` is the δ that it used, after annealing and the reduction for reuse.
    """

    init: Callable[..., PyTree]
    before: Callable[..., tuple[PyTree, Array, Array]]
    after: Callable[..., PyTree]


class PreviousUpdate(NamedTuple):
    """The facts about an update that the next batch needs to measure its gain.

    Attributes:
      policy_params: θ before it, [P].
      statistics: the observation statistics of that policy.
      gain: its surrogate gain, including the entropy bonus, in units of the raw advantage; 0 if it was rejected.
      entropy_weight: the value of one nat of entropy in that gain, in the same units.
      at_boundary: whether the radius, rather than the gain, limited the step, bool.
    """

    policy_params: Array
    statistics: RunningStatistics
    gain: Array
    entropy_weight: Array
    at_boundary: Array


class MeasuredRadius(NamedTuple):
    """State of the rule "ratio": the radius δ, and the update whose gain the next batch measures."""

    radius: Array
    previous: PreviousUpdate


def was_refused(info: UpdateInfo) -> Array:
    """Whether the gradient was usable but no step was taken; the rules treat this as a step that went too far."""
    finite = info.gradient_norm < jnp.finfo(jnp.float32).max
    return ~info.accepted & (info.gradient_norm > 0) & finite


def effective_divergence(info: UpdateInfo, target: Scalar) -> Array:
    """The divergence for a radius rule: infinite if the step was refused, the target if there was no step to take."""
    return jnp.where(was_refused(info), jnp.inf, jnp.where(info.accepted, info.divergence, target))


def _first_radius(config: Config) -> Array:
    return jnp.clip(jnp.float32(config.max_kl), config.smallest_max_kl, config.largest_max_kl)


def _unmeasured(config: Config, policy_apply: PolicyApply, params: Array, state: Any, experience: Experience) -> Any:
    return state, config.max_kl if state is None else state, jnp.float32(jnp.nan)


def _by_divergence(
    config: Config, params: Array, radius: Array, experience: Experience, info: UpdateInfo, used_radius: Array
) -> Array:
    # Annealing and reuse reduce the radius, and its target by the same factor.
    target = config.target_kl * (used_radius / radius)
    divergence = effective_divergence(info, target)
    return adapt_radius_by_divergence(radius, divergence, target, config.smallest_max_kl, config.largest_max_kl)


def _init_ratio(config: Config, params: Array, statistics: RunningStatistics) -> MeasuredRadius:
    zero = jnp.float32(0)
    return MeasuredRadius(_first_radius(config), PreviousUpdate(params, statistics, zero, zero, jnp.bool_(False)))


def _measure(
    config: Config, policy_apply: PolicyApply, params: Array, state: MeasuredRadius, experience: Experience
) -> tuple[MeasuredRadius, Array, Array]:
    """Compare realised and predicted gain of the previous update, and adapt the radius to their ratio.

    The new policy collected this batch, so the same surrogate gives the cost of going back, b = mean[(1 − π_last/π) A].
    The gain along the step is its length times the mean of the slopes at both ends, exactly so where η is quadratic.
    Hence r = ½ (p + b)/p, with the surrogate gain p on the previous batch. The noise of r does not grow as the step
    shrinks, unlike that of a difference of returns. The samples behind b did not choose the step. Pure noise gives
    r = ½, at which the radius stays. Before the rule uses r, it is moved one standard error towards ½.
    An entropy bonus counts in p and in b with the weight w that it had then: in b as w (H(π) − H(π_last)) on the states
    of this batch.
    """
    last = state.previous
    observation, action, advantage = experience.newest(experience.advantage)
    policy = policy_apply(params, observation)
    last_policy = experience.apply_under(last.statistics)(last.policy_params, observation)
    backward = -jnp.expm1(last_policy.log_prob(action) - policy.log_prob(action)) * advantage
    bonus = bonus_of(config)
    backward += last.entropy_weight * (bonus(policy) - bonus(last_policy))
    measured = last.gain > 0
    gain = jnp.where(measured, last.gain, 1)
    ratio = 0.5 * (1 + jnp.mean(backward) / gain)
    error = 0.5 * jnp.std(backward) / (np.sqrt(backward.size) * gain)
    certain = 0.5 + jnp.sign(ratio - 0.5) * jnp.maximum(jnp.abs(ratio - 0.5) - error, 0)
    bounds = config.smallest_max_kl, config.largest_max_kl
    radius = adapt_radius_by_ratio(state.radius, certain, last.at_boundary, *bounds)
    radius = jnp.where(measured, radius, state.radius)
    return state._replace(radius=radius), radius, jnp.where(measured, ratio, jnp.nan)


def _remember(
    config: Config, params: Array, state: MeasuredRadius, experience: Experience, info: UpdateInfo, radius: Array
) -> MeasuredRadius:
    """Store the update for the next batch to measure; after a refused step, shrink the radius at once."""
    at_boundary = info.divergence > radius / 2
    bounds = config.smallest_max_kl, config.largest_max_kl
    shrunk = adapt_radius_by_ratio(state.radius, 0.0, at_boundary, *bounds)
    gain, entropy_weight = experience.scale * info.surrogate_gain, experience.scale * config.entropy_coefficient
    previous = PreviousUpdate(params, experience.statistics, gain, entropy_weight, at_boundary)
    return MeasuredRadius(jnp.where(was_refused(info), shrunk, state.radius), previous)


RADIUS_RULES = {
    "fixed": RadiusRule(lambda config, params, statistics: None, _unmeasured, lambda config, params, state, *_: state),
    "divergence": RadiusRule(lambda config, params, statistics: _first_radius(config), _unmeasured, _by_divergence),
    "ratio": RadiusRule(_init_ratio, _measure, _remember),
}
