"""A large flat batch in blocks gives what the whole gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trpo_jax import Categorical, gauss_newton_fit, trpo_update
from trpo_jax.steps import blocks
from trpo_jax.steps.blocks import forward_and_gradient


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK", 8)
    monkeypatch.setattr(blocks, "_FROM", 32)


@pytest.mark.parametrize(
    "shape, count", [((31,), 1), ((32,), 4), ((33,), 3), ((37,), 1), ((40,), 5), ((48,), 6), ((8, 8), 1)]
)
def test_blocks_are_equal_and_no_smaller_than_asked_for(shape, count):
    assert blocks._number_of_blocks(shape) == (count if jax.default_backend() == "cpu" else 1)


def batch(size, x64):
    keys = jax.random.split(jax.random.key(0), 4)
    observation = {"a": jax.random.normal(keys[0], (size, 3)), "b": jax.random.normal(keys[1], (size, 2, 2))}
    params = {"a": jax.random.normal(keys[2], (3, 2)), "b": jax.random.normal(keys[3], (4, 2))}
    return params, observation


def logits(params, observation):
    return jnp.tanh(observation["a"] @ params["a"]) + observation["b"].reshape(-1, 4) @ params["b"]


def test_outputs_and_gradient_are_those_of_the_whole(x64):
    params, observation = batch(48, x64)
    weight = jnp.linspace(-1, 2, 48)

    def cotangent(outputs, weight):  # of mean(weight · ½ Σ outputs²)
        return weight[:, None] * outputs / outputs.shape[0]

    outputs, gradient = forward_and_gradient(logits, params, observation, cotangent, weight)
    np.testing.assert_allclose(outputs, logits(params, observation), rtol=1e-12)
    expected = jax.grad(lambda p: jnp.mean(weight * 0.5 * jnp.sum(logits(p, observation) ** 2, axis=-1)))(params)
    for name in params:
        np.testing.assert_allclose(gradient[name], expected[name], rtol=1e-12)


def test_updates_are_those_of_the_whole(x64, monkeypatch):
    params, observation = batch(48, x64)
    action = jax.random.bernoulli(jax.random.key(5), 0.4, (48,)).astype(jnp.int32)
    advantage = jax.random.normal(jax.random.key(6), (48,))

    def policy_apply(params, observation):
        return Categorical(logits(params, observation))

    def value_apply(params, observation):
        return logits(params, observation)[:, 0]

    def both():
        policy, info = trpo_update(policy_apply, params, observation, action, advantage)
        value, loss = gauss_newton_fit(value_apply, params, observation, advantage)
        return policy, info, value, loss

    in_blocks = jax.jit(lambda: both())()
    monkeypatch.setattr(blocks, "_FROM", 1000)
    whole = jax.jit(lambda: both())()
    assert in_blocks[1].accepted
    for a, b in zip(jax.tree.leaves(in_blocks), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
