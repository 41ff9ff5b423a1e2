"""The rollout: what it records, how episodes are counted, and which action the environment gets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from probes import small_config

from trpo_jax import init
from trpo_jax.training.agents import make_agent
from trpo_jax.training.resets import reset_environments
from trpo_jax.training.rollouts import rollout
from trpo_jax.training.state import Transition

NUM_ENVS, NUM_STEPS = 4, 16


def compile_rollout(config):
    """A compiled (state, key) -> (state, transitions, totals of all environments), and a first state."""
    agent = make_agent(config.replace(num_steps=NUM_STEPS))

    @jax.jit
    def run(state, key):
        actor, batch, totals = rollout(agent, state.learner, state.actor, key)
        return dataclasses.replace(state, actor=actor), batch, jax.tree.map(jnp.sum, totals)

    return run, jax.jit(lambda key: init(config, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def countdown():
    """Three rollouts in a row on episodes of 1 … 5 steps, joined to [3T, N]: (states, transitions, totals)."""
    run, state = compile_rollout(small_config(probes.Countdown()))
    states, batches, totals = [state], [], []
    for i in range(3):
        state, batch, total = run(state, jax.random.key(i))
        states.append(state)
        batches.append(batch)
        totals.append(total)
    return states, jax.tree.map(lambda *parts: np.concatenate(parts), *batches), totals


def test_shapes_and_dtypes(countdown):
    _, batch, _ = countdown
    expected = {
        "observation": ((3 * NUM_STEPS, NUM_ENVS, 1), np.float32),
        "action": ((3 * NUM_STEPS, NUM_ENVS), np.int32),
        "reward": ((3 * NUM_STEPS, NUM_ENVS), np.float32),
        "terminated": ((3 * NUM_STEPS, NUM_ENVS), np.bool_),
        "truncated": ((3 * NUM_STEPS, NUM_ENVS), np.bool_),
        "next_observation": ((3 * NUM_STEPS, NUM_ENVS, 1), np.float32),
    }
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in vars(batch).items()} == expected
    assert list(expected) == [field.name for field in dataclasses.fields(Transition)]


def test_each_step_follows_from_the_one_before(countdown):
    states, batch, _ = countdown
    done = batch.terminated | batch.truncated
    going = ~done[:-1]
    np.testing.assert_array_equal(batch.observation[1:][going], batch.next_observation[:-1][going])
    np.testing.assert_array_equal(batch.next_observation, batch.observation - 1)
    np.testing.assert_array_equal(done, batch.next_observation[..., 0] == 0)
    assert (batch.observation[1:][~going] >= 1).all()  # a new episode, drawn anew
    np.testing.assert_array_equal(batch.observation[0], states[0].actor.observation)


def test_episodes_are_counted_across_rollouts(countdown):
    states, batch, totals = countdown
    done = batch.terminated | batch.truncated
    finished, running = [[] for _ in totals], np.zeros(NUM_ENVS)
    for t in range(3 * NUM_STEPS):
        running += batch.reward[t]
        finished[t // NUM_STEPS].extend(running[done[t]])
        running[done[t]] = 0
    for total, returns in zip(totals, finished, strict=True):
        assert int(total.count) == len(returns)
        assert float(total.total_return) == sum(returns)
        assert int(total.total_length) == sum(returns)  # reward 1 a step
    np.testing.assert_array_equal(states[-1].actor.episode_return, running)
    np.testing.assert_array_equal(states[-1].actor.episode_length, running)
    assert any(state.actor.episode_length.any() for state in states[1:3])  # an episode did span two rollouts


def test_a_time_limit_ends_an_episode_as_a_terminal_state_does():
    """Reward 1 and a time limit at every step: every return and length is 1."""
    run, state = compile_rollout(small_config(probes.CutShort()))
    state, batch, totals = run(state, jax.random.key(0))
    assert batch.truncated.all() and not batch.terminated.any()
    assert totals.count == totals.total_return == totals.total_length == NUM_ENVS * NUM_STEPS
    assert not state.actor.episode_return.any() and not state.actor.episode_length.any()


def test_nothing_but_the_environments_moves(countdown):
    states, _, _ = countdown
    before, after = states[:2]
    for name in ("iteration", "key", "learner"):
        assert probes.same_bits(getattr(before, name), getattr(after, name))
    for field in dataclasses.fields(before.actor):
        same = probes.same_bits(getattr(before.actor, field.name), getattr(after.actor, field.name))
        assert same == (field.name == "carry")


def test_environments_are_independent_and_keys_decide():
    run, state = compile_rollout(small_config(probes.Countdown()))
    assert probes.same_bits(run(state, jax.random.key(7)), run(state, jax.random.key(7)))
    one, other = (run(state, jax.random.key(seed))[1] for seed in (7, 8))
    assert (one.action != other.action).any()
    assert (one.action[:, 0] != one.action[:, 1]).any()
    observation, _ = reset_environments(make_agent(small_config(probes.Countdown())).environment, jax.random.key(0), 64)
    assert set(np.unique(observation)) == {1, 2, 3, 4, 5}


def test_the_action_recorded_is_the_one_sampled_not_the_one_clipped():
    config = small_config(
        probes.RecordAction(-0.1, 0.1, (2,)), policy=probes.linear_gaussian(2, 2), value=probes.linear_value(2)
    )
    run, state = compile_rollout(config)
    _, batch, _ = run(state, jax.random.key(0))
    assert batch.action.shape == (NUM_STEPS, NUM_ENVS, 2)
    assert np.abs(batch.action).max() > 1  # σ = 1: far outside ±0.1
    # To the last digit only: XLA may compute one sample twice, for its two uses, in two roundings.
    np.testing.assert_allclose(batch.next_observation, np.clip(batch.action, -0.1, 0.1), rtol=1e-6)
    assert batch.truncated[4].all() and not batch.terminated.any()
    np.testing.assert_array_equal(batch.observation[5], 0)  # after the reset
    assert (batch.next_observation[4] != 0).all()  # before it


def test_actions_come_from_the_policy():
    config = small_config(probes.MatchObservation())
    run, state = compile_rollout(config)
    params = {"w": jnp.array([[-50.0, 50.0]]), "b": jnp.zeros(2)}
    certain = dataclasses.replace(state, learner=dataclasses.replace(state.learner, policy_params=params))
    _, batch, totals = run(certain, jax.random.key(0))
    np.testing.assert_array_equal(batch.action, batch.observation[..., 0] > 0)
    assert (batch.reward == 1).all() and int(totals.count) == NUM_ENVS * NUM_STEPS
