"""The command line: arguments in, one sentence out when they are wrong. JAX is imported when a command needs it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trpo_jax.config import Config, UsageError, nearest
from trpo_jax.files import cast, iterations_within, read_toml

if TYPE_CHECKING:
    from trpo_jax.runs import Progress, Run
    from trpo_jax.types import TrainState


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `trpo-jax`; return the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Greek letters shows question marks
    try:
        parser = _parser()
        namespace, unknown = parser.parse_known_args(arguments)
        if unknown:
            raise UsageError(f"unknown argument {unknown[0]}{nearest(unknown[0], _flags(parser, namespace.command))}")
        return namespace.run(namespace)
    except UsageError as error:
        print(f"trpo-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("trpo-jax: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `trpo-jax envs | head`
        sys.stderr.close()
        return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].lower()}{message[1:].rstrip('.')}; `{self.prog} --help` shows what there is.")


def _parser() -> _Parser:
    parser = _Parser(prog="trpo-jax", description="Trust Region Policy Optimization for JAX.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    train = commands.add_parser(
        "train", help="train agents; the folder keeps metrics, checkpoints and a plot", allow_abbrev=False
    )
    train.add_argument("env", nargs="?", help="environment (default: CartPole-v1)")
    train.add_argument("--output", help="folder of the run (default: runs/ENV)")
    train.add_argument("--config", help="TOML file of settings, such as `trpo-jax tune` writes; flags override it")
    train.add_argument("--seed", type=_whole, default=0, help="seed of the first agent (default: 0)")
    train.add_argument("--num-seeds", type=_whole, default=1, help="agents trained side by side (default: 1)")
    train.add_argument(
        "--total-steps", type=_whole, help="environment steps an agent at most, instead of --num-iterations"
    )
    _add_sinks(train)
    _add_settings(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="run whole episodes with trained agents", allow_abbrev=False)
    evaluate.add_argument("path", help="folder of the run")
    evaluate.add_argument("--num-episodes", type=_whole, default=64, help="episodes an agent (default: 64)")
    evaluate.add_argument("--stochastic", action="store_true", help="sample actions instead of taking the mode")
    evaluate.add_argument("--seed", type=_whole, default=0, help="seed of the episodes (default: 0)")
    evaluate.set_defaults(run=_evaluate)

    resume = commands.add_parser("resume", help="continue a run that was stopped", allow_abbrev=False)
    resume.add_argument("path", help="folder of the run")
    _add_sinks(resume)
    resume.set_defaults(run=_resume)

    play = commands.add_parser("play", help="play a trained policy in Gymnasium's own environment", allow_abbrev=False)
    play.add_argument("path", help="folder of the run")
    play.add_argument("--env", help="Gymnasium's id of the environment (default: the name it was trained on)")
    play.add_argument("--num-episodes", type=_whole, default=10, help="episodes (default: 10)")
    play.add_argument("--seed", type=_whole, default=0, help="seed of the first episode (default: 0)")
    play.add_argument("--agent", type=_whole, default=0, help="which agent of the run, from 0 (default: 0)")
    play.add_argument("--gif", help="file for a moving picture of the first episode")
    play.set_defaults(run=_play)

    export = commands.add_parser("export", help="write a trained policy as portable StableHLO", allow_abbrev=False)
    export.add_argument("path", help="folder of the run")
    export.add_argument("--output", help="folder of the export (default: RUN/policy)")
    export.add_argument("--agent", type=_whole, default=0, help="which agent of the run, from 0 (default: 0)")
    export.set_defaults(run=_export)

    _add_sweep_commands(commands)

    benchmark = commands.add_parser(
        "benchmark",
        help="measure throughput, memory and where the time goes, alone and beside peers",
        allow_abbrev=False,
    )
    benchmark.add_argument("env", nargs="?", default="CartPole-v1", help="environment (default: CartPole-v1)")
    benchmark.add_argument("--output", help="JSON file for every figure (default: none)")
    benchmark.add_argument("--num-agents", type=_whole, default=64, help="agents side by side (default: 64)")
    benchmark.add_argument("--repetitions", type=_whole, default=7, help="times each figure is taken (default: 7)")
    benchmark.add_argument(
        "--threshold", type=float, help="return to train to (default: Gymnasium's, where it names one)"
    )
    benchmark.add_argument("--num-seeds", type=_whole, default=16, help="agents trained to it (default: 16)")
    benchmark.add_argument(
        "--max-steps", type=_whole, default=500_000, help="env steps after which a seed is given up (default: 500000)"
    )
    benchmark.add_argument(
        "--compare",
        action="append",
        default=[],
        choices=("sb3-contrib", "rejax"),
        help="a peer to install in a throw-away virtual environment and to run in turn with us; may be repeated",
    )
    benchmark.add_argument("--peer-environments", help="folder that keeps the peers' environments for the next time")
    _add_settings(benchmark)
    benchmark.set_defaults(run=_benchmark)

    envs = commands.add_parser("envs", help="list what can be trained, with spaces and limits", allow_abbrev=False)
    envs.set_defaults(run=_envs)
    return parser


def _add_sweep_commands(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="train agents over settings and seeds, as a file says; continues what is there",
        allow_abbrev=False,
    )
    sweep.add_argument("file", help="TOML file of the sweep")
    sweep.add_argument("--output", help="folder of the sweep (default: sweeps/NAME-OF-THE-FILE)")
    sweep.add_argument("--dry-run", action="store_true", help="print programs, agents and memory, and train nothing")
    sweep.add_argument(
        "--checkpoint-seconds", type=float, default=60.0, help="save agents at work this often (default: 60)"
    )
    sweep.add_argument(
        "--agents-per-device", type=_whole, help="agents a device takes in one program (default: as memory allows)"
    )
    sweep.add_argument(
        "--num-devices", type=_whole, help="CPU only: devices to make of its cores (default: one a core)"
    )
    sweep.add_argument("--coordinator", help="host:port of process 0, where several hosts meet")
    sweep.add_argument("--num-processes", type=_whole, help="processes that share the sweep and its folder")
    sweep.add_argument("--process-id", type=_whole, help="which of them this is, from 0")
    sweep.set_defaults(run=_sweep)

    report = commands.add_parser(
        "report", help="table, pictures and page of a sweep, finished or not", allow_abbrev=False
    )
    report.add_argument("path", help="folder of the sweep")
    report.set_defaults(run=_report)

    tune = commands.add_parser(
        "tune", help="search settings with Optuna, batches of trials as one program", allow_abbrev=False
    )
    tune.add_argument("file", help="TOML file with [base] settings and [random] distributions")
    tune.add_argument("--output", help="folder of the search (default: searches/NAME-OF-THE-FILE)")
    tune.add_argument("--num-trials", type=_whole, help="trials (default: count in [random])")
    tune.add_argument("--batch", type=_whole, default=16, help="trials trained together (default: 16)")
    tune.add_argument("--storage", help="Optuna storage URL (default: an SQLite file in the folder)")
    tune.set_defaults(run=_tune)


def _add_sinks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log",
        action="append",
        default=[],
        choices=("tensorboard", "wandb"),
        help="where metrics go beside metrics.csv; may be repeated",
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """One flag a setting of `Config`: name, default, help and type come from there."""
    group = parser.add_argument_group("settings")
    types: dict[str, Any] = {"int": _whole, "float": float, "str": str}
    for field in dataclasses.fields(Config):
        meta = field.metadata
        if not meta["flag"]:
            continue
        values = f"; in {meta['interval']}" if "interval" in meta else ""
        text = f"{meta['help']} (default: {field.default}{values})"
        options: dict[str, Any] = {"default": None, "dest": field.name, "help": text}
        if field.type == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = types[str(field.type)]
            options["metavar"] = "|".join(meta.get("choices", ())) or {"int": "N", "float": "X"}.get(str(field.type))
        group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def _whole(text: str) -> int:
    """A whole number; 1e5 and 100_000 count as one."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def _flags(parser: argparse.ArgumentParser, command: str) -> list[str]:
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return [flag for action in commands.choices[command]._actions for flag in action.option_strings]


