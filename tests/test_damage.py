"""Damaged folders: what is good is used, what is lost is said, and nothing good is removed."""

import json
import random
import shutil

import jax
import numpy as np
import pyarrow.parquet as parquet
import pytest

from trpo_jax.cli import main
from trpo_jax.runs import runner
from trpo_jax.runs.continuing import continue_run
from trpo_jax.runs.descriptions import write_table
from trpo_jax.runs.folders import open_run
from trpo_jax.runs.metrics import METRICS
from trpo_jax.sweeps.cohorts import Snapshot
from trpo_jax.sweeps.grids import read_spec
from trpo_jax.sweeps.in_folder import run_sweep
from trpo_jax.sweeps.plans import Block
from trpo_jax.sweeps.storage import Folder

SIZE = {"num_envs": 2, "num_steps": 8, "cg_iterations": 2}
FLAGS = [text for name, value in SIZE.items() for text in (f"--{name.replace('_', '-')}", str(value))]
SWEEP = """
num_seeds = 1
num_episodes = 2
[base]
num_envs = 2
num_steps = 8
cg_iterations = 2
num_iterations = 8
[grid]
max_kl = [0.003, 0.01]
"""


@pytest.fixture(scope="module", autouse=True)
def steady():
    """One iteration at a time, however slow the machine: checkpoints bear the same names every time."""
    jax.devices()  # started before `sweep` can make each core a device: one block at a time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_CHUNK_SECONDS", 0)
        yield


class Killed(BaseException):
    """Stands for the moment of a kill."""


def killed_at(iteration):
    """A report that ends the process, as it were, at an iteration."""

    def report(progress):
        if progress.iteration >= iteration:
            raise Killed

    return report


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was killed on its way, and the same run in one piece."""
    folder = tmp_path_factory.mktemp("run")
    command = ["train", *FLAGS, "--num-iterations", "12", "--output"]
    assert main([*command, str(folder / "whole")]) == 0
    (folder / "killed").mkdir()
    shutil.copy(folder / "whole" / "config.json", folder / "killed")
    with pytest.raises(Killed):
        continue_run(open_run(folder / "killed"), killed_at(3))
    assert len(list((folder / "killed" / "checkpoints").iterdir())) == 2
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep of two blocks that was killed when one was finished and one at work, and the same sweep in one piece."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.toml").write_text(SWEEP)
    command = ["sweep", str(folder / "sweep.toml"), "--agents-per-device", "1", "--output"]
    assert main([*command, str(folder / "whole")]) == 0
    spec, seen = read_spec(folder / "sweep.toml"), []

    def report(progress):
        seen.append(progress.blocks[0].number)
        if seen[-1] != seen[0] and progress.iteration >= 3:
            raise Killed

    with pytest.raises(Killed):
        run_sweep(folder / "killed", spec, most_agents=1, checkpoint_seconds=0, report=report)
    assert len(list((folder / "killed").rglob("*.parquet"))) == len(list((folder / "killed").rglob("*.npz"))) == 1
    return folder


def flip(file, position=None):
    """Invert a byte, by default the one in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 255
    file.write_bytes(bytes(data))


def from_another_version(file):
    """What a version of the future, or of the past, may have left there."""
    if file.suffix == ".json":
        file.write_text(json.dumps({**json.loads(file.read_text()), "lookahead": 3}))
    elif file.suffix == ".csv":
        first, *rest = file.read_text().splitlines()
        file.write_text("\n".join([f"{first},lookahead", *(f"{row},1" for row in rest)]) + "\n")
    elif file.suffix == ".npz":
        arrays = dict(np.load(file))
        header = {**json.loads(bytes(arrays["__header__"])), "format": "trpo_jax state 0"}
        np.savez(file, **{**arrays, "__header__": np.frombuffer(json.dumps(header).encode(), np.uint8)})
    else:
        table = parquet.ParquetFile(file).read().drop_columns(["reward_clip", "penalty"])
        parquet.write_table(table.replace_schema_metadata(None), file)


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "cut in its end": lambda file: file.write_bytes(file.read_bytes()[:-30]),
    "flipped": flip,
    "flipped in its end": lambda file: flip(file, -40),
    "noise": lambda file: file.write_bytes(random.Random(0).randbytes(2000)),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "another version": from_another_version,
}
EVERY = tuple(DAMAGES)
OF_FILES = tuple(name for name in EVERY if name != "a folder")  # which stands in the way of what is written anew
ONLY_RUN = "checkpoints/00000002.npz", "checkpoints/00000003.npz"

