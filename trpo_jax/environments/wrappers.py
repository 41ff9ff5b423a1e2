"""Wrappers of environments: each takes an `Environment` and returns one, so that they can be nested.

    environment = hide_entries(make_environment("CartPole-v1"), [1, 3])  # positions without velocities
    state, metrics = jax.jit(train)(Config(env=stack_frames(environment, 4)), key)

A wrapper handles the ends of episodes, keeps a mask of legal actions (or says in one sentence that it cannot), and
adjusts `max_steps`. Make an environment once and keep it: `jit` compiles again for every new one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax.environments.base import Array, Environment, Film, PyTree, Step, render_inner
from trpo_jax.environments.entries import MASK, WHOLE, join, size_of, split
from trpo_jax.sentences import UsageError, check_number, shown


def limit_steps(environment: Environment, max_steps: int) -> Environment:
    """Truncate the episodes of `environment` after `max_steps` steps, in addition to any limit of its own.

    Raises:
      UsageError: if `max_steps` is not a whole number, or the environment resets itself.
    """
    check_environment(environment, "limit_steps")
    check_number("max_steps", max_steps, whole=True, interval="[1, 2147483647]")
    if environment.restart is not None:
        raise UsageError(
            f"{environment.name} resets itself in its own step, so it cannot be given max_steps; leave it out."
        )

    def follow(step: Step, time: Array) -> tuple[Step, Array]:
        return step._replace(truncated=step.truncated | (time + 1 >= max_steps)), time + 1

    known = min(max_steps, environment.max_steps or max_steps)
    return _wrap(environment, lambda first: (first, jnp.int32(0)), follow, max_steps=known)


def repeat_actions(environment: Environment, times: int) -> Environment:
    """Repeat each action `times` times in `environment`; the rewards add up until the episode ends.

    One step is then `times` steps of the environment, in `max_steps` and wherever steps are counted. Their keys are
    split from that of the step.

    Raises:
      UsageError: if `times` is not a whole number from 1 to 1000, or the environment has a mask of legal actions.
    """
    check_environment(environment, "repeat_actions")
    check_number("times", times, whole=True, interval="[1, 1000]")
    if environment.action_mask is not None and times > 1:
        raise UsageError(f"actions of {environment.name} cannot be repeated: a legal action may become illegal.")
    if times == 1:
        return environment

    def step(key: Array, state: PyTree, action: Array) -> Step:
        def again(before: Step, key: Array) -> tuple[Step, None]:
            after = environment.step(key, before.state, action)
            after = after._replace(reward=before.reward + after.reward)
            return jax.tree.map(lambda old, new: jnp.where(before.done, old, new), before, after), None

        nothing, never = jnp.zeros(environment.observation_shape, jnp.float32), jnp.bool_(False)
        none = Step(nothing, state, jnp.float32(0), never, never)
        return jax.lax.scan(again, none, jax.random.split(key, times))[0]

    limit, draw = environment.max_steps, environment.render

    def render(states: Sequence[PyTree]) -> Film:
        assert draw is not None
        film = draw(states)
        return film._replace(per_second=film.per_second / times)

    steps = None if limit is None else -(-limit // times)
    return dataclasses.replace(environment, step=step, max_steps=steps, render=None if draw is None else render)


def stack_frames(environment: Environment, num_frames: int) -> Environment:
    """Join the last `num_frames` observations of `environment` along the last axis, newest last.

    D entries become num_frames · D, and a picture of C channels one of num_frames · C. At the start of an episode, all
    of them are the first observation.

    Raises:
      UsageError: if `num_frames` is not a whole number from 1 to 1000.
    """
    check_environment(environment, "stack_frames")
    check_number("num_frames", num_frames, whole=True, interval="[1, 1000]")
    of_one = environment.observation_shape
    entries = {name: shape or (1,) for name, shape in (environment.entries or {WHOLE: of_one}).items()}  # [1] for []
    stacked = {n: shape if n == MASK else (*shape[:-1], num_frames * shape[-1]) for n, shape in entries.items()}
    whole, mask = (size_of(stacked),) if environment.entries else stacked[WHOLE], environment.action_mask

    def begin(first: Array) -> tuple[Array, PyTree]:
        parts = split(entries, jnp.ravel(first))
        frames = {n: part if n == MASK else jnp.concatenate([part] * num_frames, axis=-1) for n, part in parts.items()}
        return join(frames, stacked).reshape(whole), frames

    def follow(step: Step, frames: PyTree) -> tuple[Step, PyTree]:
        new = split(entries, jnp.ravel(step.observation))
        last = {n: part if n == MASK else frames[n][..., entries[n][-1] :] for n, part in new.items()}
        frames = {n: part if n == MASK else jnp.concatenate([last[n], part], axis=-1) for n, part in new.items()}
        return step._replace(observation=join(frames, stacked).reshape(whole)), frames

    def latest(observation: Array) -> Array:
        lead = observation.shape[: observation.ndim - len(whole)]
        parts = split(stacked, observation.reshape(*lead, -1))
        return join({n: part[..., -entries[n][-1] :] for n, part in parts.items()}, entries).reshape(*lead, *of_one)

    return _wrap(
        environment,
        begin,
        follow,
        observation_shape=whole,
        entries=stacked if environment.entries else None,
        action_mask=None if mask is None else lambda observation: mask(latest(observation)),
    )


def flatten_observations(environment: Environment) -> Environment:
    """Flatten each observation of `environment` to one vector, row by row; raise `UsageError` if it is none."""
    check_environment(environment, "flatten_observations")
    if environment.entries is not None:
        return dataclasses.replace(environment, entries={n: (math.prod(s),) for n, s in environment.entries.items()})
    shape, mask = environment.observation_shape, environment.action_mask

    def whole(observation: Array) -> Array:
        return observation.reshape((*observation.shape[:-1], *shape))

    return with_observations(
        environment,
        jnp.ravel,
        observation_shape=(math.prod(shape),),
        action_mask=None if mask is None else lambda observation: mask(whole(observation)),
    )


def cache_resets(environment: Environment) -> Environment:
    """Begin every episode of an instance of `environment` in the state that was drawn for its first one.

    Where drawing a start costs more than a step, this saves it: in a program of N environments only N are drawn, and
    kept beside the running states. The agent then learns from N starts alone, so this suits many environments, as on
    an accelerator (Brax does so). An agent of few environments sees few starts.

    Raises:
      UsageError: if the environment resets itself.
    """
    check_environment(environment, "cache_resets")
    if environment.restart is not None:
        raise UsageError(
            f"{environment.name} resets itself in its own step, so its resets cannot be cached; leave it out."
        )

    def reset(key: Array) -> tuple[Array, PyTree]:
        first = environment.reset(key)
        return first[0], (first[1], first)

    def step(key: Array, state: PyTree, action: Array) -> Step:
        result = environment.step(key, state[0], action)
        return result._replace(state=(result.state, state[1]))

    def restart(key: Array, state: PyTree) -> tuple[Array, PyTree]:
        observation, inner = state[1]
        return observation, (inner, state[1])

    draw = render_inner(environment.render)
    return dataclasses.replace(environment, reset=reset, step=step, restart=restart, costly_reset=False, render=draw)


def append_time(environment: Environment) -> Environment:
    """Append the elapsed share of the time limit to the observations of `environment`.

    If a time limit is part of the task, the value of a state depends on the time left, which is then observed.

    Raises:
      UsageError: if observations are not vectors, or the environment has no time limit.
    """
    check_environment(environment, "append_time")
    size, limit = vector_size(environment, "append_time"), environment.max_steps
    mask = environment.action_mask
    if limit is None:
        raise UsageError(f"{environment.name} has no time limit, which append_time needs; set one with limit_steps.")

    def see(observation: Array, time: Array) -> Array:
        return jnp.append(observation, time.astype(jnp.float32) / limit)

    def begin(first: Array) -> tuple[Array, Array]:
        return see(first, jnp.int32(0)), jnp.int32(0)

    def follow(step: Step, time: Array) -> tuple[Step, Array]:
        return step._replace(observation=see(step.observation, time + 1)), time + 1

    return _wrap(
        environment,
        begin,
        follow,
        observation_shape=(size + 1,),
        entries=None if environment.entries is None else {**environment.entries, "time": (1,)},
        action_mask=None if mask is None else lambda observation: mask(observation[..., :-1]),
    )


def _wrap(
    environment: Environment,
    begin: Callable[[Array], tuple[Array, PyTree]],
    follow: Callable[[Step, PyTree], tuple[Step, PyTree]],
    **changes: Any,
) -> Environment:
    """Wrap `environment` with states (its state, own), where `own` is the wrapper's.

    Args:
      environment: the environment to wrap.
      begin: the first observation of an episode -> the observation to show, and `own`.
      follow: (step, `own` before it) -> the step to show, and `own` after it.
      changes: other fields of the `Environment`.
    """
    restart_inner = environment.restart

    def seen(observation: Array, inner: PyTree) -> tuple[Array, PyTree]:
        observation, own = begin(observation)
        return observation, (inner, own)

    def reset(key: Array) -> tuple[Array, PyTree]:
        return seen(*environment.reset(key))

    def step(key: Array, state: PyTree, action: Array) -> Step:
        inner, own = state
        result, own = follow(environment.step(key, inner, action), own)
        return result._replace(state=(result.state, own))

    def restart(key: Array, state: PyTree) -> tuple[Array, PyTree]:
        assert restart_inner is not None
        return seen(*restart_inner(key, state[0]))

    changes["restart"] = None if restart_inner is None else restart
    return dataclasses.replace(environment, reset=reset, step=step, render=render_inner(environment.render), **changes)


def with_observations(environment: Environment, see: Callable[[Array], Array], **changes: Any) -> Environment:
    """Replace each observation of `environment` by `see(observation)`."""

    def follow(step: Step, own: PyTree) -> tuple[Step, PyTree]:
        return step._replace(observation=see(step.observation)), own

    return _wrap(environment, lambda first: (see(first), ()), follow, **changes)


def check_environment(environment: Any, wrapper: str) -> None:
    """Raise `UsageError` unless a wrapper was given an `Environment`."""
    if not isinstance(environment, Environment):
        raise UsageError(f"{wrapper} takes an Environment, got {shown(environment)}; make_environment makes one.")


def vector_size(environment: Environment, wrapper: str) -> int:
    """The size of an environment's observations; raise `UsageError` unless they are vectors."""
    if len(environment.observation_shape) != 1:
        raise UsageError(
            f"{wrapper} needs observations that are vectors, but those of {environment.name} have shape "
            f"{environment.observation_shape}; apply flatten_observations first."
        )
    return environment.observation_shape[0]
