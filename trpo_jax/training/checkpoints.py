"""Checkpoints: states saved bit for bit, one per file, without pickle, and the choice of the newest one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.files import WRITABLE, as_path, write_atomically
from trpo_jax.sentences import UsageError, say, shown
from trpo_jax.steps.types import PyTree
from trpo_jax.training.loop import init

_FORMAT = 3  # changes with the structure of `TrainState`


def save(path: str | os.PathLike[str], state: PyTree, *, note: Any = None, mend: str = WRITABLE) -> None:
    """Write a pytree of arrays to `path`, atomically: the file is either the old one or the new one.

    The file is an npz archive with one array per leaf, named by its path in the tree, each under a checksum; typed PRNG
    keys are stored as their raw data and the name of their implementation.

    Args:
      path: the file.
      state: the pytree; its leaves may be JAX's or NumPy's.
      note: further data to save, as JSON; `read` returns them.
      mend: advice for the error message if that fails.

    Raises:
      UsageError: if the file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    keys: dict[str, str] = {}
    for name, leaf in named_leaves(state):
        if is_key(leaf):
            keys[name] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        arrays[name] = np.asarray(leaf)
    header = json.dumps({"format": f"trpo_jax state {_FORMAT}", "keys": keys, "note": note})
    arrays["__header__"] = np.frombuffer(header.encode(), np.uint8)
    write_atomically(as_path(path), lambda sink: _write(sink, arrays), mend)


