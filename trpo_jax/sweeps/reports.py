"""Report of a sweep: a table sorted by IQM, pictures, the failures, and one page with all of it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trpo_jax.runs.metrics import fill_forward, stalled
from trpo_jax.sentences import UsageError, counted
from trpo_jax.sweeps.drawing import interval_text, number, texts_of
from trpo_jax.sweeps.iqm import first_returns, interquartile_mean, score_scale, stratified_bootstrap
from trpo_jax.sweeps.outcomes import agents_by_point, columns_of, lists_of, policy_words, setting_columns
from trpo_jax.sweeps.plans import earlier_forms, plan, sections_of, spec_of
from trpo_jax.sweeps.storage import Folder


@dataclasses.dataclass(frozen=True)
class Row:
    """One point of a sweep, over its seeds.

    Attributes:
      env: environment.
      settings: the settings in which the points of this environment differ.
      iqm: interquartile mean of the scores.
      interval: its 95 % bootstrap interval.
      mean: mean score.
      worst: lowest score.
      num_seeds: agents that are finished.
      num_failed: those of them that met a number that was not finite.
      scores: every score, [num_seeds].
      steps: environment steps of the learning curve, [iterations].
      returns: training return per iteration of each agent, float32 [num_seeds, iterations]; an iteration in which no
        episode ended repeats the one before; NaN before the first one.
    """

    env: str
    settings: dict[str, Any]
    iqm: float
    interval: tuple[float, float]
    mean: float
    worst: float
    num_seeds: int
    num_failed: int
    scores: np.ndarray
    steps: np.ndarray
    returns: np.ndarray

    @property
    def curve(self) -> np.ndarray:
        """IQM over seeds of the training returns, [iterations]."""
        curve: np.ndarray = interquartile_mean(self.returns, axis=0)
        return curve

    @property
    def median(self) -> float:
        """Median score."""
        return float(np.median(self.scores))

    @property
    def merit(self) -> tuple[float, ...]:
        """The key that ranks points, lowest first: IQM, then mean, worst seed, and the curve's mean height."""
        curve = self.curve
        area = float(curve[np.isfinite(curve)].mean()) if np.isfinite(curve).any() else math.nan
        return tuple(-math.inf if math.isnan(value) else value for value in (self.iqm, self.mean, self.worst, area))


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of a sweep, summarised.

    Attributes:
      rows: {environment: its rows, best first}.
      overall: (settings, IQM, interval) over all environments, best first; empty for one environment.
      failures: (environment, settings, seed, iteration) of each agent that met a number that was not finite.
      stalled: (environment, settings, seed, iteration) of each agent of TRPO whose last ten or more updates were all
        rejected, with the last iteration in which one was accepted, or 0.
      score: the meaning of the score, in words.
      num_agents: finished agents.
      num_asked: agents of the whole sweep.
      description: sweep.json.
    """

    rows: dict[str, list[Row]]
    overall: list[tuple[dict[str, Any], float, tuple[float, float]]]
    failures: list[tuple[str, dict[str, Any], int, int]]
    stalled: list[tuple[str, dict[str, Any], int, int]]
    score: str
    num_agents: int
    num_asked: int
    description: dict[str, Any]

    @property
    def extent(self) -> str:
        """How much is done: "384 agents", or "48 of 384 agents, 12 % of the sweep" if it is not finished."""
        if self.num_agents >= self.num_asked:
            return counted(self.num_asked, "agent")
        share = math.floor(100 * self.num_agents / self.num_asked)
        return f"{self.num_agents:,} of {counted(self.num_asked, 'agent')}, {share} % of the sweep"

    @property
    def logarithmic(self) -> set[str]:
        """The settings that the sweep draws from a log-uniform distribution."""
        drawn = [entry for section in sections_of(self.description, "random") for entry in section.items()]
        return {name for name, kind in drawn if isinstance(kind, Mapping) and "log_uniform" in kind}


def make_report(path: str | os.PathLike[str]) -> Report:
    """Make the report of a sweep's finished results, complete or not.

    Raises:
      UsageError: if there are none, or a file is damaged.
    """
    folder = Folder(path)
    description = folder.description()
    episodes = max(0, description.get("num_episodes", 0))
    needed = ["point", "seed", "num_envs", "num_steps", "env", "episode_return"]
    outcomes = ["final_return", "training_return", "failed_at"]
    settings_known = setting_columns(description)
    judged = ["accepted", "finite"]
    table = folder.read_results(list({*needed, *outcomes, *judged, *settings_known}))
    if table is None:
        raise UsageError(f"{path} has no finished agents yet; `trpo-jax sweep` with --output {path} continues it.")
    missing = [name for name in needed if table[name].null_count]
    if missing:
        raise UsageError(f"results in {path} lack {', '.join(missing)}; restore them, or sweep again elsewhere.")
    curves, accepted, finite = (lists_of(table[name]) for name in ("episode_return", *judged))
    columns = columns_of(table, {*needed, *outcomes, *settings_known} - {"episode_return"})
    score = columns["final_return" if episodes else "training_return"].astype(np.float64)
    crossed = {name for section in sections_of(description, "grid", "random") for name in section}
    rows: dict[str, list[Row]] = {}
    failures, standing = [], []
    for env in dict.fromkeys(columns["env"]):
        here = np.flatnonzero(columns["env"] == env)
        # A setting crossed with the environments is named in each of them, even if a part of it is unfinished.
        seen = {n: columns[n] if n in crossed else columns[n][here] for n in settings_known if n != "env"}
        varied = [name for name, values in seen.items() if len(set(values)) > 1]
        if "num_iterations" in varied and len(varied) > 1 and _follows(columns, here, "num_iterations", varied):
            varied.remove("num_iterations")  # total_steps was given, and the iterations follow from the sizes
        rows[env] = []
        for members in agents_by_point(columns["point"][here]).values():
            agents = here[members]
            settings = {name: columns[name][agents[0]] for name in varied}
            failed = [int(i) for i in agents if columns["failed_at"][i] is not None]
            failures += [(env, settings, int(columns["seed"][i]), int(columns["failed_at"][i])) for i in failed]
            if columns["update"][agents[0]] == "trpo":
                last = _stalled(columns["seed"][agents], accepted(agents), finite(agents))
                standing += [(env, settings, seed, iteration) for seed, iteration in last.items()]
            per_iteration = columns["num_envs"][agents[0]] * columns["num_steps"][agents[0]]
            rows[env].append(_make_row(env, settings, score[agents], curves(agents), per_iteration, len(failed)))
        rows[env].sort(key=lambda row: row.merit, reverse=True)
    evaluated = f"mean return of {counted(episodes, 'episode')}{policy_words(columns['eval_stochastic'])}"
    words = evaluated if episodes else "training return at the end"
    asked = max(len(score), _num_agents(description))
    return Report(rows, _overall(rows), failures, standing, words, len(score), asked, description)


def _stalled(seeds: np.ndarray, accepted: np.ndarray, finite: np.ndarray) -> dict[int, int]:
    """`stalled` of a point, from metrics [seeds, iterations]."""
    if accepted.shape != finite.shape or (accepted[:, -1:] > 0).all():  # unequal: another version did not write one
        return {}
    seed, iteration = np.broadcast_arrays(seeds[:, None], np.arange(1, accepted.shape[1] + 1))
    table = {"seed": seed, "iteration": iteration, "accepted": accepted, "finite": finite}
    return stalled({name: values.ravel() for name, values in table.items()})


def _make_row(
    env: str, settings: dict[str, Any], scores: np.ndarray, returns: np.ndarray, per_iteration: int, num_failed: int
) -> Row:
    """A point from the scores [seeds] and returns [seeds, iterations] of its agents."""
    with np.errstate(invalid="ignore"):  # ∞ - ∞
        mean = float(np.mean(scores))
    return Row(
        env=env,
        settings=settings,
        iqm=float(interquartile_mean(scores)),
        interval=stratified_bootstrap([scores]),
        mean=mean,
        worst=float(np.min(scores)),
        num_seeds=len(scores),
        num_failed=num_failed,
        scores=scores,
        steps=per_iteration * np.arange(1, returns.shape[1] + 1),
        returns=fill_forward(returns.T).T.astype(np.float32),
    )


def _section(description: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = description.get(name)
    return section if isinstance(section, Mapping) else {}


def _num_agents(description: Mapping[str, Any]) -> int:
    """The number of agents that sweep.json describes; 0 if none is given."""
    if description.get("before"):
        return sum(group.num_agents for group in plan(spec_of(description), earlier_forms(description))[1])
    try:
        crossed = math.prod(len(values) for values in _section(description, "grid").values())
        together = [len(values) for values in _section(description, "zip").values()] or [1]
        drawn = int(_section(description, "random").get("count", 1))
        return crossed * together[0] * drawn * int(description["num_seeds"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0


def _follows(columns: Mapping[str, np.ndarray], here: np.ndarray, name: str, varied: Sequence[str]) -> bool:
    """Whether a setting follows from num_envs and num_steps, which vary too."""
    if not {"num_envs", "num_steps"} & set(varied):
        return False
    sizes = {(columns["num_envs"][i], columns["num_steps"][i]) for i in here}
    return len({(columns["num_envs"][i], columns["num_steps"][i], columns[name][i]) for i in here}) == len(sizes)


def _overall(rows: Mapping[str, Sequence[Row]]) -> list[tuple[dict[str, Any], float, tuple[float, float]]]:
    """Rank points by their scores in all environments, each scaled from the start of training (0) to its best (1)."""
    if len(rows) < 2:
        return []
    tables = []
    for env_rows in rows.values():
        low, high = scale_of(env_rows)
        scaled = [(row.settings, (row.scores - low) / (high - low)) for row in env_rows]
        tables.append({json.dumps(settings): (settings, scores) for settings, scores in scaled})
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    found = []
    for key in shared:
        scores = [table[key][1] for table in tables]
        iqm = float(interquartile_mean(np.concatenate(scores)))
        found.append((tables[0][key][0], iqm, stratified_bootstrap(scores)))
    return sorted(found, key=lambda entry: -np.nan_to_num(entry[1], nan=-np.inf)) if len(found) > 1 else []


def scale_of(rows: Sequence[Row]) -> tuple[float, float]:
    """The returns of an environment at the start of training, and the IQM of its best point, see `score_scale`."""
    first = np.concatenate([first_returns(row.returns) for row in rows]).astype(np.float64)
    return score_scale(first, np.array([row.iqm for row in rows]))


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells of an environment's table, best first."""
    names = list(rows[0].settings)
    titles = [*names, "IQM", "95 % interval", "median", "mean", "worst seed", "seeds", "failed"]
    texts = {name: texts_of(row.settings[name] for row in rows) for name in names}
    cells = []
    for row in rows:
        values = [texts[name][row.settings[name]] for name in names]
        numbers = [number(row.iqm), interval_text(*row.interval), *map(number, (row.median, row.mean, row.worst))]
        cells.append([*values, *numbers, str(row.num_seeds), str(row.num_failed)])
    return titles, cells


def narrow_table_of(rows: Sequence[Row], width: int) -> tuple[list[str], list[list[str]]]:
    """The table without less important columns, in so many characters: settings that do not fit share a column."""
    titles, cells = table_of(rows)
    settings = len(rows[0].settings)
    kept = [i for i, title in enumerate(titles) if title not in ("mean", "seeds", "failed")]
    titles, cells = [titles[i] for i in kept], [[row[i] for i in kept] for row in cells]
    needed = sum(max(len(row[i]) for row in (titles, *cells)) + 2 for i in range(len(titles)))
    if settings > 1 and needed > width:
        joined = [", ".join(f"{n}={v}" for n, v in zip(titles, row[:settings], strict=False)) for row in cells]
        return ["settings", *titles[settings:]], [
            [one, *row[settings:]] for one, row in zip(joined, cells, strict=True)
        ]
    return titles, cells
