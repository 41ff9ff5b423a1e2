"""Layers that the default policy and value function share, on the entries of an observation that each sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from trpo_jax.config import check_setting
from trpo_jax.environments.base import Environment
from trpo_jax.environments.entries import chosen
from trpo_jax.fields import AUTO
from trpo_jax.networks.modules import CNN, GRU, MLP, Style
from trpo_jax.networks.recurrent import Network, RecurrentNetwork, lift
from trpo_jax.sentences import UsageError
from trpo_jax.settings import cast
from trpo_jax.steps.types import Array

_HIDDEN = {"mlp": (64, 64), "gru": (64,), "cnn": (128,)}  # where `hidden` is auto


class Layers(NamedTuple):
    """The arguments that `make_policy` and `make_value` share."""

    observation: str
    network: str
    hidden: Sequence[int] | str
    channels: Sequence[int]
    activation: str
    layer_norm: bool
    initialisation: str


def body(environment: Environment, layers: Layers, outputs: int, last_scale: float) -> RecurrentNetwork:
    """Build a network with `outputs` outputs whose last layer is scaled by `last_scale`."""
    settings = {name: cast(name, value) for name, value in layers._asdict().items() if name != "observation"}
    layers = layers._replace(**settings)
    for name, value in settings.items():
        check_setting(name, value)
    names = chosen(environment.entries, layers.observation, environment.name)
    shapes = _shapes(environment, names)
    network, activation = auto_resolved(environment, layers.observation, layers.network, layers.activation)
    hidden = _HIDDEN[network] if layers.hidden == AUTO else layers.hidden
    style = Style(activation, layers.layer_norm, layers.initialisation, last_scale)
    if network == "cnn" and not any(map(_is_picture, shapes)):
        found = ", ".join(map(str, shapes))
        raise UsageError(f"network=cnn needs observations [height, width, channels]; {environment.name} has {found}.")
    # The input is one array; for a cnn on several entries it is the pictures, and one vector of all others.
    ndim = len(shapes[0]) if len(shapes) == 1 else 1
    see = _view(environment, names, shapes, network)
    if network == "cnn":
        grid = CNN(layers.channels, hidden, outputs, style)
        return lift(_seeing(see, Network(grid.init, grid.apply, features=grid.clone(outputs=None).apply)))
    if network == "gru":
        cell = GRU(hidden, outputs, style, ndim)
        recurrent = Network(
            lambda key, observation: cell.init(key, jnp.zeros(hidden[-1]), observation),
            cell.apply,
            lambda: jnp.zeros(hidden[-1], jnp.float32),
            cell.clone(outputs=None).apply,
        )
        return lift(_seeing(see, recurrent))
    mlp = MLP(hidden, outputs, style, ndim)
    return lift(_seeing(see, Network(mlp.init, mlp.apply, features=mlp.clone(outputs=None).apply)))


def auto_resolved(environment: Environment, observation: str, network: str, activation: str) -> tuple[str, str]:
    """The network and the activation that "auto" stands for, where the network sees the entries `observation`."""
    if network == AUTO:
        shapes = _shapes(environment, chosen(environment.entries, observation, environment.name))
        network = "cnn" if any(map(_is_picture, shapes)) else "mlp"
    if activation == AUTO:
        activation = "relu" if network == "cnn" else "tanh"
    return network, activation


def _shapes(environment: Environment, names: Sequence[str | None]) -> list[tuple[int, ...]]:
    return [environment.observation_shape if name is None else (environment.entries or {})[name] for name in names]


def _is_picture(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3


def _view(environment: Environment, names: tuple[Any, ...], shapes: Any, network: str) -> Callable[[Array], Any]:
    """Make the function from observations [..., *observation_shape] to the input of a network."""
    if environment.entries is None:
        return lambda observation: observation

    def see(observation: Array) -> Any:
        parts = environment.split(observation)
        seen = [parts[name] for name in names]
        if len(seen) == 1:
            return seen[0]
        whole = [network == "cnn" and _is_picture(shape) for shape in shapes]
        flat = [part.reshape(*observation.shape[:-1], -1) for part, keep in zip(seen, whole, strict=True) if not keep]
        pictures = tuple(part for part, keep in zip(seen, whole, strict=True) if keep)
        vectors = [jnp.concatenate(flat, axis=-1)] if flat else []
        return (*pictures, *vectors) if network == "cnn" else vectors[0]

    return see


def _seeing(see: Callable[[Array], Any], network: Network) -> Network:
    """Apply a network to `see(observation)`."""

    def on_seen(function: Any) -> Any:
        return lambda first, *inputs: function(first, *inputs[:-1], see(inputs[-1]))

    functions = {name: on_seen(getattr(network, name)) for name in ("init", "apply", "features")}
    return network._replace(**functions)
