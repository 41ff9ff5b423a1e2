"""Jumanji: combinatorial problems and games with dm_env's interface."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config import UsageError
from trpo_jax.environments.base import Array, Discrete, Environment, MultiDiscrete, PyTree, Space
from trpo_jax.environments.suites import assemble, call_constructor, check_name, flat, require


def names() -> list[str]:
    """Environments that Jumanji brings along."""
    return sorted(require("jumanji", "jumanji").registered_environments())


def make(name: str, options: dict[str, Any], max_steps: int | None) -> Environment:
    """Build `jumanji/{name}`; `options` are keyword arguments of its constructor."""
    jumanji = require("jumanji", "jumanji")
    check_name(name, "jumanji", names())
    full_name = f"jumanji/{name}"
    env = call_constructor(full_name, lambda: jumanji.make(name, **options))
    return from_timesteps(env, full_name, max_steps)


def from_timesteps(env: Any, name: str, max_steps: int | None) -> Environment:
    """Bring an environment with Jumanji's interface to the library's.

    All parts of an observation, the mask of legal actions among them, become one vector.
    """
    if tuple(env.reward_spec.shape) != ():
        raise UsageError(f"{name} has several agents, each with its own reward; only one reward can be trained on.")
    space = _action_space(env.action_spec, name)
    shape = tuple(env.action_spec.shape)

    def reset(key: Array) -> tuple[Array, PyTree]:
        state, timestep = env.reset(jax.random.key_data(key))
        return flat(timestep.observation), state

    def step(key: Array, state: PyTree, action: Array) -> tuple:
        state, timestep = env.step(state, action.reshape(shape))
        last = timestep.last()
        goes_on = jnp.all(timestep.discount > 0)  # as dm_env tells a time limit from an end
        return flat(timestep.observation), state, timestep.reward, last & ~goes_on, last & goes_on

    limit = getattr(env, "time_limit", None)
    return assemble(name, space, reset, step, limit=None if limit is None else int(limit), max_steps=max_steps)


def _action_space(spec: Any, name: str) -> Space:
    sizes = getattr(spec, "num_values", None)
    if sizes is None:
        raise UsageError(f"actions of {name} lie in {spec}; DiscreteArray and MultiDiscreteArray can be trained.")
    if tuple(spec.shape) == ():
        return Discrete(int(sizes))
    return MultiDiscrete(tuple(int(n) for n in np.asarray(sizes).ravel()))
