"""Importance sampling: how much samples of one policy tell about another, and how soon they stop doing so.

E_p[f] = E_q[w f] with w = p/q holds for any p and q with q > 0 where p > 0. Its price is variance: N weighted samples
are worth ESS = (Σw)²/Σw², which tends to N / E_q[w²].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trpo_jax.steps.types import Array, Scalar


def importance_weights(target: Array, proposal: Array) -> Array:
    """Importance weights, w = p/q for probabilities of equal shape; 0 where q = 0, as such outcomes are never drawn.

    Σ q w f = Σ p f for every f as long as q > 0 wherever p > 0.
    """
    drawn = proposal > 0
    return jnp.where(drawn, target / jnp.where(drawn, proposal, 1), 0)


def effective_sample_size(log_weight: Array, axis: int = -1) -> Array:
    """Effective sample size, ESS = (Σw)²/Σw² along an axis: N for equal weights, 1 if one outweighs all others.

    Args:
      log_weight: log w, up to a common constant, which cancels; [..., N].
      axis: the axis of the samples.

    Source: Kong 1992.
    """
    logsumexp = jax.scipy.special.logsumexp
    return jnp.exp(2 * logsumexp(log_weight, axis=axis) - logsumexp(2 * log_weight, axis=axis))


def effective_fraction(target: Array, proposal: Array) -> Array:
    """Limit of ESS/N for two distributions on finite support [..., K]: 1/E_q[w²], [...], in (0, 1]."""
    return 1 / jnp.sum(importance_weights(target, proposal) * target, axis=-1)


def gaussian_effective_fraction(kl: Scalar) -> Array:
    """Limit of ESS/N for two Gaussians of equal covariance, exactly exp(−2 KL).

    With means Σ^½ z apart, log w is normal with variance ‖z‖² under q, so E_q[w²] = exp(‖z‖²), and KL = ½ ‖z‖².

    Args:
      kl: their divergence in nats, the same in both directions.
    """
    return jnp.exp(-2 * jnp.asarray(kl))


def per_decision_fraction(num_updates: Scalar, max_kl: Scalar) -> Array:
    """Limit of ESS/N for the ratios of single decisions, j updates later: exp(−2 j²δ).

    The worst case, in which the updates point the same way: the parameters then move j times as far, and the KL, being
    quadratic, is j²δ.

    Args:
      num_updates: j ≥ 0, trust-region updates since the samples were drawn.
      max_kl: δ, the KL of each update, nats.
    """
    return gaussian_effective_fraction(jnp.asarray(num_updates) ** 2 * max_kl)


def trajectory_fraction(num_updates: Scalar, max_kl: Scalar, horizon: Scalar) -> Array:
    """Limit of ESS/N for the products of the ratios along H decisions, j updates later: exp(−2 H j²δ).

    Independent decisions add their divergences. Arguments as in `per_decision_fraction`; horizon is H.
    """
    return gaussian_effective_fraction(horizon * jnp.asarray(num_updates) ** 2 * max_kl)
