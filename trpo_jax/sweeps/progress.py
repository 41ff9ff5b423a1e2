"""How far a sweep is, and what happens between two calls of its program: a report, a checkpoint, a stop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from trpo_jax.sweeps.blocks import Block, Checkpoint
from trpo_jax.sweeps.grids import Group
from trpo_jax.sweeps.storage import Folder


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    Attributes:
      group: the group at work and the number of groups.
      blocks: the blocks at work.
      num_blocks: blocks of the group.
      iteration: iterations those blocks have done, of `num_iterations`.
      num_iterations: iterations of each agent of the group.
      share: of all env steps of this process, done, in [0, 1].
      steps_per_second: env steps a second since the start, compiling apart.
      seconds_left: at that speed.
    """

    group: tuple[int, int]
    blocks: list[Block]
    num_blocks: int
    iteration: int
    num_iterations: int
    share: float
    steps_per_second: float
    seconds_left: float


class Clock:
    """Env steps done and to do, and the speed at which they are done."""

    def __init__(self, groups: Sequence[Group], process: tuple[int, int]):
        self.groups, self.number = groups, 0
        agents = [group.num_agents * group.num_iterations / process[1] for group in groups]
        self.steps = [n * group.configs[0].steps_per_iteration for n, group in zip(agents, groups, strict=True)]
        self.done, self.here, self.seconds, self.since = 0.0, 0.0, 0.0, time.perf_counter()
        self.num_blocks = 0

    @property
    def group(self) -> Group:
        """The group at work."""
        return self.groups[self.number]

    def skip(self, number: int) -> None:
        """Count a group of which nothing is left to do."""
        self.done += self.steps[number]

    def begin(self, number: int, pending: list[Block]) -> None:
        """Start on a group whose `pending` blocks are to do; compiling it does not count as time at work."""
        self.number = number
        agents = sum(block.last - block.first for block in pending)
        per_agent = self.group.num_iterations * self.group.configs[0].steps_per_iteration
        self.done += self.steps[number] - agents * per_agent
        self.num_blocks = -(-self.group.num_agents // max(1, pending[0].last - pending[0].first)) if pending else 0
        self.since = time.perf_counter()

    def advance(self, blocks: list[Block], iterations: int) -> None:
        """Count what was done since the last call."""
        now = time.perf_counter()
        agents = sum(block.last - block.first for block in blocks)
        steps = agents * iterations * self.group.configs[0].steps_per_iteration
        self.done, self.here = self.done + steps, self.here + steps
        self.seconds, self.since = self.seconds + now - self.since, now

    def progress(self, blocks: list[Block], iteration: int) -> Progress:
        """What to report of blocks that have done so many iterations."""
        speed = self.here / self.seconds if self.seconds else 0.0
        total = sum(self.steps)
        return Progress(
            group=(self.number, len(self.groups)),
            blocks=blocks,
            num_blocks=self.num_blocks,
            iteration=iteration,
            num_iterations=self.group.num_iterations,
            share=min(1.0, self.done / total),
            steps_per_second=speed,
            seconds_left=max(0.0, total - self.done) / speed if speed else float("inf"),
        )


class Watch:
    """Between two calls: report, save when it is time, and stop when asked to."""

    def __init__(
        self,
        folder: Folder,
        blocks: list[Block],
        checkpoint_seconds: float,
        interrupted: Callable[[], bool],
        clock: Clock,
        report: Callable[[Progress], None],
        done: int,
    ):
        self.folder, self.blocks, self.interval = folder, blocks, checkpoint_seconds
        self.interrupted, self.clock, self.report = interrupted, clock, report
        self.saved, self.done = time.monotonic(), done

    def __call__(self, done: int, checkpoints: Callable[[], list[Checkpoint]]) -> bool:
        """Whether to go on, after so many iterations."""
        self.clock.advance(self.blocks, done - self.done)
        self.done = done
        self.report(self.clock.progress(self.blocks, done))
        stop = self.interrupted()
        if stop or (time.monotonic() - self.saved >= self.interval and done < self.clock.group.num_iterations):
            for block, checkpoint in zip(self.blocks, checkpoints(), strict=True):
                self.folder.save(block, checkpoint)
            self.saved = time.monotonic()
        return not stop
