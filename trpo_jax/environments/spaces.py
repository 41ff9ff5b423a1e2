"""Spaces as other libraries declare them: gymnax, Gymnasium, and whatever looks like theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from trpo_jax.environments.base import Discrete, MultiDiscrete, Space, make_box
from trpo_jax.sentences import UsageError, shown


def action_space(space: Any, name: str) -> tuple[Space, Callable[[Any], Any]]:
    """Our space, and the function that turns the policy's action, of NumPy or JAX, into the one that `name` takes."""
    shape, dtype = tuple(getattr(space, "shape", None) or ()), getattr(space, "dtype", None) or np.float32
    start, children = getattr(space, "start", 0), getattr(space, "spaces", None)
    if is_choice(space):
        return Discrete(int(space.n)), lambda action: action + start
    if hasattr(space, "nvec") or hasattr(space, "n"):  # a MultiDiscrete, or a MultiBinary of 0 and 1
        sizes = np.asarray(getattr(space, "nvec", np.full(shape, 2)))
        return MultiDiscrete(tuple(map(int, sizes.ravel()))), lambda action: action.reshape(sizes.shape) + start
    if hasattr(space, "low") and hasattr(space, "high"):
        whole = not jnp.issubdtype(dtype, jnp.floating)

        def place(action: Any) -> Any:  # of whole numbers the nearest
            action = action.reshape(shape)
            return action.round().astype(dtype) if whole else action

        return make_box(space.low, space.high, shape), place
    if isinstance(children, (tuple, list)) and all(map(is_choice, children)) and type(space).__name__ != "OneOf":
        starts = [getattr(child, "start", 0) for child in children]
        return MultiDiscrete(tuple(int(child.n) for child in children)), lambda action: tuple(
            action[k] + first for k, first in enumerate(starts)
        )
    kinds = "Discrete, MultiDiscrete, MultiBinary, a Tuple of Discrete, and Box"
    raise UsageError(f"actions of {name} lie in {shown(space)}; {kinds} can be trained.")


def is_choice(space: Any) -> bool:
    """Whether a space is one choice among n, of whichever library; a MultiBinary has an n, too."""
    return hasattr(space, "n") and not getattr(space, "shape", None)


def picture_scale(dtype: Any, shape: tuple[int, ...], low: Any = None, high: Any = None) -> float:
    """What a declared observation is divided by, so that bytes arrive in [0, 1]; 1 for all that are not bytes.

    Bytes are what is of dtype uint8, and what has three axes and bounds of 0 and 255.

    Args:
      dtype: of the observation.
      shape: of the observation.
      low: its least values, if they are known.
      high: its greatest.
    """
    try:
        bounds = np.asarray(low, np.float64), np.asarray(high, np.float64)
    except (TypeError, ValueError):  # traced, say
        bounds = np.full((), np.nan), np.full((), np.nan)
    greatest = np.max(bounds[1], initial=0.0)
    if np.dtype(dtype) == np.uint8:
        return max(float(greatest), 1.0) if np.isfinite(greatest) else 255.0
    return 255.0 if len(shape) == 3 and (bounds[0] == 0).all() and (bounds[1] == 255).all() else 1.0
