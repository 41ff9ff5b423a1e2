"""Epochs of minibatch steps with an optax optimizer, for the first-order methods and the value fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from trpo_jax.steps import trees
from trpo_jax.steps.types import Array, PyTree, Scalar, check_count, check_scalars

if TYPE_CHECKING:
    import optax


def minibatch_descent(
    loss_fn: Callable[..., Array],
    params: PyTree,
    optimizer_state: optax.OptState,
    batch: tuple[Any, ...],
    batch_shape: tuple[int, ...],
    *,
    optimizer: optax.GradientTransformation,
    epochs: int,
    minibatches: int,
    key: Array | None = None,
    max_grad_norm: Scalar = 0.0,
) -> tuple[PyTree, optax.OptState, Array]:
    """Minimise the mean loss over a batch by epochs of minibatch steps.

    Args:
      loss_fn: `loss_fn(params, *minibatch)` -> a scalar.
      params: a pytree.
      optimizer_state: `optimizer.init(params)`, or the state that the last call returned.
      batch: arrays or pytrees of arrays, [*batch_shape, ...] each.
      batch_shape: shape of the batch.
      optimizer: an optax transformation.
      epochs: passes over the batch (static).
      minibatches: M, which must divide the batch size (static).
      key: PRNG key that reshuffles the samples in every epoch. None: minibatch m of every epoch holds the samples m,
        m + M, m + 2M, … of the flattened batch.
      max_grad_norm: c > 0: a minibatch's gradient longer than c is scaled to ‖g‖₂ = c before the optimizer's step. 0:
        no limit.

    Returns:
      New parameters, new optimizer state, and the mean loss over the last epoch. If any of the new numbers is not
      finite, parameters and state are returned unchanged.

    Raises:
      ValueError: if `epochs` or `minibatches` is not a whole number ≥ 1, or M does not divide the batch size.
    """
    import optax  # deferred: only this function pays for it

    check_count("epochs", epochs)
    check_count("minibatches", minibatches)
    check_scalars(max_grad_norm=max_grad_norm)
    batch_size = math.prod(batch_shape)
    if batch_size % minibatches:
        raise ValueError(f"minibatches must divide the {batch_size} samples of the batch, got {minibatches}")
    # A NumPy array would not take a traced index.
    samples = jax.tree.map(lambda x: jnp.asarray(x).reshape(batch_size, *jnp.shape(x)[len(batch_shape) :]), batch)

    def step(carry: tuple[Any, ...], index: Array) -> tuple[tuple[Any, ...], Array]:
        params, state = carry
        loss, gradient = jax.value_and_grad(loss_fn)(params, *jax.tree.map(lambda leaf: leaf[index], samples))
        updates, state = optimizer.update(clip_norm(gradient, max_grad_norm), state, params)
        return (optax.apply_updates(params, updates), state), loss

    def epoch(carry: tuple[Any, ...], number: Array) -> tuple[tuple[Any, ...], Array]:
        if key is None or minibatches == 1:
            parts = jnp.arange(batch_size).reshape(-1, minibatches).T
        else:
            parts = shuffled(jax.random.fold_in(key, number), batch_size).reshape(minibatches, -1)
        return jax.lax.scan(step, carry, parts)

    old = params, optimizer_state
    new, losses = jax.lax.scan(epoch, old, jnp.arange(epochs))
    params, optimizer_state = trees.select(trees.all_finite(new), new, old)
    return params, optimizer_state, jnp.mean(losses[-1])


def shuffled(key: Array, size: int) -> Array:
    """Shuffle the numbers 0 … size − 1, by one sort of random words whose lowest bits are the number.

    Takes a third of the time of `jax.random.permutation`. Words that agree in all other bits stay in order and side by
    side, which affects minibatches only where a boundary falls between them.
    """
    bits = (size - 1).bit_length()
    words = jax.random.bits(key, (size,), jnp.uint32) >> bits << bits
    return (jnp.sort(words | jnp.arange(size, dtype=jnp.uint32)) & (2**bits - 1)).astype(jnp.int32)


def clip_norm(gradient: PyTree, max_norm: Scalar) -> PyTree:
    """Scale a gradient: g · min(1, c / ‖g‖₂), or g if c is 0. A norm that overflows gives 0 or NaN."""
    norm = trees.norm(gradient)
    clips = (jnp.asarray(max_norm) > 0) & (norm > max_norm)
    scale = jnp.where(clips, max_norm / jnp.where(clips, norm, 1), 1)
    return jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), gradient)