# Files, damages, exit status of `resume`, and whether something has to be said. `evaluate` may do without the rows.
RUN = [
    (["config.json"], EVERY, 2, True),
    (["metrics.csv"], ("cut in its end", "flipped in its end"), 0, True),
    (["metrics.csv"], ("missing", "empty", "cut", "flipped", "noise", "a folder", "another version"), 2, True),
    ([ONLY_RUN[1]], OF_FILES[1:], 0, True),
    ([ONLY_RUN[1]], ("missing",), 0, False),
    ([ONLY_RUN[0]], EVERY, 0, False),
    (ONLY_RUN, EVERY, 2, True),
]
# The same of `sweep`, and of `report`.
BLOCK, STATE = "results/00-0000.parquet", "checkpoints/00-0001-00000002.npz"
SWEEPS = [
    (["sweep.json"], EVERY, 2, 2),
    (["programs/00.json"], ("missing",), 0, 0),
    (["programs/00.json"], EVERY[1:], 2, 0),
    ([BLOCK], ("missing",), 0, 2),
    ([BLOCK], OF_FILES[1:-1], 0, 2),
    ([BLOCK], ("another version",), 0, 0),
    ([STATE], EVERY, 0, 0),
]
QUICK = {("metrics.csv", "cut in its end"), (ONLY_RUN[1], "flipped"), (BLOCK, "flipped"), (STATE, "cut")}


def cases(table):
    """One case a damage; those that train on are slow, but for a few."""
    for files, damages, status, other in table:
        for damage in damages:
            marks = [pytest.mark.slow] if status == 0 and (files[-1], damage) not in QUICK else []
            yield pytest.param(files, damage, status, other, marks=marks, id=f"{'+'.join(files)} {damage}")


def spoiled(folder, tmp_path, files, damage):
    out = tmp_path / "out"
    shutil.copytree(folder / "killed", out)
    for file in files:
        DAMAGES[damage](out / file)
    return out


def check_sentence(errors, *names):
    assert "Traceback" not in errors and errors.endswith(".\n")
    assert any(str(name) in errors for name in names), errors


@pytest.mark.slow
def test_a_folder_in_the_way_of_a_file_is_left_there(run, tmp_path, capsys):
    out = spoiled(run, tmp_path, [ONLY_RUN[1]], "a folder")
    assert main(["resume", str(out)]) == 2
    check_sentence(capsys.readouterr().err, out / ONLY_RUN[1])
    assert (out / ONLY_RUN[1]).is_dir()


@pytest.mark.parametrize("files, damage, status, said", [*cases(RUN)])
def test_a_run_goes_on_from_what_is_good(run, tmp_path, capsys, files, damage, status, said):
    out = spoiled(run, tmp_path, files, damage)
    before = contents(out)
    assert main(["resume", str(out)]) == status
    errors = capsys.readouterr().err
    if said:
        assert errors.count("\n") == 1
        check_sentence(errors, *(out / file for file in files), out)
    else:
        assert errors == ""
    if status:
        assert contents(out) == before
        return
    found, whole = contents(out), contents(run / "whole")
    for file in ("config.json", "metrics.csv", "learning_curve.png", "checkpoints/00000012.npz"):
        assert found[file] == whole[file], file
    assert not [file for file in found if "/." in f"/{file}"]


@pytest.mark.parametrize("damage", EVERY)
def test_evaluation_does_without_the_rows_and_the_newest_state(run, tmp_path, capsys, damage):
    out = spoiled(run, tmp_path, ["metrics.csv", ONLY_RUN[1]], damage)
    before = contents(out)
    assert main(["evaluate", str(out), "--num-episodes", "1"]) == 0
    captured = capsys.readouterr()
    assert "CartPole-v1 after 32 steps" in captured.out
    assert (ONLY_RUN[1] in captured.err) == (damage != "missing") and contents(out) == before


@pytest.mark.long
@pytest.mark.parametrize("files, damage, status, reported", [*cases(SWEEPS)])
def test_a_sweep_goes_on_from_what_is_good(sweep, tmp_path, capsys, files, damage, status, reported):
    out = spoiled(sweep, tmp_path, files, damage)
    before = contents(out)
    assert main(["report", str(out)]) == reported
    if reported:
        check_sentence(capsys.readouterr().err, out)
        assert contents(out) == before
    capsys.readouterr()
    assert main(["sweep", str(sweep / "sweep.toml"), "--agents-per-device", "1", "--output", str(out)]) == status
    errors = capsys.readouterr().err
    if damage != "missing" and (status or damage != "another version" or files == [STATE]):
        check_sentence(errors, *(out / file for file in files))
    if status:
        assert {name: data for name, data in contents(out).items() if name in before} == before
        return
    found, whole = contents(out), contents(sweep / "whole")
    for file in ("sweep.json", "programs/00.json", BLOCK, "results/00-0001.parquet"):
        if file != BLOCK or damage != "another version" or files != [BLOCK]:
            assert found[file] == whole[file], file
    assert not [file for file in found if file.startswith("checkpoints/") or "/." in f"/{file}"]


