"""Further processes on this machine that train agents, for environments that run in Python.

One interpreter steps one environment at a time, so on a CPU such agents need a process per core. Each worker builds the
programs of its share of the agents. A call sends it their states and gets the new ones back; between calls it has none.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.environments.host import runs_on_host
from trpo_jax.environments.make import environment_of
from trpo_jax.sentences import UsageError, check_number
from trpo_jax.training.checkpoints import from_host, to_host
from trpo_jax.training.memory import free_memory

_BYTES = 3 * 2**29  # room for one more process, most of it for its compiler: HalfCheetah took 1.1 GiB
_RUN, _BUILD = 0, 1  # the lines to a worker: it compiles the next program while it trains
_turns = threading.Lock(), threading.Lock()  # on each line an answer belongs to the call before it
_SIGNALS = {signal.SIGINT, signal.SIGTERM}  # a terminal, or a scheduler, sends them to all processes of a command
_numbers = itertools.count()  # of the programs
_unused: list[int] = []  # those that this process does not need any more
_PATIENCE = 10.0  # seconds in which a worker may close its environments
_PLAIN = bool, int, float, str, type(None)  # settings of JAX that another process can have
_START = """
import json, sys
sys.path[:], settings, ends = json.loads(sys.argv[1])
from trpo_jax.runs.workers import serve
serve(settings, ends)
"""


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


def check_workers(number: Any) -> None:
    """Raise `UsageError` unless this can be a number of workers."""
    check_number("num_workers", number, whole=True, interval="[1, 1024]")


class Worker:
    """A process that trains agents. It ends with the process that started it, however that ends.

    It is no child of `multiprocessing`: this process's main module is not imported in it, and its environments may
    start processes of their own.
    """

    platform = "cpu"  # for the programs of a sweep, each worker is a device

    def __init__(self) -> None:
        ours, theirs = zip(*(Pipe() for _ in (_RUN, _BUILD)), strict=True)
        self._lines: tuple[Connection, ...] = ours
        ends = [line.fileno() for line in theirs]
        settings = {name: value for name, value in jax_settings().items() if isinstance(value, _PLAIN)}
        what = json.dumps([[str(folder) for folder in sys.path], settings, ends])
        self._process = subprocess.Popen([sys.executable, "-c", _START, what], stdin=subprocess.DEVNULL, pass_fds=ends)
        for line in theirs:
            line.close()

    def send(self, line: int, call: tuple[Any, ...]) -> None:
        """Ask for a call, (name, *arguments) of a method of `_Programs`."""
        with contextlib.suppress(OSError):  # `receive` raises an error
            self._lines[line].send(call)

    def receive(self, line: int) -> tuple[Any, Exception | None]:
        """Wait for the result of the last call, or its error."""
        try:
            return self._lines[line].recv()
        except (EOFError, OSError):
            self.end(_PATIENCE)
            code = self._process.returncode
            why = "for lack of memory" if code == -signal.SIGKILL else "by an environment's code"
            return None, UsageError(
                f"a worker process ended (exit code {code}), perhaps {why}; what is saved in a folder is safe."
            )

    def hang_up(self) -> None:
        """Close the lines, so that the process closes its environments and ends."""
        for line in self._lines:
            line.close()

    def end(self, seconds: float) -> None:
        """Wait for the end of the process, but no longer than that."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def start_workers(number: int) -> Iterator[list[Worker]]:
    """Start so many workers, with JAX's settings of this process; leaving the context ends them. 1: none."""
    if number == 1:
        yield []
        return
    workers: list[Worker] = []
    patience = 0.0
    try:
        for _ in range(number):
            old = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # inherited by the worker: this process decides
            try:
                workers.append(Worker())
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, old)
        yield workers
        patience = _PATIENCE
    except Exception:
        patience = _PATIENCE
        raise
    finally:
        for worker in workers:
            worker.hang_up()
        for worker in workers:
            worker.end(patience)


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
        unused = [_unused.pop() for _ in range(len(_unused))]
        calls = [("build", self._number, unused, build, share, *arguments) for share in shares]
        try:
            self.about = _ask(workers, _BUILD, calls)
        except UsageError as error:
            what = "a worker process, which sees only environments that come from a module (gymnasium/MODULE:NAME)"
            raise UsageError(f"{what}, has failed: {error}") from None
        weakref.finalize(self, _unused.append, self._number)

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
    with _turns[line]:
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


def forget_traces() -> None:
    """Free what JAX keeps of programs that are not used any more."""
    jax.clear_caches()  # some 4 MB each
    gc.collect()  # a program and its traces refer to each other


def jax_settings() -> dict[str, Any]:
    """Settings of JAX in this thread: `with jax.default_matmul_precision(…)` and the like hold for one thread only."""
    return {name: getattr(jax.config, name) for name in dir(jax.config) if name.startswith("jax_")}


class _Programs:
    """The programs in a worker."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[dict[str, Any], Any]] = {}

    def build(self, number: int, unused: Sequence[int], build: Callable[..., Any], *arguments: Any) -> Any:
        """Build programs in place of those that are not used any more; return what is told about them."""
        if any([self._kept.pop(old, None) for old in unused]):
            forget_traces()
        self._kept[number] = build(*arguments)
        return self._kept[number][1]

    def run(self, number: int, name: str, *arguments: list[Any]) -> list[Any]:
        """Call a program with the leaves of its arguments; return those of its results."""
        function, likes = self._kept[number][0][name]
        trees = [_tree_of(leaves, like) for leaves, like in zip(arguments, likes, strict=True)]
        return jax.tree.leaves(to_host(function(*trees)))


def serve(settings: dict[str, Any], ends: Sequence[int]) -> None:
    """Take over JAX's settings; do what is asked on each line, until the other ends are closed."""
    for name, value in settings.items():
        if getattr(jax.config, name) != value:
            jax.config.update(name, value)
    lines, programs = [Connection(end) for end in ends], _Programs()
    threading.Thread(target=_build, args=(lines[_BUILD], programs), daemon=True).start()
    _answer(lines[_RUN], programs)


def _build(line: Connection, programs: _Programs) -> None:
    try:
        _answer(line, programs)
    finally:
        time.sleep(_PATIENCE)
        os._exit(1)  # whatever still runs


def _answer(line: Connection, programs: _Programs) -> None:
    """Do one call after the other. They come from the process that started this one: nobody else has the other end."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            line.send(_result(programs, *line.recv()))


def _result(programs: _Programs, name: str, *arguments: Any) -> tuple[Any, Exception | None]:
    """Do a call; return its result and its error, one of them None."""
    try:
        return getattr(programs, name)(*arguments), None
    except (UsageError, MemoryError) as error:
        return None, error
    except BaseException as error:  # JAX's, or that of an environment; its text has the cause
        told = RuntimeError(str(error) or type(error).__name__)
        told.add_note(traceback.format_exc())
        return None, told
