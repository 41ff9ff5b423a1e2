"""Changes of an environment by settings: wrappers, and parameters that are drawn for each episode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from trpo_jax.environments import wrappers
from trpo_jax.environments.base import Array, Environment, PyTree, Step, render_inner
from trpo_jax.fields import NONE
from trpo_jax.sentences import UsageError, shown

_WITH_NUMBER = ("stack_frames", "repeat_actions", "limit_steps")
_ALONE = ("flatten_observations", "append_time", "cache_resets")
_NAMES = (*_WITH_NUMBER, *_ALONE, "hide_entries")


def apply_wrappers(environment: Environment, text: str) -> Environment:
    """Apply the wrappers that a text names to `environment`, innermost first: "hide_entries=1,3 stack_frames=4".

    Raises:
      UsageError: if there is no such wrapper, its value cannot be used, or it does not suit the environment.
    """
    for part in [] if text == NONE else text.split():
        name, equals, value = part.partition("=")
        if name not in _NAMES:
            raise UsageError(f"wrappers cannot be {shown(name)}; choose among {', '.join(_NAMES)}.")
        if bool(equals) != (name not in _ALONE):
            form = name if name in _ALONE else f"{name}={'1,3' if name == 'hide_entries' else 4}"
            raise UsageError(f"wrappers must have the form {form}, got {shown(part)}.")
        arguments = [] if name in _ALONE else [_value(name, value)]
        environment = getattr(wrappers, name)(environment, *arguments)
    return environment


def _value(name: str, text: str) -> Any:
    parts = text.split(",")
    if len(parts) > 1 and name != "hide_entries":
        raise UsageError(f"{name} takes one number, as {name}=4, got {shown(text)}.")
    values = [int(part) if part.isascii() and part.removeprefix("-").isdigit() else part for part in parts]
    return values if name == "hide_entries" else values[0]


def draw_settings(
    base: Environment, make: Callable[[Mapping[str, Any]], Environment], ranges: Mapping[str, tuple[float, float]]
) -> Environment:
    """Draw some settings of `base` uniformly from ranges, at the start of each episode of each instance.

    Args:
      base: the environment with fixed settings.
      make: makes the environment with traced values of those settings.
      ranges: {setting: (low, high)}.
    """

    def reset(key: Array) -> tuple[Array, PyTree]:
        key_draw, key_reset = jax.random.split(key)
        keys = jax.random.split(key_draw, len(ranges))
        values = {
            name: jax.random.uniform(one, (), minval=low, maxval=high)
            for one, (name, (low, high)) in zip(keys, ranges.items(), strict=True)
        }
        observation, state = make(values).reset(key_reset)
        return observation, (state, values)

    def step(key: Array, state: PyTree, action: Array) -> Step:
        inner, values = state
        result = make(values).step(key, inner, action)
        return result._replace(state=(result.state, values))

    if base.restart is not None:
        raise UsageError(
            f"{base.name} resets itself in its own step, so its settings cannot be drawn for each episode."
        )
    return dataclasses.replace(base, reset=reset, step=step, render=render_inner(base.render))
