"""Successive halving: trials train side by side in one program, and the worse half stops early.

Every trial of a batch trains for a quarter of its iterations; the better half goes on to a half, and the better half
of those to the end (Jamieson & Talwalkar 2016). Programs are as wide as the last stage, so that stopping early really
saves time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from trpo_jax.runs.runner import agent_keys
from trpo_jax.runs.workers import Worker, forget_traces
from trpo_jax.sentences import UsageError
from trpo_jax.sweeps.cohorts import Cohort, Snapshot, failed_iteration, join, training_return
from trpo_jax.sweeps.grids import TUNING_SEEDS, Spec, static_part
from trpo_jax.sweeps.iqm import interquartile_mean
from trpo_jax.sweeps.placement import agents_per_block, devices_for, fit_programs
from trpo_jax.sweeps.programs import Programs
from trpo_jax.sweeps.studies import Study

_RUNGS = 0.25, 0.5, 1.0  # shares of the iterations after which the worse half stops
_KEPT_PROGRAMS = 8  # each takes some 2,000 of a process's 65,530 maps
NO_EPISODE = "no episode ended"
NOT_FINITE = "a number was not finite"


@dataclasses.dataclass
class Trial:
    """A trial in progress.

    Attributes:
      asked: Optuna's trial.
      config: its `Config`; None if its settings do not go together.
      snapshot: of its S agents; None before the first iteration, and after it has stopped.
      score: IQM over its agents after the last stage that it reached.
      why: the reason, if it has no score.
    """

    asked: Any
    config: Any
    snapshot: Any = None
    score: float = float("nan")
    why: str = ""


def run_batch(
    study: Study, spec: Spec, trials: list[Trial], programs: dict[Any, Programs], workers: Sequence[Worker]
) -> int:
    """Train a batch by successive halving and record the results; return how many trials stopped early."""
    alive = [trial for trial in trials if trial.config]
    rungs = _distinct_rungs(min((trial.config.num_iterations for trial in alive), default=1))
    for rung in rungs:
        _train_groups(spec, alive, rung, len(rungs), programs, workers)
        alive = [trial for trial in alive if trial.snapshot]
        for trial in alive:
            if rung < 1:
                trial.score = float(interquartile_mean(_returns(trial.snapshot)))
            why = NOT_FINITE if failed_iteration(trial.snapshot.metrics).any() else NO_EPISODE
            trial.why = "" if np.isfinite(trial.score) else why
        with study.at_work():
            for trial in alive:
                if np.isfinite(trial.score):
                    trial.asked.report(trial.score, step=trial.snapshot.done)
        if rung < 1 and any(np.isfinite(trial.score) for trial in alive):  # else nothing is known yet
            alive.sort(key=lambda trial: -np.nan_to_num(trial.score, nan=-np.inf))
            keep = -(-len(alive) // 2)
            for trial in alive[keep:]:
                trial.snapshot = None
            alive = alive[:keep]
    done = {trial.asked.number for trial in alive if np.isfinite(trial.score)}
    with study.at_work():
        for trial in trials:
            if trial.why:
                trial.asked.set_user_attr("why", trial.why)
        study.tell([(t.asked, t.score if t.asked.number in done else None) for t in trials])
    return len(trials) - len(alive)


def _train_groups(
    spec: Spec,
    alive: list[Trial],
    rung: float,
    num_rungs: int,
    programs: dict[Any, Programs],
    workers: Sequence[Worker],
) -> None:
    """Train all trials to a share of their iterations, in groups that share a program.

    Groups whose programs are compiled come first. Then a new program replaces the least recently used one: a process
    can hold only so many.
    """
    groups: dict[Any, list[Trial]] = {}
    for trial in alive:
        groups.setdefault(static_part(trial.config), []).append(trial)
    for shape in sorted(groups, key=lambda shape: shape not in programs):
        if shape not in programs:
            while len(programs) >= _KEPT_PROGRAMS:
                del programs[next(iter(programs))]
                forget_traces()
            try:
                programs[shape] = _compile(spec, groups[shape], num_rungs, workers)
            except UsageError as error:  # it does not fit into memory
                for trial in groups[shape]:
                    trial.why, trial.snapshot = str(error).rstrip("."), None
                continue
        programs[shape] = programs.pop(shape)  # the last was used last
        _train_until(programs[shape], spec, groups[shape], rung)


def _returns(snapshot: Snapshot) -> np.ndarray:
    """The scores that rank agents before the end: the last evaluation, or else the training return. [A]."""
    evaluated = snapshot.eval_return
    return evaluated[:, -1] if evaluated is not None and evaluated.shape[1] else training_return(snapshot.metrics)


def _distinct_rungs(num_iterations: int) -> list[float]:
    """The shares that end after different iterations: one iteration must not rank the trials twice."""
    return list({_end(rung, num_iterations): rung for rung in _RUNGS}.values())


def _end(rung: float, num_iterations: int) -> int:
    return max(1, round(rung * num_iterations))


def _compile(spec: Spec, group: list[Trial], num_rungs: int, workers: Sequence[Worker]) -> Programs:
    """Compile programs as wide as the trials that reach the last stage."""
    config, last = group[0].config, -(-len(group) // 2 ** (num_rungs - 1))
    agents = last * spec.num_seeds
    devices = devices_for(config, workers[:agents])
    most = agents_per_block(config, agents, len(devices))
    return fit_programs(config, most, spec.num_episodes, devices)


def _train_until(programs: Programs, spec: Spec, group: list[Trial], rung: float) -> None:
    """Train every trial of a group to a share of its iterations; at the end, score it."""
    seeds = spec.num_seeds
    keys = agent_keys(TUNING_SEEDS + spec.seed, seeds)[np.tile(np.arange(seeds), len(group))]
    configs = [trial.config for trial in group for _ in range(seeds)]
    before = join([trial.snapshot for trial in group]) if group[0].snapshot else None
    snapshots, scores = [], []
    for first in range(0, len(configs), programs.width):
        part = slice(first, first + programs.width)
        cohort = Cohort(programs, configs[part], keys[part], before.take(part) if before else None)
        cohort.train(_end(rung, group[0].config.num_iterations))
        snapshots.append(cohort.snapshot())
        if rung == 1:
            scores.append(cohort.evaluate() if spec.num_episodes else _returns(snapshots[-1]))
    after = join(snapshots)
    for i, trial in enumerate(group):
        mine = slice(i * seeds, (i + 1) * seeds)
        trial.snapshot = after.take(mine)
        if rung == 1:
            trial.score = float(interquartile_mean(np.concatenate(scores)[mine]))
