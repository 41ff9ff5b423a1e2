"""Fitting the value function to λ-returns, and judging the fit."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from trpo_jax.steps import trees
from trpo_jax.steps.types import Array, PyTree


def fit_value_function(
    value_apply: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    optimizer_state: optax.OptState,
    observation: PyTree,
    target: Array,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int,
    minibatches: int,
) -> tuple[PyTree, optax.OptState, Array]:
    """Minimise mean_n[(V(s_n) − target_n)²] by minibatch steps of an optax optimizer.

    Minibatch m holds the samples m, m + M, m + 2M, … of the flattened batch: a strided split needs no permutation,
    whose gather costs more than the step.

    Args:
      value_apply: `value_apply(params, observation)` -> values [B].
      params: parameters of the value function, a pytree.
      optimizer_state: `optimizer.init(params)`, or what the last call returned.
      observation: [B, ...], an array or a pytree of arrays.
      target: [B].
      optimizer: an optax transformation.
      epochs: passes over the batch (static).
      minibatches: M, which must divide the batch size (static).

    Returns:
      New parameters, new optimizer state, and the mean loss over the last epoch. If any of the new numbers is not
      finite, parameters and state come back as they were.
    """
    batch_size = target.size
    chex.assert_is_divisible(batch_size, minibatches)

    def split(leaf: Array) -> Array:
        flat = leaf.reshape(batch_size, *leaf.shape[target.ndim :])
        return jnp.swapaxes(flat.reshape(batch_size // minibatches, minibatches, *flat.shape[1:]), 0, 1)

    batches = jax.tree.map(split, (observation, target))

    def loss_fn(params: PyTree, observation: PyTree, target: Array) -> Array:
        return jnp.mean((value_apply(params, observation) - target) ** 2)

    def step(carry: tuple, batch: tuple) -> tuple[tuple, Array]:
        params, state = carry
        loss, gradient = jax.value_and_grad(loss_fn)(params, *batch)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def epoch(carry: tuple, _: None) -> tuple[tuple, Array]:
        return jax.lax.scan(step, carry, batches)

    old = params, optimizer_state
    new, losses = jax.lax.scan(epoch, old, None, length=epochs)
    params, optimizer_state = trees.select(trees.all_finite(new), new, old)
    return params, optimizer_state, jnp.mean(losses[-1])


def explained_variance(values: Array, targets: Array) -> Array:
    """1 − Var[targets − values] / Var[targets]; 1 is perfect, 0 no better than a constant; 0 for constant targets."""
    variance = jnp.var(targets)
    return jnp.where(variance > 0, 1 - jnp.var(targets - values) / jnp.where(variance > 0, variance, 1), 0)
