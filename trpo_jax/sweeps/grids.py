"""From a sweep's file to its points: their settings, and which of them share a program."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.env_args import PREFIX
from trpo_jax.environments import gymnax
from trpo_jax.environments.make import mark_traced
from trpo_jax.files import as_plain
from trpo_jax.presets import with_preset
from trpo_jax.sentences import UsageError, check_limits, check_number, counted, nearest, shown
from trpo_jax.settings import (
    DISTRIBUTIONS,
    SETTINGS,
    TOTAL_STEPS,
    cast,
    check_names,
    checked,
    is_whole,
    read_toml,
    trusting,
    with_flat_names,
    with_length,
)
from trpo_jax.training.agents import make_agent
from trpo_jax.validation import validate

TUNING_SEEDS = 2**30  # the first seed of `tune`; the seeds of sweeps are smaller
KEEP = ("none", "best", "all")
_OF_RANDOM = ("count", "seed")  # entries of [random] that are not settings
_MOST_POINTS = 100_000  # each is a configuration in the memory of this process
_MOST_AGENTS = 10_000_000
_DEFAULTS = Config()


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination of settings: those that the sweep varies, by name, and the complete configuration."""

    varied: dict[str, Any]
    config: Config


@dataclasses.dataclass(frozen=True)
class Spec:
    """Specification of a sweep. Every point of `grid` x `zip` x `random` trains `num_seeds` agents.

    Attributes:
      base: settings that all points share.
      grid: lists of values; every combination of them is a point.
      zip: lists of values of one length that vary together.
      random: distributions to draw from; besides settings it has `count`, the number of points drawn, and their `seed`.
      num_seeds: agents per point.
      seed: `jax.random.key(seed + i)` trains agent i of a point.
      num_episodes: episodes that score each agent after training; 0: score by training returns.
      keep: which trained states to keep: none, that of the best agent of each point, or all.
    """

    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    zip: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    random: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_seeds: int = 1
    seed: int = 0
    num_episodes: int = 16
    keep: str = "none"

    @property
    def description(self) -> dict[str, Any]:
        """The table in the folder of a sweep or a search, in the form of earlier versions if nothing in it is new."""
        table = dataclasses.asdict(self)
        return {name: value for name, value in table.items() if (name, value) != ("keep", "none")}


def read_spec(path: str | os.PathLike[str]) -> Spec:
    """Read a TOML file into a `Spec`; raise `UsageError` with one sentence if it is not a sweep."""
    return make_spec(read_toml(path), str(path))


def make_spec(table: Mapping[str, Any], source: str = "the sweep") -> Spec:
    """Build a `Spec` from a dictionary, and check its form and every value in it."""
    if not isinstance(table, Mapping):
        raise UsageError(f"{source} must be a table of sections, got {shown(table)}.")
    known = [field.name for field in dataclasses.fields(Spec)]
    for name in table:
        if name not in known:
            mend = "; put settings into [base]." if name in (*SETTINGS, TOTAL_STEPS) else nearest(name, known)
            raise UsageError(f"{source} has an unknown entry {shown(name)}{mend}")
    sections = {name: table.get(name, {}) for name in ("base", "grid", "zip", "random")}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            raise UsageError(f"{name} in {source} must be a table of settings, got {shown(section)}.")
        sections[name] = with_flat_names(section)
    numbers = {name: table[name] for name in ("num_seeds", "seed", "num_episodes") if name in table}
    check_numbers(numbers, source)
    keep = check_keep(table.get("keep", Spec.keep), source)
    _check_none_twice(sections, source)
    varied = {name for section in ("grid", "zip", "random") for name in sections[section]}
    spec = Spec(
        base=with_preset(sections["base"], f"[base] of {source}", elsewhere=varied),
        grid=_check_lists(sections["grid"], f"[grid] of {source}"),
        zip=_check_lists(sections["zip"], f"[zip] of {source}"),
        random=_check_random(sections["random"], f"[random] of {source}"),
        keep=keep,
        **numbers,
    )
    _check_size(spec, source)
    return spec


def checked_spec(spec: Spec) -> Spec:
    """Check a `Spec` that a program made like one from a file; the environments that it names need no trust."""
    if not isinstance(spec, Spec):
        raise UsageError(f"spec must be a Spec, got {shown(spec)}; `make_spec` makes one of a table.")
    sections = [spec.base, spec.grid, spec.zip, spec.random]
    named = jax.tree.leaves([section.get("env") for section in sections if isinstance(section, Mapping)])
    with trusting(*map(str, named)):
        return make_spec({field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)})


def check_numbers(numbers: Mapping[str, Any], source: str = "") -> None:
    """Check the numbers of a sweep that are not settings; here `num_episodes` may be 0."""
    check_limits({name: value for name, value in numbers.items() if name != "num_episodes"}, source)
    if "num_episodes" in numbers:
        label = f"num_episodes in {source}" if source else "num_episodes"
        check_number(label, numbers["num_episodes"], whole=True, interval="[0, 1000000]")


def check_keep(keep: Any, source: str = "") -> str:
    """Check which states a sweep keeps; raise `UsageError` for any other word."""
    if not isinstance(keep, str) or keep not in KEEP:
        raise UsageError(f"keep{f' in {source}' if source else ''} must be {', '.join(KEEP)}, got {shown(keep)}.")
    return keep


def _check_none_twice(sections: Mapping[str, Mapping[str, Any]], source: str) -> None:
    named = [name for section in sections.values() for name in section if name not in _OF_RANDOM]
    twice = [name for name in named if named.count(name) > 1]
    if twice:
        raise UsageError(f"{twice[0]} is set in more than one section of {source}; keep one of them.")


