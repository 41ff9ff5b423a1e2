"""Evaluation of a policy by whole episodes, without learning."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax.config_pytree import Config
from trpo_jax.environments.base import Environment
from trpo_jax.fields import NEVER, NONE
from trpo_jax.sentences import check_limits
from trpo_jax.steps.types import Array, PyTree
from trpo_jax.training.agents import make_agent, with_normalization
from trpo_jax.training.fit_checks import check_acts
from trpo_jax.training.recurrence import initial_carries
from trpo_jax.training.resets import reset_environments
from trpo_jax.training.state import TrainState, check_key
from trpo_jax.validation import validate

_IN_TRAINING = 2**32 - 3  # folded into the run's key for evaluations during training; no iteration has this number
_ANEW = 2**32 - 4  # for a second evaluation of a state that was selected by the first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Returns and lengths of E episodes, one entry per episode.

    Attributes:
      episode_return: undiscounted return, float32 [E].
      episode_length: steps, int32 [E].
      finished: whether the episode ended, by itself or by its time limit, before `max_steps`, bool [E].
    """

    episode_return: Array
    episode_length: Array
    finished: Array


def evaluate(
    config: Config,
    state: TrainState,
    key: Array,
    *,
    num_episodes: int = 64,
    deterministic: bool | None = None,
    max_steps: int = 100_000,
    randomize: bool = False,
) -> Evaluation:
    """Run whole episodes with the policy in `state`, in parallel, from fresh resets.

    Args:
      config: the settings the state was trained with.
      state: the agent.
      key: a typed PRNG key, for resets, transitions and sampled actions.
      num_episodes: E, episodes run side by side (static). Only the first episode of each environment counts, so that
        short episodes are not favoured.
      deterministic: act by the distribution's mode instead of sampling (static); None: unless `config.eval_stochastic`
        is set.
      max_steps: steps after which an unfinished episode is cut off (static).
      randomize: draw environment settings as in training, if `config.randomize` is set (static).

    Returns:
      An `Evaluation`.

    Raises:
      UsageError: if a number or the key cannot be used, or the state does not fit the settings.
    """
    validate(config)
    deterministic = not config.eval_stochastic if deterministic is None else deterministic
    agent = make_agent(config if randomize else config.replace(randomize=NONE))
    check_key(key)
    check_limits({"num_episodes": num_episodes, "max_steps": max_steps})
    check_acts(agent, state)
    key_reset, key_run = jax.random.split(key)
    observation, env_state = reset_environments(agent.environment, key_reset, num_episodes)
    policy = with_normalization(config, state.learner.statistics, agent.policy)
    limit = min(max_steps, agent.environment.max_steps or max_steps)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        time, *_, evaluation = carry
        return (time < limit) & ~jnp.all(evaluation.finished)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        time, observation, policy_carry, env_state, evaluation = carry
        key_action, key_step = jax.random.split(jax.random.fold_in(key_run, time))
        policy_carry, distribution = policy.step(state.learner.policy_params, policy_carry, observation)
        action = distribution.mode() if deterministic else distribution.sample(key_action)
        running = ~evaluation.finished
        keys = jax.random.split(key_step, num_episodes)
        observation, env_state, reward, done = _step_running(
            agent.environment, keys, running, observation, env_state, action
        )
        evaluation = Evaluation(
            episode_return=evaluation.episode_return + jnp.where(running, reward, 0),
            episode_length=evaluation.episode_length + running,
            finished=evaluation.finished | done,
        )
        return time + 1, observation, policy_carry, env_state, evaluation

    blank = Evaluation(
        jnp.zeros(num_episodes, jnp.float32), jnp.zeros(num_episodes, jnp.int32), jnp.zeros(num_episodes, bool)
    )
    start = jnp.int32(0), observation, initial_carries(policy, num_episodes), env_state, blank
    *_, evaluation = jax.lax.while_loop(unfinished, step, start)
    return evaluation


def evaluate_in_training(config: Config, state: TrainState, *, anew: bool = False) -> Evaluation:
    """Evaluate a state during training, over `eval_episodes`.

    Its key comes from the run's key and the iteration, so that it draws nothing from training and gives the same result
    wherever it runs. The best of many noisy evaluations is biased upwards; `anew` evaluates other episodes.
    """
    key = jax.random.fold_in(jax.random.fold_in(state.key, _ANEW if anew else _IN_TRAINING), state.iteration)
    return evaluate(config, state, key, num_episodes=config.eval_episodes)


def stops(config: Config) -> bool:
    """Whether an agent's training may end before the last iteration."""
    return config.eval_every > 0 and config.stop_at_return < NEVER


def has_reached(config: Config, evaluation: Evaluation) -> Array:
    """Whether an evaluation ends its agent's training: the mean return is `stop_at_return` or more."""
    return jnp.mean(evaluation.episode_return) >= config.stop_at_return


def _step_running(
    environment: Environment, keys: Array, running: Array, observation: Array, state: PyTree, action: Array
) -> tuple[Array, PyTree, Array, Array]:
    """Step E environments with the keys of training, but start no new episodes, since only the first of each counts.

    Those that have ended stand still. An environment that resets itself goes on: stopping it would mean stepping an old
    state again, for which Gymnasium's host would have to replay the whole episode.

    Returns:
      Observations and states, and the rewards of this step and whether it ended the episode, [E] each.
    """

    def step(key: Array, running: Array, observation: Array, state: PyTree, action: Array) -> tuple[Any, ...]:
        if environment.restart is not None:
            result = environment.step(key, state, action)
            return result.observation, result.state, result.reward, result.done
        result = environment.step(jax.random.split(key)[0], state, action)
        after = jax.tree.map(
            lambda new, old: jnp.where(running, new, old), (result.observation, result.state), (observation, state)
        )
        return *after, result.reward, result.done

    return jax.vmap(step)(keys, running, observation, state, action)
