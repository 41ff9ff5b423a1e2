"""The loop: rollout → advantages → trust-region update → value fit, repeated by one `lax.scan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax import backend
from trpo_jax.config import Config, UsageError
from trpo_jax.steps.statistics import RunningStatistics, init_statistics, update_statistics
from trpo_jax.steps.types import Array, PyTree
from trpo_jax.training.adaptation import init_control
from trpo_jax.training.agents import Agent, check_networks, init_parameters, make_agent, on_normalized, on_trunk
from trpo_jax.training.learning import Lesson, learn
from trpo_jax.training.recurrence import initial_carries
from trpo_jax.training.resets import reset_environments
from trpo_jax.training.rollouts import EpisodeTotals, rollout
from trpo_jax.training.updates import init_policy_optimizer, init_value_optimizer
from trpo_jax.types import Learned, Memory, Metrics, TrainState

_ENVS_TO_FILL_A_CORE = 32
_BEFORE_FIRST = 2**32 - 1  # folded into the key for initialisation; no iteration bears this number
_AFTER_ROLLOUT = 2**32 - 2  # folded into an iteration's key for what is shuffled; the rollout splits that key itself
_TO_LOOK_AROUND = 2**32 - 2  # folded into the run's key for the first statistics of observations


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
    policy_params = init_parameters(agent.policy, key_policy, observation[0], "policy")
    statistics = init_statistics(agent.environment.observation_shape)
    value = agent.value
    if config.shared_trunk:
        value = on_trunk(on_normalized(config, statistics, agent.policy), policy_params, agent.value)
    value_params = init_parameters(value, key_value, observation[0], "value")
    if config.policy is not None or config.value is not None:
        check_networks(config, agent, policy_params, value, value_params)
    state = TrainState(
        iteration=jnp.int32(0),
        key=key,
        policy_params=policy_params,
        value_params=value_params,
        policy_optimizer=init_policy_optimizer(config, policy_params),
        value_optimizer=init_value_optimizer(config, value_params),
        control=init_control(config, policy_params, statistics),
        memory=(),
        statistics=statistics,
        return_statistics=init_statistics(()) if config.normalize_rewards else (),
        discounted_return=jnp.zeros(config.num_envs, jnp.float32) if config.normalize_rewards else (),
        env_state=env_state,
        observation=observation,
        policy_carry=initial_carries(agent.policy, config.num_envs),
        value_carry=initial_carries(agent.value, config.num_envs),
        episode_return=jnp.zeros(config.num_envs, jnp.float32),
        episode_length=jnp.zeros(config.num_envs, jnp.int32),
        last_return=jnp.float32(jnp.nan),
        last_length=jnp.float32(jnp.nan),
    )
    if config.normalize_observations:
        statistics = _look_around(config, agent, state)
        state = dataclasses.replace(
            state, statistics=statistics, control=init_control(config, policy_params, statistics)
        )
    return dataclasses.replace(state, memory=_blank_memory(config, agent, state)) if config.reuse > 1 else state


def _look_around(config: Config, agent: Agent, state: TrainState) -> RunningStatistics:
    """Statistics of what the first policy observes in one rollout, which is then forgotten.

    Without them the first update would end with a jump from (0, 1) to those of its batch, which moves the policy that
    acts next away from the one whose divergence was bounded.
    """
    key = jax.random.fold_in(state.key, _TO_LOOK_AROUND)
    _, batch, _ = rollout(agent.environment, agent.policy, state, key, config.num_steps)
    return update_statistics(state.statistics, batch.observation)


def _blank_memory(config: Config, agent: Agent, state: TrainState) -> Memory:
    """Zeros of the shape of what is remembered; the first batch overwrites them."""

    def first(state: TrainState) -> Memory:
        batch = rollout(agent.environment, agent.policy, state, state.key, config.num_steps)[1]
        return Memory(batch, jnp.zeros_like(batch.reward))

    shapes = jax.eval_shape(first, state)
    width = (config.reuse - 1) * config.num_envs
    return jax.tree.map(lambda leaf: jnp.zeros((leaf.shape[0], width, *leaf.shape[2:]), leaf.dtype), shapes)


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

    Observation statistics are frozen from the rollout to the end of the update and merged after it, so that the policy
    that acts next differs by one merge from the one whose divergence was bounded. The value
    function is fitted after the advantages were computed with the old one.
    """
    # On CPU, many agents under `vmap` are quicker one after the other, each within the cache and with branches and
    # early exits of its own: the update nearly twice, the rollout where its environments fill the vector units alone.
    one_by_one = backend.agents_take_turns()
    iterate = _one_by_one(_iterate) if one_by_one and config.num_envs >= _ENVS_TO_FILL_A_CORE else _iterate
    return iterate(config, state)


