"""Code as users write it: a type checker finds what the marked lines have wrong, and nothing else."""

import functools

import jax
import jax.numpy as jnp

from trpo_jax import Algorithm, Config, Metrics, TrainState, evaluate, init, train, train_step
from trpo_jax.steps.types import typed_jit


def make(config: Config) -> Algorithm:
    raise NotImplementedError  # this file is read by type checkers and never runs


key = jax.random.key(0)
config = Config(env="Pendulum-v1", update="ppo", max_kl=0.1, gamma=jnp.array([0.9, 0.99]), hidden=(64, 64))
config = Config(update=make, env_args={"gravity": 9.81}, randomize={"length": (0.4, 0.6)})
Config(update="trop")  # error: arg-type
Config(max_kll=0.1)  # error: call-arg
Config(max_kl="0.1")  # error: arg-type
Config(num_envs=2.5)  # error: arg-type
Config(network="resnet")  # error: arg-type
Config(value_fit=make)  # error: arg-type
Config(policy=jnp.tanh)  # error: arg-type

longer: Config = config.replace(num_iterations=300, value_fit="adam").replace(max_kl=jnp.float32(0.1))
config.replace(max_kll=0.1)  # error: call-arg
config.replace(max_kl="0.1")  # error: arg-type
config.replace(constraint="kl")  # error: arg-type
config.max_kl = 0.1  # error: misc

state, metrics = train(config, key)
steps: jax.Array = metrics.episode_length
_ = metrics.episode_lenght  # error: attr-defined
state, metrics, evaluation = train(config.replace(eval_every=10), key)
states, metrics = jax.vmap(train, in_axes=(None, 0))(config, jax.random.split(key, 4))
_ = states.lerner  # error: attr-defined
states, metrics = typed_jit(jax.vmap(train, in_axes=(None, 0)))(config, jax.random.split(key, 4))
_ = metrics.mean_kll  # error: attr-defined
state, metrics, *_ = typed_jit(functools.partial(train, config, every=10))(key)
_ = state.iterations  # error: attr-defined
typed_jit(train)(config, 0)  # error: arg-type
state, metrics = jax.jit(train)(config, key)  # JAX declares that what comes back may be anything
compiled: tuple[TrainState, Metrics] = jax.jit(train)(config, key)

state, metrics = train_step(config, init(config, key))
_ = metrics.divergance  # error: attr-defined
train_step(config, key)  # error: arg-type
score: float = evaluate(config, state, key).episode_return.mean().item()
evaluate(config, state, key, episodes=3)  # error: call-arg
