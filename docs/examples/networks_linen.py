"""Networks of your own in Flax linen."""

import flax.linen as nn
import jax

from trpo_jax import Categorical, Config, Network, train


class Policy(nn.Module):
    """Observations [..., 4] to a distribution over two actions."""

    @nn.compact
    def __call__(self, observation):
        x = nn.swish(nn.LayerNorm()(nn.Dense(64)(observation)))
        x = x + nn.swish(nn.LayerNorm()(nn.Dense(64)(x)))  # a residual block
        return Categorical(nn.Dense(2, kernel_init=nn.initializers.normal(0.01))(x))


class Value(nn.Module):
    """Observations [..., 4] to values [...]."""

    @nn.compact
    def __call__(self, observation):
        return nn.Dense(1)(nn.tanh(nn.Dense(128)(observation)))[..., 0]


policy, value = Policy(), Value()
config = Config(
    policy=Network(policy.init, policy.apply),
    value=Network(value.init, value.apply),
    num_iterations=15,
)
state, metrics = jax.jit(train)(config, jax.random.key(0))
print("returns:", metrics.episode_return[::5], metrics.episode_return[-1])
print(jax.tree.map(lambda leaf: leaf.shape, state.learner.policy_params["params"]))
