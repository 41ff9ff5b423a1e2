"""The command line: what each command does, and one sentence where its arguments are wrong.

JAX is imported when a command needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import platform
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trpo_jax.arguments import check_arguments, config_of, flags_of, make_parser
from trpo_jax.config import (
    Config,
    UsageError,
    check_limits,
    counted,
    first_line,
    nearest,
    shown,
    validate,
    without_effect,
)
from trpo_jax.files import (
    SETTINGS,
    checked_settings,
    command,
    drop_output,
    read_json,
    read_toml,
    say,
    write_atomically,
)

if TYPE_CHECKING:
    from trpo_jax.runs import Progress, Run
    from trpo_jax.types import TrainState


_TOO_LARGE = "there is not enough memory; lower num_envs, num_steps or the number of agents"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `trpo-jax`.

    Returns:
      The exit status: 0; 1 where an agent of a run met a number that was not finite; 2 for bad input; 130 after Ctrl-C.
    """
    _settle_streams()
    try:
        parser = make_parser()
        try:
            namespace, unknown = parser.parse_known_args(arguments)
        except SystemExit:  # --help, --version
            sys.stdout.flush()
            raise
        if unknown:
            flags = flags_of(parser, namespace.command)
            raise UsageError(f"unknown argument {unknown[0][:60]}{nearest(unknown[0], flags)}")
        check_arguments(namespace)
        status = _COMMANDS[namespace.command](namespace)
        sys.stdout.flush()
        return status
    except UsageError as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say("interrupted.")
        return 130
    except BrokenPipeError:  # `trpo-jax envs | head`
        drop_output()
        return 0
    except MemoryError:
        say(f"{_TOO_LARGE}.")
        return 2
    except OSError as error:  # a path that no file can have, a full disk, no permission: whatever the command touched
        drop_output()
        where = f"cannot use {shown(error.filename)}" if error.filename else "cannot read or write"
        say(f"{where}: {error.strerror or error}; choose another path, or make room.")
        return 2
    except Exception as error:
        if not (sentence := _sentence_about(error)):
            raise
        say(sentence)
        return 2


def _sentence_about(error: Exception) -> str:
    """What JAX and the machine have to do with an exception, in one sentence; empty if nothing is known."""
    _, ours, sentence = str(error).partition("UsageError: ")
    if ours:  # of what fails in Python in the middle of a program, JAX keeps the text
        return sentence.splitlines()[0]
    if "RESOURCE_EXHAUSTED" in str(error):
        return f"{_TOO_LARGE} ({first_line(error)})."
    try:
        import jax

        jax.devices()
    except Exception as why:
        odd = ", ".join(f"{name}={shown(value)}" for name, value in os.environ.items() if name.startswith("JAX_"))
        return f"JAX cannot start ({first_line(why)}); change or unset {odd or 'JAX_PLATFORMS'}."
    return ""


