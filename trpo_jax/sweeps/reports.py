"""What a sweep found: a table sorted by IQM, pictures, the failures, and one page with all of it."""

from __future__ import annotations

import base64
import csv
import dataclasses
import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trpo_jax.config import UsageError
from trpo_jax.files import SETTINGS, write_atomically
from trpo_jax.runs import fill_forward
from trpo_jax.sweeps.statistics import interquartile_mean, stratified_bootstrap
from trpo_jax.sweeps.storage import Folder

_CURVES = 8  # best points whose learning curves are drawn


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
      curve: training return an iteration, IQM over seeds; NaN before the first episode ended.
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
    curve: np.ndarray


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything a sweep's folder says.

    Attributes:
      rows: {environment: its rows, best first}.
      overall: (settings, IQM, interval) over all environments, best first; empty for one environment.
      failures: (environment, settings, seed, iteration) of each agent that met a number that was not finite.
      score: what the score is, in words.
      num_agents: finished agents.
      description: sweep.json.
    """

    rows: dict[str, list[Row]]
    overall: list[tuple[dict[str, Any], float, tuple[float, float]]]
    failures: list[tuple[str, dict[str, Any], int, int]]
    score: str
    num_agents: int
    description: dict[str, Any]


def make_report(path: str | os.PathLike[str]) -> Report:
    """Read a sweep's finished results, complete or not.

    Raises:
      UsageError: if there are none, or a file is damaged.
    """
    folder = Folder(path)
    description = folder.description()
    names = ["point", "seed", "final_return", "training_return", "failed_at", *SETTINGS]
    table = folder.read_results([*names, "episode_return"])
    if table is None:
        raise UsageError(f"{path} has no finished agents yet; `trpo-jax sweep` with --output {path} continues it.")
    columns = {name: np.array(table[name].to_pylist(), dtype=object) for name in names}
    by_mode = description.get("num_episodes", 0) > 0
    score = columns["final_return" if by_mode else "training_return"].astype(np.float64)
    curves = table["episode_return"]
    rows: dict[str, list[Row]] = {}
    failures = []
    for env in dict.fromkeys(columns["env"]):
        here = np.flatnonzero(columns["env"] == env)
        varied = [name for name in SETTINGS if name != "env" and len(set(columns[name][here])) > 1]
        if "num_iterations" in varied and len(varied) > 1 and _follows(columns, here, "num_iterations", varied):
            varied.remove("num_iterations")  # total_steps was given: it follows from the sizes
        rows[env] = []
        for point in dict.fromkeys(columns["point"][here]):
            agents = here[columns["point"][here] == point]
            settings = {name: columns[name][agents[0]] for name in varied}
            failed = [int(i) for i in agents if columns["failed_at"][i] is not None]
            failures += [(env, settings, int(columns["seed"][i]), int(columns["failed_at"][i])) for i in failed]
            returns = np.array(curves.take(agents).to_pylist(), dtype=np.float64)
            per_iteration = columns["num_envs"][agents[0]] * columns["num_steps"][agents[0]]
            scores = score[agents]
            rows[env].append(
                Row(
                    env=env,
                    settings=settings,
                    iqm=float(interquartile_mean(scores)),
                    interval=stratified_bootstrap([scores]),
                    mean=float(np.mean(scores)),
                    worst=float(np.min(scores)),
                    num_seeds=len(agents),
                    num_failed=len(failed),
                    scores=scores,
                    steps=per_iteration * np.arange(1, returns.shape[1] + 1),
                    curve=_curve(returns),
                )
            )
        rows[env].sort(key=lambda row: -np.nan_to_num(row.iqm, nan=-np.inf))
    episodes = description.get("num_episodes", 0)
    words = f"mean return of {episodes} episodes by the policy's mode" if by_mode else "training return at the end"
    return Report(rows, _overall(rows), failures, words, len(score), description)


def _follows(columns: Mapping[str, np.ndarray], here: np.ndarray, name: str, varied: Sequence[str]) -> bool:
    """Whether a setting is decided by num_envs and num_steps where those vary too."""
    if not {"num_envs", "num_steps"} & set(varied):
        return False
    sizes = {(columns["num_envs"][i], columns["num_steps"][i]) for i in here}
    return len({(columns["num_envs"][i], columns["num_steps"][i], columns[name][i]) for i in here}) == len(sizes)


def _curve(returns: np.ndarray) -> np.ndarray:
    """IQM over seeds of [seeds, iterations]; an iteration in which no episode ended repeats the one before."""
    return interquartile_mean(fill_forward(returns.T), axis=1)


def _overall(rows: Mapping[str, Sequence[Row]]) -> list[tuple[dict[str, Any], float, tuple[float, float]]]:
    """Points by their scores in all environments, each scaled from its worst point's IQM (0) to its best's (1)."""
    if len(rows) < 2:
        return []
    tables = []
    for env_rows in rows.values():
        iqms = np.array([row.iqm for row in env_rows])
        low, high = np.nanmin(iqms), np.nanmax(iqms)
        scale = high - low if high > low else 1.0
        tables.append({json.dumps(row.settings): (row.settings, (row.scores - low) / scale) for row in env_rows})
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    found = []
    for key in shared:
        scores = [table[key][1] for table in tables]
        found.append(
            (tables[0][key][0], float(interquartile_mean(np.concatenate(scores))), stratified_bootstrap(scores))
        )
    return sorted(found, key=lambda entry: -np.nan_to_num(entry[1], nan=-np.inf)) if len(found) > 1 else []


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells of an environment's table, best first."""
    names = list(rows[0].settings)
    titles = [*names, "IQM", "95 % interval", "mean", "worst seed", "seeds", "failed"]
    cells = []
    for row in rows:
        values = [_text(row.settings[name]) for name in names]
        interval = f"{row.interval[0]:.1f} … {row.interval[1]:.1f}"
        numbers = [f"{row.iqm:.1f}", interval, f"{row.mean:.1f}", f"{row.worst:.1f}"]
        cells.append([*values, *numbers, str(row.num_seeds), str(row.num_failed)])
    return titles, cells


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(path: str | os.PathLike[str], report: Report) -> Path:
    """Write report.html, its pictures as PNG files, and table.csv into the folder; return the page's path."""
    folder = Path(path)
    pictures: list[tuple[str, bytes]] = []
    for env, rows in report.rows.items():
        suffix = f"_{env}" if len(report.rows) > 1 else ""
        pictures.append((f"learning_curves{suffix}.png", _png(_draw_curves(env, rows))))
        figure = _draw_settings(env, rows)
        if figure:
            pictures.append((f"settings{suffix}.png", _png(figure)))
    for name, data in pictures:
        write_atomically(folder / name, data)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for env, rows in report.rows.items():
        titles, _ = table_of(rows)
        interval = ["iqm", "low", "high", "mean", "worst", "seeds", "failed"]
        writer.writerow(["env", *titles[: len(rows[0].settings)], *interval])
        for row in rows:
            numbers = [row.iqm, *row.interval, row.mean, row.worst, row.num_seeds, row.num_failed]
            writer.writerow([env, *row.settings.values(), *numbers])
    write_atomically(folder / "table.csv", text.getvalue())
    page = folder / "report.html"
    write_atomically(page, _page(folder.name, report, pictures))
    return page


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, dpi=130, format="png")
    return data.getvalue()


