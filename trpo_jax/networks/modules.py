"""The learned parts of the default networks, as linen modules: MLPs, CNNs for grids, and recurrent GRUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from trpo_jax.networks.layers import convolution, kernel_initializer, product
from trpo_jax.steps.types import Array

ACTIVATIONS = {"tanh": nn.tanh, "relu": nn.relu, "swish": nn.swish, "gelu": nn.gelu}

_GRID = 10  # most positions of a filter along each side of a grid


class Style(NamedTuple):
    """Options that the layers of a network share.

    Attributes:
      activation: a name among `ACTIVATIONS`.
      layer_norm: whether the output of a layer is normalised over its units before the activation (Ba et al. 2016).
      initialisation: initialisation of the kernels, see `kernel_initializer`.
      last_scale: gain of the last layer.
    """

    activation: str = "tanh"
    layer_norm: bool = False
    initialisation: str = "orthogonal"
    last_scale: float = 1.0


class MLP(nn.Module):
    """Dense layers over flattened observations.

    Attributes:
      hidden: widths of the hidden layers.
      outputs: width of the last, linear layer; None: without it, on the same parameters.
      style: activation, normalisation and initialisation.
      observation_ndim: rank of one observation, whose axes are flattened.
    """

    hidden: Sequence[int]
    outputs: int | None
    style: Style
    observation_ndim: int

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """[..., *observation_shape] -> [..., outputs]."""
        batch_shape = observation.shape[: observation.ndim - self.observation_ndim]
        x = _hidden_layers(observation.reshape(*batch_shape, -1), self.hidden, self.style)
        return _last_layer(x, self.outputs, self.style)


class CNN(nn.Module):
    """Convolutions of 3 x 3 filters and dense layers; 16 filters and 128 units are MinAtar's (Young & Tian 2019).

    On grids larger than MinAtar's 10 x 10, the first filters are larger and further apart, so that about 10 x 10 of
    them cover any grid. Otherwise the dense layer would grow with the grid to millions of parameters.

    Attributes:
      channels: filters of each convolution.
      hidden: widths of the dense layers.
      outputs: width of the last, linear layer; None: without it, on the same parameters.
      style: activation, normalisation (over the filters at each place) and initialisation.
    """

    channels: Sequence[int]
    hidden: Sequence[int]
    outputs: int | None
    style: Style

    @nn.compact
    def __call__(self, observation: Array | tuple[Array, ...]) -> Array:
        """[..., height, width, channels] -> [..., outputs]; several pictures have convolutions each.

        A vector [..., D] after the pictures goes directly into the dense layers.
        """
        parts = observation if isinstance(observation, tuple) else (observation,)
        batch_shape, last = parts[0].shape[:-3], parts[-1]
        seen = [last] if last.ndim == len(batch_shape) + 1 else []
        pictures = parts[:-1] if seen else parts
        features = [self._features(picture).reshape(*batch_shape, -1) for picture in pictures] + seen
        x = features[0] if len(features) == 1 else jnp.concatenate(features, axis=-1)
        return _last_layer(_hidden_layers(x, self.hidden, self.style), self.outputs, self.style)

    def _features(self, picture: Array) -> Array:
        """[..., height, width, channels] -> [B, height, width, filters]."""
        x = picture.reshape(-1, *picture.shape[-3:])
        for channels in self.channels:
            strides = [-(-size // _GRID) for size in x.shape[1:3]]  # 1 each after the first
            x = nn.Conv(
                channels,
                [2 * stride + 1 for stride in strides],
                strides,
                padding="SAME",
                kernel_init=kernel_initializer(self.style.initialisation, 2**0.5),
                conv_general_dilated=convolution,
            )(x)
            x = _activate(x, self.style)
        return x


class GRU(nn.Module):
    """One step of dense layers, a gated recurrent unit (Cho et al. 2014), and a linear layer.

    Attributes:
      hidden: widths of the dense layers; the last is also the size of the recurrent state.
      outputs: width of the last, linear layer; None: without it, on the same parameters.
      style: activation and normalisation of the dense layers, and initialisation; the recurrent unit itself has tanh, σ
        and orthogonal recurrent kernels.
      observation_ndim: rank of one observation, whose axes are flattened.
    """

    hidden: Sequence[int]
    outputs: int | None
    style: Style
    observation_ndim: int

    @nn.compact
    def __call__(self, carry: Array, observation: Array) -> tuple[Array, Array]:
        """Recurrent state [..., units], observation [..., *observation_shape] -> recurrent state, [..., outputs]."""
        batch_shape = observation.shape[: observation.ndim - self.observation_ndim]
        x = _hidden_layers(observation.reshape(*batch_shape, -1), self.hidden, self.style)
        cell = nn.GRUCell(
            self.hidden[-1],
            kernel_init=kernel_initializer(self.style.initialisation, 1.0),
            recurrent_kernel_init=kernel_initializer("orthogonal", 1.0),
        )
        carry, x = cell(carry, x)
        return carry, _last_layer(x, self.outputs, self.style)


# These add layers to the module that calls them.


def _hidden_layers(x: Array, widths: Sequence[int], style: Style) -> Array:
    for width in widths:
        kernel_init = kernel_initializer(style.initialisation, 2**0.5)
        x = _activate(nn.Dense(width, kernel_init=kernel_init, dot_general=product)(x), style)
    return x


def _activate(x: Array, style: Style) -> Array:
    if style.layer_norm:
        x = nn.LayerNorm(use_fast_variance=False)(x)  # E x² − (E x)² would cancel
    return ACTIVATIONS[style.activation](x)


def _last_layer(x: Array, outputs: int | None, style: Style) -> Array:
    """Apply a linear layer; None: return `x` itself, the module's features."""
    if outputs is None:
        return x
    kernel_init = kernel_initializer(style.initialisation, style.last_scale)
    return nn.Dense(outputs, kernel_init=kernel_init, dot_general=product)(x)
