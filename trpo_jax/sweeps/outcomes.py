"""Results of the agents in a folder, in one form for runs and sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trpo_jax.env_args import PREFIX
from trpo_jax.fields import NEVER, as_text
from trpo_jax.runs.descriptions import read_table, restore_or_anew
from trpo_jax.runs.evaluations import read_evaluations
from trpo_jax.runs.metrics import fill_forward, read_metrics
from trpo_jax.sentences import UsageError, first_line, name_of, nearest, readable, shown
from trpo_jax.settings import SETTINGS
from trpo_jax.sweeps.cohorts import training_return
from trpo_jax.sweeps.drawing import texts_of
from trpo_jax.sweeps.plans import num_seeds_by_point, sections_of
from trpo_jax.sweeps.storage import Folder

_MOST = 10  # methods that colours can distinguish


class Curves(NamedTuple):
    """Returns [S, K] of S agents at environment steps [K] per agent."""

    steps: np.ndarray
    returns: np.ndarray

    def at(self, steps: np.ndarray) -> np.ndarray:
        """The newest return at each of these numbers of steps, [S, len(steps)]; NaN if there is none yet."""
        newest = np.searchsorted(self.steps, steps * (1 + 1e-9), side="right") - 1  # a share of a whole is rounded
        found = fill_forward(self.returns.T)[np.maximum(newest, 0)].T
        return np.where(newest >= 0, found, np.nan)


class Outcome(NamedTuple):
    """Results of S agents with equal settings, from a run or from a point of a sweep.

    Attributes:
      settings: settings by name, in the form of tables.
      final: mean return of each agent's mode after training, as a sweep evaluates it, [S]; None if it was not.
      training: training return at the end, [S].
      returns: training returns during training.
      evaluations: mean returns of evaluations during training; None if there were none.
      complete: whether training is finished.
    """

    settings: dict[str, Any]
    final: np.ndarray | None
    training: np.ndarray
    returns: Curves
    evaluations: Curves | None
    complete: bool

    @property
    def env(self) -> str:
        """The name of the environment."""
        return str(self.settings["env"])


def read_outcomes(path: Path) -> list[Outcome]:
    """Read the results of the agents in a folder: one entry for a run, one per point for a sweep, finished or not.

    Raises:
      UsageError: if it is not the folder of either, has no results yet, or a file in it is damaged.
    """
    if (path / "sweep.json").exists():
        return _of_sweep(path)
    if (path / "config.json").exists():
        return [_of_run(path)]
    raise UsageError(f"{path} is the folder of neither a run nor a sweep (it has no config.json and no sweep.json).")


def _of_run(path: Path) -> Outcome:
    asked = read_table(path / "config.json", "run")  # nothing that it names is imported
    settings = {n: as_text(tuple(v) if isinstance(v, list) else v) for n, v in asked.items() if _is_setting(n)}
    try:
        seeds, per_iteration = asked["num_seeds"], settings["num_envs"] * settings["num_steps"]
        table = read_metrics(path)
        done = len(table["iteration"]) // seeds
        metrics = {name: column[: done * seeds].reshape(done, seeds).T for name, column in table.items()}
        evaluations = _evaluations(path, asked["seed"], seeds)
        if not done:
            raise FileNotFoundError
        returns = Curves(per_iteration * np.arange(1, done + 1), _finite(metrics["episode_return"]))
        complete = done >= settings["num_iterations"] or _have_stopped(settings, evaluations)
        return Outcome(settings, None, training_return(metrics), returns, evaluations, complete)
    except FileNotFoundError:
        raise UsageError(f"{path} has no results yet; train it, or leave it out.") from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        what = f"metrics.csv or eval.csv: {first_line(error)}"
        raise UsageError(f"{path} is damaged ({what}); {restore_or_anew('run')}.") from error


def _is_setting(name: str) -> bool:
    return name in SETTINGS or name.startswith(PREFIX)


def _finite(returns: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(returns), returns, np.nan)


def _evaluations(path: Path, seed: int, num_seeds: int) -> Curves | None:
    """The evaluations of a run; an agent that has reached its goal repeats its last one."""
    rows = list(read_evaluations(path))
    if not rows:
        return None
    steps, at = np.unique([env_steps for _, env_steps, _, _ in rows], return_inverse=True)
    means = np.full((num_seeds, len(steps)), np.nan)
    for i, (_, _, agent, values) in zip(at, rows, strict=True):
        means[agent - seed, i] = values["mean"]
    return Curves(steps, fill_forward(_finite(means).T).T)


def _have_stopped(settings: Mapping[str, Any], evaluations: Curves | None) -> bool:
    """Whether all agents of a run have reached the return at which they stop."""
    goal = settings.get("stop_at_return", NEVER)
    return evaluations is not None and goal < NEVER and bool(np.all(evaluations.returns[:, -1] >= goal))


def setting_columns(description: Mapping[str, Any]) -> tuple[str, ...]:
    """Every setting that the results of a sweep may have, with those of its environments: "env.gravity"."""
    sections = sections_of(description, "base", "grid", "zip", "random")
    of_env = {name for section in sections for name in section if name.startswith(PREFIX)}
    return (*SETTINGS, *sorted(of_env))


def policy_words(stochastic: Iterable[bool]) -> str:
    """How the agents acted in some evaluations: " by sampled actions", or "" if not all acted in the same way."""
    ways = set(stochastic)
    return "" if len(ways) > 1 else " by sampled actions" if True in ways else " by the policy's mode"


def columns_of(table: Any, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Columns of results as arrays of Python's values; equal ones are one object, so that many agents take little."""
    columns = {}
    for name in names:
        encoded = table[name].combine_chunks().dictionary_encode("encode")
        values = np.empty(len(encoded.dictionary), object)
        values[:] = encoded.dictionary.to_pylist()
        columns[name] = values[encoded.indices.to_numpy()]
    return columns


