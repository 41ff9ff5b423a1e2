"""Default policies and value functions, orthogonally initialised: tanh MLPs, CNNs for grids, GRUs with a memory.

The only file that imports a network library; the update steps take any `apply(params, observation)`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax import backend
from trpo_jax.config import UsageError
from trpo_jax.environments.base import Box, Discrete, Environment
from trpo_jax.steps.distributions import Categorical, DiagonalGaussian, MultiCategorical
from trpo_jax.steps.types import Array, PyTree, Scalar
from trpo_jax.types import Network

_FEW_COLUMNS = 4
_SMALL_KERNEL = 9  # entries of a filter a channel, of which an accelerator makes patches
_LARGEST_KERNEL = 400  # the same on a CPU, where a grid of 84 x 84 has 361
_SAMPLES_A_PRODUCT = 16  # of a batch in a convolution on an accelerator, at most
_LARGE_BATCH = 4096  # samples, of more than which a dense layer's product on a GPU is of groups
_GROUPS = range(128, 513)  # samples that such a group may have
_GRID = 10  # filters along each side of a grid, at most
_FORBIDDEN = -1e9  # a logit whose probability is exactly 0 and whose products are all finite
_UNBOUNDED = 1e12  # bounds beyond this (±3.4e38 is common) are none; much beyond, 1/σ² is no number in float32
_LARGEST_LOG_STD = 2.0  # beyond which an entropy bonus asks for no more, in units of half the action range


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


def _product(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """x @ kernel for x [..., inputs], in the form whose gradient suits the backend.

    On CPU column by column where there are few: the gradient of a kernel of two columns is three times faster as two
    products with a vector; XLA's CPU backend has a matrix product for it that is made for larger ones. On a GPU a large
    batch in groups: the gradient of a kernel, of as few entries as one of its processors works on, is else a single
    sum over all samples.
    """
    columns, samples = kernel.shape[-1], math.prod(x.shape[:-1])
    if backend.columns_one_by_one() and columns <= _FEW_COLUMNS:
        contract = (((0,), (x.ndim - 1,)), ((), ()))
        return jnp.stack([jax.lax.dot_general(kernel[:, i], x, contract, **options) for i in range(columns)], axis=-1)
    if backend.sums_in_groups() and samples > _LARGE_BATCH:
        together = max((size for size in _GROUPS if samples % size == 0), default=samples)
        groups = x.reshape(samples // together, together, x.shape[-1])
        products = jnp.matmul(groups, jnp.broadcast_to(kernel, (samples // together, *kernel.shape)), **options)
        return products.reshape(*x.shape[:-1], columns)
    return jax.lax.dot_general(x, kernel, dimension_numbers, **options)


def _convolution_by_patches(x: Array, kernel: Array, strides: Sequence[int], padding: str, **options: Any) -> Array:
    """The convolution of a small kernel as matrix products with the patches it sees.

    On CPU because XLA prepares convolutions for its fast routine in a program's main computation only: the gradient of
    a kernel within a loop, as all training is, takes thirty times as long as by patches. On an accelerator because many
    agents have as many kernels, and XLA maps a convolution over them as one of grouped filters, where a product is a
    batch of products. There a few samples share a product, not the whole batch: the gradient of a kernel, of as few
    entries as one processor of a GPU works on, is else a single sum over all pixels of all samples.
    """
    height, width, _, filters = kernel.shape
    cpu = backend.all_convolutions_by_patches()
    if height * width > (_LARGEST_KERNEL if cpu else _SMALL_KERNEL) or padding != "SAME":
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    samples, *sizes, _ = x.shape
    margins = jax.lax.padtype_to_pads(sizes, (height, width), strides, padding)
    padded = jnp.pad(x, ((0, 0), *margins, (0, 0)))
    rows, columns = (-(-size // stride) for size, stride in zip(sizes, strides, strict=True))
    down, right = strides
    shifted = [
        padded[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right]
        for i in range(height)
        for j in range(width)
    ]
    matrix = kernel.reshape(-1, filters)
    together = samples if cpu else math.gcd(samples, _SAMPLES_A_PRODUCT)
    patches = jnp.concatenate(shifted, axis=-1).reshape(samples // together, together * rows * columns, matrix.shape[0])
    products = jnp.matmul(
        patches, jnp.broadcast_to(matrix, (samples // together, *matrix.shape)), precision=options["precision"]
    )
    return products.reshape(samples, rows, columns, filters)


class MLP(nn.Module):
    """Dense tanh layers over flattened observations.

    Attributes:
      hidden: widths of the hidden layers.
      outputs: width of the last, linear layer; None: without it, on the same parameters.
      last_scale: gain of the last layer's orthogonal initialisation.
      observation_ndim: rank of one observation, whose axes are flattened.
    """

    hidden: Sequence[int]
    outputs: int | None
    last_scale: float
    observation_ndim: int

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """[..., *observation_shape] -> [..., outputs]."""
        batch_shape = observation.shape[: observation.ndim - self.observation_ndim]
        x = observation.reshape(*batch_shape, -1)
        for width in self.hidden:
            x = nn.tanh(nn.Dense(width, kernel_init=orthogonal(2**0.5), dot_general=_product)(x))
        return _last_layer(x, self.outputs, self.last_scale)


class CNN(nn.Module):
    """One convolution of 16 3 x 3 filters and a dense layer of 128, the network of MinAtar (Young & Tian 2019).

    On grids larger than MinAtar's 10 x 10 the filters are further apart, and larger by as much, so that about 10 x 10
    of them look at any grid: the dense layer would else grow with it to millions of parameters.

    Attributes:
      outputs: width of the last, linear layer; None: without it, on the same parameters.
      last_scale: gain of the last layer's orthogonal initialisation.
    """

    outputs: int | None
    last_scale: float

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """[..., height, width, channels] -> [..., outputs]."""
        batch_shape = observation.shape[:-3]
        grid = observation.reshape(-1, *observation.shape[-3:])
        strides = [-(-size // _GRID) for size in grid.shape[1:3]]
        sizes = [2 * stride + 1 for stride in strides]
        filters = nn.Conv(
            16,
            sizes,
            strides,
            padding="SAME",
            kernel_init=_orthogonal_filters,
            conv_general_dilated=_convolution_by_patches,
        )(grid)
        x = nn.relu(filters).reshape(*batch_shape, -1)
        x = nn.relu(nn.Dense(128, kernel_init=orthogonal(2**0.5), dot_general=_product)(x))
        return _last_layer(x, self.outputs, self.last_scale)


class GRU(nn.Module):
    """A dense tanh layer, a gated recurrent unit (Cho et al. 2014), and a linear layer: one step of it.

    Attributes:
      units: width of the first layer and of the memory.
      outputs: width of the last, linear layer; None: without it, on the same parameters.
      last_scale: gain of the last layer's orthogonal initialisation.
      observation_ndim: rank of one observation, whose axes are flattened.
    """

    units: int
    outputs: int | None
    last_scale: float
    observation_ndim: int

    @nn.compact
    def __call__(self, carry: Array, observation: Array) -> tuple[Array, Array]:
        """Memory [..., units] and observation [..., *observation_shape] -> memory and [..., outputs]."""
        batch_shape = observation.shape[: observation.ndim - self.observation_ndim]
        x = nn.tanh(
            nn.Dense(self.units, kernel_init=orthogonal(2**0.5), dot_general=_product)(
                observation.reshape(*batch_shape, -1)
            )
        )
        cell = nn.GRUCell(self.units, kernel_init=orthogonal(1.0), recurrent_kernel_init=orthogonal(1.0))
        carry, x = cell(carry, x)
        return carry, _last_layer(x, self.outputs, self.last_scale)


def _last_layer(x: Array, outputs: int | None, scale: float) -> Array:
    """A linear layer, of the module that calls it; None: `x` itself, the module's features."""
    if outputs is None:
        return x
    return nn.Dense(outputs, kernel_init=orthogonal(scale), dot_general=_product)(x)


