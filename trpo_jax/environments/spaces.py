"""Conversion of spaces that other libraries declare: gymnax, Gymnasium, and those with similar ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.environments.base import Discrete, MultiDiscrete, Space, make_box
from trpo_jax.sentences import UsageError, shown


def action_space(space: Any, name: str) -> tuple[Space, Callable[[Any], Any]]:
    """Our space, and the function that converts the policy's action, of NumPy or JAX, to the one that `name` takes."""
    shape, dtype = tuple(getattr(space, "shape", None) or ()), getattr(space, "dtype", None) or np.float32
    start, children = getattr(space, "start", 0), getattr(space, "spaces", None)
    if is_choice(space):
        return Discrete(int(space.n)), lambda action: action + start
    if hasattr(space, "nvec") or hasattr(space, "n"):  # a MultiDiscrete, or a MultiBinary of 0 and 1
        sizes = np.asarray(getattr(space, "nvec", np.full(shape, 2)))
        return MultiDiscrete(tuple(map(int, sizes.ravel()))), lambda action: action.reshape(sizes.shape) + start
    if hasattr(space, "low") and hasattr(space, "high"):
        whole = not jnp.issubdtype(dtype, jnp.floating)

        def place(action: Any) -> Any:  # rounded if whole
            action = action.reshape(shape)
            return action.round().astype(dtype) if whole else action

        return make_box(space.low, space.high, shape), place
    if isinstance(children, (tuple, list)) and all(map(is_choice, children)) and type(space).__name__ != "OneOf":
        starts = [getattr(child, "start", 0) for child in children]
        return MultiDiscrete(tuple(int(child.n) for child in children)), lambda action: tuple(
            action[k] + first for k, first in enumerate(starts)
        )
    kinds = "Discrete, MultiDiscrete, MultiBinary, a Tuple of Discrete, and Box"
    raise UsageError(f"actions of {name} lie in {shown(space)}; only {kinds} can be trained.")


def is_choice(space: Any) -> bool:
    """Whether a space is one choice among n, in any library; a MultiBinary has an n, too."""
    return hasattr(space, "n") and not getattr(space, "shape", None)


def picture_scale(dtype: Any, shape: tuple[int, ...], low: Any = None, high: Any = None) -> float:
    """The divisor that brings bytes in a declared observation to [0, 1]; 1 for all other observations.

    Bytes are observations of dtype uint8, and those with three axes and bounds of 0 and 255.

    Args:
      dtype: dtype of the observation.
      shape: shape of the observation.
      low: its lower bounds, if they are known.
      high: its upper bounds.
    """
    try:
        bounds = np.asarray(low, np.float64), np.asarray(high, np.float64)
    except (TypeError, ValueError):  # such as traced bounds
        bounds = np.full((), np.nan), np.full((), np.nan)
    greatest = np.max(bounds[1], initial=0.0)
    if np.dtype(dtype) == np.uint8:
        return max(float(greatest), 1.0) if np.isfinite(greatest) else 255.0
    return 255.0 if len(shape) == 3 and (bounds[0] == 0).all() and (bounds[1] == 255).all() else 1.0


def observer(declared: Any, name: str) -> Callable[[Any], Any]:
    """Make the function that converts an observation to float32: indices to unit vectors, and bytes to [0, 1].

    It converts a dictionary entry by entry.
    """
    categories = int(declared.n) if is_choice(declared) else None

    def observe(observation: Any) -> Any:
        if isinstance(observation, Mapping):
            spaces = getattr(declared, "spaces", None)
            of = spaces if isinstance(spaces, Mapping) else {}
            return {k: observer(of.get(k), f"{name}, entry {k},")(part) for k, part in observation.items()}
        if not isinstance(observation, (jax.Array, np.ndarray, np.generic, int, float)):
            raise UsageError(f"observations of {name} must be single arrays, got a {type(observation).__name__}.")
        if categories is not None:
            index = jnp.asarray(observation, jnp.int32) - getattr(declared, "start", 0)
            return jax.nn.one_hot(index, categories, dtype=jnp.float32)
        observation = jnp.asarray(observation)
        if not (jnp.issubdtype(observation.dtype, jnp.number) or observation.dtype == bool) or observation.size == 0:
            raise UsageError(f"observations of {name} must be numbers, got {observation.dtype}{observation.shape}.")
        if jnp.iscomplexobj(observation):
            raise UsageError(f"observations of {name} are complex; give their real and imaginary parts separately.")
        bounds = getattr(declared, "low", None), getattr(declared, "high", None)
        dtypes = getattr(declared, "dtype", None), observation.dtype
        scale = picture_scale(jnp.uint8 if jnp.uint8 in dtypes else jnp.float32, observation.shape, *bounds)
        return jnp.asarray(observation, jnp.float32) / scale if scale != 1 else jnp.asarray(observation, jnp.float32)

    return observe
