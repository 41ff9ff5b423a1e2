"""Start of training from trained networks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from trpo_jax.config_pytree import Config
from trpo_jax.environments.changes import OF_OBSERVATIONS, named_in
from trpo_jax.fields import AUTO
from trpo_jax.networks.bodies import auto_resolved
from trpo_jax.steps.types import Array
from trpo_jax.training.agents import make_agent
from trpo_jax.training.fit_checks import check_is_state, check_like
from trpo_jax.training.loop import init
from trpo_jax.training.state import TrainState


def warm_start(config: Config, key: Array, trained: TrainState) -> TrainState:
    """Build the state before the first iteration, with the networks of a trained agent.

    Policy, value function, and statistics of observations and returns are the trained agent's. Environments, iteration,
    earlier batches, and the states of the algorithms start afresh.

    Args:
      config: the settings, with the same networks as the trained agent.
      key: a typed PRNG key, see `init`.
      trained: one agent.

    Raises:
      UsageError: if its networks do not fit the settings.
    """
    check_is_state(trained, "trained")
    agent, state = make_agent(config), init(config, key)
    fresh, old = state.learner, trained.learner
    mend = "use the network settings that it was trained with"
    check_like(fresh.policy_params, old.policy_params, "policy to start from", mend)
    check_like(fresh.value_params, old.value_params, "value function to start from", mend)
    check_like(fresh.statistics, old.statistics, "normalisation of observations to start from", mend)
    known = old.statistics.count > 0  # an agent that normalises nothing has counted nothing
    statistics = jax.tree.map(lambda new, old: jnp.where(known, old, new), fresh.statistics, old.statistics)
    both = fresh.return_statistics is not None and old.return_statistics is not None
    learner = dataclasses.replace(
        fresh,
        policy_params=old.policy_params,
        value_params=old.value_params,
        update=agent.algorithm.init(ravel_pytree(old.policy_params)[0], statistics),
        value_fit=agent.value_fit.init(old.value_params),
        statistics=statistics,
        return_statistics=old.return_statistics if both else fresh.return_statistics,
    )
    return dataclasses.replace(state, learner=learner)


def what_shapes_hide(config: Config) -> dict[str, Any]:
    """The settings that decide what networks compute, or in which units, although their shapes do not show it."""
    names = "normalize_observations", "action_distribution", "value_observation"
    found = {name: getattr(config, name) for name in names}
    found["wrappers"] = named_in(config.wrappers, OF_OBSERVATIONS)
    _, found["activation"] = auto_resolved(make_agent(config).environment, AUTO, config.network, config.activation)
    if config.normalize_observations:
        found["observation_clip"] = config.observation_clip
    if config.state_dependent_std:
        found["initial_log_std"] = config.initial_log_std
    found["normalize_rewards"] = config.normalize_rewards  # the units of the value function
    return found
