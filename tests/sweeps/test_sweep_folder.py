"""A sweep's folder: what it holds, and that kills, full disks and damage cost nothing that was finished."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from probes import SMALL_SWEEP

from trpo_jax import UsageError
from trpo_jax.cli import main
from trpo_jax.runs.descriptions import made_by
from trpo_jax.sweeps import grids, in_folder
from trpo_jax.sweeps.grids import Spec, make_spec, read_spec
from trpo_jax.sweeps.plans import Block, num_seeds_by_point
from trpo_jax.sweeps.storage import Folder

SCRIPTS = Path(__file__).parents[2] / "scripts"
CHECKPOINTS = f"checkpoints/*-{'[0-9]' * 8}.npz"
COMMON = ("--agents-per-device", "4", "--num-devices", "1")  # 12 agents: three blocks


def files(folder, pattern="results/*.parquet"):
    return {file.name: file.read_bytes() for file in sorted(folder.glob(pattern))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep that nobody interrupted."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.toml").write_text(SMALL_SWEEP.format(iterations=120, episodes=2))
    command = [
        sys.executable,
        "-m",
        "trpo_jax",
        "sweep",
        folder / "sweep.toml",
        "--output",
        folder / "out",
        *COMMON,
    ]
    result = subprocess.run([*command, *COMMON], capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    assert "12 agents, 1 program" in result.stdout and "report.html" in result.stdout
    return folder / "out"


def test_results_are_one_row_an_agent(finished):
    table = parquet.ParquetDataset(finished / "results").read()
    assert table.num_rows == 12
    assert table["point"].to_pylist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert table["seed"].to_pylist() == [0, 1, 2] * 4
    assert table["max_kl"].to_pylist() == [0.001] * 6 + [0.01] * 6
    assert set(table["num_envs"].to_pylist()) == {2} and set(table["env_steps"].to_pylist()) == {120 * 16}
    assert all(len(curve) == 120 for curve in table["episode_return"].to_pylist())
    assert np.isfinite(table["final_return"].to_numpy()).all() and table["failed_at"].null_count == 12
    kl = np.array(table["mean_kl"].to_pylist())
    assert (kl.max(axis=1) <= np.repeat([0.001, 0.01], 6)).all() and kl.max() > 0.005
    returns = np.array(table["episode_return"].to_pylist(), float)[:, -12:]
    count = np.array(table["num_episodes"].to_pylist())[:, -12:]
    assert (count.sum(axis=1) > 0).sum() > 6
    # Where no episode ended, that of the last iteration in which one did, which is carried to the last.
    expected = [r @ n / n.sum() if n.any() else r[-1] for r, n in zip(returns, count, strict=True)]
    np.testing.assert_allclose(table["training_return"].to_numpy(), expected, rtol=1e-6)
    assert not (finished / "checkpoints").exists() or not list((finished / "checkpoints").iterdir())
    about = json.loads((finished / "sweep.json").read_text())
    assert about["num_seeds"] == 3 and about["made_by"]["threads"] >= 1


def wait_for(condition, child, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def killed_sweep(finished, tmp_path, start, kills, seed):
    """Kill a sweep at random moments, `kills` times; the results of the process that came through."""
    rng = random.Random(seed)
    out = tmp_path / "out"
    arguments = ("sweep", finished.parent / "sweep.toml", "--output", out, *COMMON, "--checkpoint-seconds", "0")
    restored = 0
    for _ in range(kills):
        child = start(*arguments)
        before = {name: (out / "results" / name).stat().st_mtime_ns for name in files(out)}
        checkpoints = set(out.glob(CHECKPOINTS))
        # Once there is progress beyond the start, at any moment of what follows.
        wait_for(lambda c=checkpoints: set(out.glob(CHECKPOINTS)) - c, child)
        time.sleep(rng.uniform(0, 0.6))
        child.kill()
        child.communicate()
        restored += bool(checkpoints)
        for name, when in before.items():  # what was finished was not done again
            assert (out / "results" / name).stat().st_mtime_ns == when
        if len(files(out)) == 3:
            break
    assert restored or kills == 1
    child = start(*arguments)
    _, errors = child.communicate(timeout=250)
    assert child.returncode == 0, errors
    return out


@pytest.mark.long
def test_kills_leave_no_mark(finished, tmp_path, start):
    assert files(killed_sweep(finished, tmp_path, start, 2, seed=0)) == files(finished)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills_leave_no_mark(finished, tmp_path, start):
    done = 0
    while done < 20:
        folder = tmp_path / str(done)
        folder.mkdir()
        assert files(killed_sweep(finished, folder, start, 5, seed=done)) == files(finished)
        done += 5


@pytest.mark.long
def test_interrupt_says_how_to_go_on(finished, tmp_path, start):
    out = tmp_path / "out"
    arguments = ("sweep", finished.parent / "sweep.toml", "--output", out, *COMMON)
    child = start(*arguments)
    wait_for(lambda: (out / "programs" / "00.json").exists(), child)
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    printed, errors = child.communicate(timeout=60)
    assert child.returncode == 130, (printed, errors)
    assert "Stopped; the same command continues." in printed and "Traceback" not in errors
    # Between two blocks nothing is in training, so that there may be no checkpoint.
    assert list(out.glob(CHECKPOINTS)) or files(out)
    child = start(*arguments)
    _, errors = child.communicate(timeout=250)
    assert child.returncode == 0, errors
    assert files(out) == files(finished)


def test_finished_sweep_is_not_run_again(finished, capsys):
    before = {file: file.stat().st_mtime_ns for file in (finished / "results").iterdir()}
    assert main(["sweep", str(finished.parent / "sweep.toml"), "--output", str(finished)]) == 0
    assert {file: file.stat().st_mtime_ns for file in (finished / "results").iterdir()} == before
    assert "max_kl" in capsys.readouterr().out


def test_a_sweep_is_planned_once(finished, monkeypatch):
    """Of 100,000 points a plan takes half a minute."""
    made = []
    make_point = grids.make_point
    monkeypatch.setattr(grids, "make_point", lambda *settings: made.append(settings) or make_point(*settings))
    assert sweep(finished.parent / "sweep.toml", "--output", finished) == 0
    assert len(made) == 4


def sweep(*arguments):
    return main(["sweep", *map(str, arguments)])


def test_changed_file_is_refused(finished, tmp_path, capsys):
    changed = tmp_path / "changed.toml"
    changed.write_text((finished.parent / "sweep.toml").read_text().replace("num_seeds = 3", "num_seeds = 4"))
    before = files(finished, "**/*.*")
    assert sweep(changed, "--output", finished) == 2
    assert "holds a sweep with another num_seeds; choose another --output" in capsys.readouterr().err
    assert files(finished, "**/*.*") == before


def test_foreign_folder_is_left_alone(finished, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert sweep(finished.parent / "sweep.toml", "--output", tmp_path) == 2
    assert "is not the folder of a sweep" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["thesis.tex"] and files(tmp_path, "*.tex") == {"thesis.tex": b"precious"}


@pytest.mark.parametrize("left", [".sweep.json.12.tmp", "..sweep.json.12.12.tmp", ".lock0", "locks/0"])
def test_a_sweep_that_was_killed_at_its_first_file_begins_anew(tmp_path, left):
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text("{")
    folder = Folder(tmp_path)
    with folder.locked(0):
        folder.describe(Spec(num_seeds=2), {})
    assert folder.description() == {**Spec(num_seeds=2).description, "made_by": {}}


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_damaged_description_is_named(finished, capsys, text):
    file = finished / "sweep.json"
    good = file.read_text()
    file.write_text(text)
    try:
        assert sweep(finished.parent / "sweep.toml", "--output", finished) == 2
        assert f"{file} is damaged" in capsys.readouterr().err
    finally:
        file.write_text(good)


FULL_DISK = """
import resource, signal, sys
from trpo_jax.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def test_full_disk_is_one_sentence(finished, tmp_path, python):
    out = tmp_path / "out"
    arguments = ["sweep", str(finished.parent / "sweep.toml"), "--output", str(out), *COMMON]
    limit = min(len(data) for data in files(finished).values()) // 2  # no file can grow beyond that
    result = python("-c", FULL_DISK, str(limit), *arguments, timeout=200)
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert "File too large; what is finished is safe" in result.stderr and "Traceback" not in result.stderr
    assert not list(out.glob("results/*")) and (out / "sweep.json").exists()


