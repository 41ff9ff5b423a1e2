"""Checks that a trained state fits the settings that it is used with, by shapes alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax.environments.base import key_shape
from trpo_jax.sentences import UsageError, shown
from trpo_jax.steps.statistics import init_statistics
from trpo_jax.steps.types import PyTree
from trpo_jax.training.agents import Agent
from trpo_jax.training.learner import init_learner
from trpo_jax.training.state import LearnerState, TrainState


def check_is_state(state: Any, name: str) -> None:
    """Raise `UsageError` unless trained agents are given as a `TrainState`."""
    if not isinstance(state, TrainState):
        raise UsageError(f"{name} must be a TrainState, such as `load_run(folder)[1]`, got {shown(state)}.")


def check_acts(agent: Agent, state: TrainState) -> None:
    """Raise `UsageError` unless the policy of these settings can act with the parameters in a state."""
    check_is_state(state, "state")
    observation = _observation(agent)
    policy = jax.eval_shape(agent.policy.init, key_shape(), observation)
    _check_learner(replace(state.learner, policy_params=policy, statistics=init_statistics(observation.shape)), state)


def check_learns(agent: Agent, state: TrainState) -> None:
    """Raise `UsageError` unless training with these settings can go on from a state."""
    check_is_state(state, "state")
    config, observation, buffer = agent.config, _observation(agent), state.learner.buffer
    blank = init_statistics(observation.shape)
    fresh = jax.eval_shape(lambda key, seen: init_learner(agent, key, key, seen, blank), key_shape(), observation)
    _check_learner(replace(fresh, buffer=buffer), state)
    if (buffer is None) != (config.reuse == 1):
        raise UsageError(
            f"the state was not trained with reuse={config.reuse}; use the value that it was trained with."
        )
    seen = jax.ShapeDtypeStruct((config.num_envs, *observation.shape), observation.dtype)
    check_like({"observation": seen}, {"observation": state.actor.observation}, "state", _MEND, dtypes=False)


def check_like(wanted: PyTree, found: PyTree, what: str, mend: str, *, dtypes: bool = True) -> None:
    """Raise `UsageError` unless a tree has the leaves that the settings need, of the same shapes and dtypes."""

    def forms(tree: PyTree) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path).lstrip("."): f"{jnp.result_type(leaf) if dtypes else ''}{list(jnp.shape(leaf))}"
            for path, leaf in leaves
        }

    wanted, found = forms(wanted), forms(found)
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            raise UsageError(
                f"the {what} does not fit the settings: its {name} is {found.get(name, 'missing')}, but they need "
                f"{wanted.get(name, 'none')}; {mend}."
            )


_MEND = "use the settings that it was trained with, and jax.vmap for several agents"


def _check_learner(wanted: LearnerState, state: TrainState) -> None:
    check_like(wanted, state.learner, "state", _MEND, dtypes=False)


def _observation(agent: Agent) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(agent.environment.observation_shape, jnp.float32)
