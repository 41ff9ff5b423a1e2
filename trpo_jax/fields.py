"""The kinds of settings in `Config`: how each is declared, when it has an effect, and which values it takes."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, get_args

from trpo_jax.env_args import make_env_args
from trpo_jax.sentences import UsageError, check_number, shown

# Words that a setting may be, of which the first is the default: in this form type checkers know them, too.
UpdateName = Literal["trpo", "policy-gradient", "ppo", "kl-penalty"]
ValueFitName = Literal["gauss-newton", "adam"]
Constraint = Literal["mean-kl", "max-kl", "reverse-kl"]
Bonus = Literal["entropy", "log-barrier"]
RadiusRule = Literal["fixed", "ratio", "divergence"]
LineSearch = Literal["auto", "backtracking", "parallel", "none"]
PolicyOptimizer = Literal["adam", "sgd"]
NetworkKind = Literal["auto", "mlp", "cnn", "gru"]
Activation = Literal["auto", "tanh", "relu", "swish", "gelu"]
Initialisation = Literal["orthogonal", "lecun-normal"]
ActionDistribution = Literal["gaussian", "tanh", "beta"]

ALGORITHMS = {name: f"trpo_jax.algorithms.{name.replace('-', '_')}" for name in get_args(UpdateName)}
"""Policy updates by name, each with the module that makes it."""

VALUE_FITS = {name: f"trpo_jax.algorithms.{name.replace('-', '_')}" for name in get_args(ValueFitName)}
"""Value fits by name, each with the module that makes it."""

NEVER = 1e30
"""A `stop_at_return` that no agent reaches."""

AUTO = "auto"
NONE = "none"
_MOST_LAYERS = 64
_WIDEST = 65_536

Used = tuple[Mapping[str, tuple[Any, ...]], ...]
"""When a setting has an effect: if in one of these each named setting has one of the values; (): always."""

TRPO: Used = ({"update": ("trpo",)},)
GRADIENT_STEPS: Used = ({"update": ("policy-gradient", "ppo", "kl-penalty")},)
PPO: Used = ({"update": ("ppo",)},)
KL_PENALTY: Used = ({"update": ("kl-penalty",)},)
EPOCHS: Used = ({"update": ("ppo", "kl-penalty")},)
SEARCH: Used = ({"update": ("trpo",), "line_search": ("auto", "backtracking", "parallel")},)
ADAPTIVE: Used = ({"radius_rule": ("ratio", "divergence")},)
CURVATURE: Used = (*TRPO, {"value_fit": ("gauss-newton",)})
GAUSS_NEWTON: Used = ({"value_fit": ("gauss-newton",)},)
ADAM: Used = ({"value_fit": ("adam",)},)
OWN_VALUE: Used = ({"value": (None,)},)
OWN_POLICY: Used = ({"policy": (None,)},)
OWN_NETWORK: Used = (*OWN_POLICY, *OWN_VALUE)
VIEW: Used = ({"value": (None,), "shared_trunk": (False,)},)
HIDDEN: Used = ({"policy": (None,)}, {"value": (None,), "value_hidden": (AUTO,), "shared_trunk": (False,)})
GAUSSIAN: Used = ({"action_distribution": ("gaussian", "tanh")},)
CONVOLUTIONS: Used = tuple({"network": ("auto", "cnn"), **one} for one in OWN_NETWORK)


class _AtLeast(tuple[str]):
    """Every whole number from a smallest one on, for a condition; in a sentence, "n or more"."""

    smallest: int

    def __new__(cls, smallest: int) -> _AtLeast:
        self = super().__new__(cls, (f"{smallest} or more",))
        self.smallest = smallest
        return self

    def __contains__(self, value: object) -> bool:
        return isinstance(value, numbers.Integral) and int(value) >= self.smallest


EVALUATED: Used = ({"eval_every": _AtLeast(1)},)
CLIPPED: Used = (*PPO, {"update": ("trpo",), "natural_gradient_steps": _AtLeast(2)})


def static(default: Any, help: str, *, high: int = 10_000, interval: str = "", used: Used = ()) -> Any:
    """Declare a setting with one program per value: a number or a truth value."""
    meta: dict[str, Any] = {"kind": type(default).__name__, "help": help, "static": True, "flag": True, "used": used}
    if interval or type(default) is int:
        meta["interval"] = interval or f"[1, {high}]"
    return dataclasses.field(default=default, metadata=meta)


def one_of(words: Any, help: str, *, used: Used = ()) -> Any:
    """Declare a setting that is one of the words of a `Literal`, by default the first; each is a program of its own."""
    choices = get_args(words)
    meta = {"kind": "str", "help": help, "static": True, "choices": choices, "flag": True, "used": used}
    return dataclasses.field(default=choices[0], metadata=meta)


def traced(default: float, help: str, *, interval: str, used: Used = ()) -> Any:
    """Declare a number for which one program serves all values."""
    meta = {"kind": "float", "help": help, "static": False, "interval": interval, "flag": True, "used": used}
    return dataclasses.field(default=default, metadata=meta)


def widths(default: Any, help: str, *, used: Used) -> Any:
    """Declare the widths of layers, a tuple of whole numbers; if the default is "auto", that is allowed, too."""
    meta = {"kind": "widths", "help": help, "static": True, "flag": True, "used": used}
    return dataclasses.field(default=default, metadata=meta)


def text(default: str, help: str, *, kind: str = "str", used: Used = ()) -> Any:
    """Declare words that are checked where they are used."""
    meta = {"kind": kind, "help": help, "static": True, "flag": True, "used": used}
    return dataclasses.field(default=default, metadata=meta)


def own_object(default: Any, help: str) -> Any:
    """Declare a setting that no flag and no file can set."""
    meta = {"kind": "object", "help": help, "static": True, "flag": False, "used": ()}
    return dataclasses.field(default=default, metadata=meta)


def as_widths(value: Any) -> Any:
    """Convert widths to a tuple or "auto": from a list, or from text such as "256,256"; "[]" is no layer.

    Anything else is returned as it is, for `check_value` to refuse.
    """
    if isinstance(value, str) and value.strip() not in ("", AUTO):
        inner = value.strip().removeprefix("[").removeprefix("(").rstrip("])").strip().removesuffix(",")
        try:
            return tuple(int(part) for part in inner.split(",")) if inner else ()
        except ValueError:
            return value
    if isinstance(value, (list, tuple)):
        return tuple(int(width) if is_whole(width) else width for width in value)
    return value.strip() if isinstance(value, str) else value


def as_held(field: Any, value: Any, env: Any) -> Any:
    """Convert a setting to its form in `Config`: widths are tuples, environment settings `EnvArgs`, ranges text."""
    if field.name == "env_args":
        return make_env_args(value, env)
    held = {"widths": as_widths, "ranges": as_ranges}.get(field.metadata["kind"])
    return held(value) if held else value


def as_ranges(value: Any) -> Any:
    """Convert ranges of an environment's settings to text, "gravity=5..20 length=0.4..0.6", from that or a mapping.

    Anything else is returned as it is, for `check_value` to refuse.
    """
    if not isinstance(value, Mapping):
        return value
    ends = {
        name: ends if isinstance(ends, (list, tuple)) and len(ends) == 2 else (ends, "") for name, ends in value.items()
    }
    return " ".join(f"{name}={low}..{high}" for name, (low, high) in sorted(ends.items())) or NONE


def parse_ranges(text: str, label: str = "randomize") -> dict[str, tuple[float, float]]:
    """Parse ranges to {name: (low, high)}; raise `UsageError` with one sentence if they are wrong."""
    found = {}
    for part in [] if text == NONE else text.split():
        name, equals, ends = part.partition("=")
        low, dots, high = ends.partition("..")
        if name in found:
            raise UsageError(f"{label} has two ranges of {name}; give one.")
        try:
            found[name] = float(low), float(high)
            sound = name.isidentifier() and equals and dots and -math.inf < found[name][0] <= found[name][1] < math.inf
        except ValueError:
            sound = False
        if not sound:
            raise UsageError(
                f"{label} must be ranges such as gravity=5..20 (in files {{ gravity = [5, 20] }}), got {shown(part)}."
            )
    return found


def as_text(value: Any) -> Any:
    """A setting in the form of a flag, a table or a database: widths become text, "256,256"; others stay."""
    return (",".join(map(str, value)) or "[]") if isinstance(value, tuple) else value


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of Python or NumPy; a truth value is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_value(field: Any, label: str, value: Any) -> None:
    """Raise `UsageError` unless a field of `Config`, called `label`, may have this value; traced values always pass."""
    meta = field.metadata
    if "interval" in meta:
        if meta["static"] and meta["kind"] == "float" and not isinstance(value, numbers.Real):  # an array is traced
            raise UsageError(f"{label} must be a number in {meta['interval']}, got {shown(value)}.")
        check_number(label, value, whole=meta["kind"] == "int", interval=meta["interval"])
    elif meta["kind"] == "widths":
        _check_widths(field, label, value)
    elif meta.get("choices"):
        own = field.name in ("update", "value_fit") and callable(value)  # a function as in algorithms/base.py
        if not own and (not isinstance(value, str) or value not in meta["choices"]):
            raise UsageError(f"{label} must be one of {', '.join(meta['choices'])}, got {shown(value)}.")
    elif meta["kind"] == "ranges" and not callable(value):
        if not isinstance(value, str):
            raise UsageError(
                f"{label} must be ranges, or a randomization_fn of Brax or Playground, got {shown(value)}."
            )
        parse_ranges(value, label)
    elif meta["kind"] == "str" and not (isinstance(value, str) and value.strip()):
        raise UsageError(f"{label} must be text, got {shown(value)}.")
    elif meta["kind"] == "bool" and not _is_bool(value):
        raise UsageError(f"{label} must be True or False, got {shown(value)}.")
    elif field.name == "env_args":
        make_env_args(value, None)
    elif field.name in ("policy", "value") and value is not None and not hasattr(value, "initial_carry"):
        raise UsageError(f"{label} must be None or a trpo_jax.Network(init, apply), got {shown(value)}.")


def _is_bool(value: Any) -> bool:
    """Whether this is True or False, of Python or of NumPy, which need not be imported."""
    return isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"))


def _check_widths(field: Any, label: str, value: Any) -> None:
    if isinstance(value, str) and value == AUTO == field.default:
        return
    sound = isinstance(value, tuple) and len(value) <= _MOST_LAYERS
    if not sound or not all(is_whole(width) and 1 <= width <= _WIDEST for width in value):
        default = f" or {AUTO}" if field.default == AUTO else ""
        raise UsageError(
            f"{label} must be widths of layers such as 256,256 (in files [256, 256]){default}, each from 1 to "
            f"{_WIDEST:,}, at most {_MOST_LAYERS} layers, got {shown(value)}."
        )
