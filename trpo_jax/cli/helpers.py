"""Further processes on this machine that take their share of a sweep, for environments that run in Python."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Literal

from trpo_jax.runs.runner import interrupts
from trpo_jax.sentences import UsageError

_INTERRUPTED = 130


class Helpers:
    """Processes 1 … number - 1 of a sweep, whose process 0 is this one; leaving the context stops and awaits them.

    Args:
      words: the words of the command after `trpo-jax sweep`.
      number: processes in all; 1: no helpers.
    """

    def __init__(self, words: Sequence[str], number: int):
        self.words, self.number = words, number
        self.started: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []

    def __enter__(self) -> Helpers:
        for i in range(1, self.number):
            errors, nothing = tempfile.TemporaryFile(), subprocess.DEVNULL
            which = [f"--num-processes={self.number}", f"--process-id={i}", f"--helper-of={os.getpid()}"]
            command = [sys.executable, "-m", "trpo_jax", "sweep", *which, *self.words]
            self.started.append((subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=errors), errors))
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        for process, _ in self.started:
            if process.poll() is None:
                process.terminate()  # it saves its agents
        for process, errors in self.started:
            process.wait()
            errors.close()

    def finish(self) -> Literal["complete", "interrupted"]:
        """Wait for the helpers.

        Raises:
          UsageError: if one failed; what is finished is safe.
        """
        with interrupts() as interrupted:
            while any(process.poll() is None for process, _ in self.started) and not interrupted():
                time.sleep(0.05)
            if interrupted():
                return "interrupted"
        for i, (process, errors) in enumerate(self.started, 1):
            if process.returncode == _INTERRUPTED:
                return "interrupted"
            if process.returncode:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").splitlines() or [f"status {process.returncode}."]
                why = lines[-1].removeprefix("trpo-jax: ")
                raise UsageError(f"process {i} of {self.number} failed: {why}")
        return "complete"
