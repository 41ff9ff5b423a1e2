"""One large agent over several devices: each steps its share of the environments, parameters are copied to all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trpo_jax.sentences import UsageError, check_limits, counted, shown
from trpo_jax.steps.types import PyTree
from trpo_jax.training.fit_checks import check_is_state
from trpo_jax.training.state import TrainState


def shard_environments(state: TrainState, devices: Sequence[Any] | None = None) -> TrainState:
    """Spread the environments of one large agent over devices; parameters are copied to each.

    `train_step` on the result is data-parallel: every device steps its share of the N environments, and gradients,
    advantage and observation statistics are sums over all devices. So are Fisher products if `fisher_fraction` is 1;
    a smaller sample for the curvature is copied to every device.

    Args:
      state: the state of one agent.
      devices: the devices; by default all.

    Raises:
      UsageError: if this is no state, or the number of devices does not divide N.
    """
    check_is_state(state, "state")
    devices = jax.devices() if devices is None else check_devices(devices)
    check_environments(state.actor.observation.shape[0], len(devices))
    return jax.device_put(state, shardings_of(state, devices, axis=0))


def shardings_of(state: TrainState, devices: Sequence[Any], axis: int) -> PyTree:
    """The place of every leaf of a state, which may be shapes: environments are spread along an axis of the actor's."""
    mesh = Mesh(np.array(devices), ("envs",))
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(*[None] * axis, "envs"))
    places = jax.tree.map(lambda _: whole, state)
    return TrainState(places.iteration, places.key, places.learner, jax.tree.map(lambda _: split, state.actor))


def check_devices(devices: Any) -> list[Any]:
    """The given devices as a list; raise `UsageError` if there is none or they are not a sequence."""
    if not isinstance(devices, (list, tuple, np.ndarray)) or not len(devices):
        raise UsageError(f"devices must be a list of one or more, such as jax.devices()[:1], got {shown(devices)}.")
    return list(devices)


def check_environments(num_envs: int, num_devices: int) -> None:
    """Raise `UsageError` unless environments can be spread evenly over devices."""
    if num_envs % num_devices:
        raise UsageError(f"num_envs={num_envs} is not a multiple of the {num_devices} devices; choose one that is.")


def devices_of(num_devices: int, num_envs: int, num_agents: int) -> list[Any]:
    """The devices that share the environments of an agent; raise `UsageError` if they cannot."""
    check_limits({"num_devices": num_devices})
    found = jax.devices()
    if num_devices == 1:
        return found[:1]
    if num_agents > 1:
        raise UsageError(
            f"num_devices={num_devices} spreads the environments of one agent, and there are {num_agents}; "
            "`trpo-jax sweep` spreads agents."
        )
    if num_devices > len(found):
        raise UsageError(f"num_devices={num_devices}, but JAX finds {counted(len(found), 'device')}; choose fewer.")
    check_environments(num_envs, num_devices)
    return found[:num_devices]
