"""What one batch teaches an agent: advantages → policy update → value fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trpo_jax import backend
from trpo_jax.config import Config
from trpo_jax.steps.advantages import gae, parallel_gae
from trpo_jax.steps.statistics import RunningStatistics, update_statistics, varies
from trpo_jax.steps.trust_region import UpdateInfo
from trpo_jax.steps.types import Array, PyTree
from trpo_jax.steps.values import explained_variance
from trpo_jax.training.adaptation import adapt, annealed, measure_last_update, radius_of
from trpo_jax.training.agents import (
    batch_apply,
    by_environment,
    flatten_batch,
    is_recurrent,
    make_agent,
    on_normalized,
    on_trunk,
    over_batch,
    trunk_of,
)
from trpo_jax.training.recurrence import advance, restart, starts, unroll
from trpo_jax.training.updates import fit_value, normalize_weights, update_policy
from trpo_jax.types import Learned, Memory, Network, Transition


class Lesson(NamedTuple):
    """What is worth telling of a batch, each a scalar; NaN where the settings have none of it."""

    update: UpdateInfo
    value_loss: Array
    explained_variance: Array
    radius: Array
    gain_ratio: Array
    penalty: Array


@jax.jit  # traced once, however often `vmap` and `lax.map` ask for it
def learn(
    config: Config, old: Learned, batch: Transition, iteration: Array, policy_carry: PyTree, key: Array
) -> tuple[Learned, Lesson]:
    """Advantages, policy update and value fit from one batch [T, N], before which the policy remembered its carry.

    The key shuffles the minibatches of PPO and of the penalised surrogate, and nothing else.
    """
    agent = make_agent(config)
    policy = on_normalized(config, old.statistics, agent.policy)
    if config.shared_trunk:
        value, value_start = on_trunk(policy, old.policy_params, agent.value), policy_carry
    else:
        value, value_start = on_normalized(config, old.statistics, agent.value), old.value_carry
    num_new, memory, ratios = batch.reward.size, old.memory, None
    return_statistics, discounted_return = old.return_statistics, old.discounted_return
    if config.normalize_rewards:
        return_statistics, discounted_return = observe_returns(config, old, batch)
    if config.reuse > 1:
        batch, memory, ratios = recall(config, policy.apply, old, batch, iteration)

    # One batch axis: a product over two of them makes XLA's CPU backend transpose its operands, at twice the time. The
    # environments lead, so that a batch whose environments are spread over devices stays where it is. Only a memory
    # needs the two axes, and whole sequences.
    recurrent = is_recurrent(agent)
    flatten = by_environment if recurrent else flatten_batch
    observation, action = jax.tree.map(flatten, (batch.observation, batch.action))
    start = by_environment(starts(batch.terminated, batch.truncated)) if recurrent else None
    policy_apply, policy_input = over_batch(policy, observation, start, policy_carry)
    value_apply, value_input = over_batch(value, observation, start, value_start)
    values, value_of_next, value_carry = evaluate_values(value, old, value_apply, value_input, batch)
    batch = dataclasses.replace(batch, reward=scale_rewards(config, return_statistics, batch.reward))
    advantage = estimate_advantages(
        config, batch, values, value_of_next, ratios, flatten=flatten, max_steps=agent.environment.max_steps
    )
    # Of a value target, unlike of an advantage, the first action may be off-policy too.
    on_policy = 1 if ratios is None else jnp.minimum(flatten_batch(ratios), 1)
    targets = on_policy * advantage + values
    weight = advantage if config.baseline else targets

    newest = jax.tree.map(lambda leaf: leaf[:num_new], (policy_input, action, advantage))
    control, gain_ratio = measure_last_update(config, agent, policy_apply, old, *newest)
    radius = radius_of(config, control, iteration)
    behaviour = None if ratios is None else flatten_batch(memory.log_prob)
    scale, weight = normalize_weights(config, weight, of=targets)
    key_policy, key_value = jax.random.split(key)
    policy_params, policy_optimizer, update = update_policy(
        config,
        policy_apply,
        old,
        policy_input,
        action,
        weight,
        radius=radius,
        learning_rate=annealed(config.policy_learning_rate, config.anneal_learning_rates, config, iteration),
        key=key_policy,
        behaviour_log_prob=behaviour,
        sample_ndim=1 if recurrent else None,
    )
    control = adapt(config, control, old, update, radius=radius, scale=scale)

    if config.shared_trunk:  # what the head is fitted to is the trunk that it will be used on
        value_apply, value_carry = agent.value.apply, ()
        value_input = batch_apply(trunk_of(policy))(policy_params, policy_input)
    learning_rate = annealed(config.value_learning_rate, config.anneal_learning_rates, config, iteration)
    value_params, value_optimizer, value_loss = fit_value(
        config,
        value_apply,
        old,
        value_input,
        targets,
        values,
        learning_rate,
        key_value,
        sample_ndim=1 if recurrent else None,
    )
    statistics = old.statistics
    if config.normalize_observations:
        statistics = update_statistics(statistics, observation[:num_new])
    if config.reuse > 1:
        memory = jax.tree.map(lambda leaf: leaf[:, : (config.reuse - 1) * config.num_envs], memory)
    new = Learned(
        policy_params,
        value_params,
        policy_optimizer,
        value_optimizer,
        control,
        memory,
        statistics,
        return_statistics,
        discounted_return,
        value_carry,
    )
    absent = jnp.float32(jnp.nan)
    lesson = Lesson(
        update=update,
        value_loss=value_loss,
        explained_variance=explained_variance(values, targets),
        radius=jnp.asarray(radius, jnp.float32) if config.update == "trpo" else absent,
        gain_ratio=gain_ratio,
        penalty=absent if old.control.penalty is None else old.control.penalty,
    )
    return new, lesson


def recall(
    config: Config, policy_apply: Any, old: Learned, batch: Transition, iteration: Array
) -> tuple[Transition, Memory, Array]:
    """The newest K batches side by side [T, K·N]: transitions, the same as `Memory`, and ratios to today's policy.

    In the first K − 1 iterations, copies of the first batch take the places of those that never were.
    """

    def beside(new: Array, kept: Array) -> Array:
        copies = jnp.tile(new, (1, config.reuse - 1, *[1] * (new.ndim - 2)))
        return jnp.concatenate([new, jnp.where(iteration == 0, copies, kept)], axis=1)

    together = jax.tree.map(beside, batch, old.memory.batch)
    # One pass over all of them, which has the newest in it too.
    today = policy_apply(old.policy_params, together.observation).log_prob(together.action)
    memory = Memory(together, beside(today[:, : batch.reward.shape[1]], old.memory.log_prob))
    return together, memory, jnp.exp(today - memory.log_prob)


def evaluate_values(
    value: Network, old: Learned, value_apply: Any, value_input: Any, batch: Transition
) -> tuple[Array, Callable[[Array], Array] | None, PyTree]:
    """V of a batch, V as a function of what steps led to, and what V remembers after the last step.

    With a memory, a next observation is judged by what is remembered at its step; that needs all of [T, N].
    """
    if value.initial_carry is None:
        values = value_apply(old.value_params, value_input)
        return values, lambda observation: value_apply(old.value_params, observation), ()
    values, carries = unroll(value, old.value_params, value_input)

    def value_of_next(observation: Array) -> Array:
        return by_environment(advance(value, old.value_params, carries, by_environment(observation))[1])

    last = jax.tree.map(lambda leaf: leaf[:, -1], carries)
    return values, value_of_next, restart(value, batch.terminated[-1] | batch.truncated[-1], last)


def observe_returns(config: Config, old: Learned, batch: Transition) -> tuple[RunningStatistics, Array]:
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
    running, returns = jax.lax.scan(step, old.discounted_return, (batch.reward, done))
    return update_statistics(old.return_statistics, returns), running


def scale_rewards(config: Config, statistics: RunningStatistics, reward: Array) -> Array:
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
    value_fn: Any,
    ratios: Array | None = None,
    flatten: Callable[[Array], Array] | None = None,
    max_steps: int | None = None,
) -> Array:
    """GAE over the rollout, as a flat batch like `values` [N·T]: sequential on CPU, associative on accelerators."""
    estimate = gae if backend.scans_are_sequential() else parallel_gae
    values = values.reshape(batch.reward.shape[::-1]).T
    advantage = estimate(
        batch.reward,
        values,
        _next_values(batch, values, value_fn, sparse=flatten is not by_environment, max_steps=max_steps),
        batch.terminated,
        batch.truncated,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        ratios=ratios,
    )
    return (flatten or flatten_batch)(advantage)


def _next_values(
    batch: Transition,
    values: Array,
    value_fn: Callable[[Array], Array],
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


def _one_truncation_at_a_time(
    truncated: Array, values: Array, value_fn: Callable[[Array], Array], next_observation: Array
) -> Array:
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
