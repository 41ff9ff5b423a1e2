"""Blocks of agents: as many as one device takes in one program, trained to their end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from trpo_jax.runs.metrics import METRICS
from trpo_jax.sweeps.grids import Group, stack_configs
from trpo_jax.sweeps.placement import CAPACITY, Programs, from_host, to_host
from trpo_jax.types import TrainState

_CALL_SECONDS = 2.0  # aimed at: a call of the compiled program, after which progress shows and an interrupt is heard
_LAST_SHARE = 0.1  # of the iterations count for the training return


class Block(NamedTuple):
    """Agents that one device takes in one program: those from `first` up to `last` of a group."""

    group: int
    number: int
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.group:02d}-{self.number:04d}"


class Checkpoint(NamedTuple):
    """A block at work: states [U, ...] from `to_host`, metrics {name: [U, num_iterations]}, and iterations done."""

    state: TrainState
    metrics: dict[str, np.ndarray]
    done: Any


def cut_into_blocks(group: Group, number: int, agents: int) -> list[Block]:
    """Blocks of at most `agents` agents."""
    starts = range(0, group.num_agents, agents)
    return [Block(number, i, first, min(first + agents, group.num_agents)) for i, first in enumerate(starts)]


def run_blocks(
    programs: Programs,
    group: Group,
    blocks: Sequence[Block],
    checkpoints: Sequence[Checkpoint] | None = None,
    watch: Callable[[int, Callable[[], list[Checkpoint]]], bool] = lambda done, save: True,
) -> list[tuple[Block, dict[str, np.ndarray]]]:
    """Train at most D blocks, one a device, from their start or from checkpoints of one iteration, and judge them.

    Args:
      programs: the group's programs.
      group: whose agents.
      blocks: which of them; blocks shorter than U, and devices without one, are filled up with repeated agents.
      checkpoints: where the blocks stand, if they stand anywhere.
      watch: called after each call with the iterations done and a function that gives the checkpoints; it says
        whether to go on.

    Returns:
      Each block with its rows {metric: [agents, num_iterations], "final_return": [agents]}; none if `watch` said no.
    """
    size, iterations = programs.agents_per_block, group.num_iterations
    # Whatever fills a program up repeats what is there; its results are dropped.
    members = [min(i, block.last - 1) for block in blocks for i in range(block.first, block.first + size)]
    members += members[:1] * (programs.num_blocks * size - len(members))
    configs = stack_configs([group.configs[i] for i in members])
    table = {name: np.full((len(members), iterations), np.nan, np.float32) for name in METRICS}
    if checkpoints:
        fill = len(members) - size * len(checkpoints)
        host = jax.tree.map(
            lambda *leaves: np.concatenate([*leaves, np.repeat(leaves[0][:1], fill, axis=0)]),
            *(checkpoint.state for checkpoint in checkpoints),
        )
        states, done = from_host(host, programs.states), checkpoints[0].done
        for i, checkpoint in enumerate(checkpoints):
            for name in METRICS:
                table[name][i * size : (i + 1) * size] = checkpoint.metrics[name]
    else:
        states, done = programs.start(configs, group.keys[np.array(members)]), 0

    def save() -> list[Checkpoint]:
        cuts, host = [slice(i * size, (i + 1) * size) for i in range(len(blocks))], to_host(states)
        return [
            Checkpoint(jax.tree.map(lambda leaf, cut=cut: leaf[cut], host), {n: table[n][cut] for n in METRICS}, done)
            for cut in cuts
        ]

    length = 1
    while done < iterations:
        length = min(length, iterations - done, CAPACITY)
        started = time.perf_counter()
        states, metrics = jax.block_until_ready(programs.advance(configs, states, np.int32(length)))
        for name in METRICS:
            table[name][:, done : done + length] = np.asarray(getattr(metrics, name))[:, :length]
        done += length
        # At most doubled a call, so that one slow measurement cannot starve the display.
        length = max(1, min(2 * length, int(length * _CALL_SECONDS / (time.perf_counter() - started))))
        if not watch(done, save):
            return []
    judged = np.asarray(programs.judge(configs, states)) if programs.judge else np.full(len(members), np.nan)
    table["final_return"] = judged.astype(np.float32)
    rows = []
    for i, block in enumerate(blocks):
        cut = slice(i * size, i * size + block.last - block.first)
        rows.append((block, {name: values[cut] for name, values in table.items()}))
    return rows


def failed_iteration(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """First iteration, from 1, whose numbers were not all finite; 0 if there is none. [agents]."""
    bad = rows["finite"] == 0
    return np.where(bad.any(axis=1), bad.argmax(axis=1) + 1, 0).astype(np.int32)


def training_return(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mean return of the episodes that ended in the last tenth of the iterations. [agents].

    Where none did, as episodes may be longer than that, of those of the last iteration in which one ended; NaN if none
    ever did.
    """
    count = np.nan_to_num(rows["num_episodes"].astype(np.float64))
    total = np.where(count > 0, rows["episode_return"].astype(np.float64), 0) * count
    iterations = count.shape[1]
    ended = np.where(count > 0, np.arange(iterations), -1).max(axis=1)
    first = np.minimum(ended, iterations - max(1, round(_LAST_SHARE * iterations)))
    counts = (np.arange(iterations) >= first[:, None]) & (ended >= 0)[:, None]
    episodes = (count * counts).sum(axis=1)
    total = np.where(counts, total, 0).sum(axis=1)
    return np.where(ended >= 0, total / np.where(ended >= 0, episodes, 1), np.nan).astype(np.float32)
