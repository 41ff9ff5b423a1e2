"""A sweep's folder, which stays intact if the process is killed at any moment.

    sweep.json                         the settings of the sweep, and the versions that run it
    programs/00.json                   a group of agents that share a program: its size and the size of its blocks
    results/00-0000.parquet            a finished block, one row per agent; metrics are lists, one entry per iteration
    checkpoints/00-0000-00000012.npz   the newest state of a block in progress; removed when the block is finished
    states/00-0000.npz                 trained states of a finished block's agents, if they are kept

Every file is written under another name and renamed, so that it is either complete or absent; each has a checksum.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.files import as_path, locked, write_atomically
from trpo_jax.runs.descriptions import (
    check_equal,
    in_json,
    is_begun,
    origin,
    read_table,
    restore_or_anew,
    write_table,
)
from trpo_jax.sentences import UsageError, counted, first_line, say
from trpo_jax.sweeps.cohorts import Snapshot, blank
from trpo_jax.sweeps.grids import Spec
from trpo_jax.sweeps.plans import SHARED, Block, earlier_forms, extended, own_part
from trpo_jax.sweeps.rows import encode_rows, read_rows, with_common_types
from trpo_jax.training.checkpoints import Checkpoints, read, save, sound_note, without_mend
from trpo_jax.training.loop import init
from trpo_jax.training.state import TrainState

_CONTINUES = "what is finished is safe, and the same command continues when the folder can be written to"


class Folder:
    """The files of a sweep."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = as_path(path).absolute()
        self._finished: set[Block] = set()  # those whose files were found intact
        self._origin = ""

    def describe(self, spec: Spec, made_by: Mapping[str, Any], *, extend: bool = False) -> list[Spec]:
        """Write sweep.json, or compare with the one that is there; return the forms of the sweep before its extensions.

        Args:
          spec: the sweep that is requested.
          made_by: the versions that run it.
          extend: if another sweep is there, add this one to it.

        Raises:
          UsageError: if the folder holds another sweep or something else, or cannot be written to.
        """
        file = self.path / "sweep.json"
        if not is_begun(file, "sweep"):
            write_table(file, {**spec.description, "made_by": made_by}, first=True)
        found = self.description()
        if extend and own_part(found) != in_json(spec.description):
            write_table(file, extended(found, spec, self.path, begun_as=found.get("begun_as", origin(file))))
            found = self.description()
        may_grow = all(found.get(name, "none") == getattr(spec, name) for name in SHARED)
        *mends, last = ["choose another --output", "restore the file that it was started with"] + (
            ["add the new agents with --extend"] if may_grow else []
        )
        mend = f"{', '.join(mends)}, or {last}"
        check_equal(self.path, "sweep", spec.description, own_part(found), mend)
        return earlier_forms(found)

    def description(self) -> dict[str, Any]:
        """Read sweep.json; raise `UsageError` if it is missing or damaged."""
        file = self.path / "sweep.json"
        found = read_table(file, "sweep")
        made_by = found.get("made_by", {})
        sound = isinstance(made_by, dict) and type(made_by.get("threads", 1)) is int
        before = found.get("before", [])
        sound &= isinstance(before, list) and all(isinstance(form, dict) for form in before)
        if not sound or type(found.get("num_episodes", 0)) is not int:
            raise UsageError(f"{file} is damaged (made_by, before or num_episodes); {restore_or_anew('sweep')}.")
        return found

    def check_rounding(self, here: Mapping[str, Any]) -> None:
        """Raise `UsageError` if last bits differ from those of the sweep so far; report what else may change them.

        Args:
          here: the versions that go on with it.
        """
        begun = self.description().get("made_by", {})
        mends = {"threads": "set NPROC={}, and --num-devices to no more", "devices": "give --num-devices {}"}
        for name, mend in mends.items():
            if name in begun and name in here and begun[name] != here[name]:
                raise UsageError(
                    f"{self.path} was started with {counted(begun[name], name[:-1])}, but here there would be "
                    f"{here[name]}, which rounds differently; {mend.format(begun[name])}."
                )
        others = [f"{name} {begun[name]}" for name in here if name in begun and begun[name] != here[name]]
        if others:
            say(f"{self.path} was started with {', '.join(others)}; the remaining agents may be rounded differently.")

    def _mark(self, block: Block | str) -> str:
        """The stamp in each file of a block: its sweep and the block."""
        if not self._origin:
            self._origin = self.description().get("begun_as") or origin(self.path / "sweep.json")
        return f"{self._origin} {block}"

    def _is_ours(self, rows: Any, block: Block | str) -> bool:
        """Whether rows have the stamp of this sweep and block; those of an earlier version have none, and pass."""
        ours = self._mark(block).encode()
        return (rows.schema.metadata or {}).get(b"of", ours) == ours

    def program(self, group: int) -> dict[str, Any] | None:
        """The size of a group's program on which the processes agreed; None if there is none yet."""
        file = self.path / "programs" / f"{group:02d}.json"
        if not file.exists():
            return None
        program = read_table(file, "sweep")
        if not isinstance(program.get("agents_per_block"), int) or program["agents_per_block"] < 1:
            raise UsageError(f"{file} is damaged (it has no agents_per_block); {restore_or_anew('sweep')}.")
        return program

    def agree_on_program(self, group: int, program: dict[str, Any]) -> dict[str, Any]:
        """Record a group's program, and return the valid entry: if several processes try, that of the first."""
        file = self.path / "programs" / f"{group:02d}.json"
        write_table(file, program, first=True)
        return read_table(file, "sweep")

    @contextlib.contextmanager
    def locked(self, process: int) -> Iterator[None]:
        """Lock the folder against another process with the same number."""
        is_begun(self.path / "sweep.json", "sweep")  # nothing may be written into a folder of something else
        mend = "wait for it, or give each process a number of its own with --num-processes and --process-id"
        with locked(self.path, "programs", "results", "checkpoints", "states", name=f".lock{process}", mend=mend):
            yield

    # Results

    def is_finished(self, block: Block) -> bool:
        """Whether a block's results are there, and its trained states if they are kept.

        A damaged file is reported and counts as missing.

        Raises:
          UsageError: if the file has other agents than it should.
        """
        if block in self._finished:
            return True
        file = self._result_file(block)
        if not file.exists():
            return False
        try:
            rows = read_rows(file, ["point"])
        except UsageError as error:
            say(f"{error} Its agents are trained again.")
            return False
        if rows.num_rows != block.size or not self._is_ours(rows, block):
            raise UsageError(f"{file} holds other agents than it should; restore it, or choose another --output.")
        if self._keeps() and not self._has_states(block):
            say(f"{self._states_file(block)} is missing or damaged. Its agents are trained again.")
            return False
        self._finished.add(block)
        return True

    def _result_file(self, block: Block) -> Path:
        return self.path / "results" / f"{block}.parquet"

    def write_results(self, block: Block, columns: dict[str, Any]) -> None:
        """Write a block's rows and remove its checkpoints."""
        write_atomically(self._result_file(block), encode_rows(columns, self._mark(block)), _CONTINUES)
        self._finished.add(block)
        self._checkpoints(block).drop()

    def read_results(self, columns: list[str] | None = None) -> Any:
        """Read all finished rows as a pyarrow table, in the order of groups and agents; None if there are none.

        A damaged file is skipped and reported; a column that another version did not write is null.
        """
        import pyarrow as pa

        tables, others = [], []
        for file in sorted((self.path / "results").glob("[0-9]*.parquet")):
            try:
                rows = read_rows(file, columns)
            except UsageError as error:
                say(f"{error} It is skipped; `trpo-jax sweep` trains its agents again.")
                continue
            if self._is_ours(rows, file.stem):
                tables.append(rows)
            else:
                others.append(file)
        if others and not tables:
            raise UsageError(f"{others[0]} has other agents than {self.path / 'sweep.json'}; restore one of the two.")
        if others:
            say(f"{counted(len(others), 'file')} of results, first {others[0]}, have other agents and are skipped.")
        if not tables:
            return None
        try:
            table = pa.concat_tables(with_common_types(tables), promote_options="permissive")
        except pa.ArrowException as error:
            raise UsageError(f"results in {self.path} are from different versions ({first_line(error)}).") from error
        for name in set(columns or ()) - set(table.column_names):
            table = table.append_column(name, pa.nulls(table.num_rows))
        return table

    # Trained states

    def keep(self, block: Block, states: TrainState, agents: np.ndarray) -> None:
        """Write the trained states of some of a block's agents, [K, ...], with their numbers in the group."""
        kept = {"agent": agents.astype(np.int32), "state": states}
        save(self._states_file(block), kept, note={"of": self._mark(block)}, mend=_CONTINUES)

    def kept(self, block: Block, config: Config) -> dict[int, TrainState]:
        """The trained states that were kept of a block, by the agent's number in its group.

        Raises:
          UsageError: if there are none, or the file cannot be used.
        """
        file = self._states_file(block)
        if not self._keeps():
            raise UsageError(f"{self.path} keeps no trained states; sweep with --keep best or all into another folder.")
        if not self._has_states(block):
            raise UsageError(f"{file} is missing or damaged; run the command of the sweep again to restore it.")
        like = {"agent": jax.ShapeDtypeStruct((), np.int32), "state": jax.eval_shape(init, config, jax.random.key(0))}
        found, _ = read(file, like)
        one = lambda i: jax.tree.map(lambda leaf: jnp.asarray(leaf[i]), found["state"])  # noqa: E731
        return {int(agent): one(i) for i, agent in enumerate(found["agent"])}

    def _keeps(self) -> bool:
        return bool(self.description().get("keep", "none") != "none")

    def _has_states(self, block: Block) -> bool:
        """Whether a block's states are there and sound; raise `UsageError` if they are those of other agents."""
        file = self._states_file(block)
        note = sound_note(file)
        if note is not None and note.get("of") != self._mark(block):
            raise UsageError(f"{file} holds other agents than it should; restore it, or choose another --output.")
        return note is not None

    def _states_file(self, block: Block) -> Path:
        return self.path / "states" / f"{block}.npz"

    # Checkpoints

    def _checkpoints(self, block: Block) -> Checkpoints:
        folder, kind = self.path / "checkpoints", "sweep or another block"
        return Checkpoints(folder, self._mark(block), kind, prefix=f"{block}-", mend=_CONTINUES)

    def save(self, block: Block, snapshot: Snapshot) -> None:
        """Save a block in progress; remove its previous checkpoint when the new one is complete."""
        self._checkpoints(block).save(snapshot, snapshot.done)

    def restore(self, block: Block, states: TrainState, eval_every: int = 0) -> Snapshot | None:
        """The snapshot in a block's newest intact checkpoint, None if there is none; `states` gives shapes, [A, ...].

        Those that are skipped are reported.
        """
        try:
            saved = self._checkpoints(block).newest(lambda done: blank(states, block.size, done, eval_every))
        except UsageError as error:
            say(f"{without_mend(error)}; its agents are trained again.")
            return None
        return Snapshot(*saved.state) if saved else None
