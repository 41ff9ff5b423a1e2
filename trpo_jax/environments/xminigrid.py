"""XLand-MiniGrid: grid worlds from the agent's view, and tasks with changing rules."""

from __future__ import annotations

from typing import Any

import jax

from trpo_jax.environments.base import Array, Discrete, Environment, PyTree
from trpo_jax.environments.suites import assemble, check_name, one_hot_layers, require


def names() -> list[str]:
    """Names of XLand-MiniGrid's environments."""
    return sorted(require("xminigrid", "xminigrid").registered_environments())


def make(name: str, options: dict[str, Any], max_steps: int | None) -> Environment:
    """Build `xminigrid/{name}`; `options` replace fields of its parameters, such as `ruleset`."""
    xminigrid = require("xminigrid", "xminigrid")
    constants = require("xminigrid.core.constants", "xminigrid")
    check_name(name, "xminigrid", names())
    env, params = xminigrid.make(name, **options)
    kinds = (int(constants.NUM_TILES), int(constants.NUM_COLORS))

    def reset(key: Array) -> tuple[Array, PyTree]:
        timestep = env.reset(params, jax.random.key_data(key))
        return one_hot_layers(timestep.observation, kinds), timestep

    def step(key: Array, timestep: PyTree, action: Array) -> tuple[Any, ...]:
        timestep = env.step(params, timestep, action)
        last, goes_on = timestep.last(), timestep.discount > 0
        observation = one_hot_layers(timestep.observation, kinds)
        return observation, timestep, timestep.reward, last & ~goes_on, last & goes_on

    space = Discrete(int(env.num_actions(params)))
    return assemble(f"xminigrid/{name}", space, reset, step, limit=int(params.max_steps), max_steps=max_steps)
