"""Default policies whose actions lie between bounds: they fit, they are refused in a sentence, and they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest

from trpo_jax import Beta, Config, Environment, TanhGaussian, UsageError, evaluate, make_policy, train, validate
from trpo_jax.environments.base import Discrete, make_box
from trpo_jax.training.agents import make_agent

KINDS = {"tanh": TanhGaussian, "beta": Beta}


def environment(space):
    return Environment("shapes", (3,), space, None, reset=None, step=None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_policy_is_centred_and_wide(kind):
    space = make_box(np.array([-2.0, 0.0]), np.array([2.0, 0.5]), (2,))
    policy = make_policy(environment(space), action_distribution=kind)
    observation = jax.random.normal(jax.random.key(1), (200, 3))
    distribution = policy.apply(policy.init(jax.random.key(0), observation[0]), observation)
    assert isinstance(distribution, KINDS[kind])
    middle, width = np.array([0, 0.25]), np.array([4, 0.5])
    assert (np.abs(distribution.mode() - middle) < 0.05 * width).all()
    action = distribution.sample(jax.random.key(2))
    assert action.shape == (200, 2) and ((action >= space.low) & (action <= space.high)).all()
    assert (action.std(axis=0) > 0.2 * width).all()


def test_a_gaussian_through_tanh_starts_from_the_given_sigma():
    space = make_box(-1, 1, (2,))
    for dependent in (False, True):
        policy = make_policy(
            environment(space), action_distribution="tanh", initial_log_std=-1.5, state_dependent_std=dependent
        )
        base = policy.apply(policy.init(jax.random.key(0), jnp.zeros(3)), jnp.ones((5, 3))).base
        np.testing.assert_allclose(base.log_std, -1.5, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "space", [make_box(-np.inf, np.inf, (2,)), make_box(0, np.inf, (1,)), make_box(1, 1, (1,)), Discrete(3)], ids=str
)
def test_without_bounds_it_is_refused_in_one_sentence(space, kind):
    with pytest.raises(UsageError, match=rf"^action_distribution={kind} needs a Box of actions with a lower and an"):
        make_policy(environment(space), action_distribution=kind)


def test_settings_that_go_together():
    with pytest.raises(UsageError, match=r"^action_distribution must be one of gaussian, tanh, beta, got 'normal'"):
        Config(action_distribution="normal")
    with pytest.raises(UsageError, match=r"^action_distribution must be one of"):
        make_policy(environment(make_box(-1, 1, (1,))), action_distribution="normal")
    with pytest.raises(UsageError, match=r"^action_distribution=tanh needs policy=None"):
        validate(Config(policy=probes.linear_gaussian(), action_distribution="tanh"))
    with pytest.raises(UsageError, match=r"^action_distribution=beta needs a Box .* actions of CartPole-v1 lie in"):
        make_agent(Config(action_distribution="beta"))


@pytest.mark.parametrize("kind", ["tanh", pytest.param("beta", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_kl": 1.0, "entropy_coefficient": 0.01, "constraint": "reverse-kl"},
        pytest.param(
            {"update": "kl-penalty", "policy_minibatches": 2, "policy_epochs": 2, "policy_learning_rate": 0.3},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["trpo", "kl-penalty"],
)
def test_updates_stay_finite(kind, settings):
    """Also where a policy is driven to a bound, by steps that are far too large."""
    config = Config(
        env=probes.ReachTarget(),
        action_distribution=kind,
        num_envs=8,
        num_steps=8,
        num_iterations=12,
        hidden=(8,),
        **settings,
    )
    state, metrics = jax.jit(train)(config, jax.random.key(0))
    assert (metrics.finite == 1).all() and np.isfinite(metrics.entropy).all() and (metrics.maximum_kl >= 0).all()
    assert np.isfinite(evaluate(config, state, jax.random.key(1), num_episodes=4).episode_return).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_pendulum_is_learned(kind):
    config = Config(env="Pendulum-v1", gamma=0.9, num_iterations=100, action_distribution=kind)
    run = jax.jit(jax.vmap(train, in_axes=(None, 0)))
    _, metrics = run(config, jax.random.split(jax.random.key(0), 4))
    assert np.median(metrics.episode_return[:, -1]) > -250
