"""Observations of several named entries, as one vector with a static layout, and the mask of legal actions in it.

All code that stores, moves or normalises observations sees one array. A network gets the entries that it may see. The
mask is stored with its observation, so that every policy that is evaluated there obeys the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax.fields import AUTO
from trpo_jax.sentences import UsageError, nearest, shown

Entries = Mapping[str, tuple[int, ...]]
"""Name and shape of each entry, in the order of the vector."""

MASK = "action_mask"  # the entry that no network sees
WHOLE = "observation"  # the entry of an observation without entries to which a mask was added
_PRIVILEGED = "privileged"  # prefix of entries that the policy does not see


def with_mask(observation: Any, mask: Any) -> dict[str, Any]:
    """Add a mask of legal actions to an observation, with or without entries."""
    parts = observation if isinstance(observation, Mapping) else {WHOLE: observation}
    return {**parts, MASK: jnp.ravel(jnp.asarray(mask))}


def entries_of(observation: Any) -> dict[str, tuple[int, ...]] | None:
    """The layout of an observation (or of shapes): the entries of a mapping in alphabetical order; None for an array.

    An entry that is a structure of several arrays counts as one vector.
    """
    if not isinstance(observation, Mapping):
        return None
    return {str(name): _shape(observation[name]) for name in sorted(observation)}


def flattened(observation: Any) -> jax.Array:
    """Convert an observation to one float32 array: as it is, or its entries one after the other as one vector."""
    if not isinstance(observation, Mapping):
        return jnp.asarray(observation, jnp.float32)
    return flat([observation[name] for name in sorted(observation)])


def flat(observation: Any) -> jax.Array:
    """Concatenate a nested observation to one vector, float32 [D]."""
    return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(observation)])


def _shape(entry: Any) -> tuple[int, ...]:
    leaves = jax.tree.leaves(entry)
    if len(leaves) == 1 and leaves[0] is entry:
        return tuple(entry.shape)
    return (sum(math.prod(leaf.shape) for leaf in leaves),)


def split(entries: Entries, observation: jax.Array) -> dict[str, jax.Array]:
    """Split observations [..., D] into entries [..., *shape]."""
    parts, start = {}, 0
    for name, shape in entries.items():
        end = start + math.prod(shape)
        parts[name] = observation[..., start:end].reshape(*observation.shape[:-1], *shape)
        start = end
    return parts


def join(parts: Mapping[str, jax.Array], entries: Entries) -> jax.Array:
    """Join entries to observations [..., D], in the layout `entries`."""
    flat = [parts[n].reshape(*parts[n].shape[: parts[n].ndim - len(shape)], -1) for n, shape in entries.items()]
    return jnp.concatenate(flat, axis=-1)


def size_of(entries: Entries) -> int:
    """The size D of an observation."""
    return sum(map(math.prod, entries.values()))


def mask_function(entries: Entries | None) -> Callable[[jax.Array], jax.Array] | None:
    """Make `action_mask` of an `Environment` with these entries: legal where the entry of that name is above 0."""
    if entries is None or MASK not in entries:
        return None
    return lambda observation: split(entries, observation)[MASK] > 0


def check_mask(entries: Entries | None, sizes: tuple[int, ...], name: str) -> None:
    """Raise `UsageError` unless a mask among the entries fits choices among so many actions."""
    if entries is None or MASK not in entries:
        return
    if not sizes:
        raise UsageError(f"{name} has a mask of legal actions, {MASK}, but its actions are not discrete; leave it out.")
    if entries[MASK] != (sum(sizes),):
        raise UsageError(
            f"{MASK} of {name} must have an entry for each action, {sum(sizes)} in all, got {entries[MASK][0]}."
        )


def chosen(entries: Entries | None, names: str, name: str) -> tuple[str | None, ...]:
    """The entries that a network sees; (None,), the whole, for an observation without entries.

    Args:
      entries: all entries; None: the observation is a single array.
      names: names separated by commas; "auto": all but the mask and those whose names begin with "privileged".
      name: name of the environment, for messages.

    Raises:
      UsageError: if there is no such entry.
    """
    if entries is None and names == AUTO:
        return (None,)
    if entries is None:
        raise UsageError(f"value_observation={names} names entries, but observations of {name} have none; omit it.")
    known = [n for n in entries if n != MASK]
    if names == AUTO:
        wanted = [n for n in known if not n.startswith(_PRIVILEGED)]
    else:
        wanted = [part.strip() for part in names.split(",")]
    for one in wanted:
        if one not in known:
            raise UsageError(
                f"value_observation names {shown(one)}, but observations of {name} have the entries {', '.join(known)}"
                f"{nearest(one, known)}"
            )
    if not wanted:
        raise UsageError(
            f"observations of {name} have only the entries {', '.join(entries)}, none of which a policy sees."
        )
    return tuple(n for n in known if n in wanted)


def check_entries(entries: Entries, shape: tuple[int, ...], name: str) -> None:
    """Raise `UsageError` unless the entries fit observations of a shape."""
    if tuple(shape) != (size_of(entries),):
        raise UsageError(f"entries of {name} have {size_of(entries)} numbers, but observation_shape is {shape}.")
