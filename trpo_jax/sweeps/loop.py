"""Running a sweep: group by group, blocks of agents on every device, each finished block into the folder."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

import jax
import numpy as np

from trpo_jax import __version__
from trpo_jax.config import UsageError, counted, shown
from trpo_jax.files import SETTINGS, say
from trpo_jax.runs import interrupts
from trpo_jax.sweeps.grids import Group, Point, Spec, check_numbers, make_groups, make_points, plan, stack_configs
from trpo_jax.sweeps.placement import (
    CAPACITY,
    Programs,
    agents_per_block,
    fit_programs,
    from_host,
    num_threads,
    to_host,
)
from trpo_jax.sweeps.progress import Clock, Progress, Watch
from trpo_jax.sweeps.storage import Block, Checkpoint, Folder
from trpo_jax.training.checkpoints import is_key
from trpo_jax.training.loop import check_key
from trpo_jax.types import Config, Metrics

METRICS = tuple(field.name for field in dataclasses.fields(Metrics))
_CALL_SECONDS = 2.0  # aimed at: a call of the compiled program, after which progress shows and an interrupt is heard
_LAST_SHARE = 0.1  # of the iterations count for the training return


def sweep(
    config: Config,
    grid: Mapping[str, Sequence[Any]],
    key: Any,
    *,
    num_seeds: int = 1,
    num_episodes: int = 16,
    devices: Sequence[Any] | None = None,
) -> SweepResult:
    """Train every combination of settings over seeds, and judge each agent.

    All combinations that differ in traced settings alone are one compiled program; agents are spread over `devices`,
    and taken in blocks where memory asks for it. Not to be called inside `jit`: it compiles and runs by itself.

    Args:
      config: the settings that all share.
      grid: {setting: values}; every combination is a point, the last setting varying fastest.
      key: a typed PRNG key; all points share the `num_seeds` keys split from it.
      num_seeds: S, agents a point.
      num_episodes: episodes by the policy's mode that judge each agent at the end; 0: none.
      devices: where to run; by default all devices of this process.

    Returns:
      A `SweepResult` of NumPy arrays.

    Raises:
      UsageError: if a setting or value cannot be used.
    """
    check_key(key)
    check_numbers({"num_seeds": num_seeds, "num_episodes": num_episodes})
    for name, values in grid.items():
        if isinstance(values, str) or not hasattr(values, "__len__") or not len(values):
            raise UsageError(f"{name} in the grid must be a list of values, got {shown(values)}.")
    names = {field.name for field in dataclasses.fields(Config)}
    base = {name: getattr(config, name) for name in names if name not in grid}
    points = make_points(Spec(base=base, grid={name: list(values) for name, values in grid.items()}))
    groups = make_groups(points, jax.random.split(key, num_seeds))
    devices = jax.local_devices() if devices is None else devices
    longest = max(group.num_iterations for group in groups)
    shape = len(points), num_seeds
    metrics: dict[str, Any] = {name: np.full((*shape, longest), np.nan, np.float32) for name in METRICS}
    final_return, failed_at = np.full(shape, np.nan, np.float32), np.zeros(shape, np.int32)
    for group in groups:
        most = agents_per_block(group.num_agents, len(devices))
        programs = fit_programs(group.configs[0], most, num_episodes, devices)
        blocks = cut_into_blocks(group, 0, programs.agents_per_block)
        for first in range(0, len(blocks), len(devices)):
            for block, rows in run_blocks(programs, group, blocks[first : first + len(devices)]):
                agents = np.arange(block.first, block.last)
                at = np.array(group.points)[agents // num_seeds], agents % num_seeds
                for name in METRICS:
                    metrics[name][(*at, slice(group.num_iterations))] = rows[name]
                final_return[at], failed_at[at] = rows["final_return"], failed_iteration(rows)
    return SweepResult([point.varied for point in points], Metrics(**metrics), final_return, failed_at)


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """What a sweep gives back: G points, S seeds, I iterations.

    Attributes:
      points: the varied settings of each point, [G].
      metrics: `Metrics` of NumPy arrays, [G, S, I]; NaN after the end of a point that has fewer iterations.
      final_return: mean return of each trained policy's mode, [G, S]; NaN where none was asked for.
      failed_at: iteration, counted from 1, at which an agent met a number that is not finite; 0 if it did not. [G, S].
    """

    points: list[dict[str, Any]]
    metrics: Metrics
    final_return: np.ndarray
    failed_at: np.ndarray


def cut_into_blocks(group: Group, number: int, agents: int) -> list[Block]:
    """Blocks of at most `agents` agents."""
    starts = range(0, group.num_agents, agents)
    return [Block(number, i, first, min(first + agents, group.num_agents)) for i, first in enumerate(starts)]


def run_blocks(
    programs: Programs,
    group: Group,
    blocks: Sequence[Block],
    checkpoints: Sequence[Checkpoint] | None = None,
    watch: Callable[[int, Callable[[], list[Checkpoint]]], bool] = lambda done, save: True,
) -> list[tuple[Block, dict[str, np.ndarray]]]:
    """Train at most D blocks, one a device, from their start or from checkpoints of one iteration, and judge them.

    Args:
      programs: the group's programs.
      group: whose agents.
      blocks: which of them; blocks shorter than U, and devices without one, are filled up with repeated agents.
      checkpoints: where the blocks stand, if they stand anywhere.
      watch: called after each call with the iterations done and a function that gives the checkpoints; it says
        whether to go on.

    Returns:
      Each block with its rows {metric: [agents, num_iterations], "final_return": [agents]}; none if `watch` said no.
    """
    size, iterations = programs.agents_per_block, group.num_iterations
    # Whatever fills a program up repeats what is there; its results are dropped.
    members = [min(i, block.last - 1) for block in blocks for i in range(block.first, block.first + size)]
    members += members[:1] * (programs.num_blocks * size - len(members))
    configs = stack_configs([group.configs[i] for i in members])
    table = {name: np.full((len(members), iterations), np.nan, np.float32) for name in METRICS}
    if checkpoints:
        fill = len(members) - size * len(checkpoints)
        host = jax.tree.map(
            lambda *leaves: np.concatenate([*leaves, np.repeat(leaves[0][:1], fill, axis=0)]),
            *(checkpoint.state for checkpoint in checkpoints),
        )
        states, done = from_host(host, programs.states), checkpoints[0].done
        for i, checkpoint in enumerate(checkpoints):
            for name in METRICS:
                table[name][i * size : (i + 1) * size] = checkpoint.metrics[name]
    else:
        states, done = programs.start(configs, group.keys[np.array(members)]), 0

    def save() -> list[Checkpoint]:
        cuts, host = [slice(i * size, (i + 1) * size) for i in range(len(blocks))], to_host(states)
        return [
            Checkpoint(jax.tree.map(lambda leaf, cut=cut: leaf[cut], host), {n: table[n][cut] for n in METRICS}, done)
            for cut in cuts
        ]

    length = 1
    while done < iterations:
        length = min(length, iterations - done, CAPACITY)
        started = time.perf_counter()
        states, metrics = jax.block_until_ready(programs.advance(configs, states, np.int32(length)))
        for name in METRICS:
            table[name][:, done : done + length] = np.asarray(getattr(metrics, name))[:, :length]
        done += length
        # At most doubled a call, so that one slow measurement cannot starve the display.
        length = max(1, min(2 * length, int(length * _CALL_SECONDS / (time.perf_counter() - started))))
        if not watch(done, save):
            return []
    judged = np.asarray(programs.judge(configs, states)) if programs.judge else np.full(len(members), np.nan)
    table["final_return"] = judged.astype(np.float32)
    rows = []
    for i, block in enumerate(blocks):
        cut = slice(i * size, i * size + block.last - block.first)
        rows.append((block, {name: values[cut] for name, values in table.items()}))
    return rows


def failed_iteration(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """First iteration, from 1, whose numbers were not all finite; 0 if there is none. [agents]."""
    bad = rows["finite"] == 0
    return np.where(bad.any(axis=1), bad.argmax(axis=1) + 1, 0).astype(np.int32)


def training_return(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mean return of the episodes that ended in the last tenth of the iterations. [agents].

    Where none did, as episodes may be longer than that, of those of the last iteration in which one ended; NaN if none
    ever did.
    """
    count = np.nan_to_num(rows["num_episodes"].astype(np.float64))
    total = np.where(count > 0, rows["episode_return"].astype(np.float64), 0) * count
    iterations = count.shape[1]
    ended = np.where(count > 0, np.arange(iterations), -1).max(axis=1)
    first = np.minimum(ended, iterations - max(1, round(_LAST_SHARE * iterations)))
    counts = (np.arange(iterations) >= first[:, None]) & (ended >= 0)[:, None]
    episodes = (count * counts).sum(axis=1)
    total = np.where(counts, total, 0).sum(axis=1)
    return np.where(ended >= 0, total / np.where(ended >= 0, episodes, 1), np.nan).astype(np.float32)


