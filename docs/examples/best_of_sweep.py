"""A sweep in a folder that keeps its agents: load the best one, then evaluate it on other episodes."""

import jax

from trpo_jax import evaluate, interquartile_mean, load_agent, run_sweep
from trpo_jax.sweeps.grids import Spec
from trpo_jax.sweeps.storage import Folder

spec = Spec(
    base={"env": "CartPole-v1", "num_envs": 8, "num_steps": 128, "num_iterations": 25},
    grid={"max_kl": [0.003, 0.03], "gae_lambda": [0.9, 0.98]},
    num_seeds=3,
    num_episodes=16,  # that score each agent when its training has ended
    keep="best",  # the trained state of the best agent per point; "all" keeps every agent
)
print(run_sweep("sweeps/kept", spec))  # the same call continues a sweep that was stopped

columns = ["point", "max_kl", "gae_lambda", "seed", "final_return"]
rows = Folder("sweeps/kept").read_results(columns).to_pylist()
for point in range(4):
    own = [row for row in rows if row["point"] == point]
    returns = [row["final_return"] for row in own]
    print(own[0]["max_kl"], own[0]["gae_lambda"], "IQM:", interquartile_mean(returns), returns)

config, agent = load_agent("sweeps/kept")  # the best of all; (folder, point, seed) names another
print("the best has max_kl", config.max_kl, "and gae_lambda", config.gae_lambda)
print("it was chosen with", max(row["final_return"] for row in rows))

# The best of many noisy scores overstates itself: evaluate it on episodes that did not choose it.
fresh = evaluate(config, agent, jax.random.key(1), num_episodes=64).episode_return
print("on fresh episodes:", fresh.mean(), "±", fresh.std() / 8)
