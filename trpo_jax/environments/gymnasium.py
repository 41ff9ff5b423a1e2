"""Gymnasium environments, MuJoCo among them: they run in Python on the host and are called from compiled code.

An episode follows from its seed and its actions, so these are the state: the host's instances are but a cache of it.
A step names what happened so far by a token, a hash of seed, actions and outcomes; the host steps the instance in which
just that happened. Where there is none (after a resume in another process, or where an old state is stepped once more)
one is rebuilt: reset with the seed, and the actions replayed. `step` is thus a pure function, like that of any other
environment: it can be repeated, mapped over agents, saved and resumed with equal bits.
"""

from __future__ import annotations

import collections
import hashlib
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config import UsageError, nearest
from trpo_jax.environments import base
from trpo_jax.environments.base import Array, Discrete, Environment, MultiDiscrete, Space, Step
from trpo_jax.environments.suites import call_constructor, first_line, quiet_mujoco, require

# Instances that are kept alive (about 1 MB each with MuJoCo), or four times the largest batch. With more environments
# than that at work, the oldest go, and are rebuilt when their turn comes.
MOST_INSTANCES = 1024
_NOTHING, _RESET, _STEP, _MUST_STEP = range(4)


class HostState(NamedTuple):
    """An episode so far.

    Attributes:
      token: names all that happened, uint32 [2].
      seed: of its reset, int32 [].
      time: steps since, int32 [].
      actions: what was done, [limit, ...]; beyond `time`, anything.
    """

    token: Array
    seed: Array
    time: Array
    actions: Array


class _Outcome(NamedTuple):
    """What the host answers; `found` is false where it has no instance with such a history."""

    found: Any
    token: Any
    observation: Any
    reward: Any
    terminated: Any
    truncated: Any
    next_observation: Any


class Host:
    """The live instances of one environment, found by what happened in them. NumPy in and out, no JAX."""

    def __init__(self, make: Any, observe: Any, act: Any, observation_shape: tuple[int, ...]):
        self.make, self.observe, self.act = make, observe, act
        self.observation_shape = observation_shape
        self.live: collections.OrderedDict[bytes, list[Any]] = collections.OrderedDict()  # oldest first
        self.count, self.most = 0, MOST_INSTANCES
        self.lock = threading.Lock()  # several devices may call at once

    def __call__(self, command: Any, token: Any, seed: Any, action: Any) -> _Outcome:
        """Carry out a command for each of a batch of any shape.

        Args:
          command: nothing; reset with `seed`; step if there is an instance, or be sure that there is.
          token: names the instance to step, uint32 [..., 2].
          seed: of the reset now, or of the one after the end of an episode, int32 [...].
          action: what to do, [..., *action.shape].
        """
        command, token, seed, action = (np.asarray(x) for x in (command, token, seed, action))
        batch = command.shape
        out = _Outcome(
            np.zeros(command.size, bool),
            np.zeros((command.size, 2), np.uint32),
            np.zeros((command.size, *self.observation_shape), np.float32),
            np.zeros(command.size, np.float32),
            np.zeros(command.size, bool),
            np.zeros(command.size, bool),
            np.zeros((command.size, *self.observation_shape), np.float32),
        )
        commands, seeds = command.reshape(-1).tolist(), seed.reshape(-1).tolist()
        tokens = np.ascontiguousarray(token).reshape(-1, 2)
        actions = action.reshape(command.size, *action.shape[len(batch) :])
        with self.lock:
            self.most = max(self.most, 4 * command.size)
            for i, what in enumerate(commands):
                if what == _RESET:
                    self._reset(out, i, self._fresh(), seeds[i])
                elif what != _NOTHING:
                    self._step(out, i, tokens[i].tobytes(), seeds[i], actions[i], must=what == _MUST_STEP)
        return _Outcome(*(x.reshape((*batch, *x.shape[1:])) for x in out))

    def _step(self, out: _Outcome, i: int, token: bytes, seed: int, action: Any, *, must: bool) -> None:
        instances = self.live.get(token)
        if not instances:
            if must:
                raise RuntimeError("the environment does not repeat itself from equal seeds and actions")
            return
        env = instances.pop()
        if not instances:
            del self.live[token]
        observation, reward, terminated, truncated, _ = env.step(self.act(action))
        observation = self.observe(observation)
        out.next_observation[i], out.reward[i] = observation, reward
        out.terminated[i], out.truncated[i] = terminated, truncated
        if terminated or truncated:
            self._reset(out, i, env, seed)
        else:
            self._keep(out, i, env, observation, token, action.tobytes(), out.reward[i].tobytes())

    def _reset(self, out: _Outcome, i: int, env: Any, seed: int) -> None:
        observation, _ = env.reset(seed=seed)
        self._keep(out, i, env, self.observe(observation), seed.to_bytes(4, "little"))

    def _keep(self, out: _Outcome, i: int, env: Any, observation: Any, *history: bytes) -> None:
        out.found[i], out.observation[i] = True, observation
        token = hashlib.blake2b(b"".join((*history, out.observation[i].tobytes())), digest_size=8).digest()
        out.token[i] = np.frombuffer(token, np.uint32)
        self.live.setdefault(token, []).append(env)

    def _fresh(self) -> Any:
        if self.count < self.most:
            self.count += 1
            return self.make()
        token, instances = next(iter(self.live.items()))
        env = instances.pop()
        if not instances:
            del self.live[token]
        return env


