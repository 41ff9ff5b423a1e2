"""Environments that run in Python on the host, and are called from compiled code as pure functions.

An episode follows from its seed and its actions, so these are the state; the host's instances are only a cache. A
step identifies the history of its episode by a token, a hash of seed, actions and outcomes, and the host steps the
instance with this history. If there is none (after a resume in another process, or when an old state is stepped
again), one is rebuilt: reset with the seed, and the actions replayed. `step` is thus a pure function, like that of any
other environment: it can be repeated, mapped over agents, saved and resumed with equal bits.

An environment whose episodes do not repeat from their seeds cannot be rebuilt. The step that would need it is then cut
off like at a time limit, without a reward. The value function is evaluated on the last observation that the agent saw,
since no later one is known. Then a new episode begins.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import inspect
import logging
import threading
import warnings
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.environments.base import Array, Box, Environment, Space, Step, key_shape, zero_action
from trpo_jax.environments.checks import describe_error
from trpo_jax.sentences import UsageError

# Most instances that one environment keeps alive (about 1 MB each with MuJoCo), or four times its largest batch; and
# most that all others together keep while it is in use.
MOST_INSTANCES = 1024
MOST_IDLE = 64
NOTHING, RESET, STEP, MUST_STEP = range(4)


class HostState(NamedTuple):
    """An episode so far; at its end, the start of the next one.

    Attributes:
      token: identifies the history, uint32 [2].
      seed: seed of its reset, int32 [].
      time: steps since the reset, int32 [].
      actions: actions taken, [limit, ...]; arbitrary beyond `time`.
      observation: the observation to act on next, float32.
    """

    token: Array
    seed: Array
    time: Array
    actions: Array
    observation: Array


class _Outcome(NamedTuple):
    """The host's answer; `found` is false if it has no instance with this history and cannot make one."""

    found: Any
    token: Any
    observation: Any
    reward: Any
    terminated: Any
    truncated: Any
    next_observation: Any


# JAX logs a callback's failure with its traceback; the error that follows ends with one sentence about it.
logging.getLogger("jax._src.callback").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], UsageError))
)
_hosts: weakref.WeakKeyDictionary[Host, None] = weakref.WeakKeyDictionary()  # the last one was used last


class Host:
    """The live instances of one environment, found by their histories. NumPy in and out, no JAX.

    It keeps four times as many as its largest batch has, and closes all others. If it then has to rebuild some of
    these, as with many agents that take turns, it keeps twice as many from then on.
    """

    def __init__(self, name: str, make: Any, observe: Any, act: Any, observation_shape: tuple[int, ...]):
        self.name, self.make, self.observe, self.act = name, make, observe, act
        flag, observation = jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct(observation_shape, np.float32)
        number, token = jax.ShapeDtypeStruct((), np.float32), jax.ShapeDtypeStruct((2,), np.uint32)
        self.answer = _Outcome(flag, token, observation, number, flag, flag, observation)  # of one environment
        self.live: collections.OrderedDict[bytes, list[Any]] = collections.OrderedDict()  # oldest first
        self.dropped: set[bytes] = set()  # histories of instances that were closed
        self.count, self.most, self.warned = 0, 0, False
        self.lock = threading.RLock()  # several devices may call at once
        weakref.finalize(self, _close_all, self.live)

    def __call__(self, command: Any, token: Any, seed: Any, action: Any) -> _Outcome:
        """Carry out one command per environment, in a batch of any shape.

        Args:
          command: nothing; reset with `seed`; step if there is an instance; or step, and give up the episode if there
            is none.
          token: identifies the instance to step, uint32 [..., 2].
          seed: of this reset, or of the one after the end of an episode, int32 [...].
          action: the actions, [..., *action.shape].
        """
        command, token, seed, action = (np.asarray(x) for x in (command, token, seed, action))
        batch, size = command.shape, command.size
        out = _Outcome(*(np.zeros((size, *leaf.shape), leaf.dtype) for leaf in self.answer))
        commands, seeds = command.reshape(-1).tolist(), seed.reshape(-1).tolist()
        tokens = np.ascontiguousarray(token).reshape(-1, 2)
        actions = action.reshape(size, *action.shape[len(batch) :])
        with self.lock:
            self.most = max(self.most, 4 * size)
            _hosts.pop(self, None)
            _hosts[self] = None
            for i, what in enumerate(commands):
                if what == RESET:
                    self._reset(out, i, self._fresh(), seeds[i])
                elif what != NOTHING:
                    self._step(out, i, tokens[i].tobytes(), seeds[i], actions[i], must=what == MUST_STEP)
        return _Outcome(*(x.reshape((*batch, *x.shape[1:])) for x in out))

    def _step(self, out: _Outcome, i: int, token: bytes, seed: int, action: Any, *, must: bool) -> None:
        env = self._take(token)
        if env is None:
            if token in self.dropped:
                self.dropped.discard(token)
                self.most = max(self.most, min(2 * self.most, MOST_INSTANCES))
            if must:
                self._give_up(out, i, seed)
            return
        observation, reward, terminated, truncated = self._run(env, "step", self.act(action))
        out.next_observation[i], out.reward[i] = observation, reward
        out.terminated[i], out.truncated[i] = terminated, truncated
        if terminated or truncated:
            self._reset(out, i, env, seed)
        else:
            self._keep(out, i, env, observation, token, action.tobytes(), out.reward[i].tobytes())

    def _give_up(self, out: _Outcome, i: int, seed: int) -> None:
        """Cut off an episode that cannot be rebuilt, and begin another; its last observation is only in the state."""
        if not self.warned:
            warnings.warn(
                f"{self.name} does not repeat itself from equal seeds and actions; episodes that would have to be "
                "rebuilt, as after a resume, are cut off, and new ones begin.",
                stacklevel=2,
            )
        self.warned = True
        self._reset(out, i, self._fresh(), seed)
        out.truncated[i], out.found[i] = True, False

    def _reset(self, out: _Outcome, i: int, env: Any, seed: int) -> None:
        self._keep(out, i, env, self._run(env, "reset", seed)[0], seed.to_bytes(4, "little"))

    def _run(self, env: Any, method: str, argument: Any) -> tuple[Any, ...]:
        """Call an instance; return (observation, reward, terminated, truncated) as they arrive in arrays."""
        try:
            if method == "reset":
                observation, info = env.reset(seed=argument)
                rest: tuple[Any, ...] = ()
            else:
                observation, reward, terminated, truncated, info = env.step(argument)
                rest = np.asarray(reward, np.float32).item(), bool(terminated), bool(truncated)
            observation = self.observe(observation, info)
        except (Exception, SystemExit) as error:  # the user's code
            self._close(env)
            self.warned = True  # the program may go on briefly, without this instance
            file = inspect.getsourcefile(type(getattr(env, "unwrapped", env)))
            raise UsageError(f"{method} of {self.name} fails ({describe_error(error, file)}).") from None
        if observation.shape != self.answer.observation.shape:
            raise UsageError(
                f"{method} of {self.name} returns an observation of shape {observation.shape}, but its space has "
                f"{self.answer.observation.shape}."
            )
        return observation, *rest

    def _keep(self, out: _Outcome, i: int, env: Any, observation: Any, *history: bytes) -> None:
        out.found[i], out.observation[i] = True, observation
        token = hashlib.blake2b(b"".join((*history, out.observation[i].tobytes())), digest_size=8).digest()
        out.token[i] = np.frombuffer(token, np.uint32)
        self.live.setdefault(token, []).append(env)

    def _take(self, token: bytes) -> Any:
        """Take the latest instance with this history, or None."""
        instances = self.live.get(token)
        if not instances:
            return None
        env = instances.pop()
        if not instances:
            del self.live[token]
        return env

    def _fresh(self) -> Any:
        """Make a new instance, or take the oldest if there are as many as allowed."""
        if self.count >= self.most:
            return self._drop()
        others = [host for host in _hosts if host is not self]
        while sum(host.count for host in others) > MOST_IDLE:
            oldest = next(host for host in others if host.live)
            if not oldest.lock.acquire(blocking=False):
                break  # in use at this moment
            try:
                oldest._close(oldest._drop())
            finally:
                oldest.lock.release()
        self.count += 1
        return self.make()

    def _close(self, env: Any) -> None:
        self.count -= 1
        _close(env)

    def _drop(self) -> Any:
        """Take the oldest instance from its episode."""
        token = next(iter(self.live))
        if len(self.dropped) >= 8 * MOST_INSTANCES:  # they may never be asked for again
            self.dropped.clear()
        self.dropped.add(token)
        return self._take(token)


