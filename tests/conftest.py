"""Shared by all tests."""

import gc
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jaxlib
import pytest

_CACHE = "JAX_COMPILATION_CACHE_DIR"
_finished = itertools.count(1)
_OLD_JAXLIB = jaxlib.version.__version_info__ < (0, 11)


def pytest_configure(config):
    # Tracing makes many objects that stay; by default the garbage collector visits them too often.
    gc.set_threshold(100_000, 50, 100)
    # XLA's older code generator for CPUs compiles in half the time, and cutting a program into parts that compile side
    # by side costs a fifth where there are no idle cores. Tests of bits as users get them start children whose flags
    # are their own.
    if "XLA_FLAGS" not in os.environ:
        flags = ["--xla_cpu_parallel_codegen_split_count=1"]
        if _OLD_JAXLIB:  # later ones have no other generator, and abort at the flag
            flags.append("--xla_cpu_use_fusion_emitters=false")
        os.environ["XLA_FLAGS"] = " ".join(flags)
    # Most programs of the tests run once, for milliseconds, and need no note of where each operation was called from.
    # JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests the programs as users compile them, in two thirds more time.
    for option, value in {"jax_disable_most_optimizations": True, "jax_traceback_in_locations_limit": 0}.items():
        if option.upper() not in os.environ:
            os.environ[option.upper()] = str(int(value))
            jax.config.update(option, value)
    # Workers and child processes share what they compile; an empty folder a session, so that every run starts cold.
    # Not with jaxlib 0.11: a process that has compiled many hundreds of programs aborts where it serialises one more.
    if _CACHE not in os.environ and _OLD_JAXLIB:
        os.environ[_CACHE] = config.made_cache = tempfile.mkdtemp(prefix="trpo_jax_tests_")
        # To keep programs that compile sooner costs more than it saves.
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


def pytest_unconfigure(config):
    if hasattr(config, "made_cache"):
        shutil.rmtree(config.made_cache, ignore_errors=True)


def pytest_runtest_teardown():
    """Let compiled programs go before they fill the memory maps that Linux allows a process; a look takes 10 ms."""
    if next(_finished) % 8 == 0 and sys.platform == "linux":
        used, allowed = (Path(f"/proc/{name}") for name in ("self/maps", "sys/vm/max_map_count"))
        if used.read_bytes().count(b"\n") > int(allowed.read_text()) / 4:
            jax.clear_caches()
            gc.collect()


@pytest.fixture
def full_compiles(monkeypatch):
    """Compile as users do, here and in child processes; for tests that train for long."""
    usual = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", usual)


@pytest.fixture
def accelerator(monkeypatch):
    """Trace programs in the form that an accelerator gets, and run them here."""
    jax.clear_caches()  # what was traced before has the other form
    monkeypatch.setattr("trpo_jax.backend.platform", lambda: "gpu")
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def python():
    """Run Python arguments in a child that is killed after a time limit; a variable that is None in `env` is unset."""

    def run(*arguments, timeout=120, env=None, **options):
        command = [sys.executable, *arguments]
        environment = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
        return subprocess.run(command, timeout=timeout, capture_output=True, text=True, env=environment, **options)

    return run


@pytest.fixture(scope="session")
def browser():
    """A browser to open pages with."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:  # no Python package installs it
        pytest.skip("no Chromium on this machine to open a page with")
    return found
