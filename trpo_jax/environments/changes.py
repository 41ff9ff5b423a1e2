"""Changes of an environment by settings: wrappers, and parameters that are drawn for each episode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from trpo_jax.environments.base import Array, Environment, PyTree, Step, render_inner
from trpo_jax.environments.hidden_entries import hide_entries
from trpo_jax.environments.wrappers import (
    append_time,
    cache_resets,
    flatten_observations,
    limit_steps,
    repeat_actions,
    stack_frames,
)
from trpo_jax.fields import NONE
from trpo_jax.sentences import UsageError, shown

# Each wrapper with an example of its value, as it is written; None where it takes none.
_WRAPPERS: dict[str, tuple[Callable[..., Environment], str | None]] = {
    "stack_frames": (stack_frames, "4"),
    "repeat_actions": (repeat_actions, "4"),
    "limit_steps": (limit_steps, "4"),
    "flatten_observations": (flatten_observations, None),
    "append_time": (append_time, None),
    "cache_resets": (cache_resets, None),
    "hide_entries": (hide_entries, "1,3"),
}


# Those after which the entries of an observation mean something else.
OF_OBSERVATIONS = ("stack_frames", "flatten_observations", "append_time", "hide_entries")


def named_in(text: str, names: Sequence[str]) -> str:
    """Select the wrappers with these names from a text, in its order."""
    return " ".join(part for part in text.split() if part.partition("=")[0] in names)


def apply_wrappers(environment: Environment, text: str) -> Environment:
    """Apply the wrappers that a text names to `environment`, innermost first: "hide_entries=1,3 stack_frames=4".

    Raises:
      UsageError: if there is no such wrapper, its value cannot be used, or it does not suit the environment.
    """
    for part in [] if text == NONE else text.split():
        name, equals, value = part.partition("=")
        if name not in _WRAPPERS:
            raise UsageError(f"wrappers cannot be {shown(name)}; choose among {', '.join(_WRAPPERS)}.")
        wrap, example = _WRAPPERS[name]
        if bool(equals) != (example is not None):
            form = f"{name}={example}" if example else name
            raise UsageError(f"wrappers must have the form {form}, got {shown(part)}.")
        environment = wrap(environment, _value(name, value)) if equals else wrap(environment)
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
