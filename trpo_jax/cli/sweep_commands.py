"""The commands that train many agents from a file, and those that show the results."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import Any

from trpo_jax.cli.choices import opener_of, tell_idle
from trpo_jax.cli.startup import start_quickly, use_every_core
from trpo_jax.files import file_of_kind, write_atomically
from trpo_jax.sentences import command, counted, say


def sweep(namespace: argparse.Namespace) -> int:
    """Train agents over the settings and seeds of a file, or continue."""
    output = Path(namespace.output or f"sweeps/{Path(namespace.file).stem}")
    use_every_core(output / "sweep.json", namespace.num_devices)
    start_quickly()
    from trpo_jax.cli.displays import LiveLine, make_console, sweep_status
    from trpo_jax.runs.workers import useful_workers
    from trpo_jax.sweeps.grids import read_spec
    from trpo_jax.sweeps.in_folder import Progress, run_sweep
    from trpo_jax.sweeps.placement import connect_hosts
    from trpo_jax.sweeps.plans import plan

    console = make_console(expendable=not namespace.dry_run)
    spec = read_spec(namespace.file)
    spec = dataclasses.replace(spec, keep=namespace.keep or spec.keep)
    if namespace.dry_run:
        return _outline(namespace, console, spec)
    process = connect_hosts(namespace.coordinator, namespace.num_processes, namespace.process_id)
    points, groups = planned = plan(spec)
    alone = namespace.num_processes is None and process == (0, 1)
    num_workers = max(useful_workers(group.configs[0], group.num_agents) for group in groups) if alone else 1
    tell_idle({**spec.base, **points[0].varied}, [point.config for point in points], namespace.file)
    where = f", process {process[0]} of {process[1]}" if process[1] > 1 else ""
    where = f", {num_workers} worker processes" if num_workers > 1 else where
    console.print(
        f"{counted(len(points), 'point')} x {counted(spec.num_seeds, 'seed')} = "
        f"{counted(len(points) * spec.num_seeds, 'agent')}, {counted(len(groups), 'program')}{where}. Compiling …",
        soft_wrap=True,
    )
    open_sinks = opener_of(namespace, output)
    for _, close in open_sinks("", {}):  # a missing package is reported before anything is trained
        close()
    line = LiveLine(console, 1.0, seconds=5)

    def show(progress: Progress) -> None:
        line.show(progress.clock.done / progress.clock.total, sweep_status(progress))

    with line:
        ending = run_sweep(
            output,
            spec,
            process=process,
            checkpoint_seconds=namespace.checkpoint_seconds,
            most_agents=namespace.agents_per_device,
            report=show,
            open_sinks=open_sinks,
            extend=namespace.extend,
            planned=planned,
            num_workers=num_workers,
        )
    if ending == "complete":
        return _show_report(output, expendable=True)
    if ending == "interrupted":
        console.print("Stopped; the same command continues.")
        return 130
    again = command("report", output, env=next(iter(namespace.trust), None))
    console.print(f"This process is done; {again} shows the results of all.", soft_wrap=True)
    return 0


def _outline(namespace: argparse.Namespace, console: Any, spec: Any) -> int:
    """Print the programs of a sweep and their times; train nothing."""
    from trpo_jax.cli.displays import LiveLine, print_outline
    from trpo_jax.sweeps.dry_run import outline

    sizes = {"most_agents": namespace.agents_per_device, "num_processes": namespace.num_processes}
    with LiveLine(console, 1.0, seconds=0) as line:
        programs = outline(spec, **sizes, report=line.show)
    print_outline(console, namespace.file, programs, spec.keep)
    return 0


def report(namespace: argparse.Namespace) -> int:
    """Make the table, pictures and page of a sweep, finished or not."""
    return _show_report(Path(namespace.path))


def _show_report(path: Path, *, expendable: bool = False) -> int:
    from trpo_jax.cli.displays import make_console, print_table
    from trpo_jax.sweeps.pages import write_report
    from trpo_jax.sweeps.reports import make_report, narrow_table_of

    report, console, most = make_report(path), make_console(expendable=expendable), 20
    for env, rows in report.rows.items():
        print_table(console, f"{env}: {report.score}", *narrow_table_of(rows[:most], console.width))
        if len(rows) > most:
            console.print(f"and {len(rows) - most:,} more.")
    if report.num_agents < report.num_asked:
        console.print(f"{report.extent} are finished.")
    if report.failures:
        console.print(
            f"{counted(len(report.failures), 'agent')} met a number that was not finite; the page lists them."
        )
    if report.stalled:
        console.print(f"{counted(len(report.stalled), 'agent')} accepted no update any more; the page lists them.")
    page = write_report(path, report)
    console.print(f"Page: {page}", soft_wrap=True)
    return 0


def compare(namespace: argparse.Namespace) -> int:
    """Compare the agents of runs and sweeps: a table, and a page with the pictures."""
    file = file_of_kind(namespace.output, "--output", ".html")
    json_file = file_of_kind(namespace.json, "--json", ".json") if namespace.json else None
    from trpo_jax.cli.displays import make_console, print_table
    from trpo_jax.sweeps.comparison_pages import comparison_page, explanations, table_of_methods
    from trpo_jax.sweeps.comparisons import compare

    found = compare(namespace.paths, [name.strip() for name in namespace.by.split(",") if name.strip()])
    console = make_console()
    for sentence in explanations(found):
        console.print(sentence)
    console.print()
    print_table(console, "", *table_of_methods(found))
    write_atomically(file, comparison_page(found))
    if json_file:
        write_atomically(json_file, json.dumps(found.as_json(), indent=1) + "\n")
    console.print(f"\nPage: {file}", soft_wrap=True)
    return 0


def tune(namespace: argparse.Namespace) -> int:
    """Search for settings with Optuna, with each batch of trials as one program."""
    output = Path(namespace.output or f"searches/{Path(namespace.file).stem}")
    use_every_core(output / "search.json", None)
    start_quickly()
    from trpo_jax.cli.displays import make_console
    from trpo_jax.runs.workers import useful_workers
    from trpo_jax.sweeps import search
    from trpo_jax.sweeps.grids import read_spec
    from trpo_jax.sweeps.search_pages import write_search_page

    console = make_console(expendable=True)
    spec = read_spec(namespace.file)
    if spec.keep != "none":
        say(
            f"note: keep in {namespace.file} has no effect: a search keeps no states, and trains its best agents again."
        )
    space = {name: values for name, values in spec.random.items() if name not in ("count", "seed")}
    config = search.check_space(spec.base, space)
    if not any("choice" in distribution for distribution in space.values()):  # a choice may give it an effect
        tell_idle(spec.base, [config], namespace.file)
    if namespace.num_trials is not None:
        spec = dataclasses.replace(spec, random={**spec.random, "count": namespace.num_trials})

    def show(batch: search.Batch) -> None:
        newest = "" if math.isnan(batch.batch_best) else f"its best {batch.batch_best:.1f}, "
        scores = f"{newest}best of all {batch.best:.1f}"
        console.print(
            f"{batch.finished:>5} of {counted(batch.count, 'trial')}, {batch.pruned} of the last batch stopped early; "
            f"{scores if batch.settings else 'no score yet'}",
            soft_wrap=True,
        )
        page = write_search_page(output, batch.trials, batch.count, space)
        if batch.finished >= batch.count:
            console.print(f"Page: {page}", soft_wrap=True)

    num_workers = useful_workers(config, namespace.batch * spec.num_seeds)
    where = {"storage": namespace.storage, "num_workers": num_workers}
    file, score = search.tune(output, spec, batch=namespace.batch, report=show, **where)
    console.print(file.read_text(), highlight=False)
    console.print(f"Score {score:.1f} on {counted(spec.num_seeds, 'seed')} that only tuning uses.", soft_wrap=True)
    best = search.train_best(file, spec, num_workers)
    if best is None:
        console.print("Stopped; the same command continues.")
        return 130
    words = ["trpo-jax", "train", "--config", str(file), "--num-seeds", "8", "--output", "runs/tuned"]
    again = shlex.join(words + [word for env in namespace.trust for word in ("--trust", env)])
    console.print(f"Its agents: {best}. Next: `{again}`", soft_wrap=True)
    return 0
