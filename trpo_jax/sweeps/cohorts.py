"""Training of agents side by side in the compiled programs of their group, from the start or from a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.runs.metrics import METRICS
from trpo_jax.runs.runner import Chunk, advance, without_stopped
from trpo_jax.sweeps.plans import stack_configs
from trpo_jax.sweeps.programs import Programs
from trpo_jax.training.checkpoints import from_host, is_key, to_host
from trpo_jax.training.evaluation import stops
from trpo_jax.training.state import TrainState

_LAST_SHARE = 0.1  # of the iterations, for the training return


class Snapshot(NamedTuple):
    """Agents in the middle of training, on the host: states [A, ...] of `to_host`, metrics {name: [A, iterations]}.

    With evaluation during training, also the mean return of each evaluation, [A, iterations // eval_every].
    """

    states: TrainState
    metrics: dict[str, np.ndarray]
    eval_return: np.ndarray | None = None

    @property
    def done(self) -> int:
        """Iterations done."""
        return self.metrics["finite"].shape[1]

    def take(self, at: Any) -> Snapshot:
        """Select some of the agents, by a slice or an array of indices."""
        return jax.tree.map(lambda leaf: leaf[at], self)


def join(snapshots: Sequence[Snapshot]) -> Snapshot:
    """Join snapshots after the same number of iterations."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *snapshots)


class Cohort:
    """At most D·U agents in training, each with its settings and its key, from a snapshot or from the start.

    If they do not fill the programs, the last one is repeated, and the results of the copies are dropped.
    """

    def __init__(self, programs: Programs, configs: Sequence[Config], keys: Any, snapshot: Snapshot | None = None):
        self.programs, self.size, self.config = programs, len(configs), configs[0]
        at = np.minimum(np.arange(programs.width), self.size - 1)
        self.configs = stack_configs([configs[i] for i in at])
        if snapshot:
            self.done, self._metrics, self.eval_return = snapshot.done, [snapshot.metrics], snapshot.eval_return
            self.states = from_host(snapshot.take(at).states, programs.states)
        else:
            self.done, self._metrics = 0, [{name: np.empty((self.size, 0), np.float32) for name in METRICS}]
            self.eval_return = np.empty((self.size, 0), np.float32) if self.config.eval_every else None
            self.states = programs.start(self.configs, keys[at])

    def train(self, until: int, on_chunk: Callable[[int], bool] = lambda length: True) -> None:
        """Train until an iteration; after each chunk, `on_chunk(its length)` returns whether to go on."""
        every = self.config.eval_every

        def program(configs: Config, states: TrainState, length: Any) -> Any:
            if stops(self.config):
                stopped = self.stopped[np.minimum(np.arange(self.programs.width), self.size - 1)]
                length = np.where(stopped, np.int32(0), length)
            return self.programs.train(configs, states, length)

        def take_over(chunk: Chunk) -> bool:
            self.states, self.done = chunk.states, chunk.done
            self._append({name: values[: self.size].astype(np.float32) for name, values in chunk.metrics.items()})
            if every and self.done % every == 0:
                self._evaluate()
            return on_chunk(chunk.length) and not self.stopped.all()

        advance(program, self.configs, self.states, self.done, until, take_over, ends=(every,))
        if self.stopped.all():
            self._stand_still(until)

    def _append(self, metrics: Mapping[str, np.ndarray]) -> None:
        stopped = self.stopped
        self._metrics.append(without_stopped(metrics, stopped) if stopped.any() else dict(metrics))

    def _evaluate(self) -> None:
        """Evaluate the agents now; for those that have stopped, repeat the last evaluation."""
        assert self.eval_return is not None
        newest = np.asarray(self.programs.evaluate_in_training(self.configs, self.states), np.float32)[: self.size]
        if self.stopped.any():
            newest = np.where(self.stopped, self.eval_return[:, -1], newest)
        self.eval_return = np.concatenate([self.eval_return, newest[:, None]], axis=1)

    def _stand_still(self, until: int) -> None:
        """Fill in the remaining iterations when all agents have stopped."""
        assert self.eval_return is not None
        nothing = np.full((self.size, until - self.done), np.nan, np.float32)
        self._append(dict.fromkeys(METRICS, nothing))
        missing = until // self.config.eval_every - self.eval_return.shape[1]
        self.eval_return = np.concatenate([self.eval_return, np.tile(self.eval_return[:, -1:], missing)], axis=1)
        self.done = until

    @property
    def stopped(self) -> np.ndarray:
        """Which agents have reached `stop_at_return`, [A]."""
        if self.eval_return is None or not self.eval_return.shape[1] or not stops(self.config):
            return np.zeros(self.size, bool)
        return self.eval_return[:, -1] >= np.float32(self.config.stop_at_return)

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """Metrics of the iterations done, {name: [A, iterations]}."""
        self._metrics = [{name: np.concatenate([m[name] for m in self._metrics], axis=1) for name in METRICS}]
        return self._metrics[0]

    def evaluate(self) -> np.ndarray:
        """Mean return of each agent over fresh episodes, float32 [A]; NaN if not requested."""
        if self.programs.evaluate is None:
            return np.full(self.size, np.nan, np.float32)
        return np.asarray(self.programs.evaluate(self.configs, self.states), np.float32)[: self.size]

    def snapshot(self) -> Snapshot:
        """A snapshot of the agents."""
        return Snapshot(
            jax.tree.map(lambda leaf: leaf[: self.size], to_host(self.states)), self.metrics, self.eval_return
        )


def blank(states: TrainState, num_agents: int, done: int, eval_every: int = 0) -> Snapshot:
    """Make an empty snapshot of so many agents after so many iterations; `states` gives shapes, [A, ...]."""

    def empty(leaf: Any) -> np.ndarray:
        shape = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
        return np.empty((num_agents, *shape.shape[1:]), shape.dtype)

    metrics = {name: np.empty((num_agents, done), np.float32) for name in METRICS}
    evaluated = np.empty((num_agents, done // eval_every), np.float32) if eval_every else None
    return Snapshot(jax.tree.map(empty, states), metrics, evaluated)


def failed_iteration(metrics: Mapping[str, np.ndarray]) -> np.ndarray:
    """First iteration, from 1, with a number that was not finite; 0 if there is none. [A]."""
    bad = metrics["finite"] == 0
    return np.where(bad.any(axis=1), bad.argmax(axis=1) + 1, 0).astype(np.int32)


def stopped_iteration(eval_return: np.ndarray, config: Config) -> np.ndarray:
    """Iteration at which an agent reached `stop_at_return`, from its evaluations [A, K]; 0 if it did not. [A]."""
    reached = (eval_return >= np.float32(config.stop_at_return)) & stops(config)
    return np.where(reached.any(axis=1), (reached.argmax(axis=1) + 1) * config.eval_every, 0).astype(np.int32)


def training_return(metrics: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mean return of the episodes that ended in the last tenth of the iterations. [A].

    If none did, since episodes may be longer than that, those of the last iteration in which one ended count; NaN if
    none ever did.
    """
    count = np.nan_to_num(metrics["num_episodes"].astype(np.float64))
    total = np.where(count > 0, metrics["episode_return"].astype(np.float64), 0) * count
    iterations = count.shape[1]
    ended = np.where(count > 0, np.arange(iterations), -1).max(axis=1)
    first = np.minimum(ended, iterations - max(1, round(_LAST_SHARE * iterations)))
    counts = (np.arange(iterations) >= first[:, None]) & (ended >= 0)[:, None]
    episodes = (count * counts).sum(axis=1)
    total = np.where(counts, total, 0).sum(axis=1)
    return np.where(ended >= 0, total / np.where(ended >= 0, episodes, 1), np.nan).astype(np.float32)
