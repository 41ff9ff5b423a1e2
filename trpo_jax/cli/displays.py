"""Output of the command line: a live status line, tables, and their texts."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table

from trpo_jax.config import Config
from trpo_jax.sentences import counted, drop_output, say

if TYPE_CHECKING:
    from trpo_jax.runs.continuing import Progress as RunProgress
    from trpo_jax.runs.evaluations import Best
    from trpo_jax.runs.runner import Clock
    from trpo_jax.sweeps.dry_run import Outline
    from trpo_jax.sweeps.in_folder import Progress as SweepProgress


class _Expendable:
    """Standard output of a long command: if it is closed or its disk is full, the command continues without it."""

    def __init__(self, stream: TextIO):
        self.stream, self.lost = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, action: Callable[[], Any]) -> None:
        if self.lost:
            return
        try:
            action()
        except OSError as error:
            self.lost = True
            drop_output()
            say(f"output is no longer possible ({error.strerror or error}); the command continues without it.")


class _Console(Console):
    def on_broken_pipe(self) -> None:  # rich itself would end the process, with status 1
        raise


def make_console(*, expendable: bool = False) -> Console:
    """Make a console as wide as the terminal, or wide enough for tables if there is none.

    Args:
      expendable: if output is no longer possible, the command continues.
    """
    file: Any = _Expendable(sys.stdout) if expendable else None
    # Names of files and extras may contain brackets, which are not markup.
    return _Console(file=file, highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)


class LiveLine:
    """A progress bar with a status, cut to the terminal's width; without a terminal, plain lines `seconds` apart."""

    def __init__(self, console: Console, total: float, seconds: float):
        self.console, self.total, self.seconds = console, total, seconds
        text = TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        self.bar = Bar(BarColumn(bar_width=10), text, console=console)
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
        """Show how much of the total is done."""
        if self.console.is_terminal:
            self.bar.update(self.task, completed=done, status=status)
        elif time.monotonic() - self.printed >= self.seconds or done >= self.total:
            self.printed = time.monotonic()
            self.console.print(status, soft_wrap=True)


def run_status(progress: RunProgress, config: Config) -> str:
    """The status line of a run, most important parts first."""
    metrics, done = progress.metrics, progress.iteration * config.steps_per_iteration
    ended = not math.isnan(metrics["episode_return"]) or metrics["num_episodes"]
    outcome = f"return {metrics['episode_return']:8.1f}" if ended else "no episode ended yet"
    evaluated = "" if math.isnan(progress.evaluation) else f"evaluation {progress.evaluation:8.1f}  "
    return (
        f"{_pace(progress.clock)}  {counted(done, 'step'):>15}  {outcome}  {evaluated}"
        f"KL {metrics['mean_kl']:.4f}  step {metrics['step_fraction']:.2f}"
    )


def sweep_status(progress: SweepProgress) -> str:
    """The status line of a sweep, most important parts first."""
    blocks = f"{progress.blocks[0].number + 1}"
    blocks += f"–{progress.blocks[-1].number + 1}" if len(progress.blocks) > 1 else ""
    return (
        f"{progress.clock.done / progress.clock.total:6.1%}  {_pace(progress.clock)}  "
        f"program {progress.group[0] + 1}/{progress.group[1]}  blocks {blocks}/{progress.num_blocks}  "
        f"iteration {progress.iteration}/{progress.num_iterations}"
    )


