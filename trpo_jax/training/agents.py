"""The parts that a `Config` selects: an environment, two networks, an algorithm and a value fit."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.algorithms.base import Algorithm, ValueFit, make_algorithm, make_value_fit
from trpo_jax.config import Config
from trpo_jax.env_args import PREFIX
from trpo_jax.environments.base import Box, Environment, key_shape, sizes_of
from trpo_jax.environments.entries import MASK, chosen
from trpo_jax.environments.hidden_entries import keep_entries
from trpo_jax.environments.make import environment_of
from trpo_jax.fields import AUTO
from trpo_jax.networks.bodies import auto_resolved
from trpo_jax.networks.default import make_policy, make_value, make_value_head
from trpo_jax.networks.recurrent import Network, RecurrentNetwork, lift
from trpo_jax.sentences import UsageError
from trpo_jax.steps.distributions import Categorical, MultiCategorical
from trpo_jax.steps.statistics import RunningStatistics, normalize
from trpo_jax.steps.trees import check_parameters
from trpo_jax.steps.types import Array, PyTree
from trpo_jax.training.recurrence import initial_carries
from trpo_jax.validation import minibatches, validate


class Agent(NamedTuple):
    """The parts that a `Config` selects, built once for all stages of an iteration.

    Attributes:
      config: the settings.
      environment: the environment that the agent acts in.
      policy: the policy, on observations as the environment gives them.
      value: the value function; with `shared_trunk` its head, on the policy's features.
      algorithm: how the policy is updated.
      value_fit: how the value function is fitted.
    """

    config: Config
    environment: Environment
    policy: RecurrentNetwork
    value: RecurrentNetwork
    algorithm: Algorithm
    value_fit: ValueFit

    @property
    def is_recurrent(self) -> bool:
        """Whether the policy or the value function is recurrent; each sample is then a whole sequence."""
        return self.policy.is_recurrent or self.value.is_recurrent

    @property
    def sample_ndim(self) -> int | None:
        """Number of leading axes of a batch that index samples, see `Batch`; 1 (whole sequences) for recurrent ones."""
        return 1 if self.is_recurrent else None


def idle_in_environment(config: Config) -> dict[str, str]:
    """Settings of the default networks that have no effect in the environment of `config`, with the reasons."""
    environment, found = environment_of(config), {}
    if not isinstance(environment.action_space, Box):
        why = f"sets σ of a Gaussian policy, but {config.env} has discrete actions"
        found = dict.fromkeys(("initial_log_std", "state_dependent_std"), why)
    network, _ = auto_resolved(environment, AUTO, config.network, config.activation)
    if network != "cnn":
        found["channels"] = f"needs network=cnn; with network={network} it has no effect"
    return found


def make_agent(config: Config) -> Agent:
    """Build the parts that a configuration selects; raise `UsageError` for one that cannot be built."""
    validate(config)
    _check_scalars(config)
    environment = environment_of(config)
    if config.policy is None and config.value is None:
        environment = with_what_is_seen(environment, AUTO, config.value_observation)
    if config.bonus == "log-barrier" and isinstance(environment.action_space, Box):
        actions = f"{environment.name} has {environment.action_space}"
        raise UsageError(f"bonus=log-barrier needs discrete actions, but {actions}; leave it out.")
    policy, value = _make_networks(config, environment)
    agent = Agent(config, environment, lift(policy), lift(value), make_algorithm(config), make_value_fit(config))
    if config.shared_trunk:
        _check_trunk(agent)
    if agent.is_recurrent:
        _check_sequences(config)
    return agent


def _make_networks(config: Config, environment: Environment) -> tuple[Network, Network]:
    """The policy and the value function: those given, or the default ones for these settings."""
    style: dict[str, Any] = {name: getattr(config, name) for name in ("activation", "layer_norm", "initialisation")}
    layers: dict[str, Any] = {"network": config.network, "channels": config.channels, **style}
    policy = config.policy or make_policy(
        environment,
        hidden=config.hidden,
        action_distribution=config.action_distribution,
        initial_log_std=config.initial_log_std,
        state_dependent_std=config.state_dependent_std,
        **layers,
    )
    if config.value is not None:
        return policy, config.value
    if config.shared_trunk:
        return policy, make_value_head(config.value_hidden, **style)
    hidden = config.hidden if config.value_hidden == AUTO else config.value_hidden
    return policy, make_value(environment, observation=config.value_observation, hidden=hidden, **layers)


def with_what_is_seen(environment: Environment, *views: str) -> Environment:
    """Keep only the entries of observations that the given views select (see `value_observation`), and a mask."""
    if environment.entries is None:
        return environment
    seen = {entry for view in views for entry in chosen(environment.entries, view, environment.name)}
    return keep_entries(environment, [name for name in environment.entries if name in seen or name == MASK])


def _check_scalars(config: Config) -> None:
    """Raise `UsageError` if a setting is an array of several values; within `vmap` it is a single one."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in (values | {f"{PREFIX}{name}": value for name, value in config.env_args.items()}).items():
        if isinstance(value, (jax.Array, np.ndarray)) and value.shape != ():
            raise UsageError(
                f"{name} must be one number for one agent, got an array of shape {value.shape}; map over its "
                "values with jax.vmap."
            )


def _check_trunk(agent: Agent) -> None:
    if agent.policy.features is None:
        raise UsageError("shared_trunk=True needs a policy with features; give its Network features=..., or use False.")
    if agent.value.is_recurrent:
        raise UsageError("shared_trunk=True needs a value function that is not recurrent; only the policy may be.")


