"""Outputs for metrics besides metrics.csv: TensorBoard and Weights & Biases, if their packages are installed."""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trpo_jax.files import as_path, write_atomically
from trpo_jax.sentences import UsageError, name_of, shown

Sink = Callable[[int, int, Mapping[str, float]], None]
"""`sink(seed, env_steps, metrics)`, called once per iteration and agent, and once per evaluation of an agent.

Nothing is written before the first call."""


OpenSink = tuple[Sink, Callable[[], None]]
"""A sink and the function that closes it."""


def is_fed(name: str, folder: Path) -> bool:
    """Whether a sink of this name has received rows of a folder before."""
    return (folder / {"tensorboard": "tensorboard", "wandb": "wandb_id"}[name]).exists()


def open_sink(
    name: str,
    folder: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    part: str = "",
    wandb_project: str = "trpo_jax",
    wandb_name: str | None = None,
) -> OpenSink:
    """Open a sink for metrics; return it and the function that closes it.

    Args:
      name: "tensorboard" writes event files under `folder`/tensorboard, one run per seed; "wandb" logs to Weights &
        Biases, one run per seed in a group (W&B's own environment variables apply, such as WANDB_MODE=offline).
      folder: the folder of the run or the sweep.
      settings: the settings that decide the results, for the record.
      part: for a sweep, the name of the point, such as "point_3".
      wandb_project: W&B's project.
      wandb_name: W&B's group; None: the name of the folder.

    Raises:
      UsageError: if there is no such sink, or its package is missing.
    """
    folder = as_path(folder)
    if name not in ("tensorboard", "wandb"):
        raise UsageError(f"there is no sink {shown(name)}; choose tensorboard or wandb.")
    if name == "tensorboard":
        return _tensorboard(folder / "tensorboard" / part, settings)
    return _wandb(folder, settings, part, wandb_project, wandb_name or name_of(folder))


def _tensorboard(folder: Path, settings: Mapping[str, Any]) -> OpenSink:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UsageError("--log tensorboard needs tensorboardX; pip install '.[tensorboard]'.") from None
    writers: dict[int, Any] = {}

    def write(seed: int, env_steps: int, metrics: Mapping[str, float]) -> None:
        try:
            if seed not in writers:
                writers[seed] = SummaryWriter(str(folder / f"seed_{seed}"))
                text = "\n".join(f"    {name} = {value}" for name, value in settings.items())
                writers[seed].add_text("settings", text)
            # It writes in a thread, and if that has died, it would wait for it forever.
            if not writers[seed].file_writer.event_writer._worker.is_alive():
                raise OSError("its file cannot be written any more")
        except OSError as error:
            raise UsageError(
                f"cannot write into {folder}: {error.strerror or error}; what is done is safe, and the run can be "
                "continued when it can be written to."
            ) from error
        for name, value in metrics.items():
            if not math.isnan(value):
                writers[seed].add_scalar(name, value, env_steps)

    def close() -> None:
        for writer in writers.values():
            with contextlib.suppress(OSError):
                writer.close()

    return write, close


def _wandb(folder: Path, settings: Mapping[str, Any], part: str, project: str, group: str) -> OpenSink:
    try:
        import wandb
    except ImportError:
        raise UsageError("--log wandb needs wandb; pip install '.[wandb]'.") from None
    runs: dict[int, Any] = {}

    def start(seed: int) -> Any:
        """Start W&B's run at the first row: before that, another process may be using the folder."""
        # The id belongs to the folder, so that a run that is continued here continues there, too.
        file = folder / "wandb_id"
        name = file.read_bytes().decode(errors="replace").strip() if file.exists() else ""
        if not re.fullmatch("[0-9a-f]{8}", name):
            name = secrets.token_hex(4)
            write_atomically(file, name)
        which = [part, f"seed_{seed}"] if part else [f"seed_{seed}"]
        run = wandb.init(
            project=project,
            group=group,
            name="-".join((group, *which)),
            id="-".join((name, *which)),
            resume="allow",
            reinit="create_new",  # several are open at a time
            dir=str(folder),
            config={**settings, "seed": seed},
        )
        run.define_metric("*", step_metric="env_steps")
        return run

    def write(seed: int, env_steps: int, metrics: Mapping[str, float]) -> None:
        if seed not in runs:
            runs[seed] = start(seed)
        row = {name: value for name, value in metrics.items() if not math.isnan(value)}
        runs[seed].log({"env_steps": env_steps, **row})

    def close() -> None:
        for run in runs.values():
            run.finish()

    return write, close
