"""A report as files: one page with everything, its pictures, and a table."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import html
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trpo_jax.files import as_path, remove_temporaries, write_atomically
from trpo_jax.runs.learning_curve import label_steps
from trpo_jax.sentences import name_of
from trpo_jax.sweeps.drawing import (
    SOFTWARE,
    heading,
    html_table,
    image,
    label_of,
    number,
    page,
    paragraph,
    plain,
    plot_band,
    png,
    scale_axis,
    sized_figure,
    text_of,
)
from trpo_jax.sweeps.iqm import bootstrap_band
from trpo_jax.sweeps.reports import Report, Row, scale_of, table_of

_POINTS = 60  # of a learning curve
_CURVES = 8  # best points whose learning curves are drawn
_LARGEST = 40  # rows or columns of a heat map; a larger one has no numbers in its cells
_ROWS = 1000  # of a table on the page; a browser takes long for many thousands
_DOTS = 2000  # of a scatter plot; more points are summarised
_TICKS = 8  # of an axis of a large heat map
_GROUPS = 40  # of points with similar values of a setting, in a summary


def write_report(path: str | os.PathLike[str], report: Report) -> Path:
    """Write report.html, its pictures as PNG files, and table.csv into the folder; return the page's path.

    Pictures of earlier reports that this one does not have are removed.
    """
    folder = as_path(path)
    pictures: dict[str, list[tuple[str, bytes]]] = {}
    for env, rows in report.rows.items():
        suffix = f"_{_file_name(env)}" if len(report.rows) > 1 else ""
        drawn = {"learning_curves": _draw_curves(env, rows), "settings": _draw_settings(env, rows, report.logarithmic)}
        pictures[env] = [(f"{kind}{suffix}.png", png(figure)) for kind, figure in drawn.items() if figure]
    files = dict(picture for drawn_there in pictures.values() for picture in drawn_there)
    for name, data in files.items():
        write_atomically(folder / name, data)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for env, rows in report.rows.items():
        interval = ["iqm", "low", "high", "median", "mean", "worst", "seeds", "failed"]
        writer.writerow(["env", *rows[0].settings, *interval])
        for row in rows:
            numbers = [row.iqm, *row.interval, row.median, row.mean, row.worst, row.num_seeds, row.num_failed]
            writer.writerow([env, *row.settings.values(), *numbers])
    write_atomically(folder / "table.csv", text.getvalue())
    file = folder / "report.html"
    write_atomically(file, _page(name_of(folder), report, pictures))
    _remove_stale(folder, files)
    remove_temporaries(folder)
    return file


def _file_name(name: str) -> str:
    """A name as part of a file name. If characters must be replaced, a checksum keeps it distinct."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        return name
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:48]
    return f"{plain}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _remove_stale(folder: Path, files: Mapping[str, bytes]) -> None:
    """Remove the pictures of earlier reports that this one does not have."""
    for file in [*folder.glob("learning_curves*.png"), *folder.glob("settings*.png")]:
        with contextlib.suppress(OSError):
            if file.name not in files and SOFTWARE.encode() in file.read_bytes()[:256]:
                file.unlink()


def _page(title: str, report: Report, pictures: Mapping[str, Sequence[tuple[str, bytes]]]) -> str:
    parts = [
        paragraph(
            f"{report.extent}. Score: {report.score}. IQM: mean of the middle half of the seeds, with a 95 % "
            "percentile interval of the stratified bootstrap."
        )
    ]
    if report.overall:
        parts.append(heading("All environments"))
        parts.append(
            paragraph("Scores scaled in each environment from the first training returns (0) to its best IQM (1).")
        )
        names = list(report.overall[0][0])
        cells = [
            [*(text_of(settings[name]) for name in names), f"{iqm:.3f}", f"{low:.3f} … {high:.3f}"]
            for settings, iqm, (low, high) in report.overall[:_ROWS]
        ]
        parts.append(html_table([*names, "IQM", "95 % interval"], cells))
    for env, rows in report.rows.items():
        parts += [heading(env), html_table(*table_of(rows[:_ROWS]))]
        if len(rows) > _ROWS:
            parts.append(paragraph(f"The best {_ROWS:,} of {len(rows):,} points; table.csv has all."))
        parts += [image(*picture) for picture in pictures[env]]
    parts += _failures(report)
    asked = {name: value for name, value in report.description.items() if name != "made_by"}
    made_by = report.description.get("made_by", {})
    parts.append(heading("The sweep"))
    parts.append(f"<pre>{html.escape(json.dumps(asked, indent=1))}</pre>")
    parts.append(paragraph(f"Made by {', '.join(f'{n} {v}' for n, v in made_by.items())}."))
    return page(title, parts)


