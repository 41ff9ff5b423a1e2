"""Shared by all tests."""

import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """Environment for child processes that share compiled programs, so that a rerun does not compile again."""
    folder = tmp_path_factory.mktemp("compilation_cache")
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture
def python(compilation_cache):
    """Run Python arguments in a child that is killed after a time limit; a variable that is None in `env` is unset."""

    def run(*arguments, timeout=120, env=None, **options):
        command = [sys.executable, *arguments]
        environment = {name: value for name, value in {**compilation_cache, **(env or {})}.items() if value is not None}
        return subprocess.run(command, timeout=timeout, capture_output=True, text=True, env=environment, **options)

    return run
