"""From a batch to advantages: scaled rewards, values of next observations, GAE, and the weights of the actions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax import backend
from trpo_jax.config import Config
from trpo_jax.steps.advantages import gae, parallel_gae
from trpo_jax.steps.statistics import RunningStatistics, update_statistics, varies
from trpo_jax.steps.trees import max_abs, maximum
from trpo_jax.steps.types import Array, at_least_float32
from trpo_jax.training.state import Transition

ValueFn = Callable[[Array], Array]
"""`value_fn(next_observation)` -> V, with the same leading axes."""


def observe_returns(
    config: Config, statistics: Any, running: Any, batch: Transition
) -> tuple[RunningStatistics, Array]:
    """Merge a batch into the statistics of the running discounted return R ← γ R + r of every environment.

    R starts at 0 in each episode. Unlike statistics of observations, these are merged before they are used: the rollout
    uses no rewards, so even the first batch is scaled.

    Returns:
      The statistics, and R of the running episodes, [N].

    Source: Engstrom et al. 2020, section 3.
    """

    def step(running: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, done = inputs
        running = config.gamma * running + reward
        return jnp.where(done, 0, running), running

    done = batch.terminated | batch.truncated
    running, returns = jax.lax.scan(step, running, (batch.reward, done))
    return update_statistics(statistics, returns), running


def scale_rewards(config: Config, statistics: Any, reward: Array) -> Array:
    """Normalise and clip rewards, each if it is set; normalised rewards are divided by σ, not centred."""
    if config.normalize_rewards:
        positive = statistics.variance > 0
        std = jnp.sqrt(jnp.where(positive, statistics.variance, 1))
        reward = reward / jnp.where(positive & varies(std, statistics.mean), std, 1)
    clip = config.reward_clip
    return jnp.where(clip > 0, jnp.clip(reward, -clip, clip), reward)


def estimate_advantages(
    config: Config,
    batch: Transition,
    values: Array,
    value_fn: ValueFn,
    ratios: Array | None = None,
    *,
    sparse: bool = True,
    max_steps: int | None = None,
) -> Array:
    """Compute GAE over the rollout, [T, N]: sequentially on CPU, associatively on accelerators.

    Args:
      config: the settings.
      batch: transitions [T, N, ...].
      values: V of their observations, [T, N].
      value_fn: V of next observations.
      ratios: see `gae`.
      sparse: whether `value_fn` accepts any batch of next observations, or only [T, N] as a whole.
      max_steps: the environment's time limit, if known.
    """
    estimate = gae if backend.scans_are_sequential() else parallel_gae
    return estimate(
        batch.reward,
        values,
        next_values(batch, values, value_fn, sparse=sparse, max_steps=max_steps),
        batch.terminated,
        batch.truncated,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        ratios=ratios,
    )


def next_values(
    batch: Transition,
    values: Array,
    value_fn: ValueFn,
    sparse: bool = True,
    max_steps: int | None = None,
) -> Array:
    """Compute V of each step's next observation, [T, N]; after a terminal state it is arbitrary, since nothing uses it.

    It is V of the next row, except at truncated steps and in the last row. V is evaluated for those alone if `sparse`
    allows it, with one truncated step of every environment at a time, unless a short time limit `max_steps` makes one
    pass over the whole batch faster. Without a limit their number is not known, and an accelerator takes that one pass.
    """
    next_observation, num_steps = batch.next_observation, batch.reward.shape[0]
    few = backend.branches_are_cheap() if max_steps is None else 2 * max_steps >= num_steps
    if not sparse or not few:
        return value_fn(next_observation)
    # Each environment looks along its own steps, so that environments on several devices stay where they are.
    environments = jnp.arange(batch.reward.shape[1])

    def one_each(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, next_values = carry
        here = jnp.argmax(left, axis=0), environments
        found = jnp.where(left[here], value_fn(next_observation[here]), next_values[here])
        return left.at[here].set(False), next_values.at[here].set(found)

    next_values = jnp.concatenate([values[1:], value_fn(next_observation[-1])[None]])
    left = (batch.truncated & ~batch.terminated).at[-1].set(False)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), one_each, (left, next_values))[1]


def normalize_weights(config: Config, weight: Array, of: Array | None = None) -> tuple[Array, Array]:
    """Normalise the weights of the actions; return the divisor and the weights for the update.

    Advantages are centred and divided by their standard deviation. If they are equal, up to the rounding error of the
    numbers `of` which they are differences, they carry no information and become 0. Without a baseline the weights are
    returns, which are divided by their root mean square: subtracting their mean would be a baseline after all.
    """
    if not config.normalize_advantages:
        return jnp.ones_like(weight.ravel()[0]), weight
    weight = at_least_float32(weight)
    if not config.baseline:
        size = jnp.sqrt(jnp.mean(weight**2))
        scale = jnp.where(size > 0, size, 1)
        return scale, weight / scale
    smallest, largest = -maximum(-weight), maximum(weight)
    magnitude = jnp.maximum(jnp.abs(smallest), jnp.abs(largest))
    if of is not None:
        magnitude = jnp.maximum(magnitude, max_abs(of))
    spread = largest - smallest
    varied = varies(spread, magnitude)
    scale = jnp.where(varied, jnp.std(weight), 1)
    # Numbers that are not finite stay so, and the update rejects them.
    return scale, jnp.where(varied | ~jnp.isfinite(spread), (weight - jnp.mean(weight)) / scale, 0)
