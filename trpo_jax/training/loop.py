"""The loop: rollout → advantages → trust-region update → value fit, repeated by one `lax.scan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from trpo_jax.config import Config, UsageError, validate
from trpo_jax.environments.base import Environment
from trpo_jax.environments.make import make_environment
from trpo_jax.networks import make_policy, make_value
from trpo_jax.steps.advantages import gae, parallel_gae
from trpo_jax.steps.line_searches import backtracking_line_search, parallel_line_search
from trpo_jax.steps.statistics import RunningStatistics, init_statistics, normalize, update_statistics
from trpo_jax.steps.trust_region import UpdateInfo, trpo_update
from trpo_jax.steps.types import Array, PyTree
from trpo_jax.steps.values import explained_variance, fit_value_function, gauss_newton_fit
from trpo_jax.training.rollouts import EpisodeTotals, reset_environments, rollout
from trpo_jax.types import Metrics, Network, TrainState, Transition

_ENVS_TO_FILL_A_CORE = 32
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


@jax.jit
def train_step(config: Config, state: TrainState) -> tuple[TrainState, Metrics]:
    """One iteration: collect T·N steps, update the policy inside the trust region, refit the value function.

    Observation statistics are frozen from the rollout to the end of the update and merged after it. The value
    function is fitted after the advantages were computed with the old one.
    """
    # On CPU, many agents under `vmap` are quicker one after the other, each within the cache and with branches and
    # early exits of its own: the update nearly twice, the rollout where its environments fill the vector units alone.
    one_by_one = jax.default_backend() == "cpu"
    iterate = _one_by_one(_iterate) if one_by_one and config.num_envs >= _ENVS_TO_FILL_A_CORE else _iterate
    return iterate(config, state)


def _iterate(config: Config, state: TrainState) -> tuple[TrainState, Metrics]:
    agent = make_agent(config)
    key = jax.random.fold_in(state.key, state.iteration)
    policy_apply = on_normalized(config, state.statistics, agent.policy.apply)
    state, batch, episodes = rollout(agent.environment, policy_apply, state, key, config.num_steps)
    learned = Learned(state.policy_params, state.value_params, state.value_optimizer, state.statistics)
    learn = _one_by_one(_learn) if jax.default_backend() == "cpu" else _learn
    learned, update, value_loss, explained = learn(config, learned, batch)
    state = dataclasses.replace(state, iteration=state.iteration + 1, **learned._asdict())
    finite = _all_finite(
        (batch.reward, batch.observation, batch.next_observation, state.policy_params, state.value_params)
    )
    return state, _metrics(episodes, update, value_loss, explained, finite)


def _all_finite(tree: PyTree) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which `vmap` runs for one lane after the other."""

    def call(*arguments: Any) -> Any:
        # Flat, because a Config's own structure depends on what its leaves are.
        leaves, structure = jax.tree.flatten(arguments)
        flat = jax.custom_batching.sequential_vmap(lambda *flat: function(*jax.tree.unflatten(structure, flat)))
        return flat(*leaves)

    return call


class Learned(NamedTuple):
    """The part of a `TrainState` that a batch changes."""

    policy_params: PyTree
    value_params: PyTree
    value_optimizer: PyTree
    statistics: RunningStatistics


@jax.jit  # traced once, however often `vmap` and `lax.map` ask for it
def _learn(config: Config, old: Learned, batch: Transition) -> tuple[Learned, UpdateInfo, Array, Array]:
    """Advantages, trust-region update and value fit from one batch [T, N]."""
    agent = make_agent(config)
    policy_apply = on_normalized(config, old.statistics, agent.policy.apply)
    value_apply = on_normalized(config, old.statistics, agent.value.apply)

    # One batch axis: a product over two of them makes XLA's CPU backend transpose its operands, at twice the time. The
    # environments lead, so that a batch whose environments are spread over devices stays where it is.
    observation, action = jax.tree.map(flatten_batch, (batch.observation, batch.action))
    values = value_apply(old.value_params, observation)
    advantage = estimate_advantages(config, batch, values, lambda o: value_apply(old.value_params, o))
    targets = advantage + values
    policy_params, update = update_policy(config, policy_apply, old.policy_params, observation, action, advantage)
    value_params, value_optimizer, value_loss = fit_value(config, value_apply, old, observation, targets)
    statistics = old.statistics
    if config.normalize_observations:
        statistics = update_statistics(statistics, observation)
    new = Learned(policy_params, value_params, value_optimizer, statistics)
    return new, update, value_loss, explained_variance(values, targets)


