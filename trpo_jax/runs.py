"""A run's folder: config.json, metrics.csv, checkpoints/, learning_curve.png; and the loop that fills it.

The loop is the scan of `train`, run in chunks: after each one the metrics are appended and the state is saved, so a
run that is killed at any moment continues from its last chunk with the same bits.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trpo_jax.config import UsageError, check_limits, shown, validate
from trpo_jax.files import checked_settings, read_json, settings_of, write_atomically
from trpo_jax.sinks import Sink
from trpo_jax.training.checkpoints import load, save
from trpo_jax.training.loop import init, train_chunk
from trpo_jax.training.memory import check_memory, free_memory
from trpo_jax.types import Config, Metrics, TrainState

_COLUMNS = ("iteration", "env_steps", "seed", *(field.name for field in dataclasses.fields(Metrics)))
_CAPACITY = 256  # rows of metrics a chunk can hold
_CHUNK_SECONDS = 0.5  # aimed at: often enough to watch and to lose little, rare enough to cost nothing
_KEPT_CHECKPOINTS = 2


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
    if file.exists():
        other = open_run(path, config.env).description
        changed = [name for name, value in run.description.items() if other.get(name) != value]
        if changed:
            raise UsageError(
                f"{path} holds a run with another {', '.join(changed)}; choose another --output, or continue that run "
                f"with `trpo-jax resume {path}`."
            )
        return run
    begun = f".{file.name}."  # a kill may have left the beginning of the file
    if run.path.exists() and (not run.path.is_dir() or any(not e.name.startswith(begun) for e in run.path.iterdir())):
        raise UsageError(f"{path} exists and is not the folder of a run; choose another --output.")
    versions = {name: version(name) for name in ("jax", "jaxlib", "gymnax", "flax", "optax")}
    made_by = {"python": platform.python_version(), **versions, "device": jax.devices()[0].device_kind}
    text = json.dumps({**run.description, "made_by": made_by}, indent=2) + "\n"
    write_atomically(file, text)
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
        check_limits({number: "nothing" if value is None else value for number, value in numbers.items()})
        config = Config().replace(**checked_settings(described, "it"), **trusted)
        validate(config)
    except UsageError as error:
        raise UsageError(f"{file} is damaged ({str(error).rstrip('.?')}); {mend}.") from error
    return Run(Path(path), config, **numbers)


def newest_state(run: Run) -> TrainState | None:
    """The newest checkpoint of a run, agents along the first axis; None if it was stopped before the first one."""
    files = sorted((run.path / "checkpoints").glob("[0-9]*.npz"))
    return load(files[-1], run.config) if files else None


def continue_run(run: Run, report: Callable[[Progress], None], sinks: Sequence[Sink] = ()) -> bool:
    """Train from the newest checkpoint to the end.

    Ctrl-C (or SIGTERM) ends the loop after the current chunk; a second one ends it at once.

    Args:
      run: the run.
      report: called after each chunk.
      sinks: where the metrics go beside metrics.csv.

    Returns:
      Whether the run is complete.
    """
    config = run.config
    start = jax.jit(_for_each_agent(init, run.num_seeds))
    train_agents = jax.jit(
        _for_each_agent(functools.partial(train_chunk, capacity=_CAPACITY), run.num_seeds), donate_argnums=1
    )
    state, keys = newest_state(run), run.keys
    with ThreadPoolExecutor(max_workers=1) as compiler:  # one program compiles while the next is traced
        first_state = compiler.submit(start.lower(config, keys).compile) if state is None else None
        done = 0 if state is None else int(state.iteration[0])
        _truncate_metrics(run, done)
        if done >= config.num_iterations:
            return True
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
            _append_metrics(run, done, length, table)
            for sink in sinks:
                _feed(sink, run, done, length, table)
            done += length
            _save_state(run, state, done)
            now = time.perf_counter()
            per_iteration = (now - started) / (done - first)
            report(
                Progress(
                    iteration=done,
                    metrics={name: _last_mean(rows[:, :length]) for name, rows in table.items()},
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


def read_metrics(run: Run) -> dict[str, np.ndarray]:
    """Columns of metrics.csv as arrays [rows]."""
    with open(run.path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in _COLUMNS}


def plot_learning_curve(run: Run) -> Path:
    """Draw return against environment steps: every agent thin, their mean thick, one standard deviation shaded."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    metrics = read_metrics(run)
    steps = np.unique(metrics["env_steps"])
    returns = metrics["episode_return"].reshape(len(steps), run.num_seeds)
    returns = fill_forward(returns)  # an iteration in which no episode ended says nothing new

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    seen = ~np.isnan(returns).any(axis=1)
    steps, returns = steps[seen], returns[seen]
    if run.num_seeds > 1:
        mean, spread = returns.mean(axis=1), returns.std(axis=1)
        axes.plot(steps, returns, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.fill_between(steps, mean - spread, mean + spread, color="tab:blue", alpha=0.2, label="± 1 std over seeds")
        axes.plot(steps, mean, color="tab:blue", linewidth=2, label=f"mean of {run.num_seeds} seeds")
        axes.legend(loc="lower right")
    else:
        axes.plot(steps, returns, color="tab:blue", linewidth=2)
    method = {"trpo": "TRPO", "ppo": "PPO"}.get(run.config.update, run.config.update.replace("-", " "))
    axes.set(title=f"{method} on {run.config.env}", xlabel="environment steps (each agent)", ylabel="episode return")
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
    file = run.path / "learning_curve.png"
    figure.savefig(file, dpi=150)
    return file


def _append_metrics(run: Run, done: int, length: int, table: dict[str, np.ndarray]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for i in range(length):
        iteration = done + i + 1
        for agent in range(run.num_seeds):
            values = [f"{float(rows[agent, i]):.9g}" for rows in table.values()]  # nine digits hold a float32
            writer.writerow([iteration, iteration * run.config.steps_per_iteration, run.seed + agent, *values])
    try:
        with open(run.path / "metrics.csv", "a", newline="") as file:
            file.write(text.getvalue())
    except OSError as error:
        raise UsageError(f"cannot write {run.path / 'metrics.csv'}: {error.strerror}.") from error


def _feed(sink: Sink, run: Run, done: int, length: int, table: dict[str, np.ndarray]) -> None:
    for i in range(length):
        for agent in range(run.num_seeds):
            row = {name: float(rows[agent, i]) for name, rows in table.items()}
            sink(run.seed + agent, (done + i + 1) * run.config.steps_per_iteration, row)


def _truncate_metrics(run: Run, done: int) -> None:
    """Keep the rows of the first `done` iterations: a run killed after writing rows and before saving repeats them."""
    file = run.path / "metrics.csv"
    lines = file.read_text().splitlines(keepends=True)[1:] if file.exists() else []
    kept = lines[: done * run.num_seeds]
    if len(kept) < done * run.num_seeds or (kept and not kept[-1].startswith(f"{done},")):
        raise UsageError(f"{file} lacks rows of the {done} iterations that were done; restore it or train anew.")
    write_atomically(file, ",".join(_COLUMNS) + "\n" + "".join(kept))


def _save_state(run: Run, state: TrainState, done: int) -> None:
    folder = run.path / "checkpoints"
    save(folder / f"{done:08d}.npz", state)
    for old in sorted(folder.glob("[0-9]*.npz"))[:-_KEPT_CHECKPOINTS]:
        old.unlink()


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag, so that no chunk is lost half-written."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _last_mean(rows: np.ndarray) -> float:
    """Mean over agents [A] of each one's last value in [A, rows] that is not NaN."""
    filled = fill_forward(rows.T)[-1]
    return float(np.mean(filled[~np.isnan(filled)])) if not np.isnan(filled).all() else float("nan")


def fill_forward(rows: np.ndarray) -> np.ndarray:
    """Replace NaN by the last number above it in each column of [rows, A]."""
    index = np.where(np.isnan(rows), 0, np.arange(len(rows))[:, None])
    np.maximum.accumulate(index, axis=0, out=index)
    return np.take_along_axis(rows, index, axis=0)
