"""A guard against a deadlock of XLA's CPU thread pool on machines with two cores."""

from __future__ import annotations

import os
import sys
import warnings

_SAFE_WIDTH = "4"


def widen_small_thread_pool() -> None:
    """On a machine with two usable cores, give XLA's CPU client a pool of four threads.

    With a pool of two, programs that run many agents at once can wait for ever at 0 % CPU (seen with jaxlib 0.10.2).
    XLA reads the width from `NPROC` when the CPU client starts, so it must be set before the first computation; a
    value that the user has set is left alone.
    """
    if "NPROC" in os.environ or _usable_cores() != 2:
        return
    if _backend_is_running():
        warnings.warn(
            "JAX started before trpo_jax was imported, on a machine with two cores, where XLA can deadlock on programs "
            "of many agents; import trpo_jax first, or set NPROC=4 in the environment.",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    os.environ["NPROC"] = _SAFE_WIDTH


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _backend_is_running() -> bool:
    bridge = sys.modules.get("jax._src.xla_bridge")
    is_running = getattr(bridge, "backends_are_initialized", None)
    return bool(is_running and is_running())
