"""A comparison as a self-contained page."""

from __future__ import annotations

from typing import Any

import numpy as np

from trpo_jax.runs.learning_curve import label_steps
from trpo_jax.sweeps.comparisons import Comparison
from trpo_jax.sweeps.drawing import (
    heading,
    html_table,
    image,
    number,
    page,
    paragraph,
    plain,
    plot_band,
    png,
    sized_figure,
)


def comparison_page(comparison: Comparison) -> str:
    """Make the page: a table of the methods, learning curves, probabilities of improvement and performance profiles."""
    parts = [paragraph(sentence) for sentence in explanations(comparison)]
    parts += [html_table(*table_of_methods(comparison)), image("intervals", png(_draw_intervals(comparison)))]
    parts += [heading("Learning curves"), *_curves(comparison)]
    parts += [
        heading("Probability of improvement"),
        paragraph(
            "Probability that an agent of the row's method is better than one of the column's on the same task, "
            "averaged over tasks, with its 95 % interval. If the interval excludes 0.5, the two methods differ."
        ),
        html_table(*table_of_improvement(comparison)),
        heading("Performance profiles"),
        paragraph(
            "Share of agents whose score is above the value on the axis. The higher the curve, the better the method."
        ),
        image("profiles", png(_draw_profiles(comparison))),
    ]
    names = list(comparison.methods)
    return page(" and ".join(names) if len(names) == 2 else f"{len(names)} methods compared", parts)


def explanations(comparison: Comparison) -> list[str]:
    """The explanations of the numbers, one paragraph each."""
    first = f"Score: {comparison.score}. IQM: mean of the middle half of the agents, with a 95 % percentile "
    first += "interval of the stratified bootstrap."
    if len(comparison.tasks) == 1:
        return [f"{next(iter(comparison.tasks))}. {first}", *comparison.notes]
    ends = "; ".join(f"{task}: {number(low)} and {number(high)}" for task, (low, high) in comparison.tasks.items())
    scaled = "Scores are normalised in each environment: 0 is the mean return of the first training episodes of all "
    scaled += f"agents, 1 the IQM of the best method ({ends})."
    return [first, scaled, *comparison.notes]


def table_of_methods(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells of the table of methods, best first; the last column is how surely the best is better."""
    best = next(iter(comparison.methods))
    better = {y: _probability(p, interval) for x, y, p, interval in comparison.improvement if x == best}
    digits = number if len(comparison.tasks) == 1 else "{:.3f}".format
    cells = [
        [
            name,
            digits(m.iqm),
            " … ".join(map(digits, m.interval)),
            digits(m.mean),
            str(m.num_agents),
            better.get(name, ""),
        ]
        for name, m in comparison.methods.items()
    ]
    return ["method", "IQM", "95 % interval", "mean", "agents", "P(best is better)"], cells


def _probability(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2f} ({interval[0]:.2f} … {interval[1]:.2f})"


def table_of_improvement(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The probabilities that the row's method is better than the column's, as a square table."""
    found = {(x, y): _probability(p, interval) for x, y, p, interval in comparison.improvement}
    names = list(comparison.methods)
    return ["better than", *names], [[x, *(found.get((x, y), "") for y in names)] for x in names]


def _draw_intervals(comparison: Comparison) -> Any:
    """IQM and interval of each method, the best at the top."""
    figure = sized_figure(7, 0.9 + 0.35 * len(comparison.methods))
    axes = figure.add_subplot()
    for i, method in enumerate(comparison.methods.values()):
        axes.plot(method.interval, (i, i), linewidth=8, alpha=0.35, color=f"C{i}", solid_capstyle="butt")
        axes.plot([method.iqm], [i], marker="|", markersize=13, markeredgewidth=2, color=f"C{i}")
    axes.set_yticks(range(len(comparison.methods)), [plain(name) for name in comparison.methods])
    axes.set_ylim(len(comparison.methods) - 0.5, -0.5)
    axes.set(xlabel=_axis(comparison, f"IQM of the {comparison.score}"))
    axes.grid(alpha=0.3, axis="x")
    return figure


def _axis(comparison: Comparison, words: str) -> str:
    return words + (", normalised" if len(comparison.tasks) > 1 else "")


def _curves(comparison: Comparison) -> list[str]:
    """The pictures of learning curves, over all tasks and for each task."""
    over = f"IQM of the {comparison.returns} with its 95 % interval, point by point."
    parts = [paragraph(over[0].upper() + over[1:])]
    if len(comparison.tasks) > 1:
        parts.append(image("all environments", png(_draw_overall(comparison))))
    one = len(comparison.tasks) == 1
    return [*parts, *(image(task, png(_draw_task(comparison, task)), small=not one) for task in comparison.tasks)]


def _draw_overall(comparison: Comparison) -> Any:
    figure = sized_figure(7, 4)
    axes = figure.add_subplot()
    for name, method in comparison.methods.items():
        if method.overall:
            plot_band(axes, method.overall, plain(name), stretch=100)
    axes.set(
        title="all environments",
        xlabel="environment steps, % of those common to all methods",
        ylabel=_axis(comparison, comparison.returns),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _draw_task(comparison: Comparison, task: str) -> Any:
    figure = sized_figure(7, 4) if len(comparison.tasks) == 1 else sized_figure(4.6, 3.6)
    axes = figure.add_subplot()
    for name, method in comparison.methods.items():
        plot_band(axes, method.curves[task], plain(name))
    some = any(np.isfinite(method.curves[task].middle).any() for method in comparison.methods.values())
    labels = {"title": plain(task), "xlabel": "environment steps (each agent)", "ylabel": comparison.returns}
    label_steps(axes, some, **labels)
    if len(comparison.tasks) == 1:
        axes.legend(fontsize=8)
    return figure


def _draw_profiles(comparison: Comparison) -> Any:
    figure = sized_figure(7, 4)
    axes = figure.add_subplot()
    for name, method in comparison.methods.items():
        plot_band(axes, method.profile, plain(name))
    axes.set(xlabel=_axis(comparison, comparison.score), ylabel="share of agents above", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
