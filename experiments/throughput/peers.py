"""Other trainers, each in a virtual environment of its own, where a worker answers requests."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Peer:
    """What to install, in steps of pip's arguments, and the program that answers inside.

    A worker imports the peer and nothing of ours. It reads one JSON object per line from standard input, does what its
    "do" says, and answers with one line of JSON.
    """

    name: str
    worker: str
    requirements: tuple[tuple[str, ...], ...]


PEERS = {
    "sb3-contrib": Peer(
        "sb3-contrib",
        "sb3_contrib_trpo.py",
        # Torch by itself first: its exact version may lie at hand, where a range would fetch the newest.
        (("torch==2.13.0",), ("sb3-contrib==2.9.2",)),
    ),
    # The last gymnax whose `step` rejax can unpack, and the JAX that we run on ourselves.
    "rejax": Peer("rejax", "rejax_ppo.py", (("rejax==0.1.3", "gymnax==0.0.9", f"jax=={version('jax')}"),)),
}


class PeerError(Exception):
    """A peer could not be installed or stopped; the message says which and how."""


Ask = Callable[..., dict[str, Any]]


@contextlib.contextmanager
def running(peer: Peer, environments: Path | None = None) -> Iterator[Ask]:
    """Install a peer, start its worker, and give a function that puts a request to it and returns the answer.

    Args:
      peer: one of `PEERS`.
      environments: folder that keeps virtual environments for the next time; by default they are thrown away.

    Raises:
      PeerError: if it cannot be installed, or stops before it has answered.
    """
    with contextlib.ExitStack() as stack:
        home = environments or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trpo_jax_peer_")))
        python = _install(peer, home.resolve() / peer.name)
        log = stack.enter_context(tempfile.TemporaryFile("w+"))
        # Its own packages alone: nothing of ours may leak into its path.
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        worker = stack.enter_context(
            subprocess.Popen(
                [python, str(Path(__file__).parent / "workers" / peer.worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=variables,
            )
        )
        stack.callback(worker.kill)

        def ask(do: str, **request: Any) -> dict[str, Any]:
            assert worker.stdin and worker.stdout
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps({"do": do, **request}), file=worker.stdin, flush=True)
            for line in worker.stdout:
                if line.startswith("{"):
                    return json.loads(line)
            log.seek(0)
            raise PeerError(f"{peer.name} stopped: {_last_line(log.read())}")

        yield ask


def _install(peer: Peer, folder: Path) -> str:
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done = folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        for arguments in peer.requirements:
            command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise PeerError(f"{peer.name} could not be installed: {_last_line(result.stderr)}")
        done.touch()
    return str(python)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it left no message"
