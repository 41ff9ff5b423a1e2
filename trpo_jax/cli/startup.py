"""Settings before a command starts JAX: the cache of compiled programs, and the devices of a CPU."""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from pathlib import Path

from trpo_jax.files import read_json
from trpo_jax.sentences import UsageError, check_limits


def start_quickly() -> None:
    """Let JAX keep compiled programs in the user's cache folder, unless another cache, or none, is set."""
    import gc
    import hashlib

    import jax

    gc.set_threshold(100_000)  # tracing allocates much and leaves little garbage: this saves a tenth of the start
    settings = jax.config.values
    for name, why in (("jax_enable_x64", "uses float32"), ("jax_disable_jit", "is compiled")):
        if settings[name]:
            raise UsageError(f"{name.upper()} is set, but every program here {why}; unset it.")
    if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
        return
    # A program for one processor may contain instructions that another one lacks; homes are shared between machines.
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    folder = f"{jax.__version__}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trpo_jax" / folder
        cache.mkdir(parents=True, exist_ok=True)
        (cache / f".{os.getpid()}").touch()
        (cache / f".{os.getpid()}").unlink()
    except (OSError, RuntimeError):  # no home, or none that is writable: every start then compiles again
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # it compiles again then


def use_devices(number: int) -> None:
    """On a CPU, make so many devices of it, unless `XLA_FLAGS` says how many."""
    if number > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        import jax

        with contextlib.suppress(RuntimeError):  # a program that calls `main` may have started JAX already
            jax.config.update("jax_num_cpu_devices", number)


def use_every_core(file: Path, num_devices: int | None) -> None:
    """On a CPU, make each core a device; an existing sweep continues with the number of threads in its file."""
    from trpo_jax.backend import num_cores

    cores = num_cores()
    threads = None
    with contextlib.suppress(OSError, KeyError, TypeError, UsageError):  # new, or damaged and reported elsewhere
        threads = read_json(file, "")["made_by"]["threads"]
        check_limits({"threads": threads})
    if type(threads) is int:
        os.environ.setdefault("NPROC", str(threads))
        cores = min(cores, threads)
    use_devices(num_devices or cores)