def _write(sink: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
    """Write like `np.savez`, but without timestamps: equal arrays give equal files."""
    with zipfile.ZipFile(sink, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def load(path: str | os.PathLike[str], like: PyTree) -> Any:
    """Read a state that `save` wrote, bit for bit.

    Args:
      path: the file.
      like: the structure to expect: the `Config` of the training, for a `TrainState`; or a pytree of arrays or shapes.
        States of several agents, stacked along leading axes, load with the same `like` as one agent's.

    Returns:
      A pytree of JAX arrays in the structure of `like`.

    Raises:
      UsageError: if the file is missing, damaged, or holds something else, in one sentence that names it.
    """
    return jax.tree.map(jnp.asarray, read(path, like)[0])


def read(path: str | os.PathLike[str], like: PyTree) -> tuple[Any, Any]:
    """Like `load`, but return NumPy arrays and typed PRNG keys, and the note that was saved with them."""
    path = as_path(path)
    if isinstance(like, Config):
        like = jax.eval_shape(init, like, jax.random.key(0))
    arrays, note = _read(path)
    leaves, batches = [], set()
    for name, target in named_leaves(like):
        if name not in arrays:
            raise UsageError(f"{path} contains no {name}; it was saved with other settings or another version.")
        leaf: Any = arrays.pop(name)
        if not is_key(leaf) and leaf.dtype.kind == "V" and leaf.dtype.itemsize == target.dtype.itemsize:
            leaf = leaf.view(target.dtype)  # npz keeps the bits of types like bfloat16, but not their names
        batch_ndim = leaf.ndim - len(target.shape)
        if batch_ndim < 0 or leaf.shape[batch_ndim:] != target.shape or leaf.dtype != target.dtype:
            raise UsageError(
                f"{name} in {path} is {leaf.dtype}{list(leaf.shape)}, but the settings need "
                f"{target.dtype}{list(target.shape)}; use the settings it was saved with."
            )
        batches.add(leaf.shape[:batch_ndim])
        leaves.append(leaf)
    if arrays or len(batches) > 1:
        extra = ", ".join(sorted(arrays)) or "leaves of different numbers of agents"
        raise UsageError(f"{path} does not fit these settings (it also has {extra}); use the ones it was saved with.")
    return jax.tree.unflatten(jax.tree.structure(like), leaves), note


def sound_note(path: Path) -> dict[str, Any] | None:
    """The note in a file of any version whose arrays match their checksums; None if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:
                header = np.lib.format.read_array(io.BytesIO(archive.read("__header__.npy")), allow_pickle=False)
                return dict(json.loads(bytes(header)).get("note") or {})
    except Exception:  # zipfile has a different exception for each kind of damage
        pass
    return None


def _read(path: Path) -> tuple[dict[str, Any], Any]:
    """Read the arrays of a file by name, with typed keys, and its note."""
    try:
        with zipfile.ZipFile(path) as archive:
            # Reading each member to its end compares it with its checksum, whatever its own header claims.
            members = ((name.removesuffix(".npy"), io.BytesIO(archive.read(name))) for name in archive.namelist())
            arrays: dict[str, Any] = {n: np.lib.format.read_array(data, allow_pickle=False) for n, data in members}
        header = json.loads(bytes(arrays.pop("__header__")))
        _check_format(path, header["format"])
        for name, impl in header["keys"].items():
            arrays[name] = jax.random.wrap_key_data(jnp.asarray(arrays[name]), impl=impl)
        return arrays, header.get("note")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"there is no checkpoint {path}.") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder; name a checkpoint{_example(path)}.") from None
    except PermissionError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; choose a file that can be read.") from None
    except UsageError:
        raise
    except Exception as error:  # zipfile has a different exception for each kind of damage
        raise UsageError(
            f"{path} is damaged or not a checkpoint of trpo_jax ({type(error).__name__}); restore it, or use another."
        ) from error


def _check_format(path: Path, found: str) -> None:
    """Raise `UsageError` if a checkpoint is from another version, and `ValueError` if it is from none."""
    number = int(found.removeprefix("trpo_jax state "))
    if number != _FORMAT:
        which, mend = ("an earlier", "continue with that one") if number < _FORMAT else ("a later", "install that one")
        raise UsageError(
            f"{path} was saved by {which} version of trpo_jax, whose states this one cannot read; {mend}, or train "
            "again into another folder."
        )


def _example(folder: Path) -> str:
    """The newest checkpoint in a folder, if there is one, as an example for a message."""
    files = sorted(folder.glob("*.npz")) or sorted(folder.glob("checkpoints/*.npz"))
    return f", such as {files[-1]}" if files else " in it"


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves of a pytree, each with its path as a name; raise `UsageError` unless all are arrays of numbers."""
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    for name, leaf in leaves:
        if getattr(getattr(leaf, "dtype", None), "kind", "O") in "OSUMm" and not is_key(leaf):
            raise UsageError(
                f"a checkpoint holds arrays of numbers, but {name or 'the state'} is {shown(leaf)}; make it one with "
                "jnp.asarray, or leave it out."
            )
    return leaves


def checksum(tree: PyTree) -> str:
    """The CRC-32 of all bits of a pytree of arrays."""
    found = 0
    for name, leaf in named_leaves(tree):
        bits = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        found = zlib.crc32(bits.tobytes(), zlib.crc32(name.encode(), found))
    return f"{found:08x}"


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_host(states: PyTree) -> Any:
    """NumPy copies of states; typed PRNG keys as their raw data."""
    return jax.tree.map(lambda leaf: np.array(jax.random.key_data(leaf) if is_key(leaf) else leaf), states)


def from_host(states: PyTree, like: PyTree) -> Any:
    """Convert the copies of `to_host` to states for the programs; `like` tells which leaves are keys."""
    impls = {jax.random.key(0, impl=name).dtype: name for name in ("threefry2x32", "rbg", "unsafe_rbg")}

    def restore(array: Any, leaf: Any) -> Any:
        return jax.random.wrap_key_data(array, impl=impls[leaf.dtype]) if is_key(leaf) else array

    return jax.tree.map(restore, states, like)


class Saved(NamedTuple):
    """A checkpoint: a state of NumPy arrays and typed keys, the iterations done, and the note saved with it."""

    state: Any
    done: int
    note: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one training job: FOLDER/PREFIX00000012.npz is its state after 12 iterations.

    Each stores its `owner`, a text that is the same for the same job, so that no job uses the checkpoints of another.
    `kind` names the job in messages, and `mend` is the advice if a file cannot be written. The newest `kept` files that
    were saved here stay, and those of every `every`-th iteration.
    """

    def __init__(
        self,
        folder: Path,
        owner: str,
        kind: str,
        *,
        prefix: str = "",
        kept: int = 1,
        every: int = 0,
        mend: str = WRITABLE,
    ):
        self.folder, self.owner, self.kind, self.prefix, self.mend = folder, owner, kind, prefix, mend
        self.kept, self.every = kept, every
        self._saved: list[Path] = []

    def files(self) -> list[Path]:
        """All files, newest first."""
        return sorted(self.folder.glob(f"{self.prefix}{'[0-9]' * 8}.npz"), reverse=True)

    def save(self, state: PyTree, done: int, **note: Any) -> None:
        """Save the state after `done` iterations; once it is complete, remove older ones."""
        file = self.folder / f"{self.prefix}{done:08d}.npz"
        save(file, state, note={**note, "of": self.owner, "done": done}, mend=self.mend)
        self._saved = [*self._saved, file][-self.kept :]
        older = (old for old in self.files() if old.name < file.name and old not in self._saved)
        self._remove(old for old in older if not self.every or _iterations(old) % self.every)

    def drop(self) -> None:
        """Remove all files."""
        self._remove(self.files())

    def _remove(self, files: Iterable[Path]) -> None:
        for file in files:
            with contextlib.suppress(OSError):
                file.unlink()

    def newest(
        self, like: Callable[[int], PyTree], check: Callable[[Saved], None] = lambda saved: None
    ) -> Saved | None:
        """Return the newest checkpoint that can be used; None if there is none at all.

        `like(iterations)` is the structure to expect, see `load`. `check` raises `UsageError` if the inputs of a
        checkpoint have changed. A message tells which newer ones were passed over.

        Raises:
          UsageError: if there are some but none can be used, with the reason for the newest one.
        """
        passed: list[UsageError] = []
        for file in self.files():
            try:
                saved = self._open(file, like)
                check(saved)
            except UsageError as error:
                if not os.path.lexists(file):  # a process that is training has newer ones by now
                    return self.newest(like, check)
                passed.append(error)
                continue
            if passed:
                say(f"{without_mend(passed[0])}; the checkpoint before it is used, {file.name}.")
            return saved
        if passed:
            raise passed[0]
        return None

    def at(self, done: int, like: PyTree) -> Saved:
        """Return the checkpoint after `done` iterations; raise `UsageError` if it cannot be used."""
        file = self.folder / f"{self.prefix}{done:08d}.npz"
        if not file.exists():
            there = ", ".join(str(_iterations(file)) for file in sorted(self.files()))
            raise UsageError(
                f"{self.folder} has no checkpoint of iteration {done:,}; "
                + (f"it has those of {there} (--keep-every keeps more)." if there else "train first.")
            )
        return self._open(file, lambda _: like)

    def _open(self, file: Path, like: Callable[[int], PyTree]) -> Saved:
        done = _iterations(file)
        state, note = read(file, like(done))
        mend = "restore the right one, or train again into another folder"
        if not isinstance(note, dict) or note.get("of") != self.owner:
            raise UsageError(f"{file} belongs to another {self.kind}; {mend}.")
        if note.get("done") != done:
            raise UsageError(f"{file} is from iteration {note.get('done')}, unlike its name; {mend}.")
        return Saved(state, done, note)


def _iterations(file: Path) -> int:
    """The iterations in the name of a checkpoint."""
    return int(file.stem[-8:])


def without_mend(error: UsageError) -> str:
    """The first part of an error message: the problem without the advice."""
    return str(error).rstrip(".").split("; ")[0]
