"""`Config` as a pytree: its traced floats are leaves, all other settings are static."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config import FIELDS, Config
from trpo_jax.env_args import EnvArgs

__all__ = ["Config"]

_ENV_ARG = "env_args."  # prefix of a leaf that is a setting of the environment
# In the order of the fields; a sweep flattens a configuration for each of its agents.
_SETTINGS = tuple((name, field.metadata["static"]) for name, field in FIELDS.items())


def _flatten_with_keys(config: Config) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, Any]]:
    leaves, (static, names) = _flatten_config(config)
    return tuple(zip(map(jax.tree_util.GetAttrKey, names), leaves, strict=True)), (static, names)


def _flatten_config(config: Config) -> tuple[tuple[Any, ...], tuple[Any, Any]]:
    leaves: dict[str, Any] = {}
    static: list[tuple[str, Any]] = []
    for name, is_static in _SETTINGS:
        value = getattr(config, name)
        if name == "env_args":
            static.append((name, tuple((name, type(own), own) for name, own in value.static)))
            leaves |= {f"{_ENV_ARG}{name}": value[name] for name in value.traced}
        elif is_static:
            static.append((name, value if _is_hashable(value) else _ByIdentity(value)))
        else:
            leaves[name] = value
    # Numbers become strong float32 here, at the single entrance to every transformation: a Python float and an array,
    # or a weak and a strong type, would otherwise be two traces. A Config with None among its floats is a tree of axes
    # for `jax.vmap`, whose integers must stay.
    if not any(value is None for value in leaves.values()):
        leaves = {name: _as_float32(value) for name, value in leaves.items()}
    return tuple(leaves.values()), (tuple(static), tuple(leaves))


def _as_float32(value: Any) -> Any:
    if isinstance(value, (int, float, np.number)):
        return np.float32(value)
    if isinstance(value, (jax.Array, np.ndarray)) and (value.dtype != np.float32 or getattr(value, "weak_type", False)):
        return jnp.asarray(value, jnp.float32)
    return value  # a strong float32 already, or a placeholder of a transformation


def _unflatten_config(names: tuple[Any, Any], leaves: Any) -> Config:
    static, traced = names
    config = object.__new__(Config)
    args: dict[str, Any] = {}
    for name, value in zip(traced, leaves, strict=True):
        if name.startswith(_ENV_ARG):
            args[name.removeprefix(_ENV_ARG)] = value
        else:
            object.__setattr__(config, name, value)
    for name, value in static:
        if name == "env_args":
            value = EnvArgs({**args, **{own: kept for own, _, kept in value}}, args)
        object.__setattr__(config, name, value.value if isinstance(value, _ByIdentity) else value)
    return config


class _ByIdentity:
    """Holds a user's object that cannot be hashed (such as a mutable dataclass) among a program's static settings."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


jax.tree_util.register_pytree_with_keys(Config, _flatten_with_keys, _unflatten_config, _flatten_config)
