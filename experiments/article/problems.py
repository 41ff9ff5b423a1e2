"""The small exact problems of the figures."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.theory import TabularMDP, garnet


def two_state(gamma: float = 0.9) -> tuple[Any, TabularMDP]:
    """Logits and MDP of two states and two actions: a policy is a point in a square."""
    transition = [[[0.9, 0.1], [0.1, 0.9]], [[0.1, 0.9], [0.9, 0.1]]]
    return jnp.array([[0.0, 0.5], [0.0, -0.3]]), make(transition, [[0.0, 1.0], [2.0, 0.0]], [1.0, 0.0], gamma)


def bandit(probability: Any, reward: Any, gamma: float = 0.0) -> tuple[Any, TabularMDP]:
    """Logits and MDP of one state, in which only the choice of an arm counts."""
    return jnp.array(np.log([probability])), make(np.ones((1, len(reward), 1)), [reward], [1.0], gamma)


def make(*fields: Any) -> TabularMDP:
    """A `TabularMDP` from lists: without a program to compile for each."""
    return TabularMDP(*(jnp.array(np.array(field, float)) for field in fields))


def random_problems(count: int, gamma: float = 0.9, seed: int = 0) -> tuple[Any, TabularMDP]:
    """Normal logits [count, 5, 3] and as many random MDPs of 5 states and 3 actions."""
    blocks = [_random_block(seed, block, gamma) for block in range(-(-count // _BLOCK))]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *blocks)


_BLOCK = 100  # of one shape, as random bits of every new one take seconds to compile


@jax.jit
def _random_block(seed: Any, block: Any, gamma: Any) -> tuple[Any, TabularMDP]:
    mdp_key, logits_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), block))
    mdps = jax.vmap(lambda key: garnet(key, 5, 3, 3, gamma))(jax.random.split(mdp_key, _BLOCK))
    return jax.random.normal(logits_key, (_BLOCK, 5, 3)), mdps
