"""Leaves of any kind come back from a few wide arrays bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import Countdown, resetting_itself, same_bits, small_config

from trpo_jax import backend, init
from trpo_jax.training.agents import make_agent
from trpo_jax.training.packing import pack, unpack
from trpo_jax.training.rollouts import rollout

N = 3
TREE = {
    "float": jnp.array([[1.5, -0.0], [jnp.nan, jnp.inf], [1e-45, 3.0]]),
    "int": jnp.array([-1, 2**31 - 1, 0], jnp.int32),
    "grid": jnp.arange(N * 6, dtype=jnp.uint32).reshape(N, 2, 3),
    "bool": jnp.array([True, False, True]),
    "pixels": jnp.full((N, 2, 2), 255, jnp.uint8),
    "half": jnp.arange(N, dtype=jnp.bfloat16),
    "large": jnp.zeros((N, 2000)),
    "key": jax.random.split(jax.random.key(0), N),
}


def test_words_of_one_size_share_an_array_unless_they_are_large():
    assert sorted(array.shape for array in pack(TREE)) == [(N,), (N,), (N, 5), (N, 9), (N, 2000)]


def test_all_bits_come_back_with_and_without_a_time_axis():
    assert same_bits(unpack(pack(TREE), TREE), TREE)
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), TREE)
    assert same_bits(unpack(jax.vmap(pack)(twice), TREE), twice)


@pytest.mark.parametrize("own_resets", [False, True])
def test_a_rollout_with_few_kernels_is_the_same_to_the_bit(own_resets, monkeypatch):
    environment = make_agent(small_config(Countdown())).environment
    config = small_config(resetting_itself(environment) if own_resets else environment)
    agent, state = make_agent(config), init(config, jax.random.key(0))
    results = []
    for costly in (False, True):
        monkeypatch.setattr(backend, "launches_are_costly", lambda costly=costly: costly)
        results.append(jax.jit(lambda key: rollout(agent, state.learner, state.actor, key))(jax.random.key(1)))
    assert same_bits(*results)
    assert np.any(results[0][1].terminated)
