"""A run's folder: what it holds, and that a kill at any moment leaves no mark on the result."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from trpo_jax import Config, Metrics, UsageError, train
from trpo_jax.cli import main
from trpo_jax.files import locked
from trpo_jax.runs.continuing import continue_run
from trpo_jax.runs.descriptions import write_table
from trpo_jax.runs.folders import create_run, newest_state, open_run
from trpo_jax.runs.learning_curve import plot_learning_curve
from trpo_jax.runs.metrics import METRICS, failures, read_metrics, stalled
from trpo_jax.runs.runner import CAPACITY, Clock, advance

SMALL = Config(num_envs=2, num_steps=8, cg_iterations=2)
LONG = ["--num-envs", "2", "--num-steps", "8", "--cg-iterations", "2", "--num-iterations", "1000", "--num-seeds", "2"]


@pytest.fixture(scope="module")
def rows():
    """What a run hands to its sinks."""
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory, rows):
    config = Config(num_envs=2, num_steps=64, num_iterations=5)
    run = create_run(tmp_path_factory.mktemp("runs") / "run", config, seed=3, num_seeds=2)
    reports = []
    assert continue_run(run, reports.append, [lambda *row: rows.append(row)])
    assert reports[-1].iteration == 5 and reports[-1].clock.seconds_left == 0 and reports[-1].clock.steps_per_second > 0
    return run


def test_metrics_are_those_of_train(run, rows):
    import jax

    _, expected = jax.jit(jax.vmap(train, in_axes=(None, 0)))(run.config, run.keys)
    columns = read_metrics(run.path)
    assert list(columns) == ["iteration", "env_steps", "seed", *(field.name for field in dataclasses.fields(Metrics))]
    np.testing.assert_array_equal(columns["iteration"], np.repeat(np.arange(1, 6), 2))
    np.testing.assert_array_equal(columns["env_steps"], 128 * columns["iteration"])
    np.testing.assert_array_equal(columns["seed"], np.tile([3, 4], 5))
    for name in ("mean_kl", "episode_return", "value_loss"):
        # Nine digits bring a float32 back exactly; the two programs may round apart, which iterations magnify.
        np.testing.assert_array_equal(np.float32(columns[name]), [row[name] for _, _, row in rows])
        ours, theirs = columns[name].reshape(5, 2).T, getattr(expected, name)
        np.testing.assert_allclose(ours[:, :2], theirs[:, :2], rtol=1e-5)
        np.testing.assert_allclose(ours, theirs, rtol=0.05)
    assert [(seed, steps) for seed, steps, _ in rows] == list(zip(columns["seed"], columns["env_steps"], strict=True))


def test_folder_round_trip(run):
    assert open_run(run.path) == run
    state = newest_state(run)
    assert state.iteration.shape == (2,) and int(state.iteration[0]) == run.config.num_iterations


def test_networks_asked_for_are_those_of_the_folder(tmp_path):
    asked = Config(hidden=(16, 8), value_hidden="4", channels=[3], activation="gelu", layer_norm=True)
    made = create_run(tmp_path / "run", asked, 0, 1)
    again = create_run(tmp_path / "run", asked, 0, 1)
    assert open_run(tmp_path / "run").config == made.config == again.config == asked
    with pytest.raises(UsageError, match="holds a run with another hidden; "):
        create_run(tmp_path / "run", asked.replace(hidden=(16, 9)), 0, 1)


def test_layers_beyond_the_memory_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match=r"GiB are needed for .*hidden \(65,536\)"):
        create_run(tmp_path / "run", Config(hidden=(2**16,) * 60), 0, 1)
    assert not (tmp_path / "run").exists()


def test_agent_depends_on_its_seed_alone(run, tmp_path):
    alone = create_run(tmp_path / "alone", run.config, seed=4, num_seeds=1)
    continue_run(alone, lambda _: None)
    both, one = read_metrics(run.path), read_metrics(alone.path)
    # Products of several agents round differently from those of one, and iterations magnify the difference.
    np.testing.assert_allclose(both["mean_kl"][1::2], one["mean_kl"], rtol=1e-3)
    np.testing.assert_allclose(both["mean_kl"][1:4:2], one["mean_kl"][:2], rtol=1e-5)


def test_plot_is_drawn(run):
    file = plot_learning_curve(run)
    from matplotlib.image import imread

    picture = imread(file)
    assert picture.shape[0] > 300 and picture.shape[1] > 500
    assert picture[..., :3].std() > 0.02  # not a blank sheet


@pytest.fixture
def table(tmp_path):
    """A run whose metrics.csv is written by hand, from columns [iterations, seeds]."""
    run = create_run(tmp_path / "table", Config(num_envs=2, num_steps=8), seed=3, num_seeds=2)

    def write(**columns):
        names = ["iteration", "env_steps", "seed", *(field.name for field in dataclasses.fields(Metrics))]
        rows = [",".join(names)]
        for i, agent in np.ndindex(np.shape(columns["episode_return"])):
            values = {"iteration": i + 1, "env_steps": 16 * (i + 1), "seed": 3 + agent}
            values |= {name: values[i][agent] for name, values in columns.items()}
            rows.append(",".join(str(values.get(name, 1)) for name in names))
        (run.path / "metrics.csv").write_text("\n".join(rows) + "\n")
        return run

    return write


def columns_of(table, **columns):
    return read_metrics(table(**columns).path)


def test_seeds_that_met_what_is_not_finite_are_named_with_the_first_iteration(table):
    returns = np.ones((4, 2))
    assert failures(columns_of(table, episode_return=returns, finite=np.ones((4, 2)))) == {}
    one = columns_of(table, episode_return=returns, finite=[[1, 1], [1, 0], [1, 1], [1, 0]])
    assert failures(one) == {4: 2}
    both = columns_of(table, episode_return=returns, finite=[[1, 1], [1, 0], [0, 0], [0, 1]])
    assert failures(both) == {3: 3, 4: 2}


def test_seeds_whose_updates_are_all_rejected_at_the_end_are_named(table):
    def found(accepted):
        finite = np.where(np.isnan(accepted), accepted, 1)
        return stalled(columns_of(table, episode_return=np.ones_like(accepted), accepted=accepted, finite=finite))

    accepted = np.ones((14, 2))
    assert found(accepted) == {}
    accepted[2:12] = 0  # ten in a row, and then one is accepted
    assert found(accepted) == {}
    accepted[3, 0], accepted[4:, 0] = 1, 0
    assert found(accepted) == {3: 4}
    accepted[5:, 0] = np.nan  # it has reached the return at which it stops
    assert found(accepted) == {}
    assert found(np.zeros((14, 2))) == {3: 0, 4: 0}
    assert found(np.zeros((9, 2))) == {}
    nothing = np.zeros((14, 2))  # what is not finite is another fault
    assert stalled(columns_of(table, episode_return=nothing, accepted=nothing, finite=nothing)) == {}


def test_a_run_whose_updates_are_all_rejected_says_so(tmp_path, capsys):
    never = ["--constraint", "max-kl", "--line-search-steps", "1"]  # the full step is δ on average over the states
    sizes = ["--num-envs", "4", "--num-steps", "32", "--num-iterations", "12"]
    assert main(["train", "CartPole-v1", *never, *sizes, "--output", str(tmp_path / "run")]) == 0
    assert "no update was accepted any more: seed 0 after iteration 0; raise cg_damping" in capsys.readouterr().err


@pytest.mark.parametrize(
    "returns, words",
    [
        (np.full((3, 2), np.nan), ["no episode has ended"]),
        ([[np.nan, np.nan], [np.nan, 5.0], [np.nan, 7.0]], []),
        ([[np.inf, 1.0], [2.0, -np.inf], [np.nan, np.nan]], []),
    ],
)
def test_a_learning_curve_of_what_is_not_finite(table, monkeypatch, returns, words):
    from matplotlib.axes import Axes

    texts, lines = [], []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **_: texts.append(text))
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **_: lines.append(np.asarray(y)))
    assert plot_learning_curve(table(episode_return=returns)).stat().st_size > 1000
    assert texts == words and all(np.isfinite(line).all() and len(line) for line in lines)
    assert bool(lines) != bool(words)


def test_rows_reach_the_disk_before_the_state_that_comes_after_them(tmp_path, monkeypatch):
    run, synced, fsync = create_run(tmp_path / "run", SMALL, seed=0, num_seeds=1), [], os.fsync

    def watch(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).split(".")[-3:][0])
        fsync(descriptor)

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", watch)
    with pytest.raises(KeyboardInterrupt):
        continue_run(run, stop)
    assert [name for name in synced if name in ("metrics", "npz")] == ["csv", "metrics", "npz"][1:]
    assert os.listdir(run.path / "checkpoints") == ["00000001.npz"] and not list(run.path.glob(".*"))


def test_two_at_once_are_refused_and_onlookers_are_not(run, capsys):
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    with locked(run.path):
        assert main(["resume", str(run.path)]) == 2
        error = capsys.readouterr().err
        assert f"another process is using {run.path}; wait for it" in error and error.count("\n") == 1
        assert main(["evaluate", str(run.path), "--num-episodes", "1"]) == 0
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before


def test_a_state_of_other_seeds_is_passed_over(run, tmp_path, capsys):
    shutil.copytree(run.path, tmp_path / "other")
    write_table(tmp_path / "other" / "config.json", {**run.description, "seed": 4})
    with pytest.raises(UsageError, match=r"npz belongs to another run, whose settings differ; restore"):
        newest_state(open_run(tmp_path / "other"))


NAN = """
import gymnasium, numpy, sys
from trpo_jax.cli import main

