"""Value fit by damped Gauss–Newton steps, with the same machinery as the policy step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.flatten_util import ravel_pytree

from trpo_jax.algorithms.base import Targets, ValueFit
from trpo_jax.config import Config
from trpo_jax.steps.solvers import Solver
from trpo_jax.steps.types import Array, PyTree
from trpo_jax.steps.values import gauss_newton_fit


def make(config: Config) -> ValueFit:
    """Build the Gauss–Newton fit for these settings."""

    def update(
        value_apply: Callable[..., Array], params: PyTree, state: None, targets: Targets, key: Any
    ) -> tuple[PyTree, None, Array]:
        vector, unravel = ravel_pytree(params)
        vector, loss = gauss_newton_fit(
            lambda v, observation: value_apply(unravel(v), observation),
            vector,
            targets.observation,
            targets.target,
            solver=Solver(config.value_damping, config.value_cg_iterations, config.cg_tolerance),
            fisher_fraction=config.fisher_fraction,
            sample_ndim=targets.sample_ndim,
            num_steps=config.gauss_newton_steps,
        )
        return unravel(vector), state, loss

    return ValueFit(lambda params: None, update)