# A sweep in a folder


def run_sweep(
    path: str | os.PathLike[str],
    spec: Spec,
    *,
    process: tuple[int, int] = (0, 1),
    checkpoint_seconds: float = 60.0,
    most_agents: int | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Literal["complete", "interrupted", "shared"]:
    """Run a sweep in a folder, or continue the one that is there, to its end.

    Args:
      path: the folder.
      spec: the sweep.
      process: this process's number and how many there are; block b is done by process b mod the second.
      checkpoint_seconds: a block at work is saved so often.
      most_agents: agents a device takes in one program at most; None: as many as serve.
      report: called after every call of a compiled program.

    Returns:
      How it ended: "complete" where all blocks of all processes are finished, "interrupted" by Ctrl-C or SIGTERM, or
      "shared" where this process is done and others are not.

    Raises:
      UsageError: if the spec, the folder or a file in it cannot be used; what is finished stays as it is.
    """
    points, groups = plan(spec)
    folder, devices = Folder(path), jax.local_devices()
    with folder.locked(process[0]), interrupts() as interrupted:
        folder.describe(dataclasses.asdict(spec), versions())
        clock, checked = Clock(groups, process), False
        for number, group in enumerate(groups):
            settled = folder.program(number)
            if settled and not unfinished(folder, group, number, settled, process):
                clock.skip(number)
                continue
            checked = checked or _check_rounding(folder)
            agents = settled["agents_per_block"] if settled else agents_per_block(group.num_agents, len(devices))
            if most_agents:
                agents = min(agents, most_agents)
            programs = fit_programs(group.configs[0], agents, spec.num_episodes, devices)
            about = {"agents": group.num_agents, "agents_per_block": programs.agents_per_block}
            settled = folder.settle_program(number, {**about, "memory": programs.memory})
            if settled["agents_per_block"] != programs.agents_per_block:
                raise UsageError(
                    f"{folder.path} was started with {settled['agents_per_block']} agents a device; there is not "
                    f"enough memory free for them here, or other numbers were asked for ({programs.agents_per_block})."
                )
            pending = unfinished(folder, group, number, settled, process)
            clock.begin(number, pending)
            blank = _blank(programs, group.num_iterations)
            saved = {block: found for block in pending if (found := folder.restore(block, blank))}
            while pending:
                # Blocks that stand at one iteration run together, the furthest first.
                stands = {block: saved[block].done if block in saved else 0 for block in pending}
                most = max(stands.values())
                together = [block for block in pending if stands[block] == most][: len(devices)]
                pending = [block for block in pending if block not in together]
                watch = Watch(folder, together, checkpoint_seconds, interrupted, clock, report, most)
                checkpoints = [saved.pop(block) for block in together] if most else None
                for block, rows in run_blocks(programs, group, together, checkpoints, watch):
                    folder.write_results(block, _rows_to_columns(spec, points, group, block, rows))
                if interrupted():
                    return "interrupted"
    complete = all(
        folder.is_finished(block)
        for number, group in enumerate(groups)
        for block in cut_into_blocks(group, number, (folder.program(number) or {})["agents_per_block"])
    )
    return "complete" if complete else "shared"


@dataclasses.dataclass(frozen=True)
class Outline:
    """What a group of agents that share a program would run.

    Attributes:
      env: environment.
      num_points: points.
      num_agents: A.
      num_devices: D.
      agents_per_block: U, agents a device takes at a time.
      env_steps: of all its agents.
      memory: bytes that the largest of its programs needs on each device.
      seconds: that training takes, as many times as one iteration took; compiling and judging apart.
      static: the settings by which it differs from other groups.
    """

    env: str
    num_points: int
    num_agents: int
    num_devices: int
    agents_per_block: int
    env_steps: int
    memory: int
    seconds: float
    static: dict[str, Any]

    @property
    def num_runs(self) -> int:
        """How often the devices are filled."""
        return -(-self.num_agents // (self.agents_per_block * self.num_devices))


def outline(
    spec: Spec, most_agents: int | None = None, report: Callable[[int, int], None] = lambda number, total: None
) -> list[Outline]:
    """What a sweep would run. Compiles the programs, which the sweep then finds in the compilation cache.

    Args:
      spec: the sweep.
      most_agents: agents per device in one program at most; None: as many as serve.
      report: called with the number of each program, from 0, and how many there are, before it is compiled.
    """
    points, groups = plan(spec)
    devices = jax.local_devices()
    varied = [name for name in SETTINGS if len({str(getattr(p.config, name)) for p in points}) > 1]
    found = []
    for number, group in enumerate(groups):
        report(number, len(groups))
        most = min(agents_per_block(group.num_agents, len(devices)), most_agents or group.num_agents)
        programs = fit_programs(group.configs[0], most, spec.num_episodes, devices)
        config = group.configs[0]
        runs = -(-group.num_agents // (programs.agents_per_block * programs.num_blocks))
        static = [n for n in varied if n != "env" and len({str(getattr(c, n)) for c in group.configs}) == 1]
        found.append(
            Outline(
                env=str(config.env),
                num_points=len(group.points),
                num_agents=group.num_agents,
                num_devices=len(devices),
                agents_per_block=programs.agents_per_block,
                env_steps=group.num_agents * group.num_iterations * config.steps_per_iteration,
                memory=programs.memory,
                seconds=runs * group.num_iterations * _seconds_per_iteration(programs, group),
                static={name: getattr(config, name) for name in static},
            )
        )
    return found


def _seconds_per_iteration(programs: Programs, group: Group) -> float:
    """Time of one iteration on all devices, the second, whose results are dropped."""
    members = np.arange(programs.agents_per_block * programs.num_blocks) % group.num_agents
    configs = stack_configs([group.configs[i] for i in members])
    states = programs.start(configs, group.keys[members])
    for _ in range(2):
        started = time.perf_counter()
        states, _metrics = jax.block_until_ready(programs.advance(configs, states, np.int32(1)))
    return time.perf_counter() - started


def unfinished(folder: Folder, group: Group, number: int, settled: Mapping[str, Any], process: tuple[int, int]) -> Any:
    """The blocks of a group that this process has yet to do."""
    blocks = cut_into_blocks(group, number, settled["agents_per_block"])
    mine = [block for block in blocks if block.number % process[1] == process[0]]
    return [block for block in mine if not folder.is_finished(block)]


def versions() -> dict[str, Any]:
    """What the results were made by."""
    packages = {name: version(name) for name in ("jax", "jaxlib", "gymnax", "flax")} | {"trpo_jax": __version__}
    device = jax.local_devices()[0]
    # Both decide last bits: XLA cuts sums into as many parts as it has threads, and compiles for a number of devices.
    threads = {"threads": num_threads(), "devices": jax.local_device_count()} if device.platform == "cpu" else {}
    return {"python": platform.python_version(), **packages, "device": device.device_kind, **threads}


def _check_rounding(folder: Folder) -> Literal[True]:
    """Hold what decides the last bits against what the sweep was started with: refuse another pool, tell the rest."""
    begun, here = folder.description().get("made_by", {}), versions()
    for name, mend in (("threads", "set NPROC={}, and --num-devices to no more"), ("devices", "give --num-devices {}")):
        if name in begun and name in here and begun[name] != here[name]:
            raise UsageError(
                f"{folder.path} was started with {counted(begun[name], name[:-1])}, and here there would be "
                f"{here[name]}, which rounds otherwise; {mend.format(begun[name])}."
            )
    others = [f"{name} {begun[name]}" for name in here if name in begun and begun[name] != here[name]]
    if others:
        say(f"{folder.path} was started with {', '.join(others)}; the agents that are left may round otherwise.")
    return True


def _blank(programs: Programs, num_iterations: int) -> Checkpoint:
    """Shapes of a block's checkpoint."""
    size = programs.agents_per_block

    def empty(leaf: Any) -> np.ndarray:
        shape = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
        return np.empty((size, *shape.shape[1:]), shape.dtype)

    state = jax.tree.map(empty, programs.states)
    return Checkpoint(state, {name: np.empty((size, num_iterations), np.float32) for name in METRICS}, 0)


def _rows_to_columns(
    spec: Spec, points: list[Point], group: Group, block: Block, rows: dict[str, np.ndarray]
) -> dict[str, Any]:
    """A block's rows as the columns of its Parquet file."""
    agents = np.arange(block.first, block.last)
    at = np.array(group.points, np.int32)[agents // spec.num_seeds]
    configs = [points[i].config for i in at]
    failed = failed_iteration(rows)
    return {
        "point": at,
        "seed": (spec.seed + agents % spec.num_seeds).astype(np.int32),
        **{name: [getattr(config, name) for config in configs] for name in SETTINGS},
        "env_steps": np.array([c.num_iterations * c.steps_per_iteration for c in configs], np.int64),
        "final_return": rows["final_return"],
        "training_return": training_return(rows),
        "failed_at": np.ma.masked_equal(failed, 0),
        **{name: rows[name] for name in METRICS},
    }
