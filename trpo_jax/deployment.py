"""Using a trained policy elsewhere: playing it in Gymnasium's own environments, and exporting it as StableHLO."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.environments.base import Box, Environment
from trpo_jax.environments.checks import one_sentence
from trpo_jax.environments.entries import WHOLE, join, split
from trpo_jax.environments.gymnasium import host_action_space, host_observations
from trpo_jax.fields import AUTO
from trpo_jax.files import write_atomically
from trpo_jax.sentences import UsageError, first_line
from trpo_jax.steps.types import Array, PyTree
from trpo_jax.training.agents import make_agent, with_normalization, with_what_is_seen
from trpo_jax.training.recurrence import initial_carries
from trpo_jax.training.state import TrainState

_PLATFORMS = "cpu", "cuda", "tpu"
_MOST_STEPS = 100_000  # of an episode without a time limit
_GIF_WIDTH = 300  # pixels
_GIF_FRAMES = 500
_ELSEWHERE = "choose another --output"
_LOAD = '''"""Acts with the exported policy. Needs jax and numpy, not trpo_jax.

`policy.call` takes observations of {env} as trpo_jax has them, float32 [batch, {dimensions}]{meaning}, and gives the
most likely actions, {actions}.{memory}
"""

from pathlib import Path

import numpy as np
from jax import {imports}

folder = Path(__file__).parent
policy = export.deserialize(bytearray((folder / "policy.stablehlo").read_bytes()))
observation = np.zeros({shape}, np.float32)  # a batch of 3; any number will do
{body}
'''
_MEMORY = """

It has a memory: `policy.call(carry, observation)` gives (carry, action). The arrays of the carry at an episode's
start lie in start.npz, for one environment."""
_START = """with np.load(folder / "start.npz") as start:
    leaves = [np.repeat(start[f"leaf_{i}"], 3, axis=0) for i in range(len(start.files))]
(carry, _), _ = tree.unflatten(policy.in_tree, [*leaves, observation])  # at the start of an episode
carry, action = policy.call(carry, observation)
print(np.asarray(action))"""


def acting_policy(config: Config, state: TrainState) -> tuple[Callable[[PyTree, Array], tuple[PyTree, Array]], PyTree]:
    """A trained policy as a function of a batch of observations, [B, ...], of the entries that it sees.

    Args:
      config: the settings the state was trained with.
      state: one agent.

    Returns:
      `act(carry, observation)` -> (carry, action), the mode of the distribution with Box actions clipped to their
      bounds, and the carry of one episode's start, [1, ...]; () for a policy without a memory.
    """
    agent = make_agent(config)
    policy = with_normalization(config, state.learner.statistics, agent.policy)
    space, everything, seen = agent.environment.action_space, agent.environment.entries, _environment(config).entries

    def act(carry: PyTree, observation: Array) -> tuple[PyTree, Array]:
        if seen != everything and seen is not None and everything is not None:
            # Anything may stand for what the value function alone has seen.
            blank = {name: jnp.zeros((*observation.shape[:-1], *shape)) for name, shape in everything.items()}
            observation = join(blank | split(seen, observation), everything)
        carry, distribution = policy.step(state.learner.policy_params, carry, observation)
        action = distribution.mode()
        return carry, jnp.clip(action, space.low, space.high) if isinstance(space, Box) else action

    return act, initial_carries(policy, 1)


def _environment(config: Config) -> Environment:
    """The environment of training with those entries of its observations alone that the policy sees."""
    environment = make_agent(config).environment
    return environment if config.policy is not None else with_what_is_seen(environment, AUTO)


def play(
    config: Config,
    state: TrainState,
    env: str,
    *,
    num_episodes: int = 10,
    seed: int = 0,
    gif: Path | None = None,
) -> np.ndarray:
    """Play whole episodes in an environment of Gymnasium: the same policy, another implementation.

    Args:
      config: the settings the state was trained with.
      state: one agent.
      env: Gymnasium's id of the environment, such as "CartPole-v1". If it is the one of training, it is made with the
        same `env_args`; another is played as it is.
      num_episodes: episodes, one after the other.
      seed: of the first reset.
      gif: file for an animation of the first episode (at most 500 frames).

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
    args = config.env_args if env == str(config.env).removeprefix("gymnasium/") else {}
    try:
        world = gymnasium.make(env, render_mode="rgb_array" if gif else None, disable_env_checker=True, **args)
    except Exception as error:  # of a name's form, of its module, or of the environment's own code
        if args and isinstance(error, TypeError):
            raise UsageError(
                f"Gymnasium's {env} cannot be made with {', '.join(args)} as in training ({first_line(error)}); "
                f"evaluate the run instead, or name another environment by --env."
            ) from error
        raise UsageError(
            f"Gymnasium cannot make {env} ({first_line(error)}); name one of its environments by "
            "--env, or install what it needs: pip install '.[play]'."
        ) from error
    environment = _environment(config)
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
            if gif and episode == 0 and len(frames) < _GIF_FRAMES:
                frames.append(_render(world, env))
            carry, action = act(carry, observe(observation, info).reshape(1, *environment.observation_shape))
            with one_sentence(f"step of {env}"):
                observation, reward, terminated, truncated, info = world.step(to_world(np.asarray(action)[0]))
            total += np.asarray(reward).item()
            if terminated or truncated:
                break
        returns.append(total)
    world.close()
    if gif:
        _write_gif(gif, frames, world.metadata.get("render_fps") or 30)
    return np.array(returns)


