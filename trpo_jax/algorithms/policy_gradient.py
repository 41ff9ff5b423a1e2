"""The plain policy gradient: one step along mean_n[∇log π(a_n|s_n) · A_n], by Adam or as θ + α g (Williams 1992)."""

from __future__ import annotations

from trpo_jax.algorithms.base import Algorithm, Experience, bonus_of, policy_optimizer
from trpo_jax.config import Config
from trpo_jax.steps.first_order import first_order_update
from trpo_jax.steps.policy_updates import UpdateInfo
from trpo_jax.steps.types import Array, PolicyApply, PyTree


def make(config: Config) -> Algorithm:
    """Build the policy-gradient algorithm: one step per batch, after which the batch no longer gives the gradient."""

    def update(
        policy_apply: PolicyApply, params: Array, state: PyTree, experience: Experience, key: Array
    ) -> tuple[Array, PyTree, UpdateInfo]:
        return first_order_update(
            policy_apply,
            params,
            state,
            experience.batch,
            optimizer=policy_optimizer(config, experience.iteration),
            entropy_coefficient=config.entropy_coefficient,
            bonus=bonus_of(config),
            last_step=experience.last_step,
        )

    return Algorithm(lambda params, statistics: policy_optimizer(config).init(params), update)
