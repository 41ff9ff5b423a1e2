"""Comparison of methods over the agents of runs and sweeps, by the statistics of Agarwal et al. 2021 (rliable)."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trpo_jax.files import as_path, plain_json
from trpo_jax.sentences import UsageError
from trpo_jax.settings import SETTINGS
from trpo_jax.sweeps.iqm import (
    Band,
    bootstrap_band,
    first_returns,
    interquartile_mean,
    probability_of_improvement,
    score_scale,
    stratified_bootstrap,
)
from trpo_jax.sweeps.outcomes import Curves, Outcome, differ, group_outcomes, policy_words, read_folders

_POINTS = 50  # of a curve
_THRESHOLDS = 101  # of a performance profile
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Method:
    """One of the methods that are compared, over all tasks that they share.

    Attributes:
      scores: score of each agent by task, in the task's own units.
      iqm: interquartile mean over the agents of all tasks, normalised if there are several tasks.
      interval: its 95 % interval.
      mean: mean over tasks of the mean scores, normalised in the same way.
      profile: share of agents whose score is above each threshold, normalised in the same way.
      curves: IQM of returns against environment steps per agent, by task, in the task's own units.
      overall: IQM of the normalised returns of all tasks, against the share of the steps common to all methods; None
        for one task.
    """

    scores: dict[str, np.ndarray]
    iqm: float
    interval: Interval
    mean: float
    profile: Band
    curves: dict[str, Band]
    overall: Band | None

    @property
    def num_agents(self) -> int:
        """Number of agents, over all tasks."""
        return sum(map(len, self.scores.values()))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Result of a comparison of methods.

    Attributes:
      score: the meaning of an agent's score, in words.
      returns: the meaning of the curves, in words.
      tasks: for each task the two returns that count as 0 and 1; (0, 1), which changes nothing, if it is the only one.
      methods: by name, best IQM first.
      improvement: (X, Y, P(X > Y), interval): probability that an agent of X is better than one of Y on the same task.
      notes: facts about the agents that a reader needs, one sentence each.
    """

    score: str
    returns: str
    tasks: dict[str, tuple[float, float]]
    methods: dict[str, Method]
    improvement: list[tuple[str, str, float, Interval]]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Convert to JSON's types: lists for arrays, null for numbers that are not finite."""
        plain: dict[str, Any] = plain_json(dataclasses.asdict(self))
        names = ("method", "over", "probability", "interval")
        return plain | {"improvement": [dict(zip(names, row, strict=True)) for row in plain["improvement"]]}


def compare(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], by: Sequence[str] = ()) -> Comparison:
    """Compare methods over the agents in folders of runs and sweeps.

    The score is the best measure that all agents have: the evaluation at the end of a sweep, else the last evaluation
    during training, else the training return at the end. If there are several tasks (environments), scores are
    normalised in each: 0 is the mean return of the first training episodes of all its agents, 1 the IQM of the best
    method there. Probabilities of improvement compare within each task, and need no normalisation.

    Args:
      paths: the folders.
      by: settings whose values define the methods, across all folders; by default each folder is a method, and the
        points of a sweep count together. "folder" among them stands for the folder.

    Raises:
      UsageError: if a folder or setting cannot be used, or there are not two methods with a task in common.
    """
    paths = list(paths) if isinstance(paths, Iterable) and not isinstance(paths, (str, bytes)) else [paths]
    by = by.split(",") if isinstance(by, str) else by
    if not paths:
        raise UsageError("compare needs the folder of a run or a sweep, got none.")
    groups = group_outcomes(read_folders([as_path(path) for path in paths]), by)
    tasks = [task for task in next(iter(groups.values())) if all(task in group for group in groups.values())]
    if not tasks:
        raise UsageError(_nothing_in_common(groups))
    groups = {name: {task: group[task] for task in tasks} for name, group in groups.items()}
    every = [outcome for group in groups.values() for outcomes in group.values() for outcome in outcomes]
    score, returns = _measures(every)
    scales = {task: _scale([group[task] for group in groups.values()], score) for task in tasks}
    scales = scales if len(tasks) > 1 else dict.fromkeys(tasks, (0.0, 1.0))
    scores = {name: {task: _together(score.of, group[task]) for task in tasks} for name, group in groups.items()}
    normal = {
        name: [_normalised(values, scales[task]) for task, values in table.items()] for name, table in scores.items()
    }
    thresholds = _thresholds([task for table in normal.values() for task in table])
    ends = {task: [_last_step(group[task], returns.of) for group in groups.values()] for task in tasks}
    methods = {
        name: Method(
            scores=scores[name],
            iqm=float(interquartile_mean(np.concatenate(normal[name]))),
            interval=stratified_bootstrap(normal[name]),
            mean=float(np.mean([task.mean() for task in normal[name]])),
            profile=_profile(normal[name], thresholds),
            curves={task: _curve(group[task], returns.of, max(ends[task])) for task in tasks},
            overall=_overall(group, returns.of, scales, ends) if len(tasks) > 1 else None,
        )
        for name, group in groups.items()
    }
    best = sorted(methods, key=lambda name: -np.nan_to_num(methods[name].iqm, nan=-np.inf))
    pairs = []
    for x, y in itertools.combinations(best, 2):
        value, (low, high) = probability_of_improvement(normal[x], normal[y])
        pairs += [(x, y, value, (low, high)), (y, x, 1 - value, (1 - high, 1 - low))]
    notes = _notes(groups, by, ends)
    return Comparison(score.words, returns.words, scales, {name: methods[name] for name in best}, pairs, notes)


