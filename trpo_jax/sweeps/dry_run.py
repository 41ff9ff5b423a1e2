"""What a sweep would run, and for how long, before anything is written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from trpo_jax.settings import SETTINGS
from trpo_jax.sweeps.cohorts import Cohort
from trpo_jax.sweeps.grids import Group, Spec, plan
from trpo_jax.sweeps.placement import Programs, agents_per_block, fit_programs


@dataclasses.dataclass(frozen=True)
class Outline:
    """What a group of agents that share a program would run.

    Attributes:
      env: environment.
      num_points: points.
      num_agents: A.
      num_devices: D.
      agents_per_block: U, agents a device takes at a time.
      env_steps: of all its agents.
      memory: bytes that the largest of its programs needs on each device.
      seconds: that training takes, as many times as one iteration took; compiling and evaluation apart.
      static: the settings by which it differs from other groups.
    """

    env: str
    num_points: int
    num_agents: int
    num_devices: int
    agents_per_block: int
    env_steps: int
    memory: int
    seconds: float
    static: dict[str, Any]

    @property
    def num_runs(self) -> int:
        """How often the devices are filled."""
        return -(-self.num_agents // (self.agents_per_block * self.num_devices))


def outline(
    spec: Spec, most_agents: int | None = None, report: Callable[[int, int], None] = lambda number, total: None
) -> list[Outline]:
    """What a sweep would run. Compiles the programs, which the sweep then finds in the compilation cache.

    Args:
      spec: the sweep.
      most_agents: agents per device in one program at most; None: as many as serve.
      report: called with the number of each program, from 0, and how many there are, before it is compiled.
    """
    points, groups = plan(spec)
    devices = jax.local_devices()
    varied = [name for name in SETTINGS if len({str(getattr(p.config, name)) for p in points}) > 1]
    found = []
    for number, group in enumerate(groups):
        report(number, len(groups))
        most = min(agents_per_block(group.num_agents, len(devices)), most_agents or group.num_agents)
        programs = fit_programs(group.configs[0], most, spec.num_episodes, devices)
        config = group.configs[0]
        runs = -(-group.num_agents // programs.width)
        static = [n for n in varied if n != "env" and len({str(getattr(c, n)) for c in group.configs}) == 1]
        found.append(
            Outline(
                env=str(config.env),
                num_points=len(group.points),
                num_agents=group.num_agents,
                num_devices=len(devices),
                agents_per_block=programs.agents_per_block,
                env_steps=group.num_agents * group.num_iterations * config.steps_per_iteration,
                memory=programs.memory,
                seconds=runs * group.num_iterations * _seconds_per_iteration(programs, group),
                static={name: getattr(config, name) for name in static},
            )
        )
    return found


def _seconds_per_iteration(programs: Programs, group: Group) -> float:
    """Time of one iteration on all devices, the second, whose results are dropped."""
    cohort = Cohort(programs, group.configs[: programs.width], group.keys[: programs.width])
    cohort.train(1)
    started = time.perf_counter()
    cohort.train(2)
    return time.perf_counter() - started
