"""Learning from one batch: prepare → estimate → update the policy → fit the value function → adapt.

Each stage is a pure function of the agent, the learner's state and the results of the stages before it. None of them
builds or steps an environment.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from trpo_jax.algorithms.base import Experience, Targets
from trpo_jax.networks.recurrent import RecurrentNetwork
from trpo_jax.steps.policy_updates import Batch, UpdateInfo
from trpo_jax.steps.statistics import RunningStatistics, init_statistics, update_statistics
from trpo_jax.steps.types import Array, PolicyApply, PyTree
from trpo_jax.steps.values import explained_variance
from trpo_jax.training.agents import Agent, check_networks, init_parameters, on_trunk, trunk_of, with_normalization
from trpo_jax.training.estimates import estimate_advantages, normalize_weights, observe_returns, scale_rewards
from trpo_jax.training.recurrence import Sequence, flatten_batch, outputs_of, restart, starts, swap_time_axis, unroll
from trpo_jax.training.state import Carry, LearnerState, ReplayBuffer, Transition


class Prepared(NamedTuple):
    """A batch in the layout of the networks: one axis B = N·T, or [N, T] if one of them is recurrent.

    Attributes:
      batch: transitions [T, K·N, ...] of the newest K batches, with scaled rewards.
      observation: input of the networks, [B, ...].
      start: where episodes begin, bool [N, T]; None without recurrent networks.
      action: [B, ...].
      carry: what the running episodes carried before the first step.
      ratios: π(a|s) over the probability under the policy that took the action, [T, K·N]; None without reuse.
      buffer: the newest K batches; None without reuse.
      return_statistics: statistics of the discounted return with this batch; None unless `normalize_rewards`.
      discounted_return: that of the running episodes after the batch, [N]; None unless `normalize_rewards`.
    """

    batch: Transition
    observation: Array
    start: Array | None
    action: Array
    carry: Carry
    ratios: Array | None
    buffer: ReplayBuffer | None
    return_statistics: RunningStatistics | None
    discounted_return: Array | None

    @property
    def policy_input(self) -> Sequence:
        """The input of the policy."""
        return Sequence(self.observation, self.start, self.carry.policy)


class Estimates(NamedTuple):
    """Estimates from the value function: V, advantages and λ-returns, [B] each, and its carry after the batch."""

    values: Array
    advantage: Array
    targets: Array
    value_carry: PyTree


class TrainInfo(NamedTuple):
    """Report of learning from a batch, in scalars."""

    update: UpdateInfo
    value_loss: Array
    explained_variance: Array


def init_learner(
    agent: Agent, key_policy: Array, key_value: Array, observation: Array, statistics: RunningStatistics
) -> LearnerState:
    """Build the state before the first batch, from a single observation and the statistics known so far."""
    config = agent.config
    policy_params = init_parameters(agent.policy, key_policy, observation, "policy")
    value = agent.value
    if config.shared_trunk:
        blank = init_statistics(agent.environment.observation_shape)
        value = on_trunk(with_normalization(config, blank, agent.policy), policy_params, agent.value)
    value_params = init_parameters(value, key_value, observation, "value")
    if config.policy is not None or config.value is not None:
        check_networks(agent, policy_params, value, value_params)
    vector = ravel_pytree(policy_params)[0]
    return LearnerState(
        policy_params=policy_params,
        value_params=value_params,
        last_step=jnp.zeros_like(vector),
        update=agent.algorithm.init(vector, statistics),
        value_fit=agent.value_fit.init(value_params),
        statistics=statistics,
        return_statistics=init_statistics(()) if config.normalize_rewards else None,
        buffer=None,
    )


def update_learner(
    agent: Agent, learner: LearnerState, batch: Transition, carry: Carry, iteration: Array, key: Array
) -> tuple[LearnerState, Carry, TrainInfo]:
    """Learn from one batch [T, N].

    Args:
      agent: the agent that learns.
      learner: its state.
      batch: transitions that its policy collected.
      carry: what the running episodes carried before the batch.
      iteration: iterations done before this one.
      key: PRNG key for shuffling minibatches, and nothing else.

    Returns:
      The state after it, what the episodes carry on (the policy's part unchanged), and a report.
    """
    key_policy, key_value = jax.random.split(key)
    prepared = prepare(agent, learner, batch, carry, iteration)
    estimates = estimate(agent, learner, prepared)
    policy_params, update, info = update_policy(agent, learner, prepared, estimates, iteration, key_policy)
    value_params, fit, value_loss = fit_value(agent, learner, policy_params, prepared, estimates, iteration, key_value)
    learner = dataclasses.replace(
        adapt(agent, learner, prepared),
        policy_params=policy_params,
        value_params=value_params,
        last_step=ravel_pytree(policy_params)[0] - ravel_pytree(learner.policy_params)[0],
        update=update,
        value_fit=fit,
    )
    carry = Carry(carry.policy, estimates.value_carry, prepared.discounted_return)
    return learner, carry, TrainInfo(info, value_loss, explained_variance(estimates.values, estimates.targets))


def prepare(agent: Agent, learner: LearnerState, batch: Transition, carry: Carry, iteration: Array) -> Prepared:
    """Scale rewards, put earlier batches beside the new one, and arrange all of it in the layout of the networks."""
    config = agent.config
    return_statistics, discounted_return = learner.return_statistics, carry.discounted_return
    if config.normalize_rewards:
        return_statistics, discounted_return = observe_returns(config, return_statistics, discounted_return, batch)
    buffer, ratios = learner.buffer, None
    if config.reuse > 1:
        policy = with_normalization(config, learner.statistics, agent.policy)
        buffer, ratios = append(policy, learner, batch, iteration, config.reuse)
        batch = buffer.batch
    # One batch axis: a product over two of them makes XLA's CPU backend transpose its operands, at twice the time. The
    # environments lead, so that a batch whose environments are on several devices stays where it is. Only recurrent
    # networks need the two axes, and whole sequences.
    lay_out = swap_time_axis if agent.is_recurrent else flatten_batch
    observation, action = jax.tree.map(lay_out, (batch.observation, batch.action))
    start = swap_time_axis(starts(batch.terminated, batch.truncated)) if agent.is_recurrent else None
    batch = dataclasses.replace(batch, reward=scale_rewards(config, return_statistics, batch.reward))
    return Prepared(batch, observation, start, action, carry, ratios, buffer, return_statistics, discounted_return)


def append(
    policy: RecurrentNetwork, learner: LearnerState, batch: Transition, iteration: Array, reuse: int
) -> tuple[ReplayBuffer, Array]:
    """Put the newest K batches side by side, [T, K·N], and compute their ratios to the current policy.

    In the first K − 1 iterations, copies of the first batch take the places of missing ones.
    """
    assert learner.buffer is not None

    def beside(new: Array, kept: Array) -> Array:
        copies = jnp.tile(new, (1, reuse - 1, *[1] * (new.ndim - 2)))
        return jnp.concatenate([new, jnp.where(iteration == 0, copies, kept)], axis=1)

    together = jax.tree.map(beside, batch, learner.buffer.batch)
    # One pass over all of them, including the newest.
    today = policy.step(learner.policy_params, (), together.observation)[1].log_prob(together.action)
    log_prob = beside(today[:, : batch.reward.shape[1]], learner.buffer.log_prob)
    return ReplayBuffer(together, log_prob), jnp.exp(today - log_prob)


def estimate(agent: Agent, learner: LearnerState, prepared: Prepared) -> Estimates:
    """Compute values, advantages and λ-returns of a batch with the value function from before it."""
    config, batch = agent.config, prepared.batch
    value, inputs = value_and_input(agent, learner, prepared)
    carries, values = unroll(value, learner.value_params, inputs)

    def value_of_next(observation: Array) -> Array:
        if not agent.is_recurrent:
            return value.step(learner.value_params, (), observation)[1]
        # A next observation is evaluated with the recurrent state of its step; that needs all of [T, N].
        return swap_time_axis(value.step(learner.value_params, carries, swap_time_axis(observation))[1])

    advantage = estimate_advantages(
        config,
        batch,
        values.reshape(batch.reward.shape[::-1]).T,
        value_of_next,
        prepared.ratios,
        sparse=not agent.is_recurrent,
        max_steps=agent.environment.max_steps,
    )
    advantage = swap_time_axis(advantage) if agent.is_recurrent else flatten_batch(advantage)
    # In a value target, unlike in an advantage, the first action may be off-policy too.
    on_policy = 1 if prepared.ratios is None else jnp.minimum(flatten_batch(prepared.ratios), 1)
    value_carry = prepared.carry.value
    if not config.shared_trunk and agent.is_recurrent:
        last = jax.tree.map(lambda leaf: leaf[:, -1], carries)
        value_carry = restart(value, batch.terminated[-1] | batch.truncated[-1], last)
    return Estimates(values, advantage, on_policy * advantage + values, value_carry)


def value_and_input(agent: Agent, learner: LearnerState, prepared: Prepared) -> tuple[RecurrentNetwork, Sequence]:
    """The value function before the batch, and its input."""
    if not agent.config.shared_trunk:
        value = with_normalization(agent.config, learner.statistics, agent.value)
        return value, Sequence(prepared.observation, prepared.start, prepared.carry.value)
    policy = with_normalization(agent.config, learner.statistics, agent.policy)
    return on_trunk(policy, learner.policy_params, agent.value), prepared.policy_input


def update_policy(
    agent: Agent, learner: LearnerState, prepared: Prepared, estimates: Estimates, iteration: Array, key: Array
) -> tuple[PyTree, PyTree, UpdateInfo]:
    """Update the policy; return its new parameters, the algorithm's state and its report."""
    config = agent.config
    # One flat vector instead of a pytree halves the time to compile the solver.
    vector, unravel = ravel_pytree(learner.policy_params)

    def apply_under(statistics: RunningStatistics) -> PolicyApply:
        apply = outputs_of(with_normalization(config, statistics, agent.policy))
        return lambda vector, observation: apply(unravel(vector), observation)

    weight = estimates.advantage if config.baseline else estimates.targets
    scale, weight = normalize_weights(config, weight, of=estimates.targets)
    log_prob = None if prepared.buffer is None else flatten_batch(prepared.buffer.log_prob)
    experience = Experience(
        batch=Batch(prepared.policy_input, prepared.action, weight, log_prob, sample_ndim=agent.sample_ndim),
        advantage=estimates.advantage,
        explained_variance=explained_variance(estimates.values, estimates.targets),
        scale=scale,
        num_new=config.steps_per_iteration,
        iteration=iteration,
        last_step=learner.last_step,
        statistics=learner.statistics,
        apply_under=apply_under,
    )
    apply = apply_under(learner.statistics)
    vector, state, info = agent.algorithm.update(apply, vector, learner.update, experience, key)
    return unravel(vector), state, info


def fit_value(
    agent: Agent,
    learner: LearnerState,
    policy_params: PyTree,
    prepared: Prepared,
    estimates: Estimates,
    iteration: Array,
    key: Array,
) -> tuple[PyTree, PyTree, Array]:
    """Fit V, after the policy's update to `policy_params`; return its parameters, the state of the fit and its loss."""
    if agent.config.shared_trunk:  # the head is fitted on the trunk that it will be used with
        trunk = trunk_of(with_normalization(agent.config, learner.statistics, agent.policy))
        value, inputs = agent.value, Sequence(outputs_of(trunk)(policy_params, prepared.policy_input), None, ())
    else:
        value, inputs = value_and_input(agent, learner, prepared)
    targets = Targets(inputs, estimates.targets, estimates.values, agent.sample_ndim, iteration)
    shuffled_by = key if agent.algorithm.shuffles else None
    return agent.value_fit.update(outputs_of(value), learner.value_params, learner.value_fit, targets, shuffled_by)


def adapt(agent: Agent, learner: LearnerState, prepared: Prepared) -> LearnerState:
    """Merge a batch into the learner's statistics, and put it in place of the oldest in the buffer."""
    config = agent.config
    statistics, buffer = learner.statistics, prepared.buffer
    if config.normalize_observations:
        statistics = update_statistics(statistics, prepared.observation[: config.steps_per_iteration])
    if buffer is not None:
        width = (config.reuse - 1) * config.num_envs
        buffer = jax.tree.map(lambda leaf: leaf[:, :width], buffer)
    return dataclasses.replace(
        learner, statistics=statistics, return_statistics=prepared.return_statistics, buffer=buffer
    )


def blank_buffer(batch: Any, reuse: int) -> ReplayBuffer:
    """A buffer of zeros for K − 1 batches like `batch` (arrays or shapes); the first batch overwrites it."""
    width = (reuse - 1) * batch.reward.shape[1]
    shapes = ReplayBuffer(batch, batch.reward)
    return jax.tree.map(lambda leaf: jnp.zeros((leaf.shape[0], width, *leaf.shape[2:]), leaf.dtype), shapes)
