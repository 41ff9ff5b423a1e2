"""Placement of agents: in a loop on each CPU core, side by side on an accelerator, sharded over devices and hosts.

Agents never communicate, so every device runs the same program on its own block of U agents. On a CPU each agent is
trained by itself, in a loop over the block. Its bits then depend neither on U nor on its neighbours, only on the number
of threads in XLA's pool, which cuts long sums into as many parts: NPROC or else the number of cores, and at least the
number of devices. On an accelerator they depend on U, which is fixed when a sweep starts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from trpo_jax import backend
from trpo_jax.config_pytree import Config
from trpo_jax.runs.workers import Worker, jax_settings, waits_for_python
from trpo_jax.sentences import UsageError, shown
from trpo_jax.sweeps.programs import Programs, compile_in_workers, compile_programs
from trpo_jax.training.memory import check_memory, free_memory

_SHARE_OF_FREE_MEMORY = 0.8
# Environments in Python that the agents of a block keep. On a CPU agents take turns, so more of them gain nothing; a
# step of one of 288 bodies of MuJoCo takes 1.3 times as long as of one of 8, and too many would have to be rebuilt.
_MOST_INSTANCES = 64


def devices_for(config: Config, workers: Sequence[Worker] = ()) -> list[Any]:
    """The devices of this process that train an agent's group: all, or one where two would be slower.

    On a CPU an environment in Python leaves one device little to wait for but the interpreter, whose lock two devices
    then wait for. HalfCheetah takes 850 µs per step of eight instances on one device and 2,030 µs on each of two. Only
    further processes help: if there are workers, they are the devices.
    """
    devices = jax.local_devices()
    return (list(workers) or devices[:1]) if waits_for_python(config) else devices


def agents_per_block(config: Config, num_agents: int, num_devices: int) -> int:
    """The largest number of agents per device in one program with which all devices are busy to the end.

    Args:
      config: any one of the group.
      num_agents: agents of the group.
      num_devices: devices of all processes together.
    """
    most = max(1, _MOST_INSTANCES // config.num_envs) if waits_for_python(config) else backend.most_agents()
    rounds = -(-num_agents // (num_devices * most))
    return -(-num_agents // (num_devices * rounds))


def fit_programs(
    config: Config, most_agents: int, num_episodes: int, devices: Sequence[Any], ahead: Ahead | None = None
) -> Programs:
    """Compile the programs for blocks of at most `most_agents`, or fewer if the devices have too little free memory.

    Args:
      config: any one of the group.
      most_agents: the largest U.
      num_episodes: episodes of the evaluation at the end; 0: none.
      devices: the D devices.
      ahead: programs that may have been compiled already.

    Raises:
      UsageError: if not even one agent fits.
    """
    free = free_memory(devices)
    check_memory(config, 1, free)
    agents = most_agents
    while True:
        request = config, agents, num_episodes, devices
        programs = (ahead and ahead.take(*request)) or _compile(*request)
        if programs.memory <= _SHARE_OF_FREE_MEMORY * free:
            return programs
        if agents == 1:
            raise UsageError(
                f"one agent needs {programs.memory / 2**20:,.0f} MiB, but the device has {free / 2**20:,.0f} MiB free; "
                "lower num_envs, num_steps or the size of the networks."
            )
        agents = max(1, min(agents - 1, int(0.9 * agents * _SHARE_OF_FREE_MEMORY * free / programs.memory)))


class Ahead:
    """The programs of one group, compiled in a thread while those of the group before it train.

    Whether they fit into memory is asked when their turn comes, after the group before has given its memory back. What
    cannot be compiled beside a training is compiled again when its turn comes, and only then is an error raised.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compile-ahead")
        self._waiting: tuple[tuple[Any, ...], Future[Programs | None]] | None = None

    def begin(self, *request: Any) -> None:
        """Begin to compile the programs for these arguments of `compile_programs`."""
        self._waiting = request, self._pool.submit(_compile_under, jax_settings(), request)

    def take(self, *request: Any) -> Programs | None:
        """Wait for the programs that were begun; None if they are for other arguments, or did not compile."""
        waiting, self._waiting = self._waiting, None
        if waiting is None or waiting[0] != request or waiting[1].exception():
            return None
        return waiting[1].result()

    def close(self) -> None:
        """Give up what has not begun; what has begun ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _compile_under(settings: dict[str, Any], request: tuple[Any, ...]) -> Programs | None:
    return _compile(*request) if jax_settings() == settings else None


def _compile(config: Config, agents: int, num_episodes: int, devices: Sequence[Any]) -> Programs:
    build = compile_in_workers if isinstance(devices[0], Worker) else compile_programs
    return build(config, agents, num_episodes, devices)


def connect_hosts(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> tuple[int, int]:
    """Connect the processes of a sweep; return this process's number and how many there are.

    Call it before anything touches a device. With a coordinator's address (host:port of process 0), the processes meet
    by `jax.distributed`; so they do in a SLURM job of several tasks and on a TPU pod, where everything is detected.
    With numbers but no coordinator, as in a job array, they do not meet, and share nothing but the sweep's folder.

    Raises:
      UsageError: if the numbers do not fit together or the processes do not meet.
    """
    if (num_processes is None) != (process_id is None):
        raise UsageError("num_processes and process_id belong together; give both or none.")
    if num_processes is not None and process_id is not None:
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UsageError(f"process_id must lie in 0 … num_processes - 1 = {num_processes - 1}, got {process_id}.")
        if coordinator is None:
            return process_id, num_processes
    elif coordinator is None and not _on_a_cluster():
        return 0, 1
    if coordinator is not None:
        _check_address(coordinator)
    try:
        # A process that is done waits for the others at its exit, however long they take.
        jax.distributed.initialize(coordinator, num_processes, process_id, shutdown_timeout_seconds=30 * 24 * 3600)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"the processes did not meet at {coordinator or 'the cluster'}: {reason}.") from error
    return jax.process_index(), jax.process_count()


def _check_address(coordinator: str) -> None:
    """Raise `UsageError` unless an address is HOST:PORT: with another one, JAX fails without a message, or crashes."""
    host, _, port = coordinator.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 2**16
    if not (host and is_port):
        raise UsageError(f"coordinator must be HOST:PORT with a port from 1 to 65535, got {shown(coordinator)}.")


def _on_a_cluster() -> bool:
    tasks = os.environ.get("SLURM_NTASKS", "1") if "SLURM_PROCID" in os.environ else "1"
    return (tasks.isdigit() and int(tasks) > 1) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
