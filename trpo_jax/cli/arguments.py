"""The arguments of the command line: commands, their flags, and the settings of `Config` as flags. Imports no JAX."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from trpo_jax import __version__
from trpo_jax.cli.flag_types import env_arg, moved, whole, whole_numbers
from trpo_jax.config import Config
from trpo_jax.fields import as_text
from trpo_jax.sentences import UsageError, check_limits
from trpo_jax.settings import SETTINGS, check_names_module

BENCHMARK = {"num_envs": 64}  # defaults of `benchmark` that differ from those of `Config`


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def number(self, flag: str, default: float, meaning: str, kind: Callable[[str], float] | None = None) -> None:
        """Add a flag that takes a number, by default a whole one."""
        self.add_argument(flag, type=kind or whole, default=default, help=f"{meaning} (default: {default})")

    def error(self, message: str) -> NoReturn:
        text = " ".join(message.split()).rstrip(".")
        text = text if len(text) <= 300 else f"{text[:200]} …"
        raise UsageError(f"{text[:1].lower()}{text[1:]}; see `{self.prog} --help`.")

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse itself would ignore a full disk


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands; `namespace.command` is the one that was given."""
    parser = _Parser(prog="trpo-jax", description="Trust Region Policy Optimization for JAX.")
    parser.add_argument("--version", action="version", version=f"trpo_jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    train = commands.add_parser("train", help="train agents; the folder keeps metrics, checkpoints and a plot")
    train.add_argument(
        "env", nargs="?", help="environment, or MODULE:FACTORY, your own function (default: CartPole-v1)"
    )
    train.add_argument("--output", help="folder of the run (default: runs/ENV)")
    _add_base(train)
    train.number("--seed", 0, "seed of the first agent")
    train.number("--num-seeds", 1, "agents trained side by side")
    train.add_argument(
        "--total-steps", type=whole, help="steps per agent, rounded down to full iterations; replaces --num-iterations"
    )
    train.number("--keep-every", 0, "keep the checkpoint of every so many iterations; 0: only the newest two")
    train.add_argument(
        "--init-from", metavar="RUN", help="folder of a run with whose trained networks the agents start"
    )
    _add_trust(train)
    _add_devices(train)
    _add_sinks(train)
    _add_settings(train)

    _add_run_commands(commands)
    _add_sweep_commands(commands)

    _add_benchmark(commands)
    check = commands.add_parser("check", help="check an environment against the contract, and list every problem")
    check.add_argument("env", help="environment, or MODULE:FACTORY, your own function that makes it")
    _add_settings(check, only=("max_steps", "randomize", "wrappers"))

    commands.add_parser("envs", help="list the environments, with their spaces and time limits")
    commands.add_parser("presets", help="list the presets, with their settings and tasks")
    return parser


def _add_benchmark(commands: Any) -> None:
    """Add the command that measures speed."""
    benchmark = commands.add_parser("benchmark", help="measure throughput, memory and where the time goes")
    benchmark.add_argument("env", nargs="?", help="environment, or MODULE:FACTORY (default: CartPole-v1)")
    _add_base(benchmark)
    benchmark.add_argument("--output", help="JSON file for all figures (default: none)")
    benchmark.add_argument("--json", action="store_true", help="print all figures as JSON, and nothing else")
    benchmark.add_argument("--picture", help="PNG file for the curves over agents and environments (default: none)")
    benchmark.add_argument(
        "--num-agents", type=whole_numbers, default=[64], metavar="N,N", help="agents side by side (default: 64)"
    )
    benchmark.add_argument(
        "--env-counts", type=whole_numbers, default=[], metavar="N,N", help="environments of one agent, for a curve"
    )
    benchmark.number("--repetitions", 7, "measurements of each figure")
    benchmark.add_argument("--threshold", type=float, help="return to reach (default: Gymnasium's, if there is one)")
    benchmark.number("--num-seeds", 16, "agents trained until they reach it")
    benchmark.number("--threshold-steps", 500_000, "env steps after which a seed counts as not reaching it")
    benchmark.add_argument("--compare", "--peer-environments", type=moved, help=argparse.SUPPRESS)
    _add_settings(benchmark, BENCHMARK)


def _add_run_commands(commands: Any) -> None:
    """Add the commands that take the folder of a run."""
    evaluate = commands.add_parser("evaluate", help="run whole episodes with trained agents")
    evaluate.add_argument("path", help="folder of the run")
    evaluate.number("--num-episodes", 64, "episodes per agent")
    _add_agent(evaluate, "all of a run")
    evaluate.add_argument("--randomize", action="store_true", help="draw environment settings as in training")
    evaluate.add_argument(
        "--stochastic",
        action=argparse.BooleanOptionalAction,
        help="sample actions instead of taking the policy's mode (default: eval_stochastic of the run)",
    )
    evaluate.number("--seed", 0, "seed of the episodes")
    evaluate.add_argument("--output", help="JSON file for all figures (default: none)")
    _add_checkpoint(evaluate)
    _add_trust(evaluate)
    _add_env(evaluate)

    resume = commands.add_parser("resume", help="continue a run that was interrupted")
    resume.add_argument("path", help="folder of the run")
    resume.add_argument(
        "--total-steps", type=whole, help="extend the run to so many steps per agent, rounded down to whole iterations"
    )
    _add_trust(resume)
    _add_env(resume)
    _add_devices(resume)
    _add_sinks(resume)

    play = commands.add_parser("play", help="play a trained policy in Gymnasium's environment, or in that of training")
    play.add_argument("path", help="folder of the run")
    play.add_argument("--env", help="Gymnasium's id of the environment (default: its name in training)")
    _add_trust(play)
    play.number("--num-episodes", 10, "episodes")
    play.number("--seed", 0, "seed of the first episode")
    _add_agent(play)
    _add_checkpoint(play)
    play.add_argument("--output", "--gif", metavar="FILE", help="file for a video of the first episode, .gif or .mp4")
    drawn = "play in the environment of training, and draw it (default of --output: RUN/episode.gif)"
    play.add_argument("--render", action="store_true", help=drawn)

    export = commands.add_parser("export", help="write a trained policy as portable StableHLO")
    export.add_argument("path", help="folder of the run")
    export.add_argument("--output", help="folder of the export (default: RUN/policy)")
    _add_agent(export)
    _add_checkpoint(export)
    _add_trust(export)
    _add_env(export)


def _add_sweep_commands(commands: Any) -> None:
    """Add the commands that train many agents from a file."""
    sweep = commands.add_parser("sweep", help="train agents over the settings and seeds of a file, or continue")
    sweep.add_argument("file", help="TOML file of the sweep")
    sweep.add_argument("--output", help="folder of the sweep (default: sweeps/NAME-OF-THE-FILE)")
    sweep.add_argument("--dry-run", action="store_true", help="print programs, agents, memory and time; train nothing")
    sweep.add_argument(
        "--keep",
        choices=("none", "best", "all"),
        help="trained states to keep: none, that of each point's best agent, or all",
    )
    sweep.add_argument("--extend", action="store_true", help="add the agents of the file to the sweep in the folder")
    sweep.number("--checkpoint-seconds", 60, "seconds between checkpoints of the agents in training", float)
    sweep.add_argument(
        "--agents-per-device", type=whole, help="agents per device in one program (default: as memory allows)"
    )
    sweep.add_argument(
        "--num-devices",
        type=whole,
        help="CPU only: devices, or processes for Python environments (default: all cores)",
    )
    _add_trust(sweep)
    _add_sinks(sweep)
    sweep.add_argument("--coordinator", help="host:port of process 0, which connects several hosts")
    sweep.add_argument("--num-processes", type=whole, help="processes that share the sweep and its folder")
    sweep.add_argument("--process-id", type=whole, help="number of this process, from 0")

    report = commands.add_parser("report", help="show a sweep, finished or not, as a table, pictures and a page")
    report.add_argument("path", help="folder of the sweep")
    _add_trust(report)

    compare = commands.add_parser("compare", help="compare runs and sweeps: curves, intervals, probabilities, profiles")
    compare.add_argument("paths", nargs="+", metavar="path", help="folders of runs and sweeps")
    compare.add_argument(
        "--by",
        default="",
        metavar="SETTING,SETTING",
        help="settings whose values define the methods, such as update; folder is one, too (default: folder)",
    )
    compare.add_argument("--output", default="comparison.html", help="file of the page (default: comparison.html)")
    compare.add_argument("--json", help="JSON file for all figures (default: none)")
    _add_trust(compare)

    tune = commands.add_parser("tune", help="search for settings with Optuna; each batch of trials is one program")
    tune.add_argument("file", help="TOML file with [base] settings and [random] distributions")
    tune.add_argument("--output", help="folder of the search (default: searches/NAME-OF-THE-FILE)")
    tune.add_argument("--num-trials", type=whole, help="trials (default: count in [random])")
    tune.number("--batch", 16, "trials trained together")
    tune.add_argument("--storage", help="Optuna storage URL (default: an SQLite file in the folder)")
    _add_trust(tune)


def _add_devices(parser: _Parser) -> None:
    parser.number("--num-devices", 1, "devices that share the environments of one agent (no gain on a CPU)")


def _add_sinks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log",
        action="append",
        default=[],
        choices=("tensorboard", "wandb"),
        help="also log metrics there, in addition to the files of the folder; may be repeated",
    )
    parser.add_argument("--wandb-project", help="W&B's project (default: trpo_jax)")
    parser.add_argument("--wandb-name", help="W&B's group, of one run per seed (default: the name of the folder)")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--point", type=whole, help="for a sweep: number of the point (default: that of the best agent)"
    )
    parser.add_argument(
        "--checkpoint",
        default="last",
        metavar="last|best|N",
        help="state to use: the last one, each agent's best by evaluation during training, or that after N iterations "
        "(default: last)",
    )


