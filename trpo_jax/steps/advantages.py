"""Generalized advantage estimation (Schulman et al. 2016), which treats terminations and time limits differently.

Shapes: T steps; `...` any batch shape, usually the N environments.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from trpo_jax.steps.types import Array, Scalar, at_least_float32


def gae(
    rewards: Array,
    values: Array,
    next_values: Array,
    terminated: Array,
    truncated: Array,
    *,
    gamma: Scalar,
    gae_lambda: Scalar,
    ratios: Array | None = None,
) -> Array:
    """Compute generalized advantage estimates by one backward scan.

        δ_t = r_t + γ (1 − terminated_t) V(s'_t) − V(s_t)
        A_t = δ_t + γ λ (1 − terminated_t)(1 − truncated_t) A_{t+1}

    After a termination there is no future. After a truncation (time limit) there would have been one, so the value
    bootstraps from the observation *before* the reset. Where both flags are set, `terminated` takes precedence.

    Args:
      rewards: [T, ...].
      values: V(s_t), [T, ...].
      next_values: V(s'_t) of the observation that step t produced, before any reset, [T, ...].
      terminated: whether the episode ended in a terminal state, bool [T, ...].
      truncated: whether a time limit ended it, bool [T, ...].
      gamma: discount γ in [0, 1].
      gae_lambda: λ in [0, 1]: 0 is the one-step temporal difference, 1 the discounted return minus V.
      ratios: π(a_t|s_t)/π_b(a_t|s_t), [T, ...], where π_b took the actions and π is the policy whose advantages are
        computed: λ becomes λ min(1, ratio_{t+1}), which cuts the sum where the two differ (Munos et al. 2016).

    Returns:
      Advantages, [T, ...], in float32 or wider. Their sum with `values` is the λ-return, which a value function is
      fitted to.

    Raises:
      AssertionError: if the shapes differ or there is no time axis.
    """
    deltas, decay = _deltas(rewards, values, next_values, terminated, truncated, gamma, gae_lambda, ratios)

    def step(advantage: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, factor = inputs
        advantage = delta + factor * jnp.where(factor == 0, 0, advantage)  # what follows an end may be anything
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros(deltas.shape[1:], deltas.dtype), (deltas, decay), reverse=True)
    return advantages


def parallel_gae(
    rewards: Array,
    values: Array,
    next_values: Array,
    terminated: Array,
    truncated: Array,
    *,
    gamma: Scalar,
    gae_lambda: Scalar,
    ratios: Array | None = None,
) -> Array:
    """Compute `gae` by an associative scan of depth O(log T), for accelerators. Arguments and result as in `gae`.

    The recursion A = δ + f·A' is a composition of affine maps, (f₁, δ₁) ∘ (f₂, δ₂) = (f₁ f₂, δ₁ + f₁ δ₂).
    """
    deltas, decay = _deltas(rewards, values, next_values, terminated, truncated, gamma, gae_lambda, ratios)

    def compose(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        factor, delta = (jnp.where(earlier[0] == 0, 0, part) for part in later)
        return factor * earlier[0], earlier[1] + earlier[0] * delta

    return jax.lax.associative_scan(compose, (decay, deltas), reverse=True)[1]


def _deltas(
    rewards: Array,
    values: Array,
    next_values: Array,
    terminated: Array,
    truncated: Array,
    gamma: Scalar,
    gae_lambda: Scalar,
    ratios: Array | None,
) -> tuple[Array, Array]:
    """Temporal differences δ_t and the factor γλ(1 − done_t) that carries A_{t+1} back, each [T, ...]."""
    terminated, truncated = jnp.asarray(terminated, bool), jnp.asarray(truncated, bool)
    rewards, values, next_values = map(at_least_float32, (rewards, values, next_values))
    chex.assert_equal_shape([rewards, values, next_values, terminated, truncated])
    assert rewards.ndim, "rewards must have a time axis, [T, ...], got a scalar"
    dtype = jnp.result_type(rewards, values, next_values)
    # Selected, not multiplied: the value after a terminal state may be anything, even NaN.
    bootstrap = jnp.where(terminated, 0, next_values)
    deltas = rewards + gamma * bootstrap - values
    # Cast to the dtype of the result before multiplying by a ratio: γ and λ may both be the integer 1.
    ended = terminated | truncated
    decay = jnp.asarray(jnp.where(ended, 0, gamma * gae_lambda), dtype)
    if ratios is not None:
        ratios = at_least_float32(ratios)
        chex.assert_equal_shape([rewards, ratios])
        decay = decay.at[:-1].multiply(jnp.where(ended[:-1], 0, jnp.minimum(ratios[1:], 1)))  # nothing follows the last
    return jnp.asarray(deltas, dtype), decay
