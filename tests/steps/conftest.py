from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import jax
import pytest

# The same examples on every run, and no example database left in the working directory.
hypothesis.settings.register_profile("steps", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("steps")


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for the duration of one test."""
    with jax.enable_x64(True):
        yield
