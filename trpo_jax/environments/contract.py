"""A check that an environment keeps the contract: it runs with random actions, and each problem is one sentence."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.environments import gymnax
from trpo_jax.environments.base import Array, Box, Environment, MultiDiscrete, PyTree, Step, sizes_of
from trpo_jax.environments.checks import describe_error
from trpo_jax.environments.entries import WHOLE
from trpo_jax.environments.make import make_environment
from trpo_jax.sentences import UsageError, check_limits, counted


class Trace(NamedTuple):
    """The record of N environments over T steps: keys, states and actions before each, and the `Step`, [T, N, ...]."""

    key: Array
    state: PyTree
    action: Array
    legal: Array  # whether there was a legal action
    step: Step


def check_environment(env: Any, *, num_steps: int = 1000, seed: int = 0) -> list[str]:
    """Check an environment; return one sentence per problem, and an empty list if there is none.

    It is traced, and stepped with random actions. The checks are: shapes and dtypes as declared, a state of constant
    structure, finite observations and rewards, observations within the declared space, episodes that end, equal results
    from equal keys, and equal results alone and under `vmap`.

    Args:
      env: anything that `make_environment` takes.
      num_steps: steps of each of 8 environments at most; fewer if the time limit is shorter.
      seed: seed of the actions and of the environments.

    Raises:
      UsageError: if `num_steps` or `seed` cannot be used.
    """
    check_limits({"max_steps": num_steps, "seed": seed})
    try:
        environment = make_environment(env)
        length = min(num_steps, (environment.max_steps or num_steps) + 1)
        run = jax.jit(lambda key: _walk(environment, key, 8, length))
        trace = run(jax.random.key(seed))
        again = run(jax.random.key(seed))
        alone = _first_alone(environment, trace)
    except UsageError as error:
        return [str(error)]
    except Exception as error:  # the environment may fail in any way
        return [f"it cannot be run under jit and vmap ({describe_error(error)})."]
    wrong = _values(environment, trace, length) + _declared_bounds(env, environment, trace)
    if not _equal(trace.step, again.step):
        wrong.append("two runs from the same key differ; draw all randomness from the given key.")
    if not _equal(jax.tree.map(lambda leaf: leaf[0, 0], trace.step), alone, tolerance=1e-4):
        wrong.append("a step under vmap differs from the same step alone.")
    return wrong


def _walk(environment: Environment, key: Array, num_envs: int, length: int) -> Trace:
    """Step N environments with random legal actions; where an episode ends, the next begins."""

    def one(carry: tuple[Array, PyTree], key: Array) -> tuple[tuple[Array, PyTree], Trace]:
        observation, state = carry
        key_action, key_step, key_reset = jax.random.split(key, 3)
        action, legal = _random_action(environment, key_action, observation)
        step = environment.step(key_step, state, action)
        if environment.restart is None:
            first = environment.reset(key_reset)
        else:
            first = environment.restart(key_reset, step.state)
        after = jax.tree.map(lambda new, old: jnp.where(step.done, new, old), first, (step.observation, step.state))
        return after, Trace(key_step, state, action, legal, step)

    keys = jax.random.split(key, (length + 1, num_envs))
    start = jax.vmap(environment.reset)(keys[0])
    return jax.lax.scan(lambda carry, keys: jax.vmap(one)(carry, keys), start, keys[1:])[1]


def _random_action(environment: Environment, key: Array, observation: Array) -> tuple[Array, Array]:
    """Draw a legal action uniformly; return it, and whether there was one."""
    space = environment.action_space
    if isinstance(space, Box):
        drawn = jax.random.uniform(
            key, space.shape, minval=np.maximum(space.low, -1e3), maxval=np.minimum(space.high, 1e3)
        )
        return drawn, jnp.bool_(True)
    sizes = sizes_of(space)
    mask = jnp.ones(sum(sizes), bool) if environment.action_mask is None else environment.action_mask(observation)
    parts = jnp.split(mask, np.cumsum(sizes)[:-1])
    keys = jax.random.split(key, len(sizes))
    choices = [jax.random.categorical(k, jnp.where(part, 0.0, -1e9)) for k, part in zip(keys, parts, strict=True)]
    action = jnp.stack(choices) if isinstance(space, MultiDiscrete) else choices[0]
    return action.astype(jnp.int32), jnp.all(jnp.stack([jnp.any(part) for part in parts]))


def _first_alone(environment: Environment, trace: Trace) -> Step:
    first = jax.tree.map(lambda leaf: leaf[0, 0], trace)
    return jax.jit(environment.step)(first.key, first.state, first.action)


def _values(environment: Environment, trace: Trace, length: int) -> list[str]:
    """Check the numbers of all steps; return one sentence per problem."""
    step, done = trace.step, np.asarray(trace.step.done)
    wrong = []
    for name in ("observation", "reward"):
        bad = ~np.isfinite(np.asarray(getattr(step, name)))
        if bad.any():
            wrong.append(f"{name}s must be finite, but one is not at step {1 + int(np.argwhere(bad)[0, 0])}.")
    if not np.asarray(trace.legal).all():
        wrong.append("the mask of legal actions forbids all actions while an episode goes on.")
    if not done.any():
        limit = environment.max_steps
        if limit is not None and length > limit:
            wrong.append(f"max_steps={limit} is declared, but no episode ended within {counted(length, 'step')}.")
        elif limit is None:
            wrong.append(f"no episode ended within {counted(length, 'random step')}; set a time limit with max_steps.")
    return wrong


def _declared_bounds(env: Any, environment: Environment, trace: Trace) -> list[str]:
    """Check that observations lie in the space that a gymnax environment declares for them."""
    if isinstance(env, str):
        if "/" in env or ":" in env:
            return []
        env = gymnax.make_by_name(env)[0]
    if isinstance(env, Environment) or not callable(getattr(env, "observation_space", None)):
        return []
    params = getattr(env, "default_params", None)
    try:
        space = env.observation_space(*(() if params is None else (params,)))
        low, high = (np.asarray(getattr(space, bound), np.float32) for bound in ("low", "high"))
        observation = trace.step.observation
        seen = np.asarray(environment.split(observation)[WHOLE] if environment.entries else observation)
        outside = (seen < low - 1e-4) | (seen > high + 1e-4)
    except (AttributeError, KeyError, NotImplementedError, ValueError):  # no bounds, or bounds of another shape
        return []
    if (high == 255).all() or not outside.any():  # pictures arrive divided by 255
        return []
    value = seen[tuple(np.argwhere(outside)[0])]
    return [f"observations must lie in the declared {space.__class__.__name__}, but one has an entry of {value:g}."]


def _equal(one: PyTree, other: PyTree, tolerance: float = 0.0) -> bool:
    def close(a: Any, b: Any) -> bool:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if np.asarray(a).dtype == bool or not tolerance:
            return bool(np.array_equal(a, b, equal_nan=jnp.issubdtype(np.asarray(a).dtype, jnp.floating)))
        return bool(np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True))

    return jax.tree.all(jax.tree.map(close, one, other))
