"""Placement of agents: in a loop on each CPU core, side by side on an accelerator, sharded over devices and hosts.

Agents never communicate, so every device runs the same program on its own block of U agents. On a CPU each agent is
trained by itself, in a loop over the block. Its bits then depend neither on U nor on its neighbours, only on the number
of threads in XLA's pool, which cuts long sums into as many parts: NPROC or else the number of cores, and at least the
number of devices. On an accelerator they depend on U, which is fixed when a sweep starts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trpo_jax import backend
from trpo_jax.config_pytree import Config
from trpo_jax.environments.host import runs_on_host
from trpo_jax.environments.make import environment_of
from trpo_jax.runs.runner import CAPACITY
from trpo_jax.sentences import UsageError, shown
from trpo_jax.sweeps.plans import Group
from trpo_jax.training import evaluation
from trpo_jax.training.loop import init, train_chunk
from trpo_jax.training.memory import check_memory, free_memory, program_memory
from trpo_jax.training.state import TrainState

_SHARE_OF_FREE_MEMORY = 0.8
_AFTER_LAST = 2**32 - 2  # folded into an agent's key for its evaluation; no iteration has this number
_AGENTS = "agents"
# Environments in Python that the agents of a block keep. On a CPU agents take turns, so more of them gain nothing; a
# step of one of 288 bodies of MuJoCo takes 1.3 times as long as of one of 8, and too many would have to be rebuilt.
_MOST_INSTANCES = 64
_PROCESS_BYTES = 3 * 2**29  # room for one more process, most of it for its compiler: HalfCheetah took 1.1 GiB


class Programs(NamedTuple):
    """The compiled programs of a group of agents, each over D blocks of U agents, [D·U, ...].

    Attributes:
      start: (configs, keys) -> states.
      train: (configs, states, number of iterations ≤ CAPACITY) -> (states, metrics [D·U, capacity]); reuses the memory
        of the states. If agents may stop before others, each has its own number, [D·U].
      judge: (configs, states) -> mean return of an evaluation during training; None if not requested.
      evaluate: (configs, states) -> mean return of the policy over fresh episodes; None if not requested.
      agents_per_block: U.
      num_devices: D.
      memory: bytes that the largest program needs on each device.
      states: shapes of the states, [D·U, ...].
    """

    start: Any
    train: Any
    judge: Any
    evaluate: Any
    agents_per_block: int
    num_devices: int
    memory: int
    states: TrainState

    @property
    def width(self) -> int:
        """Agents side by side, D·U."""
        return self.num_devices * self.agents_per_block


def devices_for(config: Config) -> list[Any]:
    """The devices of this process that train an agent's group: all, or one where two would be slower.

    On a CPU an environment in Python leaves one device little to wait for but the interpreter, whose lock two devices
    then wait for. HalfCheetah takes 850 µs per step of eight instances on one device and 2,030 µs on each of two. Only
    further processes help.
    """
    devices = jax.local_devices()
    return devices[:1] if _waits_for_python(config) else devices


def _waits_for_python(config: Config) -> bool:
    return jax.local_devices()[0].platform == "cpu" and runs_on_host(environment_of(config))


def useful_processes(groups: Sequence[Group]) -> int:
    """Number of processes that keep all cores busy: one for each device of a CPU if all environments run in Python.

    It is smaller if there are fewer agents, or too little free memory.
    """
    if not all(_waits_for_python(group.configs[0]) for group in groups):
        return 1
    room = free_memory(jax.local_devices()[:1]) // _PROCESS_BYTES
    return max(1, min(jax.local_device_count(), room, max(group.num_agents for group in groups)))


def agents_per_block(config: Config, num_agents: int, num_devices: int) -> int:
    """The largest number of agents per device in one program with which all devices are busy to the end.

    Args:
      config: any one of the group.
      num_agents: agents of the group.
      num_devices: devices of all processes together.
    """
    most = max(1, _MOST_INSTANCES // config.num_envs) if _waits_for_python(config) else backend.most_agents()
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
        programs = (ahead and ahead.take(*request)) or compile_programs(*request)
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
        self._waiting = request, self._pool.submit(_compile_under, _jax_settings(), request)

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
    return compile_programs(*request) if _jax_settings() == settings else None


def _jax_settings() -> dict[str, Any]:
    """Settings of JAX in this thread: `with jax.default_matmul_precision(…)` and the like hold for one thread only."""
    return {name: getattr(jax.config, name) for name in dir(jax.config) if name.startswith("jax_")}


def compile_programs(config: Config, agents: int, num_episodes: int, devices: Sequence[Any]) -> Programs:
    """Compile the programs for blocks of U = `agents` on each device; `config` is any one of the group."""
    total = agents * len(devices)
    mesh = Mesh(np.array(devices), (_AGENTS,))
    capacity = min(config.num_iterations, CAPACITY)

    def train(config: Config, state: TrainState, length: Any) -> Any:
        return train_chunk(config, state, length, capacity=capacity)

    def judge(config: Config, state: TrainState) -> Any:
        return jnp.mean(evaluation.judge(config, state).episode_return)

    def evaluate(config: Config, state: TrainState) -> Any:
        key = jax.random.fold_in(state.key, _AFTER_LAST)
        return jnp.mean(evaluation.evaluate(config, state, key, num_episodes=num_episodes).episode_return)

    configs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((total,), np.float32), config)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), total))
    start = _compile(init, mesh, configs, keys)
    states = jax.eval_shape(jax.vmap(init), configs, keys)
    lengths = jax.ShapeDtypeStruct((total,) if evaluation.stops(config) else (), np.int32)
    chunk = _compile(train, mesh, configs, states, lengths, donate=1)
    during = _compile(judge, mesh, configs, states) if config.eval_every else None
    after = _compile(evaluate, mesh, configs, states) if num_episodes else None
    memory = max(program_memory(program) for program in (start, chunk, during, after) if program)
    return Programs(start, chunk, during, after, agents, len(devices), memory, states)


def _compile(function: Callable[..., Any], mesh: Mesh, *arguments: Any, donate: int | None = None) -> Any:
    """Compile `function` of one agent for all agents [D·U, ...] over the mesh; scalars go to every agent."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    each, whole = PartitionSpec(_AGENTS), PartitionSpec()
    specs = tuple(whole if isinstance(a, jax.ShapeDtypeStruct) and a.shape == () else each for a in arguments)

    def block(*arguments: Any) -> Any:
        agents = tuple(a for a, spec in zip(arguments, specs, strict=True) if spec is each)
        shared = arguments[len(agents) :]
        one = lambda agent: function(*agent, *shared)  # noqa: E731
        return jax.lax.map(one, agents) if on_cpu else jax.vmap(one)(agents)

    block.__name__ = function.__name__
    # `check_vma` does not support custom batching rules and scans that start from constants.
    sharded = jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=each, check_vma=False)
    jitted = jax.jit(
        sharded,
        in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs),
        donate_argnums=() if donate is None else donate,
    )
    return jitted.lower(*arguments).compile()


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
