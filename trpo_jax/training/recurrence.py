"""Networks over time: one step at a time while acting, whole sequences while learning.

A network that is not recurrent has the empty carry `()`, and evaluates a batch of any shape in one step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trpo_jax.networks.recurrent import RecurrentNetwork
from trpo_jax.steps.types import Array, PyTree


class Sequence(NamedTuple):
    """The input of a network.

    Attributes:
      observation: [B, ...]; for recurrent networks T whole steps of each of N environments, [N, T, ...].
      start: whether an episode begins with this observation and the recurrent state is reset, bool [N, T]; None if the
        network is not recurrent.
      carry: the recurrent state before the first observation, [N, ...].
    """

    observation: Array
    start: Array | None
    carry: PyTree


def initial_carries(network: RecurrentNetwork, num_envs: int) -> PyTree:
    """The recurrent state at the start of N episodes, [N, ...]."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_envs, *jnp.shape(leaf))), network.initial_carry())


def restart(network: RecurrentNetwork, done: Array, carry: PyTree) -> PyTree:
    """Reset the recurrent state where `done`, bool [N]."""

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(done.reshape(done.shape + (1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, initial_carries(network, done.shape[0]), carry)


def unroll(network: RecurrentNetwork, params: PyTree, sequence: Sequence) -> tuple[PyTree, Any]:
    """Compute the recurrent state after each step and the outputs, both [N, T, ...]; if not recurrent, in any shape."""
    if not network.is_recurrent:
        return network.step(params, sequence.carry, sequence.observation)

    def step(carry: PyTree, inputs: tuple[Array, Array]) -> tuple[PyTree, tuple[PyTree, Any]]:
        observation, start = inputs
        carry, output = network.step(params, restart(network, start, carry), observation)
        return carry, (carry, output)

    over_time = jax.tree.map(swap_time_axis, (sequence.observation, sequence.start))
    _, results = jax.lax.scan(step, sequence.carry, over_time)
    return jax.tree.map(swap_time_axis, results)


def outputs_of(network: RecurrentNetwork) -> Any:
    """Make `apply(params, sequence)` -> the outputs of a network on a batch."""
    return lambda params, sequence: unroll(network, params, sequence)[1]


def starts(terminated: Array, truncated: Array) -> Array:
    """Where episodes begin within a rollout, [T, N] like its arguments: after each end.

    The first step is not marked: if the rollout before it ended an episode, the carry is reset already.
    """
    done = terminated | truncated
    return jnp.concatenate([jnp.zeros_like(done[:1]), done[:-1]])


def swap_time_axis(leaf: Array) -> Array:
    """[T, N, ...] <-> [N, T, ...]."""
    return jnp.swapaxes(leaf, 0, 1)


def flatten_batch(leaf: Array) -> Array:
    """[T, N, ...] -> [N·T, ...], environment by environment."""
    return jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])
