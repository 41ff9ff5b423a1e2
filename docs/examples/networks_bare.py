"""Networks of your own without any library: parameters in a dict, and functions of them."""

import jax
import jax.numpy as jnp

from trpo_jax import Config, DiagonalGaussian, Network, train


def dense(key, inputs, outputs, scale=1.0):
    """Parameters of a layer."""
    kernel = scale * jax.random.normal(key, (inputs, outputs)) / inputs**0.5
    return {"w": kernel, "b": jnp.zeros(outputs)}


def policy_init(key, observation):
    """`observation` is a single one, here [3] of Pendulum."""
    first, last = jax.random.split(key)
    return {"hidden": dense(first, 3, 64), "mean": dense(last, 64, 1, 0.01), "log_std": jnp.zeros(1)}


def policy_apply(params, observation):
    """`observation` has any leading batch axes, [..., 3]."""
    x = jnp.tanh(observation @ params["hidden"]["w"] + params["hidden"]["b"])
    return DiagonalGaussian(x @ params["mean"]["w"] + params["mean"]["b"], params["log_std"])


def value_init(key, observation):
    """The value function has parameters of its own."""
    first, last = jax.random.split(key)
    return {"hidden": dense(first, 3, 64), "last": dense(last, 64, 1)}


def value_apply(params, observation):
    """Values [...], without a last axis of 1."""
    x = jnp.tanh(observation @ params["hidden"]["w"] + params["hidden"]["b"])
    return (x @ params["last"]["w"] + params["last"]["b"])[..., 0]


config = Config(
    env="Pendulum-v1",
    policy=Network(policy_init, policy_apply),
    value=Network(value_init, value_apply),
    gamma=0.95,
    num_iterations=30,
)
state, metrics = jax.jit(train)(config, jax.random.key(0))
print("returns:", metrics.episode_return[::10], metrics.episode_return[-1])
print("σ at the end:", jnp.exp(state.learner.policy_params["log_std"]))
