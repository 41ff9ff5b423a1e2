"""Settings of an environment in the form of `Config.env_args`. Imports no JAX."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from trpo_jax.sentences import UsageError, check_number, shown

PREFIX = "env."
"""Prefix of an environment's setting among other settings: "env.gravity"."""


class EnvArgs(dict[str, Any]):
    """Settings of an environment by name, in alphabetical order; hashable and immutable.

    Attributes:
      traced: names of those that are leaves of a `Config`; the others are static.
    """

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), traced: Iterable[str] = ()):
        super().__init__(sorted(dict(values).items()))
        self.traced = tuple(sorted(traced))

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))

    def __reduce__(self) -> Any:
        return EnvArgs, (dict(self), self.traced)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("env_args cannot be changed; give others with config.replace(env_args=…)")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _refuse

    @property
    def static(self) -> tuple[tuple[str, Any], ...]:
        """Names and values of the static ones."""
        return tuple((name, value) for name, value in self.items() if name not in self.traced)


def make_env_args(values: Any, env: Any) -> EnvArgs:
    """Convert settings of `env` to their form in `Config`: floats are traced; whole numbers, truth values, words not.

    A suite other than gymnax, or a factory, uses them to build the environment, so all of them are static there.

    Raises:
      UsageError: if they are not a mapping from names to such values.
    """
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise UsageError(f"env_args must map names of an environment's settings to values, got {shown(values)}.")
    suite = env if isinstance(env, str) and ("/" in env or ":" in env) else ""
    if isinstance(values, EnvArgs):
        traced = set(values.traced)
    else:
        traced = {name for name, value in values.items() if not _is_static(value)}
    for name, value in values.items():
        if value is None and not suite:  # among axes for `jax.vmap`
            continue
        check_env_arg(name, value)
        if suite and name in traced and not isinstance(value, float):
            raise UsageError(f"{PREFIX}{name} of {suite} must be one number, truth value or word, got {shown(value)}.")
    return EnvArgs(values, () if suite else traced)


def check_env_arg(name: str, value: Any, source: str = "") -> None:
    """Raise `UsageError` unless an environment's setting, from the file `source`, may have this value."""
    label = f"{PREFIX}{name} in {source}" if source else f"{PREFIX}{name}"
    if not name.isidentifier():
        raise UsageError(f"{shown(label)} must be {PREFIX}NAME with the name of a setting of the environment.")
    if isinstance(value, str) or type(value).__name__ in ("bool", "bool_"):
        return
    if isinstance(value, (Mapping, list, tuple, bytes, type(None))):
        raise UsageError(f"{label} must be one number, truth value or word, got {shown(value)}.")
    whole = isinstance(value, numbers.Integral)
    check_number(label, value, whole=whole, interval="[-2147483648, 2147483647]" if whole else "[-3e38, 3e38]")


def _is_static(value: Any) -> bool:
    return isinstance(value, (numbers.Integral, str)) or type(value).__name__ == "bool_"
