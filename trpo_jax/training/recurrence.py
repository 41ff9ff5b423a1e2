"""Networks with a memory: one step at a time while acting, whole sequences while learning.

A network without a memory passes through all of it with the empty carry `()`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trpo_jax.steps.types import Array, PyTree
from trpo_jax.types import Network


class Sequence(NamedTuple):
    """What a recurrent network is evaluated on: T steps of each of N environments, whole, as one sample each.

    Attributes:
      observation: [N, T, ...].
      start: whether an episode begins with this observation, so that the memory starts anew, bool [N, T].
      carry: the memory before the first observation, [N, ...].
    """

    observation: Array
    start: Array
    carry: PyTree


def initial_carries(network: Network, num_envs: int) -> PyTree:
    """The memory at the start of N episodes, [N, ...]."""
    if network.initial_carry is None:
        return ()
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_envs, *jnp.shape(leaf))), network.initial_carry())


def advance(network: Network, params: PyTree, carry: PyTree, observation: Array) -> tuple[PyTree, Any]:
    """One observation of each of N environments: their memory after it, and the output."""
    if network.initial_carry is None:
        return carry, network.apply(params, observation)
    return network.apply(params, carry, observation)


def restart(network: Network, done: Array, carry: PyTree) -> PyTree:
    """The memory of an episode's start where `done`, bool [N]."""
    if network.initial_carry is None:
        return carry
    fresh = initial_carries(network, done.shape[0])

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(done.reshape(done.shape + (1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, fresh, carry)


def unroll(network: Network, params: PyTree, sequence: Sequence) -> tuple[Any, PyTree]:
    """Outputs and the memory after each step, both [N, T, ...]."""

    def step(carry: PyTree, inputs: tuple[Array, Array]) -> tuple[PyTree, tuple[Any, PyTree]]:
        observation, start = inputs
        carry, output = advance(network, params, restart(network, start, carry), observation)
        return carry, (output, carry)

    over_time = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), (sequence.observation, sequence.start))
    _, results = jax.lax.scan(step, sequence.carry, over_time)
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), results)


def starts(terminated: Array, truncated: Array) -> Array:
    """Where episodes begin within a rollout, [T, N] like its arguments: after each end.

    Not at its first step: where the rollout before ended an episode, the carry is that of a fresh one already.
    """
    done = terminated | truncated
    return jnp.concatenate([jnp.zeros_like(done[:1]), done[:-1]])
