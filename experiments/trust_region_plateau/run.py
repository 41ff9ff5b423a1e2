"""How wide is the plateau of settings that work? Final return against the trust-region radius.

    python experiments/trust_region_plateau/run.py [--sweep sweeps/trust_region_plateau] [--plot-only]

Runs `trpo-jax sweep` on sweep.toml (it continues where it was stopped), then writes results.json, results.md and
plateau.png. The width is the part of the axis, in decades, on which a score keeps nine tenths of the way from the
untrained policy to the best setting.
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

from trpo_jax.sweeps.statistics import interquartile_mean, stratified_bootstrap

HERE = Path(__file__).parent
KEPT = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", type=Path, default=Path("sweeps/trust_region_plateau"), help="folder of the sweep")
    parser.add_argument("--plot-only", action="store_true", help="draw anew from results.json")
    arguments = parser.parse_args()
    file = HERE / "results.json"
    if not arguments.plot_only:
        command = [sys.executable, "-m", "trpo_jax.cli", "sweep", str(HERE / "sweep.toml")]
        subprocess.run([*command, "--output", str(arguments.sweep)], check=True)
        file.write_text(json.dumps(collect(arguments.sweep), indent=1) + "\n")
    results = json.loads(file.read_text())
    (HERE / "results.md").write_text(table(results))
    plot(results, HERE / "plateau.png")
    print(table(results))


def collect(sweep: Path) -> dict[str, Any]:
    """Per environment: radii, IQM with interval, the untrained return, the plateau."""
    names = ["env", "max_kl", "final_return", "episode_return", "env_steps"]
    rows = parquet.ParquetDataset(sweep / "results").read(columns=names).to_pylist()
    found: dict[str, Any] = {"made_by": json.loads((sweep / "sweep.json").read_text())["made_by"], "tasks": []}
    for env in dict.fromkeys(row["env"] for row in rows):
        here = [row for row in rows if row["env"] == env]
        radii = sorted({row["max_kl"] for row in here})
        scores = [np.array([row["final_return"] for row in here if row["max_kl"] == radius]) for radius in radii]
        # The first episodes that ended, of the slowest learners: as good as untrained.
        slowest = [np.array(row["episode_return"]) for row in here if row["max_kl"] == radii[0]]
        untrained = float(np.mean([curve[~np.isnan(curve)][0] for curve in slowest]))
        iqm = [float(interquartile_mean(values)) for values in scores]
        low, high = plateau(radii, iqm, untrained)
        found["tasks"].append(
            {
                "env": env,
                "env_steps": here[0]["env_steps"],
                "num_seeds": len(scores[0]),
                "max_kl": radii,
                "iqm": iqm,
                "interval": [stratified_bootstrap([values]) for values in scores],
                "untrained": untrained,
                "plateau": [low, high],
                "decades": float(np.log10(high / low)),
            }
        )
    return found


def plateau(settings: list[float], scores: list[float], untrained: float) -> tuple[float, float]:
    """The ends of the range around the best setting in which a score keeps `KEPT` of the way up, log-interpolated."""
    height = (np.array(scores) - untrained) / (max(scores) - untrained)
    x, best = np.log10(settings), int(np.argmax(height))
    ends = []
    for path in (range(best, -1, -1), range(best, len(x))):
        end = x[best]
        for i, j in zip(path, list(path)[1:], strict=False):
            if height[j] < KEPT:
                end = x[i] + (x[j] - x[i]) * (height[i] - KEPT) / (height[i] - height[j])
                break
            end = x[j]
        ends.append(float(10**end))
    return ends[0], ends[1]


def table(results: dict[str, Any]) -> str:
    lines = [
        "| task | env steps | best δ | IQM there | plateau: δ from … to | decades |",
        "|---|---|---|---|---|---|",
    ]
    for task in results["tasks"]:
        best = int(np.argmax(task["iqm"]))
        low, high = task["plateau"]
        lines.append(
            f"| {task['env']} | {task['env_steps']:,} | {task['max_kl'][best]:g} | {task['iqm'][best]:.1f} "
            f"| {low:.2g} … {high:.2g} | {task['decades']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], file: Path) -> None:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(results["tasks"]), squeeze=False)[0], results["tasks"], strict=True):
        low, high = zip(*task["interval"], strict=True)
        axes.axvspan(*task["plateau"], color="tab:green", alpha=0.12, label=f"plateau, {task['decades']:.1f} decades")
        axes.fill_between(task["max_kl"], low, high, alpha=0.25, label="95 % interval")
        axes.plot(task["max_kl"], task["iqm"], marker="o", label=f"IQM of {task['num_seeds']} seeds")
        axes.axhline(task["untrained"], color="gray", linestyle=":", label="untrained")
        axes.set(xscale="log", title=task["env"], xlabel="trust-region radius δ (max_kl), nats", ylabel="final return")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="best")
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
