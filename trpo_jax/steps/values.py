"""Fits of the value function to λ-returns, and their quality."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import chex
import jax
import jax.numpy as jnp

from trpo_jax.steps import defaults
from trpo_jax.steps.blocks import forward_and_gradient
from trpo_jax.steps.curvature import curvature_sample, fisher_vector_product
from trpo_jax.steps.distributions import DiagonalGaussian
from trpo_jax.steps.line_searches import backtracking_line_search
from trpo_jax.steps.minibatches import minibatch_descent
from trpo_jax.steps.solvers import Solver, conjugate_gradient
from trpo_jax.steps.statistics import varies
from trpo_jax.steps.trees import check_parameters, max_abs, maximum
from trpo_jax.steps.types import Array, PyTree, Scalar, at_least_float32, check_count, check_scalars

if TYPE_CHECKING:
    import optax

_SOLVER = Solver(defaults.VALUE_DAMPING, defaults.VALUE_CG_ITERATIONS, defaults.CG_TOLERANCE)
_TRIED_ON = 1024  # samples on which a step is tested; the whole of a larger batch tells no more


def gauss_newton_fit(
    value_apply: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    observation: PyTree,
    target: Array,
    *,
    solver: Solver = _SOLVER,
    fisher_fraction: float = defaults.FISHER_FRACTION,
    sample_ndim: int | None = None,
    num_steps: int = 1,
) -> tuple[PyTree, Array]:
    """Fit V by damped Gauss–Newton steps on ½ mean_n[(V(s_n) − target_n)²], with the machinery of the policy step.

    A step is x ≈ (G + λ I)⁻¹ mean_n[(target_n − V(s_n)) ∇V(s_n)] with G = mean_n[∇V ∇Vᵀ], the Fisher matrix of
    N(V(s), 1), solved by conjugate gradient. It is halved until the loss falls; for a larger batch, this loss is
    computed on 1024 samples spread over it. Such a step fits as well as dozens of Adam steps at the price of a few, and
    has no learning rate. Further ones start from its result, with G and the gradient anew.

    Args:
      value_apply: `value_apply(params, observation)` -> values [B].
      params: parameters of the value function, a pytree.
      observation: [B, ...], an array or a pytree of arrays.
      target: [B], B of any rank.
      solver: settings of the solver, including λ.
      fisher_fraction: share of the batch from which G is estimated, as in `trpo_update`.
      sample_ndim: number of leading axes of B that index independent samples, as in `trpo_update`.
      num_steps: steps, ≥ 1 (static).

    Returns:
      New parameters, and their mean squared error on those samples. If no step helps or any number is not finite, the
      parameters are returned bit for bit.

    Raises:
      ValueError: if the parameters are not arrays of floats, `num_steps` is not a whole number ≥ 1, or the batch is
        empty.

    Source: Schulman et al. 2016, section 5 (there with a trust region in place of the damping).
    """
    check_parameters(params)
    check_count("num_steps of a value fit", num_steps)
    target = at_least_float32(target)
    if not target.size:
        raise ValueError("the batch of a value fit has no samples")

    def cotangent(values: Array, target: Array) -> Array:
        chex.assert_equal_shape([values, target])
        return ((target - values) / values.size).astype(values.dtype)

    sample_shape = target.shape[:sample_ndim]
    sample = curvature_sample(observation, sample_shape, fisher_fraction)
    share = min(1.0, _TRIED_ON / target.size)
    tried, tried_target = curvature_sample((observation, target), sample_shape, share)

    def improve(params: PyTree) -> tuple[PyTree, Array]:
        values, ascent = forward_and_gradient(value_apply, params, observation, cotangent, target)
        loss = jnp.mean(curvature_sample(target - values, sample_shape, share) ** 2)

        def distribution_fn(params: PyTree) -> DiagonalGaussian:
            return DiagonalGaussian(value_apply(params, sample)[..., None], jnp.zeros(1, values.dtype))

        matvec = fisher_vector_product(distribution_fn, params, damping=solver.damping)
        step, _ = conjugate_gradient(matvec, ascent, num_iterations=solver.iterations, tolerance=solver.tolerance)

        def evaluate(candidate: PyTree) -> tuple[Array, Array]:
            gain = loss - jnp.mean((tried_target - value_apply(candidate, tried)) ** 2)
            return gain, jnp.zeros_like(gain)

        params, info = backtracking_line_search(evaluate, params, step, max_kl=0.0, shrink=0.5, max_steps=5)
        return params, loss - info.surrogate_gain

    if num_steps == 1:  # without a loop, in which XLA may round otherwise
        return improve(params)
    params, losses = jax.lax.scan(lambda params, _: improve(params), params, length=num_steps)
    return params, losses[-1]


def fit_value_function(
    value_apply: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    optimizer_state: optax.OptState,
    observation: PyTree,
    target: Array,
    *,
    old_values: Array | None = None,
    clip: Scalar = 0.0,
    optimizer: optax.GradientTransformation,
    epochs: int,
    minibatches: int,
    key: Array | None = None,
    sample_ndim: int | None = None,
) -> tuple[PyTree, optax.OptState, Array]:
    """Fit V by minibatch steps of an optax optimizer on mean_n[(V(s_n) − target_n)²].

    Args:
      value_apply: `value_apply(params, observation)` -> values [B].
      params: parameters of the value function, a pytree.
      optimizer_state: `optimizer.init(params)`, or the state that the last call returned.
      observation: [B, ...], an array or a pytree of arrays.
      target: [B].
      old_values: V(s_n) before the fit, [B], needed for `clip`.
      clip: ε > 0 replaces the squared error of each sample by the larger of two, that of V and that of V clipped to its
        old value ± ε, as in PPO (Engstrom et al. 2020); 0 does not.
      optimizer: an optax transformation.
      epochs: passes over the batch (static).
      minibatches: M, which must divide the number of samples (static).
      key: PRNG key that reshuffles the samples in every epoch. None: minibatch m of every epoch holds the samples m,
        m + M, m + 2M, … of the flattened batch.
      sample_ndim: number of leading axes of B that index independent samples, as in `trpo_update`.

    Returns:
      New parameters, new optimizer state, and the mean loss over the last epoch. If any of the new numbers is not
      finite, parameters and state are returned unchanged.

    Raises:
      ValueError: if `clip` is given without `old_values`, the parameters are not arrays of floats, or `minibatches`
        does not divide the number of samples.
    """
    if old_values is None and not (isinstance(clip, (int, float)) and clip == 0):
        raise ValueError("clip needs old_values, the values of the samples before the fit")
    check_scalars(clip=clip)
    check_parameters(params)
    target = at_least_float32(target)

    def loss_fn(params: PyTree, observation: PyTree, target: Array, old_values: Array) -> Array:
        values = value_apply(params, observation)
        chex.assert_equal_shape([values, target, old_values])
        error = (values - target) ** 2
        clipped = (jnp.clip(values, old_values - clip, old_values + clip) - target) ** 2
        return jnp.mean(jnp.where(jnp.asarray(clip) > 0, jnp.maximum(error, clipped), error))

    return minibatch_descent(
        loss_fn,
        params,
        optimizer_state,
        (observation, target, target if old_values is None else at_least_float32(old_values)),
        target.shape[:sample_ndim],
        optimizer=optimizer,
        epochs=epochs,
        minibatches=minibatches,
        key=key,
    )


def explained_variance(values: Array, targets: Array) -> Array:
    """Compute 1 − Var[targets − values] / Var[targets]: 1 is perfect, 0 a constant's worth. Constant targets give 0."""
    values, targets = at_least_float32(values), at_least_float32(targets)
    variance = jnp.var(targets)
    varied = varies(maximum(targets) + maximum(-targets), max_abs(targets))
    return jnp.where(varied, 1 - jnp.var(targets - values) / jnp.where(varied, variance, 1), 0)
