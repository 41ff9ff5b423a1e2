"""Gymnasium environments, including MuJoCo, which run in Python on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trpo_jax.environments.base import Box, Environment, Space, sizes_of
from trpo_jax.environments.checks import one_sentence
from trpo_jax.environments.entries import MASK, WHOLE, check_mask, size_of
from trpo_jax.environments.host import Host, pure_functions
from trpo_jax.environments.spaces import action_space, picture_scale
from trpo_jax.environments.suites import quiet_mujoco, require
from trpo_jax.sentences import UsageError, first_line, nearest


def make(name: str, options: dict[str, Any], max_steps: int | None) -> Environment:
    """Build `gymnasium/{name}`; `options` are keyword arguments of `gymnasium.make`."""
    gymnasium = require("gymnasium", "gymnasium")
    full_name = f"gymnasium/{name}"
    options = dict(options)
    own_limit = options.pop("max_episode_steps", None)
    if options.get("render_mode") == "human":
        raise UsageError(
            f"{full_name} cannot draw on a screen while it trains; `trpo-jax play --render` makes a video."
        )

    def instance(**limit: int) -> Any:
        try:
            with quiet_mujoco():
                return gymnasium.make(name, disable_env_checker=True, **limit, **options)
        except gymnasium.error.DependencyNotInstalled as error:
            # Gymnasium's own sentence names the package and the command that installs it.
            raise UsageError(f"{full_name} needs a package that is not installed: {first_line(error)}") from error
        except gymnasium.error.UnregisteredEnv as error:
            raise UsageError(
                f"there is no environment {full_name}{nearest(name, names())} `trpo-jax envs` lists them."
            ) from error

    first = instance()
    limits = [limit for limit in (own_limit or first.spec.max_episode_steps, max_steps) if limit is not None]
    if not limits:
        raise UsageError(f"{full_name} has no time limit; set one, such as max_steps=1000 (--max-steps 1000).")
    limit = min(limits)
    space, act = host_action_space(first.action_space, full_name)
    with one_sentence(f"reset of {full_name}"):
        _, info = first.reset(seed=0)
    entries, shape, observe = host_observations(first.observation_space, info, space, full_name)
    first.close()
    host = Host(full_name, lambda: instance(max_episode_steps=limit), observe, act, shape)
    return Environment(full_name, shape, space, limit, *pure_functions(host, space, limit), entries=entries)


def host_action_space(space: Any, name: str) -> tuple[Space, Callable[[Any], Any]]:
    """Our space, and the function from its actions to those of Gymnasium, in their own dtype."""
    ours, arrange = action_space(space, name)

    def act(action: Any) -> Any:
        action = np.asarray(action)
        if isinstance(ours, Box):  # within bounds in its own dtype: float32 rounds 0.1 up
            action = np.clip(action.astype(np.float64).reshape(space.shape), space.low, space.high)
        action = arrange(action)
        return action if isinstance(action, tuple) else action.astype(space.dtype)

    return ours, act


def host_observations(
    space: Any, info: Any, actions: Space, name: str
) -> tuple[dict[str, tuple[int, ...]] | None, tuple[int, ...], Callable[[Any, Any], np.ndarray]]:
    """Entries and shape of an observation, and the function that converts Gymnasium's observation and info to float32.

    Args:
      space: Gymnasium's observation space; each entry of a Dict becomes an entry.
      info: info of a reset. A mask "action_mask" in it becomes an entry, too; where it is missing later, as after the
        last action of an episode, all actions are legal.
      actions: the action space, which must be discrete if there is a mask.
      name: for messages.
    """
    spaces = require("gymnasium", "gymnasium").spaces
    shape, observe = observation_space(space, name)
    entries = None
    if isinstance(space, spaces.Dict):
        entries = {
            str(key): tuple(part.shape) if isinstance(part, spaces.Box) else (int(spaces.flatdim(part)),)
            for key, part in space.spaces.items()
        }
    sizes = sizes_of(actions)
    if not sizes or MASK not in info or MASK in (entries or {}):
        check_mask(entries, sizes, name)
        return entries, shape, lambda observation, info: observe(observation)
    entries = {**(entries or {WHOLE: shape}), MASK: _flat_mask(info[MASK]).shape}
    check_mask(entries, sizes, name)

    def with_mask(observation: Any, info: Any) -> np.ndarray:
        mask = _flat_mask(info[MASK]) if MASK in info else np.ones(sum(sizes), np.float32)
        return np.concatenate([np.ravel(observe(observation)), mask])

    return entries, (size_of(entries),), with_mask


def _flat_mask(mask: Any) -> np.ndarray:
    """Concatenate a mask, or one per choice, to one vector."""
    parts = mask if isinstance(mask, (tuple, list)) else (mask,)
    return np.concatenate([np.ravel(np.asarray(part, np.float32)) for part in parts])


def observation_space(space: Any, name: str) -> tuple[tuple[int, ...], Callable[[Any], np.ndarray]]:
    """Shape of an observation, and its conversion to float32; any space but a Box becomes one flat vector."""
    spaces = require("gymnasium", "gymnasium").spaces
    if isinstance(space, spaces.Box):
        scale = np.float32(picture_scale(space.dtype, space.shape, space.low, space.high))
        return tuple(space.shape), lambda observation: np.asarray(observation, np.float32) / scale
    if not space.is_np_flattenable:
        raise UsageError(f"observations of {name} lie in {space}, which has no fixed size.")
    scales = np.concatenate([*_scales(space)]).astype(np.float32)
    shape = (int(spaces.flatdim(space)),)
    return shape, lambda observation: np.asarray(spaces.flatten(space, observation), np.float32) / scales


def _scales(space: Any) -> list[np.ndarray]:
    """The divisors for the entries of a flattened observation."""
    spaces = require("gymnasium", "gymnasium").spaces
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
        return [scale for part in parts for scale in _scales(part)]
    is_box = isinstance(space, spaces.Box)
    scale = picture_scale(space.dtype, space.shape, space.low, space.high) if is_box else 1.0
    return [np.full(spaces.flatdim(space), scale)]


def names() -> list[str]:
    """Names of Gymnasium's own environments, newest versions only."""
    registry = require("gymnasium", "gymnasium").registry
    newest: dict[str, Any] = {}
    for spec in registry.values():
        if spec.namespace is None and spec.version is not None and "gymnasium.envs" in str(spec.entry_point):
            newest[spec.name] = max(spec, newest.get(spec.name, spec), key=lambda s: s.version)
    return sorted(spec.id for spec in newest.values() if spec.max_episode_steps)
