"""A sweep with its results in memory: `sweep`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.files import as_plain
from trpo_jax.runs.metrics import METRICS
from trpo_jax.runs.workers import check_workers, start_workers
from trpo_jax.sentences import UsageError, shown
from trpo_jax.settings import TOTAL_STEPS
from trpo_jax.sweeps.cohorts import Cohort, failed_iteration, training_return
from trpo_jax.sweeps.grids import Point, Spec, check_keep, check_numbers, make_points
from trpo_jax.sweeps.placement import agents_per_block, devices_for, fit_programs
from trpo_jax.sweeps.plans import Group, make_groups
from trpo_jax.training.checkpoints import from_host, to_host
from trpo_jax.training.devices import check_devices
from trpo_jax.training.state import Metrics, TrainState, check_key


def sweep(
    config: Config,
    grid: Mapping[str, Sequence[Any] | np.ndarray | jax.Array],
    key: Any,
    *,
    num_seeds: int = 1,
    num_episodes: int = 16,
    keep: str = "none",
    devices: Sequence[Any] | None = None,
    num_workers: int = 1,
) -> SweepResult:
    """Train every combination of settings over seeds, and evaluate each agent.

    All combinations that differ only in traced settings are one compiled program. Agents are spread over `devices`, and
    trained in blocks if memory requires it. Do not call it inside `jit`: it compiles and runs by itself.

    Args:
      config: the settings that all points share.
      grid: {setting: values}; every combination is a point, the last setting varying fastest.
      key: a typed PRNG key; all points share the `num_seeds` keys split from it. With one of type "rbg", agents side by
        side on an accelerator draw other numbers than alone.
      num_seeds: S, agents per point.
      num_episodes: episodes with which each agent is evaluated at the end; 0: none.
      keep: which trained states to return: "none", that of the "best" agent of each point, or "all".
      devices: where to run; by default all devices of this process (one, if the environment runs in Python on a CPU).
      num_workers: processes that train the agents of environments that run in Python; see `run_sweep`.

    Returns:
      A `SweepResult` of NumPy arrays.

    Raises:
      UsageError: if a setting or value cannot be used.
    """
    if not isinstance(config, Config) or not isinstance(grid, Mapping):
        raise UsageError(f"sweep takes a Config and a grid {{setting: values}}, got {shown(config)}, {shown(grid)}.")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((config, list(grid.values()), key))):
        raise UsageError("sweep compiles and runs by itself, so it cannot be called inside jit, vmap or scan.")
    check_key(key)
    generator = jax.random.key_impl(key)
    if not isinstance(generator, str):
        raise UsageError(f"sweeps need a key of one of JAX's own types, got {key.dtype}; make it without `impl`.")
    check_keep(keep)
    check_numbers({"num_seeds": num_seeds, "num_episodes": num_episodes})
    check_workers(num_workers)
    points = _points_of(config, grid)
    groups = make_groups(points, jax.random.split(key, num_seeds))
    chosen = None if devices is None else check_devices(devices)
    results = _Results(len(points), num_seeds, groups, keep)
    useful = min(num_workers, max(group.num_agents for group in groups))
    with jax.default_prng_impl(generator), start_workers(useful) as workers:
        for group in groups:
            here = chosen or devices_for(group.configs[0], workers[: group.num_agents])
            most = agents_per_block(group.configs[0], group.num_agents, len(here))
            programs = fit_programs(group.configs[0], most, num_episodes, here)
            for first in range(0, group.num_agents, programs.width):
                last = first + programs.width
                cohort = Cohort(programs, group.configs[first:last], group.keys[first:last])
                cohort.train(group.num_iterations)
                results.add(cohort, group.agents(first, first + cohort.size))
    return results.as_sweep_result([point.varied for point in points])


def _points_of(config: Config, grid: Mapping[str, Any]) -> list[Point]:
    """Every combination of the values in a grid; raise `UsageError` for one that cannot be used."""
    for name, values in grid.items():
        if not isinstance(name, str):
            raise UsageError(f"the grid must name settings, got {shown(name)}.")
        listed = as_plain(values)  # a number, for an array without axes
        if isinstance(listed, str) or not hasattr(listed, "__len__") or not len(listed):
            raise UsageError(f"{name} in the grid must be a list of values, got {shown(values)}.")
    names = {field.name for field in dataclasses.fields(Config)}
    given = {*grid, "num_iterations"} if TOTAL_STEPS in grid and "num_iterations" not in grid else grid
    base = {name: getattr(config, name) for name in names if name not in given}
    return make_points(Spec(base=base, grid={name: list(values) for name, values in grid.items()}))


class _Results:
    """The results of a sweep's agents, [points, seeds, …], as they come in."""

    def __init__(self, num_points: int, num_seeds: int, groups: Sequence[Group], keep: str):
        shape = num_points, num_seeds
        longest = max(group.num_iterations for group in groups)
        evaluations = max(group.num_iterations // (group.configs[0].eval_every or 2**31) for group in groups)
        self.metrics = {name: np.full((*shape, longest), np.nan, np.float32) for name in METRICS}
        self.final_return, self.failed_at = np.full(shape, np.nan, np.float32), np.zeros(shape, np.int32)
        self.eval_return = np.full((*shape, evaluations), np.nan, np.float32)
        self.kept = Kept(keep, num_points)

    def add(self, cohort: Cohort, at: tuple[np.ndarray, np.ndarray]) -> None:
        """Evaluate the trained agents of a cohort, which are these points and seeds, and add what they gave."""
        found = cohort.metrics
        for name in METRICS:
            self.metrics[name][(*at, slice(found[name].shape[1]))] = found[name]
        if cohort.eval_return is not None:
            self.eval_return[(*at, slice(cohort.eval_return.shape[1]))] = cohort.eval_return
        self.final_return[at], self.failed_at[at] = cohort.evaluate(), failed_iteration(found)
        self.kept.add(cohort, at[0], self.final_return[at] if cohort.programs.evaluate else training_return(found))

    def as_sweep_result(self, points: list[dict[str, Any]]) -> SweepResult:
        """All of them, with the settings of each point."""
        metrics = Metrics(**cast(dict[str, Any], self.metrics))
        return SweepResult(points, metrics, self.final_return, self.failed_at, self.eval_return, self.kept.states())


class Kept:
    """The trained states that are kept, point by point, on the host: none, that of the best agent, or all."""

    def __init__(self, keep: str, num_points: int):
        self.keep = keep
        self._agents: list[list[TrainState]] = [[] for _ in range(num_points)]
        self._best = [-np.inf] * num_points

    def add(self, cohort: Cohort, points: np.ndarray, scores: np.ndarray) -> None:
        """Keep the required states of a cohort whose agents are of these points and have these scores."""
        if self.keep == "none":
            return
        states = to_host(cohort.states)
        for i, (point, score) in enumerate(zip(points, np.nan_to_num(scores, nan=-np.inf), strict=True)):
            agents = self._agents[point]
            if self.keep == "best" and agents and score <= self._best[point]:
                continue
            one = from_host(jax.tree.map(lambda leaf, i=i: leaf[i], states), cohort.programs.states)
            self._agents[point] = [one] if self.keep == "best" else [*agents, one]
            self._best[point] = max(score, self._best[point])

    def states(self) -> list[TrainState]:
        """The states of each point: of all its agents, [S, ...], or of its best one; an empty list if none are kept."""
        if self.keep == "none":
            return []
        if self.keep == "best":
            return [jax.tree.map(jnp.asarray, agents[0]) for agents in self._agents]
        return [jax.tree.map(lambda *leaves: jnp.stack(leaves), *agents) for agents in self._agents]


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """Result of `sweep`, with G points, S seeds and I iterations.

    Attributes:
      points: the varied settings of each point, [G].
      metrics: `Metrics` of NumPy arrays, [G, S, I]; NaN after the end of points with fewer iterations.
      final_return: mean return of each trained policy over fresh episodes, [G, S]; NaN if not requested.
      failed_at: iteration, counted from 1, at which an agent met a number that was not finite; 0 if none did. [G, S].
      eval_return: mean return of each evaluation during training, [G, S, K], one per `eval_every` iterations; NaN after
        the end of points with fewer.
      states: trained states, one per point: with `keep="all"` of all seeds, [S, ...], with "best" of the best one.
    """

    points: list[dict[str, Any]]
    metrics: Metrics
    final_return: np.ndarray
    failed_at: np.ndarray
    eval_return: np.ndarray
    states: list[TrainState]