def _iterate(config: Config, state: TrainState) -> tuple[TrainState, Metrics]:
    agent = make_agent(config)
    key = jax.random.fold_in(state.key, state.iteration)
    policy, policy_carry = on_normalized(config, state.statistics, agent.policy), state.policy_carry
    state, batch, episodes = rollout(agent.environment, policy, state, key, config.num_steps)
    learned = Learned(*(getattr(state, name) for name in Learned._fields))
    learn_batch = _one_by_one(learn) if backend.agents_take_turns() else learn
    key_learn = jax.random.fold_in(key, _AFTER_ROLLOUT)
    learned, lesson = learn_batch(config, learned, batch, state.iteration, policy_carry, key_learn)
    ended, count = episodes.count > 0, jnp.maximum(episodes.count, 1)
    after = dataclasses.replace(
        state,
        iteration=state.iteration + 1,
        last_return=jnp.where(ended, episodes.total_return / count, state.last_return),
        last_length=jnp.where(ended, episodes.total_length / count, state.last_length),
        **learned._asdict(),
    )
    # Where JAX computes in 64 bits, a sum of what has 32 may have them; a state keeps the dtypes that it began with.
    state = jax.tree.map(lambda new, old: new if new.dtype == old.dtype else new.astype(old.dtype), after, state)
    finite = _all_finite(
        (batch.reward, batch.observation, batch.next_observation, state.policy_params, state.value_params)
    )
    return state, _metrics(state, episodes, lesson, finite)


def _all_finite(tree: PyTree) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which `vmap` runs for one lane after the other."""

    def call(*arguments: Any) -> Any:
        # Flat, because a Config's own structure depends on what its leaves are. Traced here and once, so that what it
        # closes over, such as parameters of an environment that are mapped too, is among the arguments.
        leaves, structure = jax.tree.flatten(arguments)
        trace = jax.make_jaxpr(lambda *flat: function(*jax.tree.unflatten(structure, flat)), return_shape=True)
        program, shapes = trace(*leaves)

        @jax.custom_batching.sequential_vmap
        def flat(consts: Any, *leaves: Any) -> Any:
            return jax.core.eval_jaxpr(program.jaxpr, consts, *leaves)

        return jax.tree.unflatten(jax.tree.structure(shapes), flat(program.consts, *leaves))

    return call


def _metrics(state: TrainState, episodes: EpisodeTotals, lesson: Lesson, finite: Array) -> Metrics:
    update = lesson.update
    return Metrics(
        episode_return=state.last_return,
        episode_length=state.last_length,
        num_episodes=episodes.count,
        accepted=update.accepted.astype(jnp.float32),
        step_fraction=update.step_fraction,
        surrogate_gain=update.surrogate_gain,
        predicted_gain=update.predicted_gain,
        divergence=update.divergence,
        mean_kl=update.mean_kl,
        maximum_kl=update.maximum_kl,
        entropy=update.entropy,
        effective_sample_fraction=update.effective_sample_fraction,
        gradient_norm=update.gradient_norm,
        cg_residual=update.cg_residual,
        value_loss=lesson.value_loss,
        explained_variance=lesson.explained_variance,
        radius=lesson.radius,
        gain_ratio=lesson.gain_ratio,
        penalty=lesson.penalty,
        finite=finite.astype(jnp.float32),
    )