@pytest.mark.slow
def test_any_flipped_byte_of_a_finished_block_is_found(sweep, tmp_path, capsys):
    """Pages, their headers, the directory at the end: everything is under the checksum."""
    out, rng = spoiled(sweep, tmp_path, [], "missing"), random.Random(0)
    good = (out / BLOCK).read_bytes()
    for position in [*range(0, len(good), 97), *(rng.randrange(len(good)) for _ in range(50)), len(good) - 1]:
        data = bytearray(good)
        data[position] ^= 1 << rng.randrange(8)
        (out / BLOCK).write_bytes(bytes(data))
        assert main(["report", str(out)]) == 2
        assert f"{out / BLOCK} is damaged" in capsys.readouterr().err


def test_the_state_of_another_run_is_not_taken_for_this_ones(run, tmp_path, capsys):
    """Equal shapes, equal seeds, other settings."""
    out = spoiled(run, tmp_path, [], "missing")
    described = json.loads((out / "config.json").read_text())
    write_table(out / "config.json", {**described, "max_kl": 0.02})
    before = contents(out)
    for command in (["evaluate", str(out), "--num-episodes", "1"], ["resume", str(out)], ["export", str(out)]):
        assert main(command) == 2
        errors = capsys.readouterr().err
        check_sentence(errors, out / ONLY_RUN[1])
        assert "belongs to another run" in errors and contents(out) == before


@pytest.mark.long
def test_rows_of_another_sweep_or_block_are_not_taken_for_this_ones(sweep, tmp_path, capsys):
    out = spoiled(sweep, tmp_path, [], "missing")
    other = out / "results" / "00-0001.parquet"
    shutil.copy(out / BLOCK, other)
    before = contents(out)
    assert main(["report", str(out)]) == 0
    check_sentence(capsys.readouterr().err, other)
    command = ["sweep", str(sweep / "sweep.toml"), "--agents-per-device", "1", "--output", str(out)]
    assert main(command) == 2
    check_sentence(capsys.readouterr().err, other)
    assert {name: data for name, data in contents(out).items() if name in before} == before
    described = json.loads((out / "sweep.json").read_text())
    write_table(out / "sweep.json", {**described, "grid": {"max_kl": [0.003, 0.02]}})
    assert main(["report", str(out)]) == 2
    errors = capsys.readouterr().err
    check_sentence(errors, out / BLOCK)
    assert errors.count("\n") == 1 and "restore one of the two" in errors


def test_the_state_of_another_block_is_not_taken_for_this_ones(tmp_path, capsys):
    write_table(tmp_path / "sweep.json", {"seed": 0})
    snapshot = Snapshot(np.ones((1, 2)), {name: np.ones((1, 3), np.float32) for name in METRICS})
    first, second = (Block(0, number, number, number + 1) for number in range(2))
    folder = Folder(tmp_path)
    folder.save(first, snapshot)
    assert np.array_equal(folder.restore(first, snapshot.states).states, snapshot.states)
    (file,) = (tmp_path / "checkpoints").iterdir()
    swapped = file.rename(file.with_name(file.name.replace("00-0000", "00-0001")))
    assert folder.restore(second, snapshot.states) is None
    check_sentence(capsys.readouterr().err, swapped)


def test_a_state_under_the_name_of_another_iteration_is_passed_over(run, tmp_path, capsys):
    out = spoiled(run, tmp_path, [], "missing")
    late = out / "checkpoints" / "99999999.npz"
    shutil.copy(out / ONLY_RUN[0], late)
    assert main(["evaluate", str(out), "--num-episodes", "1"]) == 0
    captured = capsys.readouterr()
    check_sentence(captured.err, late)
    assert "after 48 steps" in captured.out and late.exists()


def test_an_environment_that_is_not_the_runs_is_refused(run, capsys):
    for command in (["evaluate"], ["resume"], ["export"]):
        assert main([*command, str(run / "killed"), "--env", "Acrobot-v1"]) == 2
        assert "trained on, CartPole-v1; leave out --env." in capsys.readouterr().err
    for name in (":", "", "..os:X", "δ", "CartPole-v1?"):
        assert main(["play", str(run / "killed"), "--env", name, "--num-episodes", "1"]) == (0 if name == "" else 2)
        errors = capsys.readouterr().err
        assert "Traceback" not in errors and errors.count("\n") == (name != "")


@pytest.mark.parametrize("about", [{"threads": "many"}, {"threads": True}, 3])
def test_a_sweep_of_unknown_making_is_damaged(sweep, tmp_path, capsys, about):
    out = spoiled(sweep, tmp_path, [], "missing")
    described = json.loads((out / "sweep.json").read_text())
    write_table(out / "sweep.json", {**described, "made_by": about})
    before = contents(out)
    assert main(["sweep", str(sweep / "sweep.toml"), "--agents-per-device", "1", "--output", str(out)]) == 2
    check_sentence(capsys.readouterr().err, out / "sweep.json")
    assert contents(out) == before
