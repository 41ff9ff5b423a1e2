"""trpo_jax: Trust Region Policy Optimization for JAX.

Names load on first use, so that `import trpo_jax` adds nothing to `import jax`.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # as in `typing`, whose import takes long, and until it is done Ctrl-C prints a traceback
if TYPE_CHECKING:
    from trpo_jax.algorithms.base import Algorithm as Algorithm
    from trpo_jax.algorithms.base import ValueFit as ValueFit
    from trpo_jax.config_pytree import Config as Config
    from trpo_jax.environments.base import Box as Box
    from trpo_jax.environments.base import Discrete as Discrete
    from trpo_jax.environments.base import Environment as Environment
    from trpo_jax.environments.base import MultiDiscrete as MultiDiscrete
    from trpo_jax.environments.base import Step as Step
    from trpo_jax.environments.contract import check_environment as check_environment
    from trpo_jax.environments.hidden_entries import hide_entries as hide_entries
    from trpo_jax.environments.make import available_environments as available_environments
    from trpo_jax.environments.make import make_environment as make_environment
    from trpo_jax.environments.wrappers import append_time as append_time
    from trpo_jax.environments.wrappers import cache_resets as cache_resets
    from trpo_jax.environments.wrappers import flatten_observations as flatten_observations
    from trpo_jax.environments.wrappers import limit_steps as limit_steps
    from trpo_jax.environments.wrappers import repeat_actions as repeat_actions
    from trpo_jax.environments.wrappers import stack_frames as stack_frames
    from trpo_jax.networks.default import make_policy as make_policy
    from trpo_jax.networks.default import make_value as make_value
    from trpo_jax.networks.recurrent import Network as Network
    from trpo_jax.presets import Preset as Preset
    from trpo_jax.presets import load_preset as load_preset
    from trpo_jax.runs.continuing import continue_run as continue_run
    from trpo_jax.runs.folders import create_run as create_run
    from trpo_jax.runs.folders import extend_run as extend_run
    from trpo_jax.runs.folders import load_run as load_run
    from trpo_jax.runs.folders import open_run as open_run
    from trpo_jax.runs.sinks import open_sink as open_sink
    from trpo_jax.sentences import UsageError as UsageError
    from trpo_jax.settings import trust as trust
    from trpo_jax.steps.advantages import gae as gae
    from trpo_jax.steps.advantages import parallel_gae as parallel_gae
    from trpo_jax.steps.bounded import Beta as Beta
    from trpo_jax.steps.bounded import TanhGaussian as TanhGaussian
    from trpo_jax.steps.candidates import CandidateEstimate as CandidateEstimate
    from trpo_jax.steps.candidates import estimate_candidate as estimate_candidate
    from trpo_jax.steps.curvature import fisher_vector_product as fisher_vector_product
    from trpo_jax.steps.distributions import Categorical as Categorical
    from trpo_jax.steps.distributions import DiagonalGaussian as DiagonalGaussian
    from trpo_jax.steps.distributions import Distribution as Distribution
    from trpo_jax.steps.distributions import MultiCategorical as MultiCategorical
    from trpo_jax.steps.first_order import first_order_update as first_order_update
    from trpo_jax.steps.line_searches import backtracking_line_search as backtracking_line_search
    from trpo_jax.steps.line_searches import full_step as full_step
    from trpo_jax.steps.line_searches import parallel_line_search as parallel_line_search
    from trpo_jax.steps.objectives import clipped_objective as clipped_objective
    from trpo_jax.steps.objectives import log_barrier as log_barrier
    from trpo_jax.steps.objectives import maximum_kl as maximum_kl
    from trpo_jax.steps.objectives import mean_kl as mean_kl
    from trpo_jax.steps.objectives import penalized_objective as penalized_objective
    from trpo_jax.steps.objectives import reverse_kl as reverse_kl
    from trpo_jax.steps.objectives import surrogate as surrogate
    from trpo_jax.steps.policy_updates import Batch as Batch
    from trpo_jax.steps.policy_updates import UpdateInfo as UpdateInfo
    from trpo_jax.steps.solvers import Solver as Solver
    from trpo_jax.steps.solvers import conjugate_gradient as conjugate_gradient
    from trpo_jax.steps.trust_region import natural_gradient as natural_gradient
    from trpo_jax.steps.trust_region import trpo_update as trpo_update
    from trpo_jax.steps.values import fit_value_function as fit_value_function
    from trpo_jax.steps.values import gauss_newton_fit as gauss_newton_fit
    from trpo_jax.sweeps.agents import load_agent as load_agent
    from trpo_jax.sweeps.comparisons import compare as compare
    from trpo_jax.sweeps.in_folder import run_sweep as run_sweep
    from trpo_jax.sweeps.in_memory import SweepResult as SweepResult
    from trpo_jax.sweeps.in_memory import sweep as sweep
    from trpo_jax.sweeps.iqm import interquartile_mean as interquartile_mean
    from trpo_jax.sweeps.iqm import probability_of_improvement as probability_of_improvement
    from trpo_jax.sweeps.iqm import stratified_bootstrap as stratified_bootstrap
    from trpo_jax.training.checkpoints import load as load
    from trpo_jax.training.checkpoints import save as save
    from trpo_jax.training.devices import shard_environments as shard_environments
    from trpo_jax.training.evaluation import evaluate as evaluate
    from trpo_jax.training.loop import init as init
    from trpo_jax.training.loop import train as train
    from trpo_jax.training.loop import train_step as train_step
    from trpo_jax.training.state import Metrics as Metrics
    from trpo_jax.training.state import TrainState as TrainState
    from trpo_jax.training.warm_start import warm_start as warm_start
    from trpo_jax.validation import validate as validate

__version__ = "0.1.0"

_HOME = {
    "Algorithm": "algorithms.base",
    "Batch": "steps.policy_updates",
    "Beta": "steps.bounded",
    "Box": "environments.base",
    "CandidateEstimate": "steps.candidates",
    "Categorical": "steps.distributions",
    "Config": "config_pytree",
    "DiagonalGaussian": "steps.distributions",
    "Discrete": "environments.base",
    "Distribution": "steps.distributions",
    "Environment": "environments.base",
    "Metrics": "training.state",
    "MultiCategorical": "steps.distributions",
    "MultiDiscrete": "environments.base",
    "Network": "networks.recurrent",
    "Preset": "presets",
    "Solver": "steps.solvers",
    "Step": "environments.base",
    "SweepResult": "sweeps.in_memory",
    "TanhGaussian": "steps.bounded",
    "TrainState": "training.state",
    "UpdateInfo": "steps.policy_updates",
    "UsageError": "sentences",
    "ValueFit": "algorithms.base",
    "append_time": "environments.wrappers",
    "cache_resets": "environments.wrappers",
    "available_environments": "environments.make",
    "backtracking_line_search": "steps.line_searches",
    "check_environment": "environments.contract",
    "clipped_objective": "steps.objectives",
    "compare": "sweeps.comparisons",
    "conjugate_gradient": "steps.solvers",
    "continue_run": "runs.continuing",
    "create_run": "runs.folders",
    "estimate_candidate": "steps.candidates",
    "evaluate": "training.evaluation",
    "first_order_update": "steps.first_order",
    "extend_run": "runs.folders",
    "fisher_vector_product": "steps.curvature",
    "fit_value_function": "steps.values",
    "flatten_observations": "environments.wrappers",
    "full_step": "steps.line_searches",
    "gae": "steps.advantages",
    "gauss_newton_fit": "steps.values",
    "hide_entries": "environments.hidden_entries",
    "init": "training.loop",
    "interquartile_mean": "sweeps.iqm",
    "limit_steps": "environments.wrappers",
    "load": "training.checkpoints",
    "load_run": "runs.folders",
    "load_agent": "sweeps.agents",
    "load_preset": "presets",
    "log_barrier": "steps.objectives",
    "make_environment": "environments.make",
    "make_policy": "networks.default",
    "make_value": "networks.default",
    "maximum_kl": "steps.objectives",
    "mean_kl": "steps.objectives",
    "natural_gradient": "steps.trust_region",
    "open_run": "runs.folders",
    "open_sink": "runs.sinks",
    "parallel_gae": "steps.advantages",
    "parallel_line_search": "steps.line_searches",
    "penalized_objective": "steps.objectives",
    "probability_of_improvement": "sweeps.iqm",
    "repeat_actions": "environments.wrappers",
    "reverse_kl": "steps.objectives",
    "run_sweep": "sweeps.in_folder",
    "save": "training.checkpoints",
    "shard_environments": "training.devices",
    "stack_frames": "environments.wrappers",
    "stratified_bootstrap": "sweeps.iqm",
    "surrogate": "steps.objectives",
    "sweep": "sweeps.in_memory",
    "train": "training.loop",
    "train_step": "training.loop",
    "trpo_update": "steps.trust_region",
    "trust": "settings",
    "validate": "validation",
    "warm_start": "training.warm_start",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'trpo_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"trpo_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