def _figure(width: float, height: float) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    return Figure(figsize=(width, height), layout="constrained")


def _draw_curves(env: str, rows: Sequence[Row]) -> Any:
    figure = _figure(7.5, 4.2)
    axes = figure.add_subplot()
    for row in rows[:_CURVES]:
        label = ", ".join(f"{name}={_text(value)}" for name, value in row.settings.items()) or "all"
        axes.plot(row.steps, row.curve, linewidth=1.5, label=label)
    best = f", the {_CURVES} best of {len(rows)} points" if len(rows) > _CURVES else ""
    axes.set(title=f"{env}{best}", xlabel="environment steps (each agent)", ylabel="training return, IQM over seeds")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
    axes.grid(alpha=0.3)
    if len(rows) > 1:
        axes.legend(fontsize=7, loc="best")
    return figure


def _draw_settings(env: str, rows: Sequence[Row]) -> Any:
    """Score against the settings: a line for one, a heat map for a full grid of two, scatter plots otherwise."""
    names = list(rows[0].settings)
    if not names:
        return None
    if len(names) == 1 and _is_number(rows, names[0]):
        return _draw_line(env, rows, names[0])
    if len(names) == 2 and len(rows) == np.prod([len({row.settings[name] for row in rows}) for name in names]):
        return _draw_heat_map(env, rows, names)
    return _draw_scatter(env, rows, names)


