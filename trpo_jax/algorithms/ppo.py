"""Proximal policy optimization: epochs of minibatches on the clipped surrogate (Schulman et al. 2017)."""

from __future__ import annotations

from trpo_jax.algorithms.base import Algorithm, Experience, bonus_of, policy_optimizer
from trpo_jax.config import Config
from trpo_jax.steps.first_order import first_order_update
from trpo_jax.steps.objectives import Objective, clipped_objective
from trpo_jax.steps.policy_updates import UpdateInfo
from trpo_jax.steps.types import Array, PolicyApply, PyTree


def make(config: Config) -> Algorithm:
    """Build PPO in its usual form: every epoch reshuffles the minibatches, and gradients are clipped."""

    def update(
        policy_apply: PolicyApply, params: Array, state: PyTree, experience: Experience, key: Array
    ) -> tuple[Array, PyTree, UpdateInfo]:
        return take_epochs(config, policy_apply, params, state, experience, key, clipped_objective(config.clip_ratio))

    return Algorithm(lambda params, statistics: policy_optimizer(config).init(params), update, shuffles=True)


def take_epochs(
    config: Config,
    policy_apply: PolicyApply,
    params: Array,
    state: PyTree,
    experience: Experience,
    key: Array,
    objective: Objective,
) -> tuple[Array, PyTree, UpdateInfo]:
    """Maximise an objective by `policy_epochs` epochs of shuffled minibatches."""
    return first_order_update(
        policy_apply,
        params,
        state,
        experience.batch,
        optimizer=policy_optimizer(config, experience.iteration),
        objective=objective,
        epochs=config.policy_epochs,
        minibatches=config.policy_minibatches,
        entropy_coefficient=config.entropy_coefficient,
        bonus=bonus_of(config),
        key=key,
        max_grad_norm=config.max_grad_norm,
        last_step=experience.last_step,
    )
