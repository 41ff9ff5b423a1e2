"""How far to go along a step: the largest αʲ that improves the surrogate inside the trust region.

Two searches with one signature and one answer. The sequential one stops at the first candidate that passes; the
parallel one evaluates all of them in one batched pass, which suits accelerators and many agents in one program,
where a loop runs until its slowest member is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax.steps import trees
from trpo_jax.steps.types import Array, PyTree, Scalar

Evaluate = Callable[[PyTree], tuple[Any, ...]]
"""`evaluate(params)` -> (surrogate gain over the start, mean KL from the start, *anything else worth keeping)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LineSearchInfo:
    """How a line search ended. Everything is 0 where no candidate was accepted.

    Attributes:
      accepted: whether a candidate passed, bool.
      step_fraction: αʲ of the accepted candidate.
      surrogate_gain: its surrogate gain, > 0.
      mean_kl: its mean KL divergence, ≤ max_kl.
      num_rejected: candidates that failed before it, int32.
      extra: a tuple of whatever else `evaluate` returned for it.
    """

    accepted: Array
    step_fraction: Array
    surrogate_gain: Array
    mean_kl: Array
    num_rejected: Array
    extra: tuple[Any, ...]


def backtracking_line_search(
    evaluate: Evaluate, params: PyTree, step: PyTree, *, max_kl: Scalar, shrink: Scalar = 0.8, max_steps: int = 10
) -> tuple[PyTree, LineSearchInfo]:
    """Try params + shrinkʲ · step for j = 0, 1, … and keep the first candidate that passes.

    A candidate passes if its parameters, gain and KL are finite, gain > 0 and mean KL ≤ max_kl. If none of
    `max_steps` candidates passes, `params` comes back bit-identical and `info.accepted` is False.

    Args:
      evaluate: `evaluate(params)` -> (surrogate gain, mean KL(old ‖ new), *extra).
      params: θ_old, a pytree.
      step: the full step, a pytree like params.
      max_kl: δ > 0, the bound on the mean KL.
      shrink: α in (0, 1).
      max_steps: number of candidates, ≥ 1 (static).

    Returns:
      The new parameters and a `LineSearchInfo`.

    Source: Schulman et al. 2015, Appendix C.
    """
    fractions = _fractions(step, shrink, max_steps)

    def keep_searching(carry: tuple) -> Array:
        j, passed, _ = carry
        return (j < max_steps) & ~passed

    def try_next(carry: tuple) -> tuple:
        j, _, _ = carry
        candidate = trees.add_scaled(params, fractions[j], step)
        evaluation = evaluate(candidate)
        return j + 1, _passes(candidate, evaluation, max_kl), evaluation

    blank = _zeros(jax.eval_shape(evaluate, params))
    tried, accepted, evaluation = jax.lax.while_loop(keep_searching, try_next, (jnp.int32(0), jnp.bool_(False), blank))
    return _conclude(params, step, fractions, tried - 1, accepted, evaluation)


def parallel_line_search(
    evaluate: Evaluate, params: PyTree, step: PyTree, *, max_kl: Scalar, shrink: Scalar = 0.8, max_steps: int = 10
) -> tuple[PyTree, LineSearchInfo]:
    """`backtracking_line_search` with all candidates evaluated in one batched pass. Same arguments, same answer."""
    fractions = _fractions(step, shrink, max_steps)
    candidates = jax.vmap(lambda fraction: trees.add_scaled(params, fraction, step))(fractions)
    evaluations = jax.vmap(evaluate)(candidates)
    passed = jax.vmap(lambda c, e: _passes(c, e, max_kl))(candidates, evaluations)
    accepted = jnp.any(passed)
    first = jnp.where(accepted, jnp.argmax(passed), max_steps - 1).astype(jnp.int32)
    evaluation = jax.tree.map(lambda leaf: leaf[first], evaluations)
    return _conclude(params, step, fractions, first, accepted, evaluation)


def _fractions(step: PyTree, shrink: Scalar, max_steps: int) -> Array:
    """(1, α, α², …), [max_steps]. One formula for both searches, so that they try the same candidates."""
    dtype = jnp.result_type(*jax.tree.leaves(step))
    return jnp.asarray(shrink, dtype) ** jnp.arange(max_steps, dtype=dtype)


def _passes(candidate: PyTree, evaluation: tuple[Any, ...], max_kl: Scalar) -> Array:
    gain, kl = evaluation[:2]
    return trees.all_finite((candidate, gain, kl)) & (gain > 0) & (kl <= max_kl)


def _conclude(
    params: PyTree, step: PyTree, fractions: Array, index: Array, accepted: Array, evaluation: tuple[Any, ...]
) -> tuple[PyTree, LineSearchInfo]:
    # Selected, not scaled by 0: 0 · NaN is NaN.
    candidate = trees.add_scaled(params, fractions[index], step)
    new_params = trees.select(accepted, candidate, params)
    gain, kl, *extra = jax.tree.map(lambda leaf: jnp.where(accepted, leaf, 0), evaluation)
    info = LineSearchInfo(
        accepted=accepted,
        step_fraction=jnp.where(accepted, fractions[index], 0),
        surrogate_gain=gain,
        mean_kl=kl,
        num_rejected=index + ~accepted,
        extra=tuple(extra),
    )
    return new_params, info


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
