"""Observations of several named entries, as one vector with a static layout, and the mask of legal actions among them.

Whatever keeps, moves or normalises observations sees one array. A network is given the entries that it may see; the
mask is stored with the observation that it belongs to, so that every policy that looks at it obeys the same one.
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
WHOLE = "observation"  # that of an observation which had no entries before a mask was put beside it
_PRIVILEGED = "privileged"  # what begins the name of an entry that the policy does not see


def with_mask(observation: Any, mask: Any) -> dict[str, Any]:
    """An observation, of entries or without, with a mask of legal actions."""
    parts = observation if isinstance(observation, Mapping) else {WHOLE: observation}
    return {**parts, MASK: jnp.ravel(jnp.asarray(mask))}


def entries_of(observation: Any) -> dict[str, tuple[int, ...]] | None:
    """The layout of an observation (shapes will do): of a mapping its entries in alphabetical order; None of an array.

    An entry that is no array but a structure of some counts as one vector.
    """
    if not isinstance(observation, Mapping):
        return None
    return {str(name): _shape(observation[name]) for name in sorted(observation)}


def flattened(observation: Any) -> jax.Array:
    """An observation as one array, float32: as it is, or its entries one after the other as one vector."""
    if not isinstance(observation, Mapping):
        return jnp.asarray(observation, jnp.float32)
    leaves = [leaf for name in sorted(observation) for leaf in jax.tree.leaves(observation[name])]
    return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in leaves])


def _shape(entry: Any) -> tuple[int, ...]:
    leaves = jax.tree.leaves(entry)
    if len(leaves) == 1 and leaves[0] is entry:
        return tuple(entry.shape)
    return (sum(math.prod(leaf.shape) for leaf in leaves),)


def split(entries: Entries, observation: jax.Array) -> dict[str, jax.Array]:
    """The entries [..., *shape] of observations [..., D]."""
    parts, start = {}, 0
    for name, shape in entries.items():
        end = start + math.prod(shape)
        parts[name] = observation[..., start:end].reshape(*observation.shape[:-1], *shape)
        start = end
    return parts


def join(parts: Mapping[str, jax.Array], entries: Entries) -> jax.Array:
    """Observations [..., D] of their entries, in the layout `entries`."""
    flat = [parts[n].reshape(*parts[n].shape[: parts[n].ndim - len(shape)], -1) for n, shape in entries.items()]
    return jnp.concatenate(flat, axis=-1)


def size_of(entries: Entries) -> int:
    """Numbers in an observation, D."""
    return sum(map(math.prod, entries.values()))


def mask_function(entries: Entries | None) -> Callable[[jax.Array], jax.Array] | None:
    """`action_mask` of an `Environment` with these entries: what is above 0 in the entry of that name."""
    if entries is None or MASK not in entries:
        return None
    return lambda observation: split(entries, observation)[MASK] > 0


def check_mask(entries: Entries | None, sizes: tuple[int, ...], name: str) -> None:
    """Raise `UsageError` unless a mask among the entries fits a choice, or choices, among so many actions."""
    if entries is None or MASK not in entries:
        return
    if not sizes:
        raise UsageError(f"{name} has a mask of legal actions, {MASK}, but its actions are no choices; leave it out.")
    if entries[MASK] != (sum(sizes),):
        raise UsageError(
            f"{MASK} of {name} must have an entry for each action, {sum(sizes)} in all, got {entries[MASK][0]}."
        )


def chosen(entries: Entries | None, names: str, name: str) -> tuple[str | None, ...]:
    """The entries that a network sees; (None,), a whole, of an observation without entries.

    Args:
      entries: all there are; None: the observation is a single array.
      names: separated by commas; "auto": all but the mask and those whose names begin with "privileged".
      name: of the environment.

    Raises:
      UsageError: if there is no such entry.
    """
    if entries is None and names == AUTO:
        return (None,)
    if entries is None:
        raise UsageError(f"value_observation={names} names entries, and observations of {name} have none; omit it.")
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
        raise UsageError(f"observations of {name} have no entry but {', '.join(entries)}, none of which a policy sees.")
    return tuple(n for n in known if n in wanted)


def check_entries(entries: Entries, shape: tuple[int, ...], name: str) -> None:
    """Raise `UsageError` unless entries make up observations of a shape."""
    if tuple(shape) != (size_of(entries),):
        raise UsageError(f"entries of {name} make up {size_of(entries)} numbers, but observation_shape is {shape}.")
