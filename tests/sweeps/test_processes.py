"""Sweeps in several processes: each has a share of the agents, and a sweep of Python's environments starts its own."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow.parquet as parquet
import pytest

from trpo_jax import Config, make_environment, stack_frames, sweep
from trpo_jax.environments.host import runs_on_host
from trpo_jax.runs import workers
from trpo_jax.sweeps import in_memory, placement
from trpo_jax.sweeps.dry_run import outline
from trpo_jax.sweeps.grids import make_spec
from trpo_jax.sweeps.in_folder import run_sweep
from trpo_jax.sweeps.plans import plan

BASE = {"num_envs": 2, "num_steps": 8, "cg_iterations": 2, "num_iterations": 3, "hidden": [4]}
ON_HOST = "gymnasium/CartPole-v1"
FILE = f"""
num_seeds = 3
num_episodes = 1
[base]
env = "{ON_HOST}"
num_envs = 2
num_steps = 8
cg_iterations = 2
num_iterations = ITERATIONS
hidden = [4]
[grid]
max_kl = [0.001, 0.01]
"""


def spec_of(env, num_seeds=3, **more):
    return make_spec({"base": {**BASE, "env": env}, "num_seeds": num_seeds, "num_episodes": 0, **more})


def results(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("results/*.parquet"))}


def scores(folder):
    return parquet.ParquetDataset(folder / "results").read(["point", "seed", "final_return"]).to_pydict()


def command(folder, *more):
    words = [sys.executable, "-m", "trpo_jax", "sweep", folder / "sweep.toml", "--checkpoint-seconds", "0", *more]
    return list(map(str, words))


@pytest.fixture
def two_devices(monkeypatch):
    devices = jax.devices()[:1] * 2
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)


def test_environments_in_python_are_found_within_wrappers():
    assert runs_on_host(make_environment(ON_HOST)) and runs_on_host(stack_frames(make_environment(ON_HOST), 2))
    assert not runs_on_host(make_environment("CartPole-v1"))


def test_python_has_a_process_per_core_and_one_device_each(two_devices, monkeypatch):
    here, there = (plan(spec_of(env))[1] for env in (ON_HOST, "CartPole-v1"))
    assert len(placement.devices_for(here[0].configs[0])) == 1 and len(placement.devices_for(there[0].configs[0])) == 2
    (on_host, alone), (on_device, _) = ((group.configs[0], group.num_agents) for (group,) in (here, there))
    assert workers.useful_workers(on_host, alone) == 2 and workers.useful_workers(on_device, 6) == 1
    assert workers.useful_workers(on_host, 1) == 1, "one agent"
    assert [workers.useful_workers(on_host, 6, cores) for cores in (1, 4, 8)] == [1, 4, 6]
    monkeypatch.setattr(workers, "free_memory", lambda devices: 2**30)
    assert workers.useful_workers(on_host, 6) == 1


@pytest.mark.parametrize("num_envs, size", [(2, 20), (8, 7), (16, 4), (128, 1)])
def test_agents_in_python_share_few_instances(num_envs, size):
    config = Config(env=ON_HOST, num_envs=num_envs)
    assert placement.agents_per_block(config, 40, 2) == size
    assert placement.agents_per_block(config.replace(env="CartPole-v1"), 40, 2) == 20


def test_a_dry_run_counts_the_processes():
    alone, shared = (outline(spec_of(ON_HOST), num_processes=number)[0] for number in (1, 3))
    assert (alone.num_devices, alone.num_runs, alone.programs.agents_per_block) == (1, 1, 3)
    assert (shared.num_devices, shared.num_runs, shared.programs.agents_per_block) == (3, 1, 1)


def test_every_process_has_a_share(tmp_path):
    spec = spec_of("CartPole-v1", num_seeds=5)
    for rank, (ending, share) in enumerate((("shared", 3), ("complete", 2))):
        clocks = []
        report = lambda progress: clocks.append((progress.clock.done, progress.clock.total))  # noqa: B023, E731
        assert run_sweep(tmp_path, spec, process=(rank, 2), report=report) == ending
        assert clocks[0][0] > 0 and clocks[-1] == (share * 48, share * 48), clocks
        assert list(results(tmp_path)) == ["00-0000.parquet", "00-0001.parquet"][: rank + 1]
    alone = tmp_path / "alone"
    assert run_sweep(alone, spec) == "complete"
    (alone_point, alone_seed, alone_return) = scores(alone).values()
    assert (alone_point, alone_seed) == tuple(list(scores(tmp_path).values())[:2])
    np.testing.assert_array_equal(alone_return, scores(tmp_path)["final_return"])


@pytest.mark.long
def test_a_sweep_of_python_starts_its_own_processes(tmp_path):
    (tmp_path / "sweep.toml").write_text(FILE.replace("ITERATIONS", "4"))
    texts = {}
    for number in ("1", "2"):
        out = ["--output", str(tmp_path / number), "--num-devices", number, "--keep", "best"]
        environment = {**os.environ, "NPROC": "2"}
        found = subprocess.run(command(tmp_path, *out), capture_output=True, text=True, timeout=200, env=environment)
        assert found.returncode == 0, found.stderr
        texts[number] = found.stdout
    assert "6 agents, 1 program. Compiling" in texts["1"] and "6 agents, 1 program, 2 worker processes." in texts["2"]
    assert len(results(tmp_path / "1")) == 1 and len(results(tmp_path / "2")) == 2
    assert scores(tmp_path / "1") == scores(tmp_path / "2")
    assert all("Page: " in text for text in texts.values())
    assert len(list((tmp_path / "2" / "states").glob("*.npz"))) == 2


@pytest.mark.long
@pytest.mark.parametrize("how, status", [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_sweep_that_is_stopped_stops_its_workers_and_goes_on(how, status, tmp_path):
    (tmp_path / "sweep.toml").write_text(FILE.replace("ITERATIONS", "400"))
    words = command(tmp_path, "--output", tmp_path / "out", "--num-devices", "2")
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("out/checkpoints/*.npz"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(how)
    text, errors = parent.communicate(timeout=120)
    assert parent.returncode == status and ("Stopped; the same" in text) == (status == 130), (text, errors)
    assert len(results(tmp_path / "out")) < 2
    again = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and len(results(tmp_path / "out")) == 2, again.stderr
    whole = [*command(tmp_path), "--output", str(tmp_path / "whole"), "--num-devices", "1"]
    alone = subprocess.run(whole, capture_output=True, text=True, timeout=300, env={**os.environ, "NPROC": "2"})
    assert alone.returncode == 0 and scores(tmp_path / "whole") == scores(tmp_path / "out"), alone.stderr


@pytest.mark.parametrize("env, number", [(ON_HOST, 1), ("CartPole-v1", 2)])
def test_a_sweep_in_memory_takes_one_device_for_python(env, number, two_devices, monkeypatch):
    class Seen(Exception):
        pass

    def fit_programs(config, most_agents, num_episodes, devices):
        raise Seen(most_agents, len(devices))

    monkeypatch.setattr(in_memory, "fit_programs", fit_programs)
    with pytest.raises(Seen) as found:
        sweep(Config(**BASE, env=env), {"max_kl": [0.001, 0.01]}, jax.random.key(0), num_episodes=0)
    assert found.value.args == (2 // number, number)
