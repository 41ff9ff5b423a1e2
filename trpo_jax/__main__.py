"""The program `trpo-jax`, also `python -m trpo_jax`. Imports next to nothing before Ctrl-C is handled."""

from __future__ import annotations

import os
import signal
import sys


def run() -> None:
    """Run the command line and exit with its status.

    Until a command has something to lose and handles the signal, Ctrl-C ends the process at once. As an exception it
    would print a traceback of some import, or be lost in code that catches everything.
    """
    signal.signal(signal.SIGINT, _leave)
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; Matplotlib cannot be imported with an unknown backend
    from trpo_jax.cli import main

    sys.exit(main())


def _leave(*_: object) -> None:
    os.write(2, b"trpo-jax: interrupted.\n")
    os._exit(130)


if __name__ == "__main__":
    run()
