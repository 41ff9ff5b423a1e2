"""metrics.csv: one row per iteration and agent."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np

from trpo_jax.types import Metrics

METRICS = tuple(field.name for field in dataclasses.fields(Metrics))
COLUMNS = ("iteration", "env_steps", "seed", *METRICS)


def read_metrics(folder: Path) -> dict[str, np.ndarray]:
    """Columns of metrics.csv as arrays [rows]."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in COLUMNS}


def failures(folder: Path) -> dict[int, int]:
    """{seed: iteration at which it first met a number that was not finite}, of the seeds that did."""
    metrics = read_metrics(folder)
    bad = np.flatnonzero(metrics["finite"] == 0)[::-1]  # so that of each seed the first one counts
    found = {int(metrics["seed"][i]): int(metrics["iteration"][i]) for i in bad}
    return dict(sorted(found.items()))


def last_mean(rows: np.ndarray) -> float:
    """Mean over agents [A] of each one's last value in [A, rows] that is not NaN."""
    filled = fill_forward(rows.T)[-1]
    return float(np.mean(filled[~np.isnan(filled)])) if not np.isnan(filled).all() else float("nan")


def fill_forward(rows: np.ndarray) -> np.ndarray:
    """Replace NaN by the last number above it in each column of [rows, A]."""
    index = np.where(np.isnan(rows), 0, np.arange(len(rows))[:, None])
    np.maximum.accumulate(index, axis=0, out=index)
    return np.take_along_axis(rows, index, axis=0)
