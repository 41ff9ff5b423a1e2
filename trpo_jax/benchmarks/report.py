"""The complete benchmark as one JSON object, and as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trpo_jax.benchmarks.machine import BUSY, busy_share, machine_name, setting
from trpo_jax.benchmarks.measure import (
    PARTS,
    iterations_of_many,
    iterations_of_one,
    measure_environments,
    measure_many,
    measure_one,
    measure_policy_update,
    measure_time_to,
    update_samples,
)
from trpo_jax.config_pytree import Config
from trpo_jax.sentences import counted
from trpo_jax.settings import settings_of

# Returns at which Gymnasium's registry calls these tasks solved.
THRESHOLDS = {"CartPole-v1": 475.0, "Acrobot-v1": -100.0, "MountainCar-v0": -110.0, "MountainCarContinuous-v0": 90.0}


def run_benchmark(
    config: Config,
    *,
    num_agents: Sequence[int],
    env_counts: Sequence[int] = (),
    repetitions: int,
    threshold: float | None,
    num_seeds: int,
    max_steps: int,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure everything.

    Args:
      config: the settings to measure.
      num_agents: numbers of agents side by side in one program; each is measured, the last in detail.
      env_counts: numbers of environments of one agent, for a curve.
      repetitions: measurements of each figure, at least 5 for a meaningful median.
      threshold: return to reach; None: this is left out.
      num_seeds: agents trained to the threshold, one after the other.
      max_steps: env steps after which one of them counts as not reaching it.
      report: called with a description of each measurement.

    Returns:
      The content of the JSON file.
    """
    result: dict[str, Any] = {"setting": setting(), "settings": settings_of(config), "repetitions": repetitions}
    report("one agent")
    result["one_agent"] = measure_one(config, repetitions)
    samples = update_samples(config)
    report(f"a policy update of {samples:,} samples")
    result["policy_update"] = measure_policy_update(config, samples, repetitions)
    seconds = result["one_agent"]["iteration_ms"]["median"] / 1e3
    curve = []
    for number in num_agents:
        report(counted(number, "agent") + _at_most(seconds * iterations_of_many(number, repetitions)))
        curve.append(measure_many(config, number, repetitions))
    result["many_agents"] = curve[-1]
    if len(curve) > 1:
        result["agents_curve"] = curve
    for number in env_counts:
        duration = seconds * iterations_of_one(repetitions) * number / config.num_envs
        report(f"one agent with {counted(number, 'environment')}{_at_most(duration)}")
        result.setdefault("environments_curve", []).append(measure_environments(config, number, repetitions))
    if threshold is not None:
        report(f"time to a return of {threshold:g}")
        result["time_to_threshold"] = measure_time_to(threshold, config, num_seeds, max_steps)
    result["setting"]["busy_after"] = busy_share()
    return result


def _at_most(seconds: float) -> str:
    """How long a measurement takes, if over a minute, and less where agents or environments advance side by side."""
    return f" (up to {counted(round(seconds / 60), 'minute')})" if seconds > 60 else ""


def warning_of(busy: float | None) -> str | None:
    """A sentence if other work takes a share of the processors that the figures would show."""
    if busy is None or busy < BUSY:
        return None
    return f"warning: other programs take {busy:.0%} of the processors, so the figures are too low; measure again."


def notes() -> list[str]:
    """What the tables' terms mean."""
    return [
        "limit: the time that every on-policy method needs, a rollout, one policy gradient and one value gradient.",
        "double backward: Fisher products by differentiating the mean KL twice, as most implementations do.",
        "among many ÷ alone: time per iteration and agent, both measured in the same turn.",
    ]


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) for every part of a result."""
    settings, where = result["settings"], result["setting"]
    title = (
        f"{settings['env']}, {settings['num_envs']} envs x {settings['num_steps']} steps; {machine_name(where)}, "
        f"jax {where['jax']}; median of {result['repetitions']} (range)"
    )
    return [
        (title, ["", "env steps/s", "updates/s", "iteration, ms"], _throughput(result)),
        ("each stage as a program of its own", ["", "ms", "share"], _stages(result["one_agent"]["parts_ms"])),
        ("", ["", ""], _ratios(result)),
    ]


def _throughput(result: dict[str, Any]) -> list[list[str]]:
    one, many = result["one_agent"], result["many_agents"]
    return [
        ["1 agent", *(_range(one[key], 1) for key in ("env_steps_per_second", "updates_per_second", "iteration_ms"))],
        *(
            [
                f"{counted(some['num_agents'], 'agent')}{' in one program' * (some['num_agents'] == 1)}",
                *(_range(some[key], 1) for key in ("env_steps_per_second", "updates_per_second")),
                f"{_range(some['iteration_of_an_agent_ms'], 1)} per agent",
            ]
            for some in result.get("agents_curve", [many])
        ),
        *(
            [
                f"1 agent, {counted(some['num_envs'], 'environment')}",
                _range(some["env_steps_per_second"], 1),
                "",
                _range(some["iteration_ms"], 1),
            ]
            for some in result.get("environments_curve", [])
        ),
    ]


def _stages(parts: dict[str, Any]) -> list[list[str]]:
    total = sum(parts[name]["median"] for name in PARTS)
    rows = [[name, _range(parts[name], 2), f"{100 * parts[name]['median'] / total:.0f} %"] for name in PARTS]
    rows.append(["value gradient (for the limit)", _range(parts["value gradient"], 2), ""])
    return rows


def _ratios(result: dict[str, Any]) -> list[list[str]]:
    one, many, update = (result[name] for name in ("one_agent", "many_agents", "policy_update"))
    rows = [
        ["limit: rollout + policy gradient + value gradient", f"{one['limit_ms']:.2f} ms"],
        ["iteration ÷ limit", f"{one['iteration_over_limit']:.2f}"],
        ["time of an agent among many ÷ alone", f"{many['time_of_an_agent_over_one_alone']:.2f}"],
        [
            f"policy update of {update['samples']:,} samples: as configured; on all samples",
            f"{update['configured_ms']['median']:.0f} ms; {update['all_samples_ms']['median']:.0f} ms",
        ],
        ["the same on all samples by double backward ÷ ours", f"{update['double_backward_over_all_samples']:.2f}"],
        ["compiling: one agent, many", f"{one['compile_seconds']:.1f} s, {many['compile_seconds']:.1f} s"],
        [
            f"memory of {counted(many['num_agents'], 'agent')}: measured, predicted",
            f"{many['memory_bytes'] / 1e6:.1f} MB, {many['predicted_memory_bytes'] / 1e6:.1f} MB",
        ],
    ]
    if "time_to_threshold" in result:
        reached = result["time_to_threshold"]
        text = (
            f"{reached['seconds']:.3f} s, {reached['env_steps']:,.0f} env steps (IQM of {len(reached['seeds'])} seeds)"
        )
        rows.append([f"training to a return of {reached['threshold']:g}", text])
    return rows


def _range(values: dict[str, float], digits: int) -> str:
    unit, suffix = (1e3, "k") if values["median"] >= 1e4 else (1, "")
    median, low, high = (f"{values[key] / unit:.{digits}f}{suffix}" for key in ("median", "low", "high"))
    return f"{median} ({low} – {high})"