def _add_agent(parser: argparse.ArgumentParser, default: str = "0 of a run") -> None:
    parser.add_argument(
        "--agent",
        type=whole,
        help=f"agent: its number in a run, from 0, or its seed in a sweep (default: {default}, the best of a sweep)",
    )


def _add_base(parser: Any) -> None:
    """Add the sources of settings below the flags."""
    parser.add_argument("--config", help="TOML file of settings, such as that of `trpo-jax tune`; flags override it")
    parser.add_argument(
        "--preset",
        nargs="?",
        const="",
        metavar="NAME",
        help="settings of a table of results, by default of the first one with this environment; a file and flags "
        "override them",
    )


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE:FACTORY",
        help="environment that a file or folder may name although a module is imported for it; may be repeated",
    )


def _add_env(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--env", help=argparse.SUPPRESS)  # --trust of earlier versions


def _add_settings(
    parser: argparse.ArgumentParser, defaults: Mapping[str, Any] | None = None, only: Sequence[str] = ()
) -> None:
    """Add one flag for each setting of `Config`, with its name, default, help and type."""
    group = parser.add_argument_group("settings")
    group.add_argument(
        "--env-arg",
        action="append",
        default=[],
        type=env_arg,
        metavar="NAME=VALUE",
        help="setting of the environment, such as gravity=20; may be repeated",
    )
    types: dict[str, Any] = {"int": whole, "float": float}
    forms = {"int": "N", "float": "X", "str": "TEXT", "widths": "N,N", "ranges": "NAME=LOW..HIGH"}
    for field in dataclasses.fields(Config):
        meta = field.metadata
        if not meta["flag"] or (only and field.name not in only):
            continue
        values = f"; in {meta['interval']}" if "interval" in meta else ""
        default = as_text((defaults or {}).get(field.name, field.default))
        text = f"{meta['help']} (default: {default}{values})"
        options: dict[str, Any] = {"default": None, "dest": field.name, "help": text}
        if meta["kind"] == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = types.get(meta["kind"], str)
            options["metavar"] = "|".join(meta.get("choices", ())) or forms[meta["kind"]]
        group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def flags_of(parser: argparse.ArgumentParser, command: str) -> list[str]:
    """The flags of a command."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return [flag for action in commands.choices[command]._actions for flag in action.option_strings]


def check_arguments(namespace: argparse.Namespace) -> None:
    """Check the arguments that are not settings: the range of numbers, and that no text contains a NUL."""
    numbers = {name: value for name, value in vars(namespace).items() if name not in SETTINGS}
    for number in numbers.pop("num_agents", ()):
        check_limits({"num_agents": number})
    check_limits(numbers)
    for env in getattr(namespace, "trust", ()):
        check_names_module(env, "--trust")
    for name, value in vars(namespace).items():
        if isinstance(value, str) and "\0" in value:
            raise UsageError(f"{name} must not contain the character NUL, got {value[:60]!r}.")
