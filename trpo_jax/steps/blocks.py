"""Forward pass and gradient of a large batch, in blocks where these fit a processor's cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax import backend
from trpo_jax.steps.trees import check_batched
from trpo_jax.steps.types import Array, PyTree

_BLOCK = 8192  # samples; two hidden layers of 64 then take 4 MB
_FROM = 4 * _BLOCK  # smaller batches gain nothing


def forward_and_gradient(
    apply: Callable[[PyTree, PyTree], Any],
    params: PyTree,
    observation: PyTree,
    cotangent: Callable[..., Any],
    *others: Array,
) -> tuple[Any, PyTree]:
    """Evaluate a network on a batch and pull the gradient of a batch mean back to its parameters, in one pass.

    A flat batch [B] consists of independent samples: on CPU a large one is processed in blocks, which is up to twice as
    fast and needs the memory of one block. A batch of higher rank, such as [T, N], is processed whole.

    Args:
      apply: `apply(params, observation)` -> outputs.
      params: a pytree.
      observation: [B, ...], an array or a pytree of arrays.
      cotangent: `cotangent(outputs, *others)` -> the gradient of a mean over the batch with respect to the outputs.
      others: further arguments of `cotangent`, each [B, ...]; the first has the shape of the batch.

    Returns:
      The outputs and the gradient, a pytree like params.
    """

    def one(observation: PyTree, *others: Array) -> tuple[Any, PyTree]:
        outputs, pull_back = jax.vjp(lambda p: apply(p, observation), params)
        check_batched(outputs, others[0].shape)
        (gradient,) = pull_back(cotangent(outputs, *others))
        return outputs, gradient

    blocks = _number_of_blocks(others[0].shape)
    if blocks == 1:
        return one(observation, *others)

    def add(total: PyTree, block: tuple[Any, ...]) -> tuple[PyTree, Any]:
        outputs, gradient = one(*block)
        return jax.tree.map(lambda t, g: t + g / blocks, total, gradient), outputs

    split = jax.tree.map(lambda leaf: leaf.reshape(blocks, -1, *leaf.shape[1:]), (observation, *others))
    gradient, outputs = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), split)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs), gradient


def _number_of_blocks(shape: tuple[int, ...]) -> int:
    """The largest number of equal blocks of at least _BLOCK samples; 1 where blocks bring no gain."""
    size = math.prod(shape)
    if len(shape) != 1 or size < _FROM or not backend.blocks_stay_in_cache():
        return 1
    return next(count for count in range(size // _BLOCK, 0, -1) if size % count == 0)
