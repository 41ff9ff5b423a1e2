"""Loading of a trained agent from a sweep's folder."""

from __future__ import annotations

import os

import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.sentences import UsageError, check_number
from trpo_jax.sweeps.plans import cut_into_blocks, earlier_forms, plan, spec_of
from trpo_jax.sweeps.storage import Folder
from trpo_jax.training.state import TrainState


def load_agent(
    path: str | os.PathLike[str], point: int | None = None, seed: int | None = None
) -> tuple[Config, TrainState]:
    """Load the settings and the trained state of an agent that a sweep kept (`--keep best` or `all`).

    Args:
      path: the folder of the sweep.
      point: the number of the point, as in the column `point` of the results; None: that of the best agent.
      seed: the agent's seed, as in the column `seed`; None: the best agent that was kept.

    Raises:
      UsageError: if there is no such agent, it is not finished, or its state was not kept.
    """
    point, seed = choose_agent(path, point, seed)
    folder = Folder(path)
    description = folder.description()
    spec = spec_of(description)
    points, groups = plan(spec, earlier_forms(description))
    for number, group in enumerate(groups):
        members, seeds = group.agents(0, group.num_agents)
        (found,) = np.nonzero((members == point) & (spec.seed + seeds == seed))
        if not len(found):
            continue
        agreed = folder.program(number)
        if not agreed:
            raise UsageError(
                f"{folder.path} lacks programs/{number:02d}.json; the command of the sweep writes it again."
            )
        blocks = cut_into_blocks(group.num_agents, number, agreed["agents_per_block"])
        block = next(block for block in blocks if block.first <= found[0] < block.last)
        kept = folder.kept(block, points[point].config)
        if int(found[0]) not in kept:
            raise UsageError(
                f"{folder.path} keeps only the best agent of each point, not seed {seed} of point {point}; "
                "leave out the seed, or sweep with --keep all."
            )
        return points[point].config, kept[int(found[0])]
    raise UsageError(f"{folder.path} has no finished agent of point {point} and seed {seed}.")


def choose_agent(path: str | os.PathLike[str], point: int | None, seed: int | None) -> tuple[int, int]:
    """Choose the finished agent with the best score, among those of a point or seed if given; return point and seed.

    Raises:
      UsageError: if there is none.
    """
    for label, value in (("point", point), ("seed", seed)):
        if value is not None:
            check_number(label, value, whole=True, interval=f"[0, {2**31}]")
    folder = Folder(path)
    description = folder.description()
    name = "final_return" if description.get("num_episodes", 0) else "training_return"
    table = folder.read_results(["point", "seed", name])
    columns = {column: np.array(table[column].to_pylist()) for column in ("point", "seed")} if table else {}
    chosen = np.ones(table.num_rows if table else 0, bool)
    for column, value in (("point", point), ("seed", seed)):
        if value is not None and columns:
            chosen &= columns[column] == value
    if not chosen.any():
        asked = " of" * (point is not None or seed is not None)
        numbers = {"point": point, "seed": seed}
        asked += " and".join(f" {name} {value}" for name, value in numbers.items() if value is not None)
        raise UsageError(f"{folder.path} has no finished agent{asked}; its report lists what there is.")
    score = np.array(table[name].to_pylist(), np.float64)
    best = np.flatnonzero(chosen)[np.argmax(np.nan_to_num(score[chosen], nan=-np.inf))]
    return int(columns["point"][best]), int(columns["seed"][best])