def export_policy(config: Config, state: TrainState, folder: Path) -> Path:
    """Write a policy as portable StableHLO for CPU, CUDA and TPU, with a script that loads it.

    The exported function is that of `acting_policy` for any batch size, its parameters inside: `observation -> action`,
    or `(carry, observation) -> (carry, action)` with a memory (the list of its arrays, where they lie in a class of
    the user's). Observations are as the environment gives them here: float32, indices as unit vectors, and bytes
    divided by 255.

    Args:
      config: the settings the state was trained with.
      state: one agent.
      folder: gets policy.stablehlo, load_policy.py, and with a memory start.npz, that of an episode's start.

    Returns:
      The file.

    Raises:
      UsageError: if a file cannot be written.
    """
    act, carry = acting_policy(config, state)
    environment = _environment(config)
    (batch,) = jax.export.symbolic_shape("batch")
    observation = jax.ShapeDtypeStruct((batch, *environment.observation_shape), jnp.float32)
    if jax.tree.leaves(carry):
        content = _serialize(act, carry, observation)
        start = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(carry))}
        write_atomically(folder / "start.npz", lambda sink: np.savez(sink, **start), _ELSEWHERE)  # type: ignore[arg-type]
    else:
        without_memory = jax.jit(lambda observation: act(carry, observation)[1])
        content = jax.export.export(without_memory, platforms=_PLATFORMS)(observation).serialize()
    file = folder / "policy.stablehlo"
    write_atomically(file, bytes(content), _ELSEWHERE)
    write_atomically(
        folder / "load_policy.py", _script(environment, has_memory=bool(jax.tree.leaves(carry))), _ELSEWHERE
    )
    return file


def _serialize(act: Callable, carry: PyTree, observation: jax.ShapeDtypeStruct) -> bytearray:
    """`act` for any batch, as bytes: on carries as they are, or, of a kind that no file can hold, on their leaves."""
    (batch, *_), (leaves, structure) = observation.shape, jax.tree.flatten(carry)
    leaves = [jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]

    def on_leaves(leaves: list[Array], observation: Array) -> tuple[list[Array], Array]:
        after, action = act(jax.tree.unflatten(structure, leaves), observation)
        return jax.tree.leaves(after), action

    try:
        carries = jax.tree.unflatten(structure, leaves)
        return jax.export.export(jax.jit(act), platforms=_PLATFORMS)(carries, observation).serialize()
    except ValueError:  # a named tuple, or a class of the user's
        return jax.export.export(jax.jit(on_leaves), platforms=_PLATFORMS)(leaves, observation).serialize()


def _script(environment: Environment, *, has_memory: bool) -> str:
    """The program that loads an exported policy and acts once."""
    shape = environment.observation_shape
    return _LOAD.format(
        env=environment.name,
        dimensions=", ".join(map(str, shape)),
        imports="export, tree" if has_memory else "export",
        meaning=_meaning(environment),
        actions=environment.action_space,
        memory=_MEMORY if has_memory else "",
        shape=(3, *shape),
        body=_START if has_memory else "print(np.asarray(policy.call(observation)))",
    )


def _meaning(environment: Environment) -> str:
    """What there is to say of observations beside their shape."""
    if environment.entries is not None:
        layout = ", ".join(f"{name} {list(shape)}" for name, shape in environment.entries.items())
        return f", whose entries are, one after the other,\n{layout}"
    return " (bytes of pictures divided by 255)" if len(environment.observation_shape) == 3 else ""


def _interface(environment: Environment, world: Any, info: Any, env: str) -> tuple[Callable, Callable]:
    """Gymnasium's observations for the policy, and the policy's actions for Gymnasium, as in training there."""
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
        raise UsageError(f"{env} takes actions of {world.action_space}, but the policy was trained to give {ours}.")

    def select(observation: Any, info: Any) -> np.ndarray:
        whole = np.ravel(observe(observation, info))
        ends = np.cumsum([int(np.prod(shape)) for shape in given.values()])
        parts = dict(zip(given, np.split(whole, ends[:-1]), strict=True))
        return np.concatenate([parts[name] for name in wanted])

    return select, to_world


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
    write_atomically(file, lambda sink: first.save(sink, "GIF", **options), "choose another --gif")
