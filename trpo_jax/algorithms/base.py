"""What an algorithm is to the trainer: two pure functions, and the batch that they learn from.

    def make(config):
        optimizer = optax.adam(config.policy_learning_rate)

        def update(policy_apply, params, state, experience, key):
            return first_order_update(policy_apply, params, state, experience.batch, optimizer=optimizer)

        return Algorithm(lambda params, statistics: optimizer.init(params), update)

`Config(update=make)` trains with it. Those of the package have a name: one file, and one line in config.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from trpo_jax.config import Config
from trpo_jax.fields import ALGORITHMS, VALUE_FITS
from trpo_jax.steps.policy_updates import Batch, UpdateInfo
from trpo_jax.steps.statistics import RunningStatistics
from trpo_jax.steps.types import Array, PolicyApply, PyTree


class Experience(NamedTuple):
    """What a policy update learns from: B samples of the newest K batches.

    Attributes:
      batch: the samples. Its advantages are normalised as the settings say; without a baseline they are returns.
      advantage: the advantages before normalisation, [B].
      scale: what a unit of the batch's advantage is in units of the raw one.
      num_new: samples of the newest batch, which come first (static).
      iteration: iterations done before this one, int32.
      statistics: those by which the observations are normalised.
      apply_under: `apply_under(statistics)` -> the `policy_apply` of an agent with other statistics.
    """

    batch: Batch
    advantage: Array
    scale: Array
    num_new: int
    iteration: Array
    statistics: RunningStatistics
    apply_under: Callable[[RunningStatistics], PolicyApply]


class Algorithm(NamedTuple):
    """How a policy is updated.

    Attributes:
      init: `init(params, statistics)` -> what the algorithm keeps from update to update, a pytree of arrays; None if
        it keeps nothing.
      update: `update(policy_apply, params, state, experience, key)` -> (params, state, `UpdateInfo`). The parameters
        are one flat vector [P]; `experience` is an `Experience`.
      shuffles: whether minibatches are shuffled in every epoch, those of the value function too.
    """

    init: Callable[[Array, RunningStatistics], PyTree]
    update: Callable[[PolicyApply, Array, PyTree, Experience, Array], tuple[Array, PyTree, UpdateInfo]]
    shuffles: bool = False


class Targets(NamedTuple):
    """What a value function is fitted to: B samples.

    Attributes:
      observation: [B, ...], an array or a pytree of arrays.
      target: λ-returns, [B].
      old_values: V before the fit, [B].
      sample_ndim: leading axes of B that tell independent samples apart; None: all.
      iteration: iterations done before this one, int32.
    """

    observation: PyTree
    target: Array
    old_values: Array
    sample_ndim: int | None
    iteration: Array


class ValueFit(NamedTuple):
    """How a value function is fitted.

    Attributes:
      init: `init(params)` -> what the fit keeps from iteration to iteration; None if it keeps nothing.
      update: `update(value_apply, params, state, targets, key)` -> (params, state, loss); `targets` is a `Targets`,
        the key None where minibatches are not shuffled.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[[Callable[..., Array], PyTree, PyTree, Targets, Any], tuple[PyTree, PyTree, Array]]


def make_algorithm(config: Config) -> Algorithm:
    """The algorithm that `config.update` names, or that it makes."""
    return _maker(config.update, ALGORITHMS)(config)


def make_value_fit(config: Config) -> ValueFit:
    """The value fit that `config.value_fit` names, or that it makes."""
    return _maker(config.value_fit, VALUE_FITS)(config)


def _maker(choice: Any, modules: dict[str, str]) -> Callable[[Config], Any]:
    return choice if callable(choice) else importlib.import_module(modules[choice]).make


def annealed(value: Any, share: Any, config: Config, iteration: Array) -> Array:
    """A setting of which a share is gone at the end of the run: value (1 − share min(k, n)/n) in iteration k of n."""
    return value * (1 - share * jnp.minimum(iteration, config.num_iterations) / config.num_iterations)


def policy_optimizer(config: Config, iteration: Array | int = 0) -> Any:
    """The optax optimizer of a policy that takes gradient steps, with the learning rate of an iteration."""
    import optax  # deferred: the default algorithm does not need it

    learning_rate = annealed(config.policy_learning_rate, config.anneal_learning_rates, config, jnp.int32(iteration))
    return {"adam": optax.adam, "sgd": optax.sgd}[config.policy_optimizer](learning_rate)
