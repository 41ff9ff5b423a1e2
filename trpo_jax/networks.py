"""Default policies and value functions: separate tanh MLPs, orthogonally initialised.

The only file that imports a network library; the update steps take any `apply(params, observation)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.environments.base import Box, Discrete, Environment
from trpo_jax.steps.distributions import Categorical, DiagonalGaussian, MultiCategorical
from trpo_jax.steps.types import Array, PyTree, Scalar
from trpo_jax.types import Network

_FEW_COLUMNS = 4
_UNBOUNDED = 1e6  # bounds beyond this (±3.4e38 is common) say nothing about the scale of an action


@functools.cache
def orthogonal(scale: float) -> Callable[..., Array]:
    """Initialiser of matrices [rows, columns] with orthonormal rows or columns (whichever fit) times `scale`.

    The polar factor of a Gaussian matrix, uniform over such matrices, by Newton–Schulz: X ← X (3 I − XᵀX) / 2. The
    usual way, a QR decomposition by LAPACK, can deadlock XLA's CPU thread pool when several run at once, as they do
    for many agents in one program.
    """

    # Linen asks for its shape at every `apply`; so it is traced but once.
    @functools.partial(jax.jit, static_argnums=(1, 2))
    def initialise(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        rows, columns = shape
        x = jax.random.normal(key, (max(shape), min(shape)), dtype)
        x = x / jnp.linalg.norm(x)  # singular values in (0, 1], where the iteration converges
        identity = jnp.eye(min(shape), dtype=dtype)

        def improve(_: int, x: Array) -> Array:
            gram = jnp.matmul(x.T, x, precision="highest")
            return jnp.matmul(x, 1.5 * identity - 0.5 * gram, precision="highest")

        # A singular value grows by 3/2 a step until it is near 1: 40 steps bring it there from 10⁻⁶.
        x = jax.lax.fori_loop(0, 40, improve, x)
        return scale * (x if rows >= columns else x.T)

    return initialise


def _product_by_columns(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """x @ kernel, column by column where there are few and the backend is CPU.

    The gradient of a kernel of two columns is three times faster as two products with a vector; XLA's CPU backend has
    a matrix product for it that is made for larger ones.
    """
    columns = kernel.shape[-1]
    if columns > _FEW_COLUMNS or jax.default_backend() != "cpu":
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    contract = (((0,), (x.ndim - 1,)), ((), ()))
    return jnp.stack([jax.lax.dot_general(kernel[:, i], x, contract, **options) for i in range(columns)], axis=-1)


class MLP(nn.Module):
    """Dense tanh layers over flattened observations.

    Attributes:
      hidden: widths of the hidden layers.
      outputs: width of the last, linear layer.
      last_scale: gain of the last layer's orthogonal initialisation.
      observation_ndim: rank of one observation, whose axes are flattened.
    """

    hidden: Sequence[int]
    outputs: int
    last_scale: float
    observation_ndim: int

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """[..., *observation_shape] -> [..., outputs]."""
        batch_shape = observation.shape[: observation.ndim - self.observation_ndim]
        x = observation.reshape(*batch_shape, -1)
        for width in self.hidden:
            x = nn.tanh(nn.Dense(width, kernel_init=orthogonal(2**0.5))(x))
        return nn.Dense(self.outputs, kernel_init=orthogonal(self.last_scale), dot_general=_product_by_columns)(x)


def make_policy(
    environment: Environment, *, hidden: Sequence[int] = (64, 64), initial_log_std: Scalar = 0.0
) -> Network:
    """The default policy for an action space: `Categorical`, `MultiCategorical` or `DiagonalGaussian`.

    The last layer is scaled by 0.01, so that the first policy is nearly uniform (discrete) or centred (Box). A
    Gaussian has a state-independent log σ; mean and σ are in units of half the action range around its centre, so
    one default suits a box of ±0.1 and one of ±2.
    """
    space, ndim = environment.action_space, len(environment.observation_shape)
    if isinstance(space, Box):
        return _gaussian_policy(space, hidden, ndim, initial_log_std)
    sizes = (space.n,) if isinstance(space, Discrete) else space.n
    mlp = MLP(tuple(hidden), sum(sizes), 0.01, ndim)

    def apply(params: PyTree, observation: Array) -> Categorical | MultiCategorical:
        logits = mlp.apply(params, observation)
        if isinstance(space, Discrete):
            return Categorical(logits)
        return MultiCategorical(tuple(jnp.split(logits, np.cumsum(sizes)[:-1], axis=-1)))

    return Network(mlp.init, apply)


def make_value(environment: Environment, *, hidden: Sequence[int] = (64, 64)) -> Network:
    """The default value function, V(observation) of shape [...]."""
    mlp = MLP(tuple(hidden), 1, 1.0, len(environment.observation_shape))
    return Network(mlp.init, lambda params, observation: mlp.apply(params, observation)[..., 0])


def _gaussian_policy(space: Box, hidden: Sequence[int], ndim: int, initial_log_std: Scalar) -> Network:
    bounded = (np.abs(space.low) < _UNBOUNDED) & (np.abs(space.high) < _UNBOUNDED) & (space.high > space.low)
    low, high = np.where(bounded, space.low, -1), np.where(bounded, space.high, 1)
    centre, half_range = ((high + low) / 2).astype(np.float32), ((high - low) / 2).astype(np.float32)
    mlp = MLP(tuple(hidden), space.low.size, 0.01, ndim)

    def init(key: Array, observation: Array) -> PyTree:
        log_std = jnp.full(space.shape, initial_log_std, jnp.float32)
        return {"mean": mlp.init(key, observation), "log_std": log_std}

    def apply(params: PyTree, observation: Array) -> DiagonalGaussian:
        mean = centre + half_range * mlp.apply(params["mean"], observation)
        return DiagonalGaussian(mean, params["log_std"] + np.log(half_range))

    return Network(init, apply)
