"""Worker processes: shares of agents, errors, signals and deaths; and runs and searches that use them."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trpo_jax import Config, UsageError, sweep
from trpo_jax.runs import workers
from trpo_jax.runs.continuing import continue_run
from trpo_jax.runs.folders import create_run, load_run
from trpo_jax.runs.metrics import METRICS, read_metrics
from trpo_jax.runs.workers import WorkersPrograms, start_workers
from trpo_jax.sweeps.grids import make_spec
from trpo_jax.sweeps.in_folder import run_sweep
from trpo_jax.sweeps.search import tune

SMALL = {"env": "gymnasium/CartPole-v1", "num_envs": 2, "num_steps": 8, "cg_iterations": 2, "hidden": (4,)}


def build(share, scale):
    """Programs for the tests of this module: `draw` draws with each agent's key, `fail` fails."""
    if scale < 0:
        raise UsageError(f"scale must not be below 0, got {scale}.")
    if scale == 0:
        sys.exit("no scale")

    def draw(keys, shift):
        return scale * jax.vmap(jax.random.normal)(keys) + shift, keys

    def fail(keys):
        raise ValueError(f"no number of {len(keys)}")

    settings = [jax.config.jax_default_matmul_precision, len(jax.local_devices()), share]
    return {"draw": (draw, (jax.random.split(jax.random.key(0), share), 0)), "fail": (fail, (0,))}, settings


@pytest.fixture(scope="module")
def two():
    with jax.default_matmul_precision("high"), start_workers(2) as workers:
        yield workers


def test_agents_are_shared_and_joined(two):
    there = WorkersPrograms(two, [2, 1], build, 3.0)
    assert there.about == [["high", jax.local_device_count(), 2], ["high", jax.local_device_count(), 1]]
    keys = jax.random.split(jax.random.key(7), 3)
    found, back = there.call("draw", (0, keys), keys, np.float32(1))
    np.testing.assert_array_equal(found, 3 * jax.vmap(jax.random.normal)(keys) + 1)
    assert (back == keys).all() and back.dtype == keys.dtype


def test_errors_come_back_and_the_workers_go_on(two):
    there = WorkersPrograms(two, [1, 2], build, 1.0)
    with pytest.raises(RuntimeError, match="no number of 1") as found:
        there.call("fail", 0, np.zeros(3))
    assert "ValueError" in found.value.__notes__[0] and "test_workers" in found.value.__notes__[0]
    with pytest.raises(UsageError, match="has failed: scale must not be below 0, got -1"):
        WorkersPrograms(two, [1, 1], build, -1)
    with pytest.raises(RuntimeError, match="no scale"):
        WorkersPrograms(two, [1, 1], build, 0)
    with pytest.raises(RuntimeError, match="1234567"):  # a program that was never built
        there._number, number = 1234567, there._number
        there.call("fail", 0, np.zeros(3))
    there._number = number
    keys = jax.random.split(jax.random.key(7), 3)
    assert jnp.isfinite(there.call("draw", (0, keys), keys, np.float32(0))[0]).all()


def test_threads_take_turns(two):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda share: WorkersPrograms(two, [share, 2 * share], build, 1.0).about, range(1, 20)))
    assert [[about[2] for about in own] for own in found] == [[share, 2 * share] for share in range(1, 20)]


def test_programs_that_nobody_needs_are_dropped(two, monkeypatch):
    monkeypatch.setattr(workers, "_unused", [])
    first, second = (WorkersPrograms(two, [1, 1], build, 1.0) for _ in range(2))
    number = first._number
    del first
    assert workers._unused == [number]
    third = WorkersPrograms(two, [1, 1], build, 1.0)
    assert workers._unused == [] and third._number > second._number
    third._number = number
    with pytest.raises(RuntimeError, match=str(number)):
        third.call("fail", 0, np.zeros(2))


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "2", None, float("nan"), 10**9])
def test_the_number_of_workers_is_checked(number, tmp_path):
    spec = make_spec({"base": {**SMALL, "hidden": [4]}, "random": {"count": 1, "max_kl": {"uniform": [0.01, 0.1]}}})
    run = create_run(tmp_path / "run", Config(**SMALL, num_iterations=1), 0, 2)
    calls = [
        lambda: continue_run(run, num_workers=number),
        lambda: tune(tmp_path / "search", spec, num_workers=number),
        lambda: run_sweep(tmp_path / "sweep", make_spec({"base": {}}), num_workers=number),
        lambda: sweep(Config(**SMALL), {}, jax.random.key(0), num_workers=number),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="num_workers must be a whole number from 1 to 1,024, got"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_signals_are_for_the_process_that_started_them(two):
    for worker in two:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker._process.pid, number)
    time.sleep(0.2)
    assert len(WorkersPrograms(two, [1, 1], build, 1.0).about) == 2
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_one_worker_is_none():
    with start_workers(1) as workers:
        assert workers == []