def _check_lists(lists: Mapping[str, Any], source: str) -> dict[str, list[Any]]:
    """Lists of values, as in [grid] and [zip]."""
    check_names(lists, source)
    lists = {name: as_plain(values) for name, values in lists.items()}
    for name, values in lists.items():
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
            raise UsageError(f"{name} in {source} must be a list of values, got {shown(values)}.")
    return {name: [checked(name, value, source) for value in values] for name, values in lists.items()}


def _check_random(random: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Distributions, how many points to draw from them, and the seed of the draws."""
    drawn = {name: value for name, value in random.items() if name not in _OF_RANDOM}
    check_names(drawn, source)
    if drawn and "count" not in random:
        raise UsageError(f"{source} needs count, the number of points to draw, as a whole number.")
    check_limits({name: random[name] for name in _OF_RANDOM if name in random}, source)
    if random and not drawn:
        raise UsageError(f"{source} names no setting to draw.")
    for name, distribution in drawn.items():
        check_distribution(name, distribution, source)
    return dict(random)


def _check_size(spec: Spec, source: str) -> None:
    lengths = {name: len(values) for name, values in spec.zip.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise UsageError(f"the lists in [zip] of {source} must have the same length, but {found}.")
    if spec.seed + spec.num_seeds > TUNING_SEEDS:
        raise UsageError(f"seeds in {source} must be below {TUNING_SEEDS}: those from there on are for tuning.")
    points = math.prod(map(len, spec.grid.values())) * min(lengths.values(), default=1) * spec.random.get("count", 1)
    if points > _MOST_POINTS or points * spec.num_seeds > _MOST_AGENTS:
        raise UsageError(
            f"{source} has {shown(points)} points with {counted(spec.num_seeds, 'seed')} each; a sweep has at most "
            f"{_MOST_POINTS:,} points and {_MOST_AGENTS:,} agents."
        )


def check_distribution(name: str, distribution: Any, source: str) -> None:
    """Raise `UsageError` unless `distribution` is one of {uniform, log_uniform, choice} with sound bounds."""
    sentence = f"{name} in {source} must be {{ uniform = [low, high] }}, {{ log_uniform = [low, high] }} or "
    sentence += f"{{ choice = [...] }}, got {shown(distribution)}."
    if not isinstance(distribution, Mapping) or len(distribution) != 1:
        raise UsageError(sentence)
    ((kind, values),) = distribution.items()
    if kind not in DISTRIBUTIONS or isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise UsageError(sentence)
    if kind != "choice" and (len(values) != 2 or not all(map(_is_number, values)) or values[0] > values[1]):
        raise UsageError(sentence)
    if kind == "log_uniform" and values[0] <= 0:
        raise UsageError(f"log_uniform bounds of {name} in {source} must be above 0, got {shown(values)}.")
    for value in values:
        checked(name, value, source)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def make_points(spec: Spec) -> list[Point]:
    """Make the points: every combination of settings in order, `grid` slowest, then `zip`, then `random`.

    Raises:
      UsageError: if a setting is out of its range or an environment cannot be made.
    """
    grid = [dict(zip(spec.grid, values, strict=True)) for values in itertools.product(*spec.grid.values())]
    together = [dict(zip(spec.zip, values, strict=True)) for values in zip(*spec.zip.values(), strict=True)] or [{}]
    points = [
        make_point(spec.base, {**a, **b, **c})
        for a, b, c in itertools.product(grid, together, draw(spec.random, _env_of(spec)))
    ]
    for config in {static_part(point.config): point.config for point in points}.values():
        make_agent(config)
    return points


def make_point(base: Mapping[str, Any], varied: Mapping[str, Any]) -> Point:
    """Make a point and check its configuration; `total_steps` becomes `num_iterations`."""
    config = mark_traced(
        with_length({name: cast(name, value) for name, value in {**base, **varied}.items()}, _DEFAULTS)
    )
    validate(config)
    return Point({name: cast(name, value) for name, value in varied.items()}, config)


def draw(random: Mapping[str, Any], env: str | None = None) -> list[dict[str, Any]]:
    """Draw `count` times from the distributions of a [random] table; one empty draw if there is none.

    `env` is the environment of all points, whose settings may be whole numbers.
    """
    if not random:
        return [{}]
    rng = np.random.default_rng(random.get("seed", 0))
    names = [name for name in random if name not in _OF_RANDOM]
    whole = {name: draws_whole(name, env) for name in names}
    return [{name: _sample(rng, random[name], whole[name]) for name in names} for _ in range(random["count"])]


def _env_of(spec: Spec) -> str | None:
    """The environment of all points of a sweep; None if they have several."""
    several = any("env" in section for section in (spec.grid, spec.zip, spec.random))
    return None if several else spec.base.get("env", _DEFAULTS.env)


def draws_whole(name: str, env: str | None) -> bool:
    """Whether a setting is drawn as a whole number: one of ours, or one of gymnax whose default is one."""
    if not name.startswith(PREFIX) or env is None or "/" in env or ":" in env:
        return is_whole(name)
    return type(gymnax.parameters(env).get(name.removeprefix(PREFIX))) is int


def _sample(rng: np.random.Generator, distribution: Mapping[str, Any], whole: bool) -> Any:
    ((kind, values),) = distribution.items()
    if kind == "choice":
        return values[int(rng.integers(len(values)))]
    if kind == "uniform":
        value = rng.uniform(*values)
    else:
        value = math.exp(rng.uniform(math.log(values[0]), math.log(values[1])))
    return round(value) if whole else float(value)


def static_part(config: Config) -> Any:
    """The part of a configuration that decides the compiled program; configurations with equal parts share it."""
    return jax.tree.structure(config)
