"""Every setting once: its name, default, meaning and range. Imports no JAX, so the command line can show it at once.

A setting is *static* if it changes a shape, a loop length or a Python branch: each value compiles a program of its
own. Every other setting is a float that is *traced*: one program serves all its values, and `jax.vmap` over it works.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
from collections.abc import Iterable
from typing import Any


class UsageError(ValueError):
    """A setting, file or environment cannot be used. The message is one sentence with the mend in it."""


def _static(default: Any, help: str, *, low: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(
        default=default, metadata={"help": help, "static": True, "low": low, "choices": choices, "flag": True}
    )


def _traced(default: float, help: str, *, interval: str) -> Any:
    return dataclasses.field(
        default=default, metadata={"help": help, "static": False, "interval": interval, "flag": True}
    )


def _object(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "static": True, "flag": False})


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a training run. A pytree: floats are leaves, the rest is static.

    `help` and ranges stand in each field's metadata; `trpo-jax train --help` prints them. `config.replace(name=value)`
    returns a changed copy.
    """

    env: Any = _object("CartPole-v1", "a gymnax name, an Environment, or any object with gymnax's six-value step")
    policy: Any = _object(None, "a Network whose apply returns a distribution; None: see `network`")
    value: Any = _object(None, "a Network whose apply returns V, [...]; None: see `network`")
    num_envs: int = _static(16, "environments stepped in parallel, N", low=1)
    num_steps: int = _static(128, "steps in each environment an iteration, T", low=1)
    num_iterations: int = _static(150, "iterations (one rollout and one update each)", low=1)
    gamma: float = _traced(0.99, "discount γ", interval="[0, 1]")
    gae_lambda: float = _traced(0.98, "λ of generalized advantage estimation", interval="[0, 1]")
    baseline: bool = _static(True, "weight actions by advantages; False: by returns, as REINFORCE without a baseline")
    update: str = _static(
        "trpo",
        "how the policy is updated; all but trpo take gradient steps: one (policy-gradient), or epochs of minibatches "
        "on the clipped (ppo) or the penalised surrogate (kl-penalty)",
        choices=("trpo", "policy-gradient", "ppo", "kl-penalty"),
    )
    max_kl: float = _traced(
        0.01,
        "trust-region radius δ: bound on the divergence of an update, nats; the first, if it adapts",
        interval="(0, inf)",
    )
    constraint: str = _static(
        "mean-kl",
        "the divergence that δ bounds: mean or maximum of KL(old‖new) over the batch, or the mean of KL(new‖old)",
        choices=("mean-kl", "max-kl", "reverse-kl"),
    )
    radius_rule: str = _static(
        "fixed",
        "ratio: δ grows while the realised gain, measured on the next batch, is near the predicted one, and shrinks "
        "where it is not; divergence: δ moves until the divergence is near target_kl",
        choices=("fixed", "ratio", "divergence"),
    )
    smallest_max_kl: float = _traced(1e-5, "radius_rule: lower bound of δ, nats", interval="(0, inf)")
    largest_max_kl: float = _traced(1.0, "radius_rule: upper bound of δ, nats", interval="(0, inf)")
    target_kl: float = _traced(
        0.01, "divergence that radius_rule=divergence and kl-penalty aim at", interval="(0, inf)"
    )
    anneal_max_kl: float = _traced(
        0.0, "share of δ that is gone at the end of the run, linearly; 1: shrinks towards 0", interval="[0, 1]"
    )
    reuse: int = _static(1, "batches an update learns from: the newest and reuse − 1 before it", low=1)
    entropy_coefficient: float = _traced(
        0.0, "weight of the policy's mean entropy in the objective", interval="[0, inf)"
    )
    cg_damping: float = _traced(0.1, "damping λ_d of the Fisher matrix in conjugate gradient", interval="[0, inf)")
    cg_iterations: int = _static(10, "conjugate-gradient iterations k at most", low=1)
    cg_tolerance: float = _traced(
        0.01, "relative residual at which conjugate gradient stops before k; 0: never", interval="[0, 1)"
    )
    fisher_fraction: float = dataclasses.field(
        default=0.1,
        metadata={
            "help": "share of the batch that curvature is estimated from; as an array it is traced, and saves no work",
            "static": True,
            "interval": "(0, 1]",
            "flag": True,
        },
    )
    line_search: str = _static(
        "auto",
        "one candidate after the other, or all in one batched pass; auto: parallel on accelerators; none: the full "
        "step is taken as it is, which is the natural gradient method",
        choices=("auto", "backtracking", "parallel", "none"),
    )
    line_search_shrink: float = _traced(0.8, "factor α between candidates of the line search", interval="(0, 1)")
    line_search_steps: int = _static(10, "candidates that the line search tries", low=1)
    policy_optimizer: str = _static(
        "adam", "gradient steps: by Adam, or plain, θ + learning rate · gradient", choices=("adam", "sgd")
    )
    policy_learning_rate: float = _traced(1e-3, "gradient steps: learning rate", interval="[0, inf)")
    policy_epochs: int = _static(10, "ppo, kl-penalty: passes over the batch", low=1)
    policy_minibatches: int = _static(8, "ppo, kl-penalty: minibatches a pass; must divide the batch", low=1)
    clip_ratio: float = _traced(0.2, "ppo: ε, the ratio counts within [1 − ε, 1 + ε]", interval="(0, inf)")
    initial_penalty: float = _traced(
        1.0, "kl-penalty: coefficient β of the KL at the start; adapts to target_kl", interval="(0, inf)"
    )
    value_fit: str = _static(
        "gauss-newton",
        "how the value function is fitted: one damped Gauss-Newton step, or epochs of minibatches by Adam",
        choices=("gauss-newton", "adam"),
    )
    value_damping: float = _traced(1.0, "gauss-newton: damping λ of the value function's matrix", interval="[0, inf)")
    value_cg_iterations: int = _static(5, "gauss-newton: conjugate-gradient iterations at most", low=1)
    value_learning_rate: float = _traced(3e-3, "adam: learning rate", interval="[0, inf)")
    value_clip: float = _traced(
        0.0,
        "adam: V counts within ± this of what it was, where that raises the loss; 0: everywhere",
        interval="[0, inf)",
    )
    anneal_learning_rates: float = _traced(
        0.0, "share of both learning rates that is gone at the end of the run, linearly", interval="[0, 1]"
    )
    value_epochs: int = _static(5, "adam: passes over the batch", low=1)
    value_minibatches: int = _static(8, "adam: minibatches a pass; must divide num_envs x num_steps", low=1)
    normalize_advantages: bool = _static(True, "shift and scale the advantages of a batch to mean 0 and variance 1")
    normalize_observations: bool = _static(False, "running normalisation of observations, frozen within an iteration")
    observation_clip: float = _traced(
        10.0, "normalize_observations: clip to ± this many standard deviations", interval="(0, inf)"
    )
    normalize_rewards: bool = _static(
        False, "divide rewards by the running standard deviation of the discounted return"
    )
    reward_clip: float = _traced(
        0.0, "clip rewards to ± this, after their normalisation; 0: never", interval="[0, inf)"
    )
    network: str = _static(
        "auto",
        "what the default policy and value function are made of; auto: cnn for observations of rank 3, else mlp; gru "
        "remembers",
        choices=("auto", "mlp", "cnn", "gru"),
    )
    shared_trunk: bool = _static(
        False,
        "the value function is a small network on what the policy's last layer sees; nothing below learns from it",
    )
    state_dependent_std: bool = _static(False, "a Gaussian policy's σ depends on the observation")
    initial_log_std: float = _traced(
        0.0, "log σ of a Gaussian policy at the start, in units of half the action range", interval="(-inf, inf)"
    )

    def replace(self, **changes: Any) -> Config:
        """A copy with some settings changed."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise UsageError(f"Config has no setting {name!r}{nearest(name, known)}")
        return dataclasses.replace(self, **changes)

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps an iteration, T · N."""
        return self.num_envs * self.num_steps


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: '; did you mean …?' with the closest known ones, or a full stop."""
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(lowered[match] for match in close)}?" if close else "."


def validate(config: Config) -> None:
    """Check every setting that has a concrete value; raise `UsageError` with one sentence.

    Traced values cannot be looked at and pass. Arrays of values (a sweep) are checked value by value.
    """
    for field in dataclasses.fields(config):
        value, meta = getattr(config, field.name), field.metadata
        if "interval" in meta:
            _check_interval(field.name, value, meta["interval"])
        elif meta.get("choices"):
            if value not in meta["choices"]:
                raise UsageError(f"{field.name} must be one of {', '.join(meta['choices'])}, got {value!r}.")
        elif field.type == "bool" and not isinstance(value, bool):
            raise UsageError(f"{field.name} must be True or False, got {value!r}.")
        elif field.type == "int" and (
            isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < meta["low"]
        ):
            raise UsageError(f"{field.name} must be a whole number of at least {meta['low']:g}, got {value!r}.")
    for name, used in (
        ("value_minibatches", config.value_fit == "adam"),
        ("policy_minibatches", config.update in ("ppo", "kl-penalty")),
    ):
        if used and config.steps_per_iteration % getattr(config, name):
            raise UsageError(
                f"{name}={getattr(config, name)} does not divide the batch of num_envs x num_steps = "
                f"{config.num_envs} x {config.num_steps} = {config.steps_per_iteration}; choose a divisor of it."
            )
    low, high = config.smallest_max_kl, config.largest_max_kl
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high:
        raise UsageError(f"smallest_max_kl must not be above largest_max_kl, got {low} and {high}.")
    if config.value_fit != "adam" and isinstance(config.value_clip, (int, float)) and config.value_clip:
        raise UsageError(f"value_clip={config.value_clip} needs value_fit=adam; gauss-newton clips nothing.")
    if config.update != "trpo":
        for name, default in (("radius_rule", "fixed"), ("constraint", "mean-kl"), ("reuse", 1)):
            if getattr(config, name) != default:
                raise UsageError(
                    f"{name}={getattr(config, name)} needs a trust region; use update=trpo, not {config.update}."
                )


def _check_interval(name: str, value: Any, interval: str) -> None:
    """Compare a number, or every number of a concrete array, with an interval such as "(0, 1]"."""
    import numpy as np  # deferred: `trpo-jax --help` needs no NumPy

    if type(value).__name__.endswith("Tracer") or hasattr(value, "_trace"):
        return
    try:
        if isinstance(value, (str, bytes)):  # NumPy would read a number out of it, JAX would not
            raise TypeError
        values = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a number in {interval}, got {value!r}.") from None
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = values >= low if interval[0] == "[" else values > low
    below = values <= high if interval[-1] == "]" else values < high
    if not np.all(above & below):
        raise UsageError(f"{name} must lie in {interval}, got {value}.")
