"""Value fit by Adam: epochs of minibatches, optionally clipped as in PPO (Engstrom et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trpo_jax.algorithms.base import Targets, ValueFit, annealed
from trpo_jax.config import Config
from trpo_jax.steps.types import Array, PyTree
from trpo_jax.steps.values import fit_value_function


def make(config: Config) -> ValueFit:
    """Build the Adam fit for these settings."""
    import optax  # deferred: the default fit does not need it

    def update(
        value_apply: Callable[..., Array], params: PyTree, state: PyTree, targets: Targets, key: Any
    ) -> tuple[PyTree, PyTree, Array]:
        learning_rate = annealed(config.value_learning_rate, config.anneal_learning_rates, config, targets.iteration)
        return fit_value_function(
            value_apply,
            params,
            state,
            targets.observation,
            targets.target,
            old_values=targets.old_values,
            clip=config.value_clip,
            optimizer=optax.adam(learning_rate),
            epochs=config.value_epochs,
            minibatches=config.value_minibatches,
            key=key,
            sample_ndim=targets.sample_ndim,
        )

    return ValueFit(optax.adam(0.0).init, update)
