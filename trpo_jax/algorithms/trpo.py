"""Trust region policy optimization, with a radius that is fixed or adapts to the results of earlier updates."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from trpo_jax.algorithms.base import Algorithm, Experience, annealed, bonus_of
from trpo_jax.algorithms.radius_rules import RADIUS_RULES
from trpo_jax.config import Config
from trpo_jax.steps.line_searches import backtracking_line_search, full_step, parallel_line_search
from trpo_jax.steps.objectives import maximum_kl, mean_kl, reverse_kl
from trpo_jax.steps.policy_updates import UpdateInfo, held_out_gain, surrogate_gradient
from trpo_jax.steps.solvers import Solver
from trpo_jax.steps.trust_region import trpo_update
from trpo_jax.steps.types import Array, PolicyApply, PyTree

_SMALLEST_SHARE = 1e-3  # of δ, where the value function explains nothing; none at all would look like a refused step
CONSTRAINTS = {"mean-kl": mean_kl, "max-kl": maximum_kl, "reverse-kl": reverse_kl}


def make(config: Config) -> Algorithm:
    """Build TRPO for these settings."""
    rule = RADIUS_RULES[config.radius_rule]

    def update(
        policy_apply: PolicyApply, params: Array, state: PyTree, experience: Experience, key: Array
    ) -> tuple[Array, PyTree, UpdateInfo]:
        state, first_radius, gain_ratio = rule.before(config, policy_apply, params, state, experience)
        radius = radius_of(config, first_radius, experience)
        new_params, info = trpo_update(
            policy_apply,
            params,
            experience.batch,
            max_kl=radius,
            kl_penalty=config.kl_penalty,
            constraint=CONSTRAINTS[config.constraint],
            fisher_fraction=config.fisher_fraction,
            solver=Solver(config.cg_damping, config.cg_iterations, config.cg_tolerance),
            line_search=line_search_of(config),
            entropy_coefficient=config.entropy_coefficient,
            bonus=bonus_of(config),
            num_steps=config.natural_gradient_steps,
            clip_ratio=config.clip_ratio,
            last_step=experience.last_step if config.reuse == 1 else None,
        )
        state = rule.after(config, params, state, experience, info, radius)
        extra = {**info.extra, "radius": jnp.asarray(radius, jnp.float32), "gain_ratio": gain_ratio}
        if config.reuse > 1:  # the step before has seen a part of the batch
            gradient, _ = surrogate_gradient(
                policy_apply,
                params,
                experience.held_out,
                entropy_coefficient=config.entropy_coefficient,
                bonus=bonus_of(config),
            )
            extra |= held_out_gain(gradient, experience.last_step)
        return new_params, state, dataclasses.replace(info, extra=extra)

    return Algorithm(functools.partial(rule.init, config), update)


def line_search_of(config: Config) -> functools.partial[Any]:
    """The line search for these settings."""
    searches = {"none": full_step, "parallel": parallel_line_search}
    search = searches.get(config.line_search, backtracking_line_search)
    return functools.partial(search, shrink=config.line_search_shrink, max_steps=config.line_search_steps)


def radius_of(config: Config, radius: Array, experience: Experience) -> Array:
    """The trust-region radius of this update, nats, from δ of the radius rule.

    Where the batch has samples up to K − 1 policies old, the changes of the policy since then have used up part of the
    trust region: δ / (Σ_i ν_i (i + 1))², where ν_i is the share of samples that are i policies old (Queeney et al.
    2021, with δ = ε²/2).

    Where the value function has an explained variance E below `smallest_explained_variance` = E_min, the advantages are
    mostly its errors: δ E/E_min, and never less than δ/1000. So it mostly is once all episodes end alike. While returns
    differ and the value function has been fitted, E is well above 0.
    """
    radius = annealed(radius, config.anneal_max_kl, config, experience.iteration)
    if config.reuse > 1:
        age = jnp.minimum(np.arange(config.reuse), experience.iteration)
        radius /= jnp.mean(age + 1.0) ** 2
    smallest = jnp.asarray(config.smallest_explained_variance)
    share = experience.explained_variance / jnp.where(smallest > 0, smallest, 1)
    return radius * jnp.where((smallest > 0) & (share < 1), jnp.maximum(share, _SMALLEST_SHARE), 1)
