"""Where an agent runs leaves no mark on it: one device or four, any block, any order, alone or among others."""

import numpy as np
import pytest

pytestmark = pytest.mark.long

# Networks, lanes and minibatch as users have them; short, to be quick. Bits are looked at, so nothing is simplified.
AGENTS = """
import itertools, re, sys
import jax, numpy as np
from probes import raw
from trpo_jax import Config, init, sweep
from trpo_jax.sweeps import in_memory
from trpo_jax.sweeps.plans import stack_configs
from trpo_jax.training.loop import train_chunk

config = Config(num_envs=4, num_steps=32, num_iterations=4)
grid = {"max_kl": [0.01, 0.02], "gamma": [0.9, 0.95, 0.99]}
keys = jax.random.split(jax.random.key(1), 2)
agents = [
    (config.replace(max_kl=max_kl, gamma=gamma), key) for max_kl, gamma in itertools.product(*grid.values())
    for key in keys
]

def save(name, tree):
    np.savez(f"{sys.argv[1]}/{name}.npz", **{
        jax.tree_util.keystr(path): raw(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    })

fit, used = in_memory.fit_programs, []

def fit_and_watch(*arguments):
    used.append(fit(*arguments))
    return used[-1]

in_memory.fit_programs = fit_and_watch
metrics = sweep(config, grid, jax.random.key(1), num_seeds=2, num_episodes=0).metrics
save("sweep", jax.tree.map(lambda leaf: leaf.reshape(12, 4), metrics))
(programs,) = used
# Agents never communicate: no device waits for another.
text = programs.start.as_text() + programs.train.as_text()
moved = re.search(r"\\b(all-[a-z]+|reduce-scatter|collective-[a-z]+|send|recv)(-start|-done)?\\(", text)
assert "while(" in text and not moved, moved

def in_programs_of_the_sweep(agents):
    configs, keys = zip(*agents)
    configs = stack_configs(configs)
    return programs.train(configs, programs.start(configs, jax.numpy.stack(keys)), np.int32(4))

save("states", in_programs_of_the_sweep(agents))
"""
ONE_DEVICE = """
save("backwards", jax.tree.map(lambda leaf: leaf[::-1], in_programs_of_the_sweep(agents[::-1])))
start = jax.jit(init)
chunk = jax.jit(lambda config, state: train_chunk(config, state, np.int32(4), capacity=4))
alone = [chunk(config, start(config, key)) for config, key in agents]
save("alone", jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *alone))
"""


@pytest.fixture(scope="module")
def trained(python, tmp_path_factory):
    """By number of devices and name: arrays of the 12 agents, as one block on one device and three a device on four."""
    found = {}
    for devices, code in ((1, AGENTS + ONE_DEVICE), (4, AGENTS)):
        # As many threads in both: XLA cuts a long sum into as many parts as its pool has threads.
        flags = {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": None,
            "NPROC": "4",
            "PYTHONPATH": "tests",
        }
        folder = tmp_path_factory.mktemp("bits")
        check = "\nprint(jax.local_device_count(), programs.num_devices, programs.agents_per_block)"
        result = python("-c", code + check, str(folder), env=flags, timeout=250)
        assert result.stdout == f"{devices} {devices} {12 // devices}\n", result.stderr
        for file in folder.iterdir():
            found[devices, file.stem] = dict(np.load(file))
    return found


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys() and all(values.shape[0] == 12 for values in ours.values())
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes(), name


def test_one_device_and_four_give_the_same_bits(trained):
    assert len(np.unique(trained[1, "sweep"][".mean_kl"])) == 48
    assert_same_bits(trained[1, "sweep"], trained[4, "sweep"])
    assert_same_bits(trained[1, "states"], trained[4, "states"])


def test_bits_do_not_depend_on_order(trained):
    assert_same_bits(trained[1, "states"], trained[1, "backwards"])


def test_an_agent_of_a_sweep_is_the_one_that_train_trains_alone(trained):
    assert_same_bits(trained[1, "states"], trained[1, "alone"])