class World(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (1,), numpy.float32)
    action_space = gymnasium.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return numpy.zeros(1, numpy.float32), {}
    def step(self, action):
        self.time += 1
        return numpy.zeros(1, numpy.float32), float("nan") if self.time == 6 else 1.0, False, False, {}

gymnasium.register("World-v0", World, max_episode_steps=99, disable_env_checker=True)
sys.exit(main(["train", "gymnasium/World-v0", "--num-envs", "1", "--num-steps", "4", "--num-iterations", "2"]))
"""


@pytest.mark.long
def test_numbers_that_are_not_finite_and_episodes_that_never_end_are_said(tmp_path, python):
    pytest.importorskip("gymnasium", reason="a world of one's own by name is Gymnasium's")
    result = python("-c", NAN, cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert "numbers that were not finite: seed 0 at iteration 2; " in result.stderr
    assert "No episode has ended, so the learning curve is empty" in result.stdout


def start(*arguments):
    command = [sys.executable, "-m", "trpo_jax", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def checkpoints(path):
    return set(path.glob("checkpoints/[0-9]*.npz"))


def stop_at_work(path, number, *arguments):
    """Start a command and send it a signal once it has saved something new; its exit status and what it printed."""
    before, process, deadline = checkpoints(path), start(*arguments), time.monotonic() + 120
    while not checkpoints(path) - before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if number == signal.SIGKILL:
        time.sleep(0.1)  # to wherever it is then; an interrupt waits for a checkpoint anyway
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert not (path / "checkpoints" / "00001000.npz").exists(), "stopped too late to test anything"
    return process.returncode, out, errors


@pytest.mark.long
def test_kills_and_interrupts_leave_no_mark(tmp_path):
    path, whole = tmp_path / "run", tmp_path / "whole"
    train = ("train", *LONG, "--output")
    uninterrupted = start(*train, str(whole))
    for number, command in ((signal.SIGINT, (*train, str(path))), (signal.SIGTERM, ("resume", str(path)))):
        status, out, errors = stop_at_work(path, number, *command)
        assert status == 130, (out, errors)
        assert f"trpo-jax resume {path}" in out and "Traceback" not in errors
        assert (path / "learning_curve.png").exists()
    stop_at_work(path, signal.SIGKILL, "resume", str(path))
    # A kill between writing rows and saving the state leaves rows that the resumed run writes again.
    with open(path / "metrics.csv", "a") as file:
        file.write("9999,1,2,3")
    for process in (uninterrupted, start("resume", str(path))):
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    assert (path / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    newest = path / "checkpoints" / "00001000.npz"
    with np.load(newest) as ours, np.load(whole / "checkpoints" / newest.name) as theirs:
        assert ours.files == theirs.files
        for name in ours.files:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def count(lengths):
    """A program that only counts iterations, and notes the length of each call."""

    def program(_, states, length):
        lengths.append(int(length))
        return states + length, Metrics(*[np.full((1, CAPACITY), states + length)] * len(METRICS))

    return program


def test_chunks_end_at_every_multiple_and_keep_their_pace():
    lengths, chunks = [], []
    assert (
        advance(count(lengths), None, np.zeros(1), 3, 61, lambda c: not chunks.append(c.done), ends=(0, 20, 15)) == 61
    )
    assert {15, 20, 30, 40, 45, 60, 61} <= set(chunks)
    assert lengths == [1, 2, 4, 5, 5, 10, 10, 5, 15, 1]  # doubled as without ends: 1, 2, 4, 8, 16 …


def test_chunks_double_up_to_their_capacity_and_end_where_asked():
    lengths, chunks = [], []
    assert advance(count(lengths), None, np.zeros(1), 3, 1000, lambda chunk: not chunks.append(chunk)) == 1000
    assert lengths == [1, 2, 4, 8, 16, 32, 64, 128, 256, 256, 230]
    assert [chunk.done for chunk in chunks] == [3 + sum(lengths[: i + 1]) for i in range(len(lengths))]
    assert all(chunk.metrics["finite"].shape == (1, chunk.length) for chunk in chunks)
    assert int(chunks[-1].states[0]) == 997
    assert advance(count([]), None, np.zeros(1), 0, 1000, lambda chunk: chunk.done < 5) == 7
    assert advance(count([]), None, np.zeros(1), 9, 9, lambda chunk: pytest.fail()) == 9


def test_slow_iterations_are_chunks_of_their_own(monkeypatch):
    monkeypatch.setattr("trpo_jax.runs.runner._CHUNK_SECONDS", 0)
    lengths = []
    assert advance(count(lengths), None, np.zeros(1), 0, 9, lambda chunk: True) == 9
    assert lengths == [1] * 9


def test_time_left_is_that_of_the_rest_at_the_speed_so_far(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("trpo_jax.runs.runner.time.perf_counter", lambda: now[0])
    clock = Clock(total=1000, done=200)
    assert clock.seconds_left == float("inf")
    now[0] += 50.0  # compiling
    clock.start()
    now[0] += 4.0
    clock.count(400)
    assert (clock.seconds, clock.steps_per_second, clock.seconds_left) == (4.0, 100.0, 4.0)
    clock.count(400)
    assert clock.done == clock.total and clock.seconds_left == 0
