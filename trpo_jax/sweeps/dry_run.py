"""Outline of a sweep, its programs and times, before anything is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from trpo_jax.runs.workers import useful_workers
from trpo_jax.settings import setting_names, value_of
from trpo_jax.sweeps.cohorts import Cohort
from trpo_jax.sweeps.grids import Spec
from trpo_jax.sweeps.placement import agents_per_block, devices_for, fit_programs
from trpo_jax.sweeps.plans import Group, plan
from trpo_jax.sweeps.programs import Programs


class Outline(NamedTuple):
    """The programs of a group of agents, and their times.

    Attributes:
      group: the agents.
      programs: the sizes of the programs, without the compiled code.
      seconds: training time, extrapolated from one iteration.
      evaluating: evaluation time, during training and at the end, extrapolated from evaluations of agents that have
        hardly learned.
      compiling: compilation time just now, in seconds.
      static: the settings in which it differs from other groups.
      state_bytes: the size of an agent's trained state.
      num_processes: processes that share the agents.
    """

    group: Group
    programs: Programs
    seconds: float
    evaluating: float
    compiling: float
    static: dict[str, Any]
    state_bytes: int
    num_processes: int

    @property
    def num_devices(self) -> int:
        """Devices of all processes together."""
        return self.programs.num_devices * self.num_processes

    @property
    def num_runs(self) -> int:
        """How often the devices are filled."""
        return -(-self.group.num_agents // (self.num_devices * self.programs.agents_per_block))


def outline(
    spec: Spec,
    most_agents: int | None = None,
    num_processes: int | None = None,
    report: Callable[[float, str], None] = lambda share, doing: None,
) -> list[Outline]:
    """Outline a sweep. This compiles the programs, which the sweep then finds in the compilation cache.

    Args:
      spec: the sweep.
      most_agents: most agents per device in one program; None: as many as are useful.
      num_processes: processes that share the agents; None: this one and its workers.
      report: called with the share that is done, and with the next step in words.
    """
    points, groups = plan(spec)
    names = setting_names(point.config for point in points)
    varied = [name for name in names if name != "env" and len({str(value_of(p.config, name)) for p in points}) > 1]
    found = []
    for number, group in enumerate(groups):
        which = f"program {number + 1} of {len(groups)}"
        report(number / len(groups), f"Compiling {which} …")
        started = time.perf_counter()
        devices = devices_for(group.configs[0])
        processes = num_processes or useful_workers(group.configs[0], group.num_agents)
        useful = agents_per_block(group.configs[0], group.num_agents, len(devices) * processes)
        most = min(useful, most_agents or group.num_agents)
        programs = fit_programs(group.configs[0], most, spec.num_episodes, devices)
        compiling = time.perf_counter() - started
        report((number + 0.5) / len(groups), f"Timing {which}: two iterations and their evaluation …")
        seconds, evaluating = _measure(programs, group)
        mine = [points[i].config for i in group.points]
        same = [name for name in varied if len({str(value_of(config, name)) for config in mine}) == 1]
        static = {name: value_of(group.configs[0], name) for name in same}
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(programs.states)) // programs.width
        sizes = programs._replace(start=None, train=None, evaluate_in_training=None, evaluate=None)
        entry = Outline(group, sizes, seconds, evaluating, compiling, static, size, processes)
        found.append(entry._replace(seconds=seconds * entry.num_runs, evaluating=evaluating * entry.num_runs))
    return found


def _measure(programs: Programs, group: Group) -> tuple[float, float]:
    """Measure the seconds of training and evaluation for as many agents as fill the devices; their results are dropped.

    The second iteration and the evaluations after it are timed, and each is multiplied by its number in the sweep.
    """
    cohort = Cohort(programs, group.configs[: programs.width], group.keys[: programs.width])
    cohort.train(1)
    started = time.perf_counter()
    cohort.train(2)
    training = time.perf_counter() - started
    started = time.perf_counter()
    cohort.evaluate()
    evaluating = time.perf_counter() - started
    every = group.configs[0].eval_every
    if every:
        started = time.perf_counter()
        jax.block_until_ready(programs.evaluate_in_training(cohort.configs, cohort.states))
        once = time.perf_counter() - started
        training -= once if every <= 2 else 0  # the second iteration had one
        evaluating += once * (group.num_iterations // every)
    return max(0.0, training) * group.num_iterations, evaluating