def lists_of(column: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A function from agents to their lists in a column, which are equally long, as float64 [S, K]; K = 0 without."""
    if column.null_count == len(column):
        return lambda agents: np.empty((len(agents), 0))
    lists = column.combine_chunks()
    numbers, ends = lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy()
    return lambda agents: np.array([numbers[ends[i] : ends[i + 1]] for i in agents], np.float64)


def agents_by_point(points: np.ndarray) -> dict[int, np.ndarray]:
    """Where the agents of each point are, in order of first appearance."""
    found, first, at = np.unique(points.astype(np.int64), return_index=True, return_inverse=True)
    members = np.split(np.argsort(at, kind="stable"), np.cumsum(np.bincount(at))[:-1])
    return {int(found[i]): members[i] for i in np.argsort(first)}


def _of_sweep(path: Path) -> list[Outcome]:
    folder = Folder(path)
    description = folder.description()
    names = setting_columns(description)
    others = ["point", "final_return", "training_return", "episode_return", "eval_return"]
    table = folder.read_results([*names, *others])
    if table is None:
        raise UsageError(f"{path} has no finished agents yet; continue it, or leave it out.")
    if any(table[name].null_count for name in ("point", "env", "num_envs", "num_steps", "episode_return")):
        raise UsageError(f"results in {path} lack columns; restore them, or leave the sweep out.")
    columns = columns_of(table, [*names, "point", "final_return", "training_return"])
    lists = {name: lists_of(table[name]) for name in ("episode_return", "eval_return")}
    asked = num_seeds_by_point(description)
    evaluated = description.get("num_episodes", 0) > 0
    by_point = agents_by_point(columns["point"]).items()
    return [_of_point(columns, lists, agents, names, asked(point), evaluated) for point, agents in by_point]


def _of_point(
    columns: Mapping[str, np.ndarray],
    lists: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    agents: np.ndarray,
    names: tuple[str, ...],
    num_seeds: int,
    evaluated_at_end: bool,
) -> Outcome:
    settings = {name: columns[name][agents[0]] for name in names}

    def column(name: str) -> np.ndarray:
        return columns[name][agents].astype(np.float64)

    per_iteration = settings["num_envs"] * settings["num_steps"]
    returns = lists["episode_return"](agents)
    evaluated = lists["eval_return"](agents)
    steps = per_iteration * np.arange(1, returns.shape[1] + 1)
    evaluations = None
    if evaluated.shape[1]:
        every = per_iteration * (settings.get("eval_every") or 1)
        evaluations = Curves(every * np.arange(1, evaluated.shape[1] + 1), _finite(evaluated))
    final = column("final_return") if evaluated_at_end else None
    complete = len(agents) >= num_seeds
    return Outcome(settings, final, column("training_return"), Curves(steps, _finite(returns)), evaluations, complete)


# Which agents belong together


def read_folders(paths: Sequence[Path]) -> dict[str, list[Outcome]]:
    """Read the results in each folder, under its name, or its whole path if two have the same name."""
    names = [name_of(path) for path in paths]
    twice = [path for i, path in enumerate(paths) if path.resolve() in [other.resolve() for other in paths[:i]]]
    if twice:
        raise UsageError(f"{twice[0]} is given twice; leave one out.")
    labels = [readable(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
    if len(set(labels)) < len(labels):  # their paths differ only in bytes that are no text
        labels = [f"{label} ({i})" for i, label in enumerate(labels, 1)]
    return {label: read_outcomes(path) for label, path in zip(labels, paths, strict=True)}


def group_outcomes(folders: Mapping[str, list[Outcome]], by: Sequence[str]) -> dict[str, dict[str, list[Outcome]]]:
    """Group results by method and task."""
    every = [outcome for outcomes in folders.values() for outcome in outcomes]
    for name in by:
        if name not in ("folder", *SETTINGS) and not name.startswith(PREFIX):
            raise UsageError(f"--by names no setting, {shown(name)}{nearest(name, ('folder', *SETTINGS))}")
    if "env" in by:
        raise UsageError("--by env would compare returns of different environments; leave it out: each is a task.")
    own = {n for o in every for n in o.settings if (n.startswith(PREFIX) or n == "max_steps") and n not in by}
    apart = {group[0].env: sorted(name for name in own if differ(name, group)) for group in _by_env(every)}
    named = {*by, *(name for names in apart.values() for name in names)} - {"folder"}
    texts = {name: texts_of(outcome.settings.get(name) for outcome in every) for name in named}
    texts["folder"] = {folder: folder for folder in folders}
    groups: dict[str, dict[str, list[Outcome]]] = {}
    for folder, outcomes in folders.items():
        for outcome in outcomes:
            known = {**outcome.settings, "folder": folder}
            name = ", ".join(f"{n}={texts[n][known.get(n)]}" for n in by) or folder
            task = ", ".join([outcome.env, *(f"{n}={texts[n][known.get(n)]}" for n in apart[outcome.env])])
            groups.setdefault(name, {}).setdefault(task, []).append(outcome)
    if len(groups) == 1:
        varied = [n for n in SETTINGS if n != "env" and differ(n, every)]
        mend = f"separate more by --by {' or '.join(varied[:3])}" if varied else "give another folder"
        raise UsageError(f"there is only one method, {next(iter(groups))}, but two are needed; {mend}.")
    if len(groups) > _MOST:
        raise UsageError(f"there are {len(groups)} methods, more than {_MOST}; give fewer folders, or another --by.")
    return groups


def _by_env(outcomes: Iterable[Outcome]) -> list[list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.env, []).append(outcome)
    return list(found.values())


def differ(name: str, outcomes: Iterable[Outcome]) -> bool:
    """Whether a setting has more than one value."""
    return len({str(outcome.settings.get(name)) for outcome in outcomes}) > 1
