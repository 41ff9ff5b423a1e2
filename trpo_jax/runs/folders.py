"""A run's folder: config.json, metrics.csv, checkpoints/, learning_curve.png; and the loop that fills it.

The loop is the scan of `train`, run in chunks: after each one the metrics are appended, then the state is saved with
the checksum of all rows so far. A run that is killed at any moment continues from its last chunk with the same bits.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import io
import os
import platform
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config import UsageError, check_limits, counted, shown, validate
from trpo_jax.files import (
    append,
    check_seal,
    command,
    is_fresh,
    locked,
    origin,
    read_json,
    remove_temporaries,
    say,
    write_atomically,
    write_table,
)
from trpo_jax.runs.metrics import COLUMNS, last_mean
from trpo_jax.runs.runner import interrupts
from trpo_jax.runs.sinks import Sink
from trpo_jax.settings import checked_settings, settings_of
from trpo_jax.training.checkpoints import read, save
from trpo_jax.training.loop import init, train_chunk
from trpo_jax.training.memory import check_memory, free_memory
from trpo_jax.types import Config, Metrics, TrainState

_CAPACITY = 256  # rows of metrics a chunk can hold
_CHUNK_SECONDS = 0.5  # aimed at: often enough to watch and to lose little, rare enough to cost nothing
_KEPT_CHECKPOINTS = 2
_CONTINUES = "what is done is safe, and `trpo-jax resume` continues when the folder can be written to"
_HEADER = ",".join(COLUMNS) + "\n"


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder and what was asked of it. Agent i of a run is the one that `jax.random.key(seed + i)` trains."""

    path: Path
    config: Config
    seed: int
    num_seeds: int

    @property
    def keys(self) -> jax.Array:
        """One PRNG key an agent, [num_seeds]."""
        return jax.jit(jax.vmap(jax.random.key))(self.seed + np.arange(self.num_seeds))

    @property
    def description(self) -> dict[str, Any]:
        """What decides the results, as config.json keeps it."""
        return {**settings_of(self.config), "seed": self.seed, "num_seeds": self.num_seeds}


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a chunk reports: iterations done, the mean over agents of its last row, and seconds spent."""

    iteration: int
    metrics: dict[str, float]
    seconds: float
    steps_per_second: float
    seconds_left: float


def create_run(path: str | os.PathLike[str], config: Config, seed: int, num_seeds: int) -> Run:
    """Make the folder and write config.json, or take up an equal run that is there already.

    Raises:
      UsageError: if the settings, the environment or the folder cannot be used; nothing is overwritten.
    """
    check_memory(config, num_seeds, free_memory(jax.local_devices()[:1]))
    run = Run(Path(path), config, seed, num_seeds)
    file = run.path / "config.json"
    if is_fresh(run.path, file.name):
        versions = {name: version(name) for name in ("jax", "jaxlib", "gymnax", "flax", "optax")}
        made_by = {"python": platform.python_version(), **versions, "device": jax.devices()[0].device_kind}
        write_table(file, {**run.description, "made_by": made_by}, first=True)
    elif not file.exists():
        raise UsageError(f"{path} exists and is not the folder of a run; choose another --output.")
    other = open_run(path, config.env).description
    changed = [name for name, value in run.description.items() if other.get(name) != value]
    if changed:
        raise UsageError(
            f"{path} holds a run with another {', '.join(changed)}; choose another --output, or continue that run "
            f"with {command('resume', path, env=config.env)}."
        )
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
    mend = "restore it or train anew into another folder"
    try:
        described = read_json(file, mend)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} is not the folder of a run (there is no {file}).") from None
    for about in ("made_by", "checksum"):
        described.pop(about, None)
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
        check_limits({number: "nothing" if value is None else value for number, value in numbers.items()})
        config = Config().replace(**checked_settings(described, "it"), **trusted)
        validate(config)
    except UsageError as error:
        raise UsageError(f"{file} is damaged ({str(error).rstrip('.?')}); {mend}.") from error
    check_seal(file, mend)
    return Run(Path(path), config, **numbers)


def newest_state(run: Run) -> TrainState | None:
    """The newest checkpoint of a run that can be read, agents along the first axis; None if there is none yet.

    Raises:
      UsageError: if there are some and none can be read.
    """
    return _newest(run)[0]


def _newest(run: Run, rows: bytes | None = None) -> tuple[TrainState | None, int]:
    """The newest checkpoint that can be used, and how many bytes of metrics.csv, `rows` if they matter, are older.

    What is passed over on the way to an older one is said.
    """
    reasons, ours = [], origin(run.path / "config.json")
    for file in _checkpoints(run):
        try:
            state, note = read(file, run.config)
            if not np.array_equal(jax.random.key_data(state.key), jax.random.key_data(run.keys)):
                raise UsageError(f"{file} is of other seeds than config.json names.")
            if isinstance(note, dict) and note.get("of", ours) != ours:
                raise UsageError(f"{file} is of another run, whose settings differ.")
            if int(state.iteration[0]) != int(file.stem):
                raise UsageError(f"{file} is of iteration {int(state.iteration[0])}, which its name denies.")
            length = 0 if rows is None else _rows_done(run, rows, int(state.iteration[0]), note)
        except UsageError as error:
            if not os.path.lexists(file):  # a process at work has newer ones by now
                return _newest(run, rows)
            reasons.append(str(error).rstrip(".").split("; ")[0])
            continue
        if reasons:
            say(f"{reasons[0]}; the checkpoint before it is used, {file.name}.")
        return jax.tree.map(jnp.asarray, state), length
    if reasons:
        raise UsageError(f"{reasons[0]}; restore it, or train anew into another folder.")
    return None, 0 if rows is None else _rows_begun(run, rows)


def _checkpoints(run: Run) -> list[Path]:
    """The files of a run's checkpoints, the newest first."""
    return sorted((run.path / "checkpoints").glob("[0-9]" * 8 + ".npz"), reverse=True)


