"""Measure throughput, where the time goes, how it scales, and how quickly a command starts; beside two peers.

    python experiments/throughput/run.py [--output runs/throughput] [--peer-environments FOLDER]
    python experiments/throughput/run.py --compare rejax --settings '{"env": "Acrobot-v1", "num_envs": 16}'

The first runs for about ten minutes on two cores. Leave the machine alone meanwhile. On an accelerator it takes larger
sizes. `--plot-only` draws the picture and writes the table anew from the JSON. The second runs that peer alone in turn
with us, at any settings, and prints what it found.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from trpo_jax import Config

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent.parent))
from experiments.throughput.compare import Trainer, compare, rows  # noqa: E402
from experiments.throughput.peers import PEERS  # noqa: E402

PARTS = "rollout", "advantages", "gradient", "curvature", "line search", "value fit"
STARTS = 5
# Returns at which Gymnasium's registry calls these tasks solved.
SOLVED = {"CartPole-v1": 475.0, "Acrobot-v1": -100.0, "MountainCar-v0": -110.0, "MountainCarContinuous-v0": 90.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/throughput"))
    parser.add_argument("--compare", action="append", choices=PEERS, help="this peer alone; may be repeated")
    parser.add_argument("--settings", type=json.loads, default={}, help="of Config, as JSON (default: num_envs 64)")
    parser.add_argument("--peer-environments", type=Path, help="folder that keeps the peers' virtual environments")
    parser.add_argument("--plot-only", action="store_true")
    arguments = parser.parse_args()
    file = arguments.output / "results.json"
    config = Config(**{"num_envs": 64, **arguments.settings})
    if arguments.compare:
        for name, peer in compare_all(arguments.compare, config, arguments.peer_environments).items():
            print("\n".join(f"{quantity}: {value}" for quantity, value in rows(name, peer)))
        return
    if not arguments.plot_only:
        arguments.output.mkdir(parents=True, exist_ok=True)
        results: dict[str, Any] = {"start": measure_starts(), "benchmark": run_benchmark(config)}
        results["peers"] = compare_all(PEERS, config, arguments.peer_environments)
        results["scaling"] = measure_scaling()
        file.write_text(json.dumps(results, indent=1) + "\n")
    elif not file.exists():
        parser.error(f"--plot-only needs {file}; name the folder that has it with --output")
    results = json.loads(file.read_text())
    (arguments.output / "results.md").write_text(table(results))
    plot(results, arguments.output / "throughput.png")
    print(table(results))


def run_benchmark(config: Config) -> dict[str, Any]:
    """`trpo-jax benchmark`: our own figures."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "trpo_jax", "benchmark", str(config.env), "--output", str(file)]
        subprocess.run(command, check=True)
        return json.loads(file.read_text())


def compare_all(names: Iterable[str], config: Config, environments: Path | None) -> dict[str, Any]:
    """Each peer in turn with us."""
    threshold = SOLVED.get(str(config.env))
    return {name: compare(name, config, threshold=threshold, environments=environments) for name in names}


def measure_starts() -> dict[str, Any]:
    """Seconds to import, and from the command to its first iteration with an empty and a full compilation cache."""
    imports: dict[str, list[float]] = {"jax": [], "trpo_jax and jax": []}
    for _ in range(STARTS):
        for name, code in (("jax", "import jax"), ("trpo_jax and jax", "import jax, trpo_jax")):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            imports[name].append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        starts = [first_iteration(Path(folder), i) for i in range(1 + STARTS)]
    (cold, cold_compile), warm = starts[0], [seconds for seconds, _ in starts[1:]]
    return {
        "import_seconds": {name: float(np.median(seconds)) for name, seconds in imports.items()},
        "cold_seconds": cold,
        "cold_compile_seconds": cold_compile,
        "warm_seconds": float(np.median(warm)),
        "warm_seconds_range": [min(warm), max(warm)],
    }


