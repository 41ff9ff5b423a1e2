"""A trained policy as a function of observations, and its export as portable StableHLO."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.environments.base import Box, Environment
from trpo_jax.environments.entries import join, split
from trpo_jax.fields import AUTO
from trpo_jax.files import as_path, write_atomically
from trpo_jax.steps.types import Array, PyTree
from trpo_jax.training.agents import make_agent, with_normalization, with_what_is_seen
from trpo_jax.training.fit_checks import check_acts
from trpo_jax.training.recurrence import initial_carries
from trpo_jax.training.state import TrainState

_PLATFORMS = "cpu", "cuda", "tpu"
_ELSEWHERE = "choose another --output"
_LOAD = '''"""Acts with the exported policy. Needs jax and numpy, not trpo_jax.

`policy.call` takes observations of {env} in the form of trpo_jax, float32 [batch, {dimensions}]{meaning}, and returns
the most likely actions, {actions}.{carry}
"""

from pathlib import Path

import numpy as np
from jax import {imports}

folder = Path(__file__).parent
policy = export.deserialize(bytearray((folder / "policy.stablehlo").read_bytes()))
observation = np.zeros({shape}, np.float32)  # a batch of 3; any size works
{body}
'''
_CARRY = """

It is recurrent: `policy.call(carry, observation)` returns (carry, action). The arrays of the carry at the start of an
episode are in start.npz, for one environment."""
_START = """with np.load(folder / "start.npz") as start:
    leaves = [np.repeat(start[f"leaf_{i}"], 3, axis=0) for i in range(len(start.files))]
(carry, _), _ = tree.unflatten(policy.in_tree, [*leaves, observation])  # at the start of an episode
carry, action = policy.call(carry, observation)
print(np.asarray(action))"""


def acting_policy(config: Config, state: TrainState) -> tuple[Callable[[PyTree, Array], tuple[PyTree, Array]], PyTree]:
    """Make a trained policy a function of a batch of observations, [B, ...], with the entries that it sees.

    Args:
      config: the settings the state was trained with.
      state: one agent.

    Returns:
      `act(carry, observation)` -> (carry, action), the mode of the distribution with Box actions clipped to their
      bounds; and the carry at the start of one episode, [1, ...], () for a policy that is not recurrent.

    Raises:
      UsageError: if the state does not fit the settings.
    """
    agent = make_agent(config)
    check_acts(agent, state)
    policy = with_normalization(config, state.learner.statistics, agent.policy)
    space, everything = agent.environment.action_space, agent.environment.entries
    seen = seen_environment(config).entries

    def act(carry: PyTree, observation: Array) -> tuple[PyTree, Array]:
        if seen != everything and seen is not None and everything is not None:
            # Entries that only the value function has seen may have any value.
            blank = {name: jnp.zeros((*observation.shape[:-1], *shape)) for name, shape in everything.items()}
            observation = join(blank | split(seen, observation), everything)
        carry, distribution = policy.step(state.learner.policy_params, carry, observation)
        action = distribution.mode()
        return carry, jnp.clip(action, space.low, space.high) if isinstance(space, Box) else action

    return act, initial_carries(policy, 1)


def seen_environment(config: Config) -> Environment:
    """The environment of training, with only those entries of its observations that the policy sees."""
    environment = make_agent(config).environment
    return environment if config.policy is not None else with_what_is_seen(environment, AUTO)


def export_policy(config: Config, state: TrainState, folder: str | os.PathLike[str]) -> Path:
    """Write a policy as portable StableHLO for CPU, CUDA and TPU, with a script that loads it.

    The exported function is that of `acting_policy` for any batch size, with its parameters inside:
    `observation -> action`, or `(carry, observation) -> (carry, action)` for a recurrent policy (with a list of the
    carry's arrays if these are in a class of the user's). Observations are in the environment's form here: float32,
    indices as unit vectors, and bytes divided by 255.

    Args:
      config: the settings the state was trained with.
      state: one agent.
      folder: the folder for policy.stablehlo, load_policy.py and, for a recurrent policy, start.npz, its initial carry.

    Returns:
      The file.

    Raises:
      UsageError: if the state does not fit the settings, or a file cannot be written.
    """
    folder = as_path(folder)
    act, carry = acting_policy(config, state)
    environment = seen_environment(config)
    (batch,) = jax.export.symbolic_shape("batch")
    observation = jax.ShapeDtypeStruct((batch, *environment.observation_shape), jnp.float32)
    if jax.tree.leaves(carry):
        content = _serialize(act, carry, observation)
        start = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(carry))}
        write_atomically(folder / "start.npz", lambda sink: np.savez(sink, **start), _ELSEWHERE)  # type: ignore[arg-type]
    else:
        without_memory = jax.jit(lambda observation: act(carry, observation)[1])
        content = jax.export.export(without_memory, platforms=_PLATFORMS)(observation).serialize()
    file = folder / "policy.stablehlo"
    write_atomically(file, bytes(content), _ELSEWHERE)
    write_atomically(
        folder / "load_policy.py", _script(environment, is_recurrent=bool(jax.tree.leaves(carry))), _ELSEWHERE
    )
    return file


def _serialize(act: Callable[..., Any], carry: PyTree, observation: jax.ShapeDtypeStruct) -> bytearray:
    """Serialise `act` for any batch size: on carries as they are, or on their leaves if a file cannot hold them."""
    (batch, *_), (leaves, structure) = observation.shape, jax.tree.flatten(carry)
    leaves = [jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]

    def on_leaves(leaves: list[Array], observation: Array) -> tuple[list[Array], Array]:
        after, action = act(jax.tree.unflatten(structure, leaves), observation)
        return jax.tree.leaves(after), action

    try:
        carries = jax.tree.unflatten(structure, leaves)
        return jax.export.export(jax.jit(act), platforms=_PLATFORMS)(carries, observation).serialize()
    except ValueError:  # a named tuple, or a class of the user's
        return jax.export.export(jax.jit(on_leaves), platforms=_PLATFORMS)(leaves, observation).serialize()


def _script(environment: Environment, *, is_recurrent: bool) -> str:
    """The program that loads an exported policy and acts once."""
    shape = environment.observation_shape
    return _LOAD.format(
        env=environment.name,
        dimensions=", ".join(map(str, shape)),
        imports="export, tree" if is_recurrent else "export",
        meaning=_meaning(environment),
        actions=environment.action_space,
        carry=_CARRY if is_recurrent else "",
        shape=(3, *shape),
        body=_START if is_recurrent else "print(np.asarray(policy.call(observation)))",
    )


def _meaning(environment: Environment) -> str:
    """What to know about observations besides their shape."""
    if environment.entries is not None:
        layout = ", ".join(f"{name} {list(shape)}" for name, shape in environment.entries.items())
        return f", whose entries are, one after the other,\n{layout}"
    return " (bytes of pictures divided by 255)" if len(environment.observation_shape) == 3 else ""
