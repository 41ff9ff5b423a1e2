"""Seeds x settings x gravity in one compiled program."""

import jax
import jax.numpy as jnp

from trpo_jax import Config, train

config = Config(env="CartPole-v1", num_envs=8, num_steps=64, num_iterations=10)


def run(key, max_kl, gravity):
    """One agent."""
    return train(config.replace(max_kl=max_kl, env_args={"gravity": gravity}), key)


over_gravity = jax.vmap(run, in_axes=(None, None, 0))
over_settings = jax.vmap(over_gravity, in_axes=(None, 0, None))
over_seeds = jax.vmap(over_settings, in_axes=(0, None, None))

keys = jax.random.split(jax.random.key(0), 2)
deltas = jnp.array([0.003, 0.03])
gravities = [5.0, 9.8, 20.0]
states, metrics = jax.jit(over_seeds)(keys, deltas, jnp.array(gravities))

print(metrics.episode_return.shape)  # (2, 2, 3, 10): seeds, settings, gravities, iterations
last = metrics.episode_return[..., -1].mean(axis=0)  # over seeds
for delta, returns in zip(deltas, last, strict=True):
    print(f"max_kl {delta:.3f}:", dict(zip(gravities, returns.round().tolist(), strict=True)))

# The states are stacked in the same way; one agent is a slice of every leaf.
agent = jax.tree.map(lambda leaf: leaf[0, 1, 2], states)
print(agent.iteration)
