"""A run's folder: config.json, metrics.csv, checkpoints/, learning_curve.png; and the training that fills it.

After each chunk of iterations the metrics are appended, then the state is saved with the checksum of all rows so far. A
run that is killed at any moment continues from its last chunk with the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
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
from trpo_jax.runs.metrics import MetricsFile, last_mean, rows_of
from trpo_jax.runs.runner import CAPACITY, Chunk, Clock, advance, agent_keys, interrupts
from trpo_jax.runs.sinks import Sink
from trpo_jax.sentences import UsageError, check_limits, shown
from trpo_jax.settings import checked_settings, settings_of, with_length
from trpo_jax.training.checkpoints import Checkpoints, Saved
from trpo_jax.training.loop import init, train_chunk
from trpo_jax.training.memory import check_memory, free_memory
from trpo_jax.training.state import TrainState
from trpo_jax.validation import validate

_CONTINUES = "what is done is safe, and `trpo-jax resume` continues when the folder can be written to"


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder and what was asked of it. Agent i of a run is the one that `jax.random.key(seed + i)` trains."""

    path: Path
    config: Config
    seed: int
    num_seeds: int

    @property
    def keys(self) -> jax.Array:
        """One PRNG key per agent, [num_seeds]."""
        return agent_keys(self.seed, self.num_seeds)

    @property
    def description(self) -> dict[str, Any]:
        """What decides the results, as config.json keeps it."""
        return {**settings_of(self.config), "seed": self.seed, "num_seeds": self.num_seeds}

    @property
    def checkpoints(self) -> Checkpoints:
        """Its checkpoints, of which the newest two stay."""
        owner = origin(self.path / "config.json")
        return Checkpoints(self.path / "checkpoints", owner, "run, whose settings differ", kept=2, mend=_CONTINUES)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a chunk reports: iterations done, the mean over agents of its last row, and the time that it takes."""

    iteration: int
    metrics: dict[str, float]
    clock: Clock


def create_run(path: str | os.PathLike[str], config: Config, seed: int, num_seeds: int) -> Run:
    """Make the folder and write config.json, or take up an equal run that is there already.

    Raises:
      UsageError: if the settings, the environment or the folder cannot be used; nothing is overwritten.
    """
    check_memory(config, num_seeds, free_memory(jax.local_devices()[:1]))
    run = Run(Path(path), config, seed, num_seeds)
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


def continue_run(run: Run, report: Callable[[Progress], None], sinks: Sequence[Sink] = ()) -> bool:
    """Train from the newest checkpoint to the end.

    Ctrl-C (or SIGTERM) ends the training after the current chunk; a second one ends it at once.

    Args:
      run: the run.
      report: called after each chunk.
      sinks: where the metrics go beside metrics.csv.

    Returns:
      Whether the run is complete.

    Raises:
      UsageError: if another process is at work on the folder, or it cannot be written to or continued.
    """
    with locked(run.path, "checkpoints"):
        file, checkpoints = MetricsFile(run.path), run.checkpoints
        saved = _restore(run, file, checkpoints)
        done = saved.done if saved else 0
        if done >= run.config.num_iterations:
            return True
        program, states = _compile(run, jax.tree.map(jnp.asarray, saved.state) if saved else None)
        with interrupts() as interrupted:
            steps = run.num_seeds * run.config.steps_per_iteration  # of an iteration of all agents
            clock = Clock(steps * run.config.num_iterations, steps * done)

            def on_chunk(chunk: Chunk) -> bool:
                rows = list(rows_of(chunk.metrics, chunk.done, run.config.steps_per_iteration, run.seed))
                file.append(rows, _CONTINUES)
                for sink in sinks:
                    for _, env_steps, seed, metrics in rows:
                        sink(seed, env_steps, metrics)
                checkpoints.save(chunk.states, chunk.done, rows=file.note)
                clock.count(steps * chunk.length)
                means = {name: last_mean(values) for name, values in chunk.metrics.items()}
                report(Progress(chunk.done, means, clock))
                return not interrupted()

            done = advance(program, run.config, states, done, run.config.num_iterations, on_chunk)
    return done >= run.config.num_iterations


def _restore(run: Run, file: MetricsFile, checkpoints: Checkpoints) -> Saved | None:
    """The checkpoint to go on from, if there is one; rows beyond it are dropped, as a kill left them."""
    saved = checkpoints.newest(lambda done: run.config, lambda saved: file.check(saved.done, saved.note))
    # The first checkpoint is saved after one iteration, so its rows may be there without it.
    if saved is None and file.num_lines > 1 + run.num_seeds:
        raise UsageError(
            f"{run.path} has rows in metrics.csv and no checkpoints; restore those, or train anew into another folder."
        )
    file.truncate(saved.note if saved else {})
    return saved


def _compile(run: Run, states: TrainState | None) -> tuple[Any, Any]:
    """The program of a run, and its states: those given, or those before the first iteration."""
    start = jax.jit(_for_each_agent(init, run.num_seeds))
    train = _for_each_agent(functools.partial(train_chunk, capacity=CAPACITY), run.num_seeds)
    with ThreadPoolExecutor(max_workers=1) as compiler:  # one program compiles while the next is traced
        started = compiler.submit(start.lower(run.config, run.keys).compile) if states is None else None
        like = jax.eval_shape(start, run.config, run.keys) if states is None else states
        program = jax.jit(train, donate_argnums=1).lower(run.config, like, np.int32(1)).compile()
        return program, states if started is None else started.result()(run.config, run.keys)


def _for_each_agent(function: Callable[..., Any], num_agents: int) -> Callable[..., Any]:
    """Map `function(config, x, *rest)` over the agents along the first axis of x."""
    if num_agents > 1:
        return lambda config, x, *rest: jax.vmap(lambda one: function(config, one, *rest))(x)

    def call_once(config: Config, x: Any, *rest: Any) -> Any:
        # A batch of one would turn the branches that save a lone agent work into selections.
        result = function(config, jax.tree.map(lambda leaf: leaf[0], x), *rest)
        return jax.tree.map(lambda leaf: leaf[None], result)

    return call_once
