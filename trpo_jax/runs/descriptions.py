"""Descriptions of folders: the settings of a run, a sweep or a search as sealed JSON, and the versions that run it."""

from __future__ import annotations

import json
import os
import platform
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from trpo_jax import __version__
from trpo_jax.backend import num_cores
from trpo_jax.files import BLANK_SEAL, as_plain, is_fresh, is_intact, read_json, read_limited, sealed, write_atomically
from trpo_jax.sentences import UsageError, shown

_PACKAGES = "jax", "jaxlib", "gymnax", "flax", "optax"


def write_table(file: Path, table: Mapping[str, Any], *, first: bool = False) -> None:
    """Write names and values as sealed JSON; `first` is as in `write_atomically`."""
    text = json.dumps({**in_json(table), "checksum": BLANK_SEAL}, indent=1) + "\n"
    write_atomically(file, sealed(text.encode()), first=first)


def in_json(table: Mapping[str, Any]) -> dict[str, Any]:
    """A description in JSON's types: a tuple and an array are lists there.

    Raises:
      UsageError: if a value is an object, such as an environment, that no file can hold.
    """
    found = {}
    for name, value in table.items():
        try:
            found[name] = json.loads(json.dumps(value, default=_listed))
        except TypeError:
            raise UsageError(
                f"{name} in a folder must be a name or numbers, got {shown(value)}; name it (your own environment as "
                "MODULE:FACTORY), or use `train` or `sweep`, which need no folder."
            ) from None
    return found


def _listed(value: Any) -> Any:
    """What JSON writes for a value that it does not know; raise `TypeError` for what is not an array."""
    found = as_plain(value)
    if found is value:
        raise TypeError
    return found


def read_table(file: Path, kind: str) -> dict[str, Any]:
    """Read what `write_table` wrote in the folder of a `kind`, "run" or "sweep".

    Raises:
      UsageError: if the file is missing, damaged or changed.
    """
    try:
        table = read_json(file, restore_or_anew(kind))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{file.parent} is not the folder of a {kind} (there is no {file}).") from None
    if not is_intact(read_limited(file)):
        raise UsageError(f"{file} is damaged (it was changed since it was written); {restore_or_anew(kind)}.")
    table.pop("checksum", None)
    return table


def restore_or_anew(kind: str) -> str:
    """The advice for a damaged file of a run or a sweep."""
    return f"restore it, or {'train' if kind == 'run' else kind} again into another folder"


def is_begun(file: Path, kind: str) -> bool:
    """Whether a folder has its description; raise `UsageError` if it belongs to something else."""
    if is_fresh(file.parent, file.name):
        return False
    # The files may be those of another process that is just starting, which writes this one first.
    if not file.exists():
        raise UsageError(f"{file.parent} exists and is not the folder of a {kind}; choose another --output.")
    return True


def check_equal(
    folder: Path, kind: str, asked: Mapping[str, Any], found: Mapping[str, Any], mend: str = "choose another --output"
) -> None:
    """Raise `UsageError` if a folder was made with another description than the one requested."""
    asked = in_json(asked)
    changed = [name for name in {**asked, **found} if found.get(name) != asked.get(name)]
    if changed:
        raise UsageError(f"{folder} holds a {kind} with another {', '.join(changed)}; {mend}.")


def origin(file: Path) -> str:
    """The checksum of the settings in a description, which stamps the files made for it.

    Equal descriptions have equal checksums, so that a folder may be copied, moved and renamed.
    """
    table = json.loads(read_limited(file))
    asked = {name: value for name, value in table.items() if name not in ("made_by", "checksum")}
    return f"{zlib.crc32(json.dumps(asked, sort_keys=True).encode()):08x}"


def made_by() -> dict[str, Any]:
    """Versions, device and, on a CPU, what else decides last bits. Descriptions record them but may differ in them."""
    device = jax.local_devices()[0]
    # XLA cuts sums into as many parts as it has threads, and compiles for a number of devices.
    on_cpu = {"threads": num_threads(), "devices": jax.local_device_count()} if device.platform == "cpu" else {}
    packages = {name: version(name) for name in _PACKAGES} | {"trpo_jax": __version__}
    return {"python": platform.python_version(), **packages, "device": device.device_kind, **on_cpu}


def num_threads() -> int:
    """Number of threads with which XLA computes on a CPU."""
    asked = os.environ.get("NPROC", "")
    return max(int(asked) if asked.isdigit() and int(asked) else num_cores(), jax.local_device_count())