def make(name: str, options: dict[str, Any], max_steps: int | None) -> Environment:
    """Build `gymnasium/{name}`; `options` are keyword arguments of `gymnasium.make`."""
    gymnasium = require("gymnasium", "gymnasium")
    full_name = f"gymnasium/{name}"
    options = dict(options)
    own_limit = options.pop("max_episode_steps", None)

    def instance(**limit: int) -> Any:
        try:
            with quiet_mujoco():
                return gymnasium.make(name, disable_env_checker=True, **limit, **options)
        except gymnasium.error.DependencyNotInstalled as error:
            raise UsageError(
                f"{full_name} needs a package that is not installed ({first_line(error)}); "
                "pip install '.[gymnasium]' has what MuJoCo needs."
            ) from error
        except gymnasium.error.UnregisteredEnv as error:
            raise UsageError(
                f"there is no environment {full_name}{nearest(name, names())} `trpo-jax envs` lists them."
            ) from error

    first = call_constructor(full_name, instance)
    limits = [limit for limit in (own_limit or first.spec.max_episode_steps, max_steps) if limit is not None]
    if not limits:
        raise UsageError(f"{full_name} has no time limit; set one: make_environment({full_name!r}, max_steps=1000).")
    limit = min(limits)
    space, act = _action_space(gymnasium.spaces, first.action_space, full_name)
    shape, observe = _observation_space(gymnasium.spaces, first.observation_space, full_name)
    first.close()
    host = Host(lambda: instance(max_episode_steps=limit), observe, act, shape)
    reset, step = pure_functions(host, space, limit)
    return Environment(full_name, shape, space, limit, reset, step)


