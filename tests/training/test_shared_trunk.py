"""A value function on the policy's trunk: evaluated and fitted on its features, and never moving them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import Countdown, TwoSteps, assert_trees_close, linear_policy, linear_value, small_config
from test_recurrence import with_idle_memory

from trpo_jax import (
    Categorical,
    Config,
    Network,
    UsageError,
    ValueFit,
    init,
    make_policy,
    make_value,
    train,
    train_step,
)
from trpo_jax.environments.base import Discrete, Environment, make_box
from trpo_jax.training.agents import make_agent, on_trunk
from trpo_jax.training.rollouts import rollout


def transparent(policy):
    """Its features are the observation itself."""
    if policy.initial_carry is None:
        return policy._replace(features=lambda params, observation: observation)
    return policy._replace(features=lambda params, carry, observation: (carry + 1, observation))


def bent_policy():
    """Two features, tanh of a matrix times the observation, and a linear layer to two logits."""

    def init(key, observation):
        keys = jax.random.split(key)
        return {"trunk": jax.random.normal(keys[0], (1, 2)), "head": jax.random.normal(keys[1], (2, 2))}

    def features(params, observation):
        return jnp.tanh(observation @ params["trunk"])

    return Network(
        init, lambda params, observation: Categorical(features(params, observation) @ params["head"]), features=features
    )


@pytest.mark.long
@pytest.mark.parametrize("memory, fit", [(False, "adam"), (True, "gauss-newton")])
def test_a_head_on_the_observation_is_the_value_function_of_its_own(memory, fit):
    wrap = with_idle_memory if memory else lambda network: network
    separate = small_config(
        Countdown(),
        policy=wrap(linear_policy()),
        value=wrap(linear_value()),
        normalize_observations=True,
        value_fit=fit,
    )
    shared = separate.replace(policy=transparent(wrap(linear_policy())), value=linear_value(), shared_trunk=True)
    own, head = (jax.jit(train)(config, jax.random.key(0)) for config in (separate, shared))
    assert_trees_close(head[0].learner.policy_params, own[0].learner.policy_params, rtol=1e-4, atol=1e-5)
    assert_trees_close(head[0].learner.value_params, own[0].learner.value_params, rtol=1e-4, atol=1e-5)
    assert_trees_close(head[1], own[1], rtol=1e-3, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, {"reuse": 2}, {"update": "ppo"}], ids=str)
def test_the_head_is_fitted_to_the_new_trunk_and_used_on_it(changes):
    """What the fit is given are the features of the batch under the parameters that the update left."""
    config = small_config(policy=bent_policy(), value=linear_value(2), shared_trunk=True, max_kl=0.5, **changes)
    state = init(config, jax.random.key(0))
    assert state.learner.value_params["w"].shape == (2,) and state.actor.carry.value == ()
    size = config.steps_per_iteration

    def mean_squares(apply, params, kept, targets, key):
        features = targets.observation.observation
        return {"w": (features[:size] ** 2).mean(0), "b": jnp.float32(0)}, None, jnp.float32(0)

    config = config.replace(value_fit=lambda config: ValueFit(lambda params: None, mean_squares))
    new, _ = jax.jit(train_step)(config, state)
    agent = make_agent(config)
    batch = rollout(agent, state.learner, state.actor, jax.random.fold_in(state.key, 0))[1]
    observation = batch.observation.reshape(-1, 1)
    features = (agent.policy.features(s.learner.policy_params, (), observation)[1] for s in (new, state))
    expected, stale = ((leaf**2).mean(0) for leaf in features)
    np.testing.assert_allclose(new.learner.value_params["w"], expected, atol=1e-5)
    assert np.abs(expected - stale).max() > 1e-3


def test_the_fit_of_the_head_leaves_the_policy_inside_its_trust_region():
    config = small_config(policy=bent_policy(), value=linear_value(2), shared_trunk=True, value_fit="adam")
    still, moved = (
        jax.jit(train)(config.replace(value_learning_rate=rate, num_iterations=1), jax.random.key(0))
        for rate in (0.0, 0.1)
    )
    assert_trees_close(still[0].learner.policy_params, moved[0].learner.policy_params, rtol=0, atol=0)
    assert np.abs(still[0].learner.value_params["w"] - moved[0].learner.value_params["w"]).max() > 1e-2
    assert 0 < moved[1].mean_kl[0] <= config.max_kl


def test_values_of_a_solved_problem_are_learned():
    """V(s₀) = γ and V(s₁) = 1, see `TwoSteps`."""
    config = Config(env=TwoSteps(), gamma=0.5, shared_trunk=True, num_envs=8, num_steps=16, num_iterations=30)
    state, _ = jax.jit(train)(config, jax.random.key(0))
    agent = make_agent(config)
    value = on_trunk(agent.policy, state.learner.policy_params, agent.value)
    _, values = value.step(state.learner.value_params, (), jnp.array([[0.0], [1.0]]))
    np.testing.assert_allclose(values, [0.5, 1], atol=0.02)


@pytest.mark.parametrize("space", [Discrete(3), make_box(-1, 1, (2,))], ids=["discrete", "box"])
@pytest.mark.parametrize("network", ["mlp", "cnn", "gru"])
def test_the_features_of_default_policies_are_what_their_last_layer_sees(network, space):
    environment = Environment("shapes", (4, 4, 2), space, None, reset=None, step=None)
    policy = make_policy(environment, network=network)
    observation = jax.random.normal(jax.random.key(1), (5, 4, 4, 2))
    params = policy.init(jax.random.key(0), observation[0])
    carry = () if policy.initial_carry is None else (jnp.full((5, 64), 0.3),)
    output, features = policy.apply(params, *carry, observation), policy.features(params, *carry, observation)
    if carry:
        np.testing.assert_allclose(output[0], features[0], atol=1e-6)
        output, features = output[1], features[1]
    layers = (params["mean"] if space is not None and "mean" in params else params)["params"]
    last = layers[max(name for name in layers if name.startswith("Dense"))]
    expected = features @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(output.mean if "mean" in params else output.logits, expected, atol=1e-5)


def test_what_cannot_share_is_refused():
    recurrent = make_value(make_agent(Config()).environment, network="gru")
    for changes, message in (
        ({"policy": linear_policy()}, "shared_trunk=True needs a policy with features"),
        ({"value": recurrent}, "shared_trunk=True needs a value function that is not recurrent"),
    ):
        with pytest.raises(UsageError, match=message):
            init(Config(shared_trunk=True, **changes), jax.random.key(0))
