"""Messages: `UsageError`, the words of its sentence, checks of numbers, and what reaches the terminal."""

from __future__ import annotations

import contextlib
import difflib
import numbers
import os
import shlex
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SEEDS = 2**31  # seeds are below it: larger ones would train the same agents as smaller ones
LIMITS: dict[str, tuple[bool, str]] = {
    "agent": (True, "[0, 2147483646]"),  # that of a sweep is a seed
    "agents_per_device": (True, "[1, 1000000]"),
    "batch": (True, "[1, 10000]"),
    "checkpoint_seconds": (False, "[0, 1e9]"),
    "count": (True, "[1, 1000000]"),
    "every": (True, "[1, 10000000]"),
    "keep_every": (True, "[0, 10000000]"),
    "max_steps": (True, "[1, 2147483647]"),
    "num_agents": (True, "[1, 1000000]"),
    "num_devices": (True, "[1, 256]"),
    "num_episodes": (True, "[1, 1000000]"),
    "num_processes": (True, "[1, 1000000]"),
    "num_seeds": (True, "[1, 1000000]"),
    "num_trials": (True, "[1, 1000000]"),
    "process_id": (True, "[0, 999999]"),
    "repetitions": (True, "[1, 10000]"),
    "seed": (True, f"[0, {SEEDS - 1}]"),
    "threads": (True, "[1, 4096]"),
    "threshold": (False, "[-1e30, 1e30]"),
    "threshold_steps": (True, "[1, 2147483647]"),
    "total_steps": (True, "[1, 1000000000000000]"),
}
"""Numbers that are not settings, on the command line and in files: whether they are whole, and their range."""


class UsageError(ValueError):
    """Raised if a setting, file or environment cannot be used; the message is one sentence that says what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: '; did you mean …?' with the closest known names, or a full stop."""
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower()[:100], lowered, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(lowered[match] for match in close)}?" if close else "."


def check_known(names: Iterable[str], known: Iterable[str], source: str) -> None:
    """Raise `UsageError` with one sentence, which names `source`, if one of the names is no setting."""
    for name in names:
        if name not in known:
            raise UsageError(f"{source} has no setting {shown(name)}{nearest(name, known)}")


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 episode", "2,000 episodes"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """The message of an exception, on one line, short, and without a full stop."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    said = error.args[0] if isinstance(error, KeyError) and error.args else error  # the str() of a KeyError is quoted
    text = str(said).strip().splitlines()
    return text[0].rstrip(".")[:200] if text else type(error).__name__


def shown(value: Any) -> str:
    """A value for a sentence: on one line, and short."""
    try:
        text = " ".join((repr(value) if isinstance(value, str) else str(value)).split())
    except Exception:  # more digits than Python prints, or an object whose text fails
        text = "a number too long to be shown" if isinstance(value, int) else f"an object of {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]} …"


def check_limits(values: Mapping[str, Any], source: str = "") -> None:
    """Check the numbers in `values` that are not settings, see `LIMITS`; None means not given.

    Raises:
      UsageError: with one sentence, which names `source`, a file.
    """
    for name, (whole, interval) in LIMITS.items():
        if (value := values.get(name)) is not None:
            check_number(f"{name} in {source}" if source else name, value, whole=whole, interval=interval)
    seed, number = values.get("seed"), values.get("num_seeds")
    if seed is not None and number is not None and seed + number > SEEDS:
        raise UsageError(
            f"seed={seed} and the num_seeds={number} after it reach beyond {SEEDS - 1}, the largest seed; lower one."
        )


def check_number(name: str, value: Any, *, whole: bool, interval: str) -> None:
    """Check that a number, or every number of a concrete array, is in an interval such as "(0, 1]", in float32.

    A number that float32 cannot tell from a bound is on it: programs compute in float32, where subnormal numbers are 0.

    Raises:
      UsageError: with one sentence.
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    if whole:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
            raise UsageError(f"{name} must be a whole number from {low:,.0f} to {high:,.0f}, got {shown(value)}.")
        return
    if _is_abstract(value):
        return
    is_scalar = isinstance(value, (int, float)) and not isinstance(value, bool)
    for extreme in (_as_float32(value),) if is_scalar else _extremes(name, value, interval):  # NaN compares as false
        above = extreme >= low if interval[0] == "[" else extreme > low
        below = extreme <= high if interval[-1] == "]" else extreme < high
        if not (above and below):
            rounded = is_scalar and value != extreme and extreme in (0, 1)
            note = f", which is {extreme:g} in float32" if rounded else ""
            raise UsageError(f"{name} must lie in {interval}, got {shown(value)}{note}.")


def _is_abstract(value: Any) -> bool:
    """Whether a value cannot be inspected: traced, only a shape, or on other hosts."""
    jax = sys.modules.get("jax")  # without it there are no such values
    if jax is None or not hasattr(value, "dtype"):
        return False
    if isinstance(value, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return True
    return isinstance(value, jax.Array) and not value.is_fully_addressable


def _as_float32(value: float) -> float:
    try:
        (single,) = struct.unpack("f", struct.pack("f", value))
    except (OverflowError, struct.error):  # the second for a whole number of more than 308 digits
        return float("inf") if value > 0 else float("-inf")
    return 0.0 if abs(single) < 2.0**-126 else single


def _extremes(name: str, value: Any, interval: str) -> tuple[float, ...]:
    """The smallest and the largest number of an array, both NaN if one is."""
    import numpy as np  # deferred: `trpo-jax --help` needs no NumPy

    try:
        if not hasattr(value, "dtype") or np.dtype(value.dtype).kind in "bcOSUmM":
            raise TypeError
        array = np.asarray(value)
        return tuple(_as_float32(float(number)) for number in (array.min(), array.max())) if array.size else ()
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a number in {interval}, got {shown(value)}.") from None


def command(name: str, path: str | os.PathLike[str], *, env: Any = None) -> str:
    """A shell command on a folder, quoted for a message; it includes `env` if that names a module to import."""
    path = os.fspath(path)
    words = ["trpo-jax", name, f"./{path}" if path.startswith("-") else path]
    return f"`{shlex.join([*words, '--trust', env] if isinstance(env, str) and ':' in env else words)}`"


def say(sentence: str) -> None:
    """Print one line on standard error; do nothing if that cannot be written to."""
    with contextlib.suppress(OSError):  # a name in it may have line breaks
        print(f"trpo-jax: {' '.join(sentence.splitlines())}", file=sys.stderr, flush=True)


def name_of(folder: Path) -> str:
    """The name of a folder as text for pages and tables; bytes that are not UTF-8 are replaced."""
    return readable(folder.resolve().name)


def readable(path: str | os.PathLike[str]) -> str:
    """A path as text that can be written; bytes that are not UTF-8 are replaced."""
    return os.fsencode(path).decode(errors="replace")


def drop_output() -> None:
    """Discard all further output, so that Python's exit does not fail on it again."""
    with contextlib.suppress(OSError, ValueError):  # it is not a real file, as when a program calls `main`
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
