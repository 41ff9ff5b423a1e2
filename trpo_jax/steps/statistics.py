"""Running mean and variance, merged batch by batch without loss (Chan, Golub & LeVeque 1983)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from trpo_jax.steps import trees
from trpo_jax.steps.types import Array, Scalar


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunningStatistics:
    """Mean and variance of everything seen so far. `...` is the shape of one observation.

    Attributes:
      count: number of observations, float32 scalar.
      mean: [...].
      variance: population variance, [...]; 1 before the first observation.
    """

    count: Array
    mean: Array
    variance: Array


def init_statistics(shape: tuple[int, ...]) -> RunningStatistics:
    """Statistics of nothing yet, under which `normalize` changes nothing."""
    return RunningStatistics(jnp.float32(0), jnp.zeros(shape, jnp.float32), jnp.ones(shape, jnp.float32))


def update_statistics(statistics: RunningStatistics, batch: Array) -> RunningStatistics:
    """Merge a batch [B..., ...] of observations.

    mean = mean₁ + (mean₂ − mean₁) n₂/n,   M2 = M2₁ + M2₂ + (mean₂ − mean₁)² n₁n₂/n,   variance = M2/n.
    A batch that is not finite leaves the statistics as they were.
    """
    axes = tuple(range(batch.ndim - statistics.mean.ndim))
    batch_count = batch.size // max(1, statistics.mean.size)
    batch_mean, batch_variance = jnp.mean(batch, axes), jnp.var(batch, axes)
    count = statistics.count + batch_count
    share = batch_count / count
    shift = batch_mean - statistics.mean
    variance = (1 - share) * statistics.variance + share * batch_variance + share * (1 - share) * shift**2
    merged = RunningStatistics(count, statistics.mean + share * shift, variance)
    return trees.select(trees.all_finite(merged), merged, statistics)


def normalize(statistics: RunningStatistics, observation: Array, *, clip: Scalar = 10.0) -> Array:
    """(observation − mean) / σ, clipped to ±clip; a constant entry (σ = 0) maps to 0."""
    std = jnp.sqrt(statistics.variance)
    # The mean of equal numbers is rounded, so their variance is the square of that rounding, not 0.
    varies = std > 10 * jnp.finfo(std.dtype).eps * jnp.abs(statistics.mean)
    scaled = jnp.where(varies, (observation - statistics.mean) / jnp.where(varies, std, 1), 0)
    return jnp.clip(scaled, -clip, clip)
