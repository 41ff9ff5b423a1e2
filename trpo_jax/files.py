"""Files: settings as they stand in them, and folders and files that a kill leaves whole. Imports no JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
import re
import shlex
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from trpo_jax.config import Config, UsageError, check_limits, check_setting, first_line, nearest, shown

_KINDS = {field.name: str(field.type) for field in dataclasses.fields(Config) if field.metadata["flag"]}
SETTINGS = ("env", *_KINDS)  # what a file can name; networks and environments of one's own it cannot
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # of `write_atomically`: .NAME.PROCESS.tmp
_SEAL = re.compile(rb"crc32:([0-9a-f]{8})")
BLANK_SEAL = "crc32:00000000"  # stands in what is written for the checksum that `sealed` puts there
WRITABLE = "choose a folder that can be written to"
TOTAL_STEPS = "total_steps"  # may stand for num_iterations wherever a setting may
_MOST_BYTES = 2**24  # of a file of settings


def settings_of(config: Config) -> dict[str, Any]:
    """The settings of a configuration, as files have them."""
    return {name: getattr(config, name) for name in SETTINGS}


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The table in a TOML file; raise `UsageError` with one sentence if there is none."""
    import tomllib  # deferred: `trpo-jax --help` can do without

    try:
        return tomllib.loads(_read(path).decode("utf-8-sig"))  # some editors begin a file with a mark
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text in UTF-8; save it in that encoding.") from None
    except (ValueError, RecursionError) as error:  # ValueError: of the form, the encoding, or a number's digits
        raise UsageError(f"{path} is not TOML: {first_line(error)}.") from None


