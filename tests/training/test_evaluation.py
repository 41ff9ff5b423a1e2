"""Evaluation: whole first episodes, with known returns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from probes import lane, small_config

from trpo_jax import evaluate, init, make_environment
from trpo_jax.steps.statistics import RunningStatistics
from trpo_jax.training.agents import make_agent
from trpo_jax.training.evaluation import _step_running
from trpo_jax.training.resets import reset_environments


def prepare(env, **options):
    """A compiled (state, key) -> Evaluation and a first state."""
    config = small_config(env, **options.pop("settings", {}))
    run = jax.jit(lambda state, key: evaluate(config, state, key, **options))
    return run, jax.jit(lambda key: init(config, key))(jax.random.key(0))


def test_only_the_first_episode_of_each_environment_counts():
    run, state = prepare(probes.Countdown(), num_episodes=50)
    result = run(state, jax.random.key(4))
    environment = make_agent(small_config(probes.Countdown())).environment
    first, _ = reset_environments(environment, jax.random.split(jax.random.key(4))[0], 50)
    lengths = np.asarray(first[:, 0])
    assert set(lengths) == {1, 2, 3, 4, 5}
    # Counted to the end of the longest, or the first that end, the short episodes would weigh more.
    np.testing.assert_array_equal(result.episode_return, lengths)
    np.testing.assert_array_equal(result.episode_length, lengths)
    assert result.finished.all()
    assert result.episode_return.dtype == jnp.float32 and result.episode_length.dtype == jnp.int32


def test_max_steps_cuts_and_says_so():
    run, state = prepare(probes.Countdown(), num_episodes=50, max_steps=3)
    whole, _ = prepare(probes.Countdown(), num_episodes=50)
    result, full = run(state, jax.random.key(4)), whole(state, jax.random.key(4))
    np.testing.assert_array_equal(result.finished, full.episode_length <= 3)
    np.testing.assert_array_equal(result.episode_length, np.minimum(full.episode_length, 3))
    assert not result.finished.all() and result.finished.any()


def test_an_environment_without_end_is_cut_off():
    run, state = prepare(probes.Endless(), num_episodes=3, max_steps=7)
    result = run(state, jax.random.key(0))
    assert not result.finished.any()
    assert (result.episode_length == 7).all() and (result.episode_return == 7).all()


def test_a_time_limit_of_the_environment_is_an_end():
    settings = {"policy": probes.linear_gaussian(), "value": probes.linear_value()}
    run, state = prepare(probes.RecordAction(), num_episodes=3, settings=settings)
    result = run(state, jax.random.key(0))
    assert result.finished.all() and (result.episode_length == 5).all()


@pytest.fixture(scope="module")
def rewarded():
    """Greedy and sampled evaluation on `RewardedAction`, where action 1 earns 1 and action 0 earns −1."""
    greedy, state = prepare(probes.RewardedAction(), num_episodes=40)
    sampled, _ = prepare(probes.RewardedAction(), num_episodes=40, deterministic=False)
    return greedy, sampled, state


def with_learner(state, **changes):
    return dataclasses.replace(state, learner=dataclasses.replace(state.learner, **changes))


def with_logits(state, logits):
    return with_learner(state, policy_params={"w": jnp.zeros((1, 2)), "b": jnp.array(logits)})


def test_deterministic_acts_by_the_mode(rewarded):
    greedy, _, state = rewarded
    for logits, expected in (([0.0, 0.1], 1), ([0.1, 0.0], -1)):
        assert (greedy(with_logits(state, logits), jax.random.key(0)).episode_return == expected).all()


def test_stochastic_samples(rewarded):
    _, sampled, state = rewarded
    returns = sampled(with_logits(state, [0.0, 0.1]), jax.random.key(0)).episode_return
    assert set(np.unique(returns)) == {-1, 1}
    sure = sampled(with_logits(state, [50.0, -50.0]), jax.random.key(0)).episode_return
    assert (sure == -1).all()


def test_the_setting_decides_unless_the_caller_does(rewarded):
    state = with_logits(rewarded[2], [0.0, 0.1])
    for sampled in (True, False):
        run, _ = prepare(probes.RewardedAction(), num_episodes=40, settings={"eval_stochastic": sampled})
        expected = rewarded[sampled](state, jax.random.key(0)).episode_return
        np.testing.assert_array_equal(run(state, jax.random.key(0)).episode_return, expected)
    settings = {"eval_stochastic": True}
    run, _ = prepare(probes.RewardedAction(), num_episodes=40, settings=settings, deterministic=True)
    assert (run(state, jax.random.key(0)).episode_return == 1).all()


def test_every_step_draws_anew():
    """Five actions of about ±0.1 an episode: if independent, they have one sign in one episode of 16."""
    settings = {"policy": probes.linear_gaussian(), "value": probes.linear_value()}
    run, state = prepare(probes.RecordAction(), num_episodes=200, deterministic=False, settings=settings)
    returns = np.abs(run(state, jax.random.key(0)).episode_return)
    assert 0 < np.mean(returns > 0.45) < 0.2


def test_equal_keys_give_equal_episodes_and_other_keys_others(rewarded):
    _, sampled, state = rewarded
    state = with_logits(state, [0.0, 0.0])
    assert probes.same_bits(sampled(state, jax.random.key(1)), sampled(state, jax.random.key(1)))
    assert not probes.same_bits(sampled(state, jax.random.key(1)), sampled(state, jax.random.key(2)))


def test_observations_are_normalised_as_in_training():
    # With mean 3 the policy sees −1 … 2/σ: a policy that picks by sign acts differently from one on raw observations.
    settings = {"normalize_observations": True}
    run, state = prepare(probes.MatchObservation(), num_episodes=40, settings=settings)
    state = with_learner(state, policy_params={"w": jnp.array([[-1.0, 1.0]]), "b": jnp.zeros(2)})
    assert (run(state, jax.random.key(0)).episode_return == 1).all()
    # Shifted by a mean of 5 every observation is negative, so the policy names −1 each time.
    shifted = with_learner(state, statistics=RunningStatistics(jnp.float32(9), jnp.full(1, 5.0), jnp.ones(1)))
    assert set(np.unique(run(shifted, jax.random.key(0)).episode_return)) == {-1, 1}


def test_it_vmaps_over_agents():
    config = small_config(probes.Countdown())
    keys = jax.random.split(jax.random.key(0), 3)
    states = jax.jit(jax.vmap(lambda key: init(config, key)))(keys)
    one = jax.jit(lambda state, key: evaluate(config, state, key, num_episodes=4))
    together = jax.jit(jax.vmap(lambda state, key: evaluate(config, state, key, num_episodes=4)))(states, keys)
    for i in range(3):
        alone = one(lane(states, i), keys[i])
        assert probes.same_bits(lane(together, i), alone)


def test_no_first_state_is_drawn_but_those_of_the_start():
    environment = make_environment("CartPole-v1")
    drawn = []

    def reset(key):
        drawn.append(key)
        return environment.reset(key)

    watched = dataclasses.replace(environment, reset=reset)
    networks = {"policy": probes.linear_policy(4), "value": probes.linear_value(4)}
    run, state = prepare(watched, num_episodes=9, deterministic=False, settings=networks)
    drawn.clear()
    result = run(state, jax.random.key(3))
    assert len(drawn) == 1  # traced once, for all environments together
    assert len(set(np.asarray(result.episode_length))) > 3


def test_what_resets_itself_is_evaluated_on_the_same_episodes():
    environment = make_environment("CartPole-v1")
    settings = {"policy": probes.linear_policy(4), "value": probes.linear_value(4)}
    results = []
    for env in (environment, probes.resetting_itself(environment)):
        run, state = prepare(env, num_episodes=9, deterministic=False, settings=settings)
        results.append(run(state, jax.random.key(3)))
    assert probes.same_bits(*results)


def test_episodes_that_have_ended_stand_still():
    environment = make_environment("CartPole-v1")
    observation, state = reset_environments(environment, jax.random.key(0), 2)
    keys, running = jax.random.split(jax.random.key(1), 2), jnp.array([True, False])
    *after, _, _ = _step_running(environment, keys, running, observation, state, jnp.zeros(2, jnp.int32))
    for i in range(2):
        assert probes.same_bits(lane(tuple(after), i), lane((observation, state), i)) == (not running[i])
