"""Prediction of the memory that a program of many agents needs, before it is built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trpo_jax import backend
from trpo_jax.config_pytree import Config
from trpo_jax.fields import AUTO
from trpo_jax.sentences import UsageError
from trpo_jax.training.agents import make_agent
from trpo_jax.training.loop import init, train_step
from trpo_jax.training.rollouts import rollout
from trpo_jax.training.state import Metrics, TrainState

_PROBES = (8, 16), (256, 512)  # agents; programs of fewer have another form
_NEGLIGIBLE = 2**26  # bytes
_NARROW = 1024  # units of a layer


def program_memory(compiled: Any) -> int:
    """Bytes that a compiled program holds at once: arguments, results and scratch, less the arguments it overwrites."""
    sizes = compiled.memory_analysis()
    return (
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
    )


def compile_agents(config: Config, num_agents: int, iterations: int = 1) -> Any:
    """Compile iterations of K agents side by side to a program (config, states [K, ...]) -> (states, metrics)."""

    def run(config: Config, states: TrainState) -> tuple[TrainState, Metrics]:
        step = jax.vmap(train_step, in_axes=(None, 0))
        return jax.lax.scan(lambda states, _: step(config, states), states, None, length=iterations)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_agents))
    states = jax.eval_shape(jax.vmap(init, in_axes=(None, 0)), config, keys)
    return jax.jit(run, donate_argnums=1).lower(config, states).compile()


def predict_memory(config: Config, num_agents: int, iterations: int = 1) -> int:
    """Predict the bytes that a program of K agents needs at once, without building it.

    At any moment of an iteration XLA holds a constant plus a multiple of K: on CPU, for instance, one workspace for all
    agents as they learn, and each agent's batch as they act. It allocates the largest of these: the workspace with few
    agents, the batches with many. So the programs of 8 and 16 agents are compiled, and those of 256 and 512. A line
    goes through each pair, and the higher line counts. Such a maximum is convex, so that it is the first line up to 16
    agents, and the second from 256 on.
    """

    def line(few: int, more: int) -> float:
        at_few, at_more = (program_memory(compile_agents(config, agents, iterations)) for agents in (few, more))
        return at_few + (num_agents - few) * (at_more - at_few) / (more - few)

    few, many = _PROBES
    pairs = [few] if num_agents <= few[1] else [many] if num_agents >= many[0] else [few, many]
    return round(max(line(*pair) for pair in pairs))


def check_memory(config: Config, num_agents: int, free: int) -> None:
    """Check before compiling that K agents side by side can fit into the bytes that are free.

    Raises:
      UsageError: if they cannot, with one sentence.
    """
    observation = 4 * int(np.prod(make_agent(config).environment.observation_shape))
    chosen = {name: getattr(config, name) for name in ("hidden", "value_hidden", "channels")}
    layers = {
        name: max(widths) for name, widths in chosen.items() if widths != AUTO and max(widths, default=0) > _NARROW
    }
    small = observation * config.steps_per_iteration < _NEGLIGIBLE and not layers
    if num_agents < 1_000 and small:
        return  # tracing takes longer than it is worth
    sizes = {"num_envs": config.num_envs, "num_steps": config.num_steps, "reuse": config.reuse, **layers}
    _compare(least_memory(config, num_agents), free, {**sizes, "number of agents": num_agents})


def check_episodes(config: Config, num_agents: int, num_episodes: int, free: int, name: str = "num_episodes") -> None:
    """Check the same for episodes side by side, as `evaluate` runs them."""
    environment = make_agent(config).environment
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_episodes))
    states = jax.eval_shape(jax.vmap(environment.reset), keys)
    _compare(num_agents * _bytes(states), free, {name: num_episodes, "number of agents": num_agents})


def _compare(least: int, free: int, sizes: dict[str, int]) -> None:
    if least > free:
        named = ", ".join(f"{name} ({size:,})" for name, size in sizes.items() if size > 1)
        raise UsageError(
            f"at least {least / 2**30:,.1f} GiB are needed for {named}, but {free / 2**30:,.1f} GiB are free; "
            "lower one of them."
        )


def least_memory(config: Config, num_agents: int) -> int:
    """Least number of bytes for K agents side by side: their states, and the batches that are in use at a time."""
    agent = make_agent(config)
    state = jax.eval_shape(init, config, jax.eval_shape(lambda: jax.random.key(0)))
    batch = jax.eval_shape(lambda s: rollout(agent, s.learner, s.actor, s.key)[1], state)
    at_a_time = 1 if backend.agents_take_turns() else num_agents
    return num_agents * _bytes(state) + at_a_time * _bytes(batch)


def _bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * (leaf.dtype.itemsize if hasattr(leaf.dtype, "itemsize") else 8) for leaf in leaves)


def free_memory(devices: Sequence[Any]) -> int:
    """Bytes free on each device; on a CPU an equal share of what is free on the machine, or in the container."""
    if devices[0].platform != "cpu":
        statistics = [device.memory_stats() or {} for device in devices]
        return min(s.get("bytes_limit", 2**62) - s.get("bytes_in_use", 0) for s in statistics)
    return _free_host_memory() // len(devices)


def _free_host_memory() -> int:
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        found.append(int(text) - int(used.read_text()))
    if not found:  # no Linux: half of the installed memory
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return max(0, min(found))
