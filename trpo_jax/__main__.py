"""The program `trpo-jax`, which is also `python -m trpo_jax`. Imports next to nothing before Ctrl-C is in hand."""

from __future__ import annotations

import os
import signal
import sys


def run() -> None:
    """Run the command line and exit with its status.

    Until a command has something to lose and takes the signal over, Ctrl-C ends the process at once: as an exception
    it would be a traceback of some import, or be lost in one that catches everything.
    """
    signal.signal(signal.SIGINT, _leave)
    os.environ["MPLBACKEND"] = (
        "agg"  # pictures go to files; Matplotlib refuses to be imported with one it does not know
    )
    from trpo_jax.cli import main

    sys.exit(main())


def _leave(*_: object) -> None:
    os.write(2, b"trpo-jax: interrupted.\n")
    os._exit(130)


if __name__ == "__main__":
    run()
