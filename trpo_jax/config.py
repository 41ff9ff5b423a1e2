"""Every setting once: its name, default, meaning and range. Imports no JAX, so the command line can show it at once.

A setting is *static* if it changes a shape, a loop length or a Python branch: each value compiles a program of its
own. Every other setting is a float that is *traced*: one program serves all its values, and `jax.vmap` over it works.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import struct
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from trpo_jax.steps import defaults


class UsageError(ValueError):
    """A setting, file or environment cannot be used. The message is one sentence with the mend in it."""


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
    default: Any, help: str, *, low: int = 1, high: int = 10_000, choices: tuple[str, ...] = (), used: _Used = ()
) -> Any:
    meta: dict[str, Any] = {"help": help, "static": True, "choices": choices, "flag": True, "used": used}
    if type(default) is int:
        meta["interval"] = f"[{low}, {high}]"
    return dataclasses.field(default=default, metadata=meta)


def _traced(default: float, help: str, *, interval: str, static: bool = False, used: _Used = ()) -> Any:
    meta = {"help": help, "static": static, "interval": interval, "flag": True, "used": used}
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
    fisher_fraction: float = _traced(
        defaults.FISHER_FRACTION,
        "share of the batch that curvature is estimated from",
        interval="(0, 1]",
        static=True,
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
        for name, field in _FIELDS.items():
            value = getattr(self, name)
            if value is not field.default and not (axes and name in _TRACED):
                check_setting(name, value)

    def replace(self, **changes: Any) -> Config:
        """A copy with some settings changed."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise UsageError(f"Config has no setting {name!r}{nearest(name, known)}")
        return dataclasses.replace(self, **changes)

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps per iteration, T · N."""
        return self.num_envs * self.num_steps


_FIELDS = {field.name: field for field in dataclasses.fields(Config)}
_TRACED = frozenset(name for name, field in _FIELDS.items() if not field.metadata["static"])
_MOST_SAMPLES = 2**31 - 1  # what an int32 can index
_REFUSED = "constraint", "radius_rule", "reuse", "value_clip"  # these ask for a method of their own

SEEDS = 2**31  # seeds lie below it: larger ones would train the agents of smaller ones
LIMITS: dict[str, tuple[bool, str]] = {
    "agent": (True, "[0, 999999]"),
    "agents_per_device": (True, "[1, 1000000]"),
    "batch": (True, "[1, 10000]"),
    "checkpoint_seconds": (False, "[0, 1e9]"),
    "count": (True, "[1, 1000000]"),
    "max_steps": (True, "[1, 2147483647]"),
    "num_agents": (True, "[1, 1000000]"),
    "num_devices": (True, "[1, 256]"),
    "num_episodes": (True, "[1, 1000000]"),
    "num_processes": (True, "[1, 1000000]"),
    "num_seeds": (True, "[1, 1000000]"),
    "num_trials": (True, "[1, 1000000]"),
    "process_id": (True, "[0, 999999]"),
    "repetitions": (True, "[1, 10000]"),
    "seed": (True, f"[0, {SEEDS - 1}]"),
    "threads": (True, "[1, 4096]"),
    "threshold": (False, "[-1e30, 1e30]"),
    "total_steps": (True, "[1, 1000000000000000]"),
}
"""Numbers beside the settings, on the command line and in files: whether they are whole, and their range."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: '; did you mean …?' with the closest known ones, or a full stop."""
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower()[:100], lowered, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(lowered[match] for match in close)}?" if close else "."


def counted(number: int, noun: str) -> str:
    """A number and what it counts: "1 episode", "2,000 episodes"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """What an exception says, on one line, short, and without a full stop."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    said = error.args[0] if isinstance(error, KeyError) and error.args else error  # the str() of a KeyError is quoted
    text = str(said).strip().splitlines()
    return text[0].rstrip(".")[:200] if text else type(error).__name__


def shown(value: Any) -> str:
    """A value within a sentence: on one line, and short."""
    try:
        text = " ".join((repr(value) if isinstance(value, str) else str(value)).split())
    except Exception:  # more digits than Python prints, or an object whose text fails
        text = "a number too long to be shown" if isinstance(value, int) else f"an object of {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]} …"


def validate(config: Config) -> None:
    """Check every setting with a concrete value, and whether they go together; raise `UsageError` with one sentence.

    Traced values cannot be looked at and pass. Arrays of values (a sweep) are checked value by value.
    """
    for name in _FIELDS:
        check_setting(name, getattr(config, name))
    for name, used in (
        ("value_minibatches", config.value_fit == "adam"),
        ("policy_minibatches", config.update in ("ppo", "kl-penalty")),
    ):
        if used and config.steps_per_iteration % getattr(config, name):
            raise UsageError(
                f"{name}={getattr(config, name)} does not divide the batch of num_envs x num_steps = "
                f"{config.num_envs} x {config.num_steps} = {config.steps_per_iteration}; choose a divisor of it."
            )
    if (samples := config.steps_per_iteration * config.reuse) > _MOST_SAMPLES:
        raise UsageError(
            f"num_envs x num_steps x reuse = {samples:,} samples per update are more than {_MOST_SAMPLES:,}; lower one "
            "of them."
        )
    low, high = config.smallest_max_kl, config.largest_max_kl
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high:
        raise UsageError(f"smallest_max_kl must not be above largest_max_kl, got {low} and {high}.")
    for name in _REFUSED:
        value, default = getattr(config, name), _FIELDS[name].default
        if isinstance(value, (int, float, str)) and value != default and (why := without_effect(config, name)):
            raise UsageError(f"{name}={value} {why}.")