def _pace(clock: Clock) -> str:
    return f"{duration(clock.seconds_left):>8} left  {clock.steps_per_second:>9,.0f} steps/s"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: "0:07", "2:00:00"; "?" if unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def print_table(console: Console, title: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the first column aligned left and the others right."""
    table = Table(title=title or None, title_justify="left", show_header=any(titles), box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(titles):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_evaluation(console: Console, figures: Mapping[str, Any]) -> None:
    """Print the figures of an evaluation: one row per agent, and one over all agents, with the interval over agents."""
    agents, over = figures["agents"], figures.get("all")
    rows = [
        [name, *(f"{row[n]:.1f}" for n in ("mean", "std")), _interval(row["low"], row["high"])]
        + [f"{row[n]:.1f}" for n in ("min", "max", "length")]
        for name, row in [(str(agent["seed"]), agent) for agent in agents] + ([("all", over)] if over else [])
    ]
    how = "sampled actions" if figures["stochastic"] else "deterministic actions"
    first, last = (counted(f(agent["env_steps"] for agent in agents), "step") for f in (min, max))
    steps = last if first == last else f"{first} to {last}"
    title = f"{figures['env']} after {steps}, {counted(figures['num_episodes'], 'episode')} per agent, {how}"
    print_table(console, title, ("seed", "return", "std", "95 % interval", "min", "max", "length"), rows)
    if over:
        low, high = over["iqm_interval"]
        console.print(f"IQM over the agents: {over['iqm']:.1f}, 95 % bootstrap interval {_interval(low, high)}.")
    unfinished = round(sum((1 - agent["finished"]) * figures["num_episodes"] for agent in agents))
    if unfinished:
        console.print(
            f"{counted(unfinished, 'episode')} did not end within the steps that evaluation allows; such returns are "
            "partial.",
            soft_wrap=True,
        )


def _interval(low: float, high: float) -> str:
    return "–" if math.isnan(low) else f"{low:.1f} to {high:.1f}"


def print_best(console: Console, best: Sequence[Best], num_episodes: int) -> None:
    """Print the best policies by evaluation, evaluated again; of many agents, those with the highest returns."""
    rows = [
        [f"{b.seed}", f"{b.iteration}", f"{b.mean:.1f}", _interval(b.low, b.high), f"{b.chosen_by:.1f}"]
        for b in sorted(best, key=lambda b: b.mean, reverse=True)[:8]
    ]
    title = f"Best by evaluation, evaluated again on {counted(num_episodes, 'episode')}"
    print_table(console, title, ("seed", "iteration", "return", "95 % interval", "when chosen"), rows)


def print_outline(console: Console, file: str, outline: Sequence[Outline], keep: str) -> None:
    """Print the outline of a sweep, one row per program."""
    titles = [
        "environment",
        "points",
        "agents",
        "devices x agents",
        "runs",
        "env steps",
        "memory per device",
        "time",
    ]
    rows = [
        [
            str(entry.group.configs[0].env),
            str(len(entry.group.points)),
            f"{entry.group.num_agents:,}",
            f"{entry.num_devices} x {entry.programs.agents_per_block}",
            str(entry.num_runs),
            f"{entry.group.num_agents * entry.group.steps_per_agent:,}",
            f"{entry.programs.memory / 2**20:,.1f} MiB",
            duration(entry.seconds + entry.evaluating),
            ", ".join(f"{name}={value}" for name, value in entry.static.items()),
        ]
        for entry in outline
    ]
    print_table(console, f"{file}: {counted(len(rows), 'program')}", [*titles, "static settings"], rows)
    training, evaluating, compiling = (
        sum(getattr(one, n) for one in outline) for n in ("seconds", "evaluating", "compiling")
    )
    console.print(
        f"The sweep would take about {duration(training + evaluating)} here, estimated from measurements just now: "
        f"training {duration(training)} (iterations times the time of one) and evaluation {duration(evaluating)} (as "
        f"for agents that have hardly learned). Compiling took {duration(compiling)}; the sweep finds the programs in "
        "the cache. Writing files is not included.",
        soft_wrap=True,
    )
    if keep != "none":
        kept = [
            (len(one.group.points) if keep == "best" else one.group.num_agents) * one.state_bytes for one in outline
        ]
        console.print(f"Trained states to keep ({keep}): about {sum(kept) / 2**20:,.1f} MiB.", soft_wrap=True)
