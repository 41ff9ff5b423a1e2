"""The policy update and the value fit that the settings name, on a flat batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from trpo_jax import backend
from trpo_jax.config import Config
from trpo_jax.steps.first_order import clipped_objective, first_order_update, penalized_objective, surrogate_objective
from trpo_jax.steps.line_searches import backtracking_line_search, full_step, parallel_line_search
from trpo_jax.steps.statistics import varies
from trpo_jax.steps.trust_region import UpdateInfo, trpo_update
from trpo_jax.steps.types import Array, PyTree, Scalar, at_least_float32
from trpo_jax.steps.values import fit_value_function, gauss_newton_fit
from trpo_jax.types import Learned


def normalize_weights(config: Config, weight: Array, of: Array | None = None) -> tuple[Array, Array]:
    """The number that the weights of the actions are divided by, and what the update is given.

    Advantages are centred and divided by their standard deviation; equal ones, but for the rounding of what they are
    differences `of`, say nothing and become 0. Without a baseline the weights are returns, which are divided by the
    root of their mean square: to subtract their mean would be a baseline after all.
    """
    if not config.normalize_advantages:
        return jnp.ones_like(weight.ravel()[0]), weight
    weight = at_least_float32(weight)
    if not config.baseline:
        size = jnp.sqrt(jnp.mean(weight**2))
        scale = jnp.where(size > 0, size, 1)
        return scale, weight / scale
    smallest, largest = jnp.min(weight), jnp.max(weight)
    magnitude = jnp.maximum(jnp.abs(smallest), jnp.abs(largest))
    if of is not None:
        magnitude = jnp.maximum(magnitude, jnp.max(jnp.abs(of)))
    spread = largest - smallest
    varied = varies(spread, magnitude)
    scale = jnp.where(varied, jnp.std(weight), 1)
    # What is not finite stays so, for the update to refuse.
    return scale, jnp.where(varied | ~jnp.isfinite(spread), (weight - jnp.mean(weight)) / scale, 0)


def update_policy(
    config: Config,
    policy_apply: Any,
    old: Learned,
    observation: Array,
    action: Array,
    weight: Array,
    *,
    radius: Array,
    learning_rate: Scalar,
    key: Array,
    behaviour_log_prob: Array | None = None,
    sample_ndim: int | None = None,
) -> tuple[PyTree, PyTree, UpdateInfo]:
    """The update that the settings name on a flat batch: new parameters, optimizer state, and what it did."""
    # One flat vector instead of a pytree halves the time to compile the solver.
    vector, unravel = ravel_pytree(old.policy_params)

    def apply(vector: Array, observation: Array) -> Any:
        return policy_apply(unravel(vector), observation)

    if config.update == "trpo":
        vector, info = trpo_update(
            apply,
            vector,
            observation,
            action,
            weight,
            max_kl=radius,
            cg_damping=config.cg_damping,
            cg_iterations=config.cg_iterations,
            cg_tolerance=config.cg_tolerance,
            line_search_shrink=config.line_search_shrink,
            line_search_steps=config.line_search_steps,
            fisher_fraction=config.fisher_fraction,
            line_search=line_search_of(config),
            constraint=config.constraint,
            entropy_coefficient=config.entropy_coefficient,
            behaviour_log_prob=behaviour_log_prob,
            sample_ndim=sample_ndim,
        )
        return unravel(vector), old.policy_optimizer, info
    objectives = {
        "policy-gradient": surrogate_objective,
        "ppo": clipped_objective(config.clip_ratio),
        "kl-penalty": penalized_objective(old.control.penalty),
    }
    one_step = config.update == "policy-gradient"  # on one batch, further steps would no longer follow the gradient
    vector, optimizer_state, info = first_order_update(
        apply,
        vector,
        old.policy_optimizer,
        observation,
        action,
        weight,
        optimizer=_policy_optimizer(config, learning_rate),
        objective=objectives[config.update],
        epochs=1 if one_step else config.policy_epochs,
        minibatches=1 if one_step else config.policy_minibatches,
        entropy_coefficient=config.entropy_coefficient,
        key=key,
        max_grad_norm=0.0 if one_step else config.max_grad_norm,
        sample_ndim=sample_ndim,
    )
    return unravel(vector), optimizer_state, info


def line_search_of(config: Config) -> Callable[..., Any]:
    """The line search that the settings name on this backend."""
    if config.line_search == "none":
        return full_step
    parallel = not backend.candidates_take_turns() if config.line_search == "auto" else config.line_search == "parallel"
    return parallel_line_search if parallel else backtracking_line_search


def init_policy_optimizer(config: Config, policy_params: PyTree) -> PyTree:
    """State of the policy's optimizer before the first step; () for trpo."""
    return () if config.update == "trpo" else _policy_optimizer(config, 0.0).init(ravel_pytree(policy_params)[0])


def _policy_optimizer(config: Config, learning_rate: Any) -> Any:
    import optax

    return {"adam": optax.adam, "sgd": optax.sgd}[config.policy_optimizer](learning_rate)


def fit_value(
    config: Config,
    value_apply: Any,
    old: Learned,
    observation: Array,
    target: Array,
    values: Array,
    learning_rate: Scalar,
    key: Array,
    sample_ndim: int | None = None,
) -> tuple[PyTree, PyTree, Array]:
    """Fit the value function to a flat batch as the configuration says: new parameters, optimizer state, and loss."""
    if config.value_fit == "adam":
        import optax

        return fit_value_function(
            value_apply,
            old.value_params,
            old.value_optimizer,
            observation,
            target,
            old_values=values,
            clip=config.value_clip,
            optimizer=optax.adam(learning_rate),
            epochs=config.value_epochs,
            minibatches=config.value_minibatches,
            # As PPO's users know it. Beside other updates a shuffled fit did no better, and takes longer.
            key=key if config.update in ("ppo", "kl-penalty") else None,
            sample_ndim=sample_ndim,
        )
    vector, unravel = ravel_pytree(old.value_params)
    vector, loss = gauss_newton_fit(
        lambda v, observation: value_apply(unravel(v), observation),
        vector,
        observation,
        target,
        damping=config.value_damping,
        cg_iterations=config.value_cg_iterations,
        cg_tolerance=config.cg_tolerance,
        fisher_fraction=config.fisher_fraction,
        sample_ndim=sample_ndim,
    )
    return unravel(vector), old.value_optimizer, loss


def init_value_optimizer(config: Config, value_params: PyTree) -> PyTree:
    """State of the value function's optimizer before the first step; () for gauss-newton."""
    if config.value_fit != "adam":
        return ()
    import optax  # deferred: the default fit does not need it

    return optax.adam(0.0).init(value_params)
