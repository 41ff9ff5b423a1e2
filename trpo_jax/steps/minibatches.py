"""Epochs of minibatch steps by an optax optimizer: what first-order methods and the regression of values share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp

from trpo_jax.steps import trees
from trpo_jax.steps.types import Array, PyTree

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
) -> tuple[PyTree, optax.OptState, Array]:
    """Minimise a mean over a batch.

    Minibatch m holds the samples m, m + M, m + 2M, … of the flattened batch: a strided split needs no permutation,
    whose gather costs more than the step.

    Args:
      loss_fn: `loss_fn(params, *minibatch)` -> a scalar.
      params: a pytree.
      optimizer_state: `optimizer.init(params)`, or what the last call returned.
      batch: arrays or pytrees of arrays, [*batch_shape, ...] each.
      batch_shape: shape of the batch.
      optimizer: an optax transformation.
      epochs: passes over the batch (static).
      minibatches: M, which must divide the batch size (static).

    Returns:
      New parameters, new optimizer state, and the mean loss over the last epoch. If any of the new numbers is not
      finite, parameters and state come back as they were.
    """
    import optax  # deferred: only this function pays for it

    batch_size = math.prod(batch_shape)
    chex.assert_is_divisible(batch_size, minibatches)

    def split(leaf: Array) -> Array:
        flat = leaf.reshape(batch_size, *leaf.shape[len(batch_shape) :])
        return jnp.swapaxes(flat.reshape(batch_size // minibatches, minibatches, *flat.shape[1:]), 0, 1)

    batches = jax.tree.map(split, batch)

    def step(carry: tuple, minibatch: tuple) -> tuple[tuple, Array]:
        params, state = carry
        loss, gradient = jax.value_and_grad(loss_fn)(params, *minibatch)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def epoch(carry: tuple, _: None) -> tuple[tuple, Array]:
        return jax.lax.scan(step, carry, batches)

    old = params, optimizer_state
    new, losses = jax.lax.scan(epoch, old, None, length=epochs)
    params, optimizer_state = trees.select(trees.all_finite(new), new, old)
    return params, optimizer_state, jnp.mean(losses[-1])