def _failures(report: Report) -> list[str]:
    """The section about agents that met a number that was not finite, or accepted no update any more."""
    if not report.failures and not report.stalled:
        return [heading("Failures"), paragraph("None: every reward, observation and parameter was a finite number.")]
    parts = [heading("Failures")]
    if report.failures:
        parts += _agents("Agents that met a number that was not finite, and at which iteration.", report.failures)
    if report.stalled:
        told = "Agents whose last ten or more updates were all rejected, and the last iteration with an accepted one."
        mend = "Raise cg_damping or fisher_fraction, or use larger batches."
        parts += _agents(f"{told} {mend}", report.stalled)
    return parts


def _agents(told: str, agents: Sequence[tuple[str, dict[str, Any], int, int]]) -> list[str]:
    """A paragraph, and a table of agents with an iteration of each."""
    cells = [
        [env, ", ".join(f"{n}={text_of(v)}" for n, v in settings.items()), str(seed), str(iteration)]
        for env, settings, seed, iteration in agents[:_ROWS]
    ]
    more = f" The first {_ROWS:,} of {len(agents):,}." if len(agents) > _ROWS else ""
    return [paragraph(told + more), html_table(["environment", "settings", "seed", "iteration"], cells)]


# Pictures


def _draw_curves(env: str, rows: Sequence[Row]) -> Any:
    """Draw the learning curves of the best points with their intervals; the legend is below."""
    shown = rows[:_CURVES]
    labels = [label_of(row.settings) for row in shown]
    lines = sum(label.count("\n") + 1 for label in labels) if len(rows) > 1 else 0
    figure = sized_figure(7.5, 4.2 + 0.09 * lines)
    axes = figure.add_subplot()
    for row, label in zip(shown, labels, strict=True):
        at = np.unique(np.linspace(0, len(row.steps) - 1, _POINTS).round().astype(int))
        band = bootstrap_band(row.steps[at], [row.returns[:, at].astype(np.float64)])
        plot_band(axes, band, label, shade=0.18 if len(shown) <= 4 else 0.08)
    any_episode = any(np.isfinite(row.curve).any() for row in shown)
    best = f", the {_CURVES} best of {len(rows):,} points" if len(rows) > _CURVES else ""
    title, ylabel = plain(f"{env}{best}"), "training return, IQM over seeds and 95 % interval"
    label_steps(axes, any_episode, title=title, xlabel="environment steps per agent", ylabel=ylabel)
    if len(rows) > 1:
        figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    return figure


def _draw_settings(env: str, rows: Sequence[Row], logarithmic: set[str]) -> Any:
    """Draw the score against the settings: a line for one, a heat map for a full grid of two, else scatter plots.

    Of very many points the scatter plots are summaries.
    """
    names = list(rows[0].settings)
    if not names:
        return None
    if len(names) == 1 and len(rows) <= _DOTS and _is_number(rows, names[0]):
        return _draw_line(env, rows, names[0], names[0] in logarithmic)
    if len(names) == 2 and len(rows) == np.prod([len({row.settings[name] for row in rows}) for name in names]):
        return _draw_heat_map(env, rows, names)
    return _draw_scatter(env, rows, names, logarithmic)


