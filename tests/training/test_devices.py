"""One large agent over several devices: the same learning, environments that stay where they are, runs that resume."""

import os

import jax
import pytest
from probes import small_config

from trpo_jax import UsageError, init, shard_environments
from trpo_jax.cli import main
from trpo_jax.training.devices import devices_of

ONE_LARGE_AGENT = """
import jax, numpy as np
from trpo_jax import Config, init, train_step
from trpo_jax.training.devices import shard_environments
config = Config(num_envs=64, num_steps=16, normalize_observations=True, normalize_rewards=True)
state = jax.jit(init)(config, jax.random.key(0))
spread = shard_environments(state)
step = jax.jit(train_step)
compiled = step.lower(config, spread).compile()
text = compiled.as_text()
assert "all-reduce" in text
new, metrics = compiled(config, spread)
observation = new.actor.observation
assert len(observation.sharding.device_set) == 4
assert observation.sharding.shard_shape(observation.shape)[0] == 16, observation.sharding
expected, expected_metrics = step(config, state)
np.testing.assert_allclose(metrics.mean_kl, expected_metrics.mean_kl, rtol=1e-3)
np.testing.assert_allclose(metrics.surrogate_gain, expected_metrics.surrogate_gain, rtol=1e-3)
np.testing.assert_array_equal(metrics.num_episodes, expected_metrics.num_episodes)
for name in ("statistics", "return_statistics"):
    merged, whole = getattr(new.learner, name), getattr(expected.learner, name)
    assert merged.count == whole.count in (64 * 16, 2 * 64 * 16)  # observations: one rollout before the first, too
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(merged.variance, whole.variance, rtol=1e-4, atol=1e-6)
for a, b in zip(jax.tree.leaves(new.learner.policy_params), jax.tree.leaves(expected.learner.policy_params)):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
import re
moved = re.findall(r"= \\w+\\[([\\d,]*)\\]\\S* (?:all-gather|all-to-all|collective-permute)\\(", text)
print("largest array that moves:", max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in moved))
"""


@pytest.mark.long
def test_one_large_agent_over_four_devices(python):
    quick = os.environ.get("XLA_FLAGS", "")
    flags = {"XLA_FLAGS": f"{quick} --xla_force_host_platform_device_count=4", "NPROC": "16"}
    result = python("-c", ONE_LARGE_AGENT, env=flags, timeout=250)
    assert result.returncode == 0, result.stderr[-3000:]
    # The batch of 1024 samples stays where it is: what moves is an entry or two an environment.
    assert 0 < int(result.stdout.split(":")[1]) <= 2 * 64


def test_environments_must_divide_over_the_devices():
    state = jax.jit(init)(small_config(num_envs=3), jax.random.key(0))
    with pytest.raises(UsageError, match="num_envs=3 is not a multiple of the 2 devices"):
        shard_environments(state, jax.local_devices()[:1] * 2)


RUNS = """
import sys
from pathlib import Path
import numpy as np
from trpo_jax import Config, continue_run, create_run, load_run
folder = Path(sys.argv[1])
config = Config(num_envs=8, num_steps=16, num_iterations=4, eval_every=2, eval_episodes=2)
one, two, parts = (create_run(folder / name, config, 5, 1) for name in ("one", "two", "parts"))
assert continue_run(one)
assert continue_run(two, num_devices=2)
assert not continue_run(parts, lambda progress: False, num_devices=2)  # ends after a chunk
assert continue_run(parts, num_devices=2)
for name in ("metrics.csv", "eval.csv"):
    assert (two.path / name).read_bytes() == (parts.path / name).read_bytes(), name
table = {run: np.genfromtxt(run.path / "metrics.csv", delimiter=",", names=True) for run in (one, two)}
np.testing.assert_array_equal(table[one]["num_episodes"][:2], table[two]["num_episodes"][:2])
np.testing.assert_allclose(table[one]["mean_kl"][0], table[two]["mean_kl"][0], rtol=1e-3)
assert table[two]["finite"].all() and load_run(two.path)[1].iteration.tolist() == [4]
"""


@pytest.mark.long
def test_a_run_on_two_devices_resumes_to_its_bits_and_learns_the_same(python, tmp_path):
    quick = os.environ.get("XLA_FLAGS", "")
    flags = {"XLA_FLAGS": f"{quick} --xla_force_host_platform_device_count=2", "NPROC": "2"}
    result = python("-c", RUNS, str(tmp_path), env=flags, timeout=250)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_run_names_what_is_wrong_with_its_devices(tmp_path, capsys):
    for wrong, sentence in (
        (["--num-devices", "2", "--num-seeds", "2"], "num_devices=2 spreads the environments of one agent, and there"),
        (["--num-devices", "200"], "num_devices=200, but JAX finds"),
        (["--num-devices", "0"], "num_devices must be a whole number from 1 to 256, got 0."),
    ):
        assert main(["train", *wrong, "--output", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert devices_of(1, 7, 3) == jax.devices()[:1]
