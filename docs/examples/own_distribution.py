"""A distribution of your own: a Laplace policy, whose tails are heavier than a Gaussian's."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from trpo_jax import Config, Network, train


@jax.tree_util.register_dataclass  # a pytree of float arrays, so that JAX can differentiate it
@dataclasses.dataclass(frozen=True)
class Laplace:
    """Independent dimensions of density exp(−|a − mean| / b) / 2b, b = exp(log_scale), [..., D]."""

    mean: jax.Array
    log_scale: jax.Array

    def sample(self, key):
        """One action per batch element, [..., D]."""
        return self.mean + jnp.exp(self.log_scale) * jax.random.laplace(key, self.mean.shape)

    def log_prob(self, action):
        """Summed over the dimensions, [...]."""
        distance = jnp.abs(action - self.mean) * jnp.exp(-self.log_scale)
        return jnp.sum(-distance - self.log_scale - jnp.log(2.0), axis=-1)

    def entropy(self):
        """Σ_d 1 + log 2b, [...]."""
        return jnp.sum(1 + jnp.log(2.0) + self.log_scale, axis=-1)

    def kl(self, other):
        """KL(self ‖ other), [...], exactly 0 against itself."""
        r = self.log_scale - other.log_scale
        distance = jnp.abs(self.mean - other.mean) * jnp.exp(-self.log_scale)
        return jnp.sum(jnp.exp(r) * (jnp.expm1(-distance) + distance) + jnp.expm1(r) - r, axis=-1)

    def mode(self):
        """The most probable action."""
        return self.mean

    def fisher_product(self, tangent):
        """The Fisher matrix of (mean, log b) is diag(1 / b², 1) per dimension."""
        return Laplace(tangent.mean * jnp.exp(-2 * self.log_scale), tangent.log_scale)


class Policy(nn.Module):
    """Observations [..., 3] of Pendulum to a Laplace distribution over its torque."""

    @nn.compact
    def __call__(self, observation):
        x = nn.tanh(nn.Dense(64)(nn.tanh(nn.Dense(64)(observation))))
        mean = nn.Dense(1, kernel_init=nn.initializers.normal(0.01))(x)
        log_scale = self.param("log_scale", nn.initializers.zeros, (1,))
        return Laplace(mean, jnp.broadcast_to(log_scale, mean.shape))


one = Laplace(jnp.array([0.3]), jnp.array([0.1]))
other = Laplace(jnp.array([0.0]), jnp.array([0.4]))
action = jax.vmap(one.sample)(jax.random.split(jax.random.key(1), 100_000))
sampled = jnp.mean(one.log_prob(action) - other.log_prob(action))
print("KL:", one.kl(other), "sampled:", sampled)

policy = Policy()
network = Network(policy.init, policy.apply)
config = Config(env="Pendulum-v1", policy=network, gamma=0.95, num_iterations=30)
state, metrics = jax.jit(train)(config, jax.random.key(0))
print("returns:", metrics.episode_return[::10], metrics.episode_return[-1])
print("largest mean KL of an update:", metrics.mean_kl.max())