def _config(namespace: argparse.Namespace, **defaults: Any) -> Config:
    flags = {f.name: getattr(namespace, f.name) for f in dataclasses.fields(Config) if f.metadata["flag"]}
    given = {name: value for name, value in flags.items() if value is not None}
    if namespace.env is not None:
        given["env"] = namespace.env
    return Config().replace(**{**defaults, **given})


def _settings_from(path: str) -> dict[str, Any]:
    """Settings in a TOML file, as names and values."""
    return {name: cast(name, value) for name, value in read_toml(path).items()}


def _train(namespace: argparse.Namespace) -> int:
    config = _config(namespace, **(_settings_from(namespace.config) if namespace.config else {}))
    if namespace.num_seeds < 1:
        raise UsageError(f"num_seeds must be at least 1, got {namespace.num_seeds}.")
    if namespace.seed < 0:
        raise UsageError(f"seed must not be negative, got {namespace.seed}.")
    if namespace.total_steps is not None:
        if namespace.num_iterations is not None:
            raise UsageError("total_steps and num_iterations both set the length of the run; give one of them.")
        config = config.replace(num_iterations=iterations_within(namespace.total_steps, config))

    _start_quickly()
    from trpo_jax.environments.base import Box
    from trpo_jax.runs import create_run
    from trpo_jax.training.agents import make_agent

    if namespace.initial_log_std is not None and not isinstance(make_agent(config).environment.action_space, Box):
        raise UsageError(
            f"initial_log_std sets σ of a Gaussian policy, but {config.env} has discrete actions; leave it out."
        )
    output = namespace.output or f"runs/{config.env}"
    return _continue(create_run(output, config, namespace.seed, namespace.num_seeds), namespace.log)


