"""What the text of a flag stands for: a value, or a sentence that says what is wrong with it."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any, NoReturn

from trpo_jax.env_args import PREFIX


def whole(text: str) -> int:
    """A whole number; 1e5 and 100_000 count as one."""
    for read in (int, float):  # whole numbers beyond 2^53 are exact, too
        try:
            value = read(text)
        except ValueError:
            continue
        if isinstance(value, int) or value.is_integer():
            return int(value)
    raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a whole number")


def whole_numbers(text: str) -> list[int]:
    """Whole numbers, such as 1,8,64."""
    return [whole(part) for part in text.split(",")]


def env_arg(text: str) -> tuple[str, Any]:
    """Name and value of an environment's setting: a number, true or false, or a word."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not NAME=VALUE, such as gravity=20")
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return f"{PREFIX}{name}", read(value)
    return f"{PREFIX}{name}", {"true": True, "false": False}.get(value.lower(), value)


def moved(_: str) -> NoReturn:
    """Refuse a flag of an earlier version."""
    raise argparse.ArgumentTypeError("other libraries are compared by `python experiments/throughput/run.py` instead")
