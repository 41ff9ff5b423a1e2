"""Brax: rigid bodies with actions in [-1, 1], in one of its physics backends."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from trpo_jax.environments import base
from trpo_jax.environments.base import Array, Environment, Film, PyTree
from trpo_jax.environments.checks import one_sentence
from trpo_jax.environments.suites import assemble, check_name, quiet_mujoco, require
from trpo_jax.sentences import UsageError

# Brax has no time limit of its own; its published results are for episodes of this length.
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
    options = dict(options)
    draw = options.pop("randomization_fn", None)
    with quiet_mujoco():
        env = require("brax.envs", "brax").get_environment(own_name, **options)
    return from_brax(env, f"brax/{name}", MAX_STEPS if max_steps is None else max_steps, randomization_fn=draw)


def from_brax(
    env: Any, name: str, max_steps: int | None = None, randomization_fn: Callable[..., Any] | None = None
) -> Environment:
    """Adapt an environment with Brax's interface: `reset(rng) -> State` and `step(State, action) -> State`.

    Args:
      env: the environment, with actions in [-1, 1].
      name: its name, with the suite's prefix.
      max_steps: the time limit.
      randomization_fn: draws the model of each episode, see `_Randomized`; None: the model is fixed.
    """
    drawn_by = getattr(env, "unwrapped", env)
    if randomization_fn is not None:
        env = _Randomized(env, name, randomization_fn)

    def reset(key: Array) -> tuple[Array, PyTree]:
        state = env.reset(jax.random.key_data(key))  # Brax takes no typed keys
        return _observation(state.obs), state

    def step(key: Array, state: PyTree, action: Array) -> tuple[Array, PyTree, Array, Array, Any]:
        state = env.step(state, action)
        return _observation(state.obs), state, state.reward, state.done > 0, False

    def render(states: Sequence[PyTree]) -> Film:
        own = [state.state if isinstance(state, DrawnState) else state for state in states]
        own = [getattr(state, "pipeline_state", state) for state in own]  # Playground's states have none
        with contextlib.redirect_stderr(io.StringIO()):  # Playground shows a progress bar
            return Film(drawn_by.render(own, height=240, width=320), 1 / float(drawn_by.dt))

    box = base.make_box(-1.0, 1.0, (env.action_size,))
    return assemble(name, box, reset, step, max_steps=max_steps, render=render)


class _Randomized:
    """An environment whose model is drawn at each reset; its state carries (state, drawn leaves of the model).

    `randomization_fn(model, keys [N])` -> (models, axes) is as in `brax.training` and Playground: the leaves of the
    model with axis 0 are drawn.
    """

    def __init__(self, env: Any, name: str, randomization_fn: Callable[..., Any]):
        self._env, self._inner, self.action_size, self._draw = env, env.unwrapped, env.action_size, randomization_fn
        self._attribute = next((one for one in ("sys", "_mjx_model") if hasattr(self._inner, one)), "")
        if not self._attribute:
            raise UsageError(f"{name} has no model that a randomization_fn could draw; leave randomize out.")
        self._model = getattr(self._inner, self._attribute)
        axes: list[Any] = []
        with one_sentence(f"randomize of {name}"):
            jax.eval_shape(
                lambda keys: axes.extend(randomization_fn(self._model, keys)[1:]), np.zeros((1, 2), np.uint32)
            )
            self._is_drawn = jax.tree.leaves(jax.tree.map(lambda _, axis: axis is not None, self._model, axes[0]))

    def _with(self, drawn: list[Array], call: Callable[..., Any], *arguments: Any) -> Any:
        values = iter(drawn)
        leaves, structure = jax.tree.flatten(self._model)
        leaves = [next(values) if own else leaf for leaf, own in zip(leaves, self._is_drawn, strict=True)]
        setattr(self._inner, self._attribute, jax.tree.unflatten(structure, leaves))
        try:
            return call(*arguments)
        finally:
            setattr(self._inner, self._attribute, self._model)

    def reset(self, key: Array) -> DrawnState:
        """Start an episode in a newly drawn model."""
        key_draw, key_reset = jax.random.split(key)
        models, _ = self._draw(self._model, key_draw[None])
        drawn = [leaf[0] for leaf, own in zip(jax.tree.leaves(models), self._is_drawn, strict=True) if own]
        return DrawnState(self._with(drawn, self._env.reset, key_reset), drawn)

    def step(self, state: DrawnState, action: Array) -> DrawnState:
        """Take Brax's step in the model of the episode."""
        return DrawnState(self._with(state.drawn, self._env.step, state.state, action), state.drawn)


class DrawnState(NamedTuple):
    """A state of Brax, and the leaves of the model drawn for its episode."""

    state: Any
    drawn: list[Array]

    @property
    def obs(self) -> Any:
        """Its observation."""
        return self.state.obs

    @property
    def reward(self) -> Array:
        """Its reward."""
        return self.state.reward

    @property
    def done(self) -> Array:
        """Whether the episode ended."""
        return self.state.done


def _observation(observation: Any) -> Any:
    """Return an array as it is, and any mapping, such as Playground's of "state" and "privileged_state", as a dict."""
    return dict(observation) if hasattr(observation, "keys") else observation


def names() -> list[str]:
    """Names of Brax's environments; each takes a backend after another slash."""
    return sorted(require("brax.envs", "brax")._envs)
