"""Names for the types that the update steps share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

Array = jax.Array
PyTree = Any
Scalar = float | jax.Array
"""A float hyperparameter: a Python number, or a scalar array that may be traced."""

Matvec = Callable[[PyTree], PyTree]
"""A linear map from a pytree to a pytree of the same structure."""

DistributionFn = Callable[[PyTree], Any]
"""`distribution_fn(params)` -> a batched distribution."""

PolicyApply = Callable[[PyTree, Any], Any]
"""`policy_apply(params, observation)` -> a batched distribution."""
