"""How the trust-region radius moves from update to update: not at all, by the divergence, or by the realised gain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.algorithms.base import Experience
from trpo_jax.config import Config
from trpo_jax.steps.objectives import entropy_bonus
from trpo_jax.steps.policy_updates import UpdateInfo
from trpo_jax.steps.radii import adapt_radius_by_divergence, adapt_radius_by_ratio
from trpo_jax.steps.statistics import RunningStatistics
from trpo_jax.steps.types import Array, PolicyApply, PyTree, Scalar


class RadiusRule(NamedTuple):
    """A rule, as three functions.

    Attributes:
      init: `init(config, params, statistics)` -> its state.
      before: `before(config, policy_apply, params, state, experience)` -> (state, δ of this update, realised over
        predicted gain of the update before, NaN where it was not measured).
      after: `after(config, params, state, experience, info, radius)` -> the state for the next update; `params` are
        those before this one, `radius` is δ that it had, after annealing and the share left to it under reuse.
    """

    init: Callable[..., PyTree]
    before: Callable[..., tuple[PyTree, Array, Array]]
    after: Callable[..., PyTree]


class PreviousUpdate(NamedTuple):
    """What the next batch needs to know of an update in order to measure its gain.

    Attributes:
      policy_params: θ before it, [P].
      statistics: of the observations, as that policy had them.
      gain: surrogate gain that it promised, entropy bonus included, in units of the raw advantage; 0 if rejected.
      entropy_weight: what a nat of entropy counts for in it, in the same units.
      at_boundary: whether the radius, not the gain, limited the step, bool.
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
    """Whether a step was there and none was taken, which counts as one that went too far."""
    finite = info.gradient_norm < jnp.finfo(jnp.float32).max
    return ~info.accepted & (info.gradient_norm > 0) & finite


def effective_divergence(info: UpdateInfo, target: Scalar) -> Array:
    """The divergence that a rule reacts to: infinite where the step was refused, the target where there was none."""
    return jnp.where(was_refused(info), jnp.inf, jnp.where(info.accepted, info.divergence, target))


def _first_radius(config: Config) -> Array:
    return jnp.clip(jnp.float32(config.max_kl), config.smallest_max_kl, config.largest_max_kl)


def _unmeasured(config: Config, policy_apply: PolicyApply, params: Array, state: Any, experience: Experience) -> Any:
    return state, config.max_kl if state is None else state, jnp.float32(jnp.nan)


def _by_divergence(
    config: Config, params: Array, radius: Array, experience: Experience, info: UpdateInfo, used_radius: Array
) -> Array:
    # What annealing and reuse take from the radius, they take from its target.
    target = config.target_kl * (used_radius / radius)
    divergence = effective_divergence(info, target)
    return adapt_radius_by_divergence(radius, divergence, target, config.smallest_max_kl, config.largest_max_kl)


def _init_ratio(config: Config, params: Array, statistics: RunningStatistics) -> MeasuredRadius:
    zero = jnp.float32(0)
    return MeasuredRadius(_first_radius(config), PreviousUpdate(params, statistics, zero, zero, jnp.bool_(False)))


def _measure(
    config: Config, policy_apply: PolicyApply, params: Array, state: MeasuredRadius, experience: Experience
) -> tuple[MeasuredRadius, Array, Array]:
    """Realised over predicted gain of the previous update, and the radius that follows from it.

    From this batch, which the new policy collected, the same surrogate says what going back would cost,
    b = mean[(1 − π_last/π) A]. The gain along the step is the mean of both ends' slopes times its length, exactly so
    where η is quadratic, so r = ½ (p + b)/p with p as the last batch promised. Its noise does not grow as the step
    shrinks, as that of a difference of returns would; b is from samples that did not choose the step; and pure noise
    gives r = ½, on which the radius holds. A standard error is left to either side before the radius moves.
    An entropy bonus counts in p as in b, by what it weighed then: there w (H(π) − H(π_last)) on this batch's states.
    """
    last = state.previous
    newest = experience.batch.observation, experience.batch.action, experience.advantage
    observation, action, advantage = jax.tree.map(lambda leaf: leaf[: experience.num_new], newest)
    policy = policy_apply(params, observation)
    last_policy = experience.apply_under(last.statistics)(last.policy_params, observation)
    backward = -jnp.expm1(last_policy.log_prob(action) - policy.log_prob(action)) * advantage
    backward += last.entropy_weight * (entropy_bonus(policy) - entropy_bonus(last_policy))
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
    """What the next batch measures; a refused step makes the radius shrink at once."""
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
