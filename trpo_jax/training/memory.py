"""How much memory a program of many agents takes, before it is built."""

from __future__ import annotations

from typing import Any

import jax

from trpo_jax.training.loop import init, train_step
from trpo_jax.types import Config, Metrics, TrainState

_PROBES = (8, 16), (256, 512)  # agents; fewer are programs of another form


def program_memory(compiled: Any) -> int:
    """Bytes that a compiled program holds at once: arguments, results and scratch, less what results take over."""
    sizes = compiled.memory_analysis()
    return (
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
    )


def compile_agents(config: Config, num_agents: int, iterations: int = 1) -> Any:
    """Iterations of K agents side by side as a compiled program (config, states [K, ...]) -> (states, metrics)."""

    def run(config: Config, states: TrainState) -> tuple[TrainState, Metrics]:
        step = jax.vmap(train_step, in_axes=(None, 0))
        return jax.lax.scan(lambda states, _: step(config, states), states, None, length=iterations)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_agents))
    states = jax.eval_shape(jax.vmap(init, in_axes=(None, 0)), config, keys)
    return jax.jit(run, donate_argnums=1).lower(config, states).compile()


def predict_memory(config: Config, num_agents: int, iterations: int = 1) -> int:
    """Bytes that a program of K agents needs at once, without building that program.

    At any moment of an iteration XLA holds a constant plus a multiple of K: on CPU, for instance, one workspace for
    all agents as they learn, and each agent's batch as they act. What it allocates is the most of any moment: with
    few agents the workspace, with many the batches. So the programs of 8 and 16 agents are compiled, and those of 256
    and 512: a line goes through each pair, of which the higher one counts. Such a maximum is convex, so that up to 16
    agents it is the first line and from 256 on the second.
    """

    def line(few: int, more: int) -> float:
        at_few, at_more = (program_memory(compile_agents(config, agents, iterations)) for agents in (few, more))
        return at_few + (num_agents - few) * (at_more - at_few) / (more - few)

    few, many = _PROBES
    pairs = [few] if num_agents <= few[1] else [many] if num_agents >= many[0] else [few, many]
    return round(max(line(*pair) for pair in pairs))
