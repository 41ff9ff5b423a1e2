"""gymnax 1.x environments, and any object with gymnax's `reset` and six-value `step`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.env_args import EnvArgs
from trpo_jax.environments.base import Array, Environment, Film, PyTree
from trpo_jax.environments.checks import one_sentence
from trpo_jax.environments.entries import MASK, with_mask
from trpo_jax.environments.spaces import action_space, observer
from trpo_jax.environments.suites import assemble
from trpo_jax.sentences import UsageError, check_number, first_line, nearest

_LIMIT = "max_steps_in_episode"  # gymnax's name for the time limit among an environment's parameters


@functools.cache
def _gymnax() -> types.ModuleType:
    """Import gymnax at its first use, and the plotting libraries that only its `render` needs at theirs.

    Together they would take a second, a third of the time from the command to the first iteration.
    """
    import matplotlib

    later = []
    for name in ("matplotlib.pyplot", "seaborn"):
        if name not in sys.modules and (spec := importlib.util.find_spec(name)) and spec.loader:
            spec.loader = importlib.util.LazyLoader(spec.loader)
            later.append((spec.loader, importlib.util.module_from_spec(spec)))
            sys.modules[name] = later[-1][1]
    matplotlib.pyplot = sys.modules["matplotlib.pyplot"]  # type: ignore[attr-defined]
    try:
        return importlib.import_module("gymnax")
    finally:  # not before: a module under LazyLoader runs at its next `import`, and gymnax has several
        for loader, module in later:
            loader.exec_module(module)


def registered_names() -> list[str]:
    """Names of gymnax's environments, including those registered by the user."""
    return list(_gymnax().registered_envs)


def make_by_name(name: str) -> tuple[Any, Any]:
    """Build a registered environment and its default parameters."""
    gymnax = _gymnax()
    if name not in gymnax.registered_envs:
        hint = nearest(name, gymnax.registered_envs)
        raise UsageError(f"there is no environment {name!r}{hint} `trpo-jax envs` lists what can be trained.")
    try:
        return gymnax.make(name)
    except Exception as error:  # a constructor may fail in any way, such as a data set that cannot be downloaded
        data = " without its data set, which could not be downloaded" if "MNIST" in name else ""
        raise UsageError(f"{name} cannot be made{data} ({type(error).__name__}: {first_line(error)}).") from error


@functools.lru_cache(maxsize=64)
def parameters(name: str) -> dict[str, Any]:
    """The parameters of a registered environment, by name."""
    with jax.ensure_compile_time_eval():
        return _fields(make_by_name(name)[1])


@functools.lru_cache(maxsize=256)
def is_traceable(name: str, parameter: str) -> bool:
    """Whether a parameter of a registered environment can be traced: it is a float, and does not bound actions."""
    if not isinstance(parameters(name).get(parameter), float):
        return False
    env, defaults = make_by_name(name)
    try:
        jax.eval_shape(
            lambda value: _bounds(env.action_space(_complete({parameter: value}, defaults, name))), np.float32(1)
        )
    except jax.errors.TracerArrayConversionError:
        return False
    return True


def _bounds(space: Any) -> list[Any]:
    return [np.asarray(bound) for bound in (getattr(space, "low", 0), getattr(space, "high", 0))]


def from_object(env: Any, params: Any, name: str, max_steps: int | None) -> Environment:
    """Adapt a gymnax-like object to the library's interface.

    An environment that inherits gymnax's own `step` is stepped raw (`step_env`, `reset_env`, `is_truncated`) and reset
    here. One with its own `step` is used through that public method, and its `info["final_observation"]` is taken as
    the observation before the reset.
    """
    for method in ("reset", "step", "action_space"):
        if not callable(getattr(env, method, None)):
            raise UsageError(
                f"environment {name} has no method {method}(); an environment needs reset, step and action_space."
            )
    params = _complete(params, getattr(env, "default_params", None), name)
    extra = () if params is None else (params,)
    with one_sentence(f"action_space of {name}"), _known_bounds(name):
        space, to_env = action_space(env.action_space(*extra), name)
    with one_sentence(f"observation_space of {name}"):
        observe = _masked(env, extra, observer(_declared_observations(env, extra), name))
    limit: Any = None if params is None else _fields(params).get(_LIMIT, getattr(params, _LIMIT, None))
    limit = int(limit) if _is_known(limit) else None
    if limit is not None:
        check_number(f"{_LIMIT} of {name}", limit, whole=True, interval="[1, 2147483647]")
    functions = _raw_functions if _inherits_gymnax_step(env) else _public_functions
    reset, step, restart = functions(env, extra, observe, to_env, name)

    def render(states: Sequence[PyTree]) -> Film:
        from trpo_jax.environments.pictures import film_of_gymnax

        own = [state.state if isinstance(state, _Resetting) else state for state in states]
        return film_of_gymnax(env, extra, own, name)

    return assemble(name, space, reset, step, limit=limit, max_steps=max_steps, restart=restart, render=render)


@contextlib.contextmanager
def _known_bounds(name: str) -> Iterator[None]:
    try:
        yield
    except jax.errors.TracerArrayConversionError:
        raise UsageError(
            f"action bounds of {name} depend on a traced parameter, but must be known before; make it with that "
            f"parameter: env=make_environment({name!r}, params=...)."
        ) from None


def _raw_functions(env: Any, extra: tuple[Any, ...], observe: Any, to_env: Any, name: str) -> tuple[Any, Any, None]:
    """Reset and step of a gymnax environment, without its own reset at the end of an episode."""

    def reset(key: Array) -> tuple[Array, PyTree]:
        observation, state = env.reset_env(key, *extra)
        return observe(observation, state), state

    def step(key: Array, state: PyTree, action: Array) -> tuple[Any, ...]:
        observation, state, reward, terminated, info = env.step_env(key, state, to_env(action), *extra)
        _check_info(info, env, name)
        return observe(observation, state), state, reward, terminated, env.is_truncated(state, *extra)

    return reset, step, None


