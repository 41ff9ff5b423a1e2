"""From a name or an object to an `Environment`, and the list of what there is."""

from __future__ import annotations

import functools
from typing import Any

from trpo_jax.config import UsageError, nearest
from trpo_jax.environments import gymnax, suites
from trpo_jax.environments.base import Environment


def make_environment(env: Any, *, params: Any = None, max_steps: int | None = None) -> Environment:
    """Bring an environment to the interface that the trainer uses.

    Args:
      env: a gymnax name such as "CartPole-v1"; the name of another suite's with its prefix, such as "brax/hopper";
        an `Environment`, returned as it is; or an object with gymnax's `reset(key, params)`, six-value
        `step(key, state, action, params)` and `action_space(params)`.
      params: the environment's own parameters; by default its `default_params`. An object without any is called
        without that argument. For a suite other than gymnax, a dict of keyword arguments of its constructor.
      max_steps: a time limit of the library's own, beside the environment's.

    Raises:
      UsageError: if the name is unknown or the environment cannot be trained, in one sentence.
    """
    if isinstance(env, Environment):
        return env
    if isinstance(env, str):
        if params is None and max_steps is None:
            return _by_name(env)
        return _build(env, params, max_steps)
    if env is None or isinstance(env, (int, float, bytes, list, tuple, dict)):
        raise UsageError(f"env must be a name, an Environment or an environment object, got {env!r}.")
    return _build(env, params, max_steps)


@functools.lru_cache(maxsize=64)
def _by_name(name: str) -> Environment:
    # Cached so that every trace of the same configuration closes over the same environment.
    return _build(name, None, None)


def _build(env: Any, params: Any, max_steps: int | None) -> Environment:
    if isinstance(env, str):
        name = env
        suite, slash, own_name = name.partition("/")
        if slash and suite in suites.SUITES:
            if not isinstance(params, (dict, type(None))):
                raise UsageError(f"params of {name} must be a dict of keyword arguments, got {params!r}.")
            return suites.adapter(suite).make(own_name, params or {}, max_steps)
        if slash:
            raise UsageError(f"there is no suite {suite!r}{nearest(suite, suites.SUITES)} `trpo-jax envs` lists them.")
        env, defaults = gymnax.make_by_name(name)
        params = defaults if params is None else params
    else:
        name = env.name if isinstance(getattr(env, "name", None), str) else type(env).__name__
    return gymnax.from_object(env, params, name, max_steps)


def available_environments() -> dict[str, Environment | str]:
    """Every environment known by name: its `Environment`, or the sentence why it cannot be made here.

    A suite other than gymnax takes long to build, and stands there once, as its prefix and one sentence: the names of
    its environments, or what to install.
    """
    found: dict[str, Environment | str] = {}
    for name in gymnax.registered_names():
        try:
            found[name] = make_environment(name)
        except UsageError as error:
            found[name] = str(error)
    for suite in suites.SUITES:
        try:
            found[f"{suite}/"] = f"{suite}/: {', '.join(suites.adapter(suite).names())}."
        except UsageError as error:
            found[f"{suite}/"] = str(error)
    return found
