"""A sweep in memory that keeps its agents: choose the best one, then judge it on other episodes."""

import itertools

import jax
import jax.numpy as jnp

from trpo_jax import Config, evaluate, interquartile_mean, train

config = Config(env="CartPole-v1", num_envs=8, num_steps=128, num_iterations=25)
points = list(itertools.product([0.003, 0.03], [0.9, 0.98]))  # max_kl, gae_lambda
max_kl, gae_lambda = jnp.array(points).T
keys = jax.random.split(jax.random.key(0), 3)


def run(max_kl, gae_lambda, key):
    """One agent, trained and evaluated: its state is kept, which `sweep` does not do."""
    key_train, key_choose = jax.random.split(key)
    changed = config.replace(max_kl=max_kl, gae_lambda=gae_lambda)
    state, _ = train(changed, key_train)
    return state, evaluate(changed, state, key_choose, num_episodes=16).episode_return.mean()


over_seeds = jax.vmap(run, in_axes=(None, None, 0))
states, score = jax.jit(jax.vmap(over_seeds, in_axes=(0, 0, None)))(max_kl, gae_lambda, keys)

for point, scores in zip(points, score, strict=True):  # score: [points, seeds]
    print("max_kl {}, gae_lambda {}: IQM {:.0f}".format(*point, interquartile_mean(scores)), scores)

best = jnp.unravel_index(jnp.argmax(score), score.shape)
agent = jax.tree.map(lambda leaf: leaf[best], states)
print("best agent:", points[int(best[0])], "seed", int(best[1]), "chosen with", score[best])

# The best of many noisy scores overstates itself, so judge it on episodes that did not choose it.
fresh = evaluate(config, agent, jax.random.key(1), num_episodes=64).episode_return
print("on fresh episodes:", fresh.mean(), "±", fresh.std() / 8)
