"""A run's folder: config.json, metrics.csv, eval.csv, checkpoints/, learning_curve.png."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.environments.make import mark_traced
from trpo_jax.files import as_path, locked
from trpo_jax.runs.descriptions import check_equal, is_begun, made_by, origin, read_table, restore_or_anew, write_table
from trpo_jax.runs.evaluations import best_states
from trpo_jax.runs.runner import agent_keys, for_each_agent
from trpo_jax.sentences import UsageError, check_limits, check_number, command, shown
from trpo_jax.settings import check_trusted, checked_settings, settings_of, trusting, with_length
from trpo_jax.training.checkpoints import Checkpoints, checksum, read, save
from trpo_jax.training.fit_checks import check_is_state
from trpo_jax.training.memory import check_episodes, check_memory, free_memory
from trpo_jax.training.state import TrainState
from trpo_jax.training.warm_start import warm_start
from trpo_jax.validation import validate

CONTINUES = "what is done is safe, and `trpo-jax resume` continues when the folder can be written to"


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder and the settings of its run. `jax.random.key(seed + i)` trains agent i.

    The checkpoint of every `keep_every`-th iteration is kept; 0: only the newest two.
    """

    path: Path
    config: Config
    seed: int
    num_seeds: int
    keep_every: int = 0
    init_from: str = ""  # the checksum of the networks that it starts from; "": fresh ones
    begun_as: str = ""  # the stamp of its files, if its length was another one when they were made

    @property
    def keys(self) -> jax.Array:
        """One PRNG key per agent, [num_seeds]."""
        return agent_keys(self.seed, self.num_seeds)

    @property
    def description(self) -> dict[str, Any]:
        """The settings that decide the results, as stored in config.json."""
        numbers = {name: getattr(self, name) for name in ("seed", "num_seeds", "keep_every")}
        start = {"init_from": self.init_from} if self.init_from else {}
        return {**settings_of(self.config), **numbers, **start}

    @property
    def checkpoints(self) -> Checkpoints:
        """Its checkpoints."""
        owner, kind = self.begun_as or origin(self.path / "config.json"), "run, whose settings differ"
        folder = self.path / "checkpoints"
        return Checkpoints(folder, owner, kind, kept=2, every=self.keep_every, mend=CONTINUES)


def create_run(
    path: str | os.PathLike[str],
    config: Config,
    seed: int,
    num_seeds: int,
    keep_every: int = 0,
    *,
    init_from: TrainState | None = None,
) -> Run:
    """Make the folder of a run and write config.json, or continue with an equal run that is there already.

    Args:
      path: the folder.
      config: the settings.
      seed: seed of the first agent.
      num_seeds: number of agents, side by side.
      keep_every: keep the checkpoint of every so many iterations; 0: only the newest two.
      init_from: trained agents whose networks these start from, see `warm_start`: the same number along the first axis,
        or one for all.

    Raises:
      UsageError: if the settings, the environment or the folder cannot be used; nothing is overwritten.
    """
    _check_numbers({"seed": seed, "num_seeds": num_seeds, "keep_every": keep_every})
    free = free_memory(jax.local_devices()[:1])
    check_memory(config, num_seeds, free)
    if config.eval_every:
        check_episodes(config, num_seeds, config.eval_episodes, free, "eval_episodes")
    run = Run(as_path(path), config, seed, num_seeds, keep_every)
    start = None if init_from is None else _warm_states(run, init_from)
    if start is not None:
        run = dataclasses.replace(run, init_from=checksum(start.learner))
    file = run.path / "config.json"
    if not is_begun(file, "run"):
        write_table(file, {**run.description, "made_by": made_by()}, first=True)
    mend = f"choose another --output, or continue that run with {command('resume', path, env=config.env)}"
    found = open_run(path, config.env)
    check_equal(run.path, "run", run.description, found.description, mend)
    if start is not None and not _start_file(run).exists():
        save(_start_file(run), start, note=run.init_from, mend=CONTINUES)
    return dataclasses.replace(run, begun_as=found.begun_as)


def open_run(path: str | os.PathLike[str], env: str | None = None) -> Run:
    """Open the folder of a run that its config.json describes.

    Args:
      path: folder of the run.
      env: its environment again, if that names a module to import; for this call as `trust(env)` before it.

    Raises:
      UsageError: if the file is missing or damaged, with one sentence.
    """
    file = as_path(path) / "config.json"
    described = read_table(file, "run")
    described.pop("made_by", None)
    stamps = {stamp: str(described.pop(stamp, "")) for stamp in ("init_from", "begun_as")}
    with trusting(env or ""):
        check_trusted(described.get("env"), str(file))
        try:
            numbers = {number: described.pop(number, None) for number in ("seed", "num_seeds")}
            numbers["keep_every"] = described.pop("keep_every", 0)
            _check_numbers(numbers)
            config = mark_traced(with_length(checked_settings(described, "it"), Config()))
            validate(config)
        except UsageError as error:
            raise UsageError(f"{file} is damaged ({str(error).rstrip('.?')}); {restore_or_anew('run')}.") from error
    return Run(as_path(path), config, **numbers, init_from=stamps["init_from"], begun_as=stamps["begun_as"])


