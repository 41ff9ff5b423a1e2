"""Collection of a batch of experience: the current policy steps N environments T times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax import backend
from trpo_jax.steps.types import Array
from trpo_jax.training.agents import Agent, with_normalization
from trpo_jax.training.packing import pack, unpack
from trpo_jax.training.recurrence import initial_carries, restart
from trpo_jax.training.resets import environment_keys, reset_environments, step_environments
from trpo_jax.training.state import ActorState, Carry, EpisodeTotals, LearnerState, Transition

_Step = Callable[[ActorState, Any], tuple[ActorState, Transition]]


def rollout(
    agent: Agent, learner: LearnerState, actor: ActorState, key: Array
) -> tuple[ActorState, Transition, EpisodeTotals]:
    """Step the N environments T times, sampling every action.

    No value function is evaluated and no log-probability kept: both are cheaper in one batch afterwards, and the
    ratio at θ_old is then exactly 1. Episode statistics are reduced to sums here, so memory does not grow with T·N.

    Args:
      agent: the agent that acts, with its environment.
      learner: its parameters θ, and the statistics that normalise observations.
      actor: the current states of the environments.
      key: PRNG key for this rollout.

    Returns:
      Their states after it, the transitions [T, N, ...], and totals of the episodes that ended in it, [N].
    """
    policy = with_normalization(agent.config, learner.statistics, agent.policy)

    def step(actor: ActorState, keys: Array) -> tuple[ActorState, Transition]:
        key_action, key_step = keys
        policy_carry, distribution = policy.step(learner.policy_params, actor.carry.policy, actor.observation)
        action = distribution.sample(key_action)
        result, (observation, env_state) = step_environments(agent.environment, key_step, actor.env_state, action)
        transition = Transition(
            actor.observation, action, result.reward, result.terminated, result.truncated, result.observation
        )
        done = result.done
        episode_return, episode_length = actor.episode_return + result.reward, actor.episode_length + 1
        actor = ActorState(
            env_state=env_state,
            observation=observation,
            carry=actor.carry._replace(policy=restart(policy, done, policy_carry)),
            episode_return=jnp.where(done, 0, episode_return),
            episode_length=jnp.where(done, 0, episode_length),
            ended=EpisodeTotals(
                actor.ended.count + done,
                actor.ended.total_return + jnp.where(done, episode_return, 0),
                actor.ended.total_length + jnp.where(done, episode_length, 0),
            ),
        )
        return actor, transition

    # Summed per environment until the end: a reduction in every step would be one more kernel each.
    start = dataclasses.replace(actor, ended=jax.tree.map(jnp.zeros_like, actor.ended))
    keys = jax.random.split(key, (agent.config.num_steps, 2))
    if backend.launches_are_costly():
        end, transitions = _scan_with_few_kernels(agent, step, start, keys)
    else:
        end, transitions = jax.lax.scan(step, start, keys)
    any_ended = jnp.sum(end.ended.count) > 0
    ended = jax.tree.map(lambda new, old: jnp.where(any_ended, new, old), end.ended, actor.ended)
    return dataclasses.replace(end, ended=ended), transitions, end.ended


def _scan_with_few_kernels(agent: Agent, step: _Step, start: ActorState, keys: Array) -> tuple[ActorState, Transition]:
    """Scan the steps, given keys [T, 2]: split all keys before them, and write the parts of a transition together."""
    key_action, key_step = keys[:, 0], keys[:, 1]
    split = jax.vmap(lambda key: environment_keys(agent.environment, key, agent.config.num_envs))
    like = jax.eval_shape(step, start, (key_action[0], key_step[0]))[1]

    def packed(actor: ActorState, keys: Any) -> tuple[ActorState, list[Array]]:
        actor, transition = step(actor, keys)
        return actor, pack(transition)

    end, transitions = jax.lax.scan(packed, start, (key_action, split(key_step)))
    # Taken apart here and not where it is used, so that both forms are not held at once while the agent learns.
    return end, jax.lax.optimization_barrier(unpack(transitions, like))


def init_actor(agent: Agent, key: Array) -> ActorState:
    """Reset N environments."""
    num_envs = agent.config.num_envs
    observation, env_state = reset_environments(agent.environment, key, num_envs)
    none, nothing = jnp.zeros(num_envs, jnp.int32), jnp.zeros(num_envs, jnp.float32)
    return ActorState(
        env_state=env_state,
        observation=observation,
        carry=Carry(
            policy=initial_carries(agent.policy, num_envs),
            value=initial_carries(agent.value, num_envs),
            discounted_return=nothing if agent.config.normalize_rewards else None,
        ),
        episode_return=nothing,
        episode_length=none,
        ended=EpisodeTotals(none, nothing, none),
    )
