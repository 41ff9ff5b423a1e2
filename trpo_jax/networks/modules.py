"""The learned parts of the default networks, as linen modules: tanh MLPs, CNNs for grids, GRUs with a memory."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn

from trpo_jax.networks.layers import convolution, orthogonal, orthogonal_filters, product
from trpo_jax.steps.types import Array

_GRID = 10  # filters along each side of a grid, at most


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
            x = nn.tanh(nn.Dense(width, kernel_init=orthogonal(2**0.5), dot_general=product)(x))
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
            kernel_init=orthogonal_filters,
            conv_general_dilated=convolution,
        )(grid)
        x = nn.relu(filters).reshape(*batch_shape, -1)
        x = nn.relu(nn.Dense(128, kernel_init=orthogonal(2**0.5), dot_general=product)(x))
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
            nn.Dense(self.units, kernel_init=orthogonal(2**0.5), dot_general=product)(
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
    return nn.Dense(outputs, kernel_init=orthogonal(scale), dot_general=product)(x)
