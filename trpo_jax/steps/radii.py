"""Rules that adapt a trust-region radius to the success of the last step.

Plain functions of scalars, traced or not, for exact and for sampled problems. A ratio or a divergence may be infinite
or NaN.
"""

from __future__ import annotations

import jax.numpy as jnp

from trpo_jax.steps.types import Array, Scalar


def adapt_radius_by_ratio(radius: Scalar, ratio: Scalar, at_boundary: bool | Array, low: Scalar, high: Scalar) -> Array:
    """Adapt the radius to the accuracy of the predicted gain: r < ¼ → δ/4; r > ¾ at the boundary → 2δ; otherwise δ.

    Args:
      radius: δ > 0, in any unit: a length, or a KL divergence in nats.
      ratio: r, actual over predicted gain. One that is not finite counts as a failure.
      at_boundary: whether the step was as long as the radius allowed; if not, a larger one would not have mattered.
      low: δ_min, the smallest radius returned.
      high: δ_max, the largest.

    Returns:
      A scalar in [low, high].

    Source: Nocedal & Wright 2006, algorithm 4.1.
    """
    poor = ~(jnp.isfinite(ratio) & (ratio >= 0.25))
    good = (ratio > 0.75) & jnp.asarray(at_boundary, bool)
    return jnp.clip(radius * jnp.where(poor, 0.25, jnp.where(good, 2.0, 1.0)), low, high)


def adapt_radius_by_divergence(radius: Scalar, kl: Scalar, target: Scalar, low: Scalar, high: Scalar) -> Array:
    """Adapt the radius to the divergence of the last step: KL > 1.5 target → δ/2; KL < target/1.5 → 2δ; otherwise δ.

    Args:
      radius: δ > 0, the limit of the step in any unit.
      kl: the divergence that the step caused, nats. One that is not finite counts as too large.
      target: the divergence wanted, nats.
      low: δ_min, the smallest radius returned.
      high: δ_max, the largest.

    Returns:
      A scalar in [low, high].

    Source: the rule for the penalty in Schulman et al. 2017, section 4, applied to a radius.
    """
    far = ~(kl <= 1.5 * jnp.asarray(target))  # true for NaN
    near = kl < target / 1.5
    return jnp.clip(radius * jnp.where(far, 0.5, jnp.where(near, 2.0, 1.0)), low, high)
