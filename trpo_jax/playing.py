"""Episodes of a trained policy, in Gymnasium's own environments or in that of training, and pictures of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.deployment import acting_policy, seen_environment
from trpo_jax.environments.base import Box, Environment, Film
from trpo_jax.environments.changes import OF_OBSERVATIONS, named_in
from trpo_jax.environments.checks import one_sentence
from trpo_jax.environments.entries import WHOLE
from trpo_jax.environments.gymnasium import host_action_space, host_observations
from trpo_jax.fields import NONE
from trpo_jax.sentences import UsageError, first_line
from trpo_jax.steps.types import Array, PyTree
from trpo_jax.training.state import TrainState
from trpo_jax.videos import check_video, most_frames, write_video

_MOST_STEPS = 100_000  # of an episode without a time limit


def draw_without_a_screen() -> None:
    """Let pictures be drawn to memory, which needs neither screen nor sound card. Call it before MuJoCo loads."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        os.environ.setdefault("MUJOCO_GL", "egl")  # the default, GLFW, only opens windows


def play_here(
    config: Config, state: TrainState, *, num_episodes: int = 10, seed: int = 0, video: Path | None = None
) -> np.ndarray:
    """Play whole episodes in the environment of training, without `randomize`.

    Args:
      config: the settings the state was trained with.
      state: one agent.
      num_episodes: episodes, one after the other.
      seed: seed of all of them.
      video: file for a video of the first episode: .gif (at most 500 frames) or .mp4 (1000).

    Returns:
      Undiscounted returns, [num_episodes].

    Raises:
      UsageError: if the environment cannot be drawn.
    """
    config = config.replace(randomize=NONE)
    environment = seen_environment(config)
    if video:
        check_video(video)
        draw_without_a_screen()
        if environment.render is None:
            raise UsageError(
                f"{environment.name} cannot be drawn: its suite has no pictures here; play without --render."
            )
    act, carry_at_start = acting_policy(config, state)
    reset = jax.jit(environment.reset)

    @jax.jit
    def step(key: Array, state: PyTree, carry: PyTree, observation: Array) -> Any:
        carry, action = act(carry, observation[None])
        return carry, environment.step(key, state, action[0])

    returns: list[float] = []
    states: list[PyTree] = []
    for episode in range(num_episodes):
        key = jax.random.fold_in(jax.random.key(seed), episode)
        observation, env_state = reset(key)
        carry, total = carry_at_start, 0.0
        for i in range(environment.max_steps or _MOST_STEPS):
            if video and episode == 0 and len(states) < most_frames(video):
                states.append(env_state)
            carry, result = step(jax.random.fold_in(key, i), env_state, carry, observation)
            observation, env_state = result.observation, result.state
            total += float(result.reward)
            if result.done:
                break
        returns.append(total)
    if video:
        assert environment.render is not None
        draw = environment.render
        write_video(video, _drawn(lambda: draw(states), environment.name))
    return np.array(returns)