def _resume(namespace: argparse.Namespace) -> int:
    _start_quickly()
    from trpo_jax.runs import open_run

    return _continue(open_run(namespace.path), namespace.log)


def _start_quickly() -> None:
    """Let JAX keep what it compiles in the user's cache folder, unless it was told of another or of none."""
    import gc
    import hashlib

    import jax

    gc.set_threshold(100_000)  # tracing allocates much and leaves little garbage: a tenth of the start is saved
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
        return
    # A program for one processor may hold instructions that another one lacks; homes are shared between machines.
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    folder = f"{jax.__version__}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "trpo_jax" / folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # compiled anew, then


def _continue(run: Run, sinks: Sequence[str]) -> int:
    from trpo_jax.displays import LiveLine, make_console, run_status
    from trpo_jax.runs import continue_run, plot_learning_curve
    from trpo_jax.sinks import open_sink

    opened = [open_sink(name, run.path, run.description) for name in sinks]
    console, config = make_console(), run.config
    agents = f"{run.num_seeds} agents" if run.num_seeds > 1 else "1 agent"
    console.print(
        f"{config.env}: {agents}, {config.num_iterations} iterations of {config.num_envs} x {config.num_steps} steps "
        f"({config.num_iterations * config.steps_per_iteration:,} steps an agent), δ = {config.max_kl:g}. Compiling …",
        soft_wrap=True,
    )
    last: Progress | None = None
    with LiveLine(console, config.num_iterations, seconds=1) as line:

        def show(progress: Progress) -> None:
            nonlocal last
            last = progress
            line.show(progress.iteration, run_status(progress, config))

        complete = continue_run(run, show, [sink for sink, _ in opened])
    for _, close in opened:
        close()
    plot = plot_learning_curve(run)
    if last is not None:
        console.print(f"{last.iteration} of {config.num_iterations} iterations done; trained for {last.seconds:.1f} s.")
    elif complete:
        console.print("Every iteration is done already.")
    console.print(f"Learning curve: {plot}", soft_wrap=True)
    if not complete:
        console.print(f"Stopped; `trpo-jax resume {run.path}` continues.", soft_wrap=True)
        return 130
    console.print(f"Next: `trpo-jax evaluate {run.path}`", soft_wrap=True)
    return 0


