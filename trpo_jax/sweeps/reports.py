"""What a sweep found: a table sorted by IQM, pictures, the failures, and one page with all of it."""

from __future__ import annotations

import base64
import contextlib
import csv
import dataclasses
import hashlib
import html
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trpo_jax.config import UsageError, counted
from trpo_jax.files import SETTINGS, remove_temporaries, write_atomically
from trpo_jax.runs import fill_forward
from trpo_jax.sweeps.statistics import interquartile_mean, stratified_bootstrap
from trpo_jax.sweeps.storage import Folder

_CURVES = 8  # best points whose learning curves are drawn
_LARGEST = 40  # inches of a picture; what does not fit goes without its numbers
_SOFTWARE = "trpo_jax report"  # stands in every picture of ours, so that nobody else's is ever removed


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
      num_asked: agents of the whole sweep.
      description: sweep.json.
    """

    rows: dict[str, list[Row]]
    overall: list[tuple[dict[str, Any], float, tuple[float, float]]]
    failures: list[tuple[str, dict[str, Any], int, int]]
    score: str
    num_agents: int
    num_asked: int
    description: dict[str, Any]

    @property
    def extent(self) -> str:
        """How many of its agents it is of: "384 agents", or "48 of 384 agents" of a sweep that is not finished."""
        of = f"{self.num_agents:,} of " if self.num_agents < self.num_asked else ""
        return of + counted(self.num_asked, "agent")


def make_report(path: str | os.PathLike[str]) -> Report:
    """Read a sweep's finished results, complete or not.

    Raises:
      UsageError: if there are none, or a file is damaged.
    """
    folder = Folder(path)
    description = folder.description()
    episodes = max(0, description.get("num_episodes", 0))
    needed = ["point", "seed", "num_envs", "num_steps", "env", "episode_return"]
    outcomes = ["final_return", "training_return", "failed_at"]
    table = folder.read_results(list({*needed, *outcomes, *SETTINGS}))
    if table is None:
        raise UsageError(f"{path} has no finished agents yet; `trpo-jax sweep` with --output {path} continues it.")
    missing = [name for name in needed if table[name].null_count]
    if missing:
        raise UsageError(
            f"results in {path} lack {', '.join(missing)}; restore them, or sweep anew into another folder."
        )
    curves = table["episode_return"]
    columns = {
        name: np.array(table[name].to_pylist(), dtype=object)
        for name in {*needed, *outcomes, *SETTINGS} - {"episode_return"}
    }
    score = columns["final_return" if episodes else "training_return"].astype(np.float64)
    crossed = {name for section in ("grid", "random") for name in _section(description, section)}
    rows: dict[str, list[Row]] = {}
    failures = []
    for env in dict.fromkeys(columns["env"]):
        here = np.flatnonzero(columns["env"] == env)
        # What is crossed with the environments names a point in each of them, though a part of it be unfinished.
        seen = {name: columns[name] if name in crossed else columns[name][here] for name in SETTINGS if name != "env"}
        varied = [name for name, values in seen.items() if len(set(values)) > 1]
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
            rows[env].append(_make_row(env, settings, score[agents], returns, per_iteration, len(failed)))
        rows[env].sort(key=lambda row: -np.nan_to_num(row.iqm, nan=-np.inf))
    by_mode = f"mean return of {counted(episodes, 'episode')} by the policy's mode"
    words = by_mode if episodes else "training return at the end"
    asked = max(len(score), _num_agents(description))
    return Report(rows, _overall(rows), failures, words, len(score), asked, description)


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
        curve=_curve(returns),
    )


def _section(description: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = description.get(name)
    return section if isinstance(section, Mapping) else {}


def _num_agents(description: Mapping[str, Any]) -> int:
    """How many agents sweep.json asks for; 0 if it does not say."""
    try:
        crossed = math.prod(len(values) for values in _section(description, "grid").values())
        together = [len(values) for values in _section(description, "zip").values()] or [1]
        drawn = int(_section(description, "random").get("count", 1))
        return crossed * together[0] * drawn * int(description["num_seeds"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0


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
        iqms = [row.iqm for row in env_rows if math.isfinite(row.iqm)] or [0.0]
        low, scale = min(iqms), (max(iqms) - min(iqms)) or 1.0
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
        interval = f"{_number(row.interval[0])} … {_number(row.interval[1])}"
        numbers = [_number(row.iqm), interval, _number(row.mean), _number(row.worst)]
        cells.append([*values, *numbers, str(row.num_seeds), str(row.num_failed)])
    return titles, cells


def _number(value: float) -> str:
    return f"{value:.1f}" if value == 0 or 1 <= abs(value) < 1e6 else f"{value:.3g}"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(path: str | os.PathLike[str], report: Report) -> Path:
    """Write report.html, its pictures as PNG files, and table.csv into the folder; return the page's path.

    Pictures of a report before it that it does not have go.
    """
    folder = Path(path)
    pictures: dict[str, list[tuple[str, bytes]]] = {}
    for env, rows in report.rows.items():
        suffix = f"_{_file_name(env)}" if len(report.rows) > 1 else ""
        drawn = {"learning_curves": _draw_curves(env, rows), "settings": _draw_settings(env, rows)}
        pictures[env] = [(f"{kind}{suffix}.png", _png(figure)) for kind, figure in drawn.items() if figure]
    files = dict(picture for drawn_there in pictures.values() for picture in drawn_there)
    for name, data in files.items():
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
    write_atomically(page, _page(folder.resolve().name, report, pictures))
    _remove_stale(folder, files)
    remove_temporaries(folder)
    return page


def _file_name(name: str) -> str:
    """A name as a part of a file's name. Where it cannot stand as it is, a checksum keeps it apart from its like."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        return name
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:48]
    return f"{plain}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _remove_stale(folder: Path, files: Mapping[str, bytes]) -> None:
    """Remove the pictures of earlier reports that this one does not have."""
    for file in [*folder.glob("learning_curves*.png"), *folder.glob("settings*.png")]:
        with contextlib.suppress(OSError):
            if file.name not in files and _SOFTWARE.encode() in file.read_bytes()[:256]:
                file.unlink()


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, dpi=130, format="png", metadata={"Software": _SOFTWARE})
    return data.getvalue()


