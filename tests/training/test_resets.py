"""Stepping many environments, with first states drawn only when an episode ends, is stepping each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from probes import assert_trees_close

from trpo_jax import make_environment
from trpo_jax.training.resets import reset_environments, step_environments


def play(environment, step, num_envs=5, num_steps=40):
    """What is `Played` [T, N] at random; the environments step by `step(environment, key, state, action)`."""

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
    return jax.vmap(probes.step_and_reset(environment))(jax.random.split(key, action.shape[0]), state, action)


def step_together(environment, key, state, action):
    step, onward = step_environments(environment, key, state, action)
    return probes.Played(*onward, step.reward, step.terminated, step.truncated, step.observation)


@pytest.mark.parametrize("env", ["CartPole-v1", "FourRooms-misc", "Countdown"])
def test_stepping_together_is_stepping_each(env):
    environment = make_environment(probes.Countdown() if env == "Countdown" else env)
    key = jax.random.key(3)
    together, each = (jax.jit(play(environment, step))(key) for step in (step_together, step_each))
    assert_same_play(together, each)
    if env != "FourRooms-misc":
        done = np.asarray(together.terminated | together.truncated)
        assert done.any() and not done.all(axis=1).any()  # both branches ran


def test_so_it_is_for_many_agents():
    environment = make_environment("CartPole-v1")
    keys = jax.random.split(jax.random.key(4), 3)
    together, each = (jax.jit(jax.vmap(play(environment, step)))(keys) for step in (step_together, step_each))
    assert_same_play(together, each)


@pytest.fixture
def drawn():
    """(CartPole, a list that grows with every program that draws first states of it)."""
    environment, calls = make_environment("CartPole-v1"), []

    def reset(key):
        jax.debug.callback(lambda _: calls.append(1), key)
        return environment.reset(key)

    return dataclasses.replace(environment, reset=reset), calls


def step_upright_then_fallen(environment, calls):
    """Whether first states were drawn in a step after which no episode ends, and in one that ends the second of 3."""
    state = jax.vmap(make_environment("CartPole-v1").reset)(jax.random.split(jax.random.key(0), 3))[1]
    step = jax.jit(lambda state: step_environments(environment, jax.random.key(1), state, jnp.zeros(3, jnp.int32)))
    found = []
    fallen = state.replace(theta=state.theta.at[1].set(1.0))
    for before, ends in ((state, [False] * 3), (fallen, [False, True, False])):
        calls.clear()
        result, _ = jax.block_until_ready(step(before))
        jax.effects_barrier()
        assert result.done.tolist() == ends
        found.append(bool(calls))
    return found


def test_where_branches_are_cheap_first_states_are_drawn_only_when_an_episode_ends(drawn, monkeypatch):
    monkeypatch.setattr("trpo_jax.backend.platform", lambda: "cpu")
    assert step_upright_then_fallen(*drawn) == [False, True]


def test_elsewhere_they_are_drawn_at_every_step(drawn, accelerator):
    assert step_upright_then_fallen(*drawn) == [True, True]


WAYS = ("cpu", "gpu", "costly", "resets itself")


@pytest.mark.parametrize("agents", [(), (2,)], ids=["one agent", "two agents"])
def test_all_ways_give_the_same_bits(agents, monkeypatch):
    # Whole numbers, which no program rounds.
    environment, results, keys = (
        probes.without_resets(probes.Countdown()),
        [],
        jax.random.split(jax.random.key(3), agents),
    )
    for way in WAYS:
        monkeypatch.setattr("trpo_jax.backend.platform", lambda: "gpu" if way == "gpu" else "cpu")  # noqa: B023
        other = probes.resetting_itself(environment) if way == "resets itself" else environment
        run = play(dataclasses.replace(other, costly_reset=way == "costly"), step_together, num_envs=19)
        results.append(jax.jit(jax.vmap(run) if agents else run)(keys)._replace(state=()))
    done = np.asarray(results[0].terminated)
    assert done.any() and not done.all(axis=-1).any()
    assert all(probes.same_bits(results[0], other) for other in results[1:])


def test_what_resets_itself_is_not_reset_once_more():
    environment = make_environment(probes.Countdown())
    state = jax.vmap(environment.reset)(jax.random.split(jax.random.key(0), 5))[1]
    never = dataclasses.replace(environment, reset=None)
    _, (observation, after) = step_environments(never, jax.random.key(1), state, jnp.zeros(5, jnp.int32))
    np.testing.assert_array_equal(observation, after.observation)


def test_costly_first_states_are_drawn_a_few_at_a_time():
    environment = dataclasses.replace(make_environment("CartPole-v1"), costly_reset=True)
    keys = jax.random.split(jax.random.key(5), 2)
    few, each = (jax.jit(jax.vmap(play(environment, step, num_envs=19)))(keys) for step in (step_together, step_each))
    assert_same_play(few, each)
    ended = np.sum(few.terminated, axis=-1)
    assert ended.max() > 2 and (ended == 0).any()  # more at once than are drawn at once, a sixteenth of 19