def _check_numbers(numbers: Mapping[str, Any]) -> None:
    """Check the numbers of a run that are not settings; here None is none."""
    check_limits({number: "nothing" if value is None else value for number, value in numbers.items()})


def load_run(
    path: str | os.PathLike[str], *, checkpoint: str = "last", agent: int | None = None, env: str | None = None
) -> tuple[Config, TrainState]:
    """Load the settings and the trained agents from a run's folder.

    Args:
      path: the folder.
      checkpoint: "last", "best" by evaluation during training, or a number of iterations as text.
      agent: the agent to load, from 0; None: all of them, along the first axis of every leaf.
      env: the run's environment again, if that names a module to import; see `open_run`.

    Raises:
      UsageError: if there is no such run, checkpoint or agent, it has another environment, or the file cannot be used.
    """
    run = open_run(path, env)
    if env not in (None, run.config.env):
        raise UsageError(f"{run.path} was trained on {shown(run.config.env)}, but env is {shown(env)}; leave env out.")
    state = chosen_state(run, checkpoint)
    if agent is None:
        return run.config, state
    check_agent(agent, run.num_seeds)
    return run.config, jax.tree.map(lambda leaf: leaf[agent], state)


def check_agent(agent: int, number: int) -> None:
    """Raise `UsageError` unless a run of so many agents has one with this number, from 0."""
    check_number("agent of this run", agent, whole=True, interval=f"[0, {number - 1}]")


def extend_run(run: Run, total_steps: int) -> Run:
    """Extend a run, finished or not, to `total_steps` environment steps per agent; return the extended run.

    Without annealing it ends with the same bits as a run that was started with that length. Annealed settings follow
    the schedule of the new length from the current iteration on.

    Raises:
      UsageError: if the run is longer already, or is being trained.
    """
    config = with_length({"total_steps": total_steps}, run.config)
    if config.num_iterations < run.config.num_iterations:
        steps = run.config.num_iterations * run.config.steps_per_iteration
        raise UsageError(f"{run.path} has {steps:,} steps per agent; --total-steps can only make a run longer.")
    if config.num_iterations == run.config.num_iterations:
        return run
    file = run.path / "config.json"
    with locked(run.path, "checkpoints"):
        longer = dataclasses.replace(run, config=config, begun_as=run.checkpoints.owner)
        table = {**read_table(file, "run"), "num_iterations": config.num_iterations, "begun_as": longer.begun_as}
        write_table(file, table)
    return longer


def _start_file(run: Run) -> Path:
    return run.path / "checkpoints" / "start.npz"


def _warm_states(run: Run, trained: TrainState) -> TrainState:
    """The states before the first iteration, for agents that start from trained ones."""
    check_is_state(trained, "init_from")
    number = np.shape(trained.iteration)
    if number == ():
        trained, number = jax.tree.map(lambda leaf: leaf[None], trained), (1,)
    if number[0] not in (1, run.num_seeds):
        raise UsageError(
            f"init_from has {number[0]} agents, but num_seeds={run.num_seeds}; give the same number, or one agent."
        )
    each = jax.tree.map(lambda leaf: leaf[np.zeros(run.num_seeds, int)] if number[0] == 1 else leaf, trained)
    start = for_each_agent(lambda config, x: warm_start(config, *x), run.num_seeds)
    return jax.jit(start)(run.config, (run.keys, each))


def start_of(run: Run) -> TrainState | None:
    """The initial states of a run that starts from trained networks; None if it starts from fresh ones.

    Raises:
      UsageError: if they are missing, or belong to another run.
    """
    if not run.init_from:
        return None
    file = _start_file(run)
    if not file.exists():
        raise UsageError(
            f"{file}, from which the run starts, is missing; give `trpo-jax train` the same --init-from again."
        )
    state, note = read(file, run.config)
    if note != run.init_from:
        raise UsageError(f"{file} belongs to another run; restore the right one, or train again into another folder.")
    return jax.tree.map(jnp.asarray, state)


def newest_state(run: Run) -> TrainState | None:
    """The newest readable checkpoint of a run, agents along the first axis; None if there is none yet.

    Raises:
      UsageError: if there are some but none can be read.
    """
    saved = run.checkpoints.newest(lambda done: run.config)
    return jax.tree.map(jnp.asarray, saved.state) if saved else None


def chosen_state(run: Run, which: str) -> TrainState:
    """The state of a run for "last", "best" (by evaluation during training) or a number of iterations.

    Agents lie along the first axis.

    Raises:
      UsageError: if there is no such checkpoint, or none yet, or it cannot be used.
    """
    which = str(which)
    if which == "last":
        state = newest_state(run)
        if state is None:
            resume = command("resume", run.path, env=run.config.env)
            raise UsageError(f"{run.path} has no checkpoint yet; {resume} trains it first.")
        return state
    if which == "best":
        return best_states(run)
    if not (which.isascii() and which.isdigit() and len(which) < 9):
        raise UsageError(f"checkpoint must be best, last or a number of iterations, got {shown(which)}.")
    return jax.tree.map(jnp.asarray, run.checkpoints.at(int(which), run.config).state)