def read_json(path: str | os.PathLike[str], mend: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      path: the file.
      mend: the end of the sentence if it holds none.

    Raises:
      FileNotFoundError, NotADirectoryError: if there is no such file.
      UsageError: with one sentence, if it cannot be read or is damaged.
    """
    try:
        value = json.loads(_read(path))
        if not isinstance(value, dict):
            raise ValueError("it is no table of names and values")
        return value
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({first_line(error)}); {mend}.") from error


def origin(file: Path) -> str:
    """A checksum of what a file of `write_table` asks for, whoever wrote it: what was made for it bears it.

    Equal descriptions have equal ones, so that a folder may be copied, moved and renamed.
    """
    asked = {name: value for name, value in json.loads(_read(file)).items() if name not in ("made_by", "checksum")}
    return f"{zlib.crc32(json.dumps(asked, sort_keys=True).encode()):08x}"


def _read(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES // 2**20} MiB")
    return content


def is_whole(name: str) -> bool:
    """Whether a setting takes whole numbers."""
    return name == TOTAL_STEPS or _KINDS.get(name) == "int"


def cast(name: str, value: Any) -> Any:
    """The value of a setting as `Config` has it: TOML writes 1 for 1.0, and 1e5 for a whole number."""
    if type(value) is int and _KINDS.get(name) == "float":
        with contextlib.suppress(OverflowError):  # too large for any range
            return float(value)
    if isinstance(value, float) and is_whole(name) and value.is_integer():
        return int(value)
    return value


def checked(name: str, value: Any, source: str) -> Any:
    """The value of a setting in a file, cast and checked: one number, truth value or word.

    Raises:
      UsageError: with one sentence that names the setting and the file.
    """
    value = cast(name, value)
    if name == TOTAL_STEPS:
        check_limits({name: value}, source)
    elif name == "env":
        check_env_name(value, source)
    else:
        check_setting(name, value, source)
    return value


def check_env_name(name: Any, source: str) -> None:
    """Refuse what is no environment's name, and one that has Gymnasium import a module: a file must not run code."""
    if not isinstance(name, str):
        raise UsageError(f"env in {source} must be the name of an environment, got {shown(name)}.")
    if ":" in name:
        raise UsageError(
            f"env in {source} names a module to import, {shown(name)}, which only the command line may; give it there."
        )


def checked_settings(table: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings as a file has them, as `Config` has them, each known and checked by itself.

    Args:
      table: names and values.
      source: the file, for the sentence.

    Raises:
      UsageError: with one sentence.
    """
    check_names(table, source)
    return {name: checked(name, value, source) for name, value in table.items()}


def check_names(names: Iterable[str], source: str) -> None:
    """Raise `UsageError` with one sentence if one of the names is no setting."""
    known = (*SETTINGS, TOTAL_STEPS)
    for name in names:
        if name not in known:
            raise UsageError(f"{source} has no setting {shown(name)}{nearest(name, known)}")


def iterations_within(total_steps: int, config: Config) -> int:
    """How many iterations take at most `total_steps` environment steps; raise `UsageError` if none does."""
    check_limits({TOTAL_STEPS: total_steps})
    iterations = total_steps // config.steps_per_iteration
    if iterations < 1:
        raise UsageError(
            f"{TOTAL_STEPS}={total_steps} is less than one iteration of num_envs x num_steps = "
            f"{config.steps_per_iteration}; raise it, or lower num_envs or num_steps."
        )
    return iterations


def with_length(settings: Mapping[str, Any], base: Config) -> Config:
    """`base` with some settings changed, among which `total_steps` may stand for `num_iterations`, if not both do."""
    if TOTAL_STEPS not in settings:
        return base.replace(**settings)
    if "num_iterations" in settings:
        raise UsageError("total_steps and num_iterations both set the length of a run; give one of them.")
    config = base.replace(**{name: value for name, value in settings.items() if name != TOTAL_STEPS})
    return config.replace(num_iterations=iterations_within(settings[TOTAL_STEPS], config))


def command(name: str, path: str | os.PathLike[str], *, env: Any = None) -> str:
    """A command on a folder as a shell takes it, for a sentence; `env` is named where it has a module imported."""
    path = os.fspath(path)
    words = ["trpo-jax", name, f"./{path}" if path.startswith("-") else path]
    return f"`{shlex.join([*words, '--env', env] if isinstance(env, str) and ':' in env else words)}`"


def say(sentence: str) -> None:
    """One line for whoever started the process, on standard error; nothing if that cannot be written to."""
    with contextlib.suppress(OSError):  # a name in it may have line breaks
        print(f"trpo-jax: {' '.join(sentence.splitlines())}", file=sys.stderr, flush=True)


def drop_output() -> None:
    """Send what is still to be printed nowhere, so that Python's exit does not stumble over it again."""
    with contextlib.suppress(OSError, ValueError):  # no file is behind it, as where a program calls `main`
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


# Writing


def write_atomically(
    file: Path, content: str | bytes | Callable[[IO[bytes]], Any], mend: str = WRITABLE, *, first: bool = False
) -> None:
    """Write a file, with its folder, so that it is the old one or the new one after a kill or a power cut.

    Args:
      file: where to. A device or a pipe is written to as it is.
      content: text, bytes, or a function that writes into the open file.
      mend: the end of the sentence if that fails.
      first: a file that is there already stays: where several processes try, the first one's counts for all.

    Raises:
      UsageError: if the file cannot be written; nothing is left of it then.
    """
    write = content if callable(content) else lambda sink: sink.write(_bytes(content))
    file = file.resolve() if file.is_symlink() else file
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
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
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror or error}; {mend}.") from error


def _bytes(content: Any) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _publish(temporary: Path, file: Path, first: bool) -> None:
    """Give a finished file its name; with `first`, unless another one bears it."""
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
    """Bring the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append(file: Path, text: str, mend: str = WRITABLE) -> None:
    """Write at the end of a file, through to the disk; raise `UsageError` if that fails."""
    try:
        with open(file, "ab") as sink:
            sink.write(text.encode())
            sink.flush()
            os.fsync(sink.fileno())
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror or error}; {mend}.") from error


def sealed(data: bytes) -> bytes:
    """`data` with the checksum of everything else in place of the last `BLANK_SEAL` in it."""
    at = data.rindex(BLANK_SEAL.encode())
    return data[:at] + f"crc32:{zlib.crc32(data):08x}".encode() + data[at + len(BLANK_SEAL) :]


def is_intact(data: bytes) -> bool:
    """Whether what `sealed` gave is as it was; what never had a seal counts as intact."""
    found = list(_SEAL.finditer(data))
    if not found:
        return True
    start, end = found[-1].span()
    blank = data[:start] + BLANK_SEAL.encode() + data[end:]
    return zlib.crc32(blank) == int(found[-1].group(1), 16)


def write_table(file: Path, table: dict[str, Any], *, first: bool = False) -> None:
    """Write names and values as sealed JSON; `first` is that of `write_atomically`."""
    text = json.dumps({**table, "checksum": BLANK_SEAL}, indent=1) + "\n"
    write_atomically(file, sealed(text.encode()), first=first)


def check_seal(file: Path, mend: str) -> None:
    """Raise `UsageError` if a file of `write_table` is not as it was written."""
    if not is_intact(_read(file)):
        raise UsageError(f"{file} is damaged (it was changed since it was written); {mend}.")


# Folders


@contextlib.contextmanager
def locked(folder: Path, name: str = ".lock", mend: str = "wait for it, or choose another folder") -> Iterator[None]:
    """Hold a folder, made if need be, against a second process; a holder that is killed lets go by itself.

    On a file system without locks nothing is held. A folder that was made for it and stays empty goes with the lock.

    Raises:
      UsageError: if another process holds the folder, which `mend` says what to do about, or it cannot be written to.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _open_locked(folder / name)
    except BlockingIOError:
        raise UsageError(f"another process is at work on {folder}; {mend}.") from None
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror or error}; {WRITABLE}.") from error
    with lock:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / name).unlink()
                if made:
                    folder.rmdir()


def _open_locked(file: Path) -> IO[bytes]:
    """Open a file to write it alone; raise `BlockingIOError` if another process does."""
    while True:
        sink = open(file, "wb")  # noqa: SIM115
        try:
            _lock(sink)
            if _is_at(file, sink):
                return sink
        except BaseException:
            sink.close()
            raise
        sink.close()  # it was removed in between, by whoever held it before


def _lock(file: IO[bytes]) -> bool:
    """Whether a file is locked for this process until it is closed; `BlockingIOError` if another one holds it."""
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
    """Whether an open file is still the one that bears the name."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(opened.fileno()))
    except FileNotFoundError:
        return False


def is_fresh(folder: Path, first: str) -> bool:
    """Whether a folder is not there, or holds nothing but what a kill leaves of the beginning of its first file."""
    try:
        entries = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return not os.path.lexists(folder)
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror or error}; choose another folder.") from error
    return all(entry.startswith((".lock", f".{first}.", f"..{first}.")) or entry == "locks" for entry in entries)


def remove_temporaries(*folders: Path, name: str = "*") -> None:
    """Remove what killed processes left of files they were writing; the files of those at work are locked, and stay.

    Args:
      folders: where; not in folders below them.
      name: pattern of the files' names.
    """
    for folder in folders:
        for file in folder.glob(f".{name}.*.tmp"):
            if _TEMPORARY.fullmatch(file.name):
                with contextlib.suppress(OSError), open(file, "ab") as leftover:
                    if _lock(leftover) and _is_at(file, leftover):
                        file.unlink()
