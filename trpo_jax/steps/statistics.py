"""Running mean and variance, merged batch by batch without loss (Chan, Golub & LeVeque 1983)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from trpo_jax.steps import defaults, trees
from trpo_jax.steps.types import Array, Scalar, at_least_float32

_ROUNDING = 10  # machine epsilons of the magnitude; a spread below them is rounding error


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunningStatistics:
    """Mean and variance of all observations so far. `...` is the shape of one observation.

    Attributes:
      count: number of observations, float32 scalar.
      mean: [...].
      variance: population variance, [...]; 1 before the first observation.
    """

    count: Array
    mean: Array
    variance: Array


def init_statistics(shape: tuple[int, ...]) -> RunningStatistics:
    """Statistics before the first observation: `normalize` with them only clips."""
    return RunningStatistics(jnp.float32(0), jnp.zeros(shape, jnp.float32), jnp.ones(shape, jnp.float32))


def varies(spread: Array, magnitude: Array) -> Array:
    """Whether a spread (a standard deviation, say) exceeds the rounding error of numbers of that magnitude.

    The mean of equal numbers is rounded, so their deviation from it is rounding error, not 0. Check this before you
    divide by a spread.
    """
    return spread > _ROUNDING * jnp.finfo(spread.dtype).eps * jnp.abs(magnitude)


def update_statistics(statistics: RunningStatistics, batch: Array) -> RunningStatistics:
    """Merge a batch [B..., ...] of observations into the statistics.

    mean = mean₁ + (mean₂ − mean₁) n₂/n,   M2 = M2₁ + M2₂ + (mean₂ − mean₁)² n₁n₂/n,   variance = M2/n.
    A batch that is not finite leaves the statistics unchanged.
    """
    batch = at_least_float32(batch)
    axes = tuple(range(batch.ndim - statistics.mean.ndim))
    batch_count = batch.size // max(1, statistics.mean.size)
    # Relative to the first, so that equal numbers, however many, have exactly their mean and a variance of 0.
    first = batch[(0,) * len(axes)]
    batch_mean = first + jnp.mean(batch - first, axes)
    batch_variance = jnp.mean((batch - batch_mean) ** 2, axes)
    count = statistics.count + batch_count
    share = batch_count / count
    shift = batch_mean - statistics.mean
    variance = (1 - share) * statistics.variance + share * batch_variance + share * (1 - share) * shift**2
    merged = RunningStatistics(count, statistics.mean + share * shift, variance)
    return trees.select(trees.all_finite(merged), merged, statistics)


def normalize(statistics: RunningStatistics, observation: Array, *, clip: Scalar = defaults.OBSERVATION_CLIP) -> Array:
    """Normalise an observation: (observation − mean) / σ, clipped to ±clip; a constant entry (σ = 0) maps to 0."""
    std = jnp.sqrt(statistics.variance)
    varied = varies(std, statistics.mean)
    scaled = jnp.where(varied, (observation - statistics.mean) / jnp.where(varied, std, 1), 0)
    return jnp.clip(scaled, -clip, clip)
