"""The compiled programs of agents that differ in traced settings alone: their start, training and evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trpo_jax.config_pytree import Config
from trpo_jax.runs.metrics import metrics_tree
from trpo_jax.runs.runner import CAPACITY
from trpo_jax.runs.workers import Worker, WorkersPrograms
from trpo_jax.training import evaluation
from trpo_jax.training.loop import init, train_chunk
from trpo_jax.training.memory import program_memory
from trpo_jax.training.state import TrainState

_AFTER_LAST = 2**32 - 2  # folded into an agent's key for its evaluation; no iteration has this number
_AGENTS = "agents"


class Programs(NamedTuple):
    """The compiled programs of a group of agents, each over D blocks of U agents, [D·U, ...].

    Attributes:
      start: (configs, keys) -> states.
      train: (configs, states, number of iterations ≤ CAPACITY) -> (states, metrics [D·U, capacity]); reuses the memory
        of the states. If agents may stop before others, each has its own number, [D·U].
      evaluate_in_training: (configs, states) -> mean return of an evaluation during training; None if not requested.
      evaluate: (configs, states) -> mean return of the policy over fresh episodes; None if not requested.
      agents_per_block: U.
      num_devices: D.
      memory: bytes that the largest program needs on each device.
      states: shapes of the states, [D·U, ...].
    """

    start: Any
    train: Any
    evaluate_in_training: Any
    evaluate: Any
    agents_per_block: int
    num_devices: int
    memory: int
    states: TrainState

    @property
    def width(self) -> int:
        """Agents side by side, D·U."""
        return self.num_devices * self.agents_per_block


def shapes_of(config: Config, num_agents: int) -> tuple[Config, Any, TrainState]:
    """Shapes of the settings, the keys and the states of so many agents."""
    configs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((num_agents,), np.float32), config)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_agents))
    return configs, keys, jax.eval_shape(jax.vmap(init), configs, keys)


def compile_programs(config: Config, agents: int, num_episodes: int, devices: Sequence[Any]) -> Programs:
    """Compile the programs for blocks of U = `agents` on each device; `config` is any one of the group."""
    total = agents * len(devices)
    mesh = Mesh(np.array(devices), (_AGENTS,))
    capacity = min(config.num_iterations, CAPACITY)

    def train(config: Config, state: TrainState, length: Any) -> Any:
        return train_chunk(config, state, length, capacity=capacity)

    def evaluate_in_training(config: Config, state: TrainState) -> Any:
        return jnp.mean(evaluation.evaluate_in_training(config, state).episode_return)

    def evaluate(config: Config, state: TrainState) -> Any:
        key = jax.random.fold_in(state.key, _AFTER_LAST)
        return jnp.mean(evaluation.evaluate(config, state, key, num_episodes=num_episodes).episode_return)

    configs, keys, states = shapes_of(config, total)
    start = _compile(init, mesh, configs, keys)
    lengths = jax.ShapeDtypeStruct((total,) if evaluation.stops(config) else (), np.int32)
    chunk = _compile(train, mesh, configs, states, lengths, donate=1)
    during = _compile(evaluate_in_training, mesh, configs, states) if config.eval_every else None
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


def compile_in_workers(config: Config, agents: int, num_episodes: int, workers: Sequence[Worker]) -> Programs:
    """Compile the same for blocks of U = `agents` in each worker."""
    shares = [agents] * len(workers)
    there = WorkersPrograms(workers, shares, _build, config, num_episodes)
    states = shapes_of(config, sum(shares))[-1]
    start = functools.partial(there.call, "start", states)
    train = functools.partial(there.call, "train", (states, metrics_tree()))
    evaluate_in_training = functools.partial(there.call, "evaluate_in_training", 0) if config.eval_every else None
    evaluate = functools.partial(there.call, "evaluate", 0) if num_episodes else None
    return Programs(start, train, evaluate_in_training, evaluate, agents, len(workers), max(there.about), states)


def _build(agents: int, config: Config, num_episodes: int) -> tuple[dict[str, Any], int]:
    """The programs of a worker; see `WorkersPrograms`."""
    found = compile_programs(config, agents, num_episodes, jax.local_devices()[:1])
    configs, keys, states = shapes_of(config, agents)
    likes = {"start": (configs, keys), "train": (configs, states, 0)}
    names = "start", "train", "evaluate_in_training", "evaluate"
    return {name: (getattr(found, name), likes.get(name, (configs, states))) for name in names}, found.memory