def _settle_streams() -> None:
    """A terminal without Greek letters shows question marks, and a stream that was closed swallows what is said."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def _cleaning_up() -> Iterator[None]:
    """Have Ctrl-C raise an exception, for what must be cleaned up after it."""
    try:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _settings_from(namespace: argparse.Namespace) -> dict[str, Any]:
    """The settings in the TOML file of --config; none without it."""
    return checked_settings(read_toml(namespace.config), namespace.config) if namespace.config else {}


def _tell_idle(names: Iterable[str], configs: Iterable[Config], source: str) -> None:
    """Say of each setting in a file that changes nothing in any of the configurations."""
    configs = list(configs)
    for name in names:
        reasons = [without_effect(config, name) for config in configs] if name in SETTINGS else []
        changed = any(getattr(config, name) != getattr(Config, name) for config in configs) if reasons else False
        if changed and all(reasons):
            say(f"note: {name} in {source} {reasons[0]}.")


def _train(namespace: argparse.Namespace) -> int:
    file = _settings_from(namespace)
    config = config_of(namespace, file)
    validate(config)
    _start_quickly()
    from trpo_jax.environments.base import Box
    from trpo_jax.runs import create_run
    from trpo_jax.training.agents import make_agent

    for name in ("initial_log_std", "state_dependent_std"):
        if getattr(namespace, name) and not isinstance(make_agent(config).environment.action_space, Box):
            raise UsageError(
                f"{name} sets σ of a Gaussian policy, but {config.env} has discrete actions; leave it out."
            )
    _tell_idle(file, [config], namespace.config)
    output = namespace.output or f"runs/{config.env}"
    return _continue(create_run(output, config, namespace.seed, namespace.num_seeds), namespace.log)


def _resume(namespace: argparse.Namespace) -> int:
    _start_quickly()
    return _continue(_run_of(namespace), namespace.log)


def _run_of(namespace: argparse.Namespace) -> Run:
    """The run in the folder that a command was given, whose environment --env names once more, if it does."""
    from trpo_jax.runs import open_run

    run = open_run(namespace.path, namespace.env)
    if namespace.env not in (None, run.config.env) and namespace.command != "play":
        raise UsageError(
            f"env={shown(namespace.env)} is not what {run.path} was trained on, {run.config.env}; leave out --env."
        )
    return run


def _start_quickly() -> None:
    """Let JAX keep what it compiles in the user's cache folder, unless it was told of another or of none."""
    import gc
    import hashlib

    import jax

    gc.set_threshold(100_000)  # tracing allocates much and leaves little garbage: a tenth of the start is saved
    settings = jax.config.values
    for name, why in (("jax_enable_x64", "is of float32"), ("jax_disable_jit", "is compiled")):
        if settings[name]:
            raise UsageError(f"{name.upper()} is set, and every program here {why}; unset it.")
    if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
        return
    # A program for one processor may hold instructions that another one lacks; homes are shared between machines.
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    folder = f"{jax.__version__}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trpo_jax" / folder
        cache.mkdir(parents=True, exist_ok=True)
        (cache / f".{os.getpid()}").touch()
        (cache / f".{os.getpid()}").unlink()
    except (OSError, RuntimeError):  # no home, or none that can be written to: every start compiles anew, then
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # compiled anew, then


def _continue(run: Run, sinks: Sequence[str]) -> int:
    from trpo_jax.displays import LiveLine, make_console, run_status
    from trpo_jax.runs import continue_run, failures, plot_learning_curve
    from trpo_jax.sinks import open_sink

    opened = [open_sink(name, run.path, run.description) for name in sinks]
    console, config = make_console(expendable=True), run.config
    steps = counted(config.num_iterations * config.steps_per_iteration, "step")
    radius = "" if without_effect(config, "max_kl") else f", δ = {config.max_kl:g}"
    console.print(
        f"{config.env}: {counted(run.num_seeds, 'agent')}, {counted(config.num_iterations, 'iteration')} of "
        f"{config.num_envs} x {config.num_steps} steps ({steps} per agent), "
        f"{config.update}{radius}. Compiling …",
        soft_wrap=True,
    )
    last: Progress | None = None
    with LiveLine(console, config.num_iterations, seconds=1) as line:

        def show(progress: Progress) -> None:
            nonlocal last
            last = progress
            line.show(progress.iteration, run_status(progress, config))

        try:
            complete = continue_run(run, show, [sink for sink, _ in opened])
        finally:
            for _, close in opened:
                close()
    plot = plot_learning_curve(run)
    failed = failures(run)
    if last is not None:
        console.print(
            f"{last.iteration} of {counted(config.num_iterations, 'iteration')} done; trained for {last.seconds:.1f} s."
        )
    elif complete:
        console.print("Every iteration is done already.")
    console.print(f"Learning curve: {plot}", soft_wrap=True)
    if last is not None and math.isnan(last.metrics["episode_return"]):
        console.print("No episode has ended, so the learning curve is empty; more steps may show one.")
    if failed:
        met = ", ".join(f"seed {seed} at iteration {iteration}" for seed, iteration in list(failed.items())[:8])
        more = f", and {len(failed) - 8} more" if len(failed) > 8 else ""
        say(f"numbers that were not finite: {met}{more}; such an update is rejected, and the policy stays as it was.")
    if not complete:
        console.print(f"Stopped; {command('resume', run.path, env=config.env)} continues.", soft_wrap=True)
        return 130
    console.print(f"Next: {command('evaluate', run.path, env=config.env)}", soft_wrap=True)
    return 1 if failed else 0