class _Resetting(NamedTuple):
    """State of an environment that resets itself; at the end of an episode, the start of the next."""

    state: PyTree
    observation: PyTree  # in this state


def _public_functions(env: Any, extra: tuple[Any, ...], observe: Any, to_env: Any, name: str) -> tuple[Any, Any, Any]:
    """Public reset and step of an environment that resets itself, and a `restart` that returns the start it drew."""

    def reset(key: Array) -> tuple[Array, _Resetting]:
        observation, state = env.reset(key, *extra)
        seen = observe(observation, state)
        return seen, _Resetting(state, seen)

    def step(key: Array, resetting: _Resetting, action: Array) -> tuple[Any, ...]:
        result = env.step(key, resetting.state, to_env(action), *extra)
        values = len(result) if isinstance(result, (tuple, list)) else 1
        if values != 6 or "final_observation" not in (result[5] or {}):
            found = f"it returned {values}" if values != 6 else "its info has no such entry"
            raise UsageError(
                f"{name}.step must return gymnax 1.x's six values (observation, state, reward, terminated, truncated, "
                f"info) with info['final_observation'], the observation before the reset; {found}."
            )
        observation, state, *rest, info = result
        _check_info(info, env, name)
        # The last observation of an episode gets the mask of the next one's first state: no action follows it.
        last = observe(info["final_observation"], state)
        return last, _Resetting(state, observe(observation, state)), *rest

    def restart(key: Array, resetting: _Resetting) -> tuple[PyTree, _Resetting]:
        return resetting.observation, resetting

    return reset, step, restart


def _masked(env: Any, extra: tuple[Any, ...], observe: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """Make `see(observation, state)`, with a mask of legal actions if the environment has `action_mask(state)`."""
    method = getattr(env, MASK, None)
    if not callable(method):
        return lambda observation, state: observe(observation)
    try:
        inspect.signature(method).bind(None, *extra)
    except (TypeError, ValueError):
        extra = ()
    return lambda observation, state: with_mask(observe(observation), method(state, *extra))


def _check_info(info: Any, env: Any, name: str) -> None:
    """Raise `UsageError` if only a step tells which actions are legal, so that this is unknown in a first state."""
    if isinstance(info, Mapping) and MASK in info and not callable(getattr(env, MASK, None)):
        raise UsageError(
            f"{name}.step returns info[{MASK!r}], but its reset returns no info, so the legal actions of a first state "
            f"are unknown; add a method {MASK}(state)."
        )


def _inherits_gymnax_step(env: Any) -> bool:
    _gymnax()
    from gymnax.environments.environment import Environment as GymnaxEnvironment

    cls = type(env)
    return (
        isinstance(env, GymnaxEnvironment)
        and cls.step is GymnaxEnvironment.step
        and cls.reset is GymnaxEnvironment.reset
    )


def _declared_observations(env: Any, extra: tuple[Any, ...]) -> Any:
    """The space that an environment declares for its observations, or None."""
    if not callable(getattr(env, "observation_space", None)):
        return None
    try:
        return env.observation_space(*extra)
    except NotImplementedError:  # gymnax's base class, where a subclass declares no observations
        return None


def _is_known(limit: Any) -> bool:
    """Whether a time limit is a finite number; it may also be traced, to be mapped over."""
    return limit is not None and not isinstance(limit, jax.core.Tracer) and math.isfinite(limit)


def _complete(params: Any, defaults: Any, name: str) -> Any:
    """All parameters of an environment: its defaults, those given, or its defaults with changes from a dict."""
    if isinstance(params, EnvArgs) and defaults is None:
        raise UsageError(f"{name} takes no settings, got {', '.join(params)}: it has no default_params.")
    if params is None or defaults is None or not isinstance(params, dict):
        return defaults if params is None else params
    known = _fields(defaults)
    for field, value in params.items():
        if field not in known:
            raise UsageError(f"{name} has no parameter {field!r}{nearest(str(field), known)}")
        if not _is_like(value, known[field]):
            raise UsageError(f"parameter {field} of {name} must be like {known[field]!r}, got {value!r}.")
    params = {
        field: float(v) if isinstance(known[field], float) and type(v) is int else v for field, v in params.items()
    }
    if isinstance(defaults, dict):
        return {**defaults, **params}
    if dataclasses.is_dataclass(defaults):
        return dataclasses.replace(defaults, **params)  # type: ignore[type-var]
    if hasattr(defaults, "_replace"):
        return defaults._replace(**params)
    changed = copy.copy(defaults)
    vars(changed).update(params)
    return changed


def _fields(params: Any) -> dict[str, Any]:
    if isinstance(params, dict):
        return params
    if dataclasses.is_dataclass(params):
        return {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    return params._asdict() if hasattr(params, "_asdict") else dict(vars(params))


def _is_like(value: Any, own: Any) -> bool:
    """Whether a value can replace an environment's own: a number of the same kind and shape; a float may be whole."""
    if not _is_number(own):
        return True
    if not _is_number(value) or np.shape(value) != np.shape(own):
        return False
    given, wanted = (jnp.result_type(v) for v in (value, own))
    return wanted == given or (
        bool not in (given, wanted) and (jnp.issubdtype(wanted, jnp.floating) or jnp.issubdtype(given, jnp.integer))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.ndarray, np.generic, jax.Array))