def check_setting(name: str, value: Any, source: str = "") -> None:
    """Raise `UsageError` unless a setting may have this value; a traced one cannot be looked at.

    The one sentence names the setting and `source`, the file that it comes from.
    """
    field = _FIELDS[name]
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
    elif name in ("policy", "value") and value is not None and not hasattr(value, "initial_carry"):
        raise UsageError(f"{label} must be None or a trpo_jax.Network(init, apply), got {shown(value)}.")


def check_number(name: str, value: Any, *, whole: bool, interval: str) -> None:
    """Compare a number, or every number of a concrete array, with an interval such as "(0, 1]", as float32 has it.

    What float32 cannot tell from a bound lies on it: programs compute in float32, and a subnormal number is 0 to them.

    Raises:
      UsageError: with one sentence.
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    if whole:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
            raise UsageError(f"{name} must be a whole number from {low:,.0f} to {high:,.0f}, got {shown(value)}.")
        return
    if _is_abstract(value):
        return
    is_scalar = isinstance(value, (int, float)) and not isinstance(value, bool)
    for extreme in (_as_float32(value),) if is_scalar else _extremes(name, value, interval):  # NaN compares as false
        above = extreme >= low if interval[0] == "[" else extreme > low
        below = extreme <= high if interval[-1] == "]" else extreme < high
        if not (above and below):
            rounded = is_scalar and value != extreme and extreme in (0, 1)
            note = f", which is {extreme:g} in float32" if rounded else ""
            raise UsageError(f"{name} must lie in {interval}, got {shown(value)}{note}.")


def _is_abstract(value: Any) -> bool:
    """Whether a value cannot be looked at: traced, only a shape, or on other hosts."""
    jax = sys.modules.get("jax")  # without it there are no such values
    if jax is None or not hasattr(value, "dtype"):
        return False
    if isinstance(value, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return True
    return isinstance(value, jax.Array) and not value.is_fully_addressable


def _as_float32(value: float) -> float:
    try:
        (single,) = struct.unpack("f", struct.pack("f", value))
    except (OverflowError, struct.error):  # the second for a whole number of more than 308 digits
        return float("inf") if value > 0 else float("-inf")
    return 0.0 if abs(single) < 2.0**-126 else single


def _extremes(name: str, value: Any, interval: str) -> tuple[float, ...]:
    """The least and the greatest number of an array, both NaN if one is."""
    import numpy as np  # deferred: `trpo-jax --help` needs no NumPy

    try:
        if not hasattr(value, "dtype") or np.dtype(value.dtype).kind in "bcOSUmM":
            raise TypeError
        array = np.asarray(value)
        return tuple(_as_float32(float(number)) for number in (array.min(), array.max())) if array.size else ()
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a number in {interval}, got {shown(value)}.") from None


def check_limits(values: Mapping[str, Any], source: str = "") -> None:
    """Check the numbers among `values` that are no settings, see `LIMITS`; None is not given.

    Raises:
      UsageError: with one sentence, which names `source`, a file.
    """
    for name, (whole, interval) in LIMITS.items():
        if (value := values.get(name)) is not None:
            check_number(f"{name} in {source}" if source else name, value, whole=whole, interval=interval)
    seed, number = values.get("seed"), values.get("num_seeds")
    if seed is not None and number is not None and seed + number > SEEDS:
        raise UsageError(
            f"seed={seed} and the num_seeds={number} after it reach beyond {SEEDS - 1}, the largest seed; lower one."
        )


def without_effect(config: Config, name: str) -> str:
    """Why a setting changes nothing beside the others: "needs update=ppo; with …"; empty if it has an effect."""
    alternatives = _FIELDS[name].metadata["used"]
    missing: list[str] = []
    for conditions in alternatives:
        chosen = {n: getattr(config, n) for n in conditions}
        unmet = [
            n
            for n, values in conditions.items()
            if (chosen[n] not in values and not callable(chosen[n])) or without_effect(config, n)
        ]
        if not unmet:
            return ""
        missing.append(unmet[0])
    if not alternatives:
        return ""
    needs = " or ".join(
        f"{unmet}={' or '.join(map(str, conditions[unmet]))}"
        for unmet, conditions in zip(missing, alternatives, strict=True)
    )
    found = " and ".join(f"{unmet}={getattr(config, unmet)}" for unmet in dict.fromkeys(missing))
    return f"needs {needs}; with {found} it has no effect"
