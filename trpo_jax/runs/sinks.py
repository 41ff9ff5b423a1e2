"""Where metrics go beside metrics.csv: TensorBoard and Weights & Biases, each if its package is there."""

from __future__ import annotations

import contextlib
import math
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trpo_jax.files import write_atomically
from trpo_jax.sentences import UsageError

Sink = Callable[[int, int, Mapping[str, float]], None]
"""`sink(seed, env_steps, metrics)`, called once per iteration and agent, and once per evaluation of an agent.

Nothing is written before the first call."""


def open_sink(name: str, folder: Path, settings: Mapping[str, Any]) -> tuple[Sink, Callable[[], None]]:
    """A sink and the function that closes it.

    Args:
      name: "tensorboard" writes event files under `folder`/tensorboard, one run per seed; "wandb" logs to the project
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
        try:
            if seed not in writers:
                writers[seed] = SummaryWriter(str(folder / "tensorboard" / f"seed_{seed}"))
                text = "\n".join(f"    {name} = {value}" for name, value in settings.items())
                writers[seed].add_text("settings", text)
            # It writes in a thread, whose end it does not notice: it would wait for it for ever.
            if not writers[seed].file_writer.event_writer._worker.is_alive():
                raise OSError("its file cannot be written any more")
        except OSError as error:
            raise UsageError(
                f"cannot write into {folder / 'tensorboard'}: {error.strerror or error}; what is done is safe, and "
                "`trpo-jax resume` continues when it can be written to."
            ) from error
        for name, value in metrics.items():
            if not math.isnan(value):
                writers[seed].add_scalar(name, value, env_steps)

    def close() -> None:
        for writer in writers.values():
            with contextlib.suppress(OSError):
                writer.close()

    return write, close


def _wandb(folder: Path, settings: Mapping[str, Any]) -> tuple[Sink, Callable[[], None]]:
    try:
        import wandb
    except ImportError:
        raise UsageError("--log wandb needs wandb; pip install '.[wandb]'.") from None
    started: list[Any] = []

    def start() -> Any:
        """Begin at the first row: until then another process may be at work on the folder."""
        # The id belongs to the folder, so that a run that is continued goes on there too.
        file = folder / "wandb_id"
        name = file.read_bytes().decode(errors="replace").strip() if file.exists() else ""
        if not re.fullmatch("[0-9a-f]{8}", name):
            name = secrets.token_hex(4)
            write_atomically(file, name)
        run = wandb.init(
            project="trpo_jax", name=folder.name, id=name, resume="allow", dir=str(folder), config=dict(settings)
        )
        run.define_metric("*", step_metric="env_steps")
        return run

    def write(seed: int, env_steps: int, metrics: Mapping[str, float]) -> None:
        if not started:
            started.append(start())
        row = {f"seed {seed}/{name}": value for name, value in metrics.items() if not math.isnan(value)}
        started[0].log({"env_steps": env_steps, **row})

    def close() -> None:
        for run in started:
            run.finish()

    return write, close
