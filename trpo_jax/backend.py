"""All decisions that differ by backend, each a named predicate.

Programs compute the same on every backend; these decide their form. Each is evaluated while a program is traced, so a
test that replaces `platform` traces the other form of all of them, on the machine at hand.
"""

from __future__ import annotations

import os

import jax


def platform() -> str:
    """Name of the backend that programs run on: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def branches_are_cheap() -> bool:
    """Whether a branch costs less than the work it saves; an accelerator waits longer for its condition."""
    return platform() == "cpu"


def agents_take_turns() -> bool:
    """Whether agents under `vmap` are trained one after the other, each within the cache and with its own branches.

    On CPU this makes the update nearly twice as fast. An accelerator advances all of them in lockstep.
    """
    return platform() == "cpu"


def scans_are_sequential() -> bool:
    """Whether T short steps beat one associative scan of depth log T."""
    return platform() == "cpu"


def blocks_stay_in_cache() -> bool:
    """Whether a large batch is processed in blocks that fit a processor's cache."""
    return platform() == "cpu"


def columns_one_by_one() -> bool:
    """Whether a matrix product with few columns is one product with a vector per column."""
    return platform() == "cpu"


def sums_in_groups() -> bool:
    """Whether the sum over a large batch is computed in groups, which occupies more processors of a GPU."""
    return platform() == "gpu"


def launches_are_costly() -> bool:
    """Whether to start a small kernel takes longer than its work, so that fewer and wider ones save time."""
    return platform() == "gpu"


def all_convolutions_by_patches() -> bool:
    """Whether convolutions with large kernels, too, are matrix products with patches."""
    return platform() == "cpu"


def most_agents() -> int:
    """The largest number of agents per device in one program; on a CPU more of them would only delay results."""
    return 256 if platform() == "cpu" else 8192
