"""Search for settings: Optuna proposes batches of trials, one compiled program trains them, the worse half stops.

Every trial of a batch trains for a quarter of its iterations; the better half goes on to a half, and the better half
of those to the end (successive halving, Jamieson & Talwalkar 2016). Programs are as wide as the last stage, so that
stopping early really saves time.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.environments.make import settle
from trpo_jax.fields import as_text
from trpo_jax.files import as_path, move_aside, write_atomically
from trpo_jax.runs.continuing import continue_run
from trpo_jax.runs.descriptions import in_json, made_by
from trpo_jax.runs.folders import Run, create_run, open_run
from trpo_jax.runs.learning_curve import plot_learning_curve
from trpo_jax.runs.runner import agent_keys
from trpo_jax.sentences import UsageError, counted
from trpo_jax.settings import cast, checked_settings, read_toml, settings_of, with_length
from trpo_jax.sweeps.cohorts import Cohort, Snapshot, failed_iteration, join, training_return
from trpo_jax.sweeps.grids import TUNING_SEEDS, Spec, checked_spec, draws_whole, make_point, static_part
from trpo_jax.sweeps.iqm import interquartile_mean
from trpo_jax.sweeps.placement import Programs, agents_per_block, fit_programs
from trpo_jax.sweeps.studies import Study, open_study
from trpo_jax.training.agents import make_agent

_RUNGS = 0.25, 0.5, 1.0  # shares of the iterations after which the worse half stops
_KEPT_PROGRAMS = 8  # compiled programs kept for their next use; each takes some 2,000 of a process's 65,530 maps
_COMBINATIONS = 64  # of first and last values that are tried before a search is refused
_CONTINUES = "what is told is safe, and the same command continues when the folder can be written to"
_NO_EPISODE = "no episode ended"
_NOT_FINITE = "a number was not finite"


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


@dataclasses.dataclass(frozen=True)
class Batch:
    """Report of a batch: trials finished so far, of `count`; its best score; the best score of all, and its settings.

    `trials` are all finished ones of Optuna.
    """

    told: int
    count: int
    pruned: int
    batch_best: float
    best: float
    settings: dict[str, Any]
    trials: list[Any]


def tune(
    path: str | os.PathLike[str],
    spec: Spec,
    *,
    batch: int = 16,
    storage: str | None = None,
    report: Callable[[Batch], None] = lambda batch: None,
) -> tuple[Path, float]:
    """Search the distributions of `spec.random` for the settings with the highest score, or continue such a search.

    A search that is cut short, by a kill or by a smaller number of trials, proposes and scores what it would have
    uncut, if its batches are the same.

    Args:
      path: folder for the study and for best.toml, which exists from the first batch on.
      spec: base settings, distributions and their count, the number of trials; `num_seeds` agents per trial. Its seeds
        start at `TUNING_SEEDS`; no sweep and no default `train` uses these.
      batch: trials proposed and trained together.
      storage: Optuna's storage URL; by default an SQLite file in the folder. Machines that share one search together if
        their folders have the same name.
      report: called after each batch, or once if no trial is left to train.

    Returns:
      The file with the best settings, for `trpo-jax train --config`, and their score on the tuning seeds.

    Raises:
      UsageError: if Optuna is missing, the spec, the folder or the study cannot be used, or no trial has a score.
    """
    spec = checked_spec(spec)
    space = {name: values for name, values in spec.random.items() if name not in ("count", "seed")}
    if not space or spec.grid or spec.zip:
        raise UsageError("tune searches the distributions in [random], and takes neither [grid] nor [zip].")
    check_space(spec.base, space)  # bad input shows before anything is written
    programs: dict[Any, Programs] = {}
    count = spec.random["count"]
    with open_study(path, spec, storage, made_by()) as study:
        file = as_path(path) / "best.toml"
        trials: list[Trial] = []
        pruned, nothing = 0, float("nan")
        while True:
            with study.at_work():
                ended, best = study.ended(), study.best()
            told = len(ended)
            if best:
                _write_best(file, spec, best, told)
            if trials or told >= count:
                scores = [trial.score for trial in trials if np.isfinite(trial.score)]
                value, settings = (best.value, best.params) if best else (nothing, {})
                report(Batch(told, count, pruned, max(scores, default=nothing), value, settings, ended))
            if told >= count:
                break
            with study.at_work():
                trials = [_make_trial(asked, spec, space) for asked in study.ask(min(batch, count - told))]
            pruned = _run_batch(study, spec, trials, programs)
        if not best:
            raise UsageError(_why_no_score(study, path, told))
    return file, best.value


def check_space(base: Mapping[str, Any], space: Mapping[str, Any]) -> Config:
    """The settings of a trial with first or last values that go together.

    Choices may exclude one another, as the update and a setting of another update: such trials have no score.

    Raises:
      UsageError: if there are none among those that were tried.
    """
    ends = [[values[0], *values[1:][-1:]] for distribution in space.values() for values in distribution.values()]
    why: UsageError | None = None
    for values in itertools.islice(itertools.product(*ends), _COMBINATIONS):
        try:
            config = make_point(base, dict(zip(space, values, strict=True))).config
            make_agent(config)
            return config
        except UsageError as error:
            why = why or error
    assert why is not None
    raise why


def train_best(file: Path, spec: Spec) -> Path | None:
    """Train the agents of the best trial again, in a run of their own next to its settings, best.toml.

    They learn the same as in the search, whose programs keep no states. A run of these settings that `resume` has made
    longer stays as it is; a run of earlier best settings moves to best-1, best-2, ….

    Returns:
      Its folder; None if it was interrupted: `resume`, or the continued search, finishes it.
    """
    config = settle(with_length(checked_settings(read_toml(file), str(file)), Config()))
    folder = file.with_suffix("")
    run = Run(folder, config, TUNING_SEEDS + spec.seed, spec.num_seeds)
    found = open_run(folder) if (folder / "config.json").exists() else None
    kept = found if found and _is_same_or_longer(found, run) else None
    if found and not kept and found.seed == run.seed:
        move_aside(folder)
    run = kept or create_run(folder, config, run.seed, run.num_seeds)
    complete = continue_run(run)
    plot_learning_curve(run)
    return folder if complete else None


def _is_same_or_longer(found: Run, run: Run) -> bool:
    """Whether a run that is there already has the settings of another one, and at least its length."""
    same = dataclasses.replace(found, config=found.config.replace(num_iterations=run.config.num_iterations))
    length = found.config.num_iterations >= run.config.num_iterations
    return length and same.description == in_json(run.description)


def _write_best(file: Path, spec: Spec, best: Any, told: int) -> None:
    config = make_point(spec.base, best.params).config
    quoted = {json.dumps(name) if "." in name else name: value for name, value in settings_of(config).items()}
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in quoted.items()]
    score = f"# score {best.value:.6g} on {counted(spec.num_seeds, 'tuning seed')}, best of {counted(told, 'trial')}\n"
    write_atomically(file, score + "\n".join(lines) + "\n", _CONTINUES)


def _why_no_score(study: Study, path: str | os.PathLike[str], told: int) -> str:
    """The message for a search in which no trial has a score: what happened, and what to do about it."""
    with study.at_work():
        reasons = study.reasons().most_common()
    happened = ", ".join(f"{why} ({number} of {told})" for why, number in reasons) or f"all {told} stopped early"
    mend = {
        _NO_EPISODE: "raise total_steps, or evaluate with num_episodes",
        _NOT_FINITE: "move the distributions in [random] to smaller steps, or check the environment",
    }.get(reasons[0][0] if reasons else "", "move the distributions in [random]")
    return f"no trial in {path} has a score: {happened}; {mend}, and choose another --output."


def _make_trial(asked: Any, spec: Spec, space: Mapping[str, Any]) -> Trial:
    env = None if "env" in space else spec.base.get("env", Config.env)
    varied = {name: _suggest(asked, name, distribution, env) for name, distribution in space.items()}
    try:
        config = make_point(spec.base, varied).config
        make_agent(config)
    except UsageError as error:  # its settings can be used one by one, but not together
        return Trial(asked, None, why=str(error).rstrip("."))
    return Trial(asked, config)


def _suggest(trial: Any, name: str, distribution: Mapping[str, Any], env: str | None) -> Any:
    ((kind, values),) = distribution.items()
    if kind == "choice":
        return trial.suggest_categorical(name, [as_text(cast(name, value)) for value in values])
    if draws_whole(name, env):
        return trial.suggest_int(name, *(round(value) for value in values), log=kind == "log_uniform")
    return trial.suggest_float(name, *values, log=kind == "log_uniform")


def _run_batch(study: Study, spec: Spec, trials: list[Trial], programs: dict[Any, Programs]) -> int:
    """Train a batch by successive halving and record the results; return how many trials stopped early."""
    alive = [trial for trial in trials if trial.config]
    rungs = _distinct_rungs(min((trial.config.num_iterations for trial in alive), default=1))
    for rung in rungs:
        _train_groups(spec, alive, rung, len(rungs), programs)
        alive = [trial for trial in alive if trial.snapshot]
        for trial in alive:
            if rung < 1:
                trial.score = float(interquartile_mean(_returns(trial.snapshot)))
            why = _NOT_FINITE if failed_iteration(trial.snapshot.metrics).any() else _NO_EPISODE
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


def _train_groups(spec: Spec, alive: list[Trial], rung: float, num_rungs: int, programs: dict[Any, Programs]) -> None:
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
                jax.clear_caches()  # its traces, some 4 MB each
                gc.collect()  # the program and its traces refer to each other
            try:
                programs[shape] = _compile(spec, groups[shape], num_rungs)
            except UsageError as error:  # it does not fit into memory
                for trial in groups[shape]:
                    trial.why, trial.snapshot = str(error).rstrip("."), None
                continue
        programs[shape] = programs.pop(shape)  # the last was used last
        _train_until(programs[shape], spec, groups[shape], rung)


def _returns(snapshot: Snapshot) -> np.ndarray:
    """The scores that rank agents before the end: the last evaluation, or else the training return. [A]."""
    judged = snapshot.eval_return
    return judged[:, -1] if judged is not None and judged.shape[1] else training_return(snapshot.metrics)


def _distinct_rungs(num_iterations: int) -> list[float]:
    """The shares that end after different iterations: one iteration must not rank the trials twice."""
    return list({_end(rung, num_iterations): rung for rung in _RUNGS}.values())


def _end(rung: float, num_iterations: int) -> int:
    return max(1, round(rung * num_iterations))


def _compile(spec: Spec, group: list[Trial], num_rungs: int) -> Programs:
    """Compile programs as wide as the trials that reach the last stage."""
    devices = jax.local_devices()
    last = -(-len(group) // 2 ** (num_rungs - 1))
    most = agents_per_block(last * spec.num_seeds, len(devices))
    return fit_programs(group[0].config, most, spec.num_episodes, devices)


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
