"""The loop: rollout → advantages → trust-region update → value fit, repeated by one `lax.scan`."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from trpo_jax.config import Config, UsageError, validate
from trpo_jax.environments.base import Environment
from trpo_jax.environments.make import make_environment
from trpo_jax.networks import make_policy, make_value
from trpo_jax.steps.advantages import gae, parallel_gae
from trpo_jax.steps.line_searches import backtracking_line_search, parallel_line_search
from trpo_jax.steps.statistics import init_statistics, normalize, update_statistics
from trpo_jax.steps.trust_region import UpdateInfo, trpo_update
from trpo_jax.steps.types import Array, PyTree
from trpo_jax.steps.values import explained_variance, fit_value_function, gauss_newton_fit
from trpo_jax.training.rollouts import EpisodeTotals, reset_environments, rollout
from trpo_jax.types import Metrics, Network, TrainState, Transition

_BEFORE_FIRST = 2**32 - 1  # folded into the key for initialisation; no iteration bears this number


class Agent(NamedTuple):
    """What a `Config` stands for: the environment and the two networks."""

    environment: Environment
    policy: Network
    value: Network


def make_agent(config: Config) -> Agent:
    """Build the environment and the networks that a configuration names; raise `UsageError` for what cannot be."""
    validate(config)
    environment = make_environment(config.env)
    policy = config.policy or make_policy(environment, initial_log_std=config.initial_log_std)
    return Agent(environment, policy, config.value or make_value(environment))


def init(config: Config, key: Array) -> TrainState:
    """The state before the first iteration: fresh parameters and N fresh environments.

    Args:
      config: the settings.
      key: a typed PRNG key, `jax.random.key(seed)`. It decides everything random in the run.

    Raises:
      UsageError: if a setting, the environment or the key cannot be used.
    """
    agent = make_agent(config)
    check_key(key)
    key_policy, key_value, key_reset = jax.random.split(jax.random.fold_in(key, _BEFORE_FIRST), 3)
    observation, env_state = reset_environments(agent.environment, key_reset, config.num_envs)
    value_params = agent.value.init(key_value, observation[0])
    return TrainState(
        iteration=jnp.int32(0),
        key=key,
        policy_params=agent.policy.init(key_policy, observation[0]),
        value_params=value_params,
        value_optimizer=_adam(config).init(value_params) if config.value_fit == "adam" else (),
        statistics=init_statistics(agent.environment.observation_shape),
        env_state=env_state,
        observation=observation,
        episode_return=jnp.zeros(config.num_envs, jnp.float32),
        episode_length=jnp.zeros(config.num_envs, jnp.int32),
    )


def check_key(key: Array) -> None:
    """Raise `UsageError` unless `key` is a single typed PRNG key."""
    if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key) or jnp.shape(key) != ():
        raise UsageError("key must be one typed PRNG key, jax.random.key(seed); for several seeds vmap over keys.")


def train(config: Config, key: Array) -> tuple[TrainState, Metrics]:
    """Train one agent for `config.num_iterations` iterations.

    A pure function of its arguments, for the caller to transform:
    `jax.jit(train)(config, key)`, `jax.jit(jax.vmap(train, in_axes=(None, 0)))(config, keys)`.

    Args:
      config: the settings; its floats are traced, so one compiled program serves all their values.
      key: a typed PRNG key.

    Returns:
      The final state, and `Metrics` of [num_iterations] each.

    Raises:
      UsageError: if a setting or the environment cannot be used.
    """
    state = init(config, key)
    return jax.lax.scan(lambda s, _: train_step(config, s), state, None, length=config.num_iterations)


def train_chunk(config: Config, state: TrainState, num_iterations: Array, capacity: int) -> tuple[TrainState, Metrics]:
    """Continue for a *traced* number of iterations ≤ capacity: the scan of `train` in pieces of any length.

    One program serves every length, so where a run is cut leaves no mark on its bits.

    Returns:
      The state, and `Metrics` of [capacity] of which the first `num_iterations` are filled.
    """
    shapes = jax.eval_shape(lambda s: train_step(config, s)[1], state)
    blank = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), shapes)

    def step(i: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, metrics = carry
        state, row = train_step(config, state)
        return state, jax.tree.map(lambda column, value: column.at[i].set(value), metrics, row)

    return jax.lax.fori_loop(0, num_iterations, step, (state, blank))


def train_step(config: Config, state: TrainState) -> tuple[TrainState, Metrics]:
    """One iteration: collect T·N steps, update the policy inside the trust region, refit the value function.

    Observation statistics are frozen from the rollout to the end of the update and merged after it. The value
    function is fitted after the advantages were computed with the old one.
    """
    agent = make_agent(config)
    statistics = state.statistics
    key = jax.random.fold_in(state.key, state.iteration)

    def prepare(observation: Array) -> Array:
        return normalize(statistics, observation) if config.normalize_observations else observation

    def policy_apply(params: PyTree, observation: Array) -> Any:
        return agent.policy.apply(params, prepare(observation))

    def value_apply(params: PyTree, observation: Array) -> Array:
        return agent.value.apply(params, prepare(observation))

    state, batch, episodes = rollout(agent.environment, policy_apply, state, key, config.num_steps)

    values = value_apply(state.value_params, batch.observation)
    advantage = _advantages(config, batch, values, value_apply(state.value_params, batch.next_observation))
    policy_params, update = _update_policy(config, policy_apply, state.policy_params, batch, advantage)
    value_params, value_optimizer, value_loss = _fit_value_function(
        config, value_apply, state, batch.observation, advantage + values
    )
    if config.normalize_observations:
        statistics = update_statistics(statistics, batch.observation)
    state = dataclasses.replace(
        state,
        iteration=state.iteration + 1,
        policy_params=policy_params,
        value_params=value_params,
        value_optimizer=value_optimizer,
        statistics=statistics,
    )
    return state, _metrics(episodes, update, value_loss, explained_variance(values, advantage + values))


def _advantages(config: Config, batch: Transition, values: Array, next_values: Array) -> Array:
    """GAE over the rollout, [T, N]: sequential on CPU, associative on accelerators."""
    estimate = gae if jax.default_backend() == "cpu" else parallel_gae
    return estimate(
        batch.reward,
        values,
        next_values,
        batch.terminated,
        batch.truncated,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
    )


def _update_policy(
    config: Config, policy_apply: Any, params: PyTree, batch: Transition, advantage: Array
) -> tuple[PyTree, UpdateInfo]:
    if config.normalize_advantages:
        std = jnp.std(advantage)
        advantage = (advantage - jnp.mean(advantage)) / jnp.where(std > 0, std, 1)
    parallel = config.line_search == "parallel" or (config.line_search == "auto" and jax.default_backend() != "cpu")
    # One flat vector instead of a pytree halves the time to compile the solver.
    vector, unravel = ravel_pytree(params)
    vector, info = trpo_update(
        lambda v, observation: policy_apply(unravel(v), observation),
        vector,
        batch.observation,
        batch.action,
        advantage,
        max_kl=config.max_kl,
        cg_damping=config.cg_damping,
        cg_iterations=config.cg_iterations,
        line_search_shrink=config.line_search_shrink,
        line_search_steps=config.line_search_steps,
        fisher_fraction=config.fisher_fraction,
        line_search=parallel_line_search if parallel else backtracking_line_search,
    )
    return unravel(vector), info


def _fit_value_function(
    config: Config, value_apply: Any, state: TrainState, observation: Array, target: Array
) -> tuple[PyTree, PyTree, Array]:
    if config.value_fit == "adam":
        return fit_value_function(
            value_apply,
            state.value_params,
            state.value_optimizer,
            observation,
            target,
            optimizer=_adam(config),
            epochs=config.value_epochs,
            minibatches=config.value_minibatches,
        )
    vector, unravel = ravel_pytree(state.value_params)
    vector, loss = gauss_newton_fit(
        lambda v, observation: value_apply(unravel(v), observation),
        vector,
        observation,
        target,
        damping=config.value_damping,
        cg_iterations=config.value_cg_iterations,
        fisher_fraction=config.fisher_fraction,
    )
    return unravel(vector), state.value_optimizer, loss


def _adam(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.value_learning_rate)


def _metrics(episodes: EpisodeTotals, update: UpdateInfo, value_loss: Array, explained: Array) -> Metrics:
    count = jnp.where(episodes.count > 0, episodes.count, jnp.float32(jnp.nan))
    return Metrics(
        episode_return=episodes.total_return / count,
        episode_length=episodes.total_length / count,
        num_episodes=episodes.count,
        accepted=update.accepted.astype(jnp.float32),
        step_fraction=update.step_fraction,
        surrogate_gain=update.surrogate_gain,
        predicted_gain=update.predicted_gain,
        mean_kl=update.mean_kl,
        maximum_kl=update.maximum_kl,
        entropy=update.entropy,
        effective_sample_fraction=update.effective_sample_fraction,
        gradient_norm=update.gradient_norm,
        cg_residual=update.cg_residual,
        value_loss=value_loss,
        explained_variance=explained,
    )
