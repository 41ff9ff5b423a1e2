from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    """Exact mathematics is tested in double precision."""
    with jax.enable_x64(True):
        yield
