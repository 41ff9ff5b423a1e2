"""Search for settings: Optuna proposes batches of trials, which successive halving trains."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.environments.make import mark_traced
from trpo_jax.fields import as_text
from trpo_jax.files import as_path, move_aside, write_atomically
from trpo_jax.runs.continuing import continue_run
from trpo_jax.runs.descriptions import in_json, made_by
from trpo_jax.runs.folders import Run, create_run, open_run
from trpo_jax.runs.learning_curve import plot_learning_curve
from trpo_jax.runs.workers import check_workers, start_workers
from trpo_jax.sentences import UsageError, counted
from trpo_jax.settings import cast, checked_settings, read_toml, settings_of, with_length
from trpo_jax.sweeps.grids import TUNING_SEEDS, Spec, checked_spec, draws_whole, make_point
from trpo_jax.sweeps.halving import NO_EPISODE, NOT_FINITE, Trial, run_batch
from trpo_jax.sweeps.programs import Programs
from trpo_jax.sweeps.studies import Study, open_study
from trpo_jax.training.agents import make_agent

_COMBINATIONS = 64  # of first and last values that are tried before a search is refused
_CONTINUES = "what is recorded is safe, and the same command continues when the folder can be written to"


@dataclasses.dataclass(frozen=True)
class Batch:
    """Report of a batch: trials finished so far, of `count`; its best score; the best score of all, and its settings.

    `trials` are all finished ones of Optuna.
    """

    finished: int
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
    num_workers: int = 1,
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
      num_workers: processes that train the agents of environments that run in Python; see `run_sweep`.

    Returns:
      The file with the best settings, for `trpo-jax train --config`, and their score on the tuning seeds.

    Raises:
      UsageError: if Optuna is missing, the spec, the folder or the study cannot be used, or no trial has a score.
    """
    spec = checked_spec(spec)
    check_workers(num_workers)
    space = {name: values for name, values in spec.random.items() if name not in ("count", "seed")}
    if not space or spec.grid or spec.zip:
        raise UsageError("tune searches the distributions in [random], and takes neither [grid] nor [zip].")
    check_space(spec.base, space)  # bad input shows before anything is written
    programs: dict[Any, Programs] = {}
    count = spec.random["count"]
    with (
        open_study(path, spec, storage, made_by()) as study,
        start_workers(min(num_workers, batch * spec.num_seeds)) as workers,
    ):
        file = as_path(path) / "best.toml"
        trials: list[Trial] = []
        pruned, nothing = 0, float("nan")
        while True:
            with study.at_work():
                ended, best = study.ended(), study.best()
            finished = len(ended)
            if best:
                _write_best(file, spec, best, finished)
            if trials or finished >= count:
                scores = [trial.score for trial in trials if np.isfinite(trial.score)]
                value, settings = (best.value, best.params) if best else (nothing, {})
                report(Batch(finished, count, pruned, max(scores, default=nothing), value, settings, ended))
            if finished >= count:
                break
            with study.at_work():
                trials = [_make_trial(asked, spec, space) for asked in study.ask(min(batch, count - finished))]
            pruned = run_batch(study, spec, trials, programs, workers)
        if not best:
            raise UsageError(_why_no_score(study, path, finished))
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


def train_best(file: Path, spec: Spec, num_workers: int = 1) -> Path | None:
    """Train the agents of the best trial again, in a run of their own next to its settings, best.toml.

    They learn the same as in the search, whose programs keep no states. A run of these settings that `resume` has made
    longer stays as it is; a run of earlier best settings moves to best-1, best-2, ….

    Returns:
      Its folder; None if it was interrupted: `resume`, or the continued search, finishes it.
    """
    config = mark_traced(with_length(checked_settings(read_toml(file), str(file)), Config()))
    folder = file.with_suffix("")
    run = Run(folder, config, TUNING_SEEDS + spec.seed, spec.num_seeds)
    found = open_run(folder) if (folder / "config.json").exists() else None
    kept = found if found and _is_same_or_longer(found, run) else None
    if found and not kept and found.seed == run.seed:
        move_aside(folder)
    run = kept or create_run(folder, config, run.seed, run.num_seeds)
    complete = continue_run(run, num_workers=num_workers)
    plot_learning_curve(run)
    return folder if complete else None


def _is_same_or_longer(found: Run, run: Run) -> bool:
    """Whether a run that is there already has the settings of another one, and at least its length."""
    same = dataclasses.replace(found, config=found.config.replace(num_iterations=run.config.num_iterations))
    length = found.config.num_iterations >= run.config.num_iterations
    return length and same.description == in_json(run.description)


def _write_best(file: Path, spec: Spec, best: Any, finished: int) -> None:
    config = make_point(spec.base, best.params).config
    quoted = {json.dumps(name) if "." in name else name: value for name, value in settings_of(config).items()}
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in quoted.items()]
    score = (
        f"# score {best.value:.6g} on {counted(spec.num_seeds, 'tuning seed')}, best of {counted(finished, 'trial')}\n"
    )
    write_atomically(file, score + "\n".join(lines) + "\n", _CONTINUES)


def _why_no_score(study: Study, path: str | os.PathLike[str], finished: int) -> str:
    """The message for a search in which no trial has a score: what happened, and what to do about it."""
    with study.at_work():
        reasons = study.reasons().most_common()
    happened = (
        ", ".join(f"{why} ({number} of {finished})" for why, number in reasons) or f"all {finished} stopped early"
    )
    mend = {
        NO_EPISODE: "raise total_steps, or evaluate with num_episodes",
        NOT_FINITE: "move the distributions in [random] to smaller steps, or check the environment",
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
