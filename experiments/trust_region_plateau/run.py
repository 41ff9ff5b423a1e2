"""How wide is the plateau of settings that work? Final return against the step size of TRPO, policy gradient and PPO.

    python experiments/trust_region_plateau/run.py            # or some sweeps: run.py trpo ppo
    python experiments/trust_region_plateau/run.py --plot-only --output experiments/trust_region_plateau

Runs `trpo-jax sweep` on each of the .toml files (it continues where it was stopped), then writes results.json,
results.md and plateau.png to the folder --output. The width is the part of the axis, in decades, on which a score keeps
nine tenths of the way from the untrained policy to the best score that any of the methods reaches on the task.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as parquet
from matplotlib.figure import Figure

from trpo_jax import Config, evaluate, init, interquartile_mean, stratified_bootstrap

HERE = Path(__file__).parent
KEPT = 0.9
METHODS = {  # name: swept setting, its name on an axis
    "TRPO": ("max_kl", "trust-region radius δ, nats"),
    "policy gradient": ("policy_learning_rate", "step size α of θ + α g"),
    "PPO": ("policy_learning_rate", "learning rate of Adam"),
}
SWEEPS = {  # file: method
    "trpo": "TRPO",
    "policy_gradient": "policy gradient",
    "ppo": "PPO",
    "doorkey_trpo": "TRPO",
    "doorkey_ppo": "PPO",
    "breakout_trpo": "TRPO",
    "breakout_ppo": "PPO",
    "halfcheetah_trpo": "TRPO",
    "halfcheetah_ppo": "PPO",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", nargs="*", help=f"sweeps to run, of {', '.join(SWEEPS)}; all, if none is named")
    parser.add_argument("--sweeps", type=Path, default=Path("sweeps/trust_region_plateau"), help="folder of the sweeps")
    parser.add_argument("--output", type=Path, default=Path("runs/trust_region_plateau"), help="folder of the results")
    parser.add_argument("--plot-only", action="store_true", help="draw anew from results.json")
    arguments = parser.parse_args()
    file = arguments.output / "results.json"
    for name in arguments.sweep:
        if name not in SWEEPS:
            parser.error(f"{name} is not a sweep; there are {', '.join(SWEEPS)}")
    if arguments.plot_only and not file.exists():
        parser.error(f"--plot-only needs {file}; name the folder that has it with --output")
    arguments.output.mkdir(parents=True, exist_ok=True)
    curves = json.loads(file.read_text())["curves"] if file.exists() else []
    for name in [] if arguments.plot_only else arguments.sweep or SWEEPS:
        folder = arguments.sweeps / name
        command = [sys.executable, "-m", "trpo_jax", "sweep", str(HERE / f"{name}.toml"), "--output", str(folder)]
        subprocess.run(command, check=True)
        curves = [curve for curve in curves if curve["sweep"] != name] + collect(folder)
        curves.sort(key=lambda curve: list(SWEEPS).index(curve["sweep"]))
        add_plateaus(curves)
        file.write_text(json.dumps({"curves": curves}, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(curves))
    plot(curves, arguments.output / "plateau.png")
    print(table(curves))


def collect(sweep: Path) -> list[dict[str, Any]]:
    """Per environment: settings, IQM with interval, the untrained return."""
    description = json.loads((sweep / "sweep.json").read_text())
    method = SWEEPS[sweep.name]
    setting = METHODS[method][0]
    names = ["env", setting, "final_return", "env_steps"]
    rows = parquet.ParquetDataset(sweep / "results").read(columns=names).to_pylist()
    found = []
    for env in dict.fromkeys(row["env"] for row in rows):
        here = [row for row in rows if row["env"] == env]
        sizes = sorted({row[setting] for row in here})
        scores = [np.array([row["final_return"] for row in here if row[setting] == size]) for size in sizes]
        iqm = [float(interquartile_mean(values)) for values in scores]
        found.append(
            {
                "sweep": sweep.name,
                "made_by": description["made_by"],
                "method": method,
                "env": env,
                "env_steps": here[0]["env_steps"],
                "num_seeds": len(scores[0]),
                "setting": setting,
                "sizes": sizes,
                "iqm": iqm,
                "interval": [stratified_bootstrap([values]) for values in scores],
                "untrained": untrained_return(env),
            }
        )
    return found


def untrained_return(env: str) -> float:
    """Mean return of 256 episodes of a new policy, which acts nearly at random."""
    config, key = Config(env=env), jax.random.key(0)
    run = jax.jit(lambda key: evaluate(config, init(config, key), key, num_episodes=256, deterministic=False))
    return float(run(key).episode_return.mean())


def add_plateaus(curves: list[dict[str, Any]]) -> None:
    for curve in curves:
        best = max(max(other["iqm"]) for other in curves if other["env"] == curve["env"])
        ends = plateau(curve["sizes"], curve["iqm"], curve["untrained"], best)
        curve["plateau"], curve["decades"] = ends, float(np.log10(ends[1] / ends[0])) if ends else 0.0


def plateau(settings: list[float], scores: list[float], untrained: float, best: float) -> tuple[float, float] | None:
    """The ends of the range around the best setting in which a score keeps `KEPT` of the way up, log-interpolated."""
    height = (np.array(scores) - untrained) / (best - untrained)
    x, peak = np.log10(settings), int(np.argmax(height))
    if height[peak] < KEPT:
        return None
    ends = []
    for path in (range(peak, -1, -1), range(peak, len(x))):
        end = x[peak]
        for i, j in zip(path, list(path)[1:], strict=False):
            if height[j] < KEPT:
                end = x[i] + (x[j] - x[i]) * (height[i] - KEPT) / (height[i] - height[j])
                break
            end = x[j]
        ends.append(float(10**end))
    return ends[0], ends[1]


def table(curves: list[dict[str, Any]]) -> str:
    lines = [
        "| task | method | env steps | best setting | IQM there | plateau: from … to | decades | of step length |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for curve in sorted(curves, key=lambda curve: curve["env"]):
        best = int(np.argmax(curve["iqm"]))
        ends = "{:.2g} … {:.2g}".format(*curve["plateau"]) if curve["plateau"] else "none"
        # A KL grows with the square of the step.
        length = curve["decades"] / 2 if curve["setting"] == "max_kl" else curve["decades"]
        lines.append(
            f"| {curve['env']} | {curve['method']} | {curve['env_steps']:,} | `{curve['setting']}` "
            f"{curve['sizes'][best]:g} | {curve['iqm'][best]:.4g} | {ends} "
            f"| {curve['decades']:.1f} | {length:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(curves: list[dict[str, Any]], file: Path) -> None:
    tasks = list(dict.fromkeys(curve["env"] for curve in curves))
    figure = Figure(figsize=(12, 3.2 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), len(METHODS), squeeze=False, sharey="row")
    for axes in grid.ravel():
        axes.set_axis_off()
    for curve in curves:
        axes = grid[tasks.index(curve["env"])][list(METHODS).index(curve["method"])]
        low, high = zip(*curve["interval"], strict=True)
        if curve["plateau"]:
            axes.axvspan(*curve["plateau"], color="tab:green", alpha=0.12, label=f"{curve['decades']:.1f} decades")
        axes.fill_between(curve["sizes"], low, high, alpha=0.25, label="95 % interval")
        axes.plot(curve["sizes"], curve["iqm"], marker="o", label=f"IQM of {curve['num_seeds']} seeds")
        axes.axhline(curve["untrained"], color="gray", linestyle=":", label="untrained")
        axes.set(xscale="log", title=f"{curve['env']}: {curve['method']}", xlabel=METHODS[curve["method"]][1])
        axes.set_axis_on()
        axes.set_ylabel("return" if curve["method"] == "TRPO" else "")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="lower center")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