def _is_number(rows: Sequence[Row], name: str) -> bool:
    values = [row.settings[name] for row in rows]
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _scale(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis for values that span more than a factor of 20."""
    if min(values) > 0 and max(values) > 20 * min(values):
        axis.axes.set_xscale("log")


def _draw_line(env: str, rows: Sequence[Row], name: str) -> Any:
    figure = _figure(6, 4)
    axes = figure.add_subplot()
    ordered = sorted(rows, key=lambda row: row.settings[name])
    values = [row.settings[name] for row in ordered]
    low, high = zip(*(row.interval for row in ordered), strict=True)
    axes.fill_between(values, low, high, alpha=0.2, label="95 % interval")
    axes.plot(values, [row.iqm for row in ordered], marker="o", label="IQM over seeds")
    _scale(axes.xaxis, values)
    axes.set(title=env, xlabel=name, ylabel="score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _draw_heat_map(env: str, rows: Sequence[Row], names: Sequence[str]) -> Any:
    ordered = [sorted({row.settings[name] for row in rows}, key=_order) for name in names]
    grid = np.full([len(values) for values in ordered], np.nan)
    for row in rows:
        at = tuple(values.index(row.settings[name]) for name, values in zip(names, ordered, strict=True))
        grid[at] = row.iqm
    figure = _figure(1.5 + 0.9 * grid.shape[1], 1.5 + 0.6 * grid.shape[0])
    axes = figure.add_subplot()
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap="viridis")
    figure.colorbar(image, label="IQM")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for i, j in np.ndindex(*grid.shape):
        color = "black" if grid[i, j] > middle else "white"
        axes.text(j, i, f"{grid[i, j]:.0f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(grid.shape[1]), [_text(value) for value in ordered[1]])
    axes.set_yticks(range(grid.shape[0]), [_text(value) for value in ordered[0]])
    axes.set(title=env, xlabel=names[1], ylabel=names[0])
    return figure


def _draw_scatter(env: str, rows: Sequence[Row], names: Sequence[str]) -> Any:
    figure = _figure(3.2 * min(4, len(names)), 3 * -(-len(names) // 4))
    panels = figure.subplots(-(-len(names) // 4), min(4, len(names)), squeeze=False, sharey=True).ravel()
    scores = [row.iqm for row in rows]
    for axes, name in zip(panels, names, strict=False):
        values = [row.settings[name] for row in rows]
        if _is_number(rows, name):
            axes.scatter(values, scores, s=16)
            _scale(axes.xaxis, values)
        else:
            kinds = sorted(set(values), key=_order)
            axes.scatter([kinds.index(value) for value in values], scores, s=16)
            axes.set_xticks(range(len(kinds)), [_text(kind) for kind in kinds])
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.remove()
    panels[0].set_ylabel("score, IQM over seeds")
    figure.suptitle(env)
    return figure


def _order(value: Any) -> tuple[str, Any]:
    return ("", value) if isinstance(value, (int, float)) else (type(value).__name__, str(value))


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .25em .8em; text-align: right; }
th { border-bottom: 2px solid #888; } tr:nth-child(even) td { background: #f4f6f8; }
img { max-width: 100%; display: block; margin: 1em 0; } pre { background: #f4f6f8; padding: 1em; overflow-x: auto; }
"""


def _page(title: str, report: Report, pictures: Sequence[tuple[str, bytes]]) -> str:
    made_by = report.description.get("made_by", {})
    parts = [
        "<!DOCTYPE html>",
        f"<html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style></head>",
        f"<body><h1>{html.escape(title)}</h1>",
        f"<p>{report.num_agents:,} agents. Score: {report.score}. IQM: mean of the middle half of the seeds, with a "
        "95 % percentile interval of the stratified bootstrap.</p>",
    ]
    if report.overall:
        parts.append("<h2>All environments</h2>")
        parts.append("<p>Scores scaled in each environment from its worst point's IQM (0) to its best's (1).</p>")
        names = list(report.overall[0][0])
        cells = [
            [*(_text(settings[name]) for name in names), f"{iqm:.3f}", f"{low:.3f} … {high:.3f}"]
            for settings, iqm, (low, high) in report.overall
        ]
        parts.append(_html_table([*names, "IQM", "95 % interval"], cells))
    for env, rows in report.rows.items():
        parts.append(f"<h2>{html.escape(env)}</h2>")
        parts.append(_html_table(*table_of(rows)))
        for name, data in pictures:
            if len(report.rows) == 1 or name.endswith(f"_{env}.png"):
                encoded = base64.b64encode(data).decode()
                parts.append(f"<img alt='{html.escape(name)}' src='data:image/png;base64,{encoded}'>")
    parts.append("<h2>Failures</h2>")
    if report.failures:
        parts.append("<p>Agents that met a number that was not finite, at which iteration.</p>")
        cells = [
            [env, ", ".join(f"{n}={_text(v)}" for n, v in settings.items()), str(seed), str(iteration)]
            for env, settings, seed, iteration in report.failures
        ]
        parts.append(_html_table(["environment", "settings", "seed", "iteration"], cells))
    else:
        parts.append("<p>None: every reward, observation and parameter was a finite number.</p>")
    asked = {name: value for name, value in report.description.items() if name != "made_by"}
    parts.append("<h2>The sweep</h2>")
    parts.append(f"<pre>{html.escape(json.dumps(asked, indent=1))}</pre>")
    parts.append(f"<p>Made by {html.escape(', '.join(f'{n} {v}' for n, v in made_by.items()))}.</p></body></html>")
    return "\n".join(parts) + "\n"


def _html_table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