def _check_sequences(config: Config) -> None:
    """Check that samples can be whole sequences, one per environment, as a recurrent network needs."""
    if config.reuse > 1:
        raise UsageError(f"reuse={config.reuse} needs networks that are not recurrent, such as network=mlp.")
    for name, number in minibatches(config):
        if config.num_envs % number:
            raise UsageError(f"{name}={number} must divide num_envs={config.num_envs} for a recurrent network.")


def init_parameters(network: RecurrentNetwork, key: Array, observation: Array, name: str) -> PyTree:
    """The initial parameters of a network, checked to be arrays of floats."""
    params = network.init(key, observation)
    try:
        check_parameters(params, name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return params


def check_networks(agent: Agent, policy_params: PyTree, value: RecurrentNetwork, value_params: PyTree) -> None:
    """Raise `UsageError` unless the outputs of the networks fit the environment and the trainer, by tracing alone.

    Args:
      agent: the environment and the policy.
      policy_params: parameters of the policy.
      value: the value function of observations.
      value_params: its parameters.
    """
    name, space, shape = agent.environment.name, agent.environment.action_space, agent.environment.observation_shape
    sizes: list[Any] = []
    batch: tuple[int, ...] = (3,)
    observation = jax.ShapeDtypeStruct((*batch, *shape), jnp.float32)

    def act(params: PyTree, observation: Array, key: Array) -> tuple[Array, Array, Array]:
        distribution = _checked_step("policy", agent.policy, params, observation)
        bonus = ("log_barrier",) if agent.config.bonus == "log-barrier" else ()
        for method in ("sample", "log_prob", "entropy", "kl", "mode", "fisher_product", *bonus):
            if not callable(getattr(distribution, method, None)):
                raise UsageError(
                    "policy must return a distribution such as Categorical(logits), but returns "
                    f"{_kind(distribution)}, which has no {method}()."
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
            f"policy returns actions {action.dtype}{list(action.shape)} for {batch[0]} observations, which do not fit "
            f"{name}: {fits}."
        )
    wanted = None if isinstance(space, Box) else sizes_of(space)
    if sizes[0] not in (None, wanted):
        raise UsageError(f"policy chooses among {_join(sizes[0])} actions, but {name} has {_join(wanted)}: {space}.")
    for leaf in per_sample:
        _check_shape("policy", "log-probabilities and entropies", leaf, batch)
    if not value.is_recurrent:  # it is also evaluated on whole rollouts
        batch = (2, 3)
        observation = jax.ShapeDtypeStruct((*batch, *shape), jnp.float32)
    values = jax.eval_shape(lambda p, o: _checked_step("value", value, p, o), value_params, observation)
    _check_shape("value", "values", values, batch)


def _checked_step(name: str, network: RecurrentNetwork, params: PyTree, observation: Array) -> Any:
    """The output for a batch [B, ...] at the start of an episode, with a check of the recurrent state."""
    carry = initial_carries(network, observation.shape[0])
    after, output = network.step(params, carry, observation)
    before, after = (jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), c) for c in (carry, after))
    if before != after:
        raise UsageError(f"{name} must return a carry like its initial_carry, {before}, but returns {after}.")
    return output


def _check_shape(name: str, what: str, leaf: Any, batch: tuple[int, ...]) -> None:
    if getattr(leaf, "shape", None) != batch or not jnp.issubdtype(leaf.dtype, jnp.floating):
        found = f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else _kind(leaf)
        raise UsageError(
            f"{name} must return {what} as floats of the batch shape of its observations, {list(batch)} for "
            f"[{', '.join(map(str, batch))}, ...], but returns {found}."
        )


def _kind(output: Any) -> str:
    return "an array" if isinstance(output, jax.Array) else f"a {type(output).__name__}"


def _sizes(distribution: Any) -> tuple[int, ...] | None:
    """The number of actions in each choice; None for any other distribution."""
    if isinstance(distribution, Categorical):
        return (distribution.logits.shape[-1],)
    if isinstance(distribution, MultiCategorical):
        return tuple(logits.shape[-1] for logits in distribution.logits)
    return None


def _join(sizes: Any) -> str:
    return " x ".join(map(str, sizes))


def with_normalization(config: Config, statistics: RunningStatistics, network: RecurrentNetwork) -> RecurrentNetwork:
    """Add the normalisation of observations to a network, if `normalize_observations` is set."""
    if not config.normalize_observations:
        return network
    return network.with_inputs(lambda observation: normalize(statistics, observation, clip=config.observation_clip))


def trunk_of(policy: RecurrentNetwork) -> RecurrentNetwork:
    """The policy without its last layer; its outputs are features."""
    assert policy.features is not None
    return policy._replace(step=policy.features)


def on_trunk(policy: RecurrentNetwork, policy_params: PyTree, head: RecurrentNetwork) -> RecurrentNetwork:
    """Build a value function of observations from a policy's trunk and a head, with the head's parameters.

    Only the head is fitted. A step through the trunk would move the policy as well, after its line search and out of
    its trust region.
    """
    trunk = trunk_of(policy)

    def step(params: PyTree, carry: PyTree, observation: Array) -> tuple[PyTree, Any]:
        carry, features = trunk.step(policy_params, carry, observation)
        return carry, head.step(params, (), features)[1]

    def init(key: Array, observation: Array) -> PyTree:
        return head.init(key, trunk.step(policy_params, trunk.initial_carry(), observation)[1])

    return trunk._replace(init=init, step=step, features=None)
