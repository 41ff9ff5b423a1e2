"""A sweep in a folder: group by group, in blocks of agents on every device; each finished block becomes a file."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
import numpy as np

from trpo_jax.config import Config
from trpo_jax.runs.descriptions import made_by
from trpo_jax.runs.metrics import METRICS, rows_of
from trpo_jax.runs.runner import Clock, interrupts
from trpo_jax.runs.sinks import OpenSink, Sink
from trpo_jax.runs.workers import Worker, check_workers, start_workers
from trpo_jax.sentences import UsageError, check_limits
from trpo_jax.settings import settings_of
from trpo_jax.sweeps.cohorts import Cohort, Snapshot, failed_iteration, join, stopped_iteration, training_return
from trpo_jax.sweeps.grids import Point, Spec, checked_spec
from trpo_jax.sweeps.placement import Ahead, agents_per_block, devices_for, fit_programs
from trpo_jax.sweeps.plans import Block, Group, cut_into_blocks, plan
from trpo_jax.sweeps.programs import Programs
from trpo_jax.sweeps.rows import settings_as_columns
from trpo_jax.sweeps.storage import Folder
from trpo_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a sweep: its group and their number, its blocks, their iterations, and the clock."""

    group: tuple[int, int]
    blocks: list[Block]
    num_blocks: int
    iteration: int
    num_iterations: int
    clock: Clock


def run_sweep(
    path: str | os.PathLike[str],
    spec: Spec,
    *,
    process: tuple[int, int] = (0, 1),
    checkpoint_seconds: float = 60.0,
    most_agents: int | None = None,
    report: Callable[[Progress], bool | None] = lambda progress: None,
    open_sinks: Callable[[str, Mapping[str, Any]], Sequence[OpenSink]] = lambda part, settings: (),
    extend: bool = False,
    planned: tuple[list[Point], list[Group]] | None = None,
    num_workers: int = 1,
) -> Literal["complete", "interrupted", "shared"]:
    """Run a sweep in a folder, or continue the one that is there, to its end.

    Args:
      path: the folder.
      spec: the sweep.
      process: this process's number p and the number P of all; block b belongs to process b mod P.
      checkpoint_seconds: seconds between two checkpoints of a block in progress.
      most_agents: most agents per device in one program; None: as many as are useful.
      report: called after every chunk of iterations; if it returns False, the sweep is interrupted there.
      open_sinks: `open_sinks(part, settings)` is called for each point of a finished block with its name, such as
        "point_3", and its settings. It returns further outputs for the metrics of its agents, and how to close them.
      extend: if the folder has another sweep, add the agents of this one that it lacks; existing ones stay.
      planned: the result of `plan(spec)`, if it is there already; for 100,000 points it takes 14 to 25 s.
      num_workers: processes that train the agents of environments that run in Python; 1: this one does. Others see only
        environments that come from a module, such as gymnasium/MODULE:NAME.

    Returns:
      How it ended: "complete" if all blocks of all processes are finished, "interrupted" by Ctrl-C, SIGTERM or the
      report, or "shared" if this process is done but others are not.

    Raises:
      UsageError: if the spec, the folder or a file in it cannot be used; finished results stay as they are.
    """
    spec = checked_spec(spec)  # bad input shows before anything is written
    rank, num_processes = process
    check_limits({"process_id": rank, "num_processes": num_processes})
    check_limits({"agents_per_device": most_agents, "checkpoint_seconds": checkpoint_seconds})
    check_workers(num_workers)
    if rank >= num_processes:
        raise UsageError(f"process {rank} of {num_processes} does not exist; they are numbered from 0.")
    planned = planned or plan(spec)
    folder = Folder(path)
    with folder.locked(rank), interrupts() as interrupted:
        before = folder.describe(spec, made_by(), extend=extend)
        points, groups = plan(spec, before) if before else planned
        clock = Clock(sum(group.num_agents * group.steps_per_agent for group in groups) / num_processes)
        with start_workers(min(num_workers, max(group.num_agents for group in groups))) as workers:
            work = _Work(
                folder=folder,
                spec=spec,
                points=points,
                groups=groups,
                process=process,
                workers=workers,
                checkpoint_seconds=checkpoint_seconds,
                most_agents=most_agents,
                clock=clock,
                interrupted=interrupted,
                report=report,
                open_sinks=open_sinks,
            )
            with contextlib.closing(work.ahead), work.writing():
                for group in range(len(groups)):
                    work.train_group(group)
                    if work.stopped:
                        return "interrupted"
    complete = all(folder.is_finished(block) for group in range(len(groups)) for block in work.blocks(group))
    return "complete" if complete else "shared"


