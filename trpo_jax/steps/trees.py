"""Vector algebra on pytrees of arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.steps.types import Array, PyTree, at_least_float32


def check_parameters(params: PyTree, name: str = "params") -> None:
    """Raise `ValueError`, with one sentence, unless every leaf is a trainable array of floats."""
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_running_average)
    for path, leaf in found:
        where, mend = name + jax.tree_util.keystr(path), "keep it out of the parameters and close over it in apply"
        if _is_running_average(leaf) or any(getattr(key, "key", None) == "batch_stats" for key in path):
            raise ValueError(f"{where} is a running average, which a gradient must not train; {mend}.")
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise ValueError(f"{where} is a {type(leaf).__name__}, not an array of floats; {mend}.")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{where} is an array of {leaf.dtype}, which has no gradient; {mend}.")
    if not found:
        raise ValueError(f"{name} has no array in it, so there is nothing to train.")


def check_like(tree: PyTree, params: PyTree, name: str) -> None:
    """Raise `ValueError`, with one sentence, unless the tree has the structure and the shapes of the parameters."""

    def form(tree: PyTree) -> tuple[Any, ...]:
        return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]

    if form(tree) != form(params):
        raise ValueError(f"{name} must be a pytree like params: the same structure, with arrays of the same shapes.")


def _is_running_average(leaf: Any) -> bool:
    """Whether this is a running average of a normalisation layer in flax.nnx."""
    return type(leaf).__name__ == "BatchStat"


def check_batched(outputs: PyTree, batch_shape: tuple[int, ...]) -> None:
    """Raise `ValueError`, with one sentence, unless every array of a network's outputs begins with the batch shape.

    A parameter that all samples share would count as one sample in the mean over the batch.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
        if leaf.shape[: len(batch_shape)] != batch_shape:
            raise ValueError(
                f"outputs of a network must begin with the shape of the batch, {batch_shape}, but "
                f"{jax.tree_util.keystr(path) or 'one'} has the shape {leaf.shape}; broadcast what all samples share."
            )


def widened(tree: PyTree) -> PyTree:
    """Convert the leaves of half precision in a pytree, such as a distribution, to float32."""
    return jax.tree.map(lambda leaf: at_least_float32(leaf) if _is_float(leaf) else leaf, tree)


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def dot(a: PyTree, b: PyTree) -> Array:
    """⟨a, b⟩ over all leaves, at the highest matmul precision."""
    products = jax.tree.map(lambda x, y: jnp.vdot(x, y, precision=jax.lax.Precision.HIGHEST), a, b)
    return jax.tree.reduce(jnp.add, products)


def norm(tree: PyTree) -> Array:
    """‖tree‖₂, scaled by the largest entry first so that squares neither under- nor overflow."""
    largest = max_abs(tree)
    safe = jnp.where((largest > 0) & jnp.isfinite(largest), divisor(largest), 1)
    unit = jax.tree.map(lambda leaf: leaf / safe, tree)
    return jnp.where(largest > 0, safe * jnp.sqrt(dot(unit, unit)), largest)


def divisor(x: Array) -> Array:
    """x > 0, reduced where necessary so that its reciprocal, by which XLA multiplies, does not become 0."""
    return jnp.minimum(x, jnp.asarray(2.0 ** (jnp.finfo(x.dtype).maxexp - 2), x.dtype))


def maximum(x: Array, **options: Any) -> Array:
    """The largest entry of a float array; ∞ if any is NaN.

    XLA on CPU (jax 0.10) passes over NaN in the `jnp.max` of some thousand entries.
    """
    return jnp.max(jnp.where(jnp.isnan(x), jnp.inf, x), **options)


def max_abs(tree: PyTree) -> Array:
    """The largest absolute entry of all leaves; ∞ if any is NaN."""
    return jax.tree.reduce(jnp.maximum, jax.tree.map(lambda leaf: maximum(jnp.abs(leaf), initial=0), tree))


def add_scaled(a: PyTree, factor: Array, b: PyTree) -> PyTree:
    """a + factor · b, each leaf in the dtype of a."""
    return jax.tree.map(lambda x, y: x + (factor * y).astype(x.dtype), a, b)


def select(condition: Array, a: PyTree, b: PyTree) -> PyTree:
    """a where the scalar condition holds, else b, bit for bit (even if the other one is NaN)."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def finite(x: Array, nan: Any = 0.0) -> Array:
    """Make a float finite for reports: ± the largest float for ±∞, `nan` for NaN."""
    return jnp.nan_to_num(x, nan=nan)


def all_finite(tree: PyTree) -> Array:
    """Whether every entry of every floating-point leaf is finite."""
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    return jnp.isfinite(max_abs([jnp.float32(0), *(leaf for leaf in leaves if _is_float(leaf))]))
