"""Folders and files that stay intact if the process is killed. Imports no JAX."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from trpo_jax.sentences import UsageError, first_line, shown

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # of `write_atomically`: .NAME.PROCESS.tmp
_SEAL = re.compile(rb"crc32:([0-9a-f]{8})")
BLANK_SEAL = "crc32:00000000"  # placeholder for the checksum that `sealed` puts there
WRITABLE = "choose a folder that can be written to"
_MOST_BYTES = 2**24  # of a file of settings


def read_json(path: str | os.PathLike[str], mend: str) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
      path: the file.
      mend: advice for the error message.

    Raises:
      FileNotFoundError, NotADirectoryError: if there is no such file.
      UsageError: with one sentence, if it cannot be read or is damaged.
    """
    try:
        value = json.loads(read_limited(path))
        if not isinstance(value, dict):
            raise ValueError("it is not a table of names and values")
        return value
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({first_line(error)}); {mend}.") from error


def as_path(path: Any) -> Path:
    """The path of a file or folder; raise `UsageError` if this is none."""
    if not isinstance(path, (str, os.PathLike)) or "\0" in str(path):
        raise UsageError(f"{shown(path)} is not the path of a file or folder; give a str or a pathlib.Path.")
    return Path(path)


def as_plain(value: Any) -> Any:
    """Convert arrays and scalars of NumPy and JAX to numbers of Python and lists of them."""
    return value.tolist() if hasattr(value, "tolist") else value


def plain_json(value: Any) -> Any:
    """Convert a value to JSON's types: lists for tuples and arrays, null for numbers that are not finite."""
    value = value._asdict() if hasattr(value, "_asdict") else value
    if isinstance(value, dict):
        return {str(name): plain_json(entry) for name, entry in value.items()}
    value = as_plain(value)
    if isinstance(value, (list, tuple)):
        return [plain_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_of_kind(path: str, flag: str, suffix: str) -> Path:
    """The output file that a flag names; raise `UsageError` if its name does not end in `suffix`."""
    file = Path(path)
    if file.suffix.lower() != suffix or file.is_dir():
        raise UsageError(f"{flag} must name a file that ends in {suffix}, got {shown(path)}.")
    check_replaceable(file, flag)
    return file


def check_replaceable(file: Path, flag: str) -> None:
    """Raise `UsageError` if a file that a flag names is one that a run, a sweep or a search needs."""
    if file.is_file() and (file.name in ("metrics.csv", "eval.csv") or _is_sealed(file)):
        raise UsageError(f"{flag} would overwrite {file}, which belongs to the folder it is in; choose another name.")


def _is_sealed(file: Path) -> bool:
    try:
        return _SEAL.search(read_limited(file)) is not None
    except (OSError, ValueError):
        return False


def read_limited(path: str | os.PathLike[str]) -> bytes:
    """Read a file of settings; raise `ValueError` if it is larger than such a file can be."""
    with open(path, "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES // 2**20} MiB")
    return content


# Writing


def write_atomically(
    file: Path, content: str | bytes | Callable[[IO[bytes]], Any], mend: str = WRITABLE, *, first: bool = False
) -> None:
    """Write a file and make its folder; after a kill or a power cut the file is either the old one or the new one.

    Args:
      file: the file. A device or a pipe is written to directly.
      content: text, bytes, or a function that writes into the open file.
      mend: advice for the error message if that fails.
      first: keep a file that is there already: if several processes try, the first one's counts for all.

    Raises:
      UsageError: if the file cannot be written; nothing of it is left then.
    """
    data = content.encode() if isinstance(content, str) else content
    write = data if callable(data) else lambda sink: sink.write(data)
    file = file.resolve() if file.is_symlink() else file
    if not file.name:
        raise UsageError(f"{shown(str(file))} is a folder; name a file in it.")
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with _writing(file, mend):
        if file.exists() and not (file.is_file() or file.is_dir()):
            with open(file, "wb") as device:
                write(device)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _open_locked(temporary) as sink:
                write(sink)
                sink.flush()
                os.fsync(sink.fileno())
                if os.name == "nt":
                    sink.close()  # an open file cannot be renamed there
                _publish(temporary, file, first)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(file.parent)
        remove_temporaries(file.parent, name=glob.escape(file.name))


@contextlib.contextmanager
def _writing(file: Path, mend: str) -> Iterator[None]:
    """Turn an `OSError` while a file is written into one sentence."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror or error}; {mend}.") from error


def _publish(temporary: Path, file: Path, first: bool) -> None:
    """Rename a finished temporary file; with `first`, keep a file that is there already."""
    if first:
        try:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, file)
            temporary.unlink()
            return
        except OSError:  # a file system without hard links
            if file.exists():
                temporary.unlink()
                return
    os.replace(temporary, file)


def _sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append(file: Path, text: str, mend: str = WRITABLE) -> None:
    """Append to a file and flush it to the disk; raise `UsageError` if that fails."""
    with _writing(file, mend), open(file, "ab") as sink:
        sink.write(text.encode())
        sink.flush()
        os.fsync(sink.fileno())


def sealed(data: bytes) -> bytes:
    """Insert the checksum of `data` in place of the last `BLANK_SEAL` in it."""
    at = data.rindex(BLANK_SEAL.encode())
    return data[:at] + f"crc32:{zlib.crc32(data):08x}".encode() + data[at + len(BLANK_SEAL) :]


def is_intact(data: bytes) -> bool:
    """Whether sealed data is unchanged; data without a seal counts as intact."""
    found = list(_SEAL.finditer(data))
    if not found:
        return True
    start, end = found[-1].span()
    blank = data[:start] + BLANK_SEAL.encode() + data[end:]
    return zlib.crc32(blank) == int(found[-1].group(1), 16)


# Folders


@contextlib.contextmanager
def locked(
    folder: Path, *within: str, name: str = ".lock", mend: str = "wait for it, or choose another folder"
) -> Iterator[None]:
    """Lock a folder, made if necessary, against a second process; the system releases the lock of a killed one.

    Unfinished files of killed processes are removed. A folder that was made for the lock and stays empty is removed
    with it. On a file system without locks, nothing is locked.

    Args:
      folder: the folder; `within` are folders in it whose unfinished files are removed, too.
      name: name of the lock.
      mend: advice if another process holds the lock.

    Raises:
      UsageError: if another process holds the lock, or the folder cannot be written to.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _open_locked(folder / name)
    except BlockingIOError:
        raise UsageError(f"another process is using {folder}; {mend}.") from None
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror or error}; {WRITABLE}.") from error
    with lock:
        try:
            remove_temporaries(folder, *(folder / inner for inner in within))
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / name).unlink()
                if made:
                    folder.rmdir()


