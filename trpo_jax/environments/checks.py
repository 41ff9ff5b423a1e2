"""Environments as they come: each is traced once without running it, and what cannot be trained is one sentence."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.environments import base
from trpo_jax.environments.base import Array, Box, Discrete, Environment, MultiDiscrete, PyTree, RawReset, Step
from trpo_jax.environments.entries import check_entries, check_mask
from trpo_jax.sentences import UsageError, first_line


def fixed_dtypes(
    reset: RawReset, step: Callable[..., Step], action: Any, name: str
) -> tuple[RawReset, Callable[..., Step]]:
    """`reset` and `step` with states cast to one strong dtype per leaf, so that a scan's carry stays as it was.

    A leaf that `reset` makes an integer and `step` a float is a float from the start.

    Raises:
      UsageError: if one of them fails, or a step leads to another kind of state or observation than a reset.
    """
    key = base.key_shape()
    with one_sentence(f"reset of {name}"):
        observation, from_reset = jax.eval_shape(reset, key)
    with one_sentence(f"step of {name}"):
        stepped = jax.eval_shape(lambda k: step(k, reset(k)[1], action), key)
    for what, first, after in (("observation", observation, stepped.observation), ("state", from_reset, stepped.state)):
        if differs := _difference(first, after):
            raise UsageError(
                f"{name} gives another {what} after a step than after a reset: {differs[1]} after {differs[0]}; it "
                "must keep its structure and shapes."
            )
    dtypes = jax.tree.map(
        lambda a, b: a.dtype if a.dtype == b.dtype else jnp.promote_types(a, b), from_reset, stepped.state
    )

    def cast(state: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf, dtype: jax.lax.convert_element_type(leaf, dtype), state, dtypes)

    def cast_reset(key: Array) -> tuple[Array, PyTree]:
        observation, state = reset(key)
        return observation, cast(state)

    def cast_step(key: Array, state: PyTree, action: Array) -> Step:
        result = step(key, state, action)
        return result._replace(state=cast(result.state))

    return cast_reset, cast_step


def _difference(first: PyTree, second: PyTree, *, with_dtypes: bool = False) -> tuple[str, str] | None:
    """The first place where two trees of shapes differ, as text in each of them; None where they do not."""

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
    """Turn an error of an environment's own code into one sentence: what failed, how, and on which line."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{what} fails ({describe_error(error)}).") from error


def describe_error(error: BaseException, file: str | None = None) -> str:
    """An error in a few words: its type, the first line of its message, and the last line of `file` on its way.

    Without such a file, or where it was not in it, the last line outside of JAX, NumPy and this package.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = {"jax", "jaxlib", "numpy", "trpo_jax"}
    inside = [frame for frame in frames if file and frame.filename == file]
    outside = [frame for frame in frames if not ours & set(Path(frame.filename).parts)]
    at = "".join(f", {Path(f.filename).name}:{f.lineno} in {f.name}" for f in (inside or outside)[-1:])
    return f"{type(error).__name__}: {first_line(error)}{at}"


def outcome(reward: Any, terminated: Any, truncated: Any, name: str) -> tuple[Array, Array, Array]:
    """A step's reward and flags as float32 [] and bool []; each must be one number, in whatever shape."""
    values = []
    for what, value, dtype in (
        ("reward", reward, jnp.float32),
        ("terminated", terminated, bool),
        ("truncated", truncated, bool),
    ):
        if np.size(value) != 1:
            raise UsageError(f"{name} must give one {what} per step, got an array of shape {np.shape(value)}.")
        values.append(jnp.asarray(value, dtype).reshape(()))
    return values[0], values[1], values[2]


def check_space(space: Any, name: str) -> None:
    """Raise `UsageError` unless actions in `space` can be sampled: something to choose from, bounds in order."""
    if isinstance(space, (Discrete, MultiDiscrete)):
        sizes = np.atleast_1d(space.n)
        good = sizes.size > 0 and bool((sizes >= 1).all())
    elif isinstance(space, Box):
        good = space.low.size > 0 and bool((space.low <= space.high).all())  # a NaN is neither
    else:
        raise UsageError(f"{name}.action_space must be a Discrete, MultiDiscrete or Box of trpo_jax, got {space!r}.")
    if not good:
        raise UsageError(f"actions of {name} lie in {space}, in which there is no action; give it bounds in order.")


def check_declaration(environment: Environment) -> None:
    """Check an `Environment` that was not built here against its own declaration, without running it.

    Raises:
      UsageError: if it is not what `Environment` says, in one sentence.
    """
    name = environment.name
    check_space(environment.action_space, name)
    if environment.entries is not None:
        check_entries(environment.entries, environment.observation_shape, name)
        check_mask(environment.entries, base.sizes_of(environment.action_space), name)
    key = base.key_shape()
    observation = jax.ShapeDtypeStruct(tuple(environment.observation_shape), jnp.float32)
    with one_sentence(f"reset of {name}"):
        start, state = jax.eval_shape(environment.reset, key)
    with one_sentence(f"step of {name}"):
        result = _eval_step(environment, key, state)
    scalar, flag = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.bool_)
    checks = [
        ("reset must give an observation", start, observation),
        ("step must give an observation", result.observation, observation),
        ("step must give a reward", result.reward, scalar),
        ("step must give terminated", result.terminated, flag),
        ("step must give truncated", result.truncated, flag),
        ("step must keep the state that reset gives,", result.state, state),
    ]
    if environment.restart is not None:
        with one_sentence(f"restart of {name}"):
            start, after = jax.eval_shape(environment.restart, key, state)
        checks.append(("restart must give an observation", start, observation))
        checks.append(("restart must keep the state that reset gives,", after, state))
    for what, found, expected in checks:
        if differs := _difference(expected, found, with_dtypes=True):
            raise UsageError(f"{name}.{what} of {differs[0]}, got {differs[1]}.")


def _eval_step(environment: Environment, key: Any, state: PyTree) -> Step:
    """Shapes of a step; one that still resets itself, as steps once did, gives or makes a `Step` of six values."""
    try:
        result = jax.eval_shape(environment.step, key, state, base.zero_action(environment.action_space))
        resets_itself = len(result) == 6
    except TypeError as error:
        resets_itself = "Step.__new__" in str(error)
        if not resets_itself:
            raise
    if resets_itself:
        raise UsageError(
            f"{environment.name}.step gives six values, but a step no longer resets itself: give Step(observation, "
            "state, reward, terminated, truncated) of what the action led to, and leave the reset to the trainer."
        )
    return Step(*result)
