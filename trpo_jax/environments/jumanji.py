"""Jumanji: combinatorial problems and games with dm_env's interface."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.environments.base import Array, Discrete, Environment, MultiDiscrete, PyTree, Space, sizes_of
from trpo_jax.environments.entries import flat
from trpo_jax.environments.suites import assemble, check_name, require
from trpo_jax.sentences import UsageError


def names() -> list[str]:
    """Names of Jumanji's environments."""
    return sorted(require("jumanji", "jumanji").registered_environments())


def make(name: str, options: dict[str, Any], max_steps: int | None) -> Environment:
    """Build `jumanji/{name}`; `options` are keyword arguments of its constructor."""
    jumanji = require("jumanji", "jumanji")
    check_name(name, "jumanji", names())
    return from_timesteps(jumanji.make(name, **options), f"jumanji/{name}", max_steps)


def from_timesteps(env: Any, name: str, max_steps: int | None) -> Environment:
    """Adapt an environment with Jumanji's interface.

    All parts of an observation become one vector. A mask of legal actions comes first, as ±1; the policy obeys it if
    each action, or each component of an action, has its own entry.
    """
    if tuple(env.reward_spec.shape) != ():
        raise UsageError(f"{name} has several agents, each with its own reward; only one reward can be trained on.")
    space: Any = _action_space(env.action_spec, name)
    shape = tuple(env.action_spec.shape)
    mask = getattr(jax.eval_shape(env.reset, jax.random.PRNGKey(0))[1].observation, "action_mask", None)
    sizes = sizes_of(space)
    of_each_action = mask is not None and mask.shape in ((sizes[0],), (len(sizes), sizes[0]))
    has_mask = of_each_action and len(set(sizes)) == 1

    def reset(key: Array) -> tuple[Array, PyTree]:
        state, timestep = env.reset(jax.random.key_data(key))
        return observe(timestep.observation), state

    def step(key: Array, state: PyTree, action: Array) -> tuple[Any, ...]:
        state, timestep = env.step(state, action.reshape(shape))
        last = timestep.last()
        goes_on = jnp.all(timestep.discount > 0)  # at a time limit, in dm_env's convention
        return observe(timestep.observation), state, timestep.reward, last & ~goes_on, last & goes_on

    def observe(observation: PyTree) -> Array:
        if not has_mask:
            return flat(observation)
        return flat((jnp.where(observation.action_mask, 1, -1), observation._replace(action_mask=())))

    def action_mask(observation: Array) -> Array:
        return observation[..., : sum(sizes)] > 0

    limit = getattr(env, "time_limit", None)
    return assemble(
        name,
        space,
        reset,
        step,
        limit=None if limit is None else int(limit),
        max_steps=max_steps,
        action_mask=action_mask if has_mask else None,
    )


def _action_space(spec: Any, name: str) -> Space:
    sizes = getattr(spec, "num_values", None)
    if sizes is None:
        raise UsageError(f"actions of {name} lie in {spec}; only DiscreteArray and MultiDiscreteArray can be trained.")
    if tuple(spec.shape) == ():
        return Discrete(int(sizes))
    return MultiDiscrete(tuple(int(n) for n in np.asarray(sizes).ravel()))
