"""How wide is the plateau of settings that work? Final return against the step size of TRPO, policy gradient and PPO.

    python experiments/trust_region_plateau/run.py [--output runs/trust_region_plateau]

Runs `trpo-jax sweep` on trpo.toml, policy_gradient.toml and ppo.toml (it continues where it was stopped), then writes
results.json, results.md and plateau.png to the folder --output. The width is the part of the axis, in decades, on
which a score keeps nine tenths of the way from the untrained policy to the best score that any of the methods reaches
on the task.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
from matplotlib.figure import Figure

from trpo_jax import interquartile_mean, stratified_bootstrap

HERE = Path(__file__).parent
KEPT = 0.9
METHODS = {  # name: file, swept setting, its name on an axis
    "TRPO": ("trpo", "max_kl", "trust-region radius δ, nats"),
    "policy gradient": ("policy_gradient", "policy_learning_rate", "step size α of θ + α g"),
    "PPO": ("ppo", "policy_learning_rate", "learning rate of Adam"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", type=Path, default=Path("sweeps/trust_region_plateau"), help="folder of the sweeps")
    parser.add_argument("--output", type=Path, default=Path("runs/trust_region_plateau"), help="folder of the results")
    parser.add_argument("--plot-only", action="store_true", help="draw anew from results.json")
    arguments = parser.parse_args()
    file = arguments.output / "results.json"
    if not arguments.plot_only:
        file.parent.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {"curves": []}
        for method, (name, setting, _) in METHODS.items():
            folder = arguments.sweeps / name
            command = [sys.executable, "-m", "trpo_jax", "sweep", str(HERE / f"{name}.toml")]
            subprocess.run([*command, "--output", str(folder)], check=True)
            found["made_by"] = json.loads((folder / "sweep.json").read_text())["made_by"]
            found["curves"] += collect(folder, method, setting)
        add_plateaus(found["curves"])
        file.write_text(json.dumps(found, indent=1) + "\n")
    elif not file.exists():
        parser.error(f"--plot-only needs {file}; name the folder that has it with --output")
    results = json.loads(file.read_text())
    file.with_suffix(".md").write_text(table(results))
    plot(results, arguments.output / "plateau.png")
    print(table(results))


def collect(sweep: Path, method: str, setting: str) -> list[dict[str, Any]]:
    """Per environment: settings, IQM with interval, the untrained return, the plateau."""
    names = ["env", setting, "final_return", "episode_return", "env_steps"]
    rows = parquet.ParquetDataset(sweep / "results").read(columns=names).to_pylist()
    found = []
    for env in dict.fromkeys(row["env"] for row in rows):
        here = [row for row in rows if row["env"] == env]
        sizes = sorted({row[setting] for row in here})
        scores = [np.array([row["final_return"] for row in here if row[setting] == size]) for size in sizes]
        # The first episodes that ended, of the slowest learners: as good as untrained.
        slowest = [np.array(row["episode_return"]) for row in here if row[setting] == sizes[0]]
        untrained = float(np.mean([curve[~np.isnan(curve)][0] for curve in slowest]))
        iqm = [float(interquartile_mean(values)) for values in scores]
        found.append(
            {
                "method": method,
                "env": env,
                "env_steps": here[0]["env_steps"],
                "num_seeds": len(scores[0]),
                "setting": setting,
                "sizes": sizes,
                "iqm": iqm,
                "interval": [stratified_bootstrap([values]) for values in scores],
                "untrained": untrained,
            }
        )
    return found


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


def table(results: dict[str, Any]) -> str:
    lines = [
        "| task | method | env steps | best setting | IQM there | plateau: from … to | decades | of step length |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for curve in sorted(results["curves"], key=lambda curve: curve["env"]):
        best = int(np.argmax(curve["iqm"]))
        ends = "{:.2g} … {:.2g}".format(*curve["plateau"]) if curve["plateau"] else "none"
        # A KL grows with the square of the step.
        length = curve["decades"] / 2 if curve["setting"] == "max_kl" else curve["decades"]
        lines.append(
            f"| {curve['env']} | {curve['method']} | {curve['env_steps']:,} | `{curve['setting']}` "
            f"{curve['sizes'][best]:g} | {curve['iqm'][best]:.1f} | {ends} "
            f"| {curve['decades']:.1f} | {length:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], file: Path) -> None:
    tasks = list(dict.fromkeys(curve["env"] for curve in results["curves"]))
    figure = Figure(figsize=(12, 3.2 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), len(METHODS), squeeze=False, sharey="row")
    for curve in results["curves"]:
        axes = grid[tasks.index(curve["env"])][list(METHODS).index(curve["method"])]
        low, high = zip(*curve["interval"], strict=True)
        if curve["plateau"]:
            axes.axvspan(*curve["plateau"], color="tab:green", alpha=0.12, label=f"{curve['decades']:.1f} decades")
        axes.fill_between(curve["sizes"], low, high, alpha=0.25, label="95 % interval")
        axes.plot(curve["sizes"], curve["iqm"], marker="o", label=f"IQM of {curve['num_seeds']} seeds")
        axes.axhline(curve["untrained"], color="gray", linestyle=":", label="untrained")
        axes.set(xscale="log", title=f"{curve['env']}: {curve['method']}", xlabel=METHODS[curve["method"]][2])
        axes.set_ylabel("final return" if curve["method"] == "TRPO" else "")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="lower center")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
