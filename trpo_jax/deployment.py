"""Taking a trained policy away: playing it in Gymnasium's own environments, and exporting it as StableHLO."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config import UsageError
from trpo_jax.environments.base import Box, Environment
from trpo_jax.files import write_atomically
from trpo_jax.steps.types import Array, PyTree
from trpo_jax.training.agents import make_agent, on_normalized
from trpo_jax.training.recurrence import advance, initial_carries
from trpo_jax.types import Config, TrainState

_PLATFORMS = "cpu", "cuda", "tpu"
_GIF_WIDTH = 300  # pixels
_GIF_FRAMES = 500
_LOAD = '''"""Acts with the exported policy. Needs jax and numpy, not trpo_jax."""

from pathlib import Path

import numpy as np
from jax import export

policy = export.deserialize(bytearray((Path(__file__).parent / "policy.stablehlo").read_bytes()))
observation = np.zeros({shape}, np.float32)  # a batch of 3; any number will do
{body}
'''


def acting_policy(config: Config, state: TrainState) -> tuple[Callable[[PyTree, Array], tuple[PyTree, Array]], PyTree]:
    """A trained policy as a function of a batch of observations, [B, ...].

    Args:
      config: the settings the state was trained with.
      state: one agent.

    Returns:
      `act(carry, observation)` -> (carry, action), the mode of the distribution with Box actions clipped to their
      bounds, and the carry of one episode's start, [1, ...]; () for a policy without a memory.
    """
    agent = make_agent(config)
    policy = on_normalized(config, state.statistics, agent.policy)
    space = agent.environment.action_space

    def act(carry: PyTree, observation: Array) -> tuple[PyTree, Array]:
        carry, distribution = advance(policy, state.policy_params, carry, observation)
        action = distribution.mode()
        return carry, jnp.clip(action, space.low, space.high) if isinstance(space, Box) else action

    return act, initial_carries(policy, 1)


def play(
    config: Config,
    state: TrainState,
    env: str,
    *,
    num_episodes: int = 10,
    seed: int = 0,
    gif: Path | None = None,
) -> np.ndarray:
    """Play whole episodes in an environment of Gymnasium: the same policy, another implementation of the world.

    Args:
      config: the settings the state was trained with.
      state: one agent.
      env: Gymnasium's id of the environment, such as "CartPole-v1".
      num_episodes: episodes, one after the other.
      seed: of the first reset.
      gif: file for a moving picture of the first episode (at most 500 frames).

    Returns:
      Undiscounted returns, [num_episodes].

    Raises:
      UsageError: if Gymnasium lacks the environment or what it needs, or its spaces are not those of training.
    """
    import gymnasium

    if gif:  # drawing to memory needs neither a screen nor a sound card
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
        if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
            os.environ.setdefault("MUJOCO_GL", "egl")  # Gymnasium would take GLFW, which opens windows only
    try:
        world = gymnasium.make(env, render_mode="rgb_array" if gif else None)
    except (gymnasium.error.Error, ImportError) as error:
        raise UsageError(
            f"Gymnasium cannot make {env} ({str(error).splitlines()[0].rstrip('.')}); name one of its environments by "
            "--env, or install what it needs: pip install '.[play]'."
        ) from error
    environment = make_agent(config).environment
    _check_spaces(environment, world, env)
    act, carry_at_start = acting_policy(config, state)
    act = jax.jit(act)
    returns: list[float] = []
    frames: list[np.ndarray] = []
    for episode in range(num_episodes):
        observation, _ = world.reset(seed=seed + episode)
        carry, total, ended = carry_at_start, 0.0, False
        while not ended:
            if gif and episode == 0 and len(frames) < _GIF_FRAMES:
                frames.append(_render(world, env))
            carry, action = act(carry, np.asarray(observation, np.float32).reshape(1, *environment.observation_shape))
            observation, reward, terminated, truncated, _ = world.step(_to_world(np.asarray(action)[0], world))
            total, ended = total + float(reward), terminated or truncated
        returns.append(total)
    if gif:
        _write_gif(gif, frames, world.metadata.get("render_fps") or 30)
    world.close()
    return np.array(returns)


def export_policy(config: Config, state: TrainState, folder: Path) -> Path:
    """Write a policy as portable StableHLO for CPU, CUDA and TPU, with a script that loads it.

    The exported function is that of `acting_policy` for any batch size, its parameters inside: `observation -> action`,
    or `(carry, observation) -> (carry, action)` with a memory.

    Args:
      config: the settings the state was trained with.
      state: one agent.
      folder: gets policy.stablehlo and load_policy.py.

    Returns:
      The file.
    """
    act, carry = acting_policy(config, state)
    shape = make_agent(config).environment.observation_shape
    (batch,) = jax.export.symbolic_shape("batch")
    observation = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    if jax.tree.leaves(carry):
        carries = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype), carry)
        exported = jax.export.export(jax.jit(act), platforms=_PLATFORMS)(carries, observation)
        shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(carry)]
        body = f"carry = np.zeros({(3, *shapes[0])}, np.float32)  # at the start of an episode\n"
        body += "carry, action = policy.call(carry, observation)\nprint(action)"
    else:
        without_memory = jax.jit(lambda observation: act((), observation)[1])
        exported = jax.export.export(without_memory, platforms=_PLATFORMS)(observation)
        body = "print(policy.call(observation))"
    file = folder / "policy.stablehlo"
    write_atomically(file, bytes(exported.serialize()))
    write_atomically(folder / "load_policy.py", _LOAD.format(shape=(3, *shape), body=body))
    return file


def _check_spaces(environment: Environment, world: Any, env: str) -> None:
    shape = world.observation_space.shape
    if shape is None or int(np.prod(shape)) != int(np.prod(environment.observation_shape)):
        raise UsageError(
            f"{env} observes {world.observation_space}, but the policy was trained on observations of shape "
            f"{environment.observation_shape}; choose another --env."
        )
    ours, theirs = environment.action_space, world.action_space
    same = (
        int(np.prod(theirs.shape)) == ours.low.size
        if isinstance(ours, Box)
        else str(getattr(theirs, "n", getattr(theirs, "nvec", None))).strip("[]").split()
        == str(np.atleast_1d(ours.n)).strip("[]").split()
    )
    if not same:
        raise UsageError(f"{env} takes actions of {theirs}, but the policy was trained to give {ours}.")


def _to_world(action: np.ndarray, world: Any) -> Any:
    """An action in the shape and type that Gymnasium wants."""
    return int(action) if action.ndim == 0 else action.reshape(world.action_space.shape)


def _render(world: Any, env: str) -> np.ndarray:
    try:
        return world.render()
    except Exception as error:  # each renderer fails in its own way
        raise UsageError(
            f"{env} cannot be drawn here ({str(error).splitlines()[0].rstrip('.')}); leave out --gif, or install what "
            "it needs: pip install '.[play]', and for MuJoCo without a screen EGL (the system's libegl1)."
        ) from error


def _write_gif(file: Path, frames: list[np.ndarray], frames_per_second: float) -> None:
    from PIL import Image

    def small(frame: np.ndarray) -> Any:
        picture = Image.fromarray(frame)
        height = round(picture.height * _GIF_WIDTH / picture.width)
        return picture.resize((_GIF_WIDTH, height)).quantize(64)

    first, *rest = map(small, frames)
    options = {"save_all": True, "append_images": rest, "duration": 1000 / frames_per_second, "loop": 0}
    write_atomically(file, lambda sink: first.save(sink, format="GIF", **options))
