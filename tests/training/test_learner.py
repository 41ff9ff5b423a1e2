"""The stages of learning from a batch, each called alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from probes import assert_trees_close, small_config

from trpo_jax import init, train_step
from trpo_jax.training import agents
from trpo_jax.training.agents import make_agent
from trpo_jax.training.learner import adapt, estimate, fit_value, prepare, update_learner, update_policy
from trpo_jax.training.rollouts import rollout

SETTINGS = {
    "default": {},
    "all that adapts": {"normalize_observations": True, "normalize_rewards": True, "reuse": 2, "radius_rule": "ratio"},
    "a memory": {"policy": None, "value": None, "network": "gru", "fisher_fraction": 1.0},
    "a shared trunk": {"policy": None, "value": None, "shared_trunk": True},
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "a memory")) for n in SETTINGS])
def test_the_stages_one_by_one_are_the_iteration(name):
    config = small_config(probes.Countdown(), **SETTINGS[name])
    agent, state = make_agent(config), jax.jit(lambda key: init(config, key))(jax.random.key(0))
    key = jax.random.fold_in(state.key, 0)
    key_policy, key_value = jax.random.split(jax.random.fold_in(key, 2**32 - 2))
    learner, zero = state.learner, jnp.int32(0)

    actor, batch, _ = jax.jit(lambda learner, actor: rollout(agent, learner, actor, key))(learner, state.actor)
    prepared = jax.jit(lambda learner, batch, carry: prepare(agent, learner, batch, carry, zero))(
        learner, batch, state.actor.carry
    )
    estimates = jax.jit(lambda learner, prepared: estimate(agent, learner, prepared))(learner, prepared)
    policy_params, kept, info = jax.jit(lambda *found: update_policy(agent, *found, zero, key_policy))(
        learner, prepared, estimates
    )
    value_params, _, loss = jax.jit(lambda *found: fit_value(agent, *found, zero, key_value))(
        learner, policy_params, prepared, estimates
    )
    adapted = jax.jit(lambda learner, prepared: adapt(agent, learner, prepared))(learner, prepared)

    expected, metrics = jax.jit(train_step)(config, state)
    assert_trees_close(policy_params, expected.learner.policy_params, rtol=1e-4, atol=1e-5)
    assert_trees_close(value_params, expected.learner.value_params, rtol=1e-3, atol=1e-4)
    assert_trees_close(kept, expected.learner.update, rtol=1e-4, atol=1e-5)
    for part in ("statistics", "return_statistics", "buffer"):
        assert_trees_close(getattr(adapted, part), getattr(expected.learner, part), rtol=1e-4, atol=1e-5)
    assert probes.same_bits(adapted.policy_params, learner.policy_params)  # parameters are not its business
    assert_trees_close(actor.observation, expected.actor.observation, rtol=1e-6, atol=1e-6)
    assert_trees_close(estimates.value_carry, expected.actor.carry.value, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(info.surrogate_gain, metrics.surrogate_gain, rtol=1e-3)
    np.testing.assert_allclose(loss, metrics.value_loss, rtol=1e-3)


def test_learning_from_a_batch_builds_no_environment(monkeypatch):
    config = small_config(probes.Countdown())
    agent, state = make_agent(config), jax.jit(init)(config, jax.random.key(0))
    _, batch, _ = jax.jit(functools.partial(rollout, agent))(state.learner, state.actor, jax.random.key(1))

    def forbidden(*arguments, **options):
        raise AssertionError("an environment was asked for")

    monkeypatch.setattr(agents, "environment_of", forbidden)
    broken = dataclasses.replace(agent.environment, reset=forbidden, step=forbidden)
    learn = jax.jit(functools.partial(update_learner, agent._replace(environment=broken)))
    learner, _, info = learn(state.learner, batch, state.actor.carry, jnp.int32(0), jax.random.key(2))
    assert info.update.accepted and not probes.same_bits(learner.policy_params, state.learner.policy_params)