def _sweep(namespace: argparse.Namespace) -> int:
    output = Path(namespace.output or f"sweeps/{Path(namespace.file).stem}")
    _use_every_core(output / "sweep.json", namespace.num_devices)
    _start_quickly()
    from trpo_jax.displays import LiveLine, make_console, print_outline, sweep_status
    from trpo_jax.sweeps.grids import plan, read_spec
    from trpo_jax.sweeps.loop import outline, run_sweep
    from trpo_jax.sweeps.placement import connect_hosts

    console = make_console(expendable=not namespace.dry_run)
    spec = read_spec(namespace.file)
    if namespace.dry_run:
        with LiveLine(console, 1.0, seconds=0) as line:

            def show(number: int, total: int) -> None:
                line.show(number / total, f"Compiling and timing program {number + 1} of {total} …")

            programs = outline(spec, most_agents=namespace.agents_per_device, report=show)
        print_outline(console, namespace.file, programs)
        return 0
    process = connect_hosts(namespace.coordinator, namespace.num_processes, namespace.process_id)
    points, groups = plan(spec)
    _tell_idle({**spec.base, **points[0].varied}, [point.config for point in points], namespace.file)
    where = f", process {process[0]} of {process[1]}" if process[1] > 1 else ""
    console.print(
        f"{counted(len(points), 'point')} x {counted(spec.num_seeds, 'seed')} = "
        f"{counted(len(points) * spec.num_seeds, 'agent')}, {counted(len(groups), 'program')}{where}. Compiling …",
        soft_wrap=True,
    )
    with LiveLine(console, 1.0, seconds=5) as line:
        ending = run_sweep(
            output,
            spec,
            process=process,
            checkpoint_seconds=namespace.checkpoint_seconds,
            most_agents=namespace.agents_per_device,
            report=lambda progress: line.show(progress.share, sweep_status(progress)),
        )
    if ending == "complete":
        return _show_report(output, expendable=True)
    if ending == "interrupted":
        console.print("Stopped; the same command continues.")
        return 130
    console.print(f"This process is done; {command('report', output)} shows what all have finished.", soft_wrap=True)
    return 0