def move_aside(folder: Path) -> Path:
    """Rename a folder that no process uses to the first free of NAME-1, NAME-2, …; return its new path."""
    numbered = (folder.with_name(f"{folder.name}-{i}") for i in itertools.count(1))
    aside = next(path for path in numbered if not os.path.lexists(path))
    with locked(folder), _writing(folder, WRITABLE):
        folder.rename(aside)
        (aside / ".lock").unlink()  # it moved, too
    return aside


def _open_locked(file: Path) -> IO[bytes]:
    """Open a file for this process alone to write; raise `BlockingIOError` if another process does."""
    while True:
        sink = open(file, "wb")  # noqa: SIM115
        try:
            _lock(sink)
            if _is_at(file, sink):
                return sink
        except BaseException:
            sink.close()
            raise
        sink.close()  # it was removed in between, by the process that held it before


def _lock(file: IO[bytes]) -> bool:
    """Lock a file until it is closed; return whether that worked. `BlockingIOError` if another process holds it."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return False
    return True


def _is_at(file: Path, opened: IO[bytes]) -> bool:
    """Whether an open file is still the one at its path."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(opened.fileno()))
    except FileNotFoundError:
        return False


def is_fresh(folder: Path, first: str) -> bool:
    """Whether a folder is missing, or has only what a process leaves that is killed while it writes its first file."""
    try:
        entries = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return not os.path.lexists(folder)
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror or error}; choose another folder.") from error
    return all(entry.startswith((".lock", f".{first}.", f"..{first}.")) or entry == "locks" for entry in entries)


def remove_temporaries(*folders: Path, name: str = "*") -> None:
    """Remove the temporary files of killed processes; those that are being written are locked and stay.

    Args:
      folders: the folders, without those in them.
      name: pattern of the files' names.
    """
    for folder in folders:
        for file in folder.glob(f".{name}.*.tmp"):
            if _TEMPORARY.fullmatch(file.name):
                with contextlib.suppress(OSError), open(file, "ab") as leftover:
                    if _lock(leftover) and _is_at(file, leftover):
                        file.unlink()
