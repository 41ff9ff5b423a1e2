"""Types shared by the update steps."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.steps.distributions import Distribution

P = ParamSpec("P")
R = TypeVar("R")
Array = jax.Array
PyTree = Any
Scalar = float | jax.Array
"""A float hyperparameter: a Python number, or a scalar array that may be traced."""

Matvec = Callable[[PyTree], PyTree]
"""A linear map from a pytree to a pytree of the same structure."""

DistributionFn = Callable[[PyTree], Distribution]
"""`distribution_fn(params)` -> a batched distribution."""

PolicyApply = Callable[[PyTree, Any], Distribution]
"""`policy_apply(params, observation)` -> a batched distribution."""


def typed_jit(function: Callable[P, R]) -> Callable[P, R]:
    """`jax.jit`, whose result has the types of the function; JAX itself declares that it may return anything."""
    return jax.jit(function)


def at_least_float32(x: Any) -> Array:
    """Convert to floating point of at least 32 bits: integers, booleans and half precision become float32."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else float)


def as_float(x: Any) -> Array:
    """Convert to floating point: integers and booleans become JAX's default float, floats stay as they are."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(float)


def check_scalars(**values: Any) -> None:
    """Raise `ValueError`, with one sentence, unless each value is a real number or a scalar array of one.

    A vector would be broadcast: some entries of the parameters would take a step of another length than others.
    """
    for name, value in values.items():
        if isinstance(value, (np.generic, np.ndarray, Array)):
            real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
            good, found = real and value.shape == (), f"an array of {value.dtype}, {list(value.shape)}"
        else:
            good, found = isinstance(value, (int, float)) and not isinstance(value, bool), repr(value)
        if not good:
            raise ValueError(f"{name} must be a number, got {found}")


def check_count(name: str, value: Any) -> None:
    """Raise `ValueError`, with one sentence, unless a static number is whole and at least 1."""
    try:
        good = not isinstance(value, bool) and operator.index(value) >= 1
    except TypeError:  # no whole number, or traced
        good = False
    if not good:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
