"""Interquartile means and their intervals over seeds, as Agarwal et al. 2021 (rliable) recommend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_RESAMPLES = 2000


def interquartile_mean(values: Any, axis: int = -1) -> Any:
    """Mean of the middle half: the lowest and the highest quarter, rounded down, are left out. NaN is lowest."""
    values = np.sort(np.where(np.isnan(values), -np.inf, np.asarray(values, np.float64)), axis=axis)
    count = values.shape[axis]
    middle = np.take(values, range(count // 4, count - count // 4), axis=axis)
    with np.errstate(invalid="ignore"):  # the lowest beside an infinite one: none can be said
        mean = np.mean(middle, axis=axis)
    return np.where(np.isneginf(mean), np.nan, mean)[()]


def stratified_bootstrap(
    scores: Sequence[np.ndarray], *, confidence: float = 0.95, resamples: int = _RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the IQM over all runs of all tasks, seeds drawn anew within each task (stratum).

    Args:
      scores: one array of scores per task, [seeds] each.
      confidence: probability that the interval is meant to have.
      resamples: bootstrap samples.
      seed: of the resampling, so that a report is the same each time it is made.

    Returns:
      Lower and upper bound; NaN if there is nothing to draw from, and where a bound lies among samples without an
      IQM, which count as lowest.
    """
    if not scores or any(len(task) == 0 for task in scores):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    drawn = [np.asarray(task)[rng.integers(len(task), size=(resamples, len(task)))] for task in scores]
    means = interquartile_mean(np.concatenate(drawn, axis=1), axis=1)
    means = np.sort(np.where(np.isnan(means), -np.inf, means))
    tail = (1 - confidence) / 2
    low, high = (_quantile(means, share) for share in (tail, 1 - tail))
    return low, high


def _quantile(ordered: np.ndarray, share: float) -> float:
    """The quantile of sorted values, linear between two of them; NaN where the lower of these is -∞."""
    at = share * (len(ordered) - 1)
    below, above = ordered[math.floor(at)], ordered[math.ceil(at)]
    if below == above or not math.isfinite(below):
        return float(below) if below != -math.inf else math.nan
    return float(below + (above - below) * (at - math.floor(at)))
