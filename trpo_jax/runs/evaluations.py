"""Evaluation during a run: eval.csv, the best policies in checkpoints/best.npz, and which agents have stopped."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.runs.metrics import Row, TableFile
from trpo_jax.runs.runner import Chunk, for_each_agent
from trpo_jax.sentences import UsageError, say
from trpo_jax.training.checkpoints import read, save, without_mend
from trpo_jax.training.evaluation import Evaluation, evaluate_in_training, stops
from trpo_jax.training.state import TrainState

if TYPE_CHECKING:
    from trpo_jax.runs.folders import Run

COLUMNS = ("mean", "std", "low", "high", "length", "finished")
"""Columns of an evaluation: mean and standard deviation of the returns, the 95 % interval of that mean, mean length,
and the share of episodes that ended."""


class Evaluator:
    """Evaluates the agents of a run when it is due, by its `program` (config, states) -> `Evaluation`; keeps the best.

    Rows of eval.csv reach the disk before the checkpoint that follows them, as in metrics.csv.
    """

    def __init__(self, run: Run, mend: str):
        self.run, self.every, self.mend = run, run.config.eval_every, mend
        self.file = TableFile(run.path / "eval.csv", COLUMNS, "evaluations") if self.every else None
        self.program: Callable[..., Evaluation] = jax.jit(for_each_agent(evaluate_in_training, run.num_seeds))
        self.newest = np.full(run.num_seeds, np.nan, np.float32)  # mean return of each agent's last evaluation
        self._best = np.full(run.num_seeds, -np.inf, np.float32)  # the same of the saved state; -inf: none

    def restore(self, note: Mapping[str, Any]) -> None:
        """Continue from a checkpoint with this note: drop the rows after it, and use the evaluations before it."""
        if not self.file:
            return
        self.file.truncate(note)
        for _, _, seed, values in read_evaluations(self.run.path):
            agent, mean = seed - self.run.seed, np.float32(values["mean"])
            self.newest[agent], self._best[agent] = mean, np.fmax(self._best[agent], mean)
        try:
            if np.isfinite(self._best).any():
                # A state that was saved after the checkpoint will be evaluated, and saved, again.
                kept, means = _read_best(self.run)
                before = np.asarray(kept.iteration) <= note["done"]
                self._best = np.where(before, np.asarray(means, np.float32), self._best)
        except UsageError as error:
            say(f"{without_mend(error)}; the best policies are chosen again from here on.")
            self._best[:] = -np.inf

    @property
    def note(self) -> dict[str, Any]:
        """Length and checksum of the rows so far, for a checkpoint."""
        return {self.file.kept_as: self.file.note} if self.file else {}

    @property
    def stopped(self) -> np.ndarray:
        """Which agents have reached `stop_at_return`, [A]."""
        goal = np.float32(self.run.config.stop_at_return)
        return (self.newest >= goal) & stops(self.run.config)

    def __call__(self, chunk: Chunk) -> list[Row]:
        """Evaluate the agents after a chunk, if it is due; return their rows."""
        if not self.file or chunk.done % self.every:
            return []
        running = ~self.stopped
        agents = np.flatnonzero(running).tolist()
        result = self.program(self.run.config, chunk.states)
        table = summary(result)
        env_steps = chunk.done * self.run.config.steps_per_iteration
        rows: list[Row] = [
            (chunk.done, env_steps, self.run.seed + i, {name: float(table[name][i]) for name in COLUMNS})
            for i in agents
        ]
        self.file.append(rows, self.mend)
        improved = running & (table["mean"] > self._best) | ~(self._best > -np.inf)  # NaN is better than nothing alone
        self.newest = np.where(running, table["mean"], self.newest)
        self._best = np.where(improved, self.newest, self._best)
        if improved.any():
            self._keep(chunk.states, improved)
        return rows

    def _keep(self, states: TrainState, improved: np.ndarray) -> None:
        """Save the best state of each agent; for those that improved this is the current one."""
        if not improved.all():
            states = jax.tree.map(functools.partial(_choose, improved), states, _read_best(self.run)[0])
        best = {"of": self.run.checkpoints.owner, "means": [float(mean) for mean in self._best]}
        save(best_file(self.run), states, note=best, mend=self.mend)


def _choose(improved: np.ndarray, new: Any, old: Any) -> Any:
    return jnp.where(improved.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def summary(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """Summarise evaluations [A, E] as {column: [A]}; the interval is Student's, mean ± t · s / √E."""
    returns = np.asarray(evaluation.episode_return)
    # In float32, as in `has_reached`, which compares it with `stop_at_return` in the program of `train`.
    mean = np.asarray(jnp.mean(evaluation.episode_return, axis=1))
    std, half = returns.std(axis=1, dtype=np.float64), half_width(returns)
    length, finished = (np.mean(leaf, axis=1) for leaf in (evaluation.episode_length, evaluation.finished))
    return dict(zip(COLUMNS, (mean, std, mean - half, mean + half, length, finished), strict=True))


