"""A sweep's folder, which a kill at any moment leaves whole.

    sweep.json                  what was asked for, and the versions that do it
    programs/00.json            a group of agents that share a program: its size and how it is cut into blocks
    results/00-0000.parquet     a finished block, one row an agent; metrics are lists, one entry an iteration
    checkpoints/00-0000/        the newest state of a block at work (Orbax); removed when the block is finished

Every file is written under another name and renamed, so that it is there and whole, or not there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from trpo_jax.config import UsageError
from trpo_jax.files import write_atomically
from trpo_jax.types import TrainState


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
    done: int


class Folder:
    """The files of a sweep."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).absolute()

    def describe(self, description: dict[str, Any], made_by: dict[str, Any]) -> None:
        """Write sweep.json, or compare with the one that is there.

        Raises:
          UsageError: if the folder holds another sweep or something else, or cannot be written to.
        """
        file = self.path / "sweep.json"
        if not file.exists():
            foreign = self.path.exists() and (not self.path.is_dir() or any(map(_is_foreign, os.listdir(self.path))))
            # What was seen may be another process's beginning of this sweep, which writes sweep.json first.
            if foreign and not file.exists():
                raise UsageError(f"{self.path} exists and is not the folder of a sweep; choose another --output.")
            found = self._settle(file, {**description, "made_by": made_by})
        else:
            found = self.description()
        # Compared as JSON has them: a tuple is a list there.
        asked = json.loads(json.dumps(description))
        changed = [name for name in {**asked, **found} if name != "made_by" and found.get(name) != asked.get(name)]
        if changed:
            raise UsageError(
                f"{self.path} holds a sweep with another {', '.join(changed)}; choose another --output, or restore the "
                "file that the sweep was started with."
            )

    def description(self) -> dict[str, Any]:
        """What sweep.json says; raises `UsageError` if it is missing or damaged."""
        return self._read_json(self.path / "sweep.json")

    def program(self, group: int) -> dict[str, Any] | None:
        """What was settled about a group's program, if it was."""
        file = self.path / "programs" / f"{group:02d}.json"
        return self._read_json(file) if file.exists() else None

    def settle_program(self, group: int, program: dict[str, Any]) -> dict[str, Any]:
        """Settle a group's program; where several processes try, the first one's counts for all."""
        return self._settle(self.path / "programs" / f"{group:02d}.json", program)

    def _settle(self, file: Path, value: dict[str, Any]) -> dict[str, Any]:
        """What a file says that is written once, by whoever comes first."""
        own = file.with_name(f".{file.name}.{os.getpid()}")
        write_atomically(own, json.dumps(value, indent=1) + "\n")
        try:
            with contextlib.suppress(FileExistsError):
                os.link(own, file)
        finally:
            own.unlink()
        return self._read_json(file)

    def _read_json(self, file: Path) -> dict[str, Any]:
        try:
            value = json.loads(file.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(f"{self.path} is not the folder of a sweep (there is no {file}).") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{file} is damaged ({str(error).rstrip('.')}); restore it or sweep anew.") from None
        if not isinstance(value, dict):
            raise UsageError(f"{file} is damaged (it is no table of names and values); restore it or sweep anew.")
        return value

    @contextlib.contextmanager
    def locked(self, process: int) -> Iterator[None]:
        """Hold the folder against a second process of the same number; a killed holder lets go by itself."""
        try:
            import fcntl
        except ImportError:  # not a POSIX system
            yield
            return
        try:
            (self.path / "locks").mkdir(parents=True, exist_ok=True)
            file = open(self.path / "locks" / str(process), "w")  # noqa: SIM115
        except OSError as error:
            raise UsageError(
                f"cannot write to {self.path}: {error.strerror}; choose a folder that can be written to."
            ) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"another process is at work on {self.path}; wait for it, or give each process a number of its own "
                    "with --num-processes and --process-id."
                ) from None
            except OSError:
                pass  # a file system without locks
            yield

    # Results

    def result_file(self, block: Block) -> Path:
        """Where a finished block's rows are."""
        return self.path / "results" / f"{block}.parquet"

    def is_finished(self, block: Block) -> bool:
        """Whether a block's rows are there; raises `UsageError` if they are there and damaged."""
        file = self.result_file(block)
        if not file.exists():
            return False
        if self._open(file).metadata.num_rows != block.last - block.first:
            raise UsageError(f"{file} holds other agents than it should; remove it, and the sweep trains them again.")
        return True

    def write_results(self, block: Block, columns: dict[str, Any]) -> None:
        """Write a block's rows and drop its checkpoints."""
        import pyarrow as pa
        import pyarrow.parquet as parquet

        table = pa.table({name: _column(values) for name, values in columns.items()})
        file = self.result_file(block)
        write_atomically(
            file,
            lambda sink: parquet.write_table(table, sink, compression="zstd"),
            "what is finished is safe, and the same command continues when there is room",
        )
        shutil.rmtree(self._checkpoints(block), ignore_errors=True)

    def read_results(self, columns: list[str] | None = None) -> Any:
        """All finished rows as a pyarrow table, in the order of groups and agents; None if there are none."""
        import pyarrow as pa

        files = sorted((self.path / "results").glob("[0-9]*.parquet"))
        if not files:
            return None
        try:
            return pa.concat_tables([self._open(file).read(columns=columns) for file in files])
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"results in {self.path} are damaged ({_first_line(error)}).") from error

    @staticmethod
    def _open(file: Path) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        try:
            return parquet.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise UsageError(
                f"{file} is damaged ({_first_line(error)}); remove it, and the sweep trains its agents again."
            ) from error

    # Checkpoints

    def _checkpoints(self, block: Block) -> Path:
        return self.path / "checkpoints" / str(block)

    def newest_iteration(self, block: Block) -> int:
        """Iterations that a block's newest checkpoint holds; 0 if there is none."""
        return max((int(entry.name) for entry in self._complete(block)), default=0)

    def _complete(self, block: Block) -> list[Path]:
        folder = self._checkpoints(block)
        return [entry for entry in folder.iterdir() if entry.name.isdigit()] if folder.exists() else []

    def save(self, block: Block, checkpoint: Checkpoint) -> None:
        """Save a block at work; the checkpoint before it goes when the new one is whole."""
        target = self._checkpoints(block) / f"{checkpoint.done:08d}"
        before = [entry for entry in self._checkpoints(block).glob("*")] if self._checkpoints(block).exists() else []
        try:
            _checkpointer().save(target, _to_tree(checkpoint), force=True)
        except Exception as error:  # Orbax and TensorStore answer a full disk each in their own way
            shutil.rmtree(target, ignore_errors=True)
            raise UsageError(
                f"cannot save {target} ({_first_line(error)}); what is finished is safe, and the same command "
                "continues when the folder can be written to."
            ) from error
        for entry in before:
            if entry != target:
                shutil.rmtree(entry, ignore_errors=True)

    def restore(self, block: Block, like: Checkpoint) -> Checkpoint:
        """The newest checkpoint of a block; `like` gives shapes and dtypes.

        Raises:
          UsageError: if it is damaged.
        """
        entry = max(self._complete(block))
        try:
            found = _checkpointer().restore(entry, _to_tree(like))
        except Exception as error:  # whatever is broken, in whichever of its files
            raise UsageError(
                f"{entry} is damaged ({_first_line(error)}); remove it, and the sweep trains its agents anew."
            ) from error
        leaves = [found["state"][name] for name, _ in _numbered(like.state)]
        return Checkpoint(
            jax.tree.unflatten(jax.tree.structure(like.state), leaves),
            {name: np.array(values) for name, values in found["metrics"].items()},
            int(found["done"]),
        )


