"""Vector algebra on pytrees."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trpo_jax.steps import trees

LARGE = np.ones((300, 7), np.float32)


def with_one(value: float) -> np.ndarray:
    """A large array in which one entry has this value."""
    changed = LARGE.copy()
    changed[123, 4] = value
    return changed


@pytest.mark.parametrize(
    ("tree", "finite"),
    [
        ({"a": LARGE, "b": np.float32(0)}, True),
        ({"a": with_one(np.finfo(np.float32).max), "b": with_one(-np.finfo(np.float32).max)}, True),
        ({"a": LARGE, "b": with_one(np.nan)}, False),
        ({"a": LARGE, "b": with_one(np.inf)}, False),
        ({"a": LARGE, "b": with_one(-np.inf)}, False),
        ({"a": LARGE, "b": with_one(np.nan).astype(np.float16)}, False),
        ([np.arange(3), np.array(True), np.uint8(255)], True),
        ([np.iinfo(np.int32).min, LARGE], True),
        ([np.zeros((0, 3), np.float32)], True),
        ([1.0, float("nan")], False),
        ((), True),
    ],
)
def test_all_finite_looks_at_every_float_of_every_leaf(tree: Any, finite: bool) -> None:
    assert bool(trees.all_finite(tree)) is finite
    assert bool(jax.jit(trees.all_finite)(jax.tree.map(jnp.asarray, tree))) is finite


def test_all_finite_is_told_apart_by_lane() -> None:
    lanes = jnp.stack([LARGE, with_one(np.nan), LARGE, with_one(np.inf)])
    assert jax.vmap(trees.all_finite)(lanes).tolist() == [True, False, True, False]


@pytest.mark.parametrize("size", [10, 8_000, 50_000])
def test_no_length_hides_nan_from_a_maximum(size: int) -> None:
    x = jnp.ones(size).at[size // 3].set(jnp.nan)
    assert jax.jit(trees.maximum)(x) == jax.jit(trees.max_abs)({"a": x, "b": 2 * jnp.ones(3)}) == jnp.inf
    assert jax.jit(trees.maximum)(-jnp.arange(size, dtype=jnp.float32)) == 0
