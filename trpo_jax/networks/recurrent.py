"""Networks as users write them, and the recurrent form to which each is converted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from trpo_jax.steps.types import Array, PyTree

Change = Callable[[Array], Array]
"""`change(observation)` -> the observation that a network sees instead."""


class Network(NamedTuple):
    """A function approximator, as two functions; linen modules fit with `Network(module.init, module.apply)`.

    Attributes:
      init: `init(key, observation)` -> params, a pytree of float arrays; `observation` is a single one, [...].
      apply: `apply(params, observation)` -> a distribution (policy) or values (value function) with the batch shape
        of `observation`, which may have any leading batch axes.
      initial_carry: None, or, for a recurrent network, `initial_carry()` -> the recurrent state at the start of an
        episode, a pytree of arrays for one environment. The network is then `apply(params, carry, observation)` ->
        (carry, output), where the carry has the leading axes of `observation`.
      features: None, or, for a policy whose trunk the value function may share (`shared_trunk`), a function like
        `apply` that returns the input of the last layer, [..., F].
      on_inputs: None, or, if only a part of `apply` may see a changed observation, `on_inputs(change)` -> the network
        whose learned part sees `change(observation)`. In the default policy with a mask of legal actions, observations
        are normalised for this part only: the mask is read from the environment's own observation.
    """

    init: Callable[[Array, Array], PyTree]
    apply: Callable[..., Any]
    initial_carry: Callable[[], PyTree] | None = None
    features: Callable[..., Any] | None = None
    on_inputs: Callable[[Change], Any] | None = None


class RecurrentNetwork(NamedTuple):
    """A network in the trainer's form: each has a carry, which is `()` if the network is not recurrent.

    Attributes:
      init: `init(key, observation)` -> params.
      initial_carry: `initial_carry()` -> the carry of one environment at the start of an episode.
      step: `step(params, carry, observation)` -> (carry, output), with any leading batch axes.
      features: like `step`, but with the input of the last layer as output; None if unknown.
      with_inputs: `with_inputs(change)` -> the network whose learned part sees `change(observation)`.
      is_recurrent: whether the network is recurrent, so that a sample is a whole sequence.
    """

    init: Callable[[Array, Array], PyTree]
    initial_carry: Callable[[], PyTree]
    step: Callable[[PyTree, PyTree, Array], tuple[PyTree, Any]]
    features: Callable[[PyTree, PyTree, Array], tuple[PyTree, Any]] | None
    with_inputs: Callable[[Change], Any]
    is_recurrent: bool


def lift(network: Network) -> RecurrentNetwork:
    """Convert a network to its recurrent form; no code after this asks whether there is a carry."""
    is_recurrent = network.initial_carry is not None

    def recurrent(function: Any) -> Any:
        if function is None or is_recurrent:
            return function
        return lambda params, carry, observation: (carry, function(params, observation))

    def with_inputs(change: Change) -> RecurrentNetwork:
        if network.on_inputs is not None:
            return lift(network.on_inputs(change))

        def changed(function: Any) -> Any:
            return function and (lambda params, *inputs: function(params, *inputs[:-1], change(inputs[-1])))

        return lift(network._replace(apply=changed(network.apply), features=changed(network.features)))

    start = network.initial_carry or tuple
    return RecurrentNetwork(
        network.init, start, recurrent(network.apply), recurrent(network.features), with_inputs, is_recurrent
    )


def lower(network: RecurrentNetwork) -> Network:
    """Convert a network to the form that users call, without a carry if it is not recurrent."""

    def plain(function: Any) -> Any:
        if function is None or network.is_recurrent:
            return function
        return lambda params, observation: function(params, (), observation)[1]

    return Network(
        init=network.init,
        apply=plain(network.step),
        initial_carry=network.initial_carry if network.is_recurrent else None,
        features=plain(network.features),
        on_inputs=lambda change: lower(network.with_inputs(change)),
    )


def with_output(network: RecurrentNetwork, finish: Callable[[PyTree, Array, Any], Any]) -> RecurrentNetwork:
    """Replace a network's output by `finish(params, observation, output)`, on the environment's own observation."""

    def step(params: PyTree, carry: PyTree, observation: Array) -> tuple[PyTree, Any]:
        carry, output = network.step(params, carry, observation)
        return carry, finish(params, observation, output)

    return network._replace(step=step, with_inputs=lambda change: with_output(network.with_inputs(change), finish))