def _notes(groups: Mapping[str, Mapping[str, list[Outcome]]], by: Sequence[str], ends: Mapping[str, Any]) -> list[str]:
    """Facts about the agents that a reader needs, one sentence each."""
    notes = []
    inside = [outcomes for group in groups.values() for outcomes in group.values()]
    learned_by = [n for n in SETTINGS if n != "env" and not n.startswith("eval_")]
    mixed = [n for n in learned_by if n not in by and any(differ(n, outcomes) for outcomes in inside)]
    if mixed:
        notes.append(f"Agents of one method differ in {', '.join(mixed)} but count together; --by separates them.")
    for task, steps in ends.items():
        if len(set(steps)) > 1:
            told = ", ".join(f"{name} {step:,}" for name, step in zip(groups, steps, strict=True))
            notes.append(f"Trained for different numbers of steps on {task}: {told}.")
    unfinished = sum(not outcome.complete for outcomes in inside for outcome in outcomes)
    if unfinished:
        notes.append(f"Not finished: {unfinished} of {sum(map(len, inside))} runs and points.")
    few = {name for name, group in groups.items() for o in group.values() if sum(len(x.training) for x in o) < 3}
    if few:
        notes.append(f"Fewer than three seeds per task, too few for intervals: {', '.join(sorted(few))}.")
    return notes


# Measures


@dataclasses.dataclass(frozen=True)
class _Measure:
    """A number or a curve of each agent, and its meaning in words."""

    words: str
    of: Callable[[Outcome], Any]


def _nothing_in_common(groups: Mapping[str, Mapping[str, Sequence[Outcome]]]) -> str:
    """The message about methods without a common task: no environment, or one with other settings in each."""
    envs = [{outcome.env for outcomes in tasks.values() for outcome in outcomes} for tasks in groups.values()]
    if not set.intersection(*envs):
        return f"{', '.join(groups)} have no environment in common, so they cannot be compared; give others."
    tasks = [f"{name} has {' and '.join(list(found)[:2])}" for name, found in groups.items()][:3]
    return (
        f"no task is common to all methods, since settings of the environment make tasks of their own: "
        f"{'; '.join(tasks)}; give others, or name those settings with --by."
    )


def _measures(outcomes: Sequence[Outcome]) -> tuple[_Measure, _Measure]:
    """The best score and the best curve that all agents have."""
    alike = not differ("eval_stochastic", outcomes)
    curve = _Measure("training return", lambda o: o.returns)
    score = _Measure("training return at the end", lambda o: o.training)
    if alike and all(o.evaluations for o in outcomes):
        curve = _Measure("mean return of evaluations during training", lambda o: o.evaluations)
        score = _Measure("mean return of the last evaluation during training", _last_evaluation)
    if alike and all(o.final is not None for o in outcomes):
        how = policy_words(bool(o.settings.get("eval_stochastic")) for o in outcomes)
        score = _Measure(f"mean return{how} after training", lambda o: o.final)
    return score, curve


def _last_evaluation(outcome: Outcome) -> np.ndarray:
    assert outcome.evaluations
    return outcome.evaluations.returns[:, -1]


def _together(measure: Callable[[Outcome], np.ndarray], outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.concatenate([np.asarray(measure(outcome), np.float64) for outcome in outcomes])


def _scale(methods: Sequence[Sequence[Outcome]], score: _Measure) -> tuple[float, float]:
    """The returns of a task that count as 0, from the start of training, and as 1, from the best method."""
    first = [first_returns(outcome.returns.returns) for outcomes in methods for outcome in outcomes]
    iqms = [interquartile_mean(_together(score.of, outcomes)) for outcomes in methods]
    return score_scale(np.concatenate(first), np.array(iqms))


def _normalised(returns: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    return (returns - scale[0]) / (scale[1] - scale[0])


# Curves


def _last_step(outcomes: Sequence[Outcome], curve: Callable[[Outcome], Curves]) -> int:
    """The number of steps that all agents of a method have reached."""
    return int(min(curve(outcome).steps[-1] for outcome in outcomes))


def _curve(outcomes: Sequence[Outcome], curve: Callable[[Outcome], Curves], longest: int) -> Band:
    """The learning curve of a method on a task, up to the steps that all its agents have reached."""
    steps = np.arange(1, _POINTS + 1) * longest / _POINTS
    last = _last_step(outcomes, curve)
    steps = np.append(steps[steps < last], last)
    returns = np.concatenate([curve(outcome).at(steps) for outcome in outcomes])
    return bootstrap_band(steps, [returns])


def _overall(
    group: Mapping[str, Sequence[Outcome]],
    curve: Callable[[Outcome], Curves],
    scales: Mapping[str, tuple[float, float]],
    ends: Mapping[str, Sequence[int]],
) -> Band:
    """The learning curve of a method over all tasks, in normalised returns, up to the steps of all methods."""
    shares = np.arange(1, _POINTS + 1) / _POINTS
    tasks = [
        _normalised(np.concatenate([curve(outcome).at(shares * min(ends[task])) for outcome in outcomes]), scales[task])
        for task, outcomes in group.items()
    ]
    return bootstrap_band(shares, tasks)


def _thresholds(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Thresholds of a profile, from the lowest to the highest score of all."""
    known = np.concatenate(scores)
    known = known[np.isfinite(known)]
    return np.linspace(known.min(), known.max(), _THRESHOLDS) if known.size else np.zeros(1)


def _profile(tasks: Sequence[np.ndarray], thresholds: np.ndarray) -> Band:
    """The share of runs above each threshold, over the runs of all tasks."""
    return bootstrap_band(thresholds, [task[:, None] > thresholds for task in tasks], np.mean)
