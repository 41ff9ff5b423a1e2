"""Tools for the adapters of suites: import of an optional package, and assembly of an `Environment`."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax.environments import base
from trpo_jax.environments.base import Array, Environment, PyTree, Space, Step
from trpo_jax.environments.checks import fixed_dtypes, one_sentence, outcome
from trpo_jax.environments.entries import check_mask, entries_of, flattened
from trpo_jax.environments.wrappers import limit_steps
from trpo_jax.sentences import UsageError, first_line, nearest

# An adapter is the module of this package with the suite's name, which is also the name of the extra that installs it.
# It has `make(name, options, max_steps) -> Environment`, for a name without the prefix, and `names() -> list[str]`.
PACKAGES = {"playground": "mujoco_playground"}  # of a suite, if its name differs
SUITES = ("gymnasium", "brax", "playground", "jumanji", "craftax", "xminigrid", "navix")


def adapter(suite: str) -> Any:
    """The module that adapts a suite."""
    return importlib.import_module(f"trpo_jax.environments.{suite}")


def require(module: str, suite: str) -> Any:
    """Import an optional package.

    Raises:
      UsageError: if it is missing or cannot be imported; the sentence names the extra that installs it.
    """
    try:
        with _quiet():
            importlib.import_module(module.partition(".")[0])
            return importlib.import_module(module)
    except Exception as error:  # a package may fail in any way with a wrong version of another
        package = module.split(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        what = "which is not installed" if missing else f"which cannot be imported ({first_line(error)})"
        raise UsageError(
            f"environments {suite}/… need the package {package}, {what}: pip install '.[{suite}]'."
        ) from error


def check_name(name: str, suite: str, names: Iterable[str]) -> None:
    """Raise `UsageError` unless `name` is among the suite's `names`."""
    names = list(names)
    if name not in names:
        raise UsageError(f"there is no environment {suite}/{name}{nearest(name, names)} `trpo-jax envs` lists them.")


def make_by_name(name: str, options: dict[str, Any], max_steps: int | None) -> Environment:
    """Build `suite/own_name`; any failure becomes one sentence."""
    suite, _, own_name = name.partition("/")
    try:
        with _quiet():
            return adapter(suite).make(own_name, options, max_steps)
    except UsageError:
        raise
    except Exception as error:  # the suite's constructors may fail in any way
        raise UsageError(f"{name} cannot be made ({type(error).__name__}: {first_line(error)}).") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what a suite prints and warns of when it is imported and built, which the user cannot change."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def quiet_mujoco() -> Iterator[None]:
    """Suppress the warning of MuJoCo's compiler, for each instance, that its model is written in an old style.

    It would be printed, and appended to a file in the working directory. Warnings about simulations remain.
    """
    try:
        mujoco: Any = importlib.import_module("mujoco")
    except ImportError:
        yield
        return
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def assemble(
    name: str,
    space: Space,
    reset: base.RawReset,
    step: base.RawStep,
    *,
    limit: int | None = None,
    max_steps: int | None = None,
    **fields: Any,
) -> Environment:
    """Make an `Environment` from a raw `reset(key)` and `step(key, state, action)`.

    Observations become float32 (several entries: one vector), rewards float32 scalars, and flags bool scalars. States
    keep one dtype per leaf, and Box actions are clipped.

    Args:
      name: its name, with the suite's prefix.
      space: the action space.
      reset: -> (observation, state); an observation may be a mapping, with a mask of legal actions as "action_mask".
      step: -> (observation, state, reward, terminated, truncated).
      limit: the time limit in steps that `step` applies itself.
      max_steps: an additional one.
      fields: other fields of `Environment`.
    """
    with one_sentence(f"reset of {name}"):
        first: Any = jax.eval_shape(reset, base.key_shape())[0]
    entries = entries_of(first)
    check_mask(entries, base.sizes_of(space), name)

    def cast_reset(key: Array) -> tuple[Array, PyTree]:
        observation, state = reset(key)
        return flattened(observation), state

    def cast_step(key: Array, state: PyTree, action: Array) -> Step:
        if isinstance(space, base.Box):
            action = jnp.clip(action, space.low, space.high)
        observation, state, reward, terminated, truncated = step(key, state, action)
        if (found := entries_of(observation)) != entries:
            raise UsageError(
                f"{name} returns a different observation after a step than after a reset: {found or 'a single array'} "
                f"instead of {entries or 'a single array'}; it must keep its entries."
            )
        return Step(flattened(observation), state, *outcome(reward, terminated, truncated, name))

    fixed_reset, fixed_step = fixed_dtypes(cast_reset, cast_step, base.zero_action(space), name)
    shape = jax.eval_shape(flattened, first).shape
    if entries is not None:
        restart: Any = fields.get("restart")
        if restart is not None:  # it returns an observation as `reset` made it
            fields["restart"] = lambda key, state: (flattened((start := restart(key, state))[0]), start[1])
        fields = {"entries": entries, **fields}
    environment = Environment(name, shape, space, limit, fixed_reset, fixed_step, **fields)
    return environment if max_steps is None else limit_steps(environment, max_steps)


def one_hot_layers(grid: Array, sizes: tuple[int, ...]) -> Array:
    """Convert ids [height, width, K], layer k of `sizes[k]` kinds, to unit vectors [height, width, sum(sizes)].

    Ids are names. As numbers, they would put a door between a wall and a key.
    """
    return jnp.concatenate([jax.nn.one_hot(grid[..., k], size) for k, size in enumerate(sizes)], axis=-1)
