"""Objectives of policy updates and their constraints: the surrogate, clipped or penalised, and KL divergences.

Shapes: B is the batch, of any rank.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax.numpy as jnp

from trpo_jax.steps.distributions import Distribution
from trpo_jax.steps.trees import maximum
from trpo_jax.steps.types import Array, Scalar, check_scalars

Objective = Callable[[Distribution, Distribution, Array, Array], Array]
"""`objective(distribution, old_distribution, ratio [b], advantage [b])` -> the contribution of each sample, [b]."""

Bonus = Callable[[Distribution], Array]
"""`bonus(distribution)` -> the term of each sample, [B], whose mean is added to the objective with a weight."""


def surrogate(distribution: Distribution, old_log_prob: Array, action: Array, advantage: Array) -> Array:
    """Importance-sampled advantage of a policy, L(θ) = mean_n[π_θ(a_n|s_n) / π_old(a_n|s_n) · A_n].

    Args:
      distribution: π_θ(·|s_n), batch shape [B].
      old_log_prob: log π_old(a_n|s_n), [B].
      action: actions drawn from π_old.
      advantage: A_n, [B].

    Returns:
      A scalar, in units of the advantage.

    Source: Schulman et al. 2015, equation 14.
    """
    return jnp.mean(jnp.exp(_log_ratio(distribution, old_log_prob, action, advantage)) * advantage)


def entropy_bonus(distribution: Distribution) -> Array:
    """The term of each sample in an entropy bonus, [B]: `bonus()` if the distribution has it, else its entropy."""
    bonus = getattr(distribution, "bonus", distribution.entropy)
    return bonus()


def log_barrier(distribution: Distribution) -> Array:
    """The log barrier of each sample, [B]: −KL(uniform ‖ π) = Σ_a log π(a) / n + log n over the n allowed actions.

    Its slope in the logit of an action is 1/n − π(a). That of the entropy vanishes with π(a), so that an action which
    noise has made improbable stays so, while the barrier raises it again. For `Categorical` and `MultiCategorical`,
    whose components are summed.

    Raises:
      ValueError: for any other distribution.

    Source: Agarwal et al. 2021, section 5.
    """
    if not hasattr(distribution, "log_barrier"):
        raise ValueError(f"a log barrier needs a choice among actions, not a {type(distribution).__name__}.")
    return distribution.log_barrier()


def surrogate_gain(distribution: Distribution, old_log_prob: Array, action: Array, advantage: Array) -> Array:
    """L(θ) − L(θ_old) = mean_n[(ratio_n − 1) · A_n], without the cancellation of subtracting two surrogates.

    Arguments as in `surrogate`. Exactly 0 at θ_old.
    """
    return jnp.mean(jnp.expm1(_log_ratio(distribution, old_log_prob, action, advantage)) * advantage)


def effective_sample_fraction(distribution: Distribution, old_log_prob: Array, action: Array) -> Array:
    """ESS/B = (Σw)² / (B Σw²) of the ratios w = π_θ/π_old: 1 at θ_old, exp(−2 KL) for equal-σ Gaussians."""
    log_ratio = distribution.log_prob(action) - old_log_prob
    weight = jnp.exp(log_ratio - jnp.max(log_ratio))  # the common factor cancels; no overflow
    return jnp.mean(weight) ** 2 / jnp.mean(weight**2)


def mean_kl(old_distribution: Distribution, distribution: Distribution) -> Array:
    """Mean over the batch of KL(old ‖ new), each summed over action dimensions; a scalar in nats.

    Computed from the distributions, never from sampled ratios; exactly 0 for equal distributions.
    Source: Schulman et al. 2015, equation 12.
    """
    return jnp.mean(old_distribution.kl(distribution))


def maximum_kl(old_distribution: Distribution, distribution: Distribution) -> Array:
    """Largest KL(old ‖ new) of a single sample, nats, as bounded in theory (Schulman et al. 2015, equation 11)."""
    return maximum(old_distribution.kl(distribution))


def reverse_kl(old_distribution: Distribution, distribution: Distribution) -> Array:
    """Mean over the batch of KL(new ‖ old), nats."""
    return jnp.mean(distribution.kl(old_distribution))


def surrogate_objective(
    distribution: Distribution, old_distribution: Distribution, ratio: Array, advantage: Array
) -> Array:
    """The surrogate ratio · A, whose gradient at θ_old is the policy gradient, mean_n[∇log π(a_n|s_n) · A_n]."""
    del distribution, old_distribution
    return ratio * advantage


def clipped_objective(clip_ratio: Scalar) -> Objective:
    """Make PPO's objective min(ratio · A, clip(ratio, 1 − ε, 1 + ε) · A) (Schulman et al. 2017, equation 7).

    It is NaN unless ε > 0: `jnp.minimum` alone would hide an ε that is not a number from the gradient.
    """
    check_scalars(clip_ratio=clip_ratio)
    sound = jnp.where(jnp.asarray(clip_ratio) > 0, 1.0, jnp.nan)

    def objective(distribution: Distribution, old_distribution: Distribution, ratio: Array, advantage: Array) -> Array:
        del distribution, old_distribution
        clipped = jnp.clip(ratio, 1 - clip_ratio, 1 + clip_ratio)
        return jnp.minimum(ratio * advantage, clipped * advantage) * sound

    return objective


def penalized_objective(penalty: Scalar) -> Objective:
    """Make the penalised objective ratio · A − β KL(old ‖ new) (Schulman et al. 2017, equation 8)."""
    check_scalars(penalty=penalty)

    def objective(distribution: Distribution, old_distribution: Distribution, ratio: Array, advantage: Array) -> Array:
        return ratio * advantage - penalty * old_distribution.kl(distribution)

    return objective


def _log_ratio(distribution: Distribution, old_log_prob: Array, action: Array, advantage: Array) -> Array:
    log_prob = distribution.log_prob(action)
    chex.assert_equal_shape([log_prob, old_log_prob, advantage])
    return log_prob - old_log_prob