def continue_run(run: Run, report: Callable[[Progress], None], sinks: Sequence[Sink] = ()) -> bool:
    """Train from the newest checkpoint to the end.

    Ctrl-C (or SIGTERM) ends the loop after the current chunk; a second one ends it at once.

    Args:
      run: the run.
      report: called after each chunk.
      sinks: where the metrics go beside metrics.csv.

    Returns:
      Whether the run is complete.

    Raises:
      UsageError: if another process is at work on the folder, or it cannot be written to or continued.
    """
    with locked(run.path):
        remove_temporaries(run.path, run.path / "checkpoints")
        return _train(run, report, sinks)


def _train(run: Run, report: Callable[[Progress], None], sinks: Sequence[Sink]) -> bool:
    config = run.config
    start = jax.jit(_for_each_agent(init, run.num_seeds))
    train_agents = jax.jit(
        _for_each_agent(functools.partial(train_chunk, capacity=_CAPACITY), run.num_seeds), donate_argnums=1
    )
    rows, keys = _Rows(run), run.keys
    state = rows.restore()
    done = 0 if state is None else int(state.iteration[0])
    if done >= config.num_iterations:
        return True
    with ThreadPoolExecutor(max_workers=1) as compiler:  # one program compiles while the next is traced
        first_state = compiler.submit(start.lower(config, keys).compile) if state is None else None
        like = jax.eval_shape(start, config, keys) if state is None else state
        chunk = train_agents.lower(config, like, np.int32(1)).compile()
        if first_state is not None:
            state = first_state.result()(config, keys)
    started, first, length = time.perf_counter(), done, 1
    with interrupts() as interrupted:
        while done < config.num_iterations and not interrupted():
            length = min(length, config.num_iterations - done, _CAPACITY)
            chunk_started = time.perf_counter()
            state, metrics = jax.block_until_ready(chunk(config, state, np.int32(length)))
            table = {field.name: np.asarray(getattr(metrics, field.name)) for field in dataclasses.fields(Metrics)}
            rows.append(done, length, table)
            for sink in sinks:
                _feed(sink, run, done, length, table)
            done += length
            rows.save(state, done)
            now = time.perf_counter()
            per_iteration = (now - started) / (done - first)
            report(
                Progress(
                    iteration=done,
                    metrics={name: last_mean(values[:, :length]) for name, values in table.items()},
                    seconds=now - started,
                    steps_per_second=run.num_seeds * config.steps_per_iteration / per_iteration,
                    seconds_left=per_iteration * (config.num_iterations - done),
                )
            )
            # At most doubled a chunk, so that one slow measurement cannot starve the display.
            length = max(1, min(2 * length, int(length * _CHUNK_SECONDS / (now - chunk_started))))
    return done >= config.num_iterations


