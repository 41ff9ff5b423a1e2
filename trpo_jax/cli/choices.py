"""The meaning of a command's arguments: a configuration, and the outputs for metrics."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trpo_jax.cli.arguments import BENCHMARK
from trpo_jax.config import Config
from trpo_jax.env_args import PREFIX
from trpo_jax.presets import changed, load_preset, preset_of, with_preset
from trpo_jax.sentences import UsageError, say
from trpo_jax.settings import SETTINGS, TOTAL_STEPS, read_toml, with_length
from trpo_jax.validation import IN_ENVIRONMENT, without_effect

if TYPE_CHECKING:
    from trpo_jax.runs.sinks import OpenSink


def settings_in_file(namespace: argparse.Namespace) -> dict[str, Any]:
    """The settings in the TOML file of --config; empty without it."""
    if namespace.config is None:
        return {}
    return with_preset(read_toml(namespace.config), namespace.config, env=namespace.env)


def config_of(namespace: argparse.Namespace, file: Mapping[str, Any] | None = None) -> Config:
    """Build the `Config`: the defaults, overridden by --preset, by a file of settings, and by the flags, in this order.

    Raises:
      UsageError: if a setting is out of its range, or a flag has no effect with the others.
    """
    flags = {f.name: getattr(namespace, f.name, None) for f in dataclasses.fields(Config) if f.metadata["flag"]}
    flags |= {"env": namespace.env, TOTAL_STEPS: getattr(namespace, TOTAL_STEPS, None)}
    env_args = dict(namespace.env_arg)
    if len(env_args) < len(namespace.env_arg):
        twice = next(name for name, count in Counter(name for name, _ in namespace.env_arg).items() if count > 1)
        raise UsageError(f"--env-arg {twice.removeprefix(PREFIX)} is given twice; leave one out.")
    given = {name: value for name, value in flags.items() if value is not None} | env_args
    length = (TOTAL_STEPS, "num_iterations")
    over = length if any(name in given for name in length) else ()
    base = {**BENCHMARK} if namespace.command == "benchmark" else {}
    below = _over_preset(namespace, file or {})
    base |= {name: value for name, value in below.items() if name not in over}
    config = with_length({**base, **given}, Config())
    for name in given:
        if name in SETTINGS and (why := without_effect(config, name)):
            raise UsageError(f"{name} {why}; leave it out.")
    return config


def _over_preset(namespace: argparse.Namespace, file: Mapping[str, Any]) -> Mapping[str, Any]:
    """Combine the settings of a file with those of --preset, or of the preset with this environment; the file wins."""
    preset = getattr(namespace, "preset", None)
    if preset is None:
        return file
    env = namespace.env or file.get("env", Config.env)
    return changed(load_preset(preset) if preset else preset_of(env), file, env)


def check_flags_of_environment(namespace: argparse.Namespace, config: Config) -> None:
    """Raise `UsageError` if a flag sets what has no effect in the environment."""
    for name in IN_ENVIRONMENT:
        if getattr(namespace, name) and (why := _why_idle(config, name)):
            raise UsageError(f"{name} {why}; leave it out.")


def tell_idle(names: Iterable[str], configs: Iterable[Config], source: str) -> None:
    """Print a note for each setting of a file that has no effect in any of the configurations."""
    configs = list(configs)
    for name in names:
        reasons = [_why_idle(config, name) for config in configs] if name in SETTINGS else []
        changed = any(getattr(config, name) != getattr(Config, name) for config in configs) if reasons else False
        if changed and all(reasons):
            say(f"note: {name} in {source} {reasons[0]}.")


def _why_idle(config: Config, name: str) -> str:
    """Why a setting has no effect with the others, or in its environment; empty if it has one."""
    why = without_effect(config, name)
    if why or name not in IN_ENVIRONMENT:
        return why
    from trpo_jax.training.agents import idle_in_environment

    return idle_in_environment(config).get(name, "")


def opener_of(namespace: argparse.Namespace, folder: Path) -> Callable[[str, Mapping[str, Any]], list[OpenSink]]:
    """Make the function that opens the sinks of --log for a part of a folder's agents, given their settings."""
    from trpo_jax.runs.sinks import open_sink

    wandb = {name: getattr(namespace, name) for name in ("wandb_project", "wandb_name") if getattr(namespace, name)}
    if wandb and "wandb" not in namespace.log:
        raise UsageError(f"--{next(iter(wandb)).replace('_', '-')} has no effect without --log wandb; add that.")
    return lambda part, settings: [open_sink(name, folder, settings, part=part, **wandb) for name in namespace.log]
