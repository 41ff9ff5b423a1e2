"""gymnax 1.x environments, and any object that has gymnax's `reset` and six-value `step`."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config import UsageError, nearest
from trpo_jax.environments import base
from trpo_jax.environments.base import Array, Discrete, Environment, MultiDiscrete, PyTree, Space, Step


class _Later(types.ModuleType):
    """Stands for a plotting module while gymnax is imported, and for the real one once something is asked of it."""

    waiting: ClassVar[bool] = True  # while gymnax is imported

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: list[str] = []  # a package: it is asked for submodules

    def __getattr__(self, name: str) -> Any:
        if not _Later.waiting:
            return getattr(importlib.import_module(self.__name__), name)
        if name.startswith("__"):
            raise AttributeError(name)
        return _Later(f"{self.__name__}.{name}")


@functools.cache
def _gymnax() -> types.ModuleType:
    """Import gymnax when it is first needed, and without the plotting libraries that only its `render` needs.

    They would double the time from the command to the first iteration: 1.5 s of 3.
    """
    later = {name: _Later(name) for name in ("matplotlib", "matplotlib.pyplot", "seaborn") if name not in sys.modules}
    if "matplotlib" in later:
        vars(later["matplotlib"])["pyplot"] = later["matplotlib.pyplot"]
    _Later.waiting = True
    sys.modules.update(later)
    try:
        return importlib.import_module("gymnax")
    finally:
        _Later.waiting = False
        for name in later:
            del sys.modules[name]


# Evaluated at once even inside a trace: an environment keeps its arrays, and a tracer must not outlive its trace.
_at_once = jax.ensure_compile_time_eval


def registered_names() -> list[str]:
    """Names that gymnax knows, those registered by the user included."""
    return list(_gymnax().registered_envs)


def make_by_name(name: str) -> tuple[Any, Any]:
    """Build a registered environment and its default parameters."""
    gymnax = _gymnax()
    if name not in gymnax.registered_envs:
        hint = nearest(name, gymnax.registered_envs)
        raise UsageError(f"there is no environment {name!r}{hint} `trpo-jax envs` lists what can be trained.")
    try:
        with _at_once():
            return gymnax.make(name)
    except Exception as error:  # a constructor may fail in any way, such as a data set that cannot be downloaded
        data = " without its data set, which could not be downloaded" if "MNIST" in name else ""
        raise UsageError(f"{name} cannot be made{data} ({type(error).__name__}: {_first_line(error)}).") from error


def from_object(env: Any, params: Any, name: str, max_steps: int | None) -> Environment:
    """Bring a gymnax-like object to the library's interface.

    An environment that inherits gymnax's own `step` is stepped raw (`step_env`, `reset_env`, `is_truncated`) and
    reset here; one with a `step` of its own is taken at its word through that public `step`, whose
    `info["final_observation"]` is the observation before the reset.
    """
    for method in ("reset", "step", "action_space"):
        if not callable(getattr(env, method, None)):
            raise UsageError(
                f"environment {name} has no method {method}(); an environment needs reset, step and action_space."
            )
    if params is None:
        params = getattr(env, "default_params", None)
    extra = () if params is None else (params,)
    with _at_once():
        space, to_env = _action_space(env.action_space(*extra), name)
        observe = functools.partial(_float_observation, one_hot=_categories(env, extra), name=name)
    own_limit = getattr(params, "max_steps_in_episode", None)
    limits = [int(limit) for limit in (own_limit, max_steps) if limit is not None]

    if _inherits_gymnax_step(env):
        reset, raw_step = base.fixed_dtypes(*_raw_functions(env, extra, observe, to_env), base.zero_action(space))
        if max_steps is not None:
            reset, raw_step = base.time_limit(reset, raw_step, max_steps)
        step, advance = base.auto_reset(reset, raw_step), raw_step
    elif max_steps is None:
        reset, public_step = _public_functions(env, extra, observe, to_env, name)
        reset, public_step = base.fixed_dtypes(reset, public_step, base.zero_action(space))

        def step(key: Array, state: PyTree, action: Array) -> Step:
            return Step(*public_step(key, state, action))

        advance = None
    else:
        raise UsageError(f"{name} resets itself in its own step, so max_steps cannot be imposed on it; leave it out.")
    # Declared spaces are wrong in a third of gymnax's environments: look at what reset really returns.
    observation_shape = jax.eval_shape(reset, base.key_shape())[0].shape
    return Environment(name, observation_shape, space, min(limits, default=None), reset, step, advance)


def _raw_functions(env: Any, extra: tuple, observe: Any, to_env: Any) -> tuple[base.RawReset, base.RawStep]:
    """Reset and step of a gymnax environment without its own reset at the end of an episode."""

    def reset(key: Array) -> tuple[Array, PyTree]:
        observation, state = env.reset_env(key, *extra)
        return observe(observation), state

    def step(key: Array, state: PyTree, action: Array) -> tuple:
        observation, state, reward, terminated, _ = env.step_env(key, state, to_env(action), *extra)
        truncated = env.is_truncated(state, *extra)
        return observe(observation), state, _scalar(reward), _flag(terminated), _flag(truncated)

    return reset, step


def _public_functions(env: Any, extra: tuple, observe: Any, to_env: Any, name: str) -> tuple[base.RawReset, Any]:
    """The public reset and step of an environment that resets itself; the step's values are those of a `Step`."""

    def reset(key: Array) -> tuple[Array, PyTree]:
        observation, state = env.reset(key, *extra)
        return observe(observation), state

    def step(key: Array, state: PyTree, action: Array) -> tuple:
        result = env.step(key, state, to_env(action), *extra)
        values = len(result) if isinstance(result, (tuple, list)) else 1
        if values != 6 or "final_observation" not in result[5]:
            raise UsageError(
                f"{name}.step must return gymnax 1.x's six values (observation, state, reward, terminated, truncated, "
                f"info) with info['final_observation'], the observation before the reset; it returned {values}."
            )
        observation, state, reward, terminated, truncated, info = result
        final = observe(info["final_observation"])
        return observe(observation), state, _scalar(reward), _flag(terminated), _flag(truncated), final

    return reset, step


