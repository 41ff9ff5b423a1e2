"""Line searches: the largest αʲ with which a step improves the surrogate inside the trust region.

Two searches with one signature and one result. The sequential one stops at the first candidate that passes; under
`vmap` it runs until the slowest agent is done. The parallel one evaluates all candidates in one batched pass: no loop,
but as many forward passes as candidates, side by side in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax.steps import defaults, trees
from trpo_jax.steps.types import Array, PyTree, Scalar, as_float, at_least_float32, check_count, check_scalars

Evaluate = Callable[[PyTree], tuple[Any, ...]]
"""`evaluate(params)` -> (gain over the start, divergence from the start, *any other values to keep)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LineSearchInfo:
    """Result of a line search. If no candidate was accepted, every field except `num_rejected` is 0.

    Attributes:
      accepted: whether a candidate passed, bool.
      step_fraction: αʲ of the accepted candidate.
      surrogate_gain: its surrogate gain, > 0.
      divergence: its divergence from the start, ≤ max_kl: the mean KL, or another one that `evaluate` measures.
      num_rejected: candidates that failed before it, int32.
      extra: a tuple of the other values that `evaluate` returned for it.
    """

    accepted: Array
    step_fraction: Array
    surrogate_gain: Array
    divergence: Array
    num_rejected: Array
    extra: tuple[Any, ...]


def backtracking_line_search(
    evaluate: Evaluate,
    params: PyTree,
    step: PyTree,
    *,
    max_kl: Scalar,
    shrink: Scalar = defaults.LINE_SEARCH_SHRINK,
    max_steps: int = defaults.LINE_SEARCH_STEPS,
) -> tuple[PyTree, LineSearchInfo]:
    """Try params + shrinkʲ · step for j = 0, 1, … and keep the first candidate that passes.

    A candidate passes if its parameters, gain and divergence are finite, gain > 0 and divergence ≤ max_kl. If none of
    `max_steps` candidates passes, `params` are returned bit for bit and `info.accepted` is False.

    Args:
      evaluate: `evaluate(params)` -> (surrogate gain, divergence, *extra), usually with the mean KL(old ‖ new).
      params: θ_old, a pytree.
      step: the full step, a pytree like params.
      max_kl: δ > 0, the bound on the divergence.
      shrink: α in (0, 1).
      max_steps: number of candidates, ≥ 1 (static).

    Returns:
      The new parameters and a `LineSearchInfo`.

    Raises:
      ValueError: if `max_steps` is not a whole number ≥ 1, `max_kl` or `shrink` not a number, or `step` not
        like `params`.

    Source: Schulman et al. 2015, Appendix C.
    """
    fractions = _fractions(params, step, max_kl, shrink, max_steps)

    def keep_searching(carry: tuple[Any, ...]) -> Array:
        j, passed, _ = carry
        return (j < max_steps) & ~passed

    def try_next(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        j, _, _ = carry
        candidate = trees.add_scaled(params, fractions[j], step)
        evaluation = evaluate(candidate)
        return j + 1, _passes(candidate, evaluation, max_kl), evaluation

    blank = _zeros(jax.eval_shape(evaluate, params))
    tried, accepted, evaluation = jax.lax.while_loop(keep_searching, try_next, (jnp.int32(0), jnp.bool_(False), blank))
    return _conclude(params, step, fractions, tried - 1, accepted, evaluation)


def parallel_line_search(
    evaluate: Evaluate,
    params: PyTree,
    step: PyTree,
    *,
    max_kl: Scalar,
    shrink: Scalar = defaults.LINE_SEARCH_SHRINK,
    max_steps: int = defaults.LINE_SEARCH_STEPS,
) -> tuple[PyTree, LineSearchInfo]:
    """Like `backtracking_line_search`, with all candidates evaluated in one batched pass; the result is the same."""
    fractions = _fractions(params, step, max_kl, shrink, max_steps)
    candidates = jax.vmap(lambda fraction: trees.add_scaled(params, fraction, step))(fractions)
    evaluations = jax.vmap(evaluate)(candidates)
    passed = jax.vmap(lambda c, e: _passes(c, e, max_kl))(candidates, evaluations)
    accepted = jnp.any(passed)
    first = jnp.where(accepted, jnp.argmax(passed), max_steps - 1).astype(jnp.int32)
    evaluation = jax.tree.map(lambda leaf: leaf[first], evaluations)
    return _conclude(params, step, fractions, first, accepted, evaluation)


def full_step(
    evaluate: Evaluate,
    params: PyTree,
    step: PyTree,
    *,
    max_kl: Scalar,
    shrink: Scalar = defaults.LINE_SEARCH_SHRINK,
    max_steps: int = defaults.LINE_SEARCH_STEPS,
) -> tuple[PyTree, LineSearchInfo]:
    """Take the full step without a search, whatever its gain and divergence, if all numbers are finite.

    With it `trpo_update` is the natural gradient method. Arguments and result as in `backtracking_line_search`;
    max_kl, shrink and max_steps are ignored.

    Source: Kakade 2001.
    """
    del max_kl, shrink, max_steps
    trees.check_like(step, params, "step")
    candidate = trees.add_scaled(params, jnp.ones(()), step)
    evaluation = evaluate(candidate)
    accepted = trees.all_finite((candidate, evaluation[:2]))
    return _conclude(params, step, jnp.ones(1), jnp.int32(0), accepted, evaluation)


def _fractions(params: PyTree, step: PyTree, max_kl: Scalar, shrink: Scalar, max_steps: int) -> Array:
    """(1, α, α², …), [max_steps]. One formula for both searches, so that they try the same candidates."""
    check_count("max_steps of a line search", max_steps)
    check_scalars(max_kl=max_kl, shrink=shrink)
    trees.check_like(step, params, "step")
    dtype = jnp.result_type(*map(as_float, jax.tree.leaves(step)))
    return jnp.asarray(shrink, dtype) ** jnp.arange(max_steps, dtype=dtype)


def _passes(candidate: PyTree, evaluation: tuple[Any, ...], max_kl: Scalar) -> Array:
    gain, divergence = evaluation[:2]
    within = at_least_float32(divergence) <= at_least_float32(max_kl)  # in half precision δ itself would be rounded
    return trees.all_finite((candidate, gain, divergence)) & (gain > 0) & within


def _conclude(
    params: PyTree, step: PyTree, fractions: Array, index: Array, accepted: Array, evaluation: tuple[Any, ...]
) -> tuple[PyTree, LineSearchInfo]:
    accepted &= trees.max_abs(step) > 0  # the gain of a step of 0 is rounding error
    # Selected, not scaled by 0: 0 · NaN is NaN.
    candidate = trees.add_scaled(params, fractions[index], step)
    new_params = trees.select(accepted, candidate, params)
    gain, divergence, *extra = jax.tree.map(lambda leaf: jnp.where(accepted, leaf, 0), evaluation)
    info = LineSearchInfo(
        accepted=accepted,
        step_fraction=jnp.where(accepted, fractions[index], 0),
        surrogate_gain=gain,
        divergence=divergence,
        num_rejected=index + ~accepted,
        extra=tuple(extra),
    )
    return new_params, info


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
