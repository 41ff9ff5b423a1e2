"""One large agent on several devices, each of which steps its share of the environments."""

import os

# A CPU can pose as several devices, to try this out. On GPUs or TPUs leave this line out.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax

from trpo_jax import Config, init, shard_environments, train_step

print(jax.devices())
config = Config(
    env="CartPole-v1",
    num_envs=64,  # a multiple of the number of devices
    num_steps=32,
    fisher_fraction=1.0,  # divides the curvature, too; each device repeats that of a small sample
)
state = shard_environments(init(config, jax.random.key(0)))
print("environments:", state.actor.observation.sharding.spec)
print("parameters:", jax.tree.leaves(state.learner.policy_params)[0].sharding.spec)

for iteration in range(20):
    state, metrics = train_step(config, state)
    if iteration % 5 == 4:
        print(f"iteration {iteration + 1}: return {metrics.episode_return:.0f}, KL {metrics.mean_kl:.4f}")