def _for_each_agent(function: Callable[..., Any], num_agents: int) -> Callable[..., Any]:
    """Map `function(config, x, *rest)` over the agents along the first axis of x."""
    if num_agents > 1:
        return lambda config, x, *rest: jax.vmap(lambda one: function(config, one, *rest))(x)

    def call_once(config: Config, x: Any, *rest: Any) -> Any:
        # A batch of one would turn the branches that save a lone agent work into selections.
        result = function(config, jax.tree.map(lambda leaf: leaf[0], x), *rest)
        return jax.tree.map(lambda leaf: leaf[None], result)

    return call_once


class _Rows:
    """metrics.csv and the checkpoints of a run at work: rows reach the disk before the state that comes after them."""

    def __init__(self, run: Run):
        self.run, self.file = run, run.path / "metrics.csv"
        self.length, self.checksum = 0, 0  # of what the newest checkpoint is sure of
        self.kept: list[Path] = []
        self.origin = origin(run.path / "config.json")

    def restore(self) -> TrainState | None:
        """The state to go on from; what rows there are beyond it, a kill wrote them, are dropped."""
        try:
            rows = self.file.read_bytes()
        except FileNotFoundError:
            rows = b""
        except OSError as error:
            raise UsageError(f"cannot read {self.file}: {error.strerror}; restore it.") from error
        state, self.length = _newest(self.run, rows)
        kept = rows[: self.length] or _HEADER.encode()
        if kept != rows:
            write_atomically(self.file, kept)
        self.length, self.checksum = len(kept), zlib.crc32(kept)
        return state

    def append(self, done: int, length: int, table: dict[str, np.ndarray]) -> None:
        """Write `length` iterations that come after `done`, {metric: [agents, capacity]}."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for i in range(length):
            iteration = done + i + 1
            for agent in range(self.run.num_seeds):
                values = [f"{float(rows[agent, i]):.9g}" for rows in table.values()]  # nine digits hold a float32
                steps = iteration * self.run.config.steps_per_iteration
                writer.writerow([iteration, steps, self.run.seed + agent, *values])
        append(self.file, text.getvalue(), _CONTINUES)
        self.length += len(text.getvalue())
        self.checksum = zlib.crc32(text.getvalue().encode(), self.checksum)

    def save(self, state: TrainState, done: int) -> None:
        """Save a state after `done` iterations, and drop what is older than the one before it."""
        file = self.run.path / "checkpoints" / f"{done:08d}.npz"
        save(file, state, note={"rows": [self.length, self.checksum], "of": self.origin}, mend=_CONTINUES)
        self.kept = [*self.kept, file][-_KEPT_CHECKPOINTS:]
        for old in _checkpoints(self.run):
            if old.name < file.name and old not in self.kept:
                with contextlib.suppress(OSError):
                    old.unlink()


def _rows_done(run: Run, rows: bytes, done: int, note: Any) -> int:
    """How many bytes of metrics.csv a checkpoint stands on; raise `UsageError` if they are not as they were."""
    if isinstance(note, dict) and "rows" in note:
        length, checksum = note["rows"]
        sound = len(rows) >= length and zlib.crc32(rows[:length]) == checksum
    else:  # a checkpoint of an earlier version
        lines = rows.splitlines(keepends=True)[: 1 + done * run.num_seeds]
        length = sum(map(len, lines))
        whole = all(line.endswith(b"\n") and line.count(b",") == len(COLUMNS) - 1 for line in lines)
        sound = whole and len(lines) == 1 + done * run.num_seeds and lines[-1].startswith(b"%d," % done)
    if not sound:
        raise UsageError(f"{run.path / 'metrics.csv'} lacks rows of the {counted(done, 'iteration')} done.")
    return length


def _rows_begun(run: Run, rows: bytes) -> int:
    """0 bytes, where there is no checkpoint: the first one is saved after one iteration, so its rows may be there."""
    if rows.count(b"\n") > 1 + run.num_seeds:
        raise UsageError(
            f"{run.path} has rows in metrics.csv and no checkpoints; restore those, or train anew into another folder."
        )
    return 0


def _feed(sink: Sink, run: Run, done: int, length: int, table: dict[str, np.ndarray]) -> None:
    for i in range(length):
        for agent in range(run.num_seeds):
            row = {name: float(rows[agent, i]) for name, rows in table.items()}
            sink(run.seed + agent, (done + i + 1) * run.config.steps_per_iteration, row)
