"""From a sweep's file to its agents: which settings each has, and which share a program."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from trpo_jax.config import UsageError, nearest, validate
from trpo_jax.files import SETTINGS, TOTAL_STEPS, cast, is_whole, iterations_within, read_toml
from trpo_jax.training.agents import make_agent
from trpo_jax.types import Config

TUNING_SEEDS = 2**30  # `tune` takes its seeds from here on, sweeps theirs from below
_DISTRIBUTIONS = ("uniform", "log_uniform", "choice")


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination of settings: those that the sweep varies, by name, and the whole configuration."""

    varied: dict[str, Any]
    config: Config


@dataclasses.dataclass(frozen=True)
class Group:
    """Agents that share a program, point by point, each with its seeds.

    Attributes:
      points: indices of the points.
      configs: the configuration of each agent, [A].
      keys: the PRNG key of each agent, [A].
    """

    points: list[int]
    configs: list[Config]
    keys: Any

    @property
    def num_iterations(self) -> int:
        """Iterations of every agent."""
        return self.configs[0].num_iterations

    @property
    def num_agents(self) -> int:
        """A."""
        return len(self.configs)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a sweep is made of. Every point of `grid` x `zip` x `random` trains `num_seeds` agents.

    Attributes:
      base: settings that all points share.
      grid: lists of values; every combination of them is a point.
      zip: lists of values of one length that vary together.
      random: distributions to draw from; besides settings it holds `count`, the points drawn, and their `seed`.
      num_seeds: agents a point.
      seed: agent i of a point is the one that `jax.random.key(seed + i)` trains.
      num_episodes: episodes by the policy's mode that judge each agent after training; 0: judge by training returns.
    """

    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    zip: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    random: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_seeds: int = 1
    seed: int = 0
    num_episodes: int = 16


def read_spec(path: str | os.PathLike[str]) -> Spec:
    """Read a TOML file into a `Spec`; raise `UsageError` with one sentence if it is not one."""
    return make_spec(read_toml(path), str(path))


def make_spec(table: Mapping[str, Any], source: str = "the sweep") -> Spec:
    """Check the form of a sweep given as a dictionary, and build its `Spec`."""
    known = [field.name for field in dataclasses.fields(Spec)]
    for name in table:
        if name not in known:
            where = (
                "; put settings into [base]" if name in (*SETTINGS, TOTAL_STEPS) else nearest(name, known).rstrip(".")
            )
            raise UsageError(f"{source} has an unknown entry {name!r}{where}.")
    for name in ("base", "grid", "zip", "random"):
        section = table.get(name, {})
        if not isinstance(section, Mapping):
            raise UsageError(f"{name} in {source} must be a table of settings, got {section!r}.")
        for setting in section:
            if setting not in (*SETTINGS, TOTAL_STEPS) and not (name == "random" and setting in ("count", "seed")):
                raise UsageError(f"[{name}] in {source} has no setting {setting!r}{nearest(setting, SETTINGS)}")
    for name, low in (("num_seeds", 1), ("seed", 0), ("num_episodes", 0)):
        value = table.get(name, low)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise UsageError(f"{name} in {source} must be a whole number of at least {low}, got {value!r}.")
    spec = Spec(**{name: table[name] for name in known if name in table})
    if spec.seed + spec.num_seeds > TUNING_SEEDS:
        raise UsageError(f"seeds in {source} must stay below {TUNING_SEEDS}: those from there on belong to tuning.")
    _check_sections(spec, source)
    return spec


def _check_sections(spec: Spec, source: str) -> None:
    for section, lists in (("grid", spec.grid), ("zip", spec.zip)):
        for name, values in lists.items():
            if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
                raise UsageError(f"{name} in [{section}] of {source} must be a list of values, got {values!r}.")
    lengths = {name: len(values) for name, values in spec.zip.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise UsageError(f"the lists in [zip] of {source} must be of one length, but {found}.")
    drawn = {name: value for name, value in spec.random.items() if name not in ("count", "seed")}
    if drawn and not _is_count(spec.random.get("count")):
        raise UsageError(f"[random] in {source} needs count, the number of points to draw, as a whole number.")
    if spec.random and not drawn:
        raise UsageError(f"[random] in {source} names no setting to draw.")
    for name, distribution in drawn.items():
        check_distribution(name, distribution, source)
    named = [name for section in (spec.grid, spec.zip, drawn) for name in section]
    twice = [name for name in dict.fromkeys(named) if named.count(name) > 1 or (name in spec.base and name in named)]
    if twice:
        raise UsageError(f"{twice[0]} is set in more than one section of {source}; keep one of them.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_distribution(name: str, distribution: Any, source: str) -> None:
    """Raise `UsageError` unless `distribution` is one of {uniform, log_uniform, choice} with sound bounds."""
    sentence = f"{name} in {source} must be {{ uniform = [low, high] }}, {{ log_uniform = [low, high] }} or "
    sentence += f"{{ choice = [...] }}, got {distribution!r}."
    if not isinstance(distribution, Mapping) or len(distribution) != 1:
        raise UsageError(sentence)
    ((kind, values),) = distribution.items()
    if kind not in _DISTRIBUTIONS or isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise UsageError(sentence)
    if kind != "choice":
        numbers = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
        if len(values) != 2 or len(numbers) != 2 or not values[0] <= values[1]:
            raise UsageError(sentence)
        if kind == "log_uniform" and values[0] <= 0:
            raise UsageError(f"log_uniform bounds of {name} in {source} must be above 0, got {values!r}.")


def make_points(spec: Spec) -> list[Point]:
    """Every combination of settings in order: `grid` slowest, then `zip`, then `random`.

    Raises:
      UsageError: if a setting is out of its range or an environment cannot be made.
    """
    grid = [dict(zip(spec.grid, values, strict=True)) for values in itertools.product(*spec.grid.values())]
    together = [dict(zip(spec.zip, values, strict=True)) for values in zip(*spec.zip.values(), strict=True)] or [{}]
    points = [
        make_point(spec.base, {**a, **b, **c}) for a, b, c in itertools.product(grid, together, draw(spec.random))
    ]
    for config in {static_part(point.config): point.config for point in points}.values():
        make_agent(config)
    return points


def make_point(base: Mapping[str, Any], varied: Mapping[str, Any]) -> Point:
    """The configuration of a point, checked; `total_steps` becomes `num_iterations`."""
    settings = {name: cast(name, value) for name, value in {**base, **varied}.items()}
    total_steps = settings.pop(TOTAL_STEPS, None)
    config = Config().replace(**settings)
    validate(config)
    if total_steps is not None:
        if "num_iterations" in settings:
            raise UsageError("total_steps and num_iterations both set the length of a run; give one of them.")
        config = config.replace(num_iterations=iterations_within(total_steps, config))
    return Point({name: cast(name, value) for name, value in varied.items()}, config)


def draw(random: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`count` independent draws from the distributions of a [random] table; one empty draw if there is none."""
    if not random:
        return [{}]
    rng = np.random.default_rng(random.get("seed", 0))
    names = [name for name in random if name not in ("count", "seed")]
    return [{name: _sample(rng, name, random[name]) for name in names} for _ in range(random["count"])]


