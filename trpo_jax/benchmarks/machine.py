"""The machine that a figure is taken on, and whether it has other work at the time."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from trpo_jax.backend import num_cores
from trpo_jax.runs.descriptions import made_by

BUSY = 0.1  # share of the processors from which other work shows in the figures
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "OMP_NUM_THREADS")


def setting() -> dict[str, Any]:
    """The machine, the versions, the flags and the command of a figure."""
    return {
        **made_by(),
        "platform": jax.devices()[0].platform,
        "devices": jax.device_count(),
        "processor": processor(),
        "cores": num_cores(),
        "busy": busy_share(),
        "commit": commit(),
        "flags": {name: value for name, value in os.environ.items() if name in _FLAGS or name.startswith("JAX_")},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def machine_name(setting: dict[str, Any]) -> str:
    """The name of what computed, and its cores, for a title."""
    return f"{setting['processor' if setting['platform'] == 'cpu' else 'device']}, {setting['cores']} cores"


def processor() -> str:
    """The model of the processor, as the system names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def busy_share(seconds: float = 0.5) -> float | None:
    """The share of all processors that is in use while this process waits; None where the system has no such file."""
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    if before is None or after is None or after[1] == before[1]:
        return None
    return round((after[0] - before[0]) / (after[1] - before[1]), 3)


def _ticks() -> tuple[int, int] | None:
    """Processor time in use, and in all, since the start of the system (Linux)."""
    try:
        numbers = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    idle = numbers[3] + numbers[4]
    return sum(numbers) - idle, sum(numbers)


def commit() -> str | None:
    """The commit of the package, with a + if its files were changed since; None outside a repository."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        # An installed package may lie within a repository that has nothing to do with it.
        if git("ls-files", "machine.py"):
            return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "--", ".."))
    return None
