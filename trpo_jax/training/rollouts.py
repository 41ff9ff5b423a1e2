"""Collecting a batch of experience: N environments stepped T times by the current policy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax.environments.base import Environment
from trpo_jax.steps.types import Array
from trpo_jax.training.recurrence import advance, restart
from trpo_jax.training.resets import step_environments
from trpo_jax.types import Network, TrainState, Transition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EpisodeTotals:
    """Sums over the episodes that ended in a rollout, each a scalar."""

    count: Array
    total_return: Array
    total_length: Array


def rollout(
    environment: Environment, policy: Network, state: TrainState, key: Array, num_steps: int
) -> tuple[TrainState, Transition, EpisodeTotals]:
    """Step the N environments T times, sampling every action.

    No value function is evaluated and no log-probability kept: both are cheaper in one batch afterwards, and the
    ratio at θ_old is then exactly 1. Episode statistics are reduced to sums here, so memory does not grow with T·N.

    Args:
      environment: the environment.
      policy: the policy network, on observations as the environment gives them.
      state: where the environments stand.
      key: PRNG key for this rollout.
      num_steps: T.

    Returns:
      The state after the rollout, the transitions [T, N, ...], and totals of the episodes that ended.
    """

    def step(carry: tuple[Any, ...], keys: Array) -> tuple[tuple[Any, ...], Transition]:
        observation, memory, env_state, episode_return, episode_length, totals = carry
        key_action, key_step = keys
        memory, distribution = advance(policy, state.policy_params, memory, observation)
        action = distribution.sample(key_action)
        result, (next_observation, env_state) = step_environments(environment, key_step, env_state, action)
        transition = Transition(
            observation, action, result.reward, result.terminated, result.truncated, result.observation
        )
        done = result.done
        episode_return, episode_length = episode_return + result.reward, episode_length + 1
        totals = EpisodeTotals(
            totals.count + done,
            totals.total_return + jnp.where(done, episode_return, 0),
            totals.total_length + jnp.where(done, episode_length, 0),
        )
        episode_return = jnp.where(done, 0, episode_return)
        episode_length = jnp.where(done, 0, episode_length)
        memory = restart(policy, done, memory)
        return (next_observation, memory, env_state, episode_return, episode_length, totals), transition

    # Summed an environment until the end: a reduction a step would be a kernel a step.
    none = jnp.zeros_like(state.episode_length)
    totals = EpisodeTotals(none, jnp.zeros_like(state.episode_return), none)
    start = (
        state.observation,
        state.policy_carry,
        state.env_state,
        state.episode_return,
        state.episode_length,
        totals,
    )
    end, transitions = jax.lax.scan(step, start, jax.random.split(key, (num_steps, 2)))
    observation, policy_carry, env_state, episode_return, episode_length, totals = end
    state = dataclasses.replace(
        state,
        observation=observation,
        policy_carry=policy_carry,
        env_state=env_state,
        episode_return=episode_return,
        episode_length=episode_length,
    )
    return state, transitions, jax.tree.map(jnp.sum, totals)
