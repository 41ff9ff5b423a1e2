"""Searching for settings: Optuna proposes batches of trials, one compiled program trains them, the worse half stops.

Every trial of a batch trains for a quarter of its iterations; the better half goes on to a half, and the better half
of those to the end (successive halving, Jamieson & Talwalkar 2016). Programs are as wide as the last stage, so that
what is stopped early is really saved.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trpo_jax.config import UsageError
from trpo_jax.files import is_whole, settings_of, write_atomically
from trpo_jax.sweeps.grids import TUNING_SEEDS, Spec, make_point, stack_configs, static_part
from trpo_jax.sweeps.loop import METRICS, training_return
from trpo_jax.sweeps.placement import CAPACITY, Programs, agents_per_block, fit_programs, from_host, to_host
from trpo_jax.sweeps.statistics import interquartile_mean
from trpo_jax.training.agents import make_agent
from trpo_jax.types import Config

_RUNGS = 0.25, 0.5, 1.0  # shares of the iterations after which the worse half stops


@dataclasses.dataclass
class Trial:
    """A trial at work.

    Attributes:
      asked: Optuna's trial.
      config: its configuration.
      states: states of its agents [S, ...] on the host; None before the first iteration.
      rows: metrics of its agents {name: [S, iterations]}.
      score: IQM over its agents after the last stage that it reached.
    """

    asked: Any
    config: Config
    states: Any = None
    rows: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    score: float = float("nan")


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a batch reports: trials told so far, of `count`; its best score; the best score of all and its settings."""

    told: int
    count: int
    pruned: int
    batch_best: float
    best: float
    settings: dict[str, Any]


def tune(
    path: str | os.PathLike[str],
    spec: Spec,
    *,
    batch: int = 16,
    storage: str | None = None,
    report: Callable[[Batch], None] = lambda batch: None,
) -> tuple[Path, float]:
    """Search the distributions of `spec.random` for the settings with the highest score; continue what is there.

    Args:
      path: folder for the study and for best.toml.
      spec: base settings, distributions and their count, the number of trials; `num_seeds` agents a trial. Its seeds
        are `TUNING_SEEDS` and the ones after it, which no sweep and no `train` by default uses.
      batch: trials proposed and trained together.
      storage: Optuna's storage URL; by default an SQLite file in the folder.
      report: called after each batch.

    Returns:
      The file with the best settings, for `trpo-jax train --config`, and their score on the tuning seeds.

    Raises:
      UsageError: if Optuna is missing, or the spec or the folder cannot be used.
    """
    space = {name: values for name, values in spec.random.items() if name not in ("count", "seed")}
    if not space or spec.grid or spec.zip:
        raise UsageError("tune searches the distributions in [random], and takes neither [grid] nor [zip].")
    lower = {name: _lowest(values) for name, values in space.items()}
    make_agent(make_point(spec.base, lower).config)  # bad input shows before anything is written
    folder = Path(path)
    study = _open_study(folder, spec, storage)
    programs: dict[Any, Programs] = {}
    count = spec.random["count"]
    while (told := _told(study)) < count:
        trials = _ask(study, spec, space, min(batch, count - told))
        pruned = _run_batch(study, spec, trials, programs)
        scores = [trial.score for trial in trials if np.isfinite(trial.score)]
        if _has_best(study):
            report(
                Batch(
                    _told(study), count, pruned, max(scores, default=float("nan")), study.best_value, study.best_params
                )
            )
    if not _has_best(study):
        raise UsageError(f"no trial in {folder} reached a finite score; widen or move the distributions in [random].")
    config = make_point(spec.base, study.best_params).config
    file = folder / "best.toml"
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in settings_of(config).items()]
    score = f"# score {study.best_value:.6g} on {spec.num_seeds} tuning seeds, best of {count} trials\n"
    write_atomically(file, score + "\n".join(lines) + "\n")
    return file, study.best_value


def _open_study(folder: Path, spec: Spec, storage: str | None) -> Any:
    try:
        import optuna
    except ImportError:
        raise UsageError("tune needs Optuna; install it with `pip install '.[tune]'`.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    description = json.loads(json.dumps(dataclasses.asdict(spec)))
    description["random"].pop("count", None)  # more trials of the same search are welcome
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sampler = optuna.samplers.TPESampler(seed=spec.random.get("seed", 0), constant_liar=True)
        study = optuna.create_study(
            study_name=folder.resolve().name,
            storage=storage or f"sqlite:///{folder.resolve() / 'study.db'}",
            direction="maximize",
            sampler=sampler,
            load_if_exists=True,
        )
        known = study.user_attrs.get("sweep")
        if known is None:
            study.set_user_attr("sweep", description)
        elif known != description:
            changed = [name for name in description if known.get(name) != description[name]]
            raise UsageError(f"{folder} holds a search with another {', '.join(changed)}; choose another --output.")
        for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # of a process that was killed
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another --output.") from error
    except UsageError:
        raise
    except Exception as error:  # whichever database is behind the URL
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"the study in {storage or folder} cannot be opened ({reason[:200]}).") from error
    return study


def _told(study: Any) -> int:
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.PRUNED]))


def _has_best(study: Any) -> bool:
    from optuna.trial import TrialState

    return bool(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))


def _lowest(distribution: Mapping[str, Any]) -> Any:
    ((_, values),) = distribution.items()
    return values[0]