def play(
    config: Config,
    state: TrainState,
    env: str,
    *,
    num_episodes: int = 10,
    seed: int = 0,
    video: Path | None = None,
) -> np.ndarray:
    """Play whole episodes in an environment of Gymnasium: the same policy, another implementation.

    Args:
      config: the settings the state was trained with.
      state: one agent.
      env: Gymnasium's id of the environment, such as "CartPole-v1". If it is the one of training, it is made with the
        same `env_args`; another one is used as it is.
      num_episodes: episodes, one after the other.
      seed: seed of the first reset.
      video: file for a video of the first episode: .gif (at most 500 frames) or .mp4 (1000).

    Returns:
      Undiscounted returns, [num_episodes].

    Raises:
      UsageError: if Gymnasium lacks the environment or its dependencies, its spaces are not those of training, or
        wrappers changed what the policy observed or did.
    """
    import gymnasium

    if video:
        check_video(video)
        draw_without_a_screen()
    if wrappers := named_in(config.wrappers, (*OF_OBSERVATIONS, "repeat_actions")):
        raise UsageError(
            f"the policy was trained with the wrappers {wrappers}, which Gymnasium's {env} does not have; "
            "play in the environment of training, with --render."
        )
    args = config.env_args if env == str(config.env).removeprefix("gymnasium/") else {}
    try:
        world = gymnasium.make(env, render_mode="rgb_array" if video else None, disable_env_checker=True, **args)
    except Exception as error:  # about a name's form, about its module, or from the environment's own code
        if args and isinstance(error, TypeError):
            raise UsageError(
                f"Gymnasium's {env} cannot be made with {', '.join(args)} as in training ({first_line(error)}); "
                f"evaluate the run instead, or name another environment with --env."
            ) from error
        raise UsageError(
            f"Gymnasium cannot make {env} ({first_line(error)}); name one of its environments with "
            "--env, or play in that of training with --render, or install what it needs: pip install '.[play]'."
        ) from error
    environment = seen_environment(config)
    with one_sentence(f"reset of {env}"):
        _, info = world.reset(seed=seed)
    observe, to_world = _interface(environment, world, info, env)
    act, carry_at_start = acting_policy(config, state)
    act = jax.jit(act)
    limit = environment.max_steps or _MOST_STEPS
    returns: list[float] = []
    frames: list[np.ndarray] = []
    for episode in range(num_episodes):
        with one_sentence(f"reset of {env}"):
            observation, info = world.reset(seed=seed + episode)
        carry, total = carry_at_start, 0.0
        for _ in range(limit):
            if video and episode == 0 and len(frames) < most_frames(video):
                frames.append(_drawn(world.render, env))
            carry, action = act(carry, observe(observation, info).reshape(1, *environment.observation_shape))
            with one_sentence(f"step of {env}"):
                observation, reward, terminated, truncated, info = world.step(to_world(np.asarray(action)[0]))
            total += np.asarray(reward).item()
            if terminated or truncated:
                break
        returns.append(total)
    world.close()
    if video:
        write_video(video, Film(frames, world.metadata.get("render_fps") or 30))
    return np.array(returns)


def _interface(
    environment: Environment, world: Any, info: Any, env: str
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The functions that convert Gymnasium's observations for the policy, and the policy's actions for Gymnasium."""
    wanted = environment.entries or {WHOLE: environment.observation_shape}
    entries, shape, observe = host_observations(world.observation_space, info, environment.action_space, env)
    given = {WHOLE: shape} if entries is None or (environment.entries is None and WHOLE not in entries) else entries
    if any(np.prod(given.get(name, 0)) != np.prod(shape) for name, shape in wanted.items()):
        trained = environment.entries or f"shape {environment.observation_shape}"
        raise UsageError(
            f"{env} observes {world.observation_space}, but the policy was trained on observations of {trained}; "
            "choose another --env."
        )
    ours, (theirs, to_world) = environment.action_space, host_action_space(world.action_space, env)
    same = theirs.shape == ours.shape if isinstance(ours, Box) and isinstance(theirs, Box) else theirs == ours
    if not same:
        raise UsageError(f"{env} takes actions of {world.action_space}, but the policy was trained on {ours}.")

    def select(observation: Any, info: Any) -> np.ndarray:
        whole = np.ravel(observe(observation, info))
        ends = np.cumsum([int(np.prod(shape)) for shape in given.values()])
        parts = dict(zip(given, np.split(whole, ends[:-1]), strict=True))
        return np.concatenate([parts[name] for name in wanted])

    return select, to_world


def _drawn(draw: Callable[[], Any], env: str) -> Any:
    """Call `draw`; a failure becomes one sentence."""
    try:
        return draw()
    except UsageError:
        raise
    except Exception as error:  # each renderer fails in its own way
        raise UsageError(
            f"{env} cannot be drawn here ({first_line(error)}); play without pictures, or install what they need: pip "
            "install '.[play]', and for MuJoCo without a screen EGL (the system's libegl1; MUJOCO_GL=egl selects it)."
        ) from error
