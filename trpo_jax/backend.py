"""Every decision that differs by backend, each a named predicate.

Programs compute the same on any backend; these say in which form. Each is asked while a program is traced, so a test
that puts another `platform` in place traces the other side of all of them, on the machine at hand.
"""

from __future__ import annotations

import jax


def platform() -> str:
    """Name of the backend that programs run on: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def branches_are_cheap() -> bool:
    """Whether a branch costs less than the work it saves; an accelerator waits longer for its condition."""
    return platform() == "cpu"


def agents_take_turns() -> bool:
    """Whether agents under `vmap` are trained one after the other, each within the cache, with branches of its own.

    On CPU this makes the update nearly twice as fast. An accelerator advances all of them in lockstep.
    """
    return platform() == "cpu"


def scans_are_sequential() -> bool:
    """Whether T short steps beat one associative scan of depth log T."""
    return platform() == "cpu"


def candidates_take_turns() -> bool:
    """Whether a line search tries its candidates until one passes, and not all of them in one batch."""
    return platform() == "cpu"


def blocks_stay_in_cache() -> bool:
    """Whether a large batch is worked through in blocks that fit a processor's cache."""
    return platform() == "cpu"


def columns_one_by_one() -> bool:
    """Whether a matrix product of few columns is a product with a vector for each."""
    return platform() == "cpu"


def sums_in_groups() -> bool:
    """Whether the sum over a large batch is of groups: a GPU has as many processors as there are entries to sum."""
    return platform() == "gpu"


def all_convolutions_by_patches() -> bool:
    """Whether convolutions with large kernels too are matrix products with the patches that they see."""
    return platform() == "cpu"


def most_agents() -> int:
    """Agents that a device takes in one program at most; on a CPU more of them only mean rarer results."""
    return 256 if platform() == "cpu" else 8192
