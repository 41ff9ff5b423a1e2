"""Saving a state to one file and getting the same bits back, without pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config import UsageError
from trpo_jax.files import write_atomically
from trpo_jax.steps.types import PyTree
from trpo_jax.training.loop import init
from trpo_jax.types import Config

_FORMAT = "trpo_jax state 1"


def save(path: str | os.PathLike[str], state: PyTree) -> None:
    """Write a pytree of arrays to `path`, atomically: the file is either the old one or the new one.

    The file is an npz archive with one array a leaf, named by its path in the tree; typed PRNG keys are stored as
    their raw data and the name of their implementation.

    Raises:
      UsageError: if the file cannot be written.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    keys: dict[str, str] = {}
    for name, leaf in named_leaves(state):
        if is_key(leaf):
            keys[name] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        arrays[name] = np.asarray(leaf)
    arrays["__header__"] = np.frombuffer(json.dumps({"format": _FORMAT, "keys": keys}).encode(), np.uint8)
    write_atomically(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def load(path: str | os.PathLike[str], like: PyTree) -> Any:
    """Read what `save` wrote, bit for bit.

    Args:
      path: the file.
      like: what the file should hold: the `Config` it was trained with, for a `TrainState`; or a pytree of arrays or
        shapes. States of several agents, stacked along leading axes, load with the same `like` as one agent's.

    Returns:
      A pytree of JAX arrays in the structure of `like`.

    Raises:
      UsageError: if the file is missing, damaged, or holds something else, in one sentence that names it.
    """
    path = Path(path)
    if isinstance(like, Config):
        like = jax.eval_shape(init, like, jax.random.key(0))
    arrays, keys = _read(path)
    leaves, batches = [], set()
    for name, target in named_leaves(like):
        if name not in arrays:
            raise UsageError(f"{path} holds no {name}; it was saved with other settings or another version.")
        array = arrays.pop(name)
        if array.dtype.kind == "V" and array.dtype.itemsize == target.dtype.itemsize:
            array = array.view(target.dtype)  # npz forgets the name of bfloat16 and its like, not the bits
        leaf = jax.random.wrap_key_data(jnp.asarray(array), impl=keys[name]) if name in keys else jnp.asarray(array)
        batch_ndim = leaf.ndim - target.ndim
        if batch_ndim < 0 or leaf.shape[batch_ndim:] != target.shape or leaf.dtype != target.dtype:
            raise UsageError(
                f"{name} in {path} is {leaf.dtype}{list(leaf.shape)} where the settings ask for "
                f"{target.dtype}{list(target.shape)}; use the settings it was saved with."
            )
        batches.add(leaf.shape[:batch_ndim])
        leaves.append(leaf)
    if arrays or len(batches) > 1:
        extra = ", ".join(sorted(arrays)) or "leaves of different numbers of agents"
        raise UsageError(f"{path} does not fit these settings (it also holds {extra}); use the ones it was saved with.")
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}  # reading checks each array's CRC
        header = json.loads(bytes(arrays.pop("__header__")))
        if header["format"] != _FORMAT:
            raise UsageError(f"{path} has the format {header['format']!r}, this version reads {_FORMAT!r}.")
        return arrays, header["keys"]
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint {path}.") from None
    except UsageError:
        raise
    except Exception as error:  # zipfile answers each kind of damage with another exception
        raise UsageError(
            f"{path} is damaged or not a checkpoint of trpo_jax ({type(error).__name__}); remove it to fall back on an "
            "earlier one."
        ) from error


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves of a pytree, each with its path as a name."""
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
