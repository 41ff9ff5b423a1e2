"""Checks of environments: each is traced once without running it, and every problem becomes one sentence."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.environments import base
from trpo_jax.environments.base import Array, Box, Discrete, Environment, MultiDiscrete, PyTree, RawReset, Step
from trpo_jax.environments.entries import check_entries, check_mask
from trpo_jax.fields import is_whole
from trpo_jax.sentences import UsageError, check_number, first_line, shown


def fixed_dtypes(
    reset: RawReset, step: Callable[..., Step], action: Any, name: str
) -> tuple[RawReset, Callable[..., Step]]:
    """Cast the states of `reset` and `step` to one strong dtype per leaf, so that the carry of a scan keeps its types.

    A leaf that is an integer after `reset` and a float after `step` is a float from the start.

    Raises:
      UsageError: if one of them fails, or state or observation change their structure from reset to step.
    """
    key = base.key_shape()
    with one_sentence(f"reset of {name}"):
        observation, from_reset = jax.eval_shape(reset, key)
    with one_sentence(f"step of {name}"):
        stepped = jax.eval_shape(lambda k: step(k, reset(k)[1], action), key)
    for what, first, after in (("observation", observation, stepped.observation), ("state", from_reset, stepped.state)):
        if differs := _difference(first, after):
            raise UsageError(
                f"{name} returns a different {what} after a step than after a reset: {differs[1]} instead of "
                f"{differs[0]}; it must keep its structure and shapes."
            )
    dtypes = jax.tree.map(
        lambda a, b: a.dtype if a.dtype == b.dtype else jnp.promote_types(a, b), from_reset, stepped.state
    )

    def cast_leaf(leaf: Any, dtype: Any) -> Array:
        # An environment that was made with 64-bit numbers may be used without them.
        return jax.lax.convert_element_type(leaf, jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True))

    def cast(state: PyTree) -> PyTree:
        return jax.tree.map(cast_leaf, state, dtypes)

    def cast_reset(key: Array) -> tuple[Array, PyTree]:
        observation, state = reset(key)
        return observation, cast(state)

    def cast_step(key: Array, state: PyTree, action: Array) -> Step:
        result = step(key, state, action)
        return result._replace(state=cast(result.state))

    return cast_reset, cast_step


def _difference(first: PyTree, second: PyTree, *, with_dtypes: bool = False) -> tuple[str, str] | None:
    """The first difference between two trees of shapes, as text for each of them; None if there is none."""

    def places(tree: PyTree) -> list[str]:
        named = ((jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))
        return [f"{path} {leaf.dtype if with_dtypes else ''}{list(leaf.shape)}".strip() for path, leaf in named]

    both = places(first), places(second)
    if (both[0], jax.tree.structure(first)) == (both[1], jax.tree.structure(second)):
        return None
    different = (pair for pair in zip(*both, strict=False) if pair[0] != pair[1])
    return next(different, (f"{len(both[0])} arrays", f"{len(both[1])} in another structure"))


@contextlib.contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Turn an error in an environment's own code into one sentence: what failed, how, and on which line."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what} fails ({describe_error(error)}).") from error


def describe_error(error: BaseException, file: str | None = None) -> str:
    """Describe an error briefly: its type, the first line of its message, and the last line of `file` in its traceback.

    Without `file`, or if it is not in the traceback, the last line outside of JAX, NumPy and this package.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = {"jax", "jaxlib", "numpy", "trpo_jax"}
    inside = [frame for frame in frames if file and frame.filename == file]
    outside = [frame for frame in frames if not ours & set(Path(frame.filename).parts)]
    at = "".join(f", {Path(f.filename).name}:{f.lineno} in {f.name}" for f in (inside or outside)[-1:])
    return f"{type(error).__name__}: {first_line(error)}{at}"


def outcome(reward: Any, terminated: Any, truncated: Any, name: str) -> tuple[Array, Array, Array]:
    """Convert a step's reward and flags to float32 [] and bool []; each must be one number, in any shape."""
    values = []
    for what, value, dtype in (
        ("reward", reward, jnp.float32),
        ("terminated", terminated, bool),
        ("truncated", truncated, bool),
    ):
        if np.size(value) != 1:
            raise UsageError(f"{name} must return one {what} per step, got an array of shape {np.shape(value)}.")
        values.append(jnp.asarray(value, dtype).reshape(()))
    return values[0], values[1], values[2]


