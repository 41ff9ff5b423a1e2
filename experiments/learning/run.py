"""Train classic-control tasks over many seeds and record how well the policies do.

    python experiments/learning/run.py [defaults | options | resets] [--num-seeds 64] [--output runs/learning]

`defaults`: the default settings on several tasks. `options`: each of the trainer's variants and baselines on CartPole.
`resets`: starts drawn anew for every episode against starts drawn once for each environment (`cache_resets`).
All seeds of a task are one vmapped program. Each final policy is judged by its deterministic mode on fresh episodes.
"""

import argparse
import functools
import itertools
import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

import trpo_jax

EPISODES = 64
TASKS: list[dict[str, Any]] = [
    {"env": "CartPole-v1", "steps": 100_000, "solved": 475},
    {"env": "CartPole-v1", "steps": 300_000, "solved": 475},
    {"env": "Acrobot-v1", "steps": 100_000, "solved": -100},
    {"env": "Pendulum-v1", "steps": 200_000, "solved": -300, "settings": {"gamma": 0.9}},
]
OPTIONS: dict[str, dict[str, Any]] = {
    "TRPO (the defaults)": {},
    "max KL bounded": {"constraint": "max-kl"},
    "reverse KL bounded": {"constraint": "reverse-kl"},
    "radius by the gain ratio": {"radius_rule": "ratio"},
    "radius by the divergence": {"radius_rule": "divergence"},
    "radius annealed": {"anneal_max_kl": 1.0},
    "entropy bonus": {"entropy_coefficient": 0.01},
    "reuse of 2 batches": {"reuse": 2},
    "reuse of 4 batches": {"reuse": 4},
    "natural gradient, no line search": {"line_search": "none"},
    "KL penalty": {"update": "kl-penalty"},
    "PPO": {"update": "ppo"},
    "policy gradient, Adam": {"update": "policy-gradient"},
    "policy gradient, plain": {"update": "policy-gradient", "policy_optimizer": "sgd", "policy_learning_rate": 1.0},
    "REINFORCE, Adam": {"update": "policy-gradient", "baseline": False, "gae_lambda": 1.0},
}

DRAWN = [TASKS[0], TASKS[3], {"env": "FourRooms-misc", "steps": 100_000, "solved": 0.99}]


def resets() -> Iterator[dict[str, Any]]:
    """As many steps per iteration in few and in many environments, with fresh starts and with cached ones."""
    for task, num_envs in itertools.product(DRAWN, (4, 16, 128)):
        for wrappers in ("none", "cache_resets"):
            settings = {"num_envs": num_envs, "num_steps": 2048 // num_envs, "wrappers": wrappers}
            yield {**task, "settings": {**task.get("settings", {}), **settings}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="?", choices=("defaults", "options", "resets"), default="defaults")
    parser.add_argument("--num-seeds", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    arguments = parser.parse_args()

    options = [
        {"name": name, "env": "CartPole-v1", "steps": 200_000, "solved": 475, "settings": settings}
        for name, settings in OPTIONS.items()
    ]
    tasks = {"defaults": TASKS, "options": options, "resets": list(resets())}[arguments.tasks]
    results = [run_task(task, arguments.num_seeds) for task in tasks]
    packages = {name: version(name) for name in ("jax", "jaxlib", "gymnax", "trpo_jax")}
    record = {"device": jax.devices()[0].device_kind, **packages, "num_seeds": arguments.num_seeds, "tasks": results}
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = "results" if arguments.tasks == "defaults" else arguments.tasks
    (arguments.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.output / f"{name}.md").write_text(table(results))
    if arguments.tasks == "defaults":
        plot(results, arguments.output / "learning_curves.png")
    print(table(results))


def run_task(task: dict[str, Any], num_seeds: int) -> dict[str, Any]:
    """Train seeds 0 … num_seeds − 1 and evaluate each; settings were chosen on seeds from 10,000 on."""
    config = trpo_jax.Config(env=task["env"], **task.get("settings", {}))
    config = config.replace(num_iterations=task["steps"] // config.steps_per_iteration)
    keys = jax.vmap(jax.random.key)(jnp.arange(num_seeds))
    train = jax.jit(jax.vmap(trpo_jax.train, in_axes=(None, 0))).lower(config, keys).compile()
    start = time.perf_counter()
    states, metrics = jax.block_until_ready(train(config, keys))
    seconds = time.perf_counter() - start

    judge = functools.partial(trpo_jax.evaluate, num_episodes=EPISODES, deterministic=True)
    evaluation_keys = jax.random.split(jax.random.key(2**31 - 1), num_seeds)
    episodes = jax.jit(jax.vmap(judge, in_axes=(None, 0, 0)))(config, states, evaluation_keys)
    returns = np.asarray(episodes.episode_return, np.float64).mean(axis=1)
    interval = stats.bootstrap((returns,), iqm, n_resamples=9999, rng=np.random.default_rng(0), method="percentile")
    return {
        **task,
        "env_steps": config.num_iterations * config.steps_per_iteration,
        "steps_per_iteration": config.steps_per_iteration,
        "iqm": float(iqm(returns)),
        "interval": [float(bound) for bound in interval.confidence_interval],
        "mean": float(returns.mean()),
        "worst": float(returns.min()),
        "num_solved": int((returns >= task["solved"]).sum()),
        "training_seconds": round(seconds, 1),
        "returns": [round(float(value), 3) for value in returns],
        "training_iqm": [None if np.isnan(v) else round(float(v), 3) for v in iqm_of_rows(metrics.episode_return)],
    }


def iqm(values: Any, axis: int = -1) -> Any:
    """Interquartile mean: the mean of the middle half."""
    return stats.trim_mean(values, 0.25, axis=axis)


def iqm_of_rows(returns: Any) -> np.ndarray:
    """IQM over the seeds of [seeds, iterations], among those in which an episode ended."""
    columns = (column[~np.isnan(column)] for column in np.asarray(returns).T)
    return np.array([iqm(column) if column.size else np.nan for column in columns])


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| run | env steps | IQM | 95 % interval | mean | worst seed | seeds at or above | training, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        low, high = r["interval"]
        solved = f"{r['num_solved']} of {len(r['returns'])} ({r['solved']})"
        settings = ", ".join(f"{name}={value}" for name, value in r.get("settings", {}).items())
        name = r.get("name", r["env"]) + (f" (`{settings}`)" if settings else "")
        lines.append(
            f"| {name} | {r['env_steps']:,} | {r['iqm']:.1f} | {low:.1f} … {high:.1f} | {r['mean']:.1f} "
            f"| {r['worst']:.1f} | {solved} | {r['training_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], file: Path) -> None:
    # One panel an environment: a longer run of the same one shows the shorter.
    longest = {r["env"]: r for r in sorted(results, key=lambda r: r["steps"])}.values()
    figure = Figure(figsize=(4 * len(longest), 3.4), layout="constrained")
    for axes, r in zip(figure.subplots(1, len(longest), squeeze=False)[0], longest, strict=True):
        values = np.array([np.nan if v is None else v for v in r["training_iqm"]])
        steps = r["steps_per_iteration"] * np.arange(1, len(values) + 1) / 1000
        seen = ~np.isnan(values)
        axes.plot(steps[seen], values[seen], linewidth=2, label=f"TRPO, IQM of {len(r['returns'])} seeds")
        axes.set(title=r["env"], xlabel="environment steps, thousands", ylabel="training return")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
