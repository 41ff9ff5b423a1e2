"""Minorize–maximize with a penalty: epochs on ratio · A − β KL, with an adaptive β (Schulman et al. 2017)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from trpo_jax.algorithms.base import Algorithm, Experience, policy_optimizer
from trpo_jax.algorithms.ppo import take_epochs
from trpo_jax.algorithms.radius_rules import effective_divergence
from trpo_jax.config import Config
from trpo_jax.steps.objectives import penalized_objective
from trpo_jax.steps.policy_updates import UpdateInfo
from trpo_jax.steps.radii import adapt_radius_by_divergence
from trpo_jax.steps.statistics import RunningStatistics
from trpo_jax.steps.types import Array, PolicyApply, PyTree

_INVERSE_PENALTIES = 1e-4, 1e4  # bounds of 1/β


class PenaltyState(NamedTuple):
    """State of the optimizer, and the coefficient β of the KL for the next update."""

    optimizer: PyTree
    penalty: Array


def make(config: Config) -> Algorithm:
    """Build the KL-penalty algorithm for these settings."""

    def init(params: Array, statistics: RunningStatistics) -> PenaltyState:
        return PenaltyState(policy_optimizer(config).init(params), jnp.float32(config.initial_penalty))

    def update(
        policy_apply: PolicyApply, params: Array, state: PenaltyState, experience: Experience, key: Array
    ) -> tuple[Array, PenaltyState, UpdateInfo]:
        objective = penalized_objective(state.penalty)
        params, optimizer, info = take_epochs(config, policy_apply, params, state.optimizer, experience, key, objective)
        target = config.target_kl
        # A penalty is the inverse of a radius.
        inverse = adapt_radius_by_divergence(
            1 / state.penalty, effective_divergence(info, target), target, *_INVERSE_PENALTIES
        )
        info = dataclasses.replace(info, extra={**info.extra, "penalty": state.penalty})
        return params, PenaltyState(optimizer, 1 / inverse), info

    return Algorithm(init, update, shuffles=True)
