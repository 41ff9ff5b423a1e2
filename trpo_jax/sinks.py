"""Where metrics go beside metrics.csv: TensorBoard and Weights & Biases, each if its package is there."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trpo_jax.config import UsageError

Sink = Callable[[int, int, Mapping[str, float]], None]
"""`sink(seed, env_steps, metrics)`, called once an iteration and agent."""


def open_sink(name: str, folder: Path, settings: Mapping[str, Any]) -> tuple[Sink, Callable[[], None]]:
    """A sink and the function that closes it.

    Args:
      name: "tensorboard" writes event files under `folder`/tensorboard, one run a seed; "wandb" logs to the project
        trpo_jax (W&B's own environment variables choose another, or WANDB_MODE=offline).
      folder: the folder of the run.
      settings: what decides the results, for the record.

    Raises:
      UsageError: if the package is missing.
    """
    return {"tensorboard": _tensorboard, "wandb": _wandb}[name](folder, settings)


def _tensorboard(folder: Path, settings: Mapping[str, Any]) -> tuple[Sink, Callable[[], None]]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UsageError("--log tensorboard needs tensorboardX; pip install '.[tensorboard]'.") from None
    writers: dict[int, Any] = {}

    def write(seed: int, env_steps: int, metrics: Mapping[str, float]) -> None:
        if seed not in writers:
            writers[seed] = SummaryWriter(str(folder / "tensorboard" / f"seed_{seed}"))
            writers[seed].add_text("settings", "\n".join(f"    {name} = {value}" for name, value in settings.items()))
        for name, value in metrics.items():
            if not math.isnan(value):
                writers[seed].add_scalar(name, value, env_steps)

    def close() -> None:
        for writer in writers.values():
            writer.close()

    return write, close


def _wandb(folder: Path, settings: Mapping[str, Any]) -> tuple[Sink, Callable[[], None]]:
    try:
        import wandb
    except ImportError:
        raise UsageError("--log wandb needs wandb; pip install '.[wandb]'.") from None
    # The id belongs to the folder, so that a run that is continued goes on there too.
    file = folder / "wandb_id"
    name = file.read_text() if file.exists() else secrets.token_hex(4)
    file.write_text(name)
    run = wandb.init(
        project="trpo_jax", name=folder.name, id=name, resume="allow", dir=str(folder), config=dict(settings)
    )
    run.define_metric("*", step_metric="env_steps")

    def write(seed: int, env_steps: int, metrics: Mapping[str, float]) -> None:
        row = {f"seed {seed}/{name}": value for name, value in metrics.items() if not math.isnan(value)}
        run.log({"env_steps": env_steps, **row})

    return write, run.finish