def _use_every_core(file: Path, num_devices: int | None) -> None:
    """On a CPU, make each core a device; what is there already goes on with as many threads as its file says."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = None
    with contextlib.suppress(OSError, KeyError, TypeError, UsageError):  # new, or damaged and reported in its place
        threads = read_json(file, "")["made_by"]["threads"]
        check_limits({"threads": threads})
    if type(threads) is int:
        os.environ.setdefault("NPROC", str(threads))
        cores = min(cores, threads)
    import jax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # a program that calls `main` may have started JAX already
            jax.config.update("jax_num_cpu_devices", num_devices or cores)


def _report(namespace: argparse.Namespace) -> int:
    return _show_report(Path(namespace.path))


def _show_report(path: Path, *, expendable: bool = False) -> int:
    from trpo_jax.displays import make_console, print_table
    from trpo_jax.sweeps.reports import make_report, table_of, write_report

    report, console, most = make_report(path), make_console(expendable=expendable), 20
    for env, rows in report.rows.items():
        titles, cells = table_of(rows)
        print_table(console, f"{env}: {report.score}", titles, cells[:most])
        if len(cells) > most:
            console.print(f"and {len(cells) - most} more.")
    if report.num_agents < report.num_asked:
        console.print(f"{report.extent} are finished.")
    if report.failures:
        console.print(
            f"{counted(len(report.failures), 'agent')} met a number that was not finite; the page names them."
        )
    page = write_report(path, report)
    console.print(f"Page: {page}", soft_wrap=True)
    return 0


def _tune(namespace: argparse.Namespace) -> int:
    output = Path(namespace.output or f"searches/{Path(namespace.file).stem}")
    _use_every_core(output / "search.json", None)
    _start_quickly()
    from trpo_jax.displays import make_console
    from trpo_jax.sweeps.grids import read_spec
    from trpo_jax.sweeps.search import Batch, tune

    console = make_console(expendable=True)
    spec = read_spec(namespace.file)
    if namespace.num_trials is not None:
        spec = dataclasses.replace(spec, random={**spec.random, "count": namespace.num_trials})

    def show(batch: Batch) -> None:
        scores = f"its best {batch.batch_best:.1f}, best of all {batch.best:.1f}"
        console.print(
            f"{batch.told:>5} of {counted(batch.count, 'trial')}, {batch.pruned} of the last batch stopped early; "
            f"{scores if batch.settings else 'none has a score yet'}",
            soft_wrap=True,
        )

    file, score = tune(output, spec, batch=namespace.batch, storage=namespace.storage, report=show)
    console.print(file.read_text(), highlight=False)
    console.print(
        f"Score {score:.1f} on {counted(spec.num_seeds, 'seed')} that only tuning uses. "
        f"Next: `trpo-jax train --config {file} --num-seeds 8`",
        soft_wrap=True,
    )
    return 0


def _evaluate(namespace: argparse.Namespace) -> int:
    _start_quickly()
    import functools

    import jax
    import numpy as np
    from rich.table import Table

    from trpo_jax.displays import make_console
    from trpo_jax.runs import newest_state
    from trpo_jax.training.evaluation import evaluate
    from trpo_jax.training.memory import check_episodes, free_memory

    run = _run_of(namespace)
    state = newest_state(run)
    if state is None:
        raise UsageError(
            f"{run.path} has no checkpoint yet; {command('resume', run.path, env=run.config.env)} trains it first."
        )
    check_episodes(run.config, run.num_seeds, namespace.num_episodes, free_memory(jax.local_devices()[:1]))
    run_episodes = functools.partial(
        evaluate, num_episodes=namespace.num_episodes, deterministic=not namespace.stochastic
    )
    keys = jax.random.split(jax.random.key(namespace.seed), run.num_seeds)
    result = jax.jit(jax.vmap(run_episodes, in_axes=(None, 0, 0)))(run.config, state, keys)
    returns, lengths = np.asarray(result.episode_return), np.asarray(result.episode_length)
    how = "sampled actions" if namespace.stochastic else "deterministic actions"
    steps = int(state.iteration[0]) * run.config.steps_per_iteration
    episodes = counted(namespace.num_episodes, "episode")
    table = Table(title=f"{run.config.env} after {counted(steps, 'step')}, {episodes} per agent, {how}")
    for column in ("seed", "return", "std", "min", "max", "length"):
        table.add_column(column, justify="right")
    for agent in range(run.num_seeds):
        r = returns[agent]
        cells = (r.mean(), r.std(), r.min(), r.max(), lengths[agent].mean())
        table.add_row(str(run.seed + agent), *(f"{cell:.1f}" for cell in cells))
    if run.num_seeds > 1:
        table.add_section()
        cells = (returns.mean(), returns.mean(axis=1).std(), returns.min(), returns.max(), lengths.mean())
        table.add_row("all", *(f"{cell:.1f}" for cell in cells))
    make_console().print(table)
    unfinished = int((~np.asarray(result.finished)).sum())
    if unfinished:
        print(
            f"{counted(unfinished, 'episode')} had no end within the steps that evaluation allows; a return is partial "
            "there."
        )
    return 0


def _agent_of(namespace: argparse.Namespace) -> tuple[Run, TrainState]:
    """A run and one of its trained agents."""
    _start_quickly()
    import jax

    from trpo_jax.runs import newest_state

    run = _run_of(namespace)
    if not 0 <= namespace.agent < run.num_seeds:
        raise UsageError(f"agent must lie in 0 … {run.num_seeds - 1} for this run, got {namespace.agent}.")
    state = newest_state(run)
    if state is None:
        raise UsageError(
            f"{run.path} has no checkpoint yet; {command('resume', run.path, env=run.config.env)} trains it first."
        )
    return run, jax.tree.map(lambda leaf: leaf[namespace.agent], state)


def _play(namespace: argparse.Namespace) -> int:
    run, state = _agent_of(namespace)
    from trpo_jax.deployment import play

    env = (namespace.env or str(run.config.env)).removeprefix("gymnasium/")
    gif = Path(namespace.gif) if namespace.gif else None
    returns = play(run.config, state, env, num_episodes=namespace.num_episodes, seed=namespace.seed, gif=gif)
    print(
        f"{env} of Gymnasium, {counted(len(returns), 'episode')}: return {returns.mean():.1f} on average, "
        f"{returns.min():.1f} to {returns.max():.1f}."
    )
    if gif:
        print(f"First episode: {gif}")
    return 0


def _export(namespace: argparse.Namespace) -> int:
    run, state = _agent_of(namespace)
    from trpo_jax.deployment import export_policy

    file = export_policy(run.config, state, Path(namespace.output or run.path / "policy"))
    print(f"Policy: {file} ({file.stat().st_size:,} bytes)")
    print(f"`python {file.parent / 'load_policy.py'}` loads it and acts, with jax alone.")
    return 0


def _benchmark(namespace: argparse.Namespace) -> int:
    config = config_of(namespace)
    output = Path(namespace.output) if namespace.output else None
    if output and not output.parent.is_dir():
        raise UsageError(f"there is no folder {output.parent} for {output}; make it, or choose another --output.")

    import json

    from trpo_jax.benchmarks.report import THRESHOLDS, run_benchmark, tables
    from trpo_jax.displays import make_console, print_table
    from trpo_jax.training.agents import is_recurrent, make_agent

    if is_recurrent(make_agent(config)) or config.update != "trpo":
        raise UsageError("benchmark takes an iteration of update=trpo apart, with networks without a memory.")
    console = make_console()
    with _cleaning_up():
        result = run_benchmark(
            config,
            num_agents=namespace.num_agents,
            repetitions=namespace.repetitions,
            threshold=THRESHOLDS.get(config.env) if namespace.threshold is None else namespace.threshold,
            num_seeds=namespace.num_seeds,
            max_steps=namespace.max_steps,
            peers=namespace.compare,
            environments=Path(namespace.peer_environments).resolve() if namespace.peer_environments else None,
            report=lambda what: console.print(f"Measuring {what} …", soft_wrap=True),
        )
    if output:
        write_atomically(output, json.dumps(result, indent=2) + "\n")
    for title, columns, rows in tables(result):
        print_table(console, title, columns, rows)
        console.print()
    return 0


def _envs(_: argparse.Namespace) -> int:
    from rich.table import Table

    from trpo_jax.displays import make_console
    from trpo_jax.environments.make import available_environments

    table = Table(box=None)
    for column in ("environment", "observation", "actions", "time limit"):
        table.add_column(column, no_wrap=True)
    missing = []
    for name, environment in available_environments().items():
        if isinstance(environment, str):
            missing.append(environment)
            continue
        shape = " x ".join(map(str, environment.observation_shape))
        table.add_row(name, shape, str(environment.action_space), str(environment.max_steps or "none"))
    console = make_console()
    console.print(table)
    for sentence in missing:
        console.print(sentence, soft_wrap=True)
    return 0


_COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "resume": _resume,
    "play": _play,
    "export": _export,
    "sweep": _sweep,
    "report": _report,
    "tune": _tune,
    "benchmark": _benchmark,
    "envs": _envs,
}


if __name__ == "__main__":
    sys.exit(main())
