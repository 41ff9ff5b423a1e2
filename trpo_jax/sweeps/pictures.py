"""Pictures of a sweep: learning curves, and scores against settings."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from trpo_jax.runs.learning_curve import label_steps, make_figure
from trpo_jax.sweeps.reports import Row, text_of

_CURVES = 8  # best points whose learning curves are drawn
_LARGEST = 40  # inches of a picture; what does not fit goes without its numbers
SOFTWARE = "trpo_jax report"  # stands in every picture of ours, so that nobody else's is ever removed


def png(figure: Any) -> bytes:
    """A figure as the content of a PNG file."""
    data = io.BytesIO()
    figure.savefig(data, dpi=130, format="png", metadata={"Software": SOFTWARE})
    return data.getvalue()


def _figure(width: float, height: float) -> Any:
    return make_figure(min(width, _LARGEST), min(height, _LARGEST))


def _plain(text: str) -> str:
    """Text in which a dollar begins no formula."""
    return text.replace("$", r"\$")


def draw_curves(env: str, rows: Sequence[Row]) -> Any:
    """A figure of the learning curves of the best points."""
    figure = _figure(7.5, 4.2)
    axes = figure.add_subplot()
    for row in rows[:_CURVES]:
        label = ", ".join(f"{name}={text_of(value)}" for name, value in row.settings.items()) or "all"
        alone = np.isfinite(row.curve).sum() == 1  # a line through one point is none
        axes.plot(row.steps, row.curve, linewidth=1.5, label=_plain(label), marker="o" if alone else "")
    any_episode = any(np.isfinite(row.curve).any() for row in rows[:_CURVES])
    best = f", the {_CURVES} best of {len(rows)} points" if len(rows) > _CURVES else ""
    title, ylabel = _plain(f"{env}{best}"), "training return, IQM over seeds"
    label_steps(axes, any_episode, title=title, xlabel="environment steps per agent", ylabel=ylabel)
    if len(rows) > 1:
        axes.legend(fontsize=7, loc="best")
    return figure


def draw_settings(env: str, rows: Sequence[Row]) -> Any:
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
        text = f"{grid[i, j]:.0f}" if 100 <= abs(grid[i, j]) < 1e5 else f"{grid[i, j]:.2g}"
        axes.text(j, i, text, ha="center", va="center", color=color, fontsize=8)
    for set_ticks, values in ((axes.set_yticks, ordered[0]), (axes.set_xticks, ordered[1])):
        shown = range(0, len(values), -(-len(values) // _LARGEST))
        set_ticks(shown, [_plain(text_of(values[i])) for i in shown])
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
            axes.set_xticks(range(len(kinds)), [_plain(text_of(kind)) for kind in kinds])
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.remove()
    panels[0].set_ylabel("score, IQM over seeds")
    figure.suptitle(_plain(env))
    return figure


def _order(value: Any) -> tuple[str, Any]:
    return ("", value) if isinstance(value, (int, float)) else (type(value).__name__, str(value))
