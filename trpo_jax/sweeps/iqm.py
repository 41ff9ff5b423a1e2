"""Statistics over seeds as recommended by Agarwal et al. 2021 (rliable): IQM, intervals, comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from trpo_jax.sentences import UsageError, check_number, shown

_RESAMPLES = 2000
_MOST_DRAWS = 20_000_000  # of runs, for one interval
_AT_ONCE = 2**22  # of them in memory


def interquartile_mean(values: Any, axis: int = -1) -> Any:
    """Mean of the middle half: the lowest and the highest quarter, rounded down, are left out. NaN counts as lowest."""
    values = np.sort(np.where(np.isnan(values), -np.inf, np.asarray(values, np.float64)), axis=axis)
    count = values.shape[axis]
    if not count:
        return np.full(np.delete(values.shape, axis), np.nan)[()]
    middle = np.take(values, range(count // 4, count - count // 4), axis=axis)
    with np.errstate(invalid="ignore"):  # -∞ + ∞ has no mean
        mean = np.mean(middle, axis=axis)
    return np.where(np.isneginf(mean), np.nan, mean)[()]


def stratified_bootstrap(
    scores: Sequence[np.ndarray],
    *,
    statistic: Callable[..., Any] = interquartile_mean,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the IQM over all runs of all tasks; seeds are resampled within each task (stratum).

    Args:
      scores: one array of scores per task, [seeds] each.
      statistic: `statistic(runs, axis=1)` of the runs of all tasks, [resamples, runs], in place of the IQM.
      confidence: nominal coverage of the interval.
      resamples: bootstrap samples; fewer, but at least 200, of more than 10,000 runs.
      seed: seed of the resampling; a fixed one makes reports reproducible.

    Returns:
      Lower and upper bound; NaN if there is nothing to draw from, and where a bound lies among samples without an
      IQM, which count as lowest.

    Raises:
      UsageError: if `confidence` lies outside (0, 1), `resamples` is not a whole number from 1 to 1,000,000,000, or
        `scores` is not one array per task.
    """
    _check_scores(scores)
    check_number("confidence", confidence, whole=False, interval="(0, 1)")
    check_number("resamples", resamples, whole=True, interval="[1, 1000000000]")
    if not len(scores) or any(len(task) == 0 for task in scores):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    runs = sum(map(len, scores))
    resamples = _fewer(resamples, runs) if runs > len(scores) else 1  # of one run a task, every sample is the same
    found = []
    for some in _in_slices(resamples, runs):
        drawn = [np.asarray(task)[rng.integers(len(task), size=(some, len(task)))] for task in scores]
        found.append(statistic(np.concatenate(drawn, axis=1), axis=1))
    return _percentiles(np.concatenate(found), confidence)


