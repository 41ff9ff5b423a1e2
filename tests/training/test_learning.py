"""The defaults learn. Slow; run by name: python -m pytest -m slow tests/training/test_learning.py"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from trpo_jax import Config, evaluate, train


# Seeds of their own: those from 0 on are the published evaluation, those from 10,000 on chose the defaults.
@pytest.mark.usefixtures("full_compiles")
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "settings, env_steps, threshold",
    [
        ({"env": "CartPole-v1"}, 100_000, 495),
        ({"env": "CartPole-v1", "value_fit": "adam"}, 100_000, 475),
        ({"env": "Acrobot-v1"}, 100_000, -90),
        ({"env": "Pendulum-v1", "gamma": 0.9}, 200_000, -250),
    ],
)
def test_sixteen_seeds_learn(settings, env_steps, threshold):
    config = Config(**settings)
    config = config.replace(num_iterations=env_steps // config.steps_per_iteration)
    keys = jax.vmap(jax.random.key)(20_000 + jnp.arange(16))
    states, metrics = jax.jit(jax.vmap(train, in_axes=(None, 0)))(config, keys)
    play = jax.jit(jax.vmap(functools.partial(evaluate, num_episodes=32), in_axes=(None, 0, 0)))
    returns = np.asarray(play(config, states, keys).episode_return).mean(axis=1)
    assert stats.trim_mean(returns, 0.25) >= threshold, returns
    assert (np.asarray(metrics.mean_kl) <= config.max_kl).all()