def _orthogonal_filters(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    matrix = orthogonal(2**0.5)(key, (int(np.prod(shape[:-1])), shape[-1]), dtype)
    return matrix.reshape(shape)


def make_policy(
    environment: Environment,
    *,
    network: str = "auto",
    hidden: Sequence[int] = (64, 64),
    initial_log_std: Scalar = 0.0,
    state_dependent_std: bool = False,
) -> Network:
    """The default policy for an action space: `Categorical`, `MultiCategorical` or `DiagonalGaussian`.

    The last layer is scaled by 0.01, so that the first policy is nearly uniform (discrete) or centred (Box). Mean and
    σ of a Gaussian are in units of half the action range around its centre, so one default suits a box of ±0.1 and
    one of ±2.

    Args:
      environment: whose spaces and shapes the network fits.
      network: "mlp" of tanh layers, "cnn" for grids, "gru" with a memory; "auto": cnn for observations of rank 3, else
        mlp.
      hidden: widths of the mlp's layers; the gru has units of the first of them.
      initial_log_std: log σ of a Gaussian at the start.
      state_dependent_std: whether log σ is an output of the network, and not a parameter of its own.
    """
    space = environment.action_space
    if isinstance(space, Box):
        return _gaussian_policy(environment, network, hidden, initial_log_std, state_dependent_std)
    sizes = (space.n,) if isinstance(space, Discrete) else space.n

    def distribution(params: PyTree, logits: Array) -> Categorical | MultiCategorical:
        if isinstance(space, Discrete):
            return Categorical(logits)
        return MultiCategorical(tuple(jnp.split(logits, np.cumsum(sizes)[:-1], axis=-1)))

    body = _body(environment, network, hidden, sum(sizes), 0.01)
    if environment.action_mask is not None:
        body = _masked(body, environment.action_mask, sizes)
    return _then(body, distribution)


def _masked(network: Network, action_mask: Callable[[Array], Array], sizes: Sequence[int]) -> Network:
    """A network of logits [..., sum(sizes)] that gives forbidden actions a probability of 0.

    A component without any allowed action, as may be in the last state of an episode, is left as it is. The mask is
    asked about the observation of the environment, whatever the network's own part sees in its place.
    """
    ends = np.cumsum(sizes)[:-1]

    def apply(params: PyTree, *inputs: Any) -> Any:
        masks = jnp.split(action_mask(inputs[-1]), ends, axis=-1)
        allowed = jnp.concatenate([mask | ~mask.any(axis=-1, keepdims=True) for mask in masks], axis=-1)
        output = network.apply(params, *inputs)
        if network.initial_carry is None:
            return jnp.where(allowed, output, _FORBIDDEN)
        carry, logits = output
        return carry, jnp.where(allowed, logits, _FORBIDDEN)

    def change_inputs(change: Callable[[Array], Array]) -> Network:
        return _masked(on_inputs(network, change), action_mask, sizes)

    return network._replace(apply=apply, on_inputs=change_inputs)


def on_inputs(network: Network, change: Callable[[Array], Array]) -> Network:
    """A network whose learned part sees `change(observation)`."""
    if network.on_inputs is not None:
        return network.on_inputs(change)

    def changed(function: Any) -> Any:
        return function and (lambda params, *inputs: function(params, *inputs[:-1], change(inputs[-1])))

    return network._replace(apply=changed(network.apply), features=changed(network.features))


def make_value(environment: Environment, *, network: str = "auto", hidden: Sequence[int] = (64, 64)) -> Network:
    """The default value function, V(observation) of shape [...]; arguments as in `make_policy`."""
    return _then(_body(environment, network, hidden, 1, 1.0), lambda params, outputs: outputs[..., 0])


def make_value_head(hidden: Sequence[int] = (64,)) -> Network:
    """A value function on a shared trunk, of the features [..., F] that the policy's last layer sees.

    It has a hidden layer, because features that serve the policy alone do not span the values: with a linear head
    alone, an IQM of 8 CartPole seeds is at 410 where this one is at 500.
    """
    head = MLP(tuple(hidden), 1, 1.0, 1)
    return _then(Network(head.init, head.apply), lambda params, outputs: outputs[..., 0])


def _body(environment: Environment, network: str, hidden: Sequence[int], outputs: int, last_scale: float) -> Network:
    ndim = len(environment.observation_shape)
    if network == "auto":
        network = "cnn" if ndim == 3 else "mlp"
    if network == "cnn":
        if ndim != 3:
            raise UsageError(
                f"network=cnn needs observations [height, width, channels]; {environment.name} has "
                f"{environment.observation_shape}."
            )
        grid = CNN(outputs, last_scale)
        return Network(grid.init, grid.apply, features=grid.clone(outputs=None).apply)
    if network == "gru":
        cell = GRU(hidden[0], outputs, last_scale, ndim)
        return Network(
            lambda key, observation: cell.init(key, jnp.zeros(hidden[0]), observation),
            cell.apply,
            lambda: jnp.zeros(hidden[0], jnp.float32),
            cell.clone(outputs=None).apply,
        )
    mlp = MLP(tuple(hidden), outputs, last_scale, ndim)
    return Network(mlp.init, mlp.apply, features=mlp.clone(outputs=None).apply)


def _then(network: Network, function: Callable[[PyTree, Any], Any]) -> Network:
    """A network whose output is `function(params, output)`."""

    def apply(params: PyTree, *inputs: Any) -> Any:
        if network.initial_carry is None:
            return function(params, network.apply(params, *inputs))
        carry, output = network.apply(params, *inputs)
        return carry, function(params, output)

    def change_inputs(change: Callable[[Array], Array]) -> Network:
        return _then(on_inputs(network, change), function)

    return network._replace(apply=apply, on_inputs=change_inputs)


def _units(space: Box) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half the width, [D] each, of the range that a Gaussian's mean and σ are counted in.

    It is that between the bounds. Without any it is [−1, 1]. Of one bound b it reaches from there over 2 max(1, |b|):
    b itself for a centre would be where clipped actions give no sign of a way out.
    """
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    below, above = np.abs(low) < _UNBOUNDED, np.abs(high) < _UNBOUNDED
    low, high = np.where(below, low, 0), np.where(above, high, 0)
    width_above, width_below = 2 * np.maximum(1, np.abs(low)), 2 * np.maximum(1, np.abs(high))
    start = np.where(below, low, np.where(above, high - width_below, -1))
    end = np.where(above, high, np.where(below, low + width_above, 1))
    empty = ~(end > start)  # one action alone
    start, end = np.where(empty, -1, start), np.where(empty, 1, end)
    return ((end + start) / 2).astype(np.float32), ((end - start) / 2).astype(np.float32)


def _gaussian_policy(
    environment: Environment, network: str, hidden: Sequence[int], initial_log_std: Scalar, state_dependent_std: bool
) -> Network:
    space: Any = environment.action_space
    centre, half_range = _units(space)
    largest = _LARGEST_LOG_STD + np.log(half_range)

    def gaussian(mean: Any, log_std: Any) -> DiagonalGaussian:
        return DiagonalGaussian(jnp.asarray(centre + half_range * mean), log_std + np.log(half_range), largest)

    if state_dependent_std:
        body = _body(environment, network, hidden, 2 * space.low.size, 0.01)

        def both(params: PyTree, outputs: Array) -> DiagonalGaussian:
            mean, log_std = jnp.split(outputs, 2, axis=-1)
            return gaussian(mean, log_std + initial_log_std)

        return _then(body, both)
    body = _body(environment, network, hidden, space.low.size, 0.01)

    def init(key: Array, observation: Array) -> PyTree:
        return {
            "mean": body.init(key, observation),
            "log_std": jnp.full(space.shape, initial_log_std, jnp.float32),
        }

    def of_mean(function: Any) -> Any:
        return lambda params, *inputs: function(params["mean"], *inputs)

    mean = body._replace(init=init, apply=of_mean(body.apply), features=of_mean(body.features))
    return _then(mean, lambda params, output: gaussian(output, params["log_std"]))
