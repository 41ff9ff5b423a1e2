"""What users add from outside, through the public door: an algorithm, a value fit, a distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import probes
import pytest

from trpo_jax import (
    Algorithm,
    Config,
    Network,
    UsageError,
    ValueFit,
    evaluate,
    first_order_update,
    init,
    load,
    save,
    train,
    train_step,
    trpo_update,
    validate,
)


def signed(config):
    """The policy gradient by steps of one length in every parameter, twice per batch (sign descent)."""
    optimizer = optax.sign_sgd(config.policy_learning_rate)

    def update(policy_apply, params, state, experience, key):
        count, optimizer_state = state
        params, optimizer_state, info = first_order_update(
            policy_apply, params, optimizer_state, experience.batch, optimizer=optimizer, epochs=2
        )
        info = dataclasses.replace(info, extra={"penalty": jnp.float32(count)})
        return params, (count + 1, optimizer_state), info

    return Algorithm(lambda params, statistics: (jnp.int32(0), optimizer.init(params)), update)


def test_an_algorithm_of_twenty_lines_trains_cartpole():
    config = Config(update=signed, policy_learning_rate=3e-3, num_iterations=40)
    state, metrics = jax.jit(train)(config, jax.random.key(0))
    assert metrics.episode_return[-1] > 150 > 40 > metrics.episode_return[0]
    np.testing.assert_array_equal(metrics.penalty, np.arange(40))  # what it adds of its own is among the metrics
    assert state.learner.update[0] == 40 and np.isnan(metrics.radius).all()
    assert evaluate(config, state, jax.random.key(1), num_episodes=8).episode_return.mean() > 150


def test_what_an_algorithm_keeps_is_saved_and_mapped(tmp_path):
    config = probes.small_config(update=signed, reuse=2)
    states = jax.jit(jax.vmap(init, in_axes=(None, 0)))(config, jax.random.split(jax.random.key(0), 2))
    states, _ = jax.jit(jax.vmap(train_step, in_axes=(None, 0)))(config, states)
    save(tmp_path / "state.npz", states)
    assert probes.same_bits(load(tmp_path / "state.npz", config), states)
    np.testing.assert_array_equal(states.learner.update[0], 1)


def test_a_value_fit_from_outside_is_used():
    def halfway(config):
        def update(value_apply, params, state, targets, key):
            mean = jnp.mean(targets.target)
            return {"w": 0 * params["w"], "b": (params["b"] + mean) / 2}, state, mean

        return ValueFit(lambda params: None, update)

    config = probes.small_config(probes.OneStep(), policy=None, value_fit=halfway, num_iterations=10)
    state, metrics = jax.jit(train)(config, jax.random.key(0))
    np.testing.assert_allclose(state.learner.value_params["b"], 1, atol=1e-2)  # every return is 1
    assert metrics.value_loss.shape == (10,)


def test_an_unknown_name_is_still_refused():
    for name in ("update", "value_fit"):
        with pytest.raises(UsageError, match=f"^{name} must be one of"):
            validate(Config(**{name: "signed"}))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beta:
    """Independent Beta(a, b) of each action dimension, stretched to [-1, 1]; it knows nothing of the library."""

    a: jax.Array
    b: jax.Array

    def sample(self, key):
        return 2 * jax.random.beta(key, self.a, self.b) - 1

    def log_prob(self, action):
        x = jnp.clip((action + 1) / 2, 1e-6, 1 - 1e-6)
        return jnp.sum(jax.scipy.stats.beta.logpdf(x, self.a, self.b) - jnp.log(2.0), axis=-1)

    def entropy(self):
        a, b = self.a, self.b
        digamma = jax.scipy.special.digamma
        terms = jax.scipy.special.betaln(a, b) - (a - 1) * digamma(a) - (b - 1) * digamma(b)
        return jnp.sum(terms + (a + b - 2) * digamma(a + b) + jnp.log(2.0), axis=-1)

    def kl(self, other):
        a, b, digamma = self.a, self.b, jax.scipy.special.digamma
        terms = jax.scipy.special.betaln(other.a, other.b) - jax.scipy.special.betaln(a, b)
        terms += (a - other.a) * digamma(a) + (b - other.b) * digamma(b)
        return jnp.sum(terms + (other.a - a + other.b - b) * digamma(a + b), axis=-1)

    def mode(self):
        return 2 * (self.a - 1) / (self.a + self.b - 2) - 1

    def fisher_product(self, tangent):
        trigamma = lambda x: jax.scipy.special.polygamma(1, x)  # noqa: E731
        shared = trigamma(self.a + self.b) * (tangent.a + tangent.b)
        return Beta(trigamma(self.a) * tangent.a - shared, trigamma(self.b) * tangent.b - shared)


def beta_policy(observation_size, actions):
    """Two softplus layers on top of a linear one; a, b > 1, so that there is a mode."""

    def init(key, observation):
        return {"w": jnp.zeros((observation_size, 2 * actions)), "b": jnp.ones(2 * actions)}

    def apply(params, observation):
        return Beta(*jnp.split(1 + jax.nn.softplus(observation @ params["w"] + params["b"]), 2, axis=-1))

    return Network(init, apply)


def test_a_distribution_by_duck_typing_obeys_the_identities_of_the_update():
    policy = beta_policy(3, 2)
    observation = jax.random.normal(jax.random.key(0), (64, 3))
    params = jax.tree.map(lambda leaf: leaf + 0.1, policy.init(None, observation[0]))
    distribution = policy.apply(params, observation)
    action = distribution.sample(jax.random.key(1))
    assert (np.abs(action) <= 1).all()
    np.testing.assert_allclose(distribution.kl(distribution), 0, atol=1e-5)
    # The Fisher metric is the Hessian of the KL divergence.
    tangent = Beta(*jax.random.normal(jax.random.key(2), (2, 64, 2)))
    shifted = jax.tree.map(lambda leaf, t: leaf + 1e-2 * t, distribution, tangent)
    product = distribution.fisher_product(tangent)
    quadratic = 0.5e-4 * jnp.sum(product.a * tangent.a + product.b * tangent.b, axis=-1)
    np.testing.assert_allclose(distribution.kl(shifted), quadratic, rtol=0.1, atol=1e-5)
    new, info = jax.jit(trpo_update, static_argnums=0)(policy.apply, params, observation, action, action.sum(-1))
    assert info.accepted and 0 < info.mean_kl <= 0.01
    assert policy.apply(new, observation).mode().mean() > distribution.mode().mean()


@pytest.mark.long
def test_a_distribution_by_duck_typing_trains():
    environment = probes.ReachTarget()
    config = Config(
        env=environment,
        policy=beta_policy(1, 1),
        value=probes.linear_value(),
        num_envs=16,
        num_steps=16,
        num_iterations=25,
        max_kl=0.05,
    )
    state, metrics = jax.jit(train)(config, jax.random.key(0))
    assert metrics.accepted.mean() > 0.8
    assert metrics.episode_return[-3:].mean() > metrics.episode_return[:3].mean()
    assert np.isfinite(evaluate(config, state, jax.random.key(1)).episode_return).all()