@pytest.mark.long
def test_a_worker_that_is_killed_is_an_error():
    with start_workers(2) as workers:
        there = WorkersPrograms(workers, [1, 1], build, 1.0)
        workers[1]._process.kill()
        keys = jax.random.split(jax.random.key(7), 2)
        for _ in range(2):
            with pytest.raises(UsageError, match=r"a worker process ended \(exit code -9\), perhaps for lack"):
                there.call("draw", (0, keys), keys, np.float32(0))
    assert all(worker._process.returncode is not None for worker in workers)


@pytest.mark.long
def test_workers_end_with_the_process_that_started_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import time
from trpo_jax.runs.workers import start_workers

with start_workers(2) as workers:
    print(*(worker._process.pid for worker in workers), flush=True)
    time.sleep(60)
""")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        found = [int(pid) for pid in parent.stdout.readline().split()]
        time.sleep(4)  # they import JAX
        parent.kill()
    deadline = time.monotonic() + 30
    while any(map(runs, found)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(found) == 2 and not any(map(runs, found))


def runs(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.long
@pytest.mark.parametrize("more", [{}, {"eval_every": 1, "eval_episodes": 2, "stop_at_return": 15.0}])
def test_a_run_in_workers_trains_each_share_as_alone(more, tmp_path):
    config = Config(**SMALL, num_iterations=4, **more)
    shared = create_run(tmp_path / "shared", config, 5, 4)
    stopped_after = lambda progress: progress.iteration < 2  # noqa: E731
    assert not continue_run(shared, stopped_after, num_workers=2)
    assert continue_run(shared, num_workers=2)
    table, states = read_metrics(shared.path), load_run(shared.path)[1]
    for first in (0, 2):
        alone = create_run(tmp_path / str(first), config, 5 + first, 2)
        assert continue_run(alone)
        expected, mine = read_metrics(alone.path), np.isin(table["seed"], [5 + first, 6 + first])
        for column in METRICS:
            np.testing.assert_array_equal(table[column][mine], expected[column], err_msg=column)
        part = jax.tree.map(lambda leaf: leaf[first : first + 2], states)  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, part.learner, load_run(alone.path)[1].learner)


@pytest.mark.long
def test_a_search_in_workers_finds_the_same(tmp_path):
    random = {"count": 4, "max_kl": {"log_uniform": [1e-3, 1e-1]}}
    base = {**SMALL, "hidden": [4], "num_iterations": 4}
    spec = make_spec({"base": base, "random": random, "num_seeds": 2, "num_episodes": 1})
    found = [tune(tmp_path / str(number), spec, batch=4, num_workers=number) for number in (1, 2)]
    assert found[0][1] == found[1][1]
    assert found[0][0].read_text() == found[1][0].read_text()


@pytest.mark.long
def test_a_sweep_in_memory_is_the_same_in_workers():
    config, key = Config(**SMALL, num_iterations=3), jax.random.key(3, impl="rbg")
    alone, shared = (
        sweep(config, {"max_kl": [0.01, 0.1]}, key, num_seeds=3, num_episodes=2, keep="all", num_workers=number)
        for number in (1, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, alone.metrics, shared.metrics)
    np.testing.assert_array_equal(alone.final_return, shared.final_return)
    for one, other in zip(alone.states, shared.states, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one.learner, other.learner)
        assert (one.key == other.key).all()
