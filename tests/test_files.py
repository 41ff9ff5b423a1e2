"""Writing and locking: files are whole or not there, folders have one process at work, and a death leaves no mark."""

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trpo_jax
from trpo_jax import UsageError
from trpo_jax.files import BLANK_SEAL, append, is_fresh, is_intact, locked, remove_temporaries, sealed, write_atomically
from trpo_jax.runs.descriptions import write_table
from trpo_jax.sentences import command

HOLD = """
import sys, time
from pathlib import Path
from trpo_jax.files import locked, write_atomically

def hold(sink=None):
    print("held", flush=True)
    time.sleep(60)

folder = Path(sys.argv[2])
if sys.argv[1] == "folder":
    with locked(folder):
        hold()
else:
    write_atomically(folder / "state.npz", hold)
"""


@pytest.fixture
def holder():
    """Start a process that holds a folder, or is in the middle of writing a file in it."""
    children = []

    def start(what, folder):
        child = subprocess.Popen([sys.executable, "-c", HOLD, what, str(folder)], stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout.readline() == "held\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()


def test_a_folder_is_held_until_its_holder_dies(tmp_path, holder):
    child = holder("folder", tmp_path)
    with pytest.raises(UsageError, match=r"^another process is using .*; wait for it"), locked(tmp_path):
        pass
    child.kill()
    child.wait()
    with locked(tmp_path):
        assert not is_fresh(tmp_path, "config.json") or os.listdir(tmp_path) == [".lock"]
    assert os.listdir(tmp_path) == []


def test_a_lock_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "new"):
        raise KeyError
    assert os.listdir(tmp_path) == []
    with locked(tmp_path / "new"):
        (tmp_path / "new" / "config.json").touch()
    assert os.listdir(tmp_path / "new") == ["config.json"]


def test_a_lock_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot write to .*file/run: Not a directory; choose"):
        locked(tmp_path / "file" / "run").__enter__()


def test_temporaries_go_with_the_death_of_their_process(tmp_path, holder):
    child = holder("file", tmp_path)
    (temporary,) = tmp_path.iterdir()
    others = [".note.tmp", "state.npz.1.tmp", ".state.npz.tmp", ".state.npz.x.tmp"]
    for name in others:
        (tmp_path / name).write_text("precious")
    remove_temporaries(tmp_path)
    assert temporary.exists()
    child.kill()
    child.wait()
    remove_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_a_file_that_is_written_again_clears_what_was_left_of_it(tmp_path):
    for name in (".table.csv.1.tmp", ".other.csv.1.tmp"):
        (tmp_path / name).touch()
    write_atomically(tmp_path / "table.csv", "1\n")
    assert sorted(os.listdir(tmp_path)) == [".other.csv.1.tmp", "table.csv"]


@pytest.mark.parametrize("links", [True, False])
def test_the_first_one_counts_where_several_write(tmp_path, monkeypatch, links):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for number in range(3):
        write_atomically(tmp_path / "sweep.json", str(number), first=True)
    assert (tmp_path / "sweep.json").read_text() == "0" and os.listdir(tmp_path) == ["sweep.json"]
    write_atomically(tmp_path / "sweep.json", "3")
    assert (tmp_path / "sweep.json").read_text() == "3"


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    write_atomically(file, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (write_atomically, append):
        with pytest.raises(UsageError, match=r"^cannot write .*table\.csv: No space left on device; make room\.$"):
            write(file, "new", "make room")
    assert file.read_bytes().startswith(b"old") and os.listdir(tmp_path) == [file.name]


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", "text")
    assert os.read(reader, 9) == b"text" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"


def test_any_flipped_bit_breaks_the_seal(tmp_path):
    file = tmp_path / "config.json"
    write_table(file, {"max_kl": 0.01, "env": "CartPole-v1"})
    good = file.read_bytes()
    assert is_intact(good) and is_intact(b"of an earlier version")
    for position in range(len(good)):
        for bit in range(8):
            data = bytearray(good)
            data[position] ^= 1 << bit
            # A seal that is not known as one any more is the only thing that is wrong then.
            known = b"crc32:" in data and data[data.rindex(b"crc32:") + 6 :][:8].strip(b"0123456789abcdef") == b""
            assert not is_intact(bytes(data)) or not known, position
    assert sealed(f"a {BLANK_SEAL} b {BLANK_SEAL}".encode()).startswith(f"a {BLANK_SEAL} b crc32:".encode())


def test_nothing_in_the_package_writes_past_it():
    """Whatever is written elsewhere could be cut by a kill, or end in a traceback on a full disk."""
    found = []
    for file in Path(trpo_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or file.name == "files.py" or "workers" in file.parts:
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            modes = [value.value for value in node.args if isinstance(value, ast.Constant)]
            opens = isinstance(node.func, ast.Name) and name == "open" and "os.devnull" not in ast.unparse(node)
            writes = opens and any(isinstance(m, str) and set(m) & set("wax+") for m in modes)
            if name in ("write_text", "write_bytes") or writes:
                found.append(f"{file.name}:{node.lineno} {name}")
    assert not found


@pytest.mark.parametrize(
    "path, env, line",
    [
        ("runs/CartPole-v1", "CartPole-v1", "`trpo-jax resume runs/CartPole-v1`"),
        ("my runs/a", None, "`trpo-jax resume 'my runs/a'`"),
        ("-x", None, "`trpo-jax resume ./-x`"),
        ("r", "gymnasium/module:Name-v0", "`trpo-jax resume r --trust gymnasium/module:Name-v0`"),
    ],
)
def test_a_command_that_is_advised_can_be_run_as_it_stands(path, env, line):
    assert command("resume", path, env=env) == line