def _sweep(namespace: argparse.Namespace) -> int:
    for name in ("agents_per_device", "num_devices"):
        if (value := getattr(namespace, name)) is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}.")
    if not namespace.checkpoint_seconds >= 0:
        raise UsageError(f"checkpoint_seconds must not be negative, got {namespace.checkpoint_seconds}.")
    output = Path(namespace.output or f"sweeps/{Path(namespace.file).stem}")
    _use_every_core(output, namespace.num_devices)
    _start_quickly()
    from trpo_jax.displays import LiveLine, make_console, print_outline, sweep_status
    from trpo_jax.sweeps.grids import plan, read_spec
    from trpo_jax.sweeps.loop import outline, run_sweep
    from trpo_jax.sweeps.placement import connect_hosts

    console = make_console()
    spec = read_spec(namespace.file)
    if namespace.dry_run:
        print_outline(console, namespace.file, outline(spec, most_agents=namespace.agents_per_device))
        return 0
    process = connect_hosts(namespace.coordinator, namespace.num_processes, namespace.process_id)
    points, groups = plan(spec)
    where = f", process {process[0]} of {process[1]}" if process[1] > 1 else ""
    console.print(
        f"{len(points)} points x {spec.num_seeds} seeds = {len(points) * spec.num_seeds:,} agents, "
        f"{len(groups)} {'programs' if len(groups) > 1 else 'program'}{where}. Compiling …",
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
        return _show_report(output)
    if ending == "interrupted":
        console.print("Stopped; the same command continues.")
        return 130
    console.print(f"This process is done; `trpo-jax report {output}` shows what all have finished.", soft_wrap=True)
    return 0


def _use_every_core(folder: Path, num_devices: int | None) -> None:
    """On a CPU, make each core a device; a sweep that is there goes on with as many threads as it was started with."""
    import json

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # new, or damaged and reported in its place
        threads = json.loads((folder / "sweep.json").read_text())["made_by"]["threads"]
    if isinstance(threads, int):
        os.environ.setdefault("NPROC", str(threads))
        cores = min(cores, threads)
    import jax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # a program that calls `main` may have started JAX already
            jax.config.update("jax_num_cpu_devices", num_devices or cores)


def _report(namespace: argparse.Namespace) -> int:
    return _show_report(Path(namespace.path))


def _show_report(path: Path) -> int:
    from trpo_jax.displays import make_console, print_table
    from trpo_jax.sweeps.reports import make_report, table_of, write_report

    report, console, shown = make_report(path), make_console(), 20
    for env, rows in report.rows.items():
        titles, cells = table_of(rows)
        print_table(console, f"{env}: {report.score}", titles, cells[:shown])
        if len(cells) > shown:
            console.print(f"and {len(cells) - shown} more.")
    if report.failures:
        console.print(f"{len(report.failures)} agents met a number that was not finite; the page names them.")
    page = write_report(path, report)
    console.print(f"Page: {page}", soft_wrap=True)
    return 0


def _tune(namespace: argparse.Namespace) -> int:
    for name in ("num_trials", "batch"):
        if (value := getattr(namespace, name)) is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}.")
    output = Path(namespace.output or f"searches/{Path(namespace.file).stem}")
    _use_every_core(output, None)
    _start_quickly()
    from trpo_jax.displays import make_console
    from trpo_jax.sweeps.grids import read_spec
    from trpo_jax.sweeps.search import Batch, tune

    console = make_console()
    spec = read_spec(namespace.file)
    if namespace.num_trials is not None:
        spec = dataclasses.replace(spec, random={**spec.random, "count": namespace.num_trials})

    def show(batch: Batch) -> None:
        console.print(
            f"{batch.told:>5} of {batch.count} trials, {batch.pruned} of the last batch stopped early; its best "
            f"{batch.batch_best:.1f}, best of all {batch.best:.1f}",
            soft_wrap=True,
        )

    file, score = tune(output, spec, batch=namespace.batch, storage=namespace.storage, report=show)
    console.print(file.read_text(), highlight=False)
    console.print(
        f"Score {score:.1f} on {spec.num_seeds} seeds that only tuning uses. "
        f"Next: `trpo-jax train --config {file} --num-seeds 8`",
        soft_wrap=True,
    )
    return 0


