"""The interface that every environment is brought to, and the reset, time limit and casting that the library owns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Discrete:
    """One of `n` actions, int32 []."""

    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an action as the policy samples it."""
        return ()

    def __str__(self) -> str:
        return f"Discrete({self.n})"


@dataclasses.dataclass(frozen=True)
class MultiDiscrete:
    """K independent choices, the k-th among `n[k]`; int32 [K]."""

    n: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an action as the policy samples it."""
        return (len(self.n),)

    def __str__(self) -> str:
        return f"MultiDiscrete{self.n}"


@dataclasses.dataclass(frozen=True, eq=False)
class Box:
    """A box of real actions. The policy sees it flat, [D]; the environment gets it in its own shape.

    Attributes:
      low: lower bounds, float32 [D]; −inf where there is none.
      high: upper bounds, float32 [D].
    """

    low: np.ndarray
    high: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an action as the policy samples it."""
        return self.low.shape

    def __str__(self) -> str:
        bounds = {(f"{low:g}", f"{high:g}") for low, high in zip(self.low, self.high, strict=True)}
        text = "[{}, {}]".format(*bounds.pop()) if len(bounds) == 1 else "mixed bounds"
        return f"Box({self.low.size}) {text}"


Space = Discrete | MultiDiscrete | Box


class Step(NamedTuple):
    """What one step gives back.

    Attributes:
      observation: what to act on next, float32; after the end of an episode the first of a new one.
      state: state that belongs to `observation`.
      reward: float32 [].
      terminated: the episode ended in a terminal state, bool [].
      truncated: a time limit cut the episode off, bool [].
      next_observation: what this step led to, before any reset.
    """

    observation: Array
    state: PyTree
    reward: Array
    terminated: Array
    truncated: Array
    next_observation: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Environment:
    """An environment for one agent, as pure functions; `vmap` makes it many. Compared and hashed by identity.

    Attributes:
      name: for messages and files.
      observation_shape: shape of an observation, which is always float32.
      action_space: `Discrete`, `MultiDiscrete` or `Box`.
      max_steps: the time limit in steps, if it is known.
      reset: `reset(key)` -> (observation, state).
      step: `step(key, state, action)` -> `Step`. Resets itself when an episode ends, casts everything to fixed
        dtypes, and clips Box actions to their bounds.
      advance: `advance(key, state, action)` -> (observation, state, reward, terminated, truncated): `step` without
        its reset, where the suite can be stepped so. `step_environments` then resets only when it must.
      costly_reset: whether a first state costs far more than a step, such as a whole world. `step_environments` then
        draws no more of them than it must.
      action_mask: `action_mask(observation)` -> which actions are allowed, bool [..., n]: of a Discrete space its n,
        of a MultiDiscrete one the n of its components one after the other. The default policy never takes another.
    """

    name: str
    observation_shape: tuple[int, ...]
    action_space: Space
    max_steps: int | None
    reset: Callable[[Array], tuple[Array, PyTree]]
    step: Callable[[Array, PyTree, Array], Step]
    advance: Callable[[Array, PyTree, Array], tuple[Array, PyTree, Array, Array, Array]] | None = None
    costly_reset: bool = False
    action_mask: Callable[[Array], Array] | None = None


RawReset = Callable[[Array], tuple[Array, PyTree]]
RawStep = Callable[[Array, PyTree, Array], tuple[Array, PyTree, Array, Array, Array]]


def step_environments(environment: Environment, key: Array, state: PyTree, action: Array) -> Step:
    """Step N environments, each with a key of its own split from `key`; the result is that of `vmap(step)`.

    Drawing first states can cost more than the step itself, and in most steps no episode ends: on CPU they are then
    not drawn at all. (An accelerator waits longer for a branch than for the draw, and under `vmap` the branch
    becomes a selection, which costs what drawing always costs.) Costly ones are drawn a few at a time, everywhere.
    """
    num_envs = action.shape[0]
    if environment.advance is None or (jax.default_backend() != "cpu" and not environment.costly_reset):
        return jax.vmap(environment.step)(jax.random.split(key, num_envs), state, action)

    def keys(which: int) -> Array:  # those of `auto_reset`
        return jax.vmap(jax.random.split)(jax.random.split(key, num_envs))[:, which]

    next_observation, next_state, reward, terminated, truncated = jax.vmap(environment.advance)(keys(0), state, action)
    done = terminated | truncated
    if environment.costly_reset:
        observation, state = _restart_few(environment, keys(1), done, (next_observation, next_state))
        return Step(observation, state, reward, terminated, truncated, next_observation)

    def restart() -> tuple[Array, PyTree]:
        fresh = jax.vmap(environment.reset)(keys(1))
        return jax.vmap(_select)(done, fresh, (next_observation, next_state))

    observation, state = jax.lax.cond(jnp.any(done), restart, lambda: (next_observation, next_state))
    return Step(observation, state, reward, terminated, truncated, next_observation)


