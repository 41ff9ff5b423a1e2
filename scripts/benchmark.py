"""`trpo-jax benchmark` beside every peer, each in a throw-away virtual environment of its own.

python scripts/benchmark.py [--output benchmark.json] [any option of `trpo-jax benchmark`]

With a `--compare` of its own it asks for that peer alone.
"""

import sys

from trpo_jax.cli import main

if __name__ == "__main__":
    peers = [] if "--compare" in sys.argv else ["--compare", "sb3-contrib", "--compare", "rejax"]
    sys.exit(main(["benchmark", *sys.argv[1:], *peers]))
