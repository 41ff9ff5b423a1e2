"""What moves from update to update: the trust-region radius, the penalty, the learning rates."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from trpo_jax.config import Config
from trpo_jax.steps.objectives import entropy_bonus
from trpo_jax.steps.radii import adapt_radius_by_divergence, adapt_radius_by_ratio
from trpo_jax.steps.statistics import RunningStatistics
from trpo_jax.steps.trust_region import UpdateInfo
from trpo_jax.steps.types import Array, PyTree
from trpo_jax.training.agents import Agent, batch_apply, on_normalized
from trpo_jax.types import Control, LastUpdate, Learned

_INVERSE_PENALTIES = 1e-4, 1e4  # bounds of 1/β


def annealed(value: Any, share: Any, config: Config, iteration: Array) -> Array:
    """A setting of which a share is gone at the end of the run: value (1 − share min(k, n)/n) in iteration k of n."""
    return value * (1 - share * jnp.minimum(iteration, config.num_iterations) / config.num_iterations)


def init_control(config: Config, policy_params: PyTree, statistics: RunningStatistics) -> Control:
    """What adapts, before the first update."""
    if config.radius_rule == "fixed":
        return Control(penalty=jnp.float32(config.initial_penalty) if config.update == "kl-penalty" else None)
    radius = jnp.clip(jnp.float32(config.max_kl), config.smallest_max_kl, config.largest_max_kl)
    if config.radius_rule == "divergence":
        return Control(radius)
    zero = jnp.float32(0)
    return Control(radius, last=LastUpdate(policy_params, statistics, zero, zero, jnp.bool_(False)))


def radius_of(config: Config, control: Control, iteration: Array) -> Array:
    """The trust-region radius of this update, nats.

    Learning from batches up to K − 1 policies old, the policies since then have used up part of what may be trusted:
    δ / (Σ_i ν_i (i + 1))², where ν_i is the share of the samples that are i policies old (Queeney et al. 2021, with
    δ = ε²/2).
    """
    radius = config.max_kl if control.radius is None else control.radius
    radius = annealed(radius, config.anneal_max_kl, config, iteration)
    if config.reuse > 1:
        age = jnp.minimum(np.arange(config.reuse), iteration)
        radius /= jnp.mean(age + 1.0) ** 2
    return radius


def measure_last_update(
    config: Config, agent: Agent, policy_apply: Any, old: Learned, observation: Any, action: Array, advantage: Array
) -> tuple[Control, Array]:
    """Realised over predicted gain of the last update, and the radius that follows from it (`radius_rule="ratio"`).

    From this batch, which the new policy collected, the same surrogate says what going back would cost,
    b = mean[(1 − π_last/π) A]. The gain along the step is the mean of both ends' slopes times its length, exactly so
    where η is quadratic, so r = ½ (p + b)/p with p as the last batch promised. Its noise does not grow as the step
    shrinks, as that of a difference of returns would; b is from samples that did not choose the step; and pure noise
    gives r = ½, on which the radius holds. A standard error is left to either side before the radius moves.
    An entropy bonus counts in p as in b, by what it weighed then: there w (H(π) − H(π_last)) on this batch's states.
    """
    control, last = old.control, old.control.last
    if last is None:
        return control, jnp.float32(jnp.nan)
    policy = policy_apply(old.policy_params, observation)
    before = batch_apply(on_normalized(config, last.statistics, agent.policy))
    last_policy = before(last.policy_params, observation)
    backward = -jnp.expm1(last_policy.log_prob(action) - policy.log_prob(action)) * advantage
    backward += last.entropy_weight * (entropy_bonus(policy) - entropy_bonus(last_policy))
    measured = last.gain > 0
    gain = jnp.where(measured, last.gain, 1)
    ratio = 0.5 * (1 + jnp.mean(backward) / gain)
    error = 0.5 * jnp.std(backward) / (np.sqrt(backward.size) * gain)
    certain = 0.5 + jnp.sign(ratio - 0.5) * jnp.maximum(jnp.abs(ratio - 0.5) - error, 0)
    bounds = config.smallest_max_kl, config.largest_max_kl
    radius = adapt_radius_by_ratio(control.radius, certain, last.at_boundary, *bounds)
    radius = jnp.where(measured, radius, control.radius)
    return control._replace(radius=radius), jnp.where(measured, ratio, jnp.nan)


def adapt(
    config: Config, control: Control, old: Learned, update: UpdateInfo, *, radius: Array, scale: Array
) -> Control:
    """What follows from an update for the next one. A refused step counts as one that went too far.

    Args:
      config: the settings.
      control: what adapts, as it was for this update.
      old: the agent before it.
      update: what it did.
      radius: δ that it had, after annealing and the share that is left to it under reuse.
      scale: what a unit of its weights is in units of the raw advantage.
    """
    finite = update.gradient_norm < jnp.finfo(jnp.float32).max
    refused = ~update.accepted & (update.gradient_norm > 0) & finite
    bounds = config.smallest_max_kl, config.largest_max_kl
    if config.radius_rule == "ratio":
        at_boundary = update.divergence > radius / 2
        shrunk = adapt_radius_by_ratio(control.radius, 0.0, at_boundary, *bounds)
        gain, entropy_weight = scale * update.surrogate_gain, scale * config.entropy_coefficient
        last = LastUpdate(old.policy_params, old.statistics, gain, entropy_weight, at_boundary)
        return control._replace(radius=jnp.where(refused, shrunk, control.radius), last=last)
    target = config.target_kl
    if config.radius_rule == "divergence":  # what annealing and reuse take from the radius, they take from its target
        target *= radius / control.radius
    divergence = jnp.where(refused, jnp.inf, jnp.where(update.accepted, update.divergence, target))
    if config.radius_rule == "divergence":
        return control._replace(radius=adapt_radius_by_divergence(control.radius, divergence, target, *bounds))
    if config.update == "kl-penalty":
        # A penalty is the inverse of a radius.
        adapted = adapt_radius_by_divergence(1 / control.penalty, divergence, config.target_kl, *_INVERSE_PENALTIES)
        return control._replace(penalty=1 / adapted)
    return control
