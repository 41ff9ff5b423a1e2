"""Networks as users give them, and the recurrent form to which each is lifted, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from trpo_jax.steps.types import Array, PyTree

Change = Callable[[Array], Array]
"""`change(observation)` -> what a network sees in its place."""


class Network(NamedTuple):
    """A function approximator, as two functions; linen modules fit with `Network(module.init, module.apply)`.

    Attributes:
      init: `init(key, observation)` -> params, a pytree of float arrays; `observation` is a single one, [...].
      apply: `apply(params, observation)` -> a distribution (policy) or values (value function) with the batch shape
        of `observation`, which may have any leading batch axes.
      initial_carry: None, or, for a network with a memory, `initial_carry()` -> what it remembers at the start of an
        episode, a pytree of arrays for one environment. It is then `apply(params, carry, observation)` ->
        (carry, output), where the carry has the leading axes of `observation`.
      features: None, or, for a policy whose trunk the value function may share (`shared_trunk`), a function like
        `apply` whose output is what the last layer sees, [..., F].
      on_inputs: None, or, where not all of `apply` may see a changed observation, `on_inputs(change)` -> the network
        whose learned part sees `change(observation)`. Of the default policy with a mask of allowed actions it is this
        part alone that observations are normalised for: the mask is asked about those of the environment.
    """

    init: Callable[[Array, Array], PyTree]
    apply: Callable[..., Any]
    initial_carry: Callable[[], PyTree] | None = None
    features: Callable[..., Any] | None = None
    on_inputs: Callable[[Change], Any] | None = None


class RecurrentNetwork(NamedTuple):
    """A network as the trainer uses it: each has a carry, which is `()` where there is no memory.

    Attributes:
      init: `init(key, observation)` -> params.
      initial_carry: `initial_carry()` -> the carry of one environment at the start of an episode.
      step: `step(params, carry, observation)` -> (carry, output), with any leading batch axes.
      features: like `step`, with what the last layer sees for an output; None where that is not known.
      with_inputs: `with_inputs(change)` -> the network whose learned part sees `change(observation)`.
      has_memory: whether the carry says anything, so that whole sequences are one sample each.
    """

    init: Callable[[Array, Array], PyTree]
    initial_carry: Callable[[], PyTree]
    step: Callable[[PyTree, PyTree, Array], tuple[PyTree, Any]]
    features: Callable[[PyTree, PyTree, Array], tuple[PyTree, Any]] | None
    with_inputs: Callable[[Change], Any]
    has_memory: bool


def lift(network: Network) -> RecurrentNetwork:
    """The recurrent form of a network. Nothing past this door asks whether there is a carry."""
    has_memory = network.initial_carry is not None

    def recurrent(function: Any) -> Any:
        if function is None or has_memory:
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
        network.init, start, recurrent(network.apply), recurrent(network.features), with_inputs, has_memory
    )


def lower(network: RecurrentNetwork) -> Network:
    """A network in the form that users call: without a carry where there is no memory."""

    def plain(function: Any) -> Any:
        if function is None or network.has_memory:
            return function
        return lambda params, observation: function(params, (), observation)[1]

    return Network(
        init=network.init,
        apply=plain(network.step),
        initial_carry=network.initial_carry if network.has_memory else None,
        features=plain(network.features),
        on_inputs=lambda change: lower(network.with_inputs(change)),
    )


def with_output(network: RecurrentNetwork, finish: Callable[[PyTree, Array, Any], Any]) -> RecurrentNetwork:
    """A network whose output is `finish(params, observation, output)`, on the observation of the environment."""

    def step(params: PyTree, carry: PyTree, observation: Array) -> tuple[PyTree, Any]:
        carry, output = network.step(params, carry, observation)
        return carry, finish(params, observation, output)

    return network._replace(step=step, with_inputs=lambda change: with_output(network.with_inputs(change), finish))