def _ask(study: Any, spec: Spec, space: Mapping[str, Any], number: int) -> list[Trial]:
    trials = []
    for _ in range(number):
        asked = study.ask()
        varied = {name: _suggest(asked, name, distribution) for name, distribution in space.items()}
        trials.append(Trial(asked, make_point(spec.base, varied).config))
    return trials


def _suggest(trial: Any, name: str, distribution: Mapping[str, Any]) -> Any:
    ((kind, values),) = distribution.items()
    if kind == "choice":
        return trial.suggest_categorical(name, list(values))
    suggest = trial.suggest_int if is_whole(name) else trial.suggest_float
    return suggest(name, *values, log=kind == "log_uniform")


def _run_batch(study: Any, spec: Spec, trials: list[Trial], programs: dict[Any, Programs]) -> int:
    """Train a batch by successive halving and tell the study; returns how many trials stopped early."""
    from optuna.trial import TrialState

    alive = list(trials)
    rungs = _distinct_rungs(min(trial.config.num_iterations for trial in trials))
    for rung in rungs:
        for shape in dict.fromkeys(static_part(trial.config) for trial in alive):
            group = [trial for trial in alive if static_part(trial.config) == shape]
            if shape not in programs:
                programs[shape] = _compile(spec, group, len(rungs))
            _train_until(programs[shape], spec, group, rung)
        for trial in alive:
            if rung < 1:
                trial.score = float(interquartile_mean(training_return(trial.rows)))
            if np.isfinite(trial.score):
                trial.asked.report(trial.score, step=trial.rows["finite"].shape[1])
        if rung < 1:
            alive.sort(key=lambda trial: -np.nan_to_num(trial.score, nan=-np.inf))
            keep = -(-len(alive) // 2)
            for trial in alive[keep:]:
                study.tell(trial.asked, state=TrialState.PRUNED)
                trial.states = None
            alive = alive[:keep]
    for trial in alive:
        if np.isfinite(trial.score):
            study.tell(trial.asked, trial.score)
        else:
            study.tell(trial.asked, state=TrialState.PRUNED)
    return len(trials) - len(alive)


def _distinct_rungs(num_iterations: int) -> list[float]:
    """Those of the shares that end after different iterations: one iteration ranks the trials once, not twice."""
    return list({_end(rung, num_iterations): rung for rung in _RUNGS}.values())


def _end(rung: float, num_iterations: int) -> int:
    return max(1, round(rung * num_iterations))


def _compile(spec: Spec, group: list[Trial], num_rungs: int) -> Programs:
    """Programs as wide as the trials that reach the last stage."""
    devices = jax.local_devices()
    last = -(-len(group) // 2 ** (num_rungs - 1))
    most = agents_per_block(last * spec.num_seeds, len(devices))
    return fit_programs(group[0].config, most, spec.num_episodes, devices)


def _train_until(programs: Programs, spec: Spec, group: list[Trial], rung: float) -> None:
    """Advance every trial of a group to a share of its iterations; judge it when that is all."""
    seeds = jax.jit(jax.vmap(jax.random.key))(TUNING_SEEDS + spec.seed + np.arange(spec.num_seeds))
    agents = [(trial, i) for trial in group for i in range(spec.num_seeds)]
    width = programs.agents_per_block * programs.num_blocks
    end = _end(rung, group[0].config.num_iterations)
    parts = []
    for first in range(0, len(agents), width):
        members = agents[first : first + width]
        padded = members + members[:1] * (width - len(members))
        configs = stack_configs([trial.config for trial, _ in padded])
        if group[0].states is None:
            states, done = programs.start(configs, seeds[np.array([i for _, i in padded])]), 0
        else:
            one_by_one = [jax.tree.map(lambda leaf, i=i: leaf[i], trial.states) for trial, i in padded]
            states = from_host(jax.tree.map(lambda *leaves: np.stack(leaves), *one_by_one), programs.states)
            done = group[0].rows["finite"].shape[1]
        rows: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
        while done < end:
            length = min(CAPACITY, end - done)
            states, metrics = programs.advance(configs, states, np.int32(length))
            for name in METRICS:
                rows[name].append(np.asarray(getattr(metrics, name))[:, :length])
            done += length
        judged = np.asarray(programs.judge(configs, states)) if rung == 1 and programs.judge else None
        table = {name: np.concatenate(values, axis=1) for name, values in rows.items() if values}
        parts.append((members, to_host(states), table, judged))
    _hand_out(parts, spec, rung)


def _hand_out(parts: list[Any], spec: Spec, rung: float) -> None:
    """Give every trial the states, rows and scores of its agents."""
    states: dict[int, list[Any]] = {}
    rows: dict[int, list[Any]] = {}
    judged: dict[int, list[float]] = {}
    trials: dict[int, Trial] = {}
    for members, host, table, scores in parts:
        for at, (trial, _) in enumerate(members):
            number = trial.asked.number
            trials[number] = trial
            states.setdefault(number, []).append(jax.tree.map(lambda leaf, at=at: leaf[at], host))
            rows.setdefault(number, []).append({name: values[at] for name, values in table.items()})
            if scores is not None:
                judged.setdefault(number, []).append(float(scores[at]))
    for number, trial in trials.items():
        trial.states = jax.tree.map(lambda *leaves: np.stack(leaves), *states[number])
        for name in rows[number][0]:
            new = np.stack([row[name] for row in rows[number]])
            trial.rows[name] = np.concatenate([trial.rows[name], new], axis=1) if name in trial.rows else new
        if rung == 1:
            scores = np.array(judged[number]) if number in judged else training_return(trial.rows)
            trial.score = float(interquartile_mean(scores))