def _figure(width: float, height: float) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    return Figure(figsize=(min(width, _LARGEST), min(height, _LARGEST)), layout="constrained")


def _plain(text: str) -> str:
    """Text in which a dollar begins no formula."""
    return text.replace("$", r"\$")


def _draw_curves(env: str, rows: Sequence[Row]) -> Any:
    figure = _figure(7.5, 4.2)
    axes = figure.add_subplot()
    for row in rows[:_CURVES]:
        label = ", ".join(f"{name}={_text(value)}" for name, value in row.settings.items()) or "all"
        alone = np.isfinite(row.curve).sum() == 1  # a line through one point is none
        axes.plot(row.steps, row.curve, linewidth=1.5, label=_plain(label), marker="o" if alone else "")
    if not any(np.isfinite(row.curve).any() for row in rows[:_CURVES]):
        axes.text(0.5, 0.5, "no episode has ended", ha="center", va="center", transform=axes.transAxes)
    best = f", the {_CURVES} best of {len(rows)} points" if len(rows) > _CURVES else ""
    axes.set(
        title=_plain(f"{env}{best}"), xlabel="environment steps per agent", ylabel="training return, IQM over seeds"
    )
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
    axes.set(title=_plain(env), xlabel=name, ylabel="score")
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
    finite = np.where(np.isfinite(grid), grid, np.nan)
    image = axes.imshow(finite, origin="lower", aspect="auto", cmap="viridis")
    figure.colorbar(image, label="IQM")
    known = finite[~np.isnan(finite)]
    middle = (known.min() + known.max()) / 2 if known.size else 0.0
    for i, j in np.ndindex(*grid.shape) if max(grid.shape) <= _LARGEST else ():
        color = "white" if grid[i, j] <= middle else "black"
        axes.text(
            j,
            i,
            f"{grid[i, j]:.0f}" if 100 <= abs(grid[i, j]) < 1e5 else f"{grid[i, j]:.2g}",
            ha="center",
            va="center",
            color=color,
            fontsize=8,
        )
    for set_ticks, values in ((axes.set_yticks, ordered[0]), (axes.set_xticks, ordered[1])):
        shown = range(0, len(values), -(-len(values) // _LARGEST))
        set_ticks(shown, [_plain(_text(values[i])) for i in shown])
    axes.set(title=_plain(env), xlabel=names[1], ylabel=names[0])
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
            axes.set_xticks(range(len(kinds)), [_plain(_text(kind)) for kind in kinds])
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.remove()
    panels[0].set_ylabel("score, IQM over seeds")
    figure.suptitle(_plain(env))
    return figure


def _order(value: Any) -> tuple[str, Any]:
    return ("", value) if isinstance(value, (int, float)) else (type(value).__name__, str(value))


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .25em .8em; text-align: right; }
th { border-bottom: 2px solid #888; } tr:nth-child(even) td { background: #f4f6f8; }
img { max-width: 100%; display: block; margin: 1em 0; } pre { background: #f4f6f8; padding: 1em; overflow-x: auto; }
"""


def _page(title: str, report: Report, pictures: Mapping[str, Sequence[tuple[str, bytes]]]) -> str:
    made_by = report.description.get("made_by", {})
    parts = [
        "<!DOCTYPE html>",
        f"<html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style></head>",
        f"<body><h1>{html.escape(title)}</h1>",
        f"<p>{report.extent}. Score: {report.score}. IQM: mean of the middle half of the seeds, with a "
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
        for name, data in pictures[env]:
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
