"""The interface of every environment: its spaces, its steps, and the `Environment` itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from trpo_jax.environments import entries
from trpo_jax.sentences import UsageError, shown

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Discrete:
    """A choice among `n` actions; an action is int32 []."""

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
    """A box of real actions: flat, [D], for the policy, and in its own shape for the environment.

    Attributes:
      low: lower bounds, float32 [D]; −inf for none. A number, or an array of any shape, is converted.
      high: upper bounds, float32 [D].
    """

    low: np.ndarray
    high: np.ndarray

    def __post_init__(self) -> None:
        try:
            bounds = np.broadcast_arrays(*(np.asarray(bound, np.float32) for bound in (self.low, self.high)))
        except (TypeError, ValueError):
            found = f"{shown(self.low)} and {shown(self.high)}"
            raise UsageError(f"bounds of a Box must be numbers, or arrays of one shape, got {found}.") from None
        for name, bound in zip(("low", "high"), bounds, strict=True):
            object.__setattr__(self, name, bound.ravel())

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
    """The outcome of one step of an environment.

    Attributes:
      observation: float32; at the end of an episode, its last one.
      state: the state for the next step, or, at the end of an episode, for `restart`.
      reward: float32 [].
      terminated: the episode ended in a terminal state, bool [].
      truncated: a time limit ended the episode, bool [].
    """

    observation: Array
    state: PyTree
    reward: Array
    terminated: Array
    truncated: Array

    @property
    def done(self) -> Array:
        """Whether the episode ended, in either way."""
        return self.terminated | self.truncated


class Film(NamedTuple):
    """Pictures of an episode.

    Attributes:
      frames: uint8 [height, width, 3] each.
      per_second: frames per second of the episode.
    """

    frames: Sequence[np.ndarray]
    per_second: float


Render = Callable[[Sequence[PyTree]], Film]


@dataclasses.dataclass(frozen=True, eq=False)
class Environment:
    """An environment for one agent as pure functions, which `vmap` multiplies. Compared and hashed by identity.

    Attributes:
      name: for messages and files.
      observation_shape: shape of an observation, which is always float32.
      action_space: `Discrete`, `MultiDiscrete` or `Box`.
      max_steps: the time limit in steps that `step` applies; None if there is none, or it is unknown. This field only
        declares the limit; `limit_steps` sets one.
      reset: `reset(key)` -> (observation, state), the start of an episode.
      step: `step(key, state, action)` -> `Step`, without a reset, which is left to the caller. Casts everything to
        fixed dtypes, and clips Box actions to their bounds.
      restart: `restart(key, state)` -> (observation, state), the start of the next episode; None means `reset(key)`. It
        is for objects that reset themselves in their own step: the step keeps the next start in its state, and
        `restart` returns it without a draw.
      costly_reset: whether an initial state, such as a whole world, costs far more than a step. The trainer then draws
        no more of them than it needs.
      action_mask: `action_mask(observation)` -> which actions are legal, bool [..., n]: in a Discrete space its n, in a
        MultiDiscrete one the n of its components in their order. The default policy takes no others.
      entries: None, or names and shapes of the parts of an observation [D], in their order; the default networks can
        select them by name. An entry named "action_mask" is a mask (legal where above 0). No network sees it, and it
        gives the function `action_mask` if there is no other.
      render: None, or `render(states)` -> `Film`, one picture per state, drawn outside of any program.
    """

    name: str
    observation_shape: tuple[int, ...]
    action_space: Space
    max_steps: int | None
    reset: Callable[[Array], tuple[Array, PyTree]]
    step: Callable[[Array, PyTree, Array], Step]
    restart: Callable[[Array, PyTree], tuple[Array, PyTree]] | None = None
    costly_reset: bool = False
    action_mask: Callable[[Array], Array] | None = None
    entries: Mapping[str, tuple[int, ...]] | None = None
    render: Render | None = None

    def __post_init__(self) -> None:
        if self.action_mask is None:
            object.__setattr__(self, "action_mask", entries.mask_function(self.entries))

    def split(self, observation: Array) -> dict[str, Array]:
        """Split observations [..., D] into their entries by name, each [..., *shape]."""
        if self.entries is None:
            raise UsageError(f"observations of {self.name} are single arrays, and have no entries to split them into.")
        return entries.split(self.entries, observation)


RawReset = Callable[[Array], tuple[Array, PyTree]]
RawStep = Callable[[Array, PyTree, Array], tuple[Array, PyTree, Array, Array, Array]]


def render_inner(render: Render | None) -> Render | None:
    """Make `render` for states that are pairs (the environment's, the wrapper's)."""
    return None if render is None else lambda states: render([inner for inner, _ in states])


def make_box(low: Any, high: Any, shape: tuple[int, ...]) -> Box:
    """Make a Box from scalar or array bounds in an environment's own shape."""
    return Box(np.broadcast_to(low, shape), np.broadcast_to(high, shape))


def sizes_of(space: Space) -> tuple[int, ...]:
    """The number of actions in each choice; () for a Box."""
    return () if isinstance(space, Box) else (space.n,) if isinstance(space, Discrete) else space.n


def key_shape() -> Any:
    """Shape and dtype of a PRNG key, for tracing."""
    return jax.eval_shape(jax.random.key, 0)


def zero_action(space: Space) -> np.ndarray:
    """An action of the right shape and dtype, for tracing."""
    return np.zeros(space.shape, np.float32 if isinstance(space, Box) else np.int32)
