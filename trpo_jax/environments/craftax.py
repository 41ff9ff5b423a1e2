"""Craftax: an open world of survival, in its full and its classic version."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from trpo_jax.environments.base import Array, Discrete, Environment, PyTree
from trpo_jax.environments.suites import assemble, check_name, require

_FOREVER = jnp.iinfo(jnp.int32).max


def names() -> list[str]:
    """Names of Craftax's environments; Craftax itself keeps no list."""
    require("craftax.craftax_env", "craftax")
    return [f"Craftax-{variant}-v1" for variant in ("Classic-Pixels", "Classic-Symbolic", "Pixels", "Symbolic")]


def make(name: str, options: dict[str, Any], max_steps: int | None) -> Environment:
    """Build `craftax/{name}`; `options` replace fields of its parameters."""
    check_name(name, "craftax", names())
    env = require("craftax.craftax_env", "craftax").make_craftax_env_from_name(name, auto_reset=False)
    params = env.default_params.replace(**options)
    limits = [int(params.max_timesteps)] + ([] if max_steps is None else [max_steps])
    # It reports its own limit like a death.
    params = params.replace(max_timesteps=_FOREVER)

    def reset(key: Array) -> tuple[Array, PyTree]:
        return env.reset_env(key, params)

    def step(key: Array, state: PyTree, action: Array) -> tuple[Any, ...]:
        observation, state, reward, dead, _ = env.step_env(key, state, action, params)
        return observation, state, reward, dead, False

    space = Discrete(int(env.action_space(params).n))
    return assemble(f"craftax/{name}", space, reset, step, max_steps=min(limits), costly_reset=True)