def _evaluate(namespace: argparse.Namespace) -> int:
    if namespace.num_episodes < 1:
        raise UsageError(f"num_episodes must be at least 1, got {namespace.num_episodes}.")

    _start_quickly()
    import functools

    import jax
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from trpo_jax.runs import newest_state, open_run
    from trpo_jax.training.evaluation import evaluate

    run = open_run(namespace.path)
    state = newest_state(run)
    if state is None:
        raise UsageError(f"{namespace.path} has no checkpoint yet; `trpo-jax resume {namespace.path}` trains it first.")
    run_episodes = functools.partial(
        evaluate, num_episodes=namespace.num_episodes, deterministic=not namespace.stochastic
    )
    keys = jax.random.split(jax.random.key(namespace.seed), run.num_seeds)
    result = jax.jit(jax.vmap(run_episodes, in_axes=(None, 0, 0)))(run.config, state, keys)
    returns, lengths = np.asarray(result.episode_return), np.asarray(result.episode_length)
    how = "sampled actions" if namespace.stochastic else "deterministic actions"
    steps = int(state.iteration[0]) * run.config.steps_per_iteration
    table = Table(title=f"{run.config.env} after {steps:,} steps, {namespace.num_episodes} episodes an agent, {how}")
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
    Console().print(table)
    unfinished = int((~np.asarray(result.finished)).sum())
    if unfinished:
        print(f"{unfinished} episodes had no end within the steps that evaluation allows; their returns are partial.")
    return 0


def _agent_of(namespace: argparse.Namespace) -> tuple[Run, TrainState]:
    """A run and one of its trained agents."""
    _start_quickly()
    import jax

    from trpo_jax.runs import newest_state, open_run

    run = open_run(namespace.path)
    if not 0 <= namespace.agent < run.num_seeds:
        raise UsageError(f"agent must lie in 0 … {run.num_seeds - 1} for this run, got {namespace.agent}.")
    state = newest_state(run)
    if state is None:
        raise UsageError(f"{namespace.path} has no checkpoint yet; `trpo-jax resume {namespace.path}` trains it first.")
    return run, jax.tree.map(lambda leaf: leaf[namespace.agent], state)


def _play(namespace: argparse.Namespace) -> int:
    if namespace.num_episodes < 1:
        raise UsageError(f"num_episodes must be at least 1, got {namespace.num_episodes}.")
    run, state = _agent_of(namespace)
    from trpo_jax.deployment import play

    env = namespace.env or str(run.config.env).removeprefix("gymnasium/")
    gif = Path(namespace.gif) if namespace.gif else None
    returns = play(run.config, state, env, num_episodes=namespace.num_episodes, seed=namespace.seed, gif=gif)
    print(
        f"{env} of Gymnasium, {len(returns)} episodes: return {returns.mean():.1f} on average, "
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
    config = _config(namespace, num_envs=64)
    for name in ("num_agents", "repetitions", "num_seeds", "max_steps"):
        if getattr(namespace, name) < 1:
            raise UsageError(f"{name} must be at least 1, got {getattr(namespace, name)}.")
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
        output.write_text(json.dumps(result, indent=2) + "\n")
    for title, columns, rows in tables(result):
        print_table(console, title, columns, rows)
        console.print()
    return 0


def _envs(_: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

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
    console = Console(highlight=False)
    console.print(table)
    for sentence in missing:
        console.print(sentence, soft_wrap=True, markup=False)  # an extra stands in brackets
    return 0


if __name__ == "__main__":
    sys.exit(main())
