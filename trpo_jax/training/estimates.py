"""From a batch to advantages: scaled rewards, values of what steps led to, GAE, and the weights of the actions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax import backend
from trpo_jax.config import Config
from trpo_jax.steps.advantages import gae, parallel_gae
from trpo_jax.steps.statistics import RunningStatistics, update_statistics, varies
from trpo_jax.steps.types import Array, at_least_float32
from trpo_jax.training.state import Transition

ValueFn = Callable[[Array], Array]
"""`value_fn(next_observation)` -> V, with its leading axes."""


def observe_returns(
    config: Config, statistics: Any, running: Any, batch: Transition
) -> tuple[RunningStatistics, Array]:
    """Statistics of the running discounted return R ← γ R + r of every environment, with those of a batch merged.

    R starts at 0 with each episode. Unlike those of observations they are merged before they are used: no reward is
    looked at while the batch is collected, so even the first batch is scaled.

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
    """Rewards as the settings have them normalised and clipped; normalised ones are divided by σ, not centred."""
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
    """GAE over the rollout, [T, N]: sequential on CPU, associative on accelerators.

    Args:
      config: the settings.
      batch: transitions [T, N, ...].
      values: V of their observations, [T, N].
      value_fn: V of what steps led to.
      ratios: see `gae`.
      sparse: whether `value_fn` takes any batch of next observations, or [T, N] whole.
      max_steps: the environment's time limit, if it is known.
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
    """V of the observation that each step led to, [T, N]; anything after a terminal state, where nothing asks for it.

    It is V of the next row, but for truncated steps and the last row. V is evaluated for those alone, if it can be
    (`sparse`). On CPU, where a branch is cheap, if no environment was truncated twice. On an accelerator, where under
    `vmap` both sides of a branch would be taken, for one truncated step of every environment after the other; if the
    time limit `max_steps` promises that so many are few.
    """
    next_observation, num_steps = batch.next_observation, batch.reward.shape[0]
    on_cpu = backend.branches_are_cheap()
    if not sparse or not (on_cpu or (max_steps is not None and 2 * max_steps >= num_steps)):
        return value_fn(next_observation)
    truncated = batch.truncated & ~batch.terminated
    if not on_cpu:
        return _one_truncation_at_a_time(truncated, values, value_fn, next_observation)
    here = jnp.argmax(truncated, axis=0), jnp.arange(truncated.shape[1])  # the one truncated step of each environment

    def once_each() -> Array:
        at_truncation, at_end = jnp.split(value_fn(jnp.concatenate([next_observation[here], next_observation[-1]])), 2)
        next_values = jnp.concatenate([values[1:], at_end[None]])
        return next_values.at[here].set(jnp.where(truncated[here], at_truncation, next_values[here]))

    twice = jnp.any(jnp.sum(truncated[:-1], axis=0) > 1)
    return jax.lax.cond(twice, lambda: value_fn(next_observation), once_each)


def _one_truncation_at_a_time(truncated: Array, values: Array, value_fn: ValueFn, next_observation: Array) -> Array:
    """V of next observations [T, N], by a pass over N of them for every truncation that an environment had.

    Each environment looks along its own steps, so that environments that are spread over devices stay where they are.
    """
    environments = jnp.arange(truncated.shape[1])

    def one_each(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, next_values = carry
        here = jnp.argmax(left, axis=0), environments
        found = jnp.where(left[here], value_fn(next_observation[here]), next_values[here])
        return left.at[here].set(False), next_values.at[here].set(found)

    next_values = jnp.concatenate([values[1:], value_fn(next_observation[-1])[None]])
    left = truncated.at[-1].set(False)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), one_each, (left, next_values))[1]


def normalize_weights(config: Config, weight: Array, of: Array | None = None) -> tuple[Array, Array]:
    """The number that the weights of the actions are divided by, and what the update is given.

    Advantages are centred and divided by their standard deviation; equal ones, but for the rounding of what they are
    differences `of`, say nothing and become 0. Without a baseline the weights are returns, which are divided by the
    root of their mean square: to subtract their mean would be a baseline after all.
    """
    if not config.normalize_advantages:
        return jnp.ones_like(weight.ravel()[0]), weight
    weight = at_least_float32(weight)
    if not config.baseline:
        size = jnp.sqrt(jnp.mean(weight**2))
        scale = jnp.where(size > 0, size, 1)
        return scale, weight / scale
    smallest, largest = jnp.min(weight), jnp.max(weight)
    magnitude = jnp.maximum(jnp.abs(smallest), jnp.abs(largest))
    if of is not None:
        magnitude = jnp.maximum(magnitude, jnp.max(jnp.abs(of)))
    spread = largest - smallest
    varied = varies(spread, magnitude)
    scale = jnp.where(varied, jnp.std(weight), 1)
    # What is not finite stays so, for the update to refuse.
    return scale, jnp.where(varied | ~jnp.isfinite(spread), (weight - jnp.mean(weight)) / scale, 0)