def _inherits_gymnax_step(env: Any) -> bool:
    _gymnax()
    from gymnax.environments.environment import Environment as GymnaxEnvironment

    cls = type(env)
    return (
        isinstance(env, GymnaxEnvironment)
        and cls.step is GymnaxEnvironment.step
        and cls.reset is GymnaxEnvironment.reset
    )


def _float_observation(observation: Any, *, one_hot: int | None, name: str) -> Array:
    """An observation as float32; an index into `one_hot` categories as a unit vector."""
    if not isinstance(observation, (jax.Array, np.ndarray, np.generic, int, float)):
        raise UsageError(f"observations of {name} must be single arrays, got a {type(observation).__name__}.")
    if one_hot is not None:
        return jax.nn.one_hot(observation, one_hot, dtype=jnp.float32)
    return jnp.asarray(observation, jnp.float32)


def _action_space(space: Any, name: str) -> tuple[Space, Callable[[Array], Any]]:
    """Our space, and the function that turns the policy's action into the one that the environment takes."""
    children = getattr(space, "spaces", None)
    if hasattr(space, "n"):
        return Discrete(int(space.n)), lambda action: action
    if hasattr(space, "nvec"):
        return MultiDiscrete(tuple(int(n) for n in space.nvec)), lambda action: action
    if hasattr(space, "low") and hasattr(space, "high"):
        shape = tuple(space.shape)
        box = base.make_box(space.low, space.high, shape)
        return box, lambda action: jnp.clip(action, box.low, box.high).reshape(shape)
    if isinstance(children, (tuple, list)) and all(hasattr(child, "n") for child in children):
        sizes = tuple(int(child.n) for child in children)
        return MultiDiscrete(sizes), lambda action: tuple(action[k] for k in range(len(sizes)))
    raise UsageError(
        f"actions of {name} lie in {space!r}; Discrete, MultiDiscrete, a Tuple of Discrete, and Box can be trained."
    )


def _categories(env: Any, extra: tuple) -> int | None:
    """Number of categories of a scalar Discrete observation, else None."""
    if not callable(getattr(env, "observation_space", None)):
        return None
    try:
        space = env.observation_space(*extra)
    except NotImplementedError:  # gymnax's base class, where a subclass declares no observations
        return None
    return int(space.n) if hasattr(space, "n") and tuple(getattr(space, "shape", ())) == () else None


def _scalar(reward: Any) -> Array:
    return jnp.asarray(reward, jnp.float32).reshape(())


def _flag(value: Any) -> Array:
    return jnp.asarray(value, bool).reshape(())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no message"])[0].rstrip(".")
