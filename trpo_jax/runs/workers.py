"""Further processes on this machine that train agents, for environments that run in Python.

One interpreter steps one environment at a time, so on a CPU such agents need a process per core. Each worker builds the
programs of its share of the agents. A call sends it their states and gets the new ones back; between calls it has none.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.environments.host import runs_on_host
from trpo_jax.environments.make import environment_of
from trpo_jax.sentences import UsageError
from trpo_jax.training.checkpoints import from_host, to_host
from trpo_jax.training.memory import free_memory

KEPT_PROGRAMS = 8  # each takes some 2,000 of a process's 65,530 maps
_BYTES = 3 * 2**29  # room for one more process, most of it for its compiler: HalfCheetah took 1.1 GiB
_RUN, _BUILD = 0, 1  # the lines to a worker: it compiles the next program while it trains
_SIGNALS = {signal.SIGINT, signal.SIGTERM}  # a terminal, or a scheduler, sends them to all processes of a command
_numbers = itertools.count()  # of the programs


def waits_for_python(config: Config) -> bool:
    """Whether an interpreter steps the environments of an agent while the device, a CPU, waits."""
    return jax.local_devices()[0].platform == "cpu" and runs_on_host(environment_of(config))


def useful_workers(config: Config, num_agents: int, num_cores: int | None = None) -> int:
    """Number of workers that keep all cores busy; 1, none, unless the environment runs in Python, and on a CPU.

    It is smaller than the number of cores, by default that of JAX's devices, if there are fewer agents or too little
    free memory.
    """
    if not waits_for_python(config):
        return 1
    room = free_memory(jax.local_devices()[:1]) // _BYTES
    return max(1, min(num_cores or jax.local_device_count(), room, num_agents))


class Worker:
    """A process that trains agents. It ends with the process that started it, however that ends."""

    platform = "cpu"  # for the programs of a sweep, each worker is a device

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy JAX's locks as they are
        ours, theirs = zip(*(context.Pipe() for _ in (_RUN, _BUILD)), strict=True)
        self._lines: tuple[Connection, ...] = ours
        self._process = context.Process(target=_serve, args=(theirs, jax_settings()), daemon=True)
        self._process.start()
        for line in theirs:
            line.close()

    def send(self, line: int, call: tuple[Any, ...]) -> None:
        """Ask for a call, (name, *arguments) of a method of `_Programs`."""
        with contextlib.suppress(OSError):  # `receive` says that it is gone
            self._lines[line].send(call)

    def receive(self, line: int) -> tuple[Any, Exception | None]:
        """Wait for the result of the last call, or its error."""
        try:
            return self._lines[line].recv()
        except (EOFError, OSError):
            self._process.join(timeout=10)
            return None, UsageError(
                f"a process that trains agents ended (exit code {self._process.exitcode}), perhaps for lack of memory; "
                "what is saved is safe, and the same command continues."
            )

    def stop(self) -> None:
        """End the process; it has nothing to lose."""
        self._process.kill()
        self._process.join()
        for line in self._lines:
            line.close()


@contextlib.contextmanager
def start_workers(number: int) -> Iterator[list[Worker]]:
    """Start so many workers, with JAX's settings of this process; leaving the context ends them. 1: none."""
    if number == 1:
        yield []
        return
    workers: list[Worker] = []
    try:
        resource_tracker.ensure_running()  # its start would unblock the signals
        old = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # inherited by the workers: this process decides
        try:
            workers += [Worker() for _ in range(number)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        yield workers
    finally:
        for worker in workers:
            worker.stop()


class WorkersPrograms:
    """Programs in workers, each for its share of the agents.

    Args:
      workers: the workers.
      shares: number of agents of each.
      build: a function of a module, (share, *arguments) -> (programs, about). The programs are {name: (function,
        likes)}, with a tree like each of the function's arguments.
      arguments: the others of `build`.

    Attributes:
      about: what `build` told in each worker.
    """

    def __init__(self, workers: Sequence[Worker], shares: Sequence[int], build: Callable[..., Any], *arguments: Any):
        self._workers, self._number = workers, next(_numbers)
        ends = np.cumsum(shares)
        self._parts = [slice(end - share, end) for share, end in zip(shares, ends, strict=True)]
        self.about = _ask(workers, _BUILD, [("build", self._number, build, share, *arguments) for share in shares])

    def call(self, name: str, like: Any, *arguments: Any) -> Any:
        """Call a program with arguments of all agents, [A, ...] or scalars; return its results, a tree like this."""
        leaves = [jax.tree.leaves(to_host(argument)) for argument in arguments]
        calls = [
            ("run", self._number, name, *([x[part] if np.ndim(x) else x for x in own] for own in leaves))
            for part in self._parts
        ]
        found = _ask(self._workers, _RUN, calls)
        return _tree_of([np.concatenate(parts) for parts in zip(*found, strict=True)], like)


def _ask(workers: Sequence[Worker], line: int, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Let each worker do its call, all at once; wait for the results."""
    for worker, call in zip(workers, calls, strict=True):
        worker.send(line, call)
    answers = [worker.receive(line) for worker in workers]
    for _, error in answers:
        if error is not None:
            raise error
    return [result for result, _ in answers]


def _tree_of(leaves: Sequence[Any], like: Any) -> Any:
    """Put the leaves of a tree that `to_host` copied together again."""
    return from_host(jax.tree.unflatten(jax.tree.structure(like), leaves), like)


def jax_settings() -> dict[str, Any]:
    """Settings of JAX in this thread: `with jax.default_matmul_precision(…)` and the like hold for one thread only."""
    return {name: getattr(jax.config, name) for name in dir(jax.config) if name.startswith("jax_")}


class RecentPrograms:
    """Compiled programs that a process keeps for their next use, the last one used last. It can hold only so many."""

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}

    def __contains__(self, which: Any) -> bool:
        return which in self._kept

    def __getitem__(self, which: Any) -> Any:
        self._kept[which] = self._kept.pop(which)
        return self._kept[which]

    def find(self, which: Any, compile: Callable[[], Any]) -> Any:
        """Find programs, or compile them in the place of those that have not been used for the longest time."""
        if which not in self:
            while len(self._kept) >= KEPT_PROGRAMS:
                del self._kept[next(iter(self._kept))]
                jax.clear_caches()  # its traces, some 4 MB each
                gc.collect()  # the program and its traces refer to each other
            self._kept[which] = compile()
        return self[which]


class _Programs:
    """The programs in a worker."""

    def __init__(self) -> None:
        self._recent = RecentPrograms()

    def build(self, number: int, build: Callable[..., Any], *arguments: Any) -> Any:
        """Build programs; return what is told about them."""
        return self._recent.find(number, lambda: build(*arguments))[1]

    def run(self, number: int, name: str, *arguments: list[Any]) -> list[Any]:
        """Call a program with the leaves of its arguments; return those of its results."""
        function, likes = self._recent[number][0][name]
        trees = [_tree_of(leaves, like) for leaves, like in zip(arguments, likes, strict=True)]
        return jax.tree.leaves(to_host(function(*trees)))


def _serve(lines: Sequence[Connection], settings: dict[str, Any]) -> None:
    """Do what is asked on each line, until its other end is closed: then the process that started this one is gone."""
    for name, value in settings.items():
        if getattr(jax.config, name) != value:
            jax.config.update(name, value)
    programs = _Programs()
    threading.Thread(target=_answer, args=(lines[_BUILD], programs), daemon=True).start()
    _answer(lines[_RUN], programs)


def _answer(line: Connection, programs: _Programs) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            line.send(_result(programs, line.recv_bytes()))
    os._exit(0)


def _result(programs: _Programs, call: bytes) -> tuple[Any, Exception | None]:
    """Do a call; return its result, or the error."""
    try:
        name, *arguments = pickle.loads(call)
        return getattr(programs, name)(*arguments), None
    except (UsageError, MemoryError) as error:
        return None, error
    except Exception as error:  # JAX's; its text has the cause
        told = RuntimeError(str(error))
        told.add_note(traceback.format_exc())
        return None, told
