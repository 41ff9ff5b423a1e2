"""Networks with a memory: what they remember while acting is what they are trained on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from probes import Countdown, Probe, assert_trees_close, linear_policy, linear_value, small_config

from trpo_jax import (
    Batch,
    Categorical,
    Config,
    Network,
    Solver,
    UsageError,
    evaluate,
    fisher_vector_product,
    init,
    make_environment,
    make_policy,
    make_value,
    train,
    train_step,
    trpo_update,
)
from trpo_jax.networks.recurrent import lift
from trpo_jax.training import learner
from trpo_jax.training.agents import make_agent
from trpo_jax.training.recurrence import Sequence, starts, unroll
from trpo_jax.training.rollouts import rollout


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


class Recall(Probe):
    """Three steps; the first observation is ±1, the others 0; reward 1 if the last action names the first observation.

    Without a memory the best mean return is ½, with one it is 1.
    """

    def observe(self, state):
        sign, time = state
        return jnp.where(time == 0, sign, 0.0)[None]

    def start(self, key):
        return 2.0 * jax.random.bernoulli(key) - 1, jnp.int32(0)

    def move(self, key, state, action):
        sign, time = state
        last = time == 2
        return (sign, time + 1), jnp.where(last & ((sign > 0) == (action == 1)), 1.0, 0.0), last, False


def counting_policy():
    """Remembers how many steps the episode has taken; acts 1 on every second one. Its parameter is a scale."""

    def apply(params, carry, observation):
        logit = params["scale"] * jnp.where(carry % 2 == 1, 50.0, -50.0)
        return carry + 1, Categorical(jnp.stack([-logit, logit], -1))

    return Network(lambda key, observation: {"scale": jnp.float32(1)}, apply, lambda: jnp.float32(0))


def with_idle_memory(network):
    """The same network, with a memory that it never looks at."""

    def apply(params, carry, observation):
        return carry + 1, network.apply(params, observation)

    return Network(network.init, apply, lambda: jnp.zeros(2))


def gru(observation_size=2, actions=3):
    environment = dataclasses.replace(make_environment("CartPole-v1"), observation_shape=(observation_size,))
    return make_policy(environment, network="gru", hidden=(4,))


def random_sequence(network, num_envs=3, num_steps=6, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    observation = jax.random.normal(keys[0], (num_envs, num_steps, 2))
    carry = 0.3 * jax.random.normal(keys[1], (num_envs, 4))
    start = jnp.zeros((num_envs, num_steps), bool).at[0, 2].set(True).at[2, 5].set(True)
    params = network.init(keys[2], observation[0, 0])
    return params, Sequence(observation, start, carry)


def test_unrolling_is_one_step_after_the_other_with_a_fresh_memory_at_each_start():
    network = gru()
    params, sequence = random_sequence(network)
    carries, outputs = jax.jit(functools.partial(unroll, lift(network)))(params, sequence)
    for n in range(3):
        carry = sequence.carry[n]
        for t in range(6):
            if sequence.start[n, t]:
                carry = network.initial_carry()
            carry, output = network.apply(params, carry, sequence.observation[n, t])
            np.testing.assert_allclose(outputs.logits[n, t], output.logits, atol=1e-6)
            np.testing.assert_allclose(carries[n, t], carry, atol=1e-6)


def test_what_came_before_a_reset_is_forgotten():
    network = gru()
    params, sequence = random_sequence(network)
    other = sequence._replace(observation=sequence.observation.at[0, :2].add(1.0), carry=sequence.carry.at[0].add(1.0))
    logits = [unroll(lift(network), params, s)[1].logits for s in (sequence, other)]
    np.testing.assert_array_equal(logits[0][0, 2:], logits[1][0, 2:])
    assert (logits[0][0, :2] != logits[1][0, :2]).any()


def test_the_fisher_product_through_time_is_the_dense_matrix(x64):
    network = gru()
    params, sequence = jax.tree.map(
        lambda leaf: leaf.astype(float) if leaf.dtype == jnp.float32 else leaf, random_sequence(network)
    )
    theta, unravel = ravel_pytree(jax.tree.map(lambda leaf: 3 * leaf, params))

    def policy(vector):
        return unroll(lift(network), unravel(vector), sequence)[1]

    @jax.jit
    def dense_matrix(theta):
        jacobian = jax.jacobian(lambda v: policy(v).logits.reshape(-1, 2))(theta)  # [N T, A, P]
        probability = jax.nn.softmax(policy(theta).logits.reshape(-1, 2))
        metric = jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(probability)
        return jnp.einsum("nap,nab,nbq->pq", jacobian, metric, jacobian) / len(probability)

    dense, product = dense_matrix(theta), jax.jit(lambda theta, vector: fisher_vector_product(policy, theta)(vector))
    for seed in range(3):
        vector = jax.random.normal(jax.random.key(seed), theta.shape)
        np.testing.assert_allclose(product(theta, vector), dense @ vector, atol=1e-12)
    assert np.abs(dense).max() > 1e-3


@pytest.mark.long
def test_a_fraction_of_sequences_is_whole_sequences(x64):
    """Half of six sequences is three of them, each of all its steps."""
    network = gru()
    params, sequence = random_sequence(network, num_envs=6)

    def policy(params, sequence):
        return unroll(lift(network), params, sequence)[1]

    action = jax.jit(lambda: policy(params, sequence).sample(jax.random.key(1)))()
    advantage = jax.random.normal(jax.random.key(2), action.shape)
    batch = Batch(sequence, action, advantage, sample_ndim=1)
    seen = []

    def spied(params, sequence):
        seen.append(sequence.observation.shape[:2])
        return policy(params, sequence)

    update = functools.partial(trpo_update, spied, params, batch, solver=Solver(iterations=3))
    half, whole = (jax.jit(functools.partial(update, fisher_fraction=fraction))()[1] for fraction in (0.5, 1.0))
    assert set(seen) == {(6, 6), (3, 6)}
    assert half.accepted and not np.allclose(half.predicted_gain, whole.predicted_gain, rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize(
    "fit, changes",
    [("gauss-newton", {}), ("adam", {"update": "ppo", "policy_minibatches": 2, "policy_epochs": 2})],
    ids=["trpo", "ppo"],
)
def test_a_memory_that_is_never_looked_at_changes_nothing(fit, changes):
    """The recurrent path, sequence by sequence, against the flat one."""
    settings = {"fisher_fraction": 1.0, "value_fit": fit, "value_epochs": 1, "value_minibatches": 1, **changes}
    if changes:
        settings["policy_minibatches"] = 1
    flat = small_config(Countdown(), normalize_observations=True, **settings)
    recurrent = flat.replace(policy=with_idle_memory(linear_policy()), value=with_idle_memory(linear_value()))
    plain, remembered = (jax.jit(train)(config, jax.random.key(0)) for config in (flat, recurrent))
    assert_trees_close(remembered[0].learner.policy_params, plain[0].learner.policy_params, rtol=1e-4, atol=1e-5)
    assert_trees_close(remembered[0].learner.value_params, plain[0].learner.value_params, rtol=1e-4, atol=1e-5)
    assert_trees_close(remembered[1], plain[1], rtol=1e-3, atol=1e-4)
    assert remembered[0].actor.carry.policy.shape == remembered[0].actor.carry.value.shape == (4, 2)


def test_the_memory_of_a_rollout_is_the_one_it_is_trained_on():
    config = small_config(Recall(), policy=None, value=None, network="gru", num_steps=7)
    agent, state = make_agent(config), init(config, jax.random.key(0))
    run, actor = jax.jit(lambda actor, key: rollout(agent, state.learner, actor, key)), state.actor
    for i in range(3):
        before = actor.carry.policy
        actor, batch, _ = run(actor, jax.random.key(i))
        start = jnp.swapaxes(starts(batch.terminated, batch.truncated), 0, 1)
        sequence = Sequence(jnp.swapaxes(batch.observation, 0, 1), start, before)
        carries, _ = unroll(agent.policy, state.learner.policy_params, sequence)
        ended = np.asarray(batch.terminated[-1] | batch.truncated[-1])
        np.testing.assert_allclose(actor.carry.policy[~ended], carries[~ended, -1], atol=1e-6)
        np.testing.assert_array_equal(actor.carry.policy[ended], 0)
        assert ended.all() == (i == 2)  # 21 steps are seven episodes


@jax.default_matmul_precision("highest")
def test_a_next_observation_is_valued_by_what_is_remembered_at_its_step(monkeypatch):
    config = small_config(Recall(), policy=None, value=None, network="gru", num_steps=5)
    agent, looked_at = make_agent(config), []

    def spy(config, batch, values, value_fn, ratios, **options):
        looked_at.append(value_fn(batch.next_observation))
        return values

    monkeypatch.setattr(learner, "estimate_advantages", spy)

    @jax.jit
    def evaluated(key):
        state = init(config, key)
        _, batch, _ = rollout(agent, state.learner, state.actor, jax.random.key(0))
        prepared = learner.prepare(agent, state.learner, batch, state.actor.carry, state.iteration)
        estimates = learner.estimate(agent, state.learner, prepared)
        return state.learner.value_params, batch, estimates.values, looked_at.pop(), estimates.value_carry

    params, batch, values, following, carry = evaluated(jax.random.key(3))
    value_of = jax.jit(agent.value.step)
    for n in range(4):
        memory = agent.value.initial_carry()
        for t in range(5):
            memory, value = value_of(params, memory, batch.observation[t, n])
            np.testing.assert_allclose(values[n, t], value, atol=1e-6)
            _, after = value_of(params, memory, batch.next_observation[t, n])
            np.testing.assert_allclose(following[t, n], after, atol=1e-6)
            if batch.terminated[t, n]:
                memory = agent.value.initial_carry()
        np.testing.assert_allclose(carry[n], memory, atol=1e-6)


def test_evaluation_remembers_and_forgets():
    """The counting policy acts 0, 1, 0 in every episode of three steps: right in half of them, whatever was first."""
    config = small_config(Recall(), policy=counting_policy())
    state = init(config, jax.random.key(0))
    returns = evaluate(config, state, jax.random.key(1), num_episodes=64).episode_return
    assert 0.3 < returns.mean() < 0.7
    always = counting_policy()._replace(initial_carry=lambda: jnp.float32(1))  # acts 1, 0, 1
    other = config.replace(policy=always)
    opposite = evaluate(other, init(other, jax.random.key(0)), jax.random.key(1), num_episodes=64).episode_return
    np.testing.assert_array_equal(returns + opposite, 1)


@pytest.mark.long
def test_a_memory_solves_what_needs_one():
    config = Config(
        env=Recall(),
        network="gru",
        num_envs=16,
        num_steps=24,
        num_iterations=60,
        policy=make_policy(make_environment(Recall()), network="gru", hidden=(16,)),
        value=make_value(make_environment(Recall()), network="gru", hidden=(16,)),
        max_kl=0.03,
    )
    state, metrics = jax.jit(train)(config, jax.random.key(0))
    assert metrics.episode_return[-5:].mean() > 0.9 and metrics.episode_return[:3].mean() < 0.65
    assert evaluate(config, state, jax.random.key(1)).episode_return.mean() == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reuse": 2}, "reuse=2 needs networks that are not recurrent"),
        ({"update": "ppo", "policy_minibatches": 8}, "policy_minibatches=8 must divide num_envs=4"),
        ({"value_fit": "adam", "value_minibatches": 16}, "value_minibatches=16 must divide num_envs=4"),
    ],
)
def test_what_a_memory_does_not_go_with_is_refused(changes, message):
    config = small_config(policy=None, value=None, network="gru", **changes)
    with pytest.raises(UsageError, match=message):
        train_step(config, None)
