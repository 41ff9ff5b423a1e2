"""Networks of your own in Flax NNX: `split` takes the parameters out, `merge` puts them back."""

import jax
from flax import nnx

from trpo_jax import Categorical, Config, Network, train


class Policy(nnx.Module):
    """Observations [..., 4] to a distribution over two actions."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 64, rngs=rngs)
        self.logits = nnx.Linear(64, 2, kernel_init=nnx.initializers.normal(0.01), rngs=rngs)

    def __call__(self, observation):
        return Categorical(self.logits(nnx.tanh(self.hidden(observation))))


class Value(nnx.Module):
    """Observations [..., 4] to values [...]."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 64, rngs=rngs)
        self.value = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, observation):
        return self.value(nnx.tanh(self.hidden(observation)))[..., 0]


def as_network(make):
    """A Network of an NNX module that has nothing but parameters."""
    definition = nnx.graphdef(make(nnx.Rngs(0)))

    def init(key, observation):
        return nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)), nnx.Param)[1])

    def apply(params, observation):
        return nnx.merge(definition, nnx.State(params))(observation)

    return Network(init, apply)


config = Config(policy=as_network(Policy), value=as_network(Value), num_iterations=15)
state, metrics = jax.jit(train)(config, jax.random.key(0))
print("returns:", metrics.episode_return[::5], metrics.episode_return[-1])
print(jax.tree.map(lambda leaf: leaf.shape, state.learner.policy_params))
