"""sb3-contrib's TRPO: iterations per second at given settings, and its policy update alone at its own."""

import json
import sys
import time
from importlib.metadata import version

import numpy as np
import torch
from sb3_contrib import TRPO
from stable_baselines3.common.env_util import make_vec_env


def prepare(request):
    """Build the agent and train one iteration."""
    settings = {
        "n_steps": request["num_steps"],
        "gamma": request["gamma"],
        "gae_lambda": request["gae_lambda"],
        "cg_max_steps": request["cg_iterations"],
        "cg_damping": request["cg_damping"],
        "target_kl": request["max_kl"],
    }
    environments = make_vec_env(request["env"], n_envs=request["num_envs"], seed=0)
    agent = TRPO("MlpPolicy", environments, device="cpu", seed=0, **settings)
    steps = request["num_envs"] * request["num_steps"]
    agent.learn(steps)
    names = ("sb3-contrib", "stable-baselines3", "torch", "gymnasium", "numpy")
    about = {"versions": {name: version(name) for name in names}, "threads": torch.get_num_threads()}
    return (agent, steps), {"num_envs": request["num_envs"], **settings, **about}


def policy_updates(request):
    """Seconds of policy updates on a batch of the size asked for, at sb3-contrib's own settings, without a critic."""
    num_envs = 64
    environments = make_vec_env(request["env"], n_envs=num_envs, seed=0)
    settings = {"n_steps": request["samples"] // num_envs, "n_critic_updates": 0}
    agent = TRPO("MlpPolicy", environments, device="cpu", seed=0, **settings)
    # One rollout by `learn`, whose update is the warm-up; the updates after it reuse its batch.
    agent.learn(request["samples"])
    seconds = []
    for _ in range(request["repetitions"]):
        start = time.perf_counter()
        # The means of no critic losses are NaN, about which NumPy warns.
        with np.errstate(all="ignore"):
            agent.train()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "cg_max_steps": agent.cg_max_steps}


def main():
    """Answer requests until standard input closes."""
    prepared = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "prepare":
            prepared, answer = prepare(request)
        elif request["do"] == "run":
            agent, steps = prepared
            start = time.perf_counter()
            agent.learn(steps, reset_num_timesteps=False)
            answer = {"seconds": time.perf_counter() - start}
        else:
            answer = policy_updates(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
