"""Every setting once: its name, default, meaning and range. Imports no JAX, so the command line can show it at once.

A setting is *static* if it changes a shape, a loop length or a Python branch: each value compiles a program of its
own. Every other setting is a float that is *traced*: one program serves all its values, and `jax.vmap` over it works.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

from trpo_jax.env_args import EnvArgs, make_env_args
from trpo_jax.sentences import UsageError, check_number, nearest, shown
from trpo_jax.steps import defaults

ALGORITHMS = {
    "trpo": "trpo_jax.algorithms.trpo",
    "policy-gradient": "trpo_jax.algorithms.policy_gradient",
    "ppo": "trpo_jax.algorithms.ppo",
    "kl-penalty": "trpo_jax.algorithms.kl_penalty",
}
"""Ways to update a policy, each with the module that makes it."""

VALUE_FITS = {"gauss-newton": "trpo_jax.algorithms.gauss_newton", "adam": "trpo_jax.algorithms.adam"}
"""Ways to fit a value function, each with the module that makes it."""

_Used = tuple[Mapping[str, tuple[Any, ...]], ...]
"""When a setting has an effect: where one of these holds, each named setting having one of the values; (): always."""

_TRPO: _Used = ({"update": ("trpo",)},)
_GRADIENT_STEPS: _Used = ({"update": ("policy-gradient", "ppo", "kl-penalty")},)
_EPOCHS: _Used = ({"update": ("ppo", "kl-penalty")},)
_SEARCH: _Used = ({"update": ("trpo",), "line_search": ("auto", "backtracking", "parallel")},)
_ADAPTIVE: _Used = ({"radius_rule": ("ratio", "divergence")},)
_CURVATURE: _Used = (*_TRPO, {"value_fit": ("gauss-newton",)})
_GAUSS_NEWTON: _Used = ({"value_fit": ("gauss-newton",)},)
_ADAM: _Used = ({"value_fit": ("adam",)},)


def _static(
    default: Any, help: str, *, high: int = 10_000, interval: str = "", choices: tuple[str, ...] = (), used: _Used = ()
) -> Any:
    meta: dict[str, Any] = {"help": help, "static": True, "choices": choices, "flag": True, "used": used}
    if interval or type(default) is int:
        meta["interval"] = interval or f"[1, {high}]"
    return dataclasses.field(default=default, metadata=meta)


def _traced(default: float, help: str, *, interval: str, used: _Used = ()) -> Any:
    meta = {"help": help, "static": False, "interval": interval, "flag": True, "used": used}
    return dataclasses.field(default=default, metadata=meta)


def _object(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "static": True, "flag": False, "used": ()})


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a training run. A pytree: floats are leaves, the rest is static.

    `help` and ranges stand in each field's metadata; `trpo-jax train --help` prints them. `config.replace(name=value)`
    returns a changed copy. Each value is checked as the Config is made, which is the last moment at which it is
    concrete; whether values go together is checked at use, by `validate`, so that they can be replaced one by one.
    """

    env: Any = _object("CartPole-v1", "a gymnax name, an Environment, or any object with gymnax's six-value step")
    env_args: Any = _object(EnvArgs(), "settings of the environment by name: floats are traced, the others static")
    max_steps: int = _static(
        0, "time limit of an episode, beside the environment's; 0: none", interval="[0, 2147483647]"
    )
    policy: Any = _object(None, "a Network whose apply returns a distribution; None: see `network`")
    value: Any = _object(None, "a Network whose apply returns V, [...]; None: see `network`")
    num_envs: int = _static(16, "environments stepped in parallel, N", high=10_000_000)
    num_steps: int = _static(128, "steps in each environment per iteration, T", high=10_000_000)
    num_iterations: int = _static(150, "iterations (one rollout and one update each)", high=10_000_000)
    gamma: float = _traced(0.99, "discount γ", interval="[0, 1]")
    gae_lambda: float = _traced(0.98, "λ of generalized advantage estimation", interval="[0, 1]")
    baseline: bool = _static(True, "weight actions by advantages; False: by returns, as REINFORCE without a baseline")
    update: Any = _static(
        "trpo",
        "how the policy is updated; all but trpo take gradient steps: one (policy-gradient), or epochs of minibatches "
        "on the clipped (ppo) or the penalised surrogate (kl-penalty)",
        choices=tuple(ALGORITHMS),
    )
    max_kl: float = _traced(
        defaults.MAX_KL,
        "trust-region radius δ: bound on the divergence of an update, nats; the first, if it adapts",
        interval="(0, 1e6]",
        used=_TRPO,
    )
    constraint: str = _static(
        "mean-kl",
        "the divergence that δ bounds: mean or maximum of KL(old‖new) over the batch, or the mean of KL(new‖old)",
        choices=("mean-kl", "max-kl", "reverse-kl"),
        used=_TRPO,
    )
    radius_rule: str = _static(
        "fixed",
        "ratio: δ grows while the realised gain, measured on the next batch, is near the predicted one, and shrinks "
        "where it is not; divergence: δ moves until the divergence is near target_kl",
        choices=("fixed", "ratio", "divergence"),
        used=_TRPO,
    )
    smallest_max_kl: float = _traced(1e-5, "radius_rule: lower bound of δ, nats", interval="(0, 1e6]", used=_ADAPTIVE)
    largest_max_kl: float = _traced(1.0, "radius_rule: upper bound of δ, nats", interval="(0, 1e6]", used=_ADAPTIVE)
    target_kl: float = _traced(
        0.01,
        "divergence that radius_rule=divergence and kl-penalty aim at",
        interval="(0, 1e6]",
        used=({"radius_rule": ("divergence",)}, {"update": ("kl-penalty",)}),
    )
    anneal_max_kl: float = _traced(
        0.0,
        "share of δ that is gone at the end of the run, linearly; 1: shrinks towards 0",
        interval="[0, 1]",
        used=_TRPO,
    )
    reuse: int = _static(1, "batches an update learns from: the newest and reuse − 1 before it", used=_TRPO, high=1_000)
    entropy_coefficient: float = _traced(
        0.0,
        "weight of the policy's mean entropy in the objective; of a default Gaussian it asks for log σ up to 2 at "
        "most, in units of half the action range",
        interval="[0, 1e6]",
    )
    cg_damping: float = _traced(
        defaults.CG_DAMPING,
        "damping λ_d of the Fisher matrix in conjugate gradient",
        interval="[0, 1e6]",
        used=_TRPO,
    )
    cg_iterations: int = _static(defaults.CG_ITERATIONS, "conjugate-gradient iterations k at most", used=_TRPO)
    cg_tolerance: float = _traced(
        defaults.CG_TOLERANCE,
        "relative residual at which conjugate gradient stops before k; 0: never",
        interval="[0, 1)",
        used=_CURVATURE,
    )
    fisher_fraction: float = _static(
        defaults.FISHER_FRACTION,
        "share of the batch that curvature is estimated from",
        interval="(0, 1]",
        used=_CURVATURE,
    )
    line_search: str = _static(
        "auto",
        "one candidate after the other, or all in one batched pass; auto: parallel on accelerators; none: the full "
        "step is taken as it is, which is the natural gradient method",
        choices=("auto", "backtracking", "parallel", "none"),
        used=_TRPO,
    )
    line_search_shrink: float = _traced(
        defaults.LINE_SEARCH_SHRINK,
        "factor α between candidates of the line search",
        interval="(0, 1)",
        used=_SEARCH,
    )
    line_search_steps: int = _static(
        defaults.LINE_SEARCH_STEPS, "candidates that the line search tries", used=_SEARCH, high=1_000
    )
    policy_optimizer: str = _static(
        "adam",
        "gradient steps: by Adam, or plain, θ + learning rate · gradient",
        choices=("adam", "sgd"),
        used=_GRADIENT_STEPS,
    )
    policy_learning_rate: float = _traced(
        1e-3, "gradient steps: learning rate", interval="[0, 1e6]", used=_GRADIENT_STEPS
    )
    policy_epochs: int = _static(10, "ppo, kl-penalty: passes over the batch", used=_EPOCHS)
    policy_minibatches: int = _static(
        8,
        "ppo, kl-penalty: minibatches per pass, shuffled anew in each; must divide the batch",
        used=_EPOCHS,
        high=10_000_000,
    )
    clip_ratio: float = _traced(
        0.2, "ppo: ε, the ratio counts within [1 − ε, 1 + ε]", interval="(0, 1e6]", used=({"update": ("ppo",)},)
    )
    max_grad_norm: float = _traced(
        0.5,
        "ppo, kl-penalty: a longer gradient of a minibatch is scaled to this norm; 0: never",
        interval="[0, 1e6]",
        used=_EPOCHS,
    )
    initial_penalty: float = _traced(
        1.0,
        "kl-penalty: coefficient β of the KL at the start; adapts to target_kl",
        interval="(0, 1e6]",
        used=({"update": ("kl-penalty",)},),
    )
    value_fit: Any = _static(
        "gauss-newton",
        "how the value function is fitted: one damped Gauss-Newton step, or epochs of minibatches by Adam",
        choices=tuple(VALUE_FITS),
    )
    value_damping: float = _traced(
        defaults.VALUE_DAMPING,
        "gauss-newton: damping λ of the value function's matrix",
        interval="[0, 1e6]",
        used=_GAUSS_NEWTON,
    )
    value_cg_iterations: int = _static(
        defaults.VALUE_CG_ITERATIONS, "gauss-newton: conjugate-gradient iterations at most", used=_GAUSS_NEWTON
    )
    value_learning_rate: float = _traced(3e-3, "adam: learning rate", interval="[0, 1e6]", used=_ADAM)
    value_clip: float = _traced(
        0.0,
        "adam: V counts within ± this of what it was, where that raises the loss; 0: everywhere",
        interval="[0, 1e12]",
        used=_ADAM,
    )
    anneal_learning_rates: float = _traced(
        0.0,
        "share of both learning rates that is gone at the end of the run, linearly",
        interval="[0, 1]",
        used=(*_GRADIENT_STEPS, *_ADAM),
    )
    value_epochs: int = _static(5, "adam: passes over the batch", used=_ADAM)
    value_minibatches: int = _static(
        8,
        "adam: minibatches per pass; must divide num_envs x num_steps",
        used=_ADAM,
        high=10_000_000,
    )
    normalize_advantages: bool = _static(
        True,
        "shift and scale the advantages of a batch to mean 0 and variance 1; with baseline=False only scale the "
        "returns, to a mean square of 1",
    )
    normalize_observations: bool = _static(
        False,
        "running normalisation of observations, frozen within an iteration; starts from a rollout that nothing is "
        "learned from",
    )
    observation_clip: float = _traced(
        defaults.OBSERVATION_CLIP,
        "normalize_observations: clip to ± this many standard deviations",
        interval="(0, 1e6]",
        used=({"normalize_observations": (True,)},),
    )
    normalize_rewards: bool = _static(
        False, "divide rewards by the running standard deviation of the discounted return"
    )
    reward_clip: float = _traced(
        0.0, "clip rewards to ± this, after their normalisation; 0: never", interval="[0, 1e12]"
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
        0.0, "log σ of a Gaussian policy at the start, in units of half the action range", interval="[-20, 20]"
    )

    def __post_init__(self) -> None:
        axes = any(getattr(self, name) is None for name in _TRACED)  # a tree of axes for `jax.vmap`: integers and None
        for name, field in FIELDS.items():
            value = getattr(self, name)
            if value is not field.default and not (axes and name in _TRACED):
                check_setting(name, value)
        object.__setattr__(self, "env_args", make_env_args(self.env_args, self.env))

    def replace(self, **changes: Any) -> Config:
        """A copy with some settings changed."""
        for name in changes:
            if name not in FIELDS:
                raise UsageError(f"Config has no setting {name!r}{nearest(name, FIELDS)}")
        return dataclasses.replace(self, **changes)

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps per iteration, T · N."""
        return self.num_envs * self.num_steps


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
_TRACED = frozenset(name for name, field in FIELDS.items() if not field.metadata["static"])


def check_setting(name: str, value: Any, source: str = "") -> None:
    """Raise `UsageError` unless a setting, from the file `source`, may have this value; traced ones all pass."""
    field = FIELDS[name]
    meta, label = field.metadata, f"{name} in {source}" if source else name
    if "interval" in meta:
        if meta["static"] and field.type == "float" and not isinstance(value, numbers.Real):  # an array is traced
            raise UsageError(f"{label} must be a number in {meta['interval']}, got {shown(value)}.")
        check_number(label, value, whole=field.type == "int", interval=meta["interval"])
    elif meta.get("choices"):
        own = name in ("update", "value_fit") and callable(value)  # a function that makes one, see algorithms/base.py
        if not own and (not isinstance(value, str) or value not in meta["choices"]):
            raise UsageError(f"{label} must be one of {', '.join(meta['choices'])}, got {shown(value)}.")
    elif field.type == "bool" and not isinstance(value, bool):
        raise UsageError(f"{label} must be True or False, got {shown(value)}.")
    elif name == "env_args":
        make_env_args(value, None)
    elif name in ("policy", "value") and value is not None and not hasattr(value, "initial_carry"):
        raise UsageError(f"{label} must be None or a trpo_jax.Network(init, apply), got {shown(value)}.")
