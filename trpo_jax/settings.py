"""Settings in files: their names, their values in text formats, and their checks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trpo_jax.config import Config, check_setting
from trpo_jax.env_args import PREFIX, check_env_arg
from trpo_jax.fields import NONE, as_ranges, as_text, as_widths
from trpo_jax.files import as_path, as_plain, read_limited
from trpo_jax.sentences import UsageError, check_known, check_limits, first_line, shown

_KINDS = {field.name: field.metadata["kind"] for field in dataclasses.fields(Config) if field.metadata["flag"]}
SETTINGS = ("env", *_KINDS)  # those that a file can name: networks and environments of the user's are not among them
DISTRIBUTIONS = ("uniform", "log_uniform", "choice")  # from which a search or a sweep draws values
TOTAL_STEPS = "total_steps"  # may replace num_iterations wherever a setting may stand

_trusted: set[str] = set()  # environments that files may name although a module is imported for them


def trust(env: str) -> None:
    """Let files and folders name an environment that needs a module to be imported, until the program ends.

    Without this, a file of settings, a run or a sweep from elsewhere could cause any module to be imported.

    Args:
      env: the environment as the file names it: `MODULE:FACTORY`, or `gymnasium/MODULE:ID`.

    Raises:
      UsageError: if no module would be imported for it.
    """
    check_names_module(env, "trust")
    _trusted.add(env)


@contextlib.contextmanager
def trusting(*envs: str) -> Iterator[None]:
    """Trust environments in a block; those that need no trust are left out."""
    before = set(_trusted)
    _trusted.update(filter(_names_module, envs))
    try:
        yield
    finally:
        _trusted.intersection_update(before)


def check_trusted(env: Any, source: str) -> None:
    """Raise `UsageError` if a file names an environment whose module would be imported, and nobody has trusted it."""
    if _names_module(env) and env not in _trusted:
        raise UsageError(
            f"env in {source} names a module to import, {shown(env)}; if you trust it, name it again: "
            f"--trust {shlex.quote(env)}, or `trpo_jax.trust` in Python."
        )


def check_names_module(env: Any, label: str) -> None:
    """Raise `UsageError` unless a module would be imported for an environment."""
    if not _names_module(env):
        raise UsageError(f"{label} is for an environment that names a module, MODULE:FACTORY, got {shown(env)}.")


def _names_module(env: Any) -> bool:
    return isinstance(env, str) and ":" in env


def settings_of(config: Config) -> dict[str, Any]:
    """The settings of a configuration, in the form of files."""
    own = {f"{PREFIX}{name}": value for name, value in config.env_args.items()}
    values = {name: getattr(config, name) for name in SETTINGS} | own
    if callable(values["randomize"]):  # no file can name a function
        values["randomize"] = NONE
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def setting_names(configs: Iterable[Config]) -> tuple[str, ...]:
    """The names of all settings in some configurations, with those of their environments: "env.gravity"."""
    return (*SETTINGS, *sorted({f"{PREFIX}{name}" for config in configs for name in config.env_args}))


def value_of(config: Config, name: str) -> Any:
    """The value of a setting for a table; None for an environment setting that the configuration lacks."""
    if name.startswith(PREFIX):
        return config.env_args.get(name.removeprefix(PREFIX))
    return as_text(getattr(config, name))


def with_flat_names(table: Mapping[str, Any]) -> dict[str, Any]:
    """Give each entry of a table `env` in a table of settings its own name: "env.gravity"."""
    own = table.get("env")
    if not isinstance(own, Mapping) or set(own) <= set(DISTRIBUTIONS):
        return dict(table)
    flat = {f"{PREFIX}{name}": value for name, value in own.items()}
    return {name: value for name, value in table.items() if name != "env"} | flat


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the table in a TOML file; raise `UsageError` with one sentence if there is none."""
    import tomllib  # deferred: `trpo-jax --help` can do without

    path = as_path(path)
    try:
        return tomllib.loads(read_limited(path).decode("utf-8-sig"))  # some editors begin a file with a mark
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text in UTF-8; save it in that encoding.") from None
    except (ValueError, RecursionError) as error:  # ValueError: about the form, the encoding, or a number's digits
        raise UsageError(f"{path} is not TOML: {first_line(error)}.") from None


def is_whole(name: str) -> bool:
    """Whether a setting takes whole numbers."""
    return name == TOTAL_STEPS or _KINDS.get(name) == "int"


def cast(name: str, value: Any) -> Any:
    """Convert a value to its type in `Config`: TOML writes 1 for 1.0, 1e5 for a whole number, and lists of widths."""
    kind = _KINDS.get(name)
    if kind == "widths":
        return as_widths(value)
    if kind == "ranges":
        return as_ranges(value)
    if type(value) is int and kind == "float":
        with contextlib.suppress(OverflowError):  # too large for any range
            return float(value)
    if isinstance(value, float) and is_whole(name) and value.is_integer():
        return int(value)
    return value


def checked(name: str, value: Any, source: str) -> Any:
    """Convert and check the value of a setting in a file: one number, truth value or word, or the widths of layers.

    Raises:
      UsageError: with one sentence that names the setting and the file.
    """
    value = cast(name, as_plain(value))
    if name == TOTAL_STEPS:
        check_limits({name: value}, source)
    elif name.startswith(PREFIX):
        check_env_arg(name.removeprefix(PREFIX), value, source)
    elif name == "env" and not isinstance(value, str):
        raise UsageError(f"env in {source} must be the name of an environment, got {shown(value)}.")
    elif name == "env":
        check_trusted(value, source)
    else:
        check_setting(name, value, source)
    return value


def checked_settings(table: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Convert and check the settings in a file, `source`; raise `UsageError` with one sentence about a wrong one."""
    table = with_flat_names(table)
    check_names(table, source)
    return {name: checked(name, value, source) for name, value in table.items()}


def check_names(names: Iterable[str], source: str) -> None:
    """Raise `UsageError` with one sentence if a name is not a setting."""
    check_known((name for name in names if not name.startswith(PREFIX)), (*SETTINGS, TOTAL_STEPS), source)


def with_length(settings: Mapping[str, Any], base: Config) -> Config:
    """Change some settings of `base`; `total_steps` may replace `num_iterations`, rounded down to whole iterations.

    Settings of the environment, such as "env.gravity", are changed one by one.
    """
    own = {name.removeprefix(PREFIX): value for name, value in settings.items() if name.startswith(PREFIX)}
    if own:
        settings = {name: value for name, value in settings.items() if not name.startswith(PREFIX)}
        settings["env_args"] = {**settings.get("env_args", base.env_args), **own}
    if TOTAL_STEPS not in settings:
        return base.replace(**settings)
    if "num_iterations" in settings:
        raise UsageError("total_steps and num_iterations both set the length of a run; give one of them.")
    config = base.replace(**{name: value for name, value in settings.items() if name != TOTAL_STEPS})
    check_limits({TOTAL_STEPS: settings[TOTAL_STEPS]})
    iterations = settings[TOTAL_STEPS] // config.steps_per_iteration
    if iterations < 1:
        raise UsageError(
            f"{TOTAL_STEPS}={settings[TOTAL_STEPS]} is less than one iteration of num_envs x num_steps = "
            f"{config.steps_per_iteration}; raise it, or lower num_envs or num_steps."
        )
    return config.replace(num_iterations=iterations)
