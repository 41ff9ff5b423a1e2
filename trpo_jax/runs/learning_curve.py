"""The picture of a run: return against environment steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trpo_jax.files import write_atomically
from trpo_jax.runs.evaluations import read_evaluations
from trpo_jax.runs.folders import Run
from trpo_jax.runs.metrics import fill_forward, read_metrics


def plot_learning_curve(run: Run) -> Path:
    """Draw return against environment steps: every agent thin, their mean thick, one standard deviation shaded."""
    metrics = read_metrics(run.path)
    steps = np.unique(metrics["env_steps"])
    returns = metrics["episode_return"].reshape(len(steps), run.num_seeds)
    returns = fill_forward(np.where(np.isfinite(returns), returns, np.nan))
    returns = returns[:, ~np.isnan(returns).all(axis=0)]  # seeds in which an episode ended
    seen = ~np.isnan(returns).any(axis=1)
    steps, returns = steps[seen], returns[seen]
    num_seeds = returns.shape[1]
    figure = make_figure(7, 4.2)
    axes = figure.add_subplot()
    if num_seeds > 1:
        mean, spread = returns.mean(axis=1), returns.std(axis=1)
        axes.plot(steps, returns, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.fill_between(steps, mean - spread, mean + spread, color="tab:blue", alpha=0.2, label="± 1 std over seeds")
        axes.plot(steps, mean, color="tab:blue", linewidth=2, label=f"mean of {num_seeds} seeds")
    elif num_seeds:
        axes.plot(steps, returns, color="tab:blue", linewidth=2, label="training")
    evaluated = _plot_evaluations(axes, run)
    if num_seeds > 1 or evaluated:
        axes.legend(loc="lower right")
    method = str(run.config.update).replace("-", " ")
    title = f"{method.upper() if len(method) <= 4 else method} on {run.config.env}"
    label_steps(
        axes, num_seeds > 0 or evaluated, title=title, xlabel="environment steps (each agent)", ylabel="episode return"
    )
    file = run.path / "learning_curve.png"
    write_atomically(file, lambda sink: figure.savefig(sink, dpi=150, format="png"))
    return file


def _plot_evaluations(axes: Any, run: Run) -> bool:
    """Draw the mean over agents of their last evaluations; return whether there are any."""
    rows = list(read_evaluations(run.path))
    steps, at = np.unique([env_steps for _, env_steps, _, _ in rows], return_inverse=True)
    means = np.full((len(steps), run.num_seeds), np.nan)
    for i, (_, _, seed, values) in zip(at, rows, strict=True):
        means[i, seed - run.seed] = values["mean"] if np.isfinite(values["mean"]) else np.nan
    means = fill_forward(means)  # an agent that has reached its goal is not evaluated again
    seen = ~np.isnan(means).any(axis=1)
    if seen.any():
        axes.plot(steps[seen], means[seen].mean(axis=1), color="tab:orange", marker=".", label="evaluation")
    return bool(seen.any())


def make_figure(width: float, height: float) -> Any:
    """Make a figure of so many inches, without a window."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    return Figure(figsize=(width, height), layout="constrained")


def label_steps(axes: Any, any_episode: bool, **labels: str) -> None:
    """Label curves of returns, with a grid and steps in thousands; without any curve, write so."""
    if not any_episode:
        axes.text(0.5, 0.5, "no episode has ended", ha="center", va="center", transform=axes.transAxes)
    axes.set(**labels)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