def test_read_only_folder_is_one_sentence(finished, tmp_path, capsys, monkeypatch):
    # The superuser may write to a read-only folder, so the refusal of the system is played.
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    assert sweep(finished.parent / "sweep.toml", "--output", tmp_path / "out") == 2
    assert "Permission denied; choose a folder that can be written to." in capsys.readouterr().err


def test_what_rounds_otherwise_is_not_mixed_in_one_folder(finished, tmp_path, monkeypatch, capsys):
    spec, begun = read_spec(finished.parent / "sweep.toml"), {**made_by(), "jaxlib": "0.4.1"}
    for name, mend in (("threads", "set NPROC=77, and"), ("devices", "give --num-devices 77.")):
        Folder(tmp_path / name).describe(spec, {**begun, name: 77})
        with pytest.raises(UsageError, match=rf"with 77 {name}, but here there would be \d+, which .*; {mend}"):
            in_folder.run_sweep(tmp_path / name, spec)
    Folder(tmp_path / "other").describe(spec, begun)
    Folder(tmp_path / "other").check_rounding(made_by())
    assert "was started with jaxlib 0.4.1; the remaining agents may be rounded" in capsys.readouterr().err


def test_two_at_once_are_refused(finished, capsys):
    with Folder(finished).locked(0):
        assert sweep(finished.parent / "sweep.toml", "--output", finished) == 2
        assert "another process is using" in capsys.readouterr().err