def _is_foreign(name: str) -> bool:
    """Whether an entry of a folder without sweep.json was not left by the beginning of a sweep."""
    return name != "locks" and not name.startswith(".sweep.json")


def _column(values: Any) -> Any:
    """A column from one value an agent (masked: none), or from one list an agent."""
    import pyarrow as pa

    if isinstance(values, np.ndarray) and values.ndim == 2:
        offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))
    if isinstance(values, np.ma.MaskedArray):
        return pa.array(values.data, mask=np.ma.getmaskarray(values))
    return pa.array(values)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".")[:200] if text else type(error).__name__


def _checkpointer() -> Any:
    """An Orbax checkpointer of this process alone: other hosts are at other blocks."""
    import orbax.checkpoint as orbax  # deferred: it takes a second to import

    own = jax.process_index()
    alone = orbax.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
    )
    return orbax.Checkpointer(
        orbax.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
    )


def _to_tree(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as nested dictionaries, whatever the classes of its environment's state."""
    return {
        "state": dict(_numbered(checkpoint.state)),
        "metrics": checkpoint.metrics,
        "done": np.int64(checkpoint.done),
    }


def _numbered(state: TrainState) -> list[tuple[str, np.ndarray]]:
    return [(f"{i:03d}", leaf) for i, leaf in enumerate(jax.tree.leaves(state))]
