"""Training of a run in its folder: from its newest checkpoint to the end, chunk by chunk.

After each chunk of iterations the metrics are appended, then the state is saved with the checksum of all rows so far. A
run that is killed at any moment continues from its last chunk with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.files import locked
from trpo_jax.runs.evaluations import Evaluator, read_evaluations
from trpo_jax.runs.folders import CONTINUES, Run, start_of
from trpo_jax.runs.metrics import METRICS, Row, TableFile, last_mean, metrics_tree, read_metrics, rows_of
from trpo_jax.runs.runner import CAPACITY, Chunk, Clock, advance, for_each_agent, interrupts, without_stopped
from trpo_jax.runs.sinks import Sink
from trpo_jax.runs.workers import Worker, WorkersPrograms, check_workers, start_workers
from trpo_jax.sentences import UsageError, shown
from trpo_jax.training import evaluation
from trpo_jax.training.checkpoints import Checkpoints, Saved
from trpo_jax.training.devices import devices_of, shardings_of
from trpo_jax.training.evaluation import stops
from trpo_jax.training.loop import init, train_chunk
from trpo_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Progress:
    """Report of a chunk: iterations done, the mean over agents of its last row, the clock, and the mean of their last
    evaluations, NaN before the first."""

    iteration: int
    metrics: dict[str, float]
    clock: Clock
    evaluation: float = math.nan


def continue_run(
    run: Run,
    report: Callable[[Progress], bool | None] = lambda progress: None,
    sinks: Sequence[Sink] = (),
    *,
    late_sinks: Sequence[Sink] = (),
    num_devices: int = 1,
    num_workers: int = 1,
) -> bool:
    """Train a run from its newest checkpoint to the end.

    Ctrl-C (or SIGTERM) ends the training after the current chunk; a second one ends it at once.

    Args:
      run: the run.
      report: called after each chunk, when its rows and its checkpoint are on the disk; if it returns False, the
        training ends there, and can be continued.
      sinks: further outputs for the metrics, besides metrics.csv.
      late_sinks: the same, for those that also get the rows that exist already.
      num_devices: devices that share the environments of a single agent. Sums over them differ in their last bits from
        those on one device, so that a run repeats itself, and resumes to the same bits, on as many devices.
      num_workers: processes that share the agents of an environment that runs in Python; 1: this one trains them. The
        same holds for them. They see only environments that come from a module, such as gymnasium/MODULE:NAME.

    Returns:
      Whether the run is complete.

    Raises:
      UsageError: if another process is using the folder, it cannot be written to or continued, or the devices cannot
        be used.
    """
    if not isinstance(run, Run):
        raise UsageError(f"run must be what create_run or open_run returned, got {shown(run)}.")
    devices = devices_of(num_devices, run.config.num_envs, run.num_seeds)
    check_workers(num_workers)
    with locked(run.path, "checkpoints"), contextlib.ExitStack() as entered:
        file, evaluator, checkpoints = TableFile(run.path / "metrics.csv"), Evaluator(run, CONTINUES), run.checkpoints
        saved = _restore(run, file, evaluator, checkpoints)
        done, until = saved.done if saved else 0, run.config.num_iterations
        if saved:
            _give(late_sinks, *_stored_rows(run))
        sinks = [*sinks, *late_sinks]
        if done >= until or evaluator.stopped.all():
            return True
        stored = jax.tree.map(jnp.asarray, saved.state) if saved else start_of(run)
        workers = entered.enter_context(start_workers(min(num_workers, run.num_seeds)))
        train, states = _compile(run, evaluator, stored, devices, workers)
        interrupted = entered.enter_context(interrupts())
        steps = run.num_seeds * run.config.steps_per_iteration  # of an iteration of all agents
        clock = Clock(steps * until, steps * done)

        def on_chunk(chunk: Chunk) -> bool:
            if len(devices) > 1:
                chunk = chunk._replace(states=jax.device_put(chunk.states, devices[0]))
            metrics = without_stopped(chunk.metrics, evaluator.stopped)
            rows = list(rows_of(metrics, chunk.done, run.config.steps_per_iteration, run.seed))
            file.append(rows, CONTINUES)
            evaluated = evaluator(chunk)
            _give(sinks, rows, evaluated)
            checkpoints.save(chunk.states, chunk.done, rows=file.note, **evaluator.note)
            clock.count(steps * chunk.length)
            means = {name: last_mean(values) for name, values in metrics.items()}
            going = report(Progress(chunk.done, means, clock, float(evaluator.newest.mean()))) is not False
            return going and not interrupted() and not evaluator.stopped.all()

        def program(config: Config, states: TrainState, length: Any) -> Any:
            lengths = np.where(evaluator.stopped, np.int32(0), length) if stops(run.config) else length
            return train(config, states, lengths)

        ends = run.config.eval_every, run.keep_every
        done = advance(program, run.config, states, done, until, on_chunk, ends=ends)
    return done >= until or bool(evaluator.stopped.all())


def _give(sinks: Sequence[Sink], rows: Sequence[Row], evaluated: Sequence[Row]) -> None:
    """Pass rows of metrics.csv and of eval.csv to sinks."""
    for sink in sinks:
        for _, env_steps, seed, values in rows:
            sink(seed, env_steps, values)
        for _, env_steps, seed, values in evaluated:
            sink(seed, env_steps, {f"evaluation/{name}": value for name, value in values.items()})


def _stored_rows(run: Run) -> tuple[list[Row], list[Row]]:
    """Read the rows of metrics.csv and of eval.csv."""
    table = read_metrics(run.path)
    numbers = zip(*(table[name].astype(int).tolist() for name in ("iteration", "env_steps", "seed")), strict=True)
    values = zip(*(table[name].tolist() for name in METRICS), strict=True)
    rows = [(*own, dict(zip(METRICS, cells, strict=True))) for own, cells in zip(numbers, values, strict=True)]
    return rows, list(read_evaluations(run.path))


def _restore(run: Run, file: TableFile, evaluator: Evaluator, checkpoints: Checkpoints) -> Saved | None:
    """Return the checkpoint to continue from, if there is one; drop the rows after it, which a kill may leave."""

    def check(saved: Saved) -> None:
        for table in filter(None, (file, evaluator.file)):
            table.check(saved.done, saved.note)

    saved = checkpoints.newest(lambda done: run.config, check)
    # The first checkpoint is saved after one iteration, so its rows may be there without it.
    if saved is None and file.num_lines > 1 + run.num_seeds:
        raise UsageError(
            f"{run.path} has rows in metrics.csv but no checkpoints; restore these, or train again into another folder."
        )
    note = saved.note if saved else {}
    file.truncate(note)
    evaluator.restore(note)
    return saved


def _compile(
    run: Run, evaluator: Evaluator, states: TrainState | None, devices: Sequence[Any], workers: Sequence[Worker]
) -> tuple[Callable[..., Any], Any]:
    """Compile the program of a run, see `advance`; return it with the given or the initial states.

    Workers, if there are any, evaluate their agents, too.
    """
    start = jax.jit(for_each_agent(init, run.num_seeds))
    with ThreadPoolExecutor(max_workers=1) as compiler:  # one program compiles while the next is traced
        started = compiler.submit(start.lower(run.config, run.keys).compile) if states is None else None
        like = jax.eval_shape(start, run.config, run.keys) if states is None else states
        places = shardings_of(like, devices, axis=1) if len(devices) > 1 else None
        if workers:
            train, evaluator.program = _compile_in_workers(run, like, workers)
        else:
            train = _compile_training(run.config, like, places)
        states = states if started is None else started.result()(run.config, run.keys)
        return train, states if places is None else jax.device_put(states, places)


def _compile_training(config: Config, like: TrainState, places: Any = None) -> Callable[..., Any]:
    """Compile (config, states, length) -> (states, metrics) for states like these, which lie and stay in their places.

    If agents may stop before others, each has its own number of iterations, [A].
    """
    options: dict[str, Any] = {"donate_argnums": 1}
    if places is not None:
        like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like, places)
        options["out_shardings"] = (places, None)
    num_agents = like.iteration.shape[0]
    if not stops(config):
        chunk = functools.partial(train_chunk, capacity=CAPACITY)
        return jax.jit(for_each_agent(chunk, num_agents), **options).lower(config, like, np.int32(1)).compile()

    def one(config: Config, x: tuple[TrainState, Any]) -> Any:
        return train_chunk(config, *x, capacity=CAPACITY)

    def train(config: Config, states: TrainState, lengths: Any) -> Any:
        return for_each_agent(one, num_agents)(config, (states, lengths))

    return jax.jit(train, **options).lower(config, like, np.zeros(num_agents, np.int32)).compile()


def _compile_in_workers(run: Run, like: TrainState, workers: Sequence[Worker]) -> list[Callable[..., Any]]:
    """The program of training and that of evaluation in workers, each of which has its share of the agents."""
    shares = [len(share) for share in np.array_split(np.arange(run.num_seeds), len(workers))]
    there = WorkersPrograms(workers, shares, _build, run.config)
    results = {"train": (like, metrics_tree()), "evaluate_in_training": evaluation.Evaluation(*jnp.zeros(3))}
    return [lambda config, *of, name=name: there.call(name, results[name], *of) for name in results]


def _build(num_agents: int, config: Config) -> tuple[dict[str, Any], None]:
    """The programs of a worker; see `WorkersPrograms`."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_agents))
    like = jax.eval_shape(for_each_agent(init, num_agents), config, keys)
    train, during = (
        _compile_training(config, like),
        jax.jit(for_each_agent(evaluation.evaluate_in_training, num_agents)),
    )
    programs = {
        "train": (functools.partial(train, config), (like, 0)),
        "evaluate_in_training": (functools.partial(during, config), (like,)),
    }
    return programs, None
