"""A sweep as small as sweeps get, and a way to run commands on it."""

import subprocess
import sys

import pytest

SPEC = """
num_seeds = 3
num_episodes = {episodes}

[base]
num_envs = 2
num_steps = 8
num_iterations = {iterations}
cg_iterations = 2
value_cg_iterations = 2

[grid]
max_kl = [0.001, 0.01]
gae_lambda = [0.9, 0.95]
"""


@pytest.fixture
def spec_file(tmp_path):
    def write(iterations=6, episodes=2, more=""):
        file = tmp_path / "sweep.toml"
        file.write_text(SPEC.format(iterations=iterations, episodes=episodes) + more)
        return file

    return write


@pytest.fixture
def start():
    """Start `trpo-jax` as a child; whoever starts it sees to its end. Children left over are killed."""
    children = []

    def run(*arguments, env=None):
        command = [sys.executable, "-m", "trpo_jax.cli", *map(str, arguments)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        children.append(child)
        return child

    yield run
    for child in children:
        if child.poll() is None:
            child.kill()
            child.communicate()