def on_normalized(config: Config, statistics: RunningStatistics, apply: Any) -> Any:
    """A network's `apply` on observations as the settings have them normalised."""
    if not config.normalize_observations:
        return apply
    return lambda params, observation: apply(params, normalize(statistics, observation))


def estimate_advantages(config: Config, batch: Transition, values: Array, value_fn: Callable[[Array], Array]) -> Array:
    """GAE over the rollout, as a flat batch like `values` [N·T]: sequential on CPU, associative on accelerators."""
    estimate = gae if jax.default_backend() == "cpu" else parallel_gae
    values = values.reshape(batch.reward.shape[::-1]).T
    advantage = estimate(
        batch.reward,
        values,
        _next_values(batch, values, value_fn),
        batch.terminated,
        batch.truncated,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
    )
    return flatten_batch(advantage)


def flatten_batch(leaf: Array) -> Array:
    """[T, N, ...] -> [N·T, ...], environment by environment."""
    return jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])


def _next_values(batch: Transition, values: Array, value_fn: Callable[[Array], Array]) -> Array:
    """V of the observation that each step led to, [T, N]; anything after a terminal state, where nothing asks for it.

    It is V of the next row, but for truncated steps and the last row. Where no environment was truncated twice (and on
    CPU, where a branch is cheap), V is evaluated for those alone.
    """
    next_observation = batch.next_observation
    if jax.default_backend() != "cpu":
        return value_fn(next_observation)
    truncated = batch.truncated & ~batch.terminated
    here = jnp.argmax(truncated, axis=0), jnp.arange(truncated.shape[1])  # the one truncated step of each environment

    def once_each() -> Array:
        at_truncation, at_end = jnp.split(value_fn(jnp.concatenate([next_observation[here], next_observation[-1]])), 2)
        next_values = jnp.concatenate([values[1:], at_end[None]])
        return next_values.at[here].set(jnp.where(truncated[here], at_truncation, next_values[here]))

    twice = jnp.any(jnp.sum(truncated[:-1], axis=0) > 1)
    return jax.lax.cond(twice, lambda: value_fn(next_observation), once_each)


def update_policy(
    config: Config, policy_apply: Any, params: PyTree, observation: Array, action: Array, advantage: Array
) -> tuple[PyTree, UpdateInfo]:
    """`trpo_update` on a flat batch with the settings of a configuration."""
    if config.normalize_advantages:
        std = jnp.std(advantage)
        advantage = (advantage - jnp.mean(advantage)) / jnp.where(std > 0, std, 1)
    # One flat vector instead of a pytree halves the time to compile the solver.
    vector, unravel = ravel_pytree(params)
    vector, info = trpo_update(
        lambda v, observation: policy_apply(unravel(v), observation),
        vector,
        observation,
        action,
        advantage,
        max_kl=config.max_kl,
        cg_damping=config.cg_damping,
        cg_iterations=config.cg_iterations,
        cg_tolerance=config.cg_tolerance,
        line_search_shrink=config.line_search_shrink,
        line_search_steps=config.line_search_steps,
        fisher_fraction=config.fisher_fraction,
        line_search=parallel_line_search if uses_parallel_line_search(config) else backtracking_line_search,
    )
    return unravel(vector), info


def uses_parallel_line_search(config: Config) -> bool:
    """Whether all candidates are evaluated in one pass: what "auto" means on this backend."""
    return config.line_search == "parallel" or (config.line_search == "auto" and jax.default_backend() != "cpu")


def fit_value(
    config: Config, value_apply: Any, old: Learned, observation: Array, target: Array
) -> tuple[PyTree, PyTree, Array]:
    """Fit the value function to a flat batch as the configuration says: new parameters, optimizer state, and loss."""
    if config.value_fit == "adam":
        return fit_value_function(
            value_apply,
            old.value_params,
            old.value_optimizer,
            observation,
            target,
            optimizer=_adam(config),
            epochs=config.value_epochs,
            minibatches=config.value_minibatches,
        )
    vector, unravel = ravel_pytree(old.value_params)
    vector, loss = gauss_newton_fit(
        lambda v, observation: value_apply(unravel(v), observation),
        vector,
        observation,
        target,
        damping=config.value_damping,
        cg_iterations=config.value_cg_iterations,
        cg_tolerance=config.cg_tolerance,
        fisher_fraction=config.fisher_fraction,
    )
    return unravel(vector), old.value_optimizer, loss


def _adam(config: Config) -> Any:
    import optax  # deferred: the default fit does not need it

    return optax.adam(config.value_learning_rate)


def _metrics(
    episodes: EpisodeTotals, update: UpdateInfo, value_loss: Array, explained: Array, finite: Array
) -> Metrics:
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
        finite=finite.astype(jnp.float32),
    )
