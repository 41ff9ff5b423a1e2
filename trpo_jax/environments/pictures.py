"""Pictures of gymnax's environments: classic control as in Gymnasium, grids in colours, others as they draw."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from trpo_jax.environments.base import Film, PyTree
from trpo_jax.sentences import UsageError

_CELL = 30  # pixels per side of a grid's cell
_GRID_FRAMES_PER_SECOND = 10.0  # as in gymnax's own animations


def film_of_gymnax(env: Any, params: tuple[Any, ...], states: Sequence[PyTree], name: str) -> Film:
    """Draw the states of an episode.

    Args:
      env: an environment of gymnax, or an object like one; its `render(state, params)`, if any, takes precedence.
      params: (parameters,), or () for an object without any.
      states: states of the environment.
      name: for messages.

    Raises:
      UsageError: if it cannot be drawn.
    """
    from gymnax.environments.environment import Environment as GymnaxEnvironment
    from gymnax.visualize import vis_gym

    if name in vis_gym.SUPPORTED_GYM_ENVS and isinstance(env, GymnaxEnvironment):
        return _classic_control(params[0], states, name)
    if callable(getattr(env, "render", None)):
        return Film([_as_picture(env.render(state, *params), name) for state in states], _GRID_FRAMES_PER_SECOND)
    see = jax.jit(lambda state: env.observe(jax.random.key(0), state, None, *params))
    if not isinstance(env, GymnaxEnvironment) or len(jax.eval_shape(see, states[0]).shape) != 3:
        raise UsageError(
            f"{name} cannot be drawn: it has no method render(state, params), and its observations are not grids."
        )
    return Film([color_grid(np.asarray(see(state))) for state in states], _GRID_FRAMES_PER_SECOND)


def _classic_control(params: Any, states: Sequence[PyTree], name: str) -> Film:
    """Draw the same states in Gymnasium's environment of the same name, with the same parameters."""
    import gymnasium
    from gymnax.visualize import vis_gym

    world = gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True)
    world.reset(seed=0)
    inner: Any = world.unwrapped
    vis_gym.set_gym_params(inner, name, params)
    frames = []
    for state in states:
        inner.state = vis_gym.get_gym_state(state, name)
        if name == "Pendulum-v1":
            inner.last_u = float(np.squeeze(state.last_u))  # the arrow of the torque
        frames.append(np.asarray(world.render()))
    world.close()
    return Film(frames, float(world.metadata.get("render_fps") or 30))


def color_grid(grid: np.ndarray) -> np.ndarray:
    """Draw a grid of channels [height, width, C]: the last channel that is set gives a cell its colour.

    Empty cells are black; the colours of the channels are as far apart in hue as C allows.
    """
    import matplotlib

    channels = grid.shape[-1]
    hues = np.linspace(0, 1, channels, endpoint=False)
    palette = np.concatenate([np.zeros((1, 3)), matplotlib.colormaps["hsv"](hues)[:, :3]])
    last = np.max(np.where(grid != 0, np.arange(1, channels + 1), 0), axis=-1)
    cell = max(1, min(_CELL, math.ceil(300 / max(last.shape))))
    return np.kron(np.round(255 * palette[last]).astype(np.uint8), np.ones((cell, cell, 1), np.uint8))


def _as_picture(drawn: Any, name: str) -> np.ndarray:
    """Convert what a `render` returned, an array or a figure of Matplotlib (and its axes), to a picture."""
    figure = drawn[0] if isinstance(drawn, tuple) else drawn
    if hasattr(figure, "savefig"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        importlib.import_module("matplotlib.pyplot").close(figure)
        return np.array(canvas.buffer_rgba())[..., :3]
    picture = np.asarray(drawn)
    if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8:
        raise UsageError(
            f"{name} cannot be drawn: its render must return a figure of Matplotlib or an array uint8 "
            f"[height, width, 3], but returns {picture.dtype} {list(picture.shape)}."
        )
    return picture
