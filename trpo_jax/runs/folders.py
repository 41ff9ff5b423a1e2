"""A run's folder: config.json, metrics.csv, eval.csv, checkpoints/, learning_curve.png; and the training for them.

After each chunk of iterations the metrics are appended, then the state is saved with the checksum of all rows so far. A
run that is killed at any moment continues from its last chunk with the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.environments.make import settle
from trpo_jax.files import command, locked
from trpo_jax.runs.descriptions import check_equal, is_begun, made_by, origin, read_table, restore_or_anew, write_table
from trpo_jax.runs.evaluations import Judge, best_states
from trpo_jax.runs.metrics import TableFile, last_mean, rows_of
from trpo_jax.runs.runner import (
    CAPACITY,
    Chunk,
    Clock,
    advance,
    agent_keys,
    for_each_agent,
    interrupts,
    without_stopped,
)
from trpo_jax.runs.sinks import Sink
from trpo_jax.sentences import UsageError, check_limits, shown
from trpo_jax.settings import checked_settings, settings_of, with_length
from trpo_jax.training.checkpoints import Checkpoints, Saved
from trpo_jax.training.evaluation import stops
from trpo_jax.training.loop import init, train_chunk
from trpo_jax.training.memory import check_episodes, check_memory, free_memory
from trpo_jax.training.state import TrainState
from trpo_jax.validation import validate

_CONTINUES = "what is done is safe, and `trpo-jax resume` continues when the folder can be written to"


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder and what was asked of it. Agent i of a run is the one that `jax.random.key(seed + i)` trains.

    Of every `keep_every`-th iteration the checkpoint stays; 0: of the newest two alone.
    """

    path: Path
    config: Config
    seed: int
    num_seeds: int
    keep_every: int = 0

    @property
    def keys(self) -> jax.Array:
        """One PRNG key per agent, [num_seeds]."""
        return agent_keys(self.seed, self.num_seeds)

    @property
    def description(self) -> dict[str, Any]:
        """What decides the results, as config.json keeps it."""
        numbers = {name: getattr(self, name) for name in ("seed", "num_seeds", "keep_every")}
        return {**settings_of(self.config), **numbers}

    @property
    def checkpoints(self) -> Checkpoints:
        """Its checkpoints."""
        owner, kind = origin(self.path / "config.json"), "run, whose settings differ"
        folder = self.path / "checkpoints"
        return Checkpoints(folder, owner, kind, kept=2, every=self.keep_every, mend=_CONTINUES)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a chunk reports: iterations done, the mean over agents of its last row, the time that it takes, and the mean
    of their last evaluations, NaN before the first."""

    iteration: int
    metrics: dict[str, float]
    clock: Clock
    evaluation: float = math.nan


def create_run(path: str | os.PathLike[str], config: Config, seed: int, num_seeds: int, keep_every: int = 0) -> Run:
    """Make the folder and write config.json, or take up an equal run that is there already.

    Raises:
      UsageError: if the settings, the environment or the folder cannot be used; nothing is overwritten.
    """
    free = free_memory(jax.local_devices()[:1])
    check_memory(config, num_seeds, free)
    if config.eval_every:
        check_episodes(config, num_seeds, config.eval_episodes, free, "eval_episodes")
    run = Run(Path(path), config, seed, num_seeds, keep_every)
    file = run.path / "config.json"
    if not is_begun(file, "run"):
        write_table(file, {**run.description, "made_by": made_by()}, first=True)
    mend = f"choose another --output, or continue that run with {command('resume', path, env=config.env)}"
    check_equal(run.path, "run", run.description, open_run(path, config.env).description, mend)
    return run


def open_run(path: str | os.PathLike[str], env: str | None = None) -> Run:
    """Read a run's config.json.

    Args:
      path: folder of the run.
      env: its environment once more, where that names a module to import: no file has one imported by itself.

    Raises:
      UsageError: if the file is missing or damaged, with one sentence.
    """
    file = Path(path) / "config.json"
    described = read_table(file, "run")
    described.pop("made_by", None)
    name, trusted = described.get("env"), {}
    if env is not None and name == env:
        trusted = {"env": described.pop("env")}
    elif isinstance(name, str) and ":" in name:
        raise UsageError(
            f"{file} names an environment whose module would be imported; if you trust it, name it once more: "
            f"--env {shown(name)}."
        )
    try:
        numbers = {number: described.pop(number, None) for number in ("seed", "num_seeds")}
        numbers["keep_every"] = described.pop("keep_every", 0)
        check_limits({number: "nothing" if value is None else value for number, value in numbers.items()})
        config = settle(with_length({**checked_settings(described, "it"), **trusted}, Config()))
        validate(config)
    except UsageError as error:
        raise UsageError(f"{file} is damaged ({str(error).rstrip('.?')}); {restore_or_anew('run')}.") from error
    return Run(Path(path), config, **numbers)


def newest_state(run: Run) -> TrainState | None:
    """The newest checkpoint of a run that can be read, agents along the first axis; None if there is none yet.

    Raises:
      UsageError: if there are some and none can be read.
    """
    saved = run.checkpoints.newest(lambda done: run.config)
    return jax.tree.map(jnp.asarray, saved.state) if saved else None


def chosen_state(run: Run, which: str) -> TrainState | None:
    """The state of a run that is meant by "last", "best" (by evaluation during training) or a number of iterations.

    Agents lie along the first axis; None if there is no checkpoint yet.

    Raises:
      UsageError: if there is no such checkpoint, or it cannot be used.
    """
    if which == "last":
        return newest_state(run)
    if which == "best":
        return best_states(run)
    if not (which.isascii() and which.isdigit() and len(which) < 9):
        raise UsageError(f"checkpoint must be best, last or a number of iterations, got {shown(which)}.")
    return jax.tree.map(jnp.asarray, run.checkpoints.at(int(which), run.config).state)


def continue_run(
    run: Run, report: Callable[[Progress], bool | None] = lambda progress: None, sinks: Sequence[Sink] = ()
) -> bool:
    """Train from the newest checkpoint to the end.

    Ctrl-C (or SIGTERM) ends the training after the current chunk; a second one ends it at once.

    Args:
      run: the run.
      report: called after each chunk, when its rows and its checkpoint are on the disk; if it returns False, the
        training ends there, and can be continued.
      sinks: where the metrics go beside metrics.csv.

    Returns:
      Whether the run is complete.

    Raises:
      UsageError: if another process is at work on the folder, or it cannot be written to or continued.
    """
    with locked(run.path, "checkpoints"):
        file, judge, checkpoints = TableFile(run.path / "metrics.csv"), Judge(run, _CONTINUES), run.checkpoints
        saved = _restore(run, file, judge, checkpoints)
        done, until = saved.done if saved else 0, run.config.num_iterations
        if done >= until or judge.stopped.all():
            return True
        program, states = _compile(run, judge, jax.tree.map(jnp.asarray, saved.state) if saved else None)
        with interrupts() as interrupted:
            steps = run.num_seeds * run.config.steps_per_iteration  # of an iteration of all agents
            clock = Clock(steps * until, steps * done)

            def on_chunk(chunk: Chunk) -> bool:
                metrics = without_stopped(chunk.metrics, judge.stopped)
                rows = list(rows_of(metrics, chunk.done, run.config.steps_per_iteration, run.seed))
                file.append(rows, _CONTINUES)
                judged = judge(chunk)
                for sink in sinks:
                    for _, env_steps, seed, values in rows:
                        sink(seed, env_steps, values)
                    for _, env_steps, seed, values in judged:
                        sink(seed, env_steps, {f"evaluation/{name}": value for name, value in values.items()})
                checkpoints.save(chunk.states, chunk.done, rows=file.note, **judge.note)
                clock.count(steps * chunk.length)
                means = {name: last_mean(values) for name, values in metrics.items()}
                going = report(Progress(chunk.done, means, clock, float(judge.newest.mean()))) is not False
                return going and not interrupted() and not judge.stopped.all()

            ends = run.config.eval_every, run.keep_every
            done = advance(program, run.config, states, done, until, on_chunk, ends=ends)
    return done >= until or bool(judge.stopped.all())


def _restore(run: Run, file: TableFile, judge: Judge, checkpoints: Checkpoints) -> Saved | None:
    """The checkpoint to go on from, if there is one; rows beyond it are dropped, as a kill left them."""

    def check(saved: Saved) -> None:
        for table in filter(None, (file, judge.file)):
            table.check(saved.done, saved.note)

    saved = checkpoints.newest(lambda done: run.config, check)
    # The first checkpoint is saved after one iteration, so its rows may be there without it.
    if saved is None and file.num_lines > 1 + run.num_seeds:
        raise UsageError(
            f"{run.path} has rows in metrics.csv and no checkpoints; restore those, or train anew into another folder."
        )
    note = saved.note if saved else {}
    file.truncate(note)
    judge.restore(note)
    return saved


def _compile(run: Run, judge: Judge, states: TrainState | None) -> tuple[Any, Any]:
    """The program of a run, see `advance`, and its states: those given, or those before the first iteration."""
    start = jax.jit(for_each_agent(init, run.num_seeds))
    chunk = functools.partial(train_chunk, capacity=CAPACITY)
    train = jax.jit(for_each_agent(chunk, run.num_seeds), donate_argnums=1)
    with ThreadPoolExecutor(max_workers=1) as compiler:  # one program compiles while the next is traced
        started = compiler.submit(start.lower(run.config, run.keys).compile) if states is None else None
        like = jax.eval_shape(start, run.config, run.keys) if states is None else states
        program = _compile_stopping(run, judge, like) if stops(run.config) else None
        program = program or train.lower(run.config, like, np.int32(1)).compile()
        return program, states if started is None else started.result()(run.config, run.keys)


def _compile_stopping(run: Run, judge: Judge, like: TrainState) -> Callable[..., Any]:
    """The same where agents may stop before others: each has a number of iterations of its own, which is 0 then."""

    def chunk(config: Config, x: tuple[TrainState, Any]) -> Any:
        return train_chunk(config, *x, capacity=CAPACITY)

    def train(config: Config, states: TrainState, lengths: Any) -> Any:
        return for_each_agent(chunk, run.num_seeds)(config, (states, lengths))

    lengths = np.zeros(run.num_seeds, np.int32)
    program = jax.jit(train, donate_argnums=1).lower(run.config, like, lengths).compile()
    return lambda config, states, length: program(config, states, np.where(judge.stopped, np.int32(0), length))