def _is_number(rows: Sequence[Row], name: str) -> bool:
    values = [row.settings[name] for row in rows]
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _draw_line(env: str, rows: Sequence[Row], name: str, logarithmic: bool) -> Any:
    figure = sized_figure(6, 4)
    axes = figure.add_subplot()
    ordered = sorted(rows, key=lambda row: row.settings[name])
    values = [row.settings[name] for row in ordered]
    low, high = zip(*(row.interval for row in ordered), strict=True)
    axes.fill_between(values, low, high, alpha=0.2, label="95 % interval")
    axes.plot(values, [row.iqm for row in ordered], marker="o", label="IQM over seeds")
    scale_axis(axes, values, logarithmic=logarithmic)
    axes.set(title=plain(env), xlabel=name, ylabel="score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _draw_heat_map(env: str, rows: Sequence[Row], names: Sequence[str]) -> Any:
    ordered = [sorted({row.settings[name] for row in rows}, key=_order) for name in names]
    places = [{value: i for i, value in enumerate(values)} for values in ordered]
    grid = np.full([len(values) for values in ordered], np.nan)
    for row in rows:
        grid[tuple(place[row.settings[name]] for name, place in zip(names, places, strict=True))] = row.iqm
    numbered = max(grid.shape) <= _LARGEST
    width, height = 1.5 + 0.9 * grid.shape[1], 1.5 + 0.6 * grid.shape[0]
    figure = sized_figure(width, height) if numbered else sized_figure(min(width, 10), min(height, 8))
    axes = figure.add_subplot()
    finite = np.where(np.isfinite(grid), grid, np.nan)
    low, high = _color_range(rows)
    colors = axes.imshow(finite, origin="lower", aspect="auto", cmap="viridis", vmin=low, vmax=high)
    figure.colorbar(colors, label="IQM")
    for i, j in np.ndindex(*grid.shape) if numbered else ():
        color = "white" if grid[i, j] <= (low + high) / 2 else "black"
        axes.text(j, i, number(float(grid[i, j])), ha="center", va="center", color=color, fontsize=8)
    for set_ticks, values in ((axes.set_yticks, ordered[0]), (axes.set_xticks, ordered[1])):
        shown = range(0, len(values), 1 if numbered else -(-len(values) // _TICKS))
        set_ticks(shown, [plain(text_of(values[i])) for i in shown])
    axes.set(title=plain(env), xlabel=names[1], ylabel=names[0])
    return figure


def _color_range(rows: Sequence[Row]) -> tuple[float, float]:
    """The scores of the darkest and the lightest colour, which span at least a quarter of what the best point learned.

    So 499 and 500 look alike if training started at 20.
    """
    known = [row.iqm for row in rows if np.isfinite(row.iqm)]
    low, high = scale_of(rows)
    return (min(*known, max(known) - (high - low) / 4), max(known)) if known else (0.0, 1.0)


def _draw_scatter(env: str, rows: Sequence[Row], names: Sequence[str], logarithmic: set[str]) -> Any:
    figure = sized_figure(3.2 * min(4, len(names)), 3 * -(-len(names) // 4))
    panels = figure.subplots(-(-len(names) // 4), min(4, len(names)), squeeze=False, sharey=True).ravel()
    scores = [row.iqm for row in rows]
    draw = _draw_dots if len(rows) <= _DOTS else _draw_summary
    for axes, name in zip(panels, names, strict=False):
        values = [row.settings[name] for row in rows]
        if _is_number(rows, name):
            draw(axes, values, scores)
            scale_axis(axes, values, logarithmic=name in logarithmic)
        else:
            kinds = sorted(set(values), key=_order)
            draw(axes, [kinds.index(value) for value in values], scores)
            axes.set_xticks(range(len(kinds)), [plain(text_of(kind)) for kind in kinds])
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.remove()
    panels[0].set_ylabel("score, IQM over seeds")
    told = "" if draw is _draw_dots else f", {len(rows):,} points: median, middle half, and best"
    figure.suptitle(plain(f"{env}{told}"))
    return figure


def _draw_dots(axes: Any, values: Sequence[float], scores: Sequence[float]) -> None:
    axes.scatter(values, scores, s=16)


def _draw_summary(axes: Any, values: Sequence[float], scores: Sequence[float]) -> None:
    """Draw quartiles and the best of the scores for each value, or for groups of similar values if they are many."""
    x, y = np.array(values, np.float64), np.array(scores)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if not x.size:
        return
    order, starts = np.argsort(x, kind="stable"), np.unique(np.sort(x), return_index=True)[1]
    groups = np.split(order, starts[1:]) if len(starts) <= _GROUPS else np.array_split(order, _GROUPS)
    middle = [np.median(x[group]) for group in groups]
    low, median, high, best = np.transpose([np.percentile(y[group], (25, 50, 75, 100)) for group in groups])
    axes.fill_between(middle, low, high, alpha=0.2)
    axes.plot(middle, median, marker=".")
    axes.plot(middle, best, linestyle="", marker="_")


def _order(value: Any) -> tuple[str, Any]:
    return ("", value) if isinstance(value, (int, float)) else (type(value).__name__, str(value))
