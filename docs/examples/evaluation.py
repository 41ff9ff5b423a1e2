"""Evaluation during training, early stop, and evaluation of what was trained."""

import jax
import jax.numpy as jnp

from trpo_jax import Config, evaluate, load, save, train

config = Config(
    env="CartPole-v1",
    num_iterations=20,
    eval_every=5,  # iterations from one evaluation to the next
    eval_episodes=16,
    stop_at_return=475.0,  # training of an agent ends once an evaluation has this mean return
)
keys = jax.random.split(jax.random.key(0), 2)
states, metrics, evaluations = jax.jit(jax.vmap(train, in_axes=(None, 0)))(config, keys)

print(evaluations.episode_return.shape)  # (2, 4, 16): agents, evaluations, episodes
print("mean returns:", jnp.round(evaluations.episode_return.mean(axis=-1)))
print("iterations until the stop:", states.iteration)

# Evaluate on fresh episodes: the evaluation that stopped an agent did so because it was good.
evaluate_all = jax.jit(jax.vmap(lambda state, key: evaluate(config, state, key, num_episodes=32)))
final = evaluate_all(states, jax.random.split(jax.random.key(1), 2))
print("on 32 fresh episodes:", final.episode_return.mean(axis=-1))
print("all of them finished:", final.finished.all())

# By sampled actions in place of the most likely ones.
agent = jax.tree.map(lambda leaf: leaf[0], states)
sampled = evaluate(config, agent, jax.random.key(2), num_episodes=16, deterministic=False)
print("with sampled actions:", sampled.episode_return.mean())

save("agent.npz", agent)  # arrays alone, no pickle
again = load("agent.npz", config)
print("loaded at iteration", again.iteration)
