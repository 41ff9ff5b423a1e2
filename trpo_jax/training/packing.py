"""Many small arrays as a few wide ones, so that a step of a loop writes them with few kernels."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax.steps.types import Array, PyTree

_WIDEST = 1024  # entries of a leaf; a copy of a larger one takes longer than the launches it saves


def pack(tree: PyTree) -> list[Array]:
    """Put the leaves [N, ...] of a pytree side by side: words of the same size in one array [N, columns].

    Every bit stays as it is. A leaf that is alone in its size, or large, is kept.
    """
    leaves = jax.tree.leaves(tree)
    return [_together([leaves[i] for i in group]) for group in _groups(leaves)]


def unpack(packed: list[Array], like: PyTree) -> PyTree:
    """Take apart what `pack` made of `like` [N, ...], with any axes before N, [..., N, columns]."""
    shapes, structure = jax.tree.flatten(like)
    leaves: list[Any] = [None] * len(shapes)
    for array, group in zip(packed, _groups(shapes), strict=True):
        if len(group) == 1:
            leaves[group[0]] = array
            continue
        start = 0
        for i in group:
            shape, stop = shapes[i].shape, start + math.prod(shapes[i].shape[1:])
            part = array[..., start:stop].reshape(*array.shape[:-1], *shape[1:])
            leaves[i] = part != 0 if shapes[i].dtype == bool else jax.lax.bitcast_convert_type(part, shapes[i].dtype)
            start = stop
    return jax.tree.unflatten(structure, leaves)


def _together(leaves: list[Array]) -> Array:
    if len(leaves) == 1:
        return leaves[0]
    word = f"uint{8 * leaves[0].dtype.itemsize}"
    words = [leaf.astype(word) if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, word) for leaf in leaves]
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in words], axis=1)


def _groups(leaves: list[Any]) -> list[list[int]]:
    """Indices of the leaves that share an array."""
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        words = leaf.dtype == bool or any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.integer, jnp.floating))
        alone = not words or math.prod(leaf.shape[1:]) > _WIDEST
        groups.setdefault(("alone", i) if alone else leaf.dtype.itemsize, []).append(i)
    return list(groups.values())
