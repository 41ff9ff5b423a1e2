"""The agents of a sweep: in groups that share a program, in an order that stays when the sweep is extended."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.runs.runner import agent_keys
from trpo_jax.sentences import UsageError
from trpo_jax.sweeps.grids import Point, Spec, make_points, make_spec, static_part

SHARED = ("seed", "num_episodes", "keep")  # all agents of a sweep share them: its seeds, and what each result means


@dataclasses.dataclass(frozen=True)
class Group:
    """Agents that share a program, point by point, each with its seeds.

    Attributes:
      points: indices of the points.
      configs: the configuration of each agent, [A].
      keys: the PRNG key of each agent, [A].
      first_seed: the first seed of each point, counted from the sweep's seed.
    """

    points: list[int]
    configs: list[Config]
    keys: Any
    first_seed: int = 0

    @property
    def num_iterations(self) -> int:
        """Iterations of every agent."""
        return self.configs[0].num_iterations

    @property
    def num_agents(self) -> int:
        """A."""
        return len(self.configs)

    @property
    def num_seeds(self) -> int:
        """Agents per point."""
        return self.num_agents // len(self.points)

    @property
    def steps_per_agent(self) -> int:
        """Env steps of every agent."""
        return self.num_iterations * self.configs[0].steps_per_iteration

    def agents(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Points, and seeds counted from the sweep's seed, of the agents from `first` up to `last`."""
        agents = np.arange(first, last)
        return np.array(self.points, np.int32)[agents // self.num_seeds], self.first_seed + agents % self.num_seeds


class Block(NamedTuple):
    """Agents that one device trains in one program: those from `first` up to `last` of a group."""

    group: int
    number: int
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.group:02d}-{self.number:04d}"

    @property
    def size(self) -> int:
        """Number of agents."""
        return self.last - self.first


def cut_into_blocks(num_agents: int, group: int, most: int) -> list[Block]:
    """Cut a group into blocks of at most `most` agents."""
    starts = range(0, num_agents, most)
    return [Block(group, i, first, min(first + most, num_agents)) for i, first in enumerate(starts)]


def group_by_program(points: Sequence[Point]) -> list[list[int]]:
    """Indices of the points that share a program, in order of first appearance."""
    groups: dict[Any, list[int]] = {}
    for i, point in enumerate(points):
        groups.setdefault(static_part(point.config), []).append(i)
    return list(groups.values())


def make_groups(points: Sequence[Point], keys: Any, *, first_seed: int = 0) -> list[Group]:
    """Make the groups of points; agent (point, seed) gets `keys[seed - first_seed]`, so that all points share seeds."""
    seeds, groups = np.arange(keys.shape[0]), []
    for members in group_by_program(points):
        configs = [points[i].config for i in members for _ in seeds]
        groups.append(Group(members, configs, keys[np.tile(seeds, len(members))], first_seed))
    return groups


def plan(spec: Spec, before: Sequence[Spec] = ()) -> tuple[list[Point], list[Group]]:
    """The points and groups of a sweep, after those of the forms `before` it was extended.

    An agent is a point's settings and a seed. Agents of earlier forms keep their places, so that finished results stay
    valid.
    """
    points: list[Point] = []
    groups: list[Group] = []
    places: dict[Any, int] = {}
    num_seeds: list[int] = []  # of each point, so far
    for stage in (*before, spec):
        keys = agent_keys(stage.seed, stage.num_seeds)
        wanted: dict[int, list[int]] = {}  # {first new seed: points}
        listed: set[int] = set()  # equal points of an extension are one
        for point in make_points(stage):
            place = len(points)
            if before:  # a sweep that never grew does without
                identity = (static_part(point.config), *map(float, jax.tree.leaves(point.config)))
                known = places.setdefault(identity, place)
                place = known if groups else place
            if place == len(points):
                points.append(point)
                num_seeds.append(0)
            if num_seeds[place] < stage.num_seeds and place not in listed:
                listed.add(place)
                wanted.setdefault(num_seeds[place], []).append(place)
        for first, members in wanted.items():
            for group in make_groups([points[i] for i in members], keys[first:], first_seed=first):
                groups.append(dataclasses.replace(group, points=[members[i] for i in group.points]))
            for i in members:
                num_seeds[i] = stage.num_seeds
    return points, groups


def earlier_forms(description: Mapping[str, Any]) -> list[Spec]:
    """The forms of a sweep before it was extended, from sweep.json."""
    return [spec_of(table) for table in description.get("before", ())]


def num_seeds_by_point(description: Mapping[str, Any]) -> Callable[[int], int]:
    """The function from a point's number to the number of its agents that sweep.json asks for; 0 if none is given."""
    if not description.get("before"):
        number = description.get("num_seeds", 0)
        return lambda point: number
    found: Counter[int] = Counter()
    for group in plan(spec_of(description), earlier_forms(description))[1]:
        found.update(dict.fromkeys(group.points, group.num_seeds))
    return lambda point: found[point]


def sections_of(description: Mapping[str, Any], *names: str) -> list[Mapping[str, Any]]:
    """The sections with these names in every form of a sweep, from sweep.json; damaged ones are left out."""
    forms = [*description.get("before", ()), description]
    found = [form.get(name) for form in forms for name in names]
    return [section for section in found if isinstance(section, Mapping)]


def own_part(description: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a description that is the present sweep or search, without versions and earlier forms."""
    own = {name: value for name, value in description.items() if name not in ("made_by", "before", "begun_as")}
    varied = {name for section in sections_of(own, "grid", "zip", "random") for name in section}
    if isinstance(base := own.get("base"), Mapping):  # earlier versions kept a preset's values of what is varied
        own["base"] = {name: value for name, value in base.items() if name not in varied}
    return own


def extended(found: Mapping[str, Any], spec: Spec, where: Path, begun_as: str) -> dict[str, Any]:
    """The content of sweep.json after an extension, with the stamp of the first form, `begun_as`.

    Raises:
      UsageError: if the new form changes something that all agents share.
    """
    for name in SHARED:
        before = found.get(name, "none")
        if before != getattr(spec, name):
            raise UsageError(
                f"{where} holds a sweep with {name}={before}, which all of its agents share; give the same, or choose "
                "another --output."
            )
    forms = [*found.get("before", ()), own_part(found)]
    return {**spec.description, "made_by": found.get("made_by"), "before": forms, "begun_as": begun_as}


def spec_of(description: Mapping[str, Any]) -> Spec:
    """The `Spec` in sweep.json, checked like any file."""
    own, names = own_part(description), [field.name for field in dataclasses.fields(Spec)]
    return make_spec({name: own[name] for name in names if name in own}, "sweep.json")


def stack_configs(configs: Iterable[Config]) -> Config:
    """Stack K configurations that share a program to one `Config` whose floats are arrays [K]."""
    configs = list(configs)
    apart = list({id(config): config for config in configs}.values())  # the agents of a point share one
    place = {id(config): i for i, config in enumerate(apart)}
    at = np.array([place[id(config)] for config in configs])
    return jax.tree.map(lambda *leaves: np.stack(leaves)[at], *apart)