def _restart_few(environment: Environment, keys: Array, done: Array, old: PyTree) -> PyTree:
    """Put first states in place of `old` where `done`, [N]: a sixteenth of N at a time, until there are enough."""
    num_envs = done.shape[0]
    at_once = -(-num_envs // 16)

    def restart(carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        left, current = carry
        (which,) = jnp.nonzero(left, size=at_once, fill_value=num_envs)  # beyond the last: written nowhere
        fresh = jax.vmap(environment.reset)(keys[which])
        current = jax.tree.map(lambda a, b: a.at[which].set(b, mode="drop"), current, fresh)
        return left.at[which].set(False, mode="drop"), current

    return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), restart, (done, old))[1]


def auto_reset(reset: RawReset, step: RawStep) -> Callable[[Array, PyTree, Array], Step]:
    """Turn a raw step -> (observation, state, reward, terminated, truncated) into one that resets itself."""

    def step_and_reset(key: Array, state: PyTree, action: Array) -> Step:
        key_step, key_reset = jax.random.split(key)
        next_observation, next_state, reward, terminated, truncated = step(key_step, state, action)
        done = terminated | truncated
        observation, state = _select(done, reset(key_reset), (next_observation, next_state))
        return Step(observation, state, reward, terminated, truncated, next_observation)

    return step_and_reset


def _select(done: Array, fresh: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(done, a, b), fresh, old)


def time_limit(reset: RawReset, step: RawStep, max_steps: int) -> tuple[RawReset, RawStep]:
    """Truncate after `max_steps` steps, beside whatever limit the environment has itself."""

    def reset_clock(key: Array) -> tuple[Array, PyTree]:
        observation, state = reset(key)
        return observation, (state, jnp.int32(0))

    def step_clock(key: Array, clocked: PyTree, action: Array) -> tuple[Array, PyTree, Array, Array, Array]:
        state, time = clocked
        observation, state, reward, terminated, truncated = step(key, state, action)
        return observation, (state, time + 1), reward, terminated, truncated | (time + 1 >= max_steps)

    return reset_clock, step_clock


def make_box(low: Any, high: Any, shape: tuple[int, ...]) -> Box:
    """A Box from scalar or array bounds of an environment's own shape."""
    size = math.prod(shape)
    return Box(*(np.broadcast_to(np.asarray(bound, np.float32), shape).reshape(size) for bound in (low, high)))


def key_shape() -> Any:
    """Shape and dtype of a PRNG key, for tracing."""
    return jax.eval_shape(jax.random.key, 0)


def zero_action(space: Space) -> np.ndarray:
    """An action of the right shape and dtype, for tracing."""
    return np.zeros(space.shape, np.float32 if isinstance(space, Box) else np.int32)


def picture_scale(dtype: Any, shape: tuple[int, ...], low: Any = None, high: Any = None) -> float:
    """What a declared observation is divided by, so that bytes arrive in [0, 1]; 1 for all that are not bytes.

    Bytes are what is of dtype uint8, and what has three axes and bounds of 0 and 255.

    Args:
      dtype: of the observation.
      shape: of the observation.
      low: its least values, if they are known.
      high: its greatest.
    """
    try:
        bounds = np.asarray(low, np.float64), np.asarray(high, np.float64)
    except (TypeError, ValueError):  # traced, say
        bounds = np.full((), np.nan), np.full((), np.nan)
    greatest = np.max(bounds[1], initial=0.0)
    if np.dtype(dtype) == np.uint8:
        return max(float(greatest), 1.0) if np.isfinite(greatest) else 255.0
    return 255.0 if len(shape) == 3 and (bounds[0] == 0).all() and (bounds[1] == 255).all() else 1.0
