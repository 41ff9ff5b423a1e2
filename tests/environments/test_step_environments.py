"""Stepping many environments, with first states drawn only when an episode ends, is stepping each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from probes import assert_trees_close

from trpo_jax import make_environment
from trpo_jax.environments.base import step_environments
from trpo_jax.training.rollouts import reset_environments


def play(environment, step, num_envs=5, num_steps=40):
    """All `Step`s [T, N] of random play; the environments step together by `step(environment, key, state, action)`."""

    def advance(state, key):
        key_action, key_step = jax.random.split(key)
        action = jax.random.randint(key_action, (num_envs,), 0, 2)
        result = step(environment, key_step, state, action)
        return result.state, result

    def run(key):
        _, state = reset_environments(environment, key, num_envs)
        return jax.lax.scan(advance, state, jax.random.split(key, num_steps))[1]

    return run


def assert_same_play(first, second):
    """Flags alike, and numbers but for the rounding of two programs."""
    for name in ("terminated", "truncated"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert_trees_close(first, second, rtol=1e-4, atol=1e-4)


def step_each(environment, key, state, action):
    return jax.vmap(environment.step)(jax.random.split(key, action.shape[0]), state, action)


@pytest.mark.parametrize("env", ["CartPole-v1", "FourRooms-misc", "Countdown"])
def test_stepping_together_is_stepping_each(env):
    environment = make_environment(probes.Countdown() if env == "Countdown" else env)
    key = jax.random.key(3)
    together, each = (jax.jit(play(environment, step))(key) for step in (step_environments, step_each))
    assert_same_play(together, each)
    if env != "FourRooms-misc":
        done = np.asarray(together.terminated | together.truncated)
        assert done.any() and not done.all(axis=1).any()  # both branches ran


def test_so_it_is_for_many_agents():
    environment = make_environment("CartPole-v1")
    keys = jax.random.split(jax.random.key(4), 3)
    together, each = (jax.jit(jax.vmap(play(environment, step)))(keys) for step in (step_environments, step_each))
    assert_same_play(together, each)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an accelerator draws first states at every step")
def test_first_states_are_drawn_only_when_an_episode_ends():
    drawn = []
    environment = make_environment("CartPole-v1")

    def reset(key):
        jax.debug.callback(lambda _: drawn.append(1), key)
        return environment.reset(key)

    watched = dataclasses.replace(environment, reset=reset)
    state = jax.vmap(environment.reset)(jax.random.split(jax.random.key(0), 3))[1]
    step = jax.jit(lambda state: step_environments(watched, jax.random.key(1), state, jnp.zeros(3, jnp.int32)))
    result = jax.block_until_ready(step(state))
    jax.effects_barrier()
    assert not drawn and not result.terminated.any()
    fallen = dataclasses.replace(state, theta=state.theta.at[1].set(1.0))
    result = jax.block_until_ready(step(fallen))
    jax.effects_barrier()
    assert drawn and result.terminated.tolist() == [False, True, False]


def test_costly_first_states_are_drawn_a_few_at_a_time():
    environment = dataclasses.replace(make_environment("CartPole-v1"), costly_reset=True)
    keys = jax.random.split(jax.random.key(5), 2)
    few, each = (
        jax.jit(jax.vmap(play(environment, step, num_envs=19)))(keys) for step in (step_environments, step_each)
    )
    assert_same_play(few, each)
    ended = np.sum(few.terminated, axis=-1)
    assert ended.max() > 2 and (ended == 0).any()  # more at once than are drawn at once, a sixteenth of 19