def _close(env: Any) -> None:
    with contextlib.suppress(Exception):  # such as a window that is closed already
        env.close()


def _close_all(live: dict[bytes, list[Any]]) -> None:
    while live:
        for env in live.popitem()[1]:
            _close(env)


def runs_on_host(environment: Environment) -> bool:
    """Whether an environment, wrapped or not, runs in Python."""
    _, state = jax.eval_shape(environment.reset, key_shape())
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, HostState))
    return any(isinstance(node, HostState) for node in nodes)


def pure_functions(host: Host, space: Space, limit: int) -> tuple[Any, Any, Any]:
    """Make `reset`, `step` and `restart` of an `Environment` that a host runs."""

    def ask(command: Any, token: Any, seed: Any, action: Any) -> _Outcome:
        return jax.pure_callback(
            host, host.answer, jnp.int32(command), token, seed, action, vmap_method="broadcast_all"
        )

    def draw_seed(key: Array) -> Array:
        return (jax.random.bits(key, (), jnp.uint32) >> 1).astype(jnp.int32)

    def reset(key: Array) -> tuple[Array, HostState]:
        seed, none = draw_seed(key), jnp.asarray(zero_action(space))
        first = ask(RESET, jnp.zeros(2, jnp.uint32), seed, none)
        actions = jnp.zeros((limit, *none.shape), none.dtype)
        return first.observation, HostState(first.token, seed, jnp.int32(0), actions, first.observation)

    def step(key: Array, state: HostState, action: Array) -> Step:
        if isinstance(space, Box):
            action = jnp.clip(action, space.low, space.high)
        next_seed = draw_seed(key)
        outcome = ask(STEP, state.token, next_seed, action)

        def rebuild(carry: tuple[Array, _Outcome]) -> tuple[Array, _Outcome]:
            # Call 0 resets, calls 1 … time replay, and the last one takes the step. Under `vmap` all lanes run until
            # the slowest is done; the host does nothing for those that are not `lost`.
            i, last = carry
            command = jnp.where(i == 0, RESET, jnp.where(i <= state.time, STEP, MUST_STEP))
            command = jnp.where(lost & (i <= state.time + 1), command, NOTHING)
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
        led_to = jnp.where(outcome.found, outcome.next_observation, state.observation)
        done = outcome.terminated | outcome.truncated
        after = HostState(
            outcome.token,
            jnp.where(done, next_seed, state.seed),
            jnp.where(done, 0, state.time + 1),
            state.actions.at[state.time].set(action),
            outcome.observation,
        )
        return Step(led_to, after, outcome.reward, outcome.terminated, outcome.truncated)

    def restart(key: Array, state: HostState) -> tuple[Array, HostState]:
        return state.observation, state

    return reset, step, restart