def _sample(rng: np.random.Generator, name: str, distribution: Mapping[str, Any]) -> Any:
    ((kind, values),) = distribution.items()
    if kind == "choice":
        return values[int(rng.integers(len(values)))]
    if kind == "uniform":
        value = rng.uniform(*values)
    else:
        value = math.exp(rng.uniform(math.log(values[0]), math.log(values[1])))
    return round(value) if is_whole(name) else float(value)


def static_part(config: Config) -> Any:
    """What decides the compiled program: configurations with an equal one share it."""
    return jax.tree.structure(config)


def group_by_program(points: Sequence[Point]) -> list[list[int]]:
    """Indices of the points that share a program, in order of first appearance."""
    groups: dict[Any, list[int]] = {}
    for i, point in enumerate(points):
        groups.setdefault(static_part(point.config), []).append(i)
    return list(groups.values())


def make_groups(points: Sequence[Point], keys: Any) -> list[Group]:
    """The groups of a sweep; agent (point, seed) gets `keys[seed]`, so points are compared on equal seeds."""
    num_seeds = keys.shape[0]
    seeds: Any = np.asarray(jax.random.key_data(keys))
    impl = jax.random.key_impl(keys)
    groups = []
    for members in group_by_program(points):
        configs = [points[i].config for i in members for _ in range(num_seeds)]
        data: Any = np.tile(seeds, (len(members), *[1] * (seeds.ndim - 1)))
        groups.append(Group(members, configs, jax.random.wrap_key_data(data, impl=impl)))
    return groups


def seed_keys(spec: Spec) -> Any:
    """The keys `jax.random.key(seed + i)` of a sweep's seeds."""
    return jax.jit(jax.vmap(jax.random.key))(spec.seed + np.arange(spec.num_seeds))


def plan(spec: Spec) -> tuple[list[Point], list[Group]]:
    """The points and groups of a sweep."""
    points = make_points(spec)
    return points, make_groups(points, seed_keys(spec))


def stack_configs(configs: Iterable[Config]) -> Config:
    """One `Config` whose floats are arrays [K], from K configurations that share a program."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *configs)
