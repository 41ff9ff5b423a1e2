"""What are the parts of a sweep's cost? Start, compilation, points, agents, iterations, storage, report.

    python experiments/throughput/sweep_parts.py [--output runs/throughput]

Runs `trpo-jax sweep` and `trpo-jax report` at a few sizes, each in a process of its own, and solves for the parts.
Times are CPU seconds of the process, which other work on the machine changes less than the clock on the wall; use one
core: `taskset -c 0 python …`. Writes sweep_parts.json to the folder --output.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

FILE = """
num_seeds = {seeds}
num_episodes = 4
[base]
env = "CartPole-v1"
num_envs = 4
num_steps = 32
num_iterations = {iterations}
hidden = [8]
[grid]
max_kl = {values}
"""
FEW, MANY, LONG = 256, 5120, 9  # agents, agents, iterations
SIZES = {  # points, seeds, iterations
    "first": (1, FEW, 1),
    "few": (1, FEW, 1),
    "seeds": (1, MANY, 1),
    "first long": (1, FEW, LONG),
    "long": (1, MANY, LONG),
    "points": (MANY, 1, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/throughput"), help="folder of the results")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as scratch:
        measured = {name: measure(Path(scratch), name, *size) for name, size in SIZES.items()}
    file = output / "sweep_parts.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"parts": parts(measured), "measured": measured}, indent=1) + "\n")
    print(file.read_text())


def measure(scratch: Path, name: str, points: int, seeds: int, iterations: int) -> dict[str, Any]:
    """CPU seconds and peak memory of a sweep, the same of its report, and the bytes of its results."""
    values = [round(float(kl), 8) for kl in np.geomspace(0.001, 0.1, points)]
    folder, file = scratch / name, scratch / "sweep.toml"
    file.write_text(FILE.format(seeds=seeds, iterations=iterations, values=values))
    cache = {"XDG_CACHE_HOME": str(scratch / "cache")}  # empty at first, so that the first sweep compiles
    sweep = run("sweep", str(file), "--output", str(folder), "--num-devices", "1", cache=cache)
    report = run("report", str(folder), cache=cache)
    size = sum(file.stat().st_size for file in (folder / "results").iterdir())
    made_by = json.loads((folder / "sweep.json").read_text())["made_by"]
    print(f"{name}: sweep {sweep}, report {report}, {size:,} bytes", file=sys.stderr)
    return {"sweep": sweep, "report": report, "bytes": size, "made_by": made_by}


def run(*arguments: str, cache: dict[str, str]) -> dict[str, float]:
    child = subprocess.Popen(
        [sys.executable, "-m", "trpo_jax", *arguments], env={**os.environ, **cache}, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{arguments[0]} failed.")
    return {"cpu_seconds": round(used.ru_utime + used.ru_stime, 2), "peak_mib": used.ru_maxrss // 1024}


def parts(measured: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds of each part. A sweep ends with its report, whose own process starts anew; that start is not in it."""

    def trained(name: str) -> float:
        return float(measured[name]["sweep"]["cpu_seconds"] - measured[name]["report"]["cpu_seconds"])

    def reported(name: str) -> float:
        return float(measured[name]["report"]["cpu_seconds"])

    more = MANY - FEW
    agent = (trained("seeds") - trained("few")) / more
    iteration = (trained("long") - trained("seeds")) / MANY / (LONG - 1)
    report_agent = (reported("seeds") - reported("few")) / more
    return {
        "start": trained("few") - FEW * agent,
        "compile": trained("first") - trained("few"),
        "agent": agent - iteration,
        "agent_iteration": iteration,
        "point": (trained("points") - trained("seeds")) / MANY,
        "report": reported("few") - FEW * report_agent,
        "report_agent": report_agent,
        "report_point": (reported("points") - reported("seeds")) / MANY,
        "bytes_agent": (measured["seeds"]["bytes"] - measured["few"]["bytes"]) / more,
        "bytes_agent_iteration": (measured["long"]["bytes"] - measured["seeds"]["bytes"]) / MANY / (LONG - 1),
    }


if __name__ == "__main__":
    main()
