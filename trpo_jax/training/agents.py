"""What a `Config` stands for: an environment and two networks, on observations and batches as it has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from trpo_jax.config import Config, UsageError, validate
from trpo_jax.environments.base import Environment
from trpo_jax.environments.make import make_environment
from trpo_jax.networks import make_policy, make_value, make_value_head
from trpo_jax.steps.statistics import RunningStatistics, normalize
from trpo_jax.steps.types import Array, PyTree
from trpo_jax.training.recurrence import Sequence, unroll
from trpo_jax.types import Network


class Agent(NamedTuple):
    """What a `Config` stands for: the environment and the two networks."""

    environment: Environment
    policy: Network
    value: Network


def make_agent(config: Config) -> Agent:
    """Build the environment and the networks that a configuration names; raise `UsageError` for what cannot be."""
    validate(config)
    environment = make_environment(config.env)
    policy = config.policy or make_policy(
        environment,
        network=config.network,
        initial_log_std=config.initial_log_std,
        state_dependent_std=config.state_dependent_std,
    )
    value = config.value
    if value is None:
        value = make_value_head() if config.shared_trunk else make_value(environment, network=config.network)
    agent = Agent(environment, policy, value)
    if config.shared_trunk:
        _check_trunk(agent)
    if is_recurrent(agent):
        _check_sequences(config)
    return agent


def _check_trunk(agent: Agent) -> None:
    if agent.policy.features is None:
        raise UsageError("shared_trunk=True needs a policy with features; give its Network features=..., or use False.")
    if agent.value.initial_carry is not None:
        raise UsageError("shared_trunk=True needs a value function without a memory; the memory is the policy's.")


def _check_sequences(config: Config) -> None:
    """A network with a memory needs whole sequences: an environment's steps are one sample."""
    if config.reuse > 1:
        raise UsageError(f"reuse={config.reuse} needs networks without a memory, such as network=mlp.")
    for name, used in (
        ("policy_minibatches", config.update in ("ppo", "kl-penalty")),
        ("value_minibatches", config.value_fit == "adam"),
    ):
        if used and config.num_envs % getattr(config, name):
            raise UsageError(
                f"{name}={getattr(config, name)} must divide num_envs={config.num_envs} where a network has a memory."
            )


def is_recurrent(agent: Agent) -> bool:
    """Whether one of the networks has a memory."""
    return agent.policy.initial_carry is not None or agent.value.initial_carry is not None


def on_normalized(config: Config, statistics: RunningStatistics, network: Network) -> Network:
    """A network on observations as the settings have them normalised."""
    if not config.normalize_observations:
        return network

    def wrap(function: Any) -> Any:
        def apply(params: PyTree, *carry_and_observation: Any) -> Any:
            *carry, observation = carry_and_observation
            return function(params, *carry, normalize(statistics, observation, clip=config.observation_clip))

        return function and apply

    return network._replace(apply=wrap(network.apply), features=wrap(network.features))


def trunk_of(policy: Network) -> Network:
    """The policy without its last layer: its output is features."""
    assert policy.features is not None
    return policy._replace(apply=policy.features)


def on_trunk(policy: Network, policy_params: PyTree, head: Network) -> Network:
    """The value function, of observations, that a head on the features of a policy is; its parameters are the head's.

    Only those are fitted: a step of the value function through the trunk would move the policy, out of its trust
    region and after its line search.
    """
    trunk = trunk_of(policy)

    def apply(params: PyTree, *inputs: Any) -> Any:
        if trunk.initial_carry is None:
            return head.apply(params, trunk.apply(policy_params, *inputs))
        carry, features = trunk.apply(policy_params, *inputs)
        return carry, head.apply(params, features)

    def init(key: Array, observation: Array) -> PyTree:
        carry = () if trunk.initial_carry is None else (trunk.initial_carry(),)
        features = trunk.apply(policy_params, *carry, observation)
        return head.init(key, features if trunk.initial_carry is None else features[1])

    return Network(init, apply, trunk.initial_carry)


def over_batch(network: Network, observation: Array, start: Any, carry: PyTree) -> tuple[Any, Any]:
    """`apply(params, input)` of a network on a whole batch, and that input: observations, or sequences of them."""
    memoryless = network.initial_carry is None
    return batch_apply(network), observation if memoryless else Sequence(observation, start, carry)


def batch_apply(network: Network) -> Callable[[PyTree, Any], Any]:
    """`apply(params, input)` on the input of `over_batch`."""
    if network.initial_carry is None:
        return network.apply
    return lambda params, sequence: unroll(network, params, sequence)[0]


def by_environment(leaf: Array) -> Array:
    """[T, N, ...] <-> [N, T, ...]."""
    return jnp.swapaxes(leaf, 0, 1)


def flatten_batch(leaf: Array) -> Array:
    """[T, N, ...] -> [N·T, ...], environment by environment."""
    return jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])
