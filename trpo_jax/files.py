"""Files: settings as they stand in them, and writing that a kill leaves whole. Imports no JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from trpo_jax.config import Config, UsageError

_KINDS = {field.name: str(field.type) for field in dataclasses.fields(Config) if field.metadata["flag"]}
SETTINGS = ("env", *_KINDS)  # what a file can name; networks and environments of one's own it cannot
TOTAL_STEPS = "total_steps"  # may stand for num_iterations wherever a setting may


def settings_of(config: Config) -> dict[str, Any]:
    """The settings of a configuration, as files have them."""
    return {name: getattr(config, name) for name in SETTINGS}


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The table in a TOML file; raise `UsageError` with one sentence if there is none."""
    import tomllib  # deferred: `trpo-jax --help` can do without

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {str(error).rstrip('.')}.") from None


def is_whole(name: str) -> bool:
    """Whether a setting takes whole numbers."""
    return name == TOTAL_STEPS or _KINDS.get(name) == "int"


def cast(name: str, value: Any) -> Any:
    """The value of a setting as `Config` has it: TOML writes 1 for 1.0, and 1e5 for a whole number."""
    if type(value) is int and _KINDS.get(name) == "float":
        return float(value)
    if isinstance(value, float) and is_whole(name) and value.is_integer():
        return int(value)
    return value


def iterations_within(total_steps: Any, config: Config) -> int:
    """How many iterations take at most `total_steps` environment steps; raise `UsageError` if none does."""
    iterations = int(total_steps) // config.steps_per_iteration if isinstance(total_steps, (int, float)) else 0
    if iterations < 1:
        raise UsageError(
            f"{TOTAL_STEPS}={total_steps} is less than one iteration of num_envs x num_steps = "
            f"{config.steps_per_iteration}; raise it, or lower num_envs or num_steps."
        )
    return iterations


def write_atomically(
    file: Path, content: str | Callable[[IO[bytes]], Any], mend: str = "choose a folder that can be written to"
) -> None:
    """Write a file, with its folder, so that it is the old one or the new one after a kill or a power cut.

    Args:
      file: where to.
      content: the text, or a function that writes into the open file.
      mend: the end of the sentence if that fails.

    Raises:
      UsageError: if the file cannot be written.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as sink:
            if isinstance(content, str):
                sink.write(content.encode())
            else:
                content(sink)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UsageError(f"cannot write {file}: {error.strerror or error}; {mend}.") from error