@dataclasses.dataclass
class _Work:
    """A sweep in progress in its folder; see `run_sweep`."""

    folder: Folder
    spec: Spec
    points: list[Point]
    groups: list[Group]
    process: tuple[int, int]
    workers: Sequence[Worker]
    checkpoint_seconds: float
    most_agents: int | None
    clock: Clock
    interrupted: Callable[[], bool]
    report: Callable[[Progress], bool | None]
    open_sinks: Callable[[str, Mapping[str, Any]], Sequence[OpenSink]]
    ahead: Ahead = dataclasses.field(default_factory=Ahead)
    writer: ThreadPoolExecutor = dataclasses.field(default_factory=lambda: ThreadPoolExecutor(1, "write-results"))
    written: tuple[Future[None], list[tuple[Block, dict[str, np.ndarray]]]] | None = None  # the blocks of last time
    rounding_checked: bool = False
    ended: bool = False  # by the report

    @property
    def stopped(self) -> bool:
        """Whether the sweep should end early."""
        return self.ended or self.interrupted()

    def blocks(self, number: int) -> list[Block]:
        """All blocks of a group, once the processes have agreed on its program."""
        agreed = self.folder.program(number)
        assert agreed is not None
        return cut_into_blocks(self.groups[number].num_agents, number, agreed["agents_per_block"])

    def _own(self, number: int) -> list[Block]:
        """The blocks of a group that belong to this process."""
        return [block for block in self.blocks(number) if block.number % self.process[1] == self.process[0]]

    def _pending(self, number: int) -> list[Block]:
        """Those that are not finished."""
        return [block for block in self._own(number) if not self.folder.is_finished(block)]

    def train_group(self, number: int) -> None:
        """Train the remaining blocks of a group."""
        group = self.groups[number]
        expected = group.num_agents * group.steps_per_agent / self.process[1]  # before blocks were cut
        if self.folder.program(number) and not self._pending(number):
            self.clock.done += expected
            return
        programs = self._compile(number)
        self._compile_ahead(number)
        pending = self._pending(number)
        own, left = (sum(block.size for block in some) * group.steps_per_agent for some in (self._own(number), pending))
        self.clock.total += own - expected
        self.clock.done += own - left
        self.clock.start()
        found = {block: self.folder.restore(block, programs.states, group.configs[0].eval_every) for block in pending}
        snapshots = {block: snapshot for block, snapshot in found.items() if snapshot}
        while pending and not self.stopped:
            # Blocks at the same iteration run together, the most advanced first.
            stands = {block: snapshots[block].done if block in snapshots else 0 for block in pending}
            most = max(stands.values())
            together = [block for block in pending if stands[block] == most][: programs.num_devices]
            pending = [block for block in pending if block not in together]
            self._train_blocks(programs, together, [snapshots.pop(block) for block in together] if most else None)

    def _request(self, number: int) -> tuple[Config, int, int, list[Any]]:
        """The arguments of `fit_programs` for a group."""
        group, agreed = self.groups[number], self.folder.program(number)
        config, devices = group.configs[0], devices_for(group.configs[0], self.workers[: group.num_agents])
        of_all = len(devices) * self.process[1]
        agents = agreed["agents_per_block"] if agreed else agents_per_block(config, group.num_agents, of_all)
        return config, min(agents, self.most_agents or agents), self.spec.num_episodes, devices

    def _compile_ahead(self, number: int) -> None:
        """Begin to compile the programs of the next group that has something to train."""
        for later in range(number + 1, len(self.groups)):
            if not self.folder.program(later) or self._pending(later):
                return self.ahead.begin(*self._request(later))

    def _compile(self, number: int) -> Programs:
        """Compile a group's programs, and agree with the other processes on how many agents they hold."""
        if not self.rounding_checked:
            self.folder.check_rounding(made_by())
            self.rounding_checked = True
        group = self.groups[number]
        programs = fit_programs(*self._request(number), ahead=self.ahead)
        about = {"agents": group.num_agents, "agents_per_block": programs.agents_per_block, "memory": programs.memory}
        agreed = self.folder.agree_on_program(number, about)
        if agreed["agents_per_block"] != programs.agents_per_block:
            raise UsageError(
                f"{self.folder.path} was started with {agreed['agents_per_block']} agents per device; here there is "
                f"not enough free memory for them, or another number was requested ({programs.agents_per_block})."
            )
        return programs

    def _train_blocks(self, programs: Programs, blocks: list[Block], snapshots: Sequence[Snapshot] | None) -> None:
        """Train at most D blocks, one per device, from their common iteration; begin to write their results.

        An interrupt saves them after the current chunk.
        """
        group = self.groups[blocks[0].group]
        members = [i for block in blocks for i in range(block.first, block.last)]
        keys = group.keys[np.array(members)]
        cohort = Cohort(programs, [group.configs[i] for i in members], keys, join(snapshots) if snapshots else None)
        at, num_blocks = (blocks[0].group, len(self.groups)), -(-group.num_agents // programs.agents_per_block)
        steps = len(members) * group.configs[0].steps_per_iteration  # of an iteration
        self.clock.done += steps * cohort.done
        ends = np.cumsum([block.size for block in blocks])
        each = [(block, slice(end - block.size, end)) for block, end in zip(blocks, ends, strict=True)]
        saved = time.monotonic()

        def on_chunk(length: int) -> bool:
            nonlocal saved
            self._conclude(wait=False)
            self.clock.count(steps * length)
            progress = Progress(at, blocks, num_blocks, cohort.done, group.num_iterations, self.clock)
            self.ended |= self.report(progress) is False
            stop, late = self.stopped, time.monotonic() - saved >= self.checkpoint_seconds
            if (stop or late) and cohort.done < group.num_iterations:
                snapshot = cohort.snapshot()
                for block, where in each:
                    self.folder.save(block, snapshot.take(where))
                saved = time.monotonic()
            return not stop

        cohort.train(group.num_iterations, on_chunk)
        if cohort.done < group.num_iterations:
            return
        outcome = {**cohort.metrics, "final_return": cohort.evaluate()}
        if cohort.eval_return is not None:
            stopped_at = stopped_iteration(cohort.eval_return, group.configs[0])
            outcome |= {"eval_return": cohort.eval_return, "stopped_at": np.ma.masked_equal(stopped_at, 0)}
        finished = []
        for block, where in each:
            mine = {name: values[where] for name, values in outcome.items()}
            self._keep(block, cohort.states, where, mine)
            finished.append((block, mine))
        self._conclude()
        self.written = self.writer.submit(self._write, finished), finished

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Write the results of finished blocks in a thread, while the devices train the next ones."""
        with self.writer:
            try:
                yield
            finally:
                self._conclude()

    def _write(self, finished: Sequence[tuple[Block, dict[str, np.ndarray]]]) -> None:
        for block, outcome in finished:
            self.folder.write_results(block, self._columns(block, outcome))

    def _conclude(self, wait: bool = True) -> None:
        """Raise what failed while the last results were written; pass them to the sinks."""
        if self.written and (wait or self.written[0].done()):
            (writing, finished), self.written = self.written, None
            writing.result()
            for block, outcome in finished:
                self._feed_sinks(block, outcome)

    def _keep(self, block: Block, states: TrainState, where: slice, outcome: Mapping[str, np.ndarray]) -> None:
        """Write the states of a block's agents that the sweep keeps: all, or that of the best one of each point."""
        agents = np.arange(block.first, block.last)
        if self.spec.keep == "best":
            score = outcome["final_return"] if self.spec.num_episodes else training_return(outcome)
            points, _ = self.groups[block.group].agents(block.first, block.last)
            order = np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")
            best = {point: agent for point, agent in reversed([(points[i], agents[i]) for i in order])}
            agents = np.array(sorted(best.values()))
        if self.spec.keep != "none":
            at = where.start + agents - block.first
            self.folder.keep(block, jax.tree.map(lambda leaf: leaf[at], states), agents)

    def _feed_sinks(self, block: Block, outcome: Mapping[str, np.ndarray]) -> None:
        """Pass the metrics of a finished block's agents to the sinks of their points."""
        points, seeds = self.groups[block.group].agents(block.first, block.last)
        for point in dict.fromkeys(points.tolist()):
            here = np.flatnonzero(points == point)
            config, mine = self.points[point].config, {name: values[here] for name, values in outcome.items()}
            with contextlib.ExitStack() as opened:
                for sink, close in self.open_sinks(f"point_{point}", settings_of(config)):
                    opened.callback(close)
                    _feed(sink, mine, config, self.spec.seed + int(seeds[here[0]]))

    def _columns(self, block: Block, outcome: dict[str, np.ndarray]) -> dict[str, Any]:
        """The rows of a block as the columns of its Parquet file."""
        at, seeds = self.groups[block.group].agents(block.first, block.last)
        return {
            "point": at,
            "seed": (self.spec.seed + seeds).astype(np.int32),
            **dict(zip(self._settings.schema.names, self._settings.take(at), strict=True)),
            "env_steps": np.full(len(at), self.groups[block.group].steps_per_agent, np.int64),
            "final_return": outcome["final_return"],
            "training_return": training_return(outcome),
            "failed_at": np.ma.masked_equal(failed_iteration(outcome), 0),
            **{name: values for name, values in outcome.items() if name != "final_return"},
        }

    @functools.cached_property
    def _settings(self) -> Any:
        return settings_as_columns([point.config for point in self.points])


def _feed(sink: Sink, outcome: Mapping[str, np.ndarray], config: Config, seed: int) -> None:
    """Pass all metrics and evaluations of agents of one point to a sink; the first agent has this seed."""
    steps, metrics = config.steps_per_iteration, {name: outcome[name] for name in METRICS}
    for _, env_steps, agent, values in rows_of(metrics, config.num_iterations, steps, seed):
        sink(agent, env_steps, values)
    for i, means in enumerate(outcome.get("eval_return", ())):
        for k, mean in enumerate(means, 1):
            sink(seed + i, k * config.eval_every * steps, {"evaluation/mean": float(mean)})