def check_space(space: Any, name: str) -> None:
    """Raise `UsageError` unless actions in `space` can be sampled: it is not empty, and its bounds are in order."""
    if isinstance(space, (Discrete, MultiDiscrete)):
        sizes = space.n if isinstance(space, MultiDiscrete) and isinstance(space.n, tuple) else (space.n,)
        if isinstance(space, MultiDiscrete) != isinstance(space.n, tuple) or not all(map(is_whole, sizes)):
            wanted = "a tuple of whole numbers" if isinstance(space, MultiDiscrete) else "a whole number"
            raise UsageError(f"n of {type(space).__name__} of {name} must be {wanted}, got {shown(space.n)}.")
        good = bool(sizes) and all(map(_is_count, sizes))
    elif isinstance(space, Box):
        good = space.low.size > 0 and bool((space.low <= space.high).all())  # false for NaN
    else:
        raise UsageError(f"{name}.action_space must be a Discrete, MultiDiscrete or Box of trpo_jax, got {space!r}.")
    if not good:
        raise UsageError(f"actions of {name} lie in {space}, which contains no action; give it bounds in order.")


def check_declaration(environment: Environment) -> None:
    """Check an `Environment` that was made elsewhere against its own declaration, without running it.

    Raises:
      UsageError: if it does not match its declaration, in one sentence.
    """
    name = environment.name
    check_space(environment.action_space, name)
    _check_shape(environment.observation_shape, f"observation_shape of {name}")
    if environment.max_steps is not None:
        check_number(f"max_steps of {name}", environment.max_steps, whole=True, interval="[1, 2147483647]")
    if environment.entries is not None:
        if not isinstance(environment.entries, Mapping):
            found = shown(environment.entries)
            raise UsageError(f"entries of {name} must be names with shapes, as {{'position': (3,)}}, got {found}.")
        for entry, shape in environment.entries.items():
            _check_shape(shape, f"the shape of the entry {shown(entry)} of {name}")
        check_entries(environment.entries, environment.observation_shape, name)
        check_mask(environment.entries, base.sizes_of(environment.action_space), name)
    _check_mask_function(environment)
    key = base.key_shape()
    observation = jax.ShapeDtypeStruct(tuple(environment.observation_shape), jnp.float32)
    with one_sentence(f"reset of {name}"):
        start, state = jax.eval_shape(environment.reset, key)
    with one_sentence(f"step of {name}"):
        result = _eval_step(environment, key, state)
    scalar, flag = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.bool_)
    checks = [
        ("reset must return an observation", start, observation),
        ("step must return an observation", result.observation, observation),
        ("step must return a reward", result.reward, scalar),
        ("step must return terminated", result.terminated, flag),
        ("step must return truncated", result.truncated, flag),
        ("step must keep the state of reset,", result.state, state),
    ]
    if environment.restart is not None:
        with one_sentence(f"restart of {name}"):
            start, after = jax.eval_shape(environment.restart, key, state)
        checks.append(("restart must return an observation", start, observation))
        checks.append(("restart must keep the state of reset,", after, state))
    for what, found, expected in checks:
        if differs := _difference(expected, found, with_dtypes=True):
            raise UsageError(f"{name}.{what} of {differs[0]}, got {differs[1]}.")


def _check_shape(shape: Any, what: str) -> None:
    """Raise `UsageError` unless a declared shape is a tuple of whole numbers, none of them 0."""
    if not isinstance(shape, tuple) or not all(_is_count(size) for size in shape):
        raise UsageError(f"{what} must be a tuple of whole numbers of at least 1, such as (4,), got {shown(shape)}.")


def _is_count(size: Any) -> bool:
    return is_whole(size) and size >= 1


def _check_mask_function(environment: Environment) -> None:
    """Raise `UsageError` unless `action_mask` gives one truth value per action, of one observation and of several."""
    if environment.action_mask is None:
        return
    name, sizes = environment.name, base.sizes_of(environment.action_space)
    if not sizes:
        raise UsageError(f"{name} has an action_mask, but its actions are not discrete; leave it out.")
    for batch in ((), (3,)):
        observation = jax.ShapeDtypeStruct((*batch, *environment.observation_shape), jnp.float32)
        with one_sentence(f"action_mask of {name}"):
            found = jax.eval_shape(environment.action_mask, observation)
        expected = jax.ShapeDtypeStruct((*batch, sum(sizes)), jnp.bool_)
        if differs := _difference(expected, found, with_dtypes=True):
            raise UsageError(
                f"{name}.action_mask must return {differs[0]} for observations of "
                f"{list(observation.shape)}, got {differs[1]}."
            )


def _eval_step(environment: Environment, key: Any, state: PyTree) -> Step:
    """Shapes of a step; one of the old kind, which resets itself, returns or makes a `Step` of six values."""
    try:
        result = jax.eval_shape(environment.step, key, state, base.zero_action(environment.action_space))
        resets_itself = len(result) == 6
    except TypeError as error:
        resets_itself = "Step.__new__" in str(error)
        if not resets_itself:
            raise
    if resets_itself:
        raise UsageError(
            f"{environment.name}.step returns six values, but a step must not reset the environment: return "
            "Step(observation, state, reward, terminated, truncated) of this step, and leave the reset to the trainer."
        )
    return Step(*result)
