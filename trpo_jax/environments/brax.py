"""Brax: rigid bodies with actions in [-1, 1], in one of its physics backends."""

from __future__ import annotations

from typing import Any

import jax

from trpo_jax.environments import base
from trpo_jax.environments.base import Array, Environment, PyTree
from trpo_jax.environments.suites import assemble, check_name, quiet_mujoco, require
from trpo_jax.sentences import UsageError

# Brax has no time limit of its own; its results are of episodes of this length.
MAX_STEPS = 1000
BACKENDS = ("generalized", "positional", "spring", "mjx")


def make(name: str, options: dict[str, Any], max_steps: int | None) -> Environment:
    """Build `brax/{name}`, such as hopper or, with a backend, hopper/spring.

    `options` are keyword arguments of `brax.envs.get_environment`.
    """
    own_name, _, backend = name.partition("/")
    check_name(own_name, "brax", names())
    if backend:
        if backend not in BACKENDS:
            raise UsageError(f"brax has no backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
        options = {"backend": backend, **options}
    with quiet_mujoco():
        env = require("brax.envs", "brax").get_environment(own_name, **options)
    return from_brax(env, f"brax/{name}", MAX_STEPS if max_steps is None else max_steps)


def from_brax(env: Any, name: str, max_steps: int | None = None) -> Environment:
    """An environment with Brax's interface: `reset(rng) -> State` and `step(State, action) -> State`.

    Args:
      env: its actions lie in [-1, 1].
      name: with the suite's prefix.
      max_steps: the time limit.
    """

    def reset(key: Array) -> tuple[Array, PyTree]:
        state = env.reset(jax.random.key_data(key))  # Brax knows no typed keys
        return _observation(state.obs), state

    def step(key: Array, state: PyTree, action: Array) -> tuple[Array, PyTree, Array, Array, Any]:
        state = env.step(state, action)
        return _observation(state.obs), state, state.reward, state.done > 0, False

    box = base.make_box(-1.0, 1.0, (env.action_size,))
    return assemble(name, box, reset, step, max_steps=max_steps)


def _observation(observation: Any) -> Any:
    """An array as it is, and any kind of dictionary, such as Playground's of "state" and "privileged_state", as one."""
    return dict(observation) if hasattr(observation, "keys") else observation


def names() -> list[str]:
    """Brax's environments; each takes a backend behind another slash."""
    return sorted(require("brax.envs", "brax")._envs)
