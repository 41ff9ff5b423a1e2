"""Navix: MiniGrid's grid worlds, seen from above."""

from __future__ import annotations

from typing import Any

import jax

from trpo_jax.environments.base import Array, Discrete, Environment, PyTree
from trpo_jax.environments.suites import assemble, check_name, one_hot_layers, require

# Kinds of object, colours, and states (open, closed, locked, or one of four directions), as in MiniGrid.
_KINDS = (11, 6, 4)


def names() -> list[str]:
    """Names of Navix's environments."""
    return sorted(require("navix", "navix").registry())


def make(name: str, options: dict[str, Any], max_steps: int | None) -> Environment:
    """Build `navix/{name}`; `options` are keyword arguments of its constructor, such as `observation_fn`."""
    navix = require("navix", "navix")
    check_name(name, "navix", names())
    env = navix.make(name, **options)
    symbolic = env.observation_fn in (navix.observations.symbolic, navix.observations.symbolic_first_person)
    picture = env.observation_fn in (navix.observations.rgb, navix.observations.rgb_first_person)

    def observe(timestep: PyTree) -> Array:
        if symbolic:
            return one_hot_layers(timestep.observation, _KINDS)
        return timestep.observation / 255 if picture else timestep.observation

    def reset(key: Array) -> tuple[Array, PyTree]:
        timestep = env.reset(jax.random.key_data(key))
        return observe(timestep), timestep

    def step(key: Array, timestep: PyTree, action: Array) -> tuple[Any, ...]:
        timestep = env._step(timestep, action)  # its `step` would reset an episode one step after its end
        return observe(timestep), timestep, timestep.reward, timestep.is_termination(), timestep.is_truncation()

    space = Discrete(int(env.action_space.n))
    return assemble(f"navix/{name}", space, reset, step, limit=int(env.max_steps), max_steps=max_steps)
