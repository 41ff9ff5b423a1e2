"""metrics.csv, with one row per iteration and agent: writing and reading of such tables."""

from __future__ import annotations

import csv
import dataclasses
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trpo_jax.files import append, write_atomically
from trpo_jax.sentences import UsageError, counted
from trpo_jax.training.state import Metrics

METRICS = tuple(field.name for field in dataclasses.fields(Metrics))
_NUMBERS = ("iteration", "env_steps", "seed")
_COLUMNS = (*_NUMBERS, *METRICS)
_LONG = 10  # updates in a row that are rejected only if something is wrong
Row = tuple[int, int, int, dict[str, float]]
"""Iteration, environment steps of the agent, its seed, and its metrics (or the other columns of a table)."""


def metrics_tree() -> Metrics:
    """The tree of `Metrics`, without values."""
    nothing: dict[str, Any] = dict.fromkeys(METRICS, 0)
    return Metrics(**nothing)


class TableFile:
    """A table of a run in progress, such as metrics.csv. Rows reach the disk before the state that follows them.

    So a checkpoint stores the length and the checksum of the rows that belong to it, as `kept_as`; a kill may leave
    more.
    """

    def __init__(self, path: Path, columns: Sequence[str] = METRICS, kept_as: str = "rows"):
        self.path, self.kept_as = path, kept_as
        self._header = ",".join((*_NUMBERS, *columns)).encode() + b"\n"
        try:
            self._found = self.path.read_bytes()
        except FileNotFoundError:
            self._found = b""
        except OSError as error:
            raise UsageError(f"cannot read {self.path}: {error.strerror}; restore it.") from error
        self._length, self._checksum = len(self._header), zlib.crc32(self._header)

    @property
    def note(self) -> list[int]:
        """Length and checksum of the rows so far, for a checkpoint."""
        return [self._length, self._checksum]

    @property
    def num_lines(self) -> int:
        """Number of complete lines that were found, including the header."""
        return self._found.count(b"\n")

    def check(self, done: int, note: Mapping[str, Any]) -> None:
        """Raise `UsageError` unless the rows that belong to a checkpoint are there, unchanged."""
        length, checksum = note[self.kept_as]
        if len(self._found) < length or zlib.crc32(self._found[:length]) != checksum:
            raise UsageError(
                f"{self.path} lacks rows of the {counted(done, 'iteration')} done; restore it, or train again into "
                "another folder."
            )

    def truncate(self, note: Mapping[str, Any]) -> None:
        """Drop the rows after those that belong to a checkpoint; without one, all of them."""
        kept = self._found[: note[self.kept_as][0]] if note else self._header
        if kept != self._found:
            write_atomically(self.path, kept)
        self._length, self._checksum, self._found = len(kept), zlib.crc32(kept), b""

    def append(self, rows: list[Row], mend: str) -> None:
        """Append rows and flush them to the disk."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for *numbers, metrics in rows:
            writer.writerow([*numbers, *(f"{value:.9g}" for value in metrics.values())])  # nine digits hold a float32
        append(self.path, text.getvalue(), mend)
        self._length += len(text.getvalue())
        self._checksum = zlib.crc32(text.getvalue().encode(), self._checksum)


def rows_of(metrics: Mapping[str, np.ndarray], done: int, steps_per_iteration: int, seed: int) -> Iterator[Row]:
    """The rows of the iterations up to `done`, from their metrics {name: [agents, length]}."""
    agents, length = next(iter(metrics.values())).shape
    for i in range(length):
        iteration = done - length + i + 1
        for agent in range(agents):
            values = {name: float(table[agent, i]) for name, table in metrics.items()}
            yield iteration, iteration * steps_per_iteration, seed + agent, values


def read_metrics(folder: Path) -> dict[str, np.ndarray]:
    """Columns of metrics.csv as arrays [rows]."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in _COLUMNS}


def failures(metrics: Mapping[str, np.ndarray]) -> dict[int, int]:
    """{seed: first iteration with a number that was not finite}, for the seeds that had one."""
    bad = np.flatnonzero(metrics["finite"] == 0)[::-1]  # so that the first one of each seed counts
    found = {int(metrics["seed"][i]): int(metrics["iteration"][i]) for i in bad}
    return dict(sorted(found.items()))


def stalled(metrics: Mapping[str, np.ndarray]) -> dict[int, int]:
    """{seed: last iteration with an accepted update, or 0}, for the seeds whose updates were then rejected for long."""
    # What is not finite is one of the `failures`. NaN are the rows after the return at which an agent stops.
    judged = metrics["finite"] == 1
    accepted, iteration = metrics["accepted"][judged] > 0, metrics["iteration"][judged].astype(int)
    seeds, agent = np.unique(metrics["seed"][judged].astype(int), return_inverse=True)
    done, last = np.zeros((2, len(seeds)), int)
    np.maximum.at(done, agent, iteration)
    np.maximum.at(last, agent, np.where(accepted, iteration, 0))
    return {int(seeds[i]): int(last[i]) for i in np.flatnonzero(done - last >= _LONG)}


def last_mean(rows: np.ndarray) -> float:
    """Mean over agents [A] of each one's last value in [A, rows] that is not NaN."""
    filled = fill_forward(rows.T)[-1]
    return float(np.mean(filled[~np.isnan(filled)])) if not np.isnan(filled).all() else float("nan")


def fill_forward(rows: np.ndarray) -> np.ndarray:
    """Replace NaN by the last number above it in each column of [rows, A]."""
    index = np.where(np.isnan(rows), 0, np.arange(len(rows))[:, None])
    np.maximum.accumulate(index, axis=0, out=index)
    return np.take_along_axis(rows, index, axis=0)