def half_width(values: np.ndarray) -> np.ndarray:
    """Half the width of the 95 % interval (Student's) of the mean over the last axis, t · s / √n; NaN for one value."""
    from scipy.special import stdtrit  # deferred: it takes long to import

    number = values.shape[-1]
    if number == 1:
        return np.full(values.shape[:-1], np.nan)
    half: np.ndarray = stdtrit(number - 1, 0.975) * values.std(axis=-1, dtype=np.float64) / np.sqrt(number - 1)
    return half


def read_evaluations(folder: Path) -> Iterator[Row]:
    """Read the rows of eval.csv in order; none if there is no such file."""
    if (folder / "eval.csv").exists():
        with open(folder / "eval.csv", newline="") as file:
            for row in csv.DictReader(file):
                iteration, env_steps, seed = (int(row[name]) for name in ("iteration", "env_steps", "seed"))
                yield iteration, env_steps, seed, {name: float(row[name]) for name in COLUMNS}


def best_file(run: Run) -> Path:
    """The file with each agent's best state by evaluation."""
    return run.path / "checkpoints" / "best.npz"


def _read_best(run: Run) -> tuple[Any, list[float]]:
    states, note = read(best_file(run), run.config)
    if not isinstance(note, dict) or note.get("of") != run.checkpoints.owner:
        raise UsageError(f"{best_file(run)} belongs to another run, whose settings differ; restore the right one.")
    return states, note["means"]


def best_states(run: Run) -> TrainState:
    """The states with the best evaluations during training, agents along the first axis.

    Raises:
      UsageError: if there are none yet, or the file cannot be used.
    """
    if not run.config.eval_every:
        raise UsageError(f"{run.path} was trained without evaluation (eval_every=0); use --checkpoint last.")
    if not best_file(run).exists():
        raise UsageError(f"{run.path} has no evaluation yet; train it further, or use --checkpoint last.")
    return jax.tree.map(jnp.asarray, _read_best(run)[0])


class Best(NamedTuple):
    """The best policy of an agent: its iteration, and its returns on episodes that did not select it."""

    seed: int
    iteration: int
    chosen_by: float
    mean: float
    low: float
    high: float


def evaluate_best(run: Run) -> list[Best]:
    """Evaluate each agent's best policy on other episodes: the best of many noisy evaluations is biased upwards."""
    states, means = best_states(run), _read_best(run)[1]

    def anew(config: Config, state: TrainState) -> Evaluation:
        return evaluate_in_training(config, state, anew=True)

    table = summary(jax.jit(for_each_agent(anew, run.num_seeds))(run.config, states))
    columns = zip(*(table[name] for name in ("mean", "low", "high")), strict=True)
    iterations = np.asarray(states.iteration)
    return [Best(run.seed + i, int(iterations[i]), means[i], *map(float, cells)) for i, cells in enumerate(columns)]
