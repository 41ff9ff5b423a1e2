"""A way to run commands that are meant to be interrupted."""

import subprocess
import sys

import pytest


@pytest.fixture
def start():
    """Start `trpo-jax` as a child; whoever starts it sees to its end. Children left over are killed."""
    children = []

    def run(*arguments):
        command = [sys.executable, "-m", "trpo_jax", *map(str, arguments)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        children.append(child)
        return child

    yield run
    for child in children:
        if child.poll() is None:
            child.kill()
            child.communicate()
