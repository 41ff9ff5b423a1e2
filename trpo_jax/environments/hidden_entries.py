"""Wrappers that leave out entries of observations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trpo_jax.environments.base import Environment
from trpo_jax.environments.entries import MASK, Entries, join, size_of
from trpo_jax.environments.wrappers import check_environment, vector_size, with_observations
from trpo_jax.sentences import UsageError, shown


def keep_entries(environment: Environment, names: Sequence[str]) -> Environment:
    """Keep only the named entries of observations; if a mask depends on the whole observation, keep all."""
    assert environment.entries is not None
    entries = {name: shape for name, shape in environment.entries.items() if name in names}
    if len(entries) == len(environment.entries) or _mask_follows_from_all(environment):
        return environment
    return with_observations(
        environment,
        lambda observation: join(environment.split(observation), entries),
        observation_shape=(size_of(entries),),
        entries=entries,
        action_mask=None,  # made again from the entries
    )


def hide_entries(environment: Environment, hidden: Sequence[int] | Sequence[str]) -> Environment:
    """Hide entries of the observations of `environment`: a partially observed task, for a recurrent policy.

    Args:
      environment: an environment whose observations are vectors.
      hidden: indices of the entries to leave out; negative ones count from the end. For observations with named
        entries, their names.

    Raises:
      UsageError: if observations are not vectors, an index is out of range, no entry is left, or a mask of legal
        actions depends on the whole observation.
    """
    check_environment(environment, "hide_entries")
    size = vector_size(environment, "hide_entries")
    if _mask_follows_from_all(environment):
        raise UsageError(
            f"the legal actions of {environment.name} depend on its whole observation, so no entry of it can be hidden."
        )
    if environment.entries is not None:
        return _hide_by_name(environment, environment.entries, hidden)
    entries = np.asarray(hidden)
    are_indices = entries.dtype.kind in "iu" or entries.size == 0
    if entries.ndim != 1 or not are_indices or not ((-size <= entries) & (entries < size)).all():
        raise UsageError(f"hidden must be indices among the {size} entries of {environment.name}, got {shown(hidden)}.")
    kept = np.delete(np.arange(size), entries.astype(int))
    if not kept.size:
        raise UsageError(f"hidden has all {size} entries of {environment.name}; keep at least one.")
    return with_observations(environment, lambda observation: observation[kept], observation_shape=kept.shape)


def _mask_follows_from_all(environment: Environment) -> bool:
    """Whether a mask of legal actions depends on whole observations, and is not an entry of them."""
    return environment.action_mask is not None and MASK not in (environment.entries or {})


def _hide_by_name(environment: Environment, entries: Entries, hidden: Sequence[Any]) -> Environment:
    known = [name for name in entries if name != MASK]
    kept = [name for name in known if name not in hidden]
    if isinstance(hidden, str) or not set(hidden) <= set(known) or not kept:
        raise UsageError(
            f"hidden must be names among the entries of {environment.name}, {', '.join(known)}, and leave one, got "
            f"{shown(hidden)}."
        )
    return keep_entries(environment, [*kept, MASK])