def _fewer(resamples: int, runs: int) -> int:
    """So many bootstrap samples, or fewer of many thousands of runs, whose interval is narrow; at least 200."""
    return min(resamples, max(200, _MOST_DRAWS // max(1, runs)))


def _in_slices(resamples: int, runs: int) -> Iterator[int]:
    """Sizes of slices of the bootstrap samples that fit into little memory."""
    most = max(1, _AT_ONCE // max(1, runs))
    for first in range(0, resamples, most):
        yield min(most, resamples - first)


def probability_of_improvement(
    scores: Sequence[np.ndarray], others: Sequence[np.ndarray], *, resamples: int = _RESAMPLES, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Probability that a run is better than another method's on the same task, P(X > Y) + ½ P(X = Y), mean over tasks.

    It compares within each task, so scores need no normalisation. NaN counts as lowest.

    Args:
      scores: one array of scores per task, [seeds] each.
      others: those of the other method, with tasks in the same order; the number of seeds may differ.
      resamples: bootstrap samples.
      seed: seed of the resampling.

    Returns:
      The Mann-Whitney statistic U / (seeds x other seeds), averaged, and its 95 % interval by the stratified bootstrap.

    Raises:
      UsageError: if `resamples` is not a whole number from 1 to 1,000,000,000, or the scores are not one array per task
        and of the same tasks.
    """
    _check_scores(scores)
    _check_scores(others)
    if len(scores) != len(others):
        raise UsageError(f"both methods must have scores of the same tasks, got {len(scores)} and {len(others)} tasks.")
    check_number("resamples", resamples, whole=True, interval="[1, 1000000000]")
    if not len(scores) or any(len(task) == 0 for task in (*scores, *others)):
        return float("nan"), (float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    resamples = _fewer(resamples, sum(map(len, scores)) + sum(map(len, others)))
    drawn = np.zeros(resamples)
    found = 0.0
    for ours, theirs in zip(scores, others, strict=True):
        x, y = (np.where(np.isnan(task), -np.inf, np.asarray(task, np.float64)) for task in (ours, theirs))
        order, pairs, first = np.argsort(x, kind="stable"), len(x) * len(y), 0
        # Of the sorted runs X, those before the first are fewer than Y, those from the second on are more.
        ends = [np.searchsorted(x[order], y, side=side) for side in ("left", "right")]
        found += float((len(x) - (ends[0] + ends[1]) / 2).sum() / pairs) / len(scores)
        for some in _in_slices(resamples, len(x) + len(y)):
            times_x, times_y = (_times_drawn(rng, len(task), some) for task in (x, y))
            before = np.cumsum(np.pad(times_x[:, order], ((0, 0), (1, 0))), axis=1)
            wins = len(x) - (before[:, ends[0]] + before[:, ends[1]]) / 2  # half a win for each that is equal
            drawn[first : first + some] += (wins * times_y).sum(axis=1) / (pairs * len(scores))
            first += some
    return found, _percentiles(drawn)


def _check_scores(scores: Any) -> None:
    if any(np.ndim(task) != 1 for task in scores):
        raise UsageError(f"scores must be a list of one array per task, got {shown(scores)}.")


def _times_drawn(rng: np.random.Generator, number: int, resamples: int) -> np.ndarray:
    """How often each of so many runs is in each bootstrap sample, float64 [resamples, number]."""
    at = rng.integers(number, size=(resamples, number)) + number * np.arange(resamples)[:, None]
    return np.bincount(at.ravel(), minlength=resamples * number).reshape(resamples, number).astype(np.float64)


class Band(NamedTuple):
    """A curve [K] and the 95 % interval of each of its points, by the stratified bootstrap."""

    x: np.ndarray
    middle: np.ndarray
    low: np.ndarray
    high: np.ndarray


def bootstrap_band(
    x: np.ndarray, tasks: Sequence[np.ndarray], statistic: Callable[..., Any] = interquartile_mean
) -> Band:
    """Compute a statistic of the runs of all tasks, [S, K] each, and its interval for each of the K points `x`."""
    middle, low, high = np.empty((3, len(x)))
    for k in range(len(x)):
        runs = [task[:, k] for task in tasks]
        middle[k] = statistic(np.concatenate(runs), axis=0)
        low[k], high[k] = stratified_bootstrap(runs, statistic=statistic, resamples=1000)
    return Band(x, middle, low, high)


def score_scale(first: np.ndarray, iqms: np.ndarray) -> tuple[float, float]:
    """The returns of a task that count as 0 and 1: those at the start of training, and the best method's IQM.

    Args:
      first: the first training return of each agent; NaN where it has none.
      iqms: IQMs of the methods, or points of a sweep.

    Returns:
      The two. If nothing was learned, the worst method has -1; (0, 1) if nothing is known.
    """
    first, iqms = first[np.isfinite(first)], iqms[np.isfinite(iqms)]
    if not first.size or not iqms.size:
        return 0.0, 1.0
    zero, one = float(first.mean()), float(iqms.max())
    return (zero, one) if one > zero else (zero, zero + (float(zero - iqms.min()) or 1.0))


def first_returns(returns: np.ndarray) -> np.ndarray:
    """The first finite return of each agent [S, K], as [S]; NaN if it has none."""
    known = np.isfinite(returns)
    found = np.take_along_axis(returns, known.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(known.any(axis=1), found, np.nan)


def _percentiles(statistics: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The interval with this confidence around bootstrapped statistics; NaN counts as lowest."""
    ordered = np.sort(np.where(np.isnan(statistics), -np.inf, statistics))
    tail = (1 - confidence) / 2
    return _quantile(ordered, tail), _quantile(ordered, 1 - tail)


def _quantile(ordered: np.ndarray, share: float) -> float:
    """The quantile of sorted values, linear between neighbours; NaN if the lower neighbour is -∞."""
    at = share * (len(ordered) - 1)
    below, above = ordered[math.floor(at)], ordered[math.ceil(at)]
    if below == above or not math.isfinite(below):
        return float(below) if below != -math.inf else math.nan
    return float(below + (above - below) * (at - math.floor(at)))
