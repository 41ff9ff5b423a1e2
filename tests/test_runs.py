"""A run's folder: what it holds, and that a kill at any moment leaves no mark on the result."""

import dataclasses
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from trpo_jax import Config, Metrics, train
from trpo_jax.runs import continue_run, create_run, newest_state, open_run, plot_learning_curve, read_metrics

SIZES = [
    "--num-envs",
    "2",
    "--num-steps",
    "8",
    "--value-minibatches",
    "1",
    "--value-epochs",
    "1",
    "--cg-iterations",
    "2",
]
LONG = [*SIZES, "--num-iterations", "4000", "--num-seeds", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = Config(num_envs=2, num_steps=64, num_iterations=5, value_minibatches=1, value_epochs=1)
    run = create_run(tmp_path_factory.mktemp("runs") / "run", config, seed=3, num_seeds=2)
    reports = []
    assert continue_run(run, reports.append)
    assert reports[-1].iteration == 5 and reports[-1].seconds_left == 0 and reports[-1].steps_per_second > 0
    return run


def test_metrics_are_those_of_train(run):
    import jax

    _, expected = jax.jit(jax.vmap(train, in_axes=(None, 0)))(run.config, run.keys)
    columns = read_metrics(run)
    assert list(columns) == ["iteration", "env_steps", "seed", *(field.name for field in dataclasses.fields(Metrics))]
    np.testing.assert_array_equal(columns["iteration"], np.repeat(np.arange(1, 6), 2))
    np.testing.assert_array_equal(columns["env_steps"], 128 * columns["iteration"])
    np.testing.assert_array_equal(columns["seed"], np.tile([3, 4], 5))
    for name in ("mean_kl", "episode_return", "value_loss"):
        # Nine digits bring a float32 back exactly.
        np.testing.assert_array_equal(np.float32(columns[name].reshape(5, 2).T), np.asarray(getattr(expected, name)))


def test_folder_round_trip(run):
    assert open_run(run.path) == run
    state = newest_state(run)
    assert state.iteration.shape == (2,) and int(state.iteration[0]) == run.config.num_iterations


def test_agent_depends_on_its_seed_alone(run, tmp_path):
    alone = create_run(tmp_path / "alone", run.config, seed=4, num_seeds=1)
    continue_run(alone, lambda _: None)
    both, one = read_metrics(run), read_metrics(alone)
    # Products of several agents round differently from those of one, and iterations magnify the difference.
    np.testing.assert_allclose(both["mean_kl"][1::2], one["mean_kl"], rtol=1e-3)
    np.testing.assert_allclose(both["mean_kl"][1:4:2], one["mean_kl"][:2], rtol=1e-5)


def test_plot_is_drawn(run):
    file = plot_learning_curve(run)
    from matplotlib.image import imread

    picture = imread(file)
    assert picture.shape[0] > 300 and picture.shape[1] > 500
    assert picture[..., :3].std() > 0.02  # not a blank sheet


def start(path):
    command = [sys.executable, "-m", "trpo_jax.cli", "train", *LONG, "--output", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_checkpoint(path, process):
    deadline = time.monotonic() + 120
    while not list(path.glob("checkpoints/[0-9]*.npz")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "run"
    process = start(path)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return path


def assert_same_results(path, uninterrupted):
    assert (path / "metrics.csv").read_bytes() == (uninterrupted / "metrics.csv").read_bytes()
    newest = sorted(path.glob("checkpoints/[0-9]*.npz"))[-1]
    with np.load(newest) as ours, np.load(uninterrupted / "checkpoints" / newest.name) as theirs:
        assert ours.files == theirs.files
        for name in ours.files:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_kill_and_resume_gives_the_same_bits(uninterrupted, tmp_path, python):
    path = tmp_path / "run"
    process = start(path)
    wait_for_checkpoint(path, process)
    time.sleep(0.3)
    process.kill()
    process.communicate()
    assert not (path / "checkpoints" / "00004000.npz").exists(), "killed too late to test anything"
    # A kill between writing rows and saving the state leaves rows that the resumed run writes again.
    with open(path / "metrics.csv", "a") as file:
        file.write("9999,1,2,3")
    result = python("-m", "trpo_jax.cli", "resume", str(path), timeout=200)
    assert result.returncode == 0, result.stderr
    assert_same_results(path, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_keeps_what_is_done(number, uninterrupted, tmp_path, python):
    path = tmp_path / "run"
    process = start(path)
    wait_for_checkpoint(path, process)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, (out, errors)
    assert f"trpo-jax resume {path}" in out and "Traceback" not in errors
    assert (path / "learning_curve.png").exists()
    assert python("-m", "trpo_jax.cli", "resume", str(path), timeout=200).returncode == 0
    assert_same_results(path, uninterrupted)
