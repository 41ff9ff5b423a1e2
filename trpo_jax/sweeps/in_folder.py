"""A sweep in a folder: group by group, blocks of agents on every device, each finished block into a file."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, Literal

import jax
import numpy as np

from trpo_jax import __version__
from trpo_jax.config import UsageError, counted
from trpo_jax.files import say
from trpo_jax.runs.metrics import METRICS
from trpo_jax.runs.runner import interrupts
from trpo_jax.settings import SETTINGS
from trpo_jax.sweeps.blocks import Block, Checkpoint, cut_into_blocks, failed_iteration, run_blocks, training_return
from trpo_jax.sweeps.grids import Group, Point, Spec, plan
from trpo_jax.sweeps.placement import Programs, agents_per_block, fit_programs, num_threads
from trpo_jax.sweeps.progress import Clock, Progress, Watch
from trpo_jax.sweeps.storage import Folder
from trpo_jax.training.checkpoints import is_key


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
