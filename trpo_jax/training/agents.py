"""What a `Config` stands for: an environment and two networks, on observations and batches as it has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config import Config, UsageError, validate
from trpo_jax.environments.base import Box, Discrete, Environment, key_shape
from trpo_jax.environments.make import make_environment
from trpo_jax.networks import make_policy, make_value, make_value_head, on_inputs
from trpo_jax.steps.distributions import Categorical, MultiCategorical
from trpo_jax.steps.statistics import RunningStatistics, normalize
from trpo_jax.steps.trees import check_parameters
from trpo_jax.steps.types import Array, PyTree
from trpo_jax.training.recurrence import Sequence, advance, initial_carries, unroll
from trpo_jax.types import Network


class Agent(NamedTuple):
    """What a `Config` stands for: the environment and the two networks."""

    environment: Environment
    policy: Network
    value: Network


def make_agent(config: Config) -> Agent:
    """Build the environment and the networks that a configuration names; raise `UsageError` for what cannot be."""
    validate(config)
    _check_scalars(config)
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


def _check_scalars(config: Config) -> None:
    """Raise `UsageError` if a setting has several values where one agent trains; within `vmap` it has but one."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, (jax.Array, np.ndarray)) and value.shape != ():
            raise UsageError(
                f"{field.name} must be one number for one agent, got an array of shape {value.shape}; map over its "
                "values by jax.vmap."
            )


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


def init_parameters(network: Network, key: Array, observation: Array, name: str) -> PyTree:
    """The parameters that a network starts from, all of them arrays of floats."""
    params = network.init(key, observation)
    try:
        check_parameters(params, name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return params


def check_networks(config: Config, agent: Agent, policy_params: PyTree, value: Network, value_params: PyTree) -> None:
    """Raise `UsageError` unless the networks give what the environment and the trainer ask for, by tracing alone.

    Args:
      config: the settings.
      agent: the environment and the policy.
      policy_params: parameters of the policy.
      value: the value function, of observations.
      value_params: its parameters.
    """
    name, space, shape = agent.environment.name, agent.environment.action_space, agent.environment.observation_shape
    sizes: list[Any] = []
    batch: tuple[int, ...] = (3,)
    observation = jax.ShapeDtypeStruct((*batch, *shape), jnp.float32)

    def act(params: PyTree, observation: Array, key: Array) -> tuple[Array, Array, Array]:
        distribution = _checked_step("policy", agent.policy, params, observation)
        for method in ("sample", "log_prob", "entropy", "kl", "mode", "fisher_product"):
            if not callable(getattr(distribution, method, None)):
                raise UsageError(
                    f"policy must give a distribution such as Categorical(logits), but gives {_kind(distribution)}, "
                    f"which has no {method}()."
                )
        sizes.append(_sizes(distribution))
        action = distribution.sample(key)
        return action, distribution.log_prob(action), distribution.entropy()

    action, *per_sample = jax.eval_shape(act, policy_params, observation, key_shape())
    fits = "an action of {} is {} of shape {} for each observation".format(
        space, "a float array" if isinstance(space, Box) else "an integer array", space.shape
    )
    kind = jnp.floating if isinstance(space, Box) else jnp.integer
    if action.shape != (*batch, *space.shape) or not jnp.issubdtype(action.dtype, kind):
        raise UsageError(
            f"policy gives actions {action.dtype}{list(action.shape)} for {batch[0]} observations, which do not fit "
            f"{name}: {fits}."
        )
    wanted = None if isinstance(space, Box) else (space.n,) if isinstance(space, Discrete) else space.n
    if sizes[0] not in (None, wanted):
        raise UsageError(f"policy chooses among {_join(sizes[0])} actions, but {name} has {_join(wanted)}: {space}.")
    for leaf in per_sample:
        _check_shape("policy", "log-probabilities and entropies", leaf, batch)
    if value.initial_carry is None:  # it is asked about whole rollouts, too
        batch = (2, 3)
        observation = jax.ShapeDtypeStruct((*batch, *shape), jnp.float32)
    values = jax.eval_shape(lambda p, o: _checked_step("value", value, p, o), value_params, observation)
    _check_shape("value", "values", values, batch)


def _checked_step(name: str, network: Network, params: PyTree, observation: Array) -> Any:
    """The output for a batch [B, ...] at an episode's start; a memory must come back as it was given."""
    carry = initial_carries(network, observation.shape[0])
    after, output = advance(network, params, carry, observation)
    before, after = (jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), c) for c in (carry, after))
    if before != after:
        raise UsageError(f"{name} must give back a carry like its initial_carry, {before}, but gives {after}.")
    return output


def _check_shape(name: str, what: str, leaf: Any, batch: tuple[int, ...]) -> None:
    if getattr(leaf, "shape", None) != batch or not jnp.issubdtype(leaf.dtype, jnp.floating):
        found = f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else _kind(leaf)
        raise UsageError(
            f"{name} must give {what} as floats of the batch shape of its observations, {list(batch)} for "
            f"[{', '.join(map(str, batch))}, ...], but gives {found}."
        )


def _kind(output: Any) -> str:
    return "an array" if isinstance(output, jax.Array) else f"a {type(output).__name__}"


def _sizes(distribution: Any) -> tuple[int, ...] | None:
    """Among how many actions each choice is; None for what is not a choice, or of the user's own kind."""
    if isinstance(distribution, Categorical):
        return (distribution.logits.shape[-1],)
    if isinstance(distribution, MultiCategorical):
        return tuple(logits.shape[-1] for logits in distribution.logits)
    return None


def _join(sizes: Any) -> str:
    return " x ".join(map(str, sizes))


def is_recurrent(agent: Agent) -> bool:
    """Whether one of the networks has a memory."""
    return agent.policy.initial_carry is not None or agent.value.initial_carry is not None


def on_normalized(config: Config, statistics: RunningStatistics, network: Network) -> Network:
    """A network on observations as the settings have them normalised."""
    if not config.normalize_observations:
        return network

    def normalized(observation: Array) -> Array:
        return normalize(statistics, observation, clip=config.observation_clip)

    return on_inputs(network, normalized)


def trunk_of(policy: Network) -> Network:
    """The policy without its last layer: its output is features."""
    assert policy.features is not None
    return policy._replace(apply=policy.features, on_inputs=None)


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