def test_a_sweep_that_another_process_begins_meanwhile_is_joined(tmp_path, monkeypatch):
    mine, others = Folder(tmp_path), Folder(tmp_path)
    listdir = os.listdir

    def begin_then_list(path):
        monkeypatch.setattr(os, "listdir", listdir)
        others.describe(Spec(num_seeds=2), {"threads": 3})
        others.agree_on_program(0, {"agents": 4})
        return listdir(path)

    monkeypatch.setattr(os, "listdir", begin_then_list)
    mine.describe(Spec(num_seeds=2), {"threads": 5})
    assert mine.description() == {**Spec(num_seeds=2).description, "made_by": {"threads": 3}}


@pytest.mark.long
def test_two_processes_meet_and_share_the_work(finished, tmp_path):
    # By the example script for several hosts, which are this one twice.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = tmp_path / "trpo-jax"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m trpo_jax "$@" {" ".join(COMMON)}\n')
    command.chmod(0o755)
    out = tmp_path / "out"
    result = subprocess.run(
        [SCRIPTS / "sweep_hosts.sh", finished.parent / "sweep.toml", out, "localhost", "localhost"],
        env={**os.environ, "PORT": str(port), "TRPO_JAX": str(command)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr
    assert "process 0 of 2" in result.stdout and "process 1 of 2" in result.stdout
    assert files(out) == files(finished) and "report.html" in result.stdout


def test_slurm_job_runs_one_process_a_task(tmp_path):
    # `srun` is played: it shows what would run on each node.
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    script = SCRIPTS / "sweep_slurm.sh"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", script, "s.toml", "out"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    assert result.stdout == "trpo-jax sweep s.toml --output out\n", result.stderr
    assert "#SBATCH --ntasks-per-node=1" in script.read_text()


def test_processes_of_a_job_array_never_meet(finished, tmp_path, start):
    out = tmp_path / "out"
    common = ("sweep", finished.parent / "sweep.toml", "--output", out, *COMMON, "--num-processes", "2")
    child = start(*common, "--process-id", "1")
    text, errors = child.communicate(timeout=200)
    assert child.returncode == 0 and "This process is done" in text, errors
    assert files(out) == {"00-0001.parquet": files(finished)["00-0001.parquet"]}


def test_dry_run_shows_programs_and_writes_nothing(tmp_path, python):
    (tmp_path / "sweep.toml").write_text(SMALL_SWEEP.format(iterations=120, episodes=2))
    result = python("-m", "trpo_jax", "sweep", "sweep.toml", "--dry-run", *COMMON, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.index("Compiling program 1 of 1 …") < result.stdout.index(
        "Timing program 1 of 1: two iterations"
    )
    assert "sweep.toml: 1 program" in result.stdout and "MiB" in result.stdout
    assert re.search(r"The sweep would take about \d+:\d\d here, estimated from measurements", result.stdout)
    assert re.search(r"training \d+:\d\d \(iterations times .* and evaluation \d+:\d\d", result.stdout)
    assert re.search(r"CartPole-v1 +4 +12 +1 x 4 +3 +23,040", result.stdout)
    assert [entry.name for entry in tmp_path.iterdir()] == ["sweep.toml"]


@pytest.mark.parametrize("section", ["base", "grid"])
def test_a_sweep_of_widths_grows_again_and_again(section, tmp_path):
    """A description in a file has lists where a sweep has tuples."""
    for num_seeds in (1, 2, 3):
        widths = {"base": {"hidden": [4]}} if section == "base" else {"grid": {"hidden": [[4], [4, 4]]}}
        spec = make_spec({**widths, "num_seeds": num_seeds})
        folder = Folder(tmp_path)
        for extend in (True, True, False):
            before = folder.describe(spec, {}, extend=extend)
            assert [form.num_seeds for form in before] == list(range(1, num_seeds))
    assert num_seeds_by_point(folder.description())(0) == 3


@pytest.mark.parametrize(
    "first, then, read", [(9, 9.5, [9, 9.5]), (9, "auto", ["9", "auto"]), (True, 2, ["true", "2"])]
)
def test_a_setting_of_an_environment_may_change_its_type_as_a_sweep_grows(first, then, read, tmp_path):
    folder = Folder(tmp_path)
    folder.describe(make_spec({}), {})
    for number, value in enumerate((first, then)):
        rows = {"point": np.int32([number]), "env.size": [value], "env.other": [1.5]}
        folder.write_results(Block(0, number, 0, 1), rows)
    folder.write_results(Block(0, 2, 0, 1), {"point": np.int32([2])})  # of an environment without such a setting
    table = folder.read_results(["point", "env.size", "env.other"])
    assert table["env.size"].to_pylist() == [*read, None] and table["env.other"].to_pylist() == [1.5, 1.5, None]
