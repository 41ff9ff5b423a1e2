"""The default policy and value function of an environment."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from trpo_jax.config import check_setting
from trpo_jax.environments.base import Box, Discrete, Environment, sizes_of
from trpo_jax.fields import AUTO, as_widths
from trpo_jax.networks.bodies import Layers, body
from trpo_jax.networks.box_policies import box_policy, check_bounds
from trpo_jax.networks.modules import MLP, Style
from trpo_jax.networks.recurrent import Network, lift, lower, with_output
from trpo_jax.steps.distributions import Categorical, MultiCategorical
from trpo_jax.steps.types import Array, PyTree, Scalar

_FORBIDDEN = -1e9  # a logit whose probability is exactly 0 and whose products are all finite


def make_policy(
    environment: Environment,
    *,
    observation: str = AUTO,
    network: str = AUTO,
    hidden: Sequence[int] | str = AUTO,
    channels: Sequence[int] = (16,),
    activation: str = AUTO,
    layer_norm: bool = False,
    initialisation: str = "orthogonal",
    action_distribution: str = "gaussian",
    initial_log_std: Scalar = 0.0,
    state_dependent_std: bool = False,
) -> Network:
    """Build the default policy for an action space: `Categorical`, `MultiCategorical`, or one of three for a Box.

    The last layer is scaled by 0.01, so the initial policy is nearly uniform (discrete) or centred (Box). Mean and
    σ of a Gaussian are in units of half the action range around its centre, so one default suits a box of ±0.1 and
    one of ±2. α and β of a Beta are 1 + softplus(output), so that it has one mode (Chou et al. 2017).

    Args:
      environment: the environment whose spaces and shapes the network fits.
      observation: names of the entries of a dictionary that it sees, separated by commas; "auto": all but a mask of
        legal actions and those whose names begin with "privileged".
      network: "mlp", "cnn" for grids, or the recurrent "gru"; "auto": cnn for observations of rank 3, else mlp. With
        several entries a cnn has convolutions for each of rank 3, and all others go directly into the dense layers.
      hidden: widths of the dense layers; the last is also the size of a gru's recurrent state. "auto": (64, 64), for a
        gru (64,), for a cnn (128,).
      channels: filters of each convolution of a cnn.
      activation: "tanh", "relu", "swish" or "gelu"; "auto": relu in a cnn, else tanh.
      layer_norm: whether the output of each layer is normalised before its activation (Ba et al. 2016).
      initialisation: "orthogonal", with a gain of √2, or "lecun-normal".
      action_distribution: "gaussian" (`DiagonalGaussian`), or between bounds "tanh" (`TanhGaussian`) or "beta"
        (`Beta`).
      initial_log_std: initial log σ of a Gaussian; for "tanh", before squashing.
      state_dependent_std: whether log σ is an output of the network instead of a parameter.

    Raises:
      UsageError: if an argument has no such value, or does not fit the environment.
    """
    space = environment.action_space
    layers = Layers(observation, network, hidden, channels, activation, layer_norm, initialisation)
    check_setting("action_distribution", action_distribution)
    if action_distribution != "gaussian":
        check_bounds(environment, action_distribution)
    if isinstance(space, Box):
        return lower(box_policy(environment, layers, action_distribution, initial_log_std, state_dependent_std))
    sizes = sizes_of(space)
    network_body = body(environment, layers, sum(sizes), 0.01)

    def distribution(params: PyTree, observation: Array, logits: Array) -> Categorical | MultiCategorical:
        if environment.action_mask is not None:
            logits = _masked(logits, environment.action_mask(observation), sizes)
        if isinstance(space, Discrete):
            return Categorical(logits)
        return MultiCategorical(tuple(jnp.split(logits, np.cumsum(sizes)[:-1], axis=-1)))

    return lower(with_output(network_body, distribution))


def _masked(logits: Array, mask: Array, sizes: Sequence[int]) -> Array:
    """Give forbidden actions a probability of 0 in logits [..., sum(sizes)].

    A component without any allowed action, as possible in the last state of an episode, stays unchanged.
    """
    masks = jnp.split(mask, np.cumsum(sizes)[:-1], axis=-1)
    allowed = jnp.concatenate([mask | ~mask.any(axis=-1, keepdims=True) for mask in masks], axis=-1)
    return jnp.where(allowed, logits, _FORBIDDEN)


def make_value(
    environment: Environment,
    *,
    observation: str = AUTO,
    network: str = AUTO,
    hidden: Sequence[int] | str = AUTO,
    channels: Sequence[int] = (16,),
    activation: str = AUTO,
    layer_norm: bool = False,
    initialisation: str = "orthogonal",
) -> Network:
    """Build the default value function, V(observation) of shape [...]; arguments and errors as in `make_policy`."""
    layers = Layers(observation, network, hidden, channels, activation, layer_norm, initialisation)
    return lower(with_output(body(environment, layers, 1, 1.0), _single))


def make_value_head(
    hidden: Sequence[int] | str = AUTO,
    activation: str = AUTO,
    layer_norm: bool = False,
    initialisation: str = "orthogonal",
) -> Network:
    """Build a value function for a shared trunk, on the features [..., F] that the policy's last layer sees.

    By default it has a hidden layer of 64 units, because features that serve only the policy do not span the values.
    """
    style = Style("tanh" if activation == AUTO else activation, layer_norm, initialisation, 1.0)
    head = MLP((64,) if hidden == AUTO else as_widths(hidden), 1, style, 1)
    return lower(with_output(lift(Network(head.init, head.apply)), _single))


def _single(params: PyTree, observation: Array, outputs: Array) -> Array:
    return outputs[..., 0]
