"""Problems with known numbers, and random ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.theory import TabularMDP, garnet


def two_state():
    """Logits and MDP whose numbers were computed by an independent program."""
    transition = jnp.array([[[0.9, 0.1], [0.1, 0.9]], [[0.1, 0.9], [0.9, 0.1]]])
    mdp = TabularMDP(transition, jnp.array([[0.0, 1.0], [2.0, 0.0]]), jnp.array([1.0, 0.0]), jnp.array(0.9))
    return jnp.array([[0.0, 0.5], [0.0, -0.3]]), mdp


def bandit():
    """Three arms, probabilities (.5, .3, .2), rewards (1, 0, 2)."""
    mdp = TabularMDP(jnp.ones((1, 3, 1)), jnp.array([[1.0, 0.0, 2.0]]), jnp.ones(1), jnp.array(0.0))
    return jnp.log(jnp.array([[0.5, 0.3, 0.2]])), mdp


@functools.cache
def _garnets():
    # One compilation for all tests: random bits of every new shape take seconds.
    keys = jax.random.split(jax.random.key(0), 2500)
    return jax.jit(jax.vmap(lambda key: garnet(key, 5, 3, 3, 0.9)))(keys)


def random_mdps(count, gamma=0.9):
    """At most 2500 MDPs of 5 states, 3 actions and 3 successors each, with a leading axis of length count."""
    mdps = jax.tree.map(lambda leaf: np.asarray(leaf[:count]), _garnets())
    return dataclasses.replace(mdps, gamma=np.full(count, gamma))


def random_logits(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape)
