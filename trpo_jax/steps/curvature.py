"""The Fisher matrix of a policy as an implicit product, F v = Jᵀ (M (J v)).

J is the Jacobian of the distribution's parameters with respect to θ, M the distribution's own Fisher matrix. This is
the Gauss–Newton form; at θ_old it equals the Hessian of the mean KL divergence, in either direction.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.steps.trees import check_batched
from trpo_jax.steps.types import Array, DistributionFn, Matvec, PyTree, Scalar, at_least_float32, check_scalars


def fisher_vector_product(
    distribution_fn: DistributionFn,
    params: PyTree,
    *,
    damping: Scalar = 0.0,
    weight: Array | None = None,
) -> Matvec:
    """Linearise a policy once and return v ↦ (F + damping · I) v.

    F = 1/B Σ_n Jₙᵀ Mₙ Jₙ, with B the batch size. The forward pass is done here; each product then costs one
    tangent and one transposed pass (7–8 B·P FLOP for P parameters, half of differentiating the KL twice).

    Args:
      distribution_fn: `distribution_fn(params)` -> distribution with batch shape [B] (any rank).
      params: θ, a pytree of float arrays.
      damping: λ_d ≥ 0 added to the diagonal.
      weight: sample weights, of the batch shape, which replace the plain mean by 1/B Σ_n weightₙ(…).

    Returns:
      A function from a pytree like `params` to a pytree like `params`.

    Raises:
      ValueError: if `damping` is not a number, an array of the distribution does not begin with the batch shape, or
        `weight` does not have it.

    Source: Schulman et al. 2015, Appendix C; Martens 2020 on the Gauss–Newton form.
    """
    check_scalars(damping=damping)
    # TF32 and bfloat16 products lose three digits, an error as large as the KL itself.
    with jax.default_matmul_precision("highest"):
        distribution, push_forward = jax.linearize(distribution_fn, params)
    pull_back = jax.linear_transpose(push_forward, params)
    batch_shape = jax.eval_shape(lambda d: d.entropy(), distribution).shape
    check_batched(distribution, batch_shape)
    batch_size = math.prod(batch_shape)
    if weight is not None and jnp.shape(weight) != batch_shape:
        raise ValueError(f"weight must have the shape of the batch, {batch_shape}, got {jnp.shape(weight)}")

    def weighted(leaf: Array) -> Array:
        # In float32 at least: in float16 a large batch size is infinite. Then back to the cotangent's own type.
        wide = at_least_float32(leaf)
        if weight is None:
            return (wide / batch_size).astype(leaf.dtype)
        each = (weight / batch_size).reshape(batch_shape + (1,) * (leaf.ndim - len(batch_shape)))
        return (wide * each).astype(leaf.dtype)

    def matvec(vector: PyTree) -> PyTree:
        cotangent = distribution.fisher_product(push_forward(vector))
        (product,) = pull_back(jax.tree.map(weighted, cotangent))
        return jax.tree.map(lambda f, v: (f + damping * v).astype(v.dtype), product, vector)  # λ_d may be wider

    return matvec


def curvature_sample(observation: PyTree, batch_shape: tuple[int, ...], fraction: float) -> PyTree:
    """Select an evenly spread fraction of a batch, from which to estimate the curvature.

    Args:
      observation: [*batch_shape, ...], an array or a pytree of arrays.
      batch_shape: shape of the batch.
      fraction: in (0, 1], a Python number (static). A larger one includes the samples of a smaller one.

    Raises:
      ValueError: if `fraction` is not a number in (0, 1].
    """
    if not isinstance(fraction, (int, float, np.number)) or not 0 < fraction <= 1:
        raise ValueError(f"fisher_fraction must lie in (0, 1], got {fraction!r}")
    if fraction == 1:
        return observation
    batch_size = math.prod(batch_shape)
    # Ranked by the golden-ratio sequence, the first n samples are spread evenly for every n; periodic choices would
    # alias with the number of environments.
    rank = np.argsort(np.argsort(np.arange(batch_size) * 0.6180339887498949 % 1.0))
    chosen = np.flatnonzero(rank < max(1, round(float(np.float32(fraction) * np.float32(batch_size)))))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(batch_shape) :])[chosen], observation)
