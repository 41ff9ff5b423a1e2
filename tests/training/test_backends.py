"""The form of a program that an accelerator gets computes what the form for a CPU does."""

import jax
import numpy as np
import probes
import pytest
from probes import assert_trees_close, small_config

from trpo_jax import (
    Config,
    backtracking_line_search,
    full_step,
    init,
    parallel_line_search,
    train_step,
)
from trpo_jax.algorithms.trpo import line_search_of

FORMS = {
    "a time limit": small_config(probes.CutShort()),
    "many environments": small_config(probes.Countdown(), num_envs=40, normalize_observations=True),
    "a Gaussian": Config(env="Pendulum-v1", num_envs=4, num_steps=8, gamma=0.9),
    "a grid": Config(env="Breakout-MinAtar", num_envs=2, num_steps=8, fisher_fraction=1.0),
    "a memory": small_config(probes.Countdown(), policy=None, value=None, network="gru", fisher_fraction=1.0),
    "reuse": small_config(probes.Countdown(), reuse=2, radius_rule="ratio", constraint="max-kl"),
    "PPO": small_config(probes.Countdown(), update="ppo", value_fit="adam", policy_minibatches=2, value_minibatches=2),
}


def iteration(config):
    """One iteration of two agents: (states, metrics)."""
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def run(keys):
        states = jax.vmap(lambda key: init(config, key))(keys)
        return jax.vmap(lambda state: train_step(config, state))(states)

    return run(keys)


QUICK = ("reuse",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FORMS]
)
def test_an_iteration_is_the_same_in_either_form(name, request):
    expected, expected_metrics = iteration(FORMS[name])
    request.getfixturevalue("accelerator")
    states, metrics = iteration(FORMS[name])
    np.testing.assert_array_equal(metrics.accepted, expected_metrics.accepted)
    np.testing.assert_array_equal(metrics.num_episodes, expected_metrics.num_episodes)
    assert_trees_close(states.actor.observation, expected.actor.observation, rtol=1e-4, atol=1e-5)
    assert_trees_close(states.learner.policy_params, expected.learner.policy_params, rtol=1e-2, atol=2e-3)
    np.testing.assert_allclose(metrics.value_loss, expected_metrics.value_loss, rtol=1e-2)
    np.testing.assert_allclose(metrics.surrogate_gain, expected_metrics.surrogate_gain, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_line_search_is_the_one_that_was_asked_for_on_every_backend(platform, monkeypatch):
    monkeypatch.setattr("trpo_jax.backend.platform", lambda: platform)
    named = {
        "auto": backtracking_line_search,
        "backtracking": backtracking_line_search,
        "parallel": parallel_line_search,
        "none": full_step,
    }
    for name, search in named.items():
        found = line_search_of(Config(line_search=name, line_search_shrink=0.5, line_search_steps=3))
        assert found.func is search and found.keywords == {"shrink": 0.5, "max_steps": 3}


def branches():
    """Branches in an iteration of two agents side by side."""
    config = small_config(probes.Countdown())
    states = jax.eval_shape(jax.vmap(lambda key: init(config, key)), jax.random.split(jax.random.key(0), 2))
    return str(jax.make_jaxpr(jax.vmap(lambda state: train_step(config, state)))(states)).count(" cond[")


# The fixture `accelerator` imitates an accelerator; on a real one there is no other form to compare with.
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="compares with the form for a CPU")
def test_a_branch_is_in_the_form_for_a_cpu_alone(request):
    before = branches()
    request.getfixturevalue("accelerator")
    assert before > 0 == branches()
