"""Networks of your own in Equinox: `partition` takes the parameters out, `combine` puts them back."""

import equinox as eqx
import jax
import jax.numpy as jnp

from trpo_jax import Categorical, Config, Network, train


class Policy(eqx.Module):
    """One observation, [4], to a distribution over two actions."""

    mlp: eqx.nn.MLP
    scale: tuple = (2.4, 3.0, 0.2, 3.0)  # no array, and so no parameter: it is not trained

    def __call__(self, observation):
        return Categorical(0.1 * self.mlp(observation / jnp.array(self.scale)))


def as_network(make):
    """A Network of an Equinox module: parameters are its float arrays; all else goes into `apply`."""
    _, rest = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)

    def init(key, observation):
        return eqx.partition(make(key), eqx.is_inexact_array)[0]

    def apply(params, observation):  # [..., 4]; Equinox layers take one sample: map over the batch
        module = eqx.combine(params, rest)
        for _ in observation.shape[:-1]:
            module = jax.vmap(module)
        return module(observation)

    return Network(init, apply)


policy = as_network(lambda key: Policy(eqx.nn.MLP(4, 2, 64, depth=2, activation=jnp.tanh, key=key)))
value = as_network(lambda key: eqx.nn.MLP(4, "scalar", 64, depth=2, activation=jnp.tanh, key=key))

config = Config(policy=policy, value=value, num_iterations=15)
state, metrics = jax.jit(train)(config, jax.random.key(0))
print("returns:", metrics.episode_return[::5], metrics.episode_return[-1])
print("parameters:", sum(leaf.size for leaf in jax.tree.leaves(state.learner.policy_params)))
