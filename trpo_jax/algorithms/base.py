"""The interface between an algorithm and the trainer: two pure functions, and the batch they learn from.

    def make(config):
        optimizer = optax.adam(config.policy_learning_rate)

        def update(policy_apply, params, state, experience, key):
            return first_order_update(policy_apply, params, state, experience.batch, optimizer=optimizer)

        return Algorithm(lambda params, statistics: optimizer.init(params), update)

`Config(update=make)` trains with it. The algorithms of the package have names: each is one file, and one name in
`UpdateName` in fields.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trpo_jax.config import Config
from trpo_jax.fields import ALGORITHMS, VALUE_FITS
from trpo_jax.sentences import UsageError, shown
from trpo_jax.steps.curvature import curvature_sample
from trpo_jax.steps.objectives import Bonus, entropy_bonus, log_barrier
from trpo_jax.steps.policy_updates import Batch, UpdateInfo
from trpo_jax.steps.statistics import RunningStatistics
from trpo_jax.steps.types import Array, PolicyApply, PyTree

_HELD_OUT = 1024  # samples: enough for a mean over iterations, and a small part of a large batch


class Experience(NamedTuple):
    """The data of a policy update: B samples from the newest K batches.

    Attributes:
      batch: the samples. The advantages are normalised if `normalize_advantages` is set; without a baseline they are
        returns.
      advantage: the advantages before normalisation, [B].
      explained_variance: explained variance of the value function that the advantages are from, see `Metrics`.
      scale: the size of one unit of the batch's advantages in units of the raw ones.
      num_new: number of samples from the newest batch, which come first (static).
      iteration: iterations completed before this one, int32.
      last_step: the change of the parameters by the update before, [P]; 0 before the first one.
      statistics: the statistics that normalise the observations.
      apply_under: `apply_under(statistics)` -> the `policy_apply` of an agent with other statistics.
    """

    batch: Batch
    advantage: Array
    explained_variance: Array
    scale: Array
    num_new: int
    iteration: Array
    last_step: Array
    statistics: RunningStatistics
    apply_under: Callable[[RunningStatistics], PolicyApply]

    def newest(self, advantage: Array) -> tuple[PyTree, PyTree, Array]:
        """Observations, actions and these advantages [B] of the newest batch, which no earlier update has seen."""
        parts = self.batch.observation, self.batch.action, advantage
        return jax.tree.map(lambda leaf: leaf[: self.num_new], parts)

    @property
    def held_out(self) -> Batch:
        """At most 1024 samples, spread over the newest batch."""
        newest = self.newest(self.batch.advantage)
        return Batch(*curvature_sample(newest, (self.num_new,), min(1.0, _HELD_OUT / self.num_new)))


class Algorithm(NamedTuple):
    """A way to update a policy.

    Attributes:
      init: `init(params, statistics)` -> the state that the algorithm keeps between updates, a pytree of arrays, or
        None.
      update: `update(policy_apply, params, state, experience, key)` -> (params, state, `UpdateInfo`). The parameters
        are one flat vector [P]; `experience` is an `Experience`.
      shuffles: whether every epoch reshuffles its minibatches, including those of the value fit.
    """

    init: Callable[[Array, RunningStatistics], PyTree]
    update: Callable[[PolicyApply, Array, PyTree, Experience, Array], tuple[Array, PyTree, UpdateInfo]]
    shuffles: bool = False


class Targets(NamedTuple):
    """The data of a value fit: B samples.

    Attributes:
      observation: [B, ...], an array or a pytree of arrays.
      target: λ-returns, [B].
      old_values: V before the fit, [B].
      sample_ndim: number of leading axes of B that index independent samples; None: all.
      iteration: iterations completed before this one, int32.
    """

    observation: PyTree
    target: Array
    old_values: Array
    sample_ndim: int | None
    iteration: Array


class ValueFit(NamedTuple):
    """A way to fit a value function.

    Attributes:
      init: `init(params)` -> the state that the fit keeps between iterations, or None.
      update: `update(value_apply, params, state, targets, key)` -> (params, state, loss). `targets` is a `Targets`; the
        key is None where minibatches are not shuffled.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[[Callable[..., Array], PyTree, PyTree, Targets, Any], tuple[PyTree, PyTree, Array]]


def make_algorithm(config: Config) -> Algorithm:
    """Build the algorithm that `config.update` names; if `config.update` is a function, call it."""
    return _made(Algorithm, "update", config, ALGORITHMS)


def make_value_fit(config: Config) -> ValueFit:
    """Build the value fit that `config.value_fit` names; if `config.value_fit` is a function, call it."""
    return _made(ValueFit, "value_fit", config, VALUE_FITS)


def _made(kind: type, name: str, config: Config, modules: dict[str, str]) -> Any:
    choice = getattr(config, name)
    made = (choice if callable(choice) else importlib.import_module(modules[choice]).make)(config)
    if not isinstance(made, kind):
        raise UsageError(f"the function {name} must return an object of {kind.__name__}, got {shown(made)}.")
    return made


def bonus_of(config: Config) -> Bonus:
    """What `entropy_coefficient` weighs."""
    return {"entropy": entropy_bonus, "log-barrier": log_barrier}[config.bonus]


def annealed(value: Any, share: Any, config: Config, iteration: Array) -> Array:
    """Lower a setting by a share of itself over the run: value (1 − share min(k, n)/n) in iteration k of n."""
    return value * (1 - share * jnp.minimum(iteration, config.num_iterations) / config.num_iterations)


def policy_optimizer(config: Config, iteration: Array | int = 0) -> Any:
    """The optax optimizer for a policy's gradient steps, with the learning rate of the given iteration."""
    import optax  # deferred: the default algorithm does not need it

    learning_rate = annealed(config.policy_learning_rate, config.anneal_learning_rates, config, jnp.int32(iteration))
    return {"adam": optax.adam, "sgd": optax.sgd}[config.policy_optimizer](learning_rate)
