"""Vector algebra on pytrees of arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trpo_jax.steps.types import Array, PyTree


def dot(a: PyTree, b: PyTree) -> Array:
    """⟨a, b⟩ over all leaves, at the highest matmul precision."""
    products = jax.tree.map(lambda x, y: jnp.vdot(x, y, precision=jax.lax.Precision.HIGHEST), a, b)
    return jax.tree.reduce(jnp.add, products)


def norm(tree: PyTree) -> Array:
    """‖tree‖₂, scaled by the largest entry first so that squares neither under- nor overflow."""
    largest = max_abs(tree)
    safe = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    unit = jax.tree.map(lambda leaf: leaf / safe, tree)
    return jnp.where(largest > 0, safe * jnp.sqrt(dot(unit, unit)), largest)


def max_abs(tree: PyTree) -> Array:
    """The largest absolute entry of all leaves; NaN if there is one."""
    return jax.tree.reduce(jnp.maximum, jax.tree.map(lambda leaf: jnp.max(jnp.abs(leaf)), tree))


def add_scaled(a: PyTree, factor: Array, b: PyTree) -> PyTree:
    """a + factor · b, each leaf in the dtype of a."""
    return jax.tree.map(lambda x, y: x + (factor * y).astype(x.dtype), a, b)


def select(condition: Array, a: PyTree, b: PyTree) -> PyTree:
    """a where the scalar condition holds, else b, bit for bit (also if the other one is NaN)."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def all_finite(tree: PyTree) -> Array:
    """Whether every entry of every floating-point leaf is finite."""
    return jax.tree.reduce(
        jnp.logical_and, jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree), jnp.bool_(True)
    )
