"""Estimates of a candidate policy from a batch that another policy collected, before the candidate is used."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp

from trpo_jax.steps import trees
from trpo_jax.steps.objectives import effective_sample_fraction
from trpo_jax.steps.policy_updates import check_action
from trpo_jax.steps.types import Array, PolicyApply, PyTree, at_least_float32, check_count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CandidateEstimate:
    """Estimates of a candidate policy from a stored batch; each field is a scalar.

    Attributes:
      surrogate_gain: L̂(θ') − L̂(θ), in units of the advantage.
      low: lower end of its bootstrap interval.
      high: upper end of its bootstrap interval.
      mean_kl: mean KL(old ‖ candidate) over the batch, nats.
      maximum_kl: largest KL(old ‖ candidate) of a single sample, nats.
      effective_sample_fraction: (Σw)²/(B Σw²) of the importance ratios: the share of the batch that informs about θ'.
    """

    surrogate_gain: Array
    low: Array
    high: Array
    mean_kl: Array
    maximum_kl: Array
    effective_sample_fraction: Array


def estimate_candidate(
    policy_apply: PolicyApply,
    old_params: PyTree,
    candidate: PyTree,
    observation: PyTree,
    action: Array,
    advantage: Array,
    key: Array,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> CandidateEstimate:
    """Estimate a candidate's gain and its confidence interval from the old policy's batch alone.

        L̂(θ') − L̂(θ) = mean_n[(π_θ'(a_n|s_n) / π_θ(a_n|s_n) − 1) · A_n]

    The interval is a percentile bootstrap. Samples of one environment are correlated, so a batch of [T, N] is resampled
    by whole environments, and a flat one by samples. The interval covers the noise of the batch. It covers neither
    errors in the advantages nor states that only the candidate would visit, so watch `mean_kl`.

    Args:
      policy_apply: `policy_apply(params, observation)` -> a distribution.
      old_params: θ, the parameters that collected the batch.
      candidate: θ', in the same structure.
      observation: [*batch, ...], an array or a pytree of arrays.
      action: [*batch, ...].
      advantage: advantage estimates under θ, [*batch]: [B], or [T, N] with N ≥ 2.
      key: PRNG key of the resampling.
      confidence: coverage probability of the interval.
      resamples: bootstrap samples (static).

    Returns:
      A `CandidateEstimate`.

    Raises:
      ValueError: if `resamples` is not a whole number ≥ 1, `confidence` a number outside (0, 1), or there is nothing to
        resample.
      AssertionError, ValueError: if the shapes of the batch do not agree.

    Source: Efron & Tibshirani 1993 (bootstrap); Schulman et al. 2015, equation 14.
    """
    check_count("resamples", resamples)
    if isinstance(confidence, (int, float)) and not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence!r}")
    advantage = at_least_float32(advantage)
    if not advantage.ndim or advantage.shape[-1] < 2:
        raise ValueError(f"advantage must be [B] or [T, N], with at least 2 at its end, got {advantage.shape}")
    # The KL is as small as the rounding of TF32 and bfloat16 products.
    with jax.default_matmul_precision("highest"):
        old = trees.widened(policy_apply(old_params, observation))
        new = trees.widened(policy_apply(candidate, observation))
    action = jnp.asarray(action)
    check_action(old, action)
    old_log_prob = old.log_prob(action)
    chex.assert_equal_shape([old_log_prob, advantage], custom_message="log_prob(action) and advantage differ in shape")
    gains = jnp.expm1(new.log_prob(action) - old_log_prob) * advantage
    units = gains.reshape(-1, gains.shape[-1]).mean(axis=0)

    def resampled(key: Array) -> Array:
        return jnp.mean(units[jax.random.randint(key, units.shape, 0, units.size)])

    means = jax.lax.map(resampled, jax.random.split(key, resamples))
    tail = (1 - confidence) / 2
    low, high = jnp.quantile(means, jnp.array([tail, 1 - tail]))
    kl = old.kl(new)
    return CandidateEstimate(
        surrogate_gain=jnp.mean(gains),
        low=low,
        high=high,
        mean_kl=jnp.mean(kl),
        maximum_kl=trees.maximum(kl),
        effective_sample_fraction=effective_sample_fraction(new, old_log_prob, action),
    )
