"""The picture of a benchmark: throughput over agents and environments, and memory, predicted and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trpo_jax.benchmarks.machine import machine_name
from trpo_jax.files import write_atomically
from trpo_jax.runs.learning_curve import make_figure


def draw_curves(result: dict[str, Any], file: Path) -> None:
    """Draw every curve of a benchmark, medians with their ranges, as a PNG file."""
    found = [
        (result.get(name, []), over, unit)
        for name, over, unit in (
            ("agents_curve", "num_agents", "agents in one program"),
            ("environments_curve", "num_envs", "environments of one agent"),
        )
        if len(result.get(name, [])) > 1
    ]
    figure = make_figure(5 * len(found) + 1, 6.4)
    grid = figure.subplots(2, len(found), squeeze=False)
    for (curve, over, unit), (above, below) in zip(found, grid.T, strict=True):
        numbers = [point[over] for point in curve]
        median, low, high = ([p["env_steps_per_second"][k] for p in curve] for k in ("median", "low", "high"))
        above.plot(numbers, median, marker="o", label="median")
        above.fill_between(numbers, low, high, alpha=0.25, label="range")
        above.set(ylabel="environment steps per second")
        below.plot(numbers, [p["memory_bytes"] / 1e6 for p in curve], marker="o", label="measured")
        below.plot(numbers, [p["predicted_memory_bytes"] / 1e6 for p in curve], marker="x", ls="--", label="predicted")
        below.set(ylabel="memory of the program, MB", xlabel=unit)
        for axes in (above, below):
            axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.3)
            axes.legend()
    settings = result["settings"]
    shape = f"{settings['num_envs']} environments x {settings['num_steps']} steps"
    figure.suptitle(f"{settings['env']}, {shape}; {machine_name(result['setting'])}", fontsize=10)
    write_atomically(file, lambda sink: figure.savefig(sink, dpi=120, format="png"))
