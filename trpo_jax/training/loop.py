"""The training loop: rollout → advantages → trust-region update → value fit, repeated by one `lax.scan`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from trpo_jax import backend
from trpo_jax.config_pytree import Config
from trpo_jax.sentences import UsageError, check_limits, shown
from trpo_jax.steps import trees
from trpo_jax.steps.statistics import init_statistics, update_statistics
from trpo_jax.steps.types import Array, PyTree, typed_jit
from trpo_jax.training.agents import Agent, make_agent
from trpo_jax.training.evaluation import evaluate_in_training, has_reached, stops
from trpo_jax.training.fit_checks import check_learns
from trpo_jax.training.learner import TrainInfo, blank_buffer, init_learner, update_learner
from trpo_jax.training.rollouts import init_actor, rollout
from trpo_jax.training.state import ActorState, EpisodeTotals, LearnerState, Metrics, TrainState, check_key

_ENVS_TO_FILL_A_CORE = 32
_BEFORE_FIRST = 2**32 - 1  # folded into the key for initialisation; no iteration has this number
_AFTER_ROLLOUT = 2**32 - 2  # folded into an iteration's key for shuffling; the rollout splits that key itself
_TO_LOOK_AROUND = 2**32 - 2  # folded into the run's key for the first statistics of observations


def init(config: Config, key: Array) -> TrainState:
    """Build the state before the first iteration: fresh parameters and N fresh environments.

    Args:
      config: the settings.
      key: a typed PRNG key, `jax.random.key(seed)`. It determines all randomness of the run.

    Raises:
      UsageError: if a setting, the environment or the key cannot be used.
    """
    agent = make_agent(config)
    check_key(key)
    key_policy, key_value, key_reset = jax.random.split(jax.random.fold_in(key, _BEFORE_FIRST), 3)
    actor = init_actor(agent, key_reset)
    statistics = init_statistics(agent.environment.observation_shape)
    learner = init_learner(agent, key_policy, key_value, actor.observation[0], statistics)
    if config.normalize_observations:
        learner = _look_around(agent, learner, actor, key)
    if config.reuse > 1:
        batch = jax.eval_shape(lambda learner: rollout(agent, learner, actor, key)[1], learner)
        learner = dataclasses.replace(learner, buffer=blank_buffer(batch, config.reuse))
    return TrainState(jnp.int32(0), key, learner, actor)


def _look_around(agent: Agent, learner: LearnerState, actor: ActorState, key: Array) -> LearnerState:
    """Start the observation statistics from one rollout of the first policy, which is then discarded.

    Without it, the statistics would jump from (0, 1) to those of the first batch after the first update. This would
    move the policy that acts next away from the one whose divergence was bounded.
    """
    raw = agent._replace(config=agent.config.replace(normalize_observations=False))
    _, batch, _ = rollout(raw, learner, actor, jax.random.fold_in(key, _TO_LOOK_AROUND))
    statistics = update_statistics(learner.statistics, batch.observation)
    update = agent.algorithm.init(ravel_pytree(learner.policy_params)[0], statistics)
    return dataclasses.replace(learner, statistics=statistics, update=update)


Hook = Callable[[Config, TrainState, Metrics], PyTree]
"""`hook(config, state, metrics)` -> a pytree of arrays, from the state after an iteration and its metrics."""


Trained = tuple[TrainState, Metrics, *tuple[Any, ...]]
"""The final state and metrics; then, where they are asked for, an `Evaluation` and what the callback returned."""


def train(config: Config, key: Array, *, callback: Hook | None = None, every: int = 1) -> Trained:
    """Train one agent for `config.num_iterations` iterations.

    A pure function of its arguments, for the caller to transform:
    `jax.jit(train)(config, key)`, `jax.jit(jax.vmap(train, in_axes=(None, 0)))(config, keys)`.

    Neither a callback nor evaluation changes a bit of the training. Both run within the program, and only when they are
    due, also under `vmap`.

    Args:
      config: the settings; its floats are traced, so one compiled program serves all their values.
      key: a typed PRNG key.
      callback: called with the state and the metrics after every `every`-th iteration.
      every: k, iterations between calls.

    Returns:
      The final state and `Metrics` of [num_iterations] each; then, if `config.eval_every` is set, an `Evaluation` of
      [num_iterations // eval_every, eval_episodes]; then, with a callback, the results of its calls, stacked along a
      first axis of [num_iterations // k]. An agent that has reached `config.stop_at_return` no longer changes:
      `state.iteration` shows when, metrics are NaN from there on (`num_episodes` is 0), and evaluations repeat the
      last one.

    Raises:
      UsageError: if a setting, the environment or `every` cannot be used.
    """
    state = init(config, key)
    hooks: list[tuple[Hook, int]] = []
    if config.eval_every:
        hooks.append((lambda config, state, metrics: evaluate_in_training(config, state), config.eval_every))
    if callback is not None:
        check_limits({"every": every})
        if not callable(callback):
            raise UsageError(f"callback must be a function of (config, state, metrics), got {shown(callback)}.")
        hooks.append((callback, every))
    if hooks:
        return _train_with(config, state, hooks)
    return jax.lax.scan(lambda s, _: train_step(config, s), state, None, length=config.num_iterations)


def _train_with(config: Config, state: TrainState, hooks: Sequence[tuple[Hook, int]]) -> Trained:
    """The scan of `train` with hooks, each at its own interval and evaluation first; returns what `train` does."""
    iterations = config.num_iterations
    after = jax.eval_shape(lambda s: train_step(config, s), state)

    def blank(hook: Hook, every: int) -> PyTree:
        shapes = jax.eval_shape(lambda after: hook(config, *after), after)
        return jax.tree.map(lambda one: jnp.zeros((iterations // every, *one.shape), one.dtype), shapes)

    def step(carry: tuple[TrainState, Array, list[PyTree]], i: Array) -> tuple[Any, Metrics]:
        state, stopped, stacked = carry
        state, metrics = _step_unless(stopped, config, state) if stops(config) else train_step(config, state)
        stacked = [_record(*hook, i, one, config, state, metrics) for hook, one in zip(hooks, stacked, strict=True)]
        if stops(config):
            newest = jax.tree.map(lambda all: all[i // config.eval_every], stacked[0])
            stopped |= ((i + 1) % config.eval_every == 0) & has_reached(config, newest)
        return (state, stopped, stacked), metrics

    start = state, jnp.array(False), [blank(*hook) for hook in hooks]
    (state, _, stacked), metrics = jax.lax.scan(step, start, jnp.arange(iterations))
    return state, metrics, *stacked


def _step_unless(stopped: Array, config: Config, state: TrainState) -> tuple[TrainState, Metrics]:
    """Run `train_step`, or if stopped return the state unchanged and empty metrics."""
    shapes = jax.eval_shape(lambda s: train_step(config, s)[1], state)
    nothing = jax.tree.map(lambda m: jnp.full(m.shape, jnp.nan if m.dtype == jnp.float32 else 0, m.dtype), shapes)
    return jax.lax.cond(stopped, lambda s: (s, nothing), lambda s: train_step(config, s), state)


def _record(
    hook: Hook, every: int, i: Array, stacked: PyTree, config: Config, state: TrainState, metrics: Metrics
) -> PyTree:
    """Write the hook's result into `stacked` [num_iterations // every, ...] if it is due after iteration i, from 0."""
    if every > config.num_iterations:
        return stacked  # it is never due
    # The counter is the same for all agents under `vmap`, so that this stays a branch instead of a selection.
    blank = jax.tree.map(lambda all: jnp.zeros(all.shape[1:], all.dtype), stacked)
    due = (i + 1) % every == 0
    output = jax.lax.cond(due, lambda: jax.tree.map(jnp.asarray, hook(config, state, metrics)), lambda: blank)
    # The place of an output is blank until it is due, and iterations after the last output have none.
    return jax.tree.map(lambda all, one: all.at[i // every].set(one, mode="drop"), stacked, output)


def train_chunk(config: Config, state: TrainState, num_iterations: Array, capacity: int) -> tuple[TrainState, Metrics]:
    """Continue for a *traced* number of iterations ≤ capacity: the scan of `train` in pieces of any length.

    One program serves every length, so the places where a run is cut do not affect its bits.

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


@typed_jit
def train_step(config: Config, state: TrainState) -> tuple[TrainState, Metrics]:
    """One iteration: collect T·N steps, update the policy inside the trust region, refit the value function.

    Observation statistics are frozen from the rollout to the end of the update and merged after it, so that the policy
    that acts next differs by one merge from the one whose divergence was bounded. The value
    function is fitted after the advantages were computed with the old one.

    Raises:
      UsageError: if the state does not fit the settings.
    """
    check_learns(make_agent(config), state)
    # On CPU, many agents under `vmap` are faster one after the other, each within the cache and with its own branches
    # and early exits: the update nearly twice as fast, the rollout if its environments fill the vector units by
    # themselves.
    if backend.agents_take_turns() and config.num_envs >= _ENVS_TO_FILL_A_CORE:
        return take_turns(iterate, config, state)
    return iterate(config, state)


def iterate(config: Config, state: TrainState) -> tuple[TrainState, Metrics]:
    """Run the iteration of `train_step`: build the agent, roll out, update the learner, and compute the metrics."""
    agent = make_agent(config)
    key = jax.random.fold_in(state.key, state.iteration)
    actor, batch, episodes = rollout(agent, state.learner, state.actor, key)
    learn = functools.partial(update_learner, agent)
    arguments = state.learner, batch, state.actor.carry, state.iteration, jax.random.fold_in(key, _AFTER_ROLLOUT)
    learner, carry, info = take_turns(learn, *arguments) if backend.agents_take_turns() else learn(*arguments)
    actor = dataclasses.replace(actor, carry=carry._replace(policy=actor.carry.policy))
    after = TrainState(state.iteration + 1, state.key, learner, actor)
    # In JAX's 64-bit mode, sums of 32-bit numbers may have 64 bits; a state keeps the dtypes that it began with.
    after = jax.tree.map(lambda new, old: new if new.dtype == old.dtype else new.astype(old.dtype), after, state)
    # One vector per network: a kernel for each of its layers would take longer to compile.
    vectors = ravel_pytree(learner.policy_params)[0], ravel_pytree(learner.value_params)[0]
    finite = trees.all_finite((batch.reward, batch.observation, batch.next_observation, vectors))
    return after, _metrics(actor.ended, episodes, info, finite)


def take_turns(function: Callable[..., Any], *arguments: Any) -> Any:
    """Compute `function(*arguments)`, under `vmap` for one lane after the other."""
    # Flat, because a Config's structure depends on its leaves. Traced once, here, so that the values it closes over,
    # such as parameters of an environment that are mapped too, are among the arguments.
    leaves, structure = jax.tree.flatten(arguments)
    trace = jax.make_jaxpr(lambda *flat: function(*jax.tree.unflatten(structure, flat)), return_shape=True)
    program, shapes = trace(*leaves)

    @jax.custom_batching.sequential_vmap
    def flat(consts: Any, *leaves: Any) -> Any:
        return jax.core.eval_jaxpr(program.jaxpr, consts, *leaves)

    return jax.tree.unflatten(jax.tree.structure(shapes), flat(program.consts, *leaves))


def _metrics(ended: EpisodeTotals, episodes: EpisodeTotals, info: TrainInfo, finite: Array) -> Metrics:
    """The metrics of an iteration: `ended` are the totals of the latest episodes, `episodes` of those within it."""
    count = jnp.sum(ended.count)
    update, extra, absent = info.update, info.update.extra, jnp.float32(jnp.nan)

    def mean(total: Array) -> Array:
        return jnp.where(count > 0, jnp.sum(total) / jnp.maximum(count, 1), absent)

    return Metrics(
        episode_return=mean(ended.total_return),
        episode_length=mean(ended.total_length),
        num_episodes=jnp.sum(episodes.count),
        accepted=update.accepted.astype(jnp.float32),
        step_fraction=update.step_fraction,
        surrogate_gain=update.surrogate_gain,
        predicted_gain=update.predicted_gain,
        held_out_gain=extra.get("held_out_gain", absent),
        divergence=update.divergence,
        mean_kl=update.mean_kl,
        maximum_kl=update.maximum_kl,
        entropy=update.entropy,
        effective_sample_fraction=update.effective_sample_fraction,
        gradient_norm=update.gradient_norm,
        cg_residual=update.cg_residual,
        value_loss=info.value_loss,
        explained_variance=info.explained_variance,
        radius=extra.get("radius", absent),
        gain_ratio=extra.get("gain_ratio", absent),
        penalty=extra.get("penalty", absent),
        finite=finite.astype(jnp.float32),
    )
