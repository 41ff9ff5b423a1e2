"""Normalisation, clipping and annealing, each against a known answer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import probes
import pytest
from probes import same_bits, small_config

from trpo_jax import (
    Config,
    Network,
    UsageError,
    fit_value_function,
    init,
    make_environment,
    train,
    train_step,
    validate,
)
from trpo_jax.deployment import acting_policy
from trpo_jax.networks.recurrent import lift
from trpo_jax.steps.statistics import init_statistics
from trpo_jax.training.agents import make_agent, with_normalization
from trpo_jax.training.estimates import observe_returns, scale_rewards
from trpo_jax.training.recurrence import initial_carries
from trpo_jax.training.state import Transition


def batch_of(reward, terminated, truncated):
    nothing = jnp.zeros(reward.shape)
    return Transition(nothing, nothing, reward, terminated, truncated, nothing)


def test_statistics_of_the_discounted_return_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    config = Config(gamma=0.9)
    running, seen = np.zeros(3), []
    statistics, discounted = init_statistics(()), jnp.zeros(3)
    for _ in range(3):  # three rollouts, across which episodes go on
        reward = rng.normal(2, 3, (7, 3))
        ends = rng.random((2, 7, 3)) < 0.15
        for t in range(7):
            running = 0.9 * running + reward[t]
            seen.append(running.copy())
            running[ends[0, t] | ends[1, t]] = 0
        batch = batch_of(*map(jnp.asarray, (reward.astype(np.float32), ends[0], ends[1])))
        statistics, discounted = observe_returns(config, statistics, discounted, batch)
        np.testing.assert_allclose(discounted, running, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(statistics.variance, np.var(seen), rtol=1e-4)
        assert statistics.count == np.size(seen)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [-30.0, 0.5, 8.0]),
        ({"reward_clip": 1.0}, [-1.0, 0.5, 1.0]),
        ({"normalize_rewards": True}, [-7.5, 0.125, 2.0]),
        ({"normalize_rewards": True, "reward_clip": 3.0}, [-3.0, 0.125, 2.0]),
    ],
)
def test_rewards_are_divided_by_the_deviation_and_then_clipped(settings, expected):
    statistics = init_statistics(())
    statistics = type(statistics)(jnp.float32(5), jnp.float32(100), jnp.float32(16))
    scaled = scale_rewards(Config(**settings), statistics, jnp.array([-30.0, 0.5, 8.0]))
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)


def test_constant_returns_are_not_divided_by_zero():
    statistics = type(init_statistics(()))(jnp.float32(5), jnp.float32(3), jnp.float32(0))
    np.testing.assert_array_equal(scale_rewards(Config(normalize_rewards=True), statistics, jnp.ones(2)), 1)


def test_equal_returns_are_not_divided_by_their_rounding():
    """γ = 0 and reward 0.1: every discounted return is 0.1."""
    config = Config(normalize_rewards=True, gamma=0.0)
    statistics, discounted = init_statistics(()), jnp.zeros(7)
    for steps in (11, 370):
        reward, never = jnp.full((steps, 7), 0.1), jnp.zeros((steps, 7), bool)
        statistics, discounted = observe_returns(config, statistics, discounted, batch_of(reward, never, never))
        np.testing.assert_array_equal(scale_rewards(config, statistics, reward), reward)
    rounded = type(statistics)(jnp.float32(100), jnp.float32(0.1), jnp.float32(1e-17))
    np.testing.assert_array_equal(scale_rewards(config, rounded, reward), reward)


@pytest.mark.parametrize("changes", [{}, {"network": "gru"}, {"shared_trunk": True}], ids=str)
def test_the_mask_sees_the_observation_of_the_environment(changes):
    """Action 1 is allowed where the countdown stands above 3; normalised, it never does."""
    environment = dataclasses.replace(
        make_environment(probes.Countdown()), action_mask=lambda o: jnp.concatenate([o > 0, o > 3], axis=-1)
    )
    config = Config(env=environment, num_envs=2, num_steps=4, normalize_observations=True, **changes)
    state = jax.jit(init)(config, jax.random.key(0))
    statistics = dataclasses.replace(state.learner.statistics, mean=jnp.array([10.0]), variance=jnp.array([4.0]))
    policy = with_normalization(config, statistics, make_agent(config).policy)
    observation = jnp.array([[1.0], [3.0], [4.0], [5.0]])
    _, distribution = policy.step(state.learner.policy_params, initial_carries(policy, 4), observation)
    probabilities = np.asarray(jax.nn.softmax(distribution.logits))
    np.testing.assert_array_equal(probabilities[:2], [[1, 0]] * 2)
    assert (probabilities[2:] > 0.3).all()
    # The learned part sees the normalised one: a mean that is shifted by one observation gives the same.
    further = dataclasses.replace(statistics, mean=jnp.array([11.0]))
    shifted = with_normalization(config, further, make_agent(config).policy)
    _, other = shifted.step(state.learner.policy_params, initial_carries(policy, 1), jnp.array([[5.0]]))
    _, one = policy.step(state.learner.policy_params, initial_carries(policy, 1), jnp.array([[4.0]]))
    np.testing.assert_allclose(other.logits, one.logits, rtol=1e-6)
    learner = dataclasses.replace(state.learner, statistics=statistics)
    act, carry = acting_policy(config, dataclasses.replace(state, learner=learner))
    _, action = act(jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), carry), observation[:2])
    np.testing.assert_array_equal(action, 0)


def test_statistics_of_observations_start_from_a_rollout():
    config = small_config(probes.Countdown(), normalize_observations=True, num_envs=8, num_steps=64)
    state = jax.jit(init)(config, jax.random.key(0))
    assert state.learner.statistics.count == 8 * 64 and state.iteration == 0
    # The observations 1 … L of an episode, L even in 1 … 5: mean 7/3 and variance 14/9 over all steps.
    np.testing.assert_allclose(state.learner.statistics.mean, 7 / 3, rtol=0.1)
    np.testing.assert_allclose(state.learner.statistics.variance, 14 / 9, rtol=0.15)
    after, _ = jax.jit(train_step)(config, state)
    assert after.learner.statistics.count == 2 * 8 * 64

    def policy(statistics):
        seen = with_normalization(config, statistics, lift(config.policy))
        return seen.step(after.learner.policy_params, (), state.actor.observation)[1]

    drift = policy(state.learner.statistics).kl(policy(after.learner.statistics)).mean()
    assert drift < 1e-5 < policy(init_statistics((1,))).kl(policy(after.learner.statistics)).mean()


def test_observations_are_clipped_at_the_setting():
    statistics = type(init_statistics((1,)))(jnp.float32(9), jnp.array([1.0]), jnp.array([4.0]))
    config = Config(normalize_observations=True, observation_clip=1.5)
    network = Network(None, lambda params, observation: observation)
    _, seen = with_normalization(config, statistics, lift(network)).step(None, (), jnp.array([[1.0], [2.0], [9.0]]))
    np.testing.assert_allclose(seen[:, 0], [0, 0.5, 1.5])


def test_normalised_rewards_do_not_know_their_unit():
    """Rewards 1000 x as large train to the same policy, and are reported as they are."""

    class Kilo(probes.RewardedAction):
        def move(self, key, state, action):
            state, reward, *rest = super().move(key, state, action)
            return state, 1000.0 * reward, *rest

    runs = [
        jax.jit(train)(small_config(env, normalize_rewards=True, num_iterations=4), jax.random.key(0))
        for env in (probes.RewardedAction(), Kilo())
    ]
    for name, leaf in runs[0][0].learner.policy_params.items():
        np.testing.assert_allclose(runs[1][0].learner.policy_params[name], leaf, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(runs[1][1].episode_return, 1000 * runs[0][1].episode_return, rtol=1e-5)
    np.testing.assert_allclose(runs[1][1].value_loss, runs[0][1].value_loss, rtol=1e-2)


def test_a_clipped_value_moves_no_further_than_its_range():
    """One parameter, V = θ: with the target far away, the loss is flat once V has moved by ε."""

    def fit(clip):
        theta, optimizer = jnp.zeros(1), optax.sgd(0.01)
        new, _, _ = fit_value_function(
            lambda p, observation: p[0] + 0 * observation[:, 0],
            theta,
            optimizer.init(theta),
            jnp.zeros((8, 1)),
            jnp.full(8, 10.0),
            old_values=jnp.zeros(8),
            clip=clip,
            optimizer=optimizer,
            epochs=100,
            minibatches=1,
        )
        return float(new[0])

    assert fit(0.0) == pytest.approx(10 * (1 - 0.98**100), rel=1e-4)  # θ ← θ + .02 (10 − θ)
    assert 0.5 <= fit(0.5) < 0.5 + 0.2  # beyond ε the larger error is constant: at most one step too far


def test_clipping_a_value_needs_the_old_values():
    fit = functools.partial(fit_value_function, lambda w, x: w * x, jnp.ones(()), (), jnp.ones(4), jnp.ones(4))
    with pytest.raises(ValueError, match=r"^clip needs old_values"):
        fit(clip=0.1, optimizer=optax.identity(), epochs=1, minibatches=1)


def test_clipping_a_value_needs_adam():
    with pytest.raises(UsageError, match=r"value_clip=0.2 needs value_fit=adam"):
        validate(Config(value_clip=0.2))
    validate(Config(value_clip=0.2, value_fit="adam"))


def test_annealed_learning_rates_fall_in_a_line():
    """Plain steps: the change of θ is α(1 − k/2) g, with g from the same state at iteration k = 0 and k = 1 of 2."""
    config = small_config(
        update="policy-gradient", policy_optimizer="sgd", num_iterations=2, value_fit="adam", policy_learning_rate=0.1
    )
    step = jax.jit(train_step)
    middle, _ = step(config.replace(anneal_learning_rates=1.0), init(config, jax.random.key(0)))
    plain, _ = step(config, init(config, jax.random.key(0)))
    assert same_bits(middle.learner.policy_params, plain.learner.policy_params)  # the whole rate at first
    whole, _ = step(config, middle)
    half, _ = step(config.replace(anneal_learning_rates=1.0), middle)
    for name in ("w", "b"):
        start, full, part = (s.learner.policy_params[name] for s in (middle, whole, half))
        np.testing.assert_allclose(part - start, 0.5 * (full - start), atol=1e-6)
        start, full, part = (s.learner.value_params[name] for s in (middle, whole, half))
        np.testing.assert_allclose(part - start, 0.5 * (full - start), atol=2e-3)
        assert not np.allclose(part, full, atol=1e-5)