def first_iteration(folder: Path, i: int) -> tuple[float, float]:
    """Seconds from the command to the first iteration's line, and of them those after "Compiling …"."""
    variables = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    variables["XDG_CACHE_HOME"] = str(folder)
    command = [sys.executable, "-m", "trpo_jax", "train", "--num-iterations", "1", "--output", str(folder / str(i))]
    start = time.perf_counter()
    compiling = start
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as process:
        assert process.stdout
        for line in process.stdout:
            if "Compiling" in line:
                compiling = time.perf_counter()
            if "steps/s" in line:
                seconds = time.perf_counter() - start, time.perf_counter() - compiling
    return seconds


def measure_scaling() -> list[dict[str, Any]]:
    """Env steps per second against environments and against agents; one process for all, programs in turn."""
    accelerator = jax.default_backend() != "cpu"
    envs = (64, 1024, 4096) if accelerator else (4, 16, 64, 256, 1024)
    agents = (1, 64, 512, 2048) if accelerator else (1, 4, 16, 64, 256)
    tasks = ("CartPole-v1", "Breakout-MinAtar") if accelerator else ("CartPole-v1",)
    cases = [(task, n, 1, "envs") for task in tasks for n in envs]
    cases += [(task, 16, k, "agents") for task in tasks for k in agents]
    trainers: list[Trainer] = []
    found: list[dict[str, Any]] = []
    for task, num_envs, num_agents, axis in cases:
        config = Config(env=task, num_envs=num_envs)
        iterations = max(1, 400_000 // (config.steps_per_iteration * num_agents)) if not accelerator else 10
        trainers.append(Trainer(config, num_agents, iterations, warm_up=1))
        steps = config.steps_per_iteration * num_agents * iterations
        row = {"env": task, "num_envs": num_envs, "num_agents": num_agents, "axis": axis, "env_steps": steps}
        found.append(row | {"seconds": []})
    for _ in range(5):
        for trainer, measured in zip(trainers, found, strict=True):
            measured["seconds"].append(trainer.run())
    return found


def table(results: dict[str, Any]) -> str:
    """The figures beside their targets, in Markdown."""
    benchmark, start = results["benchmark"], results["start"]
    one, many = benchmark["one_agent"], benchmark["many_agents"]
    sb3, rejax = (results["peers"][name] for name in PEERS)
    update, imports = benchmark["policy_update"], start["import_seconds"]
    lines = [("env steps/s, one agent of 64 x 128", f"{one['env_steps_per_second']['median']:,.0f}", "")]
    if "error" in sb3:
        lines.append(("sb3-contrib TRPO", sb3["error"], ""))
    else:
        own = sb3["own_shape"]
        alike = one["env_steps_per_second"]["median"] / own["theirs_env_steps_per_second"]["median"]
        theirs = f"sb3-contrib TRPO's own {own['shape']}"
        lines.append((f"÷ {theirs}", f"{alike:.0f}", "≥ 250"))
        lines.append((f"our {own['our_shape']} ÷ {theirs}, the same batch", f"{own['speed_ratio']:.0f}", ""))
        lines.append(("÷ sb3-contrib TRPO at the same 64 x 128", f"{sb3['speed_ratio']:.0f}", ""))
    if "error" in rejax:
        lines.append(("rejax PPO", rejax["error"], ""))
    else:
        lines.append(("÷ rejax PPO, 4 epochs x 4 minibatches", f"{rejax['speed_ratio']:.2f}", "≥ 4"))
    lines += [
        ("iteration ÷ limit", f"{one['iteration_over_limit']:.2f}", "≤ 1.5"),
        (
            f"policy update of {update['samples']:,} samples, all in the curvature: double backward ÷ ours",
            f"{update['double_backward_over_all_samples']:.2f}",
            "≥ 1.8",
        ),
    ]
    if "error" not in sb3:
        both = sb3["policy_update"]
        lines.append(("the same: sb3-contrib's at its own settings ÷ ours at ours", f"{both['ratio']:.0f}", "≥ 25"))
    if "error" not in rejax:
        both = rejax["time_to_threshold"]
        seconds = f"{both['seconds_ratio']:.3f} ({both['ours']['seconds']:.3f} s ÷ {both['theirs']['seconds']:.3f} s)"
        lines.append(("training to 475 ÷ rejax PPO's at its published settings, 16 seeds", seconds, "≤ 0.2"))
        steps = f"{both['env_steps_ratio']:.2f} ({both['ours']['env_steps']:,.0f} ÷ {both['theirs']['env_steps']:,.0f})"
        lines.append(("the same in env steps", steps, ""))
        pair = rejax["many_agents"]
        lines.append((f"{pair['num_agents']} agents ÷ rejax PPO's in one program", f"{pair['speed_ratio']:.2f}", ""))
    lines += [
        (
            f"time of an agent among {many['num_agents']} ÷ alone",
            f"{many['time_of_an_agent_over_one_alone']:.2f}",
            "≤ 1.0",
        ),
        (
            "`import jax, trpo_jax` ÷ `import jax`",
            f"{imports['trpo_jax and jax'] / imports['jax']:.2f} ({imports['jax']:.2f} s)",
            "≤ 1.1",
        ),
        ("compiling the default run, nothing cached", f"{start['cold_compile_seconds']:.1f} s", "≤ 8 s"),
        ("from the command to the first iteration, programs cached", f"{start['warm_seconds']:.2f} s", "≤ 2 s"),
        ("memory of the agents, predicted ÷ measured", f"{many['predicted_over_measured_memory']:.3f}", "1 ± 0.1"),
    ]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"| measure | found | aimed at |\n|---|---|---|\n{body}\n"


def plot(results: dict[str, Any], file: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    labels = {"envs": "one agent, N environments", "agents": "K agents of 16 environments"}
    for axis, key, marker in (("envs", "num_envs", "o"), ("agents", "num_agents", "s")):
        for task in dict.fromkeys(row["env"] for row in results["scaling"]):
            rows = [row for row in results["scaling"] if row["axis"] == axis and row["env"] == task]
            speed = [row["env_steps"] / np.median(row["seconds"]) for row in rows]
            left.plot([row[key] for row in rows], speed, marker=marker, label=f"{task}: {labels[axis]}")
    left.set_xscale("log", base=2)
    left.set(xlabel="N or K", ylabel="env steps/s, trained", title="Throughput of the whole loop")
    left.set_ylim(bottom=0)
    left.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
    left.grid(alpha=0.3)
    left.legend()

    one = results["benchmark"]["one_agent"]
    parts = {name: values["median"] for name, values in one["parts_ms"].items()}
    limit = {"rollout": "rollout", "gradient": "gradient", "value gradient": "value fit"}
    colors = dict(zip(PARTS, ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377"), strict=True))
    bottom = 0.0
    for name in PARTS:
        right.bar("each stage alone", parts[name], bottom=bottom, color=colors[name], label=name)
        bottom += parts[name]
    right.bar("the iteration", one["iteration_ms"]["median"], color="#777777")
    bottom = 0.0
    for name, like in limit.items():
        right.bar("the limit", parts[name], bottom=bottom, color=colors[like])
        bottom += parts[name]
    settings = results["benchmark"]["settings"]
    right.set(ylabel="ms", title=f"One iteration of {settings['num_envs']} x {settings['num_steps']} steps")
    handles, names = right.get_legend_handles_labels()
    right.legend(handles[::-1], names[::-1], loc="upper right", bbox_to_anchor=(1.45, 1))
    about = results["benchmark"]["setting"]
    device = re.sub(r"\s+", " ", about["device"])
    figure.suptitle(f"{device}, {about['cores']} cores, jax {about['jax']}", fontsize=9)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