def pure_functions(host: Host, space: Space, limit: int) -> tuple[Any, Any]:
    """`reset(key)` and `step(key, state, action)` of what the host does."""
    flag, observation = jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct(host.observation_shape, np.float32)
    number, token = jax.ShapeDtypeStruct((), np.float32), jax.ShapeDtypeStruct((2,), np.uint32)
    answer = _Outcome(flag, token, observation, number, flag, flag, observation)
    blank = jnp.asarray if isinstance(space, base.Box) else (lambda x: jnp.asarray(x, jnp.int32))

    def ask(command: Any, token: Any, seed: Any, action: Any) -> _Outcome:
        return jax.pure_callback(host, answer, jnp.int32(command), token, seed, action, vmap_method="broadcast_all")

    def draw_seed(key: Array) -> Array:
        return (jax.random.bits(key, (), jnp.uint32) >> 1).astype(jnp.int32)

    def reset(key: Array) -> tuple[Array, HostState]:
        seed = draw_seed(key)
        none = blank(base.zero_action(space))
        first = ask(_RESET, jnp.zeros(2, jnp.uint32), seed, none)
        actions = jnp.zeros((limit, *none.shape), none.dtype)
        return first.observation, HostState(first.token, seed, jnp.int32(0), actions)

    def step(key: Array, state: HostState, action: Array) -> Step:
        if isinstance(space, base.Box):
            action = jnp.clip(action, space.low, space.high)
        next_seed = draw_seed(key)
        outcome = ask(_STEP, state.token, next_seed, action)

        def rebuild(carry: tuple[Array, _Outcome]) -> tuple[Array, _Outcome]:
            # Call 0 resets, calls 1 … time replay, the last one does what was to be done. Under `vmap` all lanes come
            # along until the slowest is done; for those that are not `lost` the host then does nothing.
            i, last = carry
            command = jnp.where(i == 0, _RESET, jnp.where(i <= state.time, _STEP, _MUST_STEP))
            command = jnp.where(lost & (i <= state.time + 1), command, _NOTHING)
            old = state.actions[jnp.clip(i - 1, 0, limit - 1)]
            is_last = i > state.time
            result = ask(
                command,
                jnp.where(is_last, state.token, last.token),
                jnp.where(i == 0, state.seed, next_seed),
                jnp.where(is_last, action, old),
            )
            return i + 1, result

        lost = ~outcome.found
        _, outcome = jax.lax.while_loop(
            lambda carry: lost & (carry[0] <= state.time + 1), rebuild, (jnp.int32(0), outcome)
        )
        done = outcome.terminated | outcome.truncated
        after = HostState(
            outcome.token,
            jnp.where(done, next_seed, state.seed),
            jnp.where(done, 0, state.time + 1),
            state.actions.at[state.time].set(action),
        )
        return Step(
            outcome.observation, after, outcome.reward, outcome.terminated, outcome.truncated, outcome.next_observation
        )

    return reset, step


def _action_space(spaces: Any, space: Any, name: str) -> tuple[Space, Any]:
    """Our space, and the function from an action in it to one of theirs."""
    if isinstance(space, spaces.Discrete):
        return Discrete(int(space.n)), lambda action: space.dtype.type(action + space.start)
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        start = getattr(space, "start", 0)
        return MultiDiscrete(tuple(int(n) for n in space.nvec)), lambda action: (action + start).astype(space.dtype)
    if isinstance(space, spaces.MultiBinary) and len(space.shape) == 1:
        return MultiDiscrete((2,) * space.shape[0]), lambda action: action.astype(space.dtype)
    if isinstance(space, spaces.Box):
        box = base.make_box(space.low, space.high, space.shape)
        return box, lambda action: action.reshape(space.shape).astype(space.dtype)
    raise UsageError(f"actions of {name} lie in {space}; Discrete, MultiDiscrete, MultiBinary and Box can be trained.")


def _observation_space(spaces: Any, space: Any, name: str) -> tuple[tuple[int, ...], Any]:
    """Shape of an observation as float32, and the function that makes it one; all but a Box is one flat vector."""
    if isinstance(space, spaces.Box):
        return tuple(space.shape), lambda observation: np.asarray(observation, np.float32)
    if not space.is_np_flattenable:
        raise UsageError(f"observations of {name} lie in {space}, which has no fixed size.")
    shape = (int(spaces.flatdim(space)),)
    return shape, lambda observation: np.asarray(spaces.flatten(space, observation), np.float32)


def names() -> list[str]:
    """Environments that Gymnasium brings along, newest versions only."""
    registry = require("gymnasium", "gymnasium").registry
    newest: dict[str, Any] = {}
    for spec in registry.values():
        if spec.namespace is None and spec.version is not None and "gymnasium.envs" in str(spec.entry_point):
            newest[spec.name] = max(spec, newest.get(spec.name, spec), key=lambda s: s.version)
    return sorted(spec.id for spec in newest.values() if spec.max_episode_steps)
