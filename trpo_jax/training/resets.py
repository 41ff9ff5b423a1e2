"""Initial states of N environments, at the start and wherever an episode ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trpo_jax import backend
from trpo_jax.environments.base import Environment, Step
from trpo_jax.steps.types import Array, PyTree


def reset_environments(environment: Environment, key: Array, num_envs: int) -> tuple[Array, PyTree]:
    """Draw initial observations [N, ...] and states of N environments."""
    return jax.vmap(environment.reset)(jax.random.split(key, num_envs))


def environment_keys(environment: Environment, key: Array, num_envs: int) -> Array:
    """Split the key of a step: two keys for each environment, to step and to begin, [N, 2]; one if it resets itself.

    This is the split that gymnax's own step makes, so that trajectories agree key by key.
    """
    keys = jax.random.split(key, num_envs)
    return keys if environment.restart is not None else jax.vmap(jax.random.split)(keys)


def step_environments(
    environment: Environment, key: Array, state: PyTree, action: Array
) -> tuple[Step, tuple[Array, PyTree]]:
    """Step N environments; return their `Step`s, and the observations and states to go on from, [N, ...] each.

    The key is that of the step, or what `environment_keys` made of it.

    Where an episode ended, the latter are those of the next one. Drawing them can cost more than the step itself, and
    in most steps no episode ends: where branches are cheap, none are drawn then. (Under `vmap` the branch becomes a
    selection, which always has the cost of drawing.) Costly ones are drawn a few at a time on every backend. An
    environment that resets itself has drawn them already.
    """

    # All of it is here, so that a branch without initial states computes no keys for them.
    def keys() -> Array:
        return key if key.ndim else environment_keys(environment, key, action.shape[0])

    if environment.restart is not None:
        own = keys()
        step = jax.vmap(environment.step)(own, state, action)
        return step, _begin(step, jax.vmap(environment.restart)(own, step.state))

    step = jax.vmap(environment.step)(keys()[:, 0], state, action)
    if environment.costly_reset:
        return step, _begin_few(step, environment, keys()[:, 1])

    def begin() -> tuple[Array, PyTree]:
        return _begin(step, jax.vmap(environment.reset)(keys()[:, 1]))

    if not backend.branches_are_cheap():
        return step, begin()
    return step, jax.lax.cond(jnp.any(step.done), begin, lambda: (step.observation, step.state))


def _begin(step: Step, first: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
    """Select `first` observations and states where an episode ended, [N, ...], and elsewhere those of the step."""

    def select(done: Array, first: PyTree, onward: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: jnp.where(done, a, b), first, onward)

    return jax.vmap(select)(step.done, first, (step.observation, step.state))


def _begin_few(step: Step, environment: Environment, keys: Array) -> tuple[Array, PyTree]:
    """Do the same, but draw initial states for a sixteenth of N at a time, until there are enough."""
    num_envs = keys.shape[0]
    at_once = -(-num_envs // 16)

    def draw(carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        left, current = carry
        (which,) = jnp.nonzero(left, size=at_once, fill_value=num_envs)  # beyond the last: written nowhere
        first = jax.vmap(environment.reset)(keys[which])
        current = jax.tree.map(lambda a, b: a.at[which].set(b, mode="drop"), current, first)
        return left.at[which].set(False, mode="drop"), current

    start = step.done, (step.observation, step.state)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), draw, start)[1]
