"""Default policies for actions in a Box: Gaussian, Gaussian squashed by tanh, and Beta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.environments.base import Box, Environment
from trpo_jax.networks.bodies import Layers, body
from trpo_jax.networks.recurrent import RecurrentNetwork, with_output
from trpo_jax.sentences import UsageError
from trpo_jax.steps.bounded import Beta, TanhGaussian
from trpo_jax.steps.distributions import DiagonalGaussian
from trpo_jax.steps.types import Array, PyTree, Scalar

_UNBOUNDED = 1e12  # bounds beyond this (±3.4e38 is common) count as none; far beyond, float32 cannot hold 1/σ²
_LARGEST_LOG_STD = 2.0  # largest log σ that an entropy bonus rewards, in units of half the action range


def box_policy(
    environment: Environment,
    layers: Layers,
    action_distribution: str,
    initial_log_std: Scalar,
    state_dependent_std: bool,
) -> RecurrentNetwork:
    """Build a policy for a Box of actions; arguments as in `make_policy`."""
    space: Any = environment.action_space
    if action_distribution == "beta":
        return _beta_policy(environment, layers)
    make = _gaussian_in_units(space) if action_distribution == "gaussian" else _tanh_between_bounds(space)
    return _gaussian_policy(environment, layers, make, initial_log_std, state_dependent_std)


def _units(space: Box) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half width, [D] each, of the range that is the unit of a Gaussian's mean and σ.

    It is the range between the bounds, or [−1, 1] without any. With one bound b it extends from b over 2 max(1, |b|). A
    centre at b itself would be a bad start, since clipped actions do not show a way out.
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


def check_bounds(environment: Environment, action_distribution: str) -> None:
    """Raise `UsageError` unless every action dimension has two bounds."""
    space = environment.action_space
    if isinstance(space, Box):
        bounded = (np.abs(space.low) < _UNBOUNDED) & (np.abs(space.high) < _UNBOUNDED) & (space.low < space.high)
    if not isinstance(space, Box) or not bounded.all():
        raise UsageError(
            f"action_distribution={action_distribution} needs a Box of actions with a lower and an upper bound in each "
            f"dimension; actions of {environment.name} lie in {space}, so use the default."
        )


def _beta_policy(environment: Environment, layers: Layers) -> RecurrentNetwork:
    space: Any = environment.action_space
    low, high = (tuple(map(float, bound)) for bound in (space.low, space.high))

    def finish(params: PyTree, observation: Array, outputs: Array) -> Beta:
        alpha, beta = jnp.split(1 + jax.nn.softplus(outputs), 2, axis=-1)
        return Beta(alpha, beta, low, high)

    return with_output(body(environment, layers, 2 * space.low.size, 0.01), finish)


def _tanh_between_bounds(space: Box) -> Callable[[Array, Array], TanhGaussian]:
    low, high = (tuple(map(float, bound)) for bound in (space.low, space.high))
    return lambda mean, log_std: TanhGaussian(DiagonalGaussian(mean, log_std), low, high)


def _gaussian_in_units(space: Box) -> Callable[[Array, Array], DiagonalGaussian]:
    centre, half_range = _units(space)
    largest = _LARGEST_LOG_STD + np.log(half_range)

    def gaussian(mean: Any, log_std: Any) -> DiagonalGaussian:
        return DiagonalGaussian(jnp.asarray(centre + half_range * mean), log_std + np.log(half_range), largest)

    return gaussian


def _gaussian_policy(
    environment: Environment,
    layers: Layers,
    make: Callable[[Array, Array], Any],
    initial_log_std: Scalar,
    state_dependent_std: bool,
) -> RecurrentNetwork:
    """Build a network whose output is `make(mean, log_std)`."""
    space: Any = environment.action_space
    if state_dependent_std:
        network = body(environment, layers, 2 * space.low.size, 0.01)

        def both(params: PyTree, observation: Array, outputs: Array) -> Any:
            mean, log_std = jnp.split(outputs, 2, axis=-1)
            return make(mean, log_std + initial_log_std)

        return with_output(network, both)
    network = body(environment, layers, space.low.size, 0.01)

    def init(key: Array, observation: Array) -> PyTree:
        return {
            "mean": network.init(key, observation),
            "log_std": jnp.full(space.shape, initial_log_std, jnp.float32),
        }

    mean = _on_part(network, "mean", init)
    return with_output(mean, lambda params, observation, output: make(output, params["log_std"]))


def _on_part(network: RecurrentNetwork, name: str, init: Callable[[Array, Array], PyTree]) -> RecurrentNetwork:
    """Let a network use `params[name]` of the parameters that `init` makes."""

    def on_part(function: Any) -> Any:
        return function and (lambda params, carry, observation: function(params[name], carry, observation))

    return network._replace(
        init=init,
        step=on_part(network.step),
        features=on_part(network.features),
        with_inputs=lambda change: _on_part(network.with_inputs(change), name, init),
    )
