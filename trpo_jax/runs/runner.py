"""The runner of `train`, `sweep` and `tune`: a compiled program called chunk by chunk, and the work in between.

Chunks are the scan of `train` in pieces: the places where it is cut do not affect the bits.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.runs.metrics import METRICS
from trpo_jax.training.state import TrainState

CAPACITY = 256  # iterations that a chunk can hold
_CHUNK_SECONDS = 0.5  # target: short enough to watch and to lose little, long enough to cost nothing


@functools.lru_cache(maxsize=4)
def agent_keys(seed: int, num_agents: int) -> jax.Array:
    """The PRNG keys `jax.random.key(seed + i)` of agents i, [num_agents]."""
    return jax.jit(jax.vmap(jax.random.key))(seed + np.arange(num_agents))


class Chunk(NamedTuple):
    """Result of a call of the program: states [A, ...], metrics {name: [A, length]}, and iterations done after it."""

    states: TrainState
    metrics: dict[str, np.ndarray]
    length: int
    done: int


def for_each_agent(function: Callable[..., Any], num_agents: int) -> Callable[..., Any]:
    """Map `function(config, x, *rest)` over the agents along the first axis of x."""
    if num_agents > 1:
        return lambda config, x, *rest: jax.vmap(lambda one: function(config, one, *rest))(x)

    def call_once(config: Config, x: Any, *rest: Any) -> Any:
        # A batch of one would turn the branches that save a single agent work into selections.
        result = function(config, jax.tree.map(lambda leaf: leaf[0], x), *rest)
        return jax.tree.map(lambda leaf: leaf[None], result)

    return call_once


def advance(
    program: Any,
    configs: Config,
    states: TrainState,
    done: int,
    until: int,
    on_chunk: Callable[[Chunk], bool],
    *,
    ends: Sequence[int] = (),
) -> int:
    """Train agents from iteration `done` until iteration `until`; return the number of iterations done.

    Args:
      program: the compiled program (configs, states, length) -> (states, `Metrics` of [A, capacity]) of so many
        iterations ≤ capacity; it may reuse the memory of the states.
      configs: its settings.
      states: states of the agents, [A, ...].
      done: iterations done before.
      until: iterations to reach.
      on_chunk: called after each chunk; returns whether to go on.
      ends: for each number above 0, a chunk ends after every so many iterations.
    """
    pace, going = 1, True
    while done < until and going:
        length = min(pace, until - done, CAPACITY, *(every - done % every for every in ends if every))
        started = time.perf_counter()
        states, metrics = jax.block_until_ready(program(configs, states, np.int32(length)))
        seconds = time.perf_counter() - started
        done += length
        table = {name: np.asarray(getattr(metrics, name))[:, :length] for name in METRICS}
        going = on_chunk(Chunk(states, table, length, done))
        # It at most doubles, so that one slow measurement cannot starve the display.
        pace = max(1, min(2 * min(pace, CAPACITY), int(length * _CHUNK_SECONDS / seconds)))
    return done


def without_stopped(metrics: Mapping[str, np.ndarray], stopped: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics [A, length], empty for agents that had stopped before, [A]."""
    absent = {name: 0 if name == "num_episodes" else np.nan for name in metrics}
    return {name: np.where(stopped[:, None], absent[name], values) for name, values in metrics.items()}


class Clock:
    """Speed of the work: `total` env steps, those done, and the `seconds` that they took, without compilation."""

    def __init__(self, total: float, done: float = 0.0):
        self.total, self.done, self.seconds = total, done, 0.0
        self._counted = 0.0
        self.start()

    def start(self) -> None:
        """Count the time from now on."""
        self._since = time.perf_counter()

    def count(self, steps: float) -> None:
        """Count env steps that were done since the last call."""
        now = time.perf_counter()
        self.done, self._counted = self.done + steps, self._counted + steps
        self.seconds, self._since = self.seconds + now - self._since, now

    @property
    def steps_per_second(self) -> float:
        """Env steps per second of this process."""
        return self._counted / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float:
        """Seconds for the rest at that speed."""
        return max(0.0, self.total - self.done) / self.steps_per_second if self._counted else float("inf")


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag, so that no chunk is lost half-written; a second one ends it all."""
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
