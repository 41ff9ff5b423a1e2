"""What the command line shows: a live line, tables, and the words of both."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from trpo_jax.config import Config

if TYPE_CHECKING:
    from trpo_jax.runs import Progress as RunProgress
    from trpo_jax.sweeps.loop import Outline
    from trpo_jax.sweeps.progress import Progress as SweepProgress


def make_console() -> Console:
    """A console as wide as the terminal; wide enough for tables where there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class LiveLine:
    """A bar and a line in a terminal; plain lines, `seconds` apart, elsewhere."""

    def __init__(self, console: Console, total: float, seconds: float):
        self.console, self.total, self.seconds = console, total, seconds
        self.bar = Bar(BarColumn(bar_width=20), TextColumn("{task.fields[status]}"), console=console)
        self.task = self.bar.add_task("", total=total, status="")
        self.printed = time.monotonic()

    def __enter__(self) -> LiveLine:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def show(self, done: float, status: str) -> None:
        """Show that so much of the total is done."""
        if self.console.is_terminal:
            self.bar.update(self.task, completed=done, status=status)
        elif time.monotonic() - self.printed >= self.seconds or done >= self.total:
            self.printed = time.monotonic()
            self.console.print(status, soft_wrap=True)


def run_status(progress: RunProgress, config: Config) -> str:
    """The line of a run."""
    metrics = progress.metrics
    return (
        f"{progress.iteration * config.steps_per_iteration:>9,} steps  return {metrics['episode_return']:8.1f}  "
        f"KL {metrics['mean_kl']:.4f}  step {metrics['step_fraction']:.2f}  "
        f"{_pace(progress.steps_per_second, progress.seconds_left)}"
    )


def sweep_status(progress: SweepProgress) -> str:
    """The line of a sweep."""
    blocks = f"{progress.blocks[0].number + 1}"
    blocks += f"–{progress.blocks[-1].number + 1}" if len(progress.blocks) > 1 else ""
    return (
        f"{progress.share:6.1%}  program {progress.group[0] + 1}/{progress.group[1]}  "
        f"blocks {blocks}/{progress.num_blocks}  iteration {progress.iteration}/{progress.num_iterations}  "
        f"{_pace(progress.steps_per_second, progress.seconds_left)}"
    )


def _pace(steps_per_second: float, seconds_left: float) -> str:
    minutes, seconds = divmod(round(seconds_left), 60)
    return f"{steps_per_second:>9,.0f} steps/s  {minutes}:{seconds:02d} left"


def print_table(console: Console, title: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column to the left, numbers to the right."""
    table = Table(title=title or None, title_justify="left", show_header=any(titles), box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(titles):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_outline(console: Console, file: str, outline: Sequence[Outline]) -> None:
    """Print what a sweep would run, one row a program."""
    titles = ["environment", "points", "agents", "devices x agents", "runs", "env steps", "memory a device"]
    rows = [
        [
            group.env,
            str(group.num_points),
            f"{group.num_agents:,}",
            f"{group.num_devices} x {group.agents_per_block}",
            str(group.num_runs),
            f"{group.env_steps:,}",
            f"{group.memory / 2**20:,.1f} MiB",
            ", ".join(f"{name}={value}" for name, value in group.static.items()),
        ]
        for group in outline
    ]
    programs = "program" if len(rows) == 1 else "programs"
    print_table(console, f"{file}: {len(rows)} {programs}", [*titles, "static settings"], rows)
