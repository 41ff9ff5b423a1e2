"""The command line: flags come from Config, bad input is one sentence and status 2, and nothing is overwritten."""

import dataclasses
import os
import sys
import time

import pytest

from trpo_jax import Config
from trpo_jax.cli import main

TINY = ["--num-envs", "2", "--num-steps", "8", "--num-iterations", "3"]


# No cache of compiled programs is named, as where users start.
OWN_CACHE = {"JAX_COMPILATION_CACHE_DIR": None, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": None}
TRAIN = ["-m", "trpo_jax.cli", "train", *TINY, "--num-seeds", "2"]


@pytest.fixture(scope="module")
def first_start(python, tmp_path_factory):
    """A folder in which a child trained; it is its home and keeps what was compiled."""
    folder = tmp_path_factory.mktemp("first")
    result = python(*TRAIN, cwd=folder, env={**OWN_CACHE, "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "200"})
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return folder


@pytest.fixture(scope="module")
def tiny_run(first_start):
    return first_start / "runs" / "CartPole-v1"


def snapshot(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["train", "CartPol-v1"], "there is no environment 'CartPol-v1'; did you mean CartPole-v1"),
        (["train", "--max-kll", "1"], "unknown argument --max-kll; did you mean --max-kl or "),
        (["train", "--max-kl", "-0.1"], "max_kl must lie in (0, 1e6], got -0.1."),
        (["train", "--max-kl", "nan"], "max_kl must lie in (0, 1e6], got nan."),
        (["train", "--gamma", "1.1"], "gamma must lie in [0, 1]"),
        (["train", "--gamma", "high"], "argument --gamma: invalid float value: 'high'"),
        (["train", "--fisher-fraction", "0"], "fisher_fraction must lie in (0, 1]"),
        (["train", "--num-envs", "0"], "num_envs must be a whole number from 1 to 10,000,000, got 0."),
        (["train", "--num-steps", "1.5"], "'1.5' is not a whole number"),
        (["train", "--num-seeds", "0"], "num_seeds must be a whole number from 1 to 1,000,000, got 0."),
        (["train", "--seed", "-1"], "seed must be a whole number from 0 to 2,147,483,647, got -1."),
        (["train", "--line-search", "golden"], "line_search must be one of auto, backtracking, parallel"),
        (
            ["train", "--value-fit", "adam", "--num-envs", "3", "--num-steps", "5"],
            "value_minibatches=8 does not divide",
        ),
        (["train", "--total-steps", "10"], "total_steps=10 is less than one iteration"),
        (["train", "--total-steps", "1e5", "--num-iterations", "3"], "give one of them"),
        (["train", "--initial-log-std", "0.5"], "CartPole-v1 has discrete actions; leave it out."),
        (["train", "MNISTBandit-bsuite"], "MNISTBandit-bsuite cannot be made without its data set"),
        (["evaluate", "missing"], "missing is not the folder of a run"),
        (["resume", "missing"], "missing is not the folder of a run"),
        (["evaluate"], "the following arguments are required: path"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def test_other_settings_leave_a_run_alone(tiny_run, capsys):
    before = snapshot(tiny_run)
    assert main(["train", *TINY, "--num-seeds", "2", "--max-kl", "0.5", "--output", str(tiny_run)]) == 2
    assert "holds a run with another max_kl; choose another --output" in capsys.readouterr().err
    assert snapshot(tiny_run) == before


def test_same_settings_take_the_run_up(tiny_run, capsys):
    before = snapshot(tiny_run / "checkpoints")
    assert main(["train", *TINY, "--num-seeds", "2", "--output", str(tiny_run)]) == 0
    assert "Every iteration is done already." in capsys.readouterr().out
    assert snapshot(tiny_run / "checkpoints") == before


def test_foreign_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(["train", *TINY, "--output", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_unwritable_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert main(["train", *TINY, "--output", str(tmp_path / "file" / "run")]) == 2
    assert "cannot write" in capsys.readouterr().err or "choose another" in capsys.readouterr().err

    # The superuser may write to a read-only folder, so the refusal of the system is played.
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    assert main(["train", *TINY, "--output", str(tmp_path / "run")]) == 2
    assert "Permission denied; choose a folder that can be written to." in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"env": "CartPole-v1"}', '{"seed": 0, "num_seeds": 1, "max_kI": 1}'])
def test_damaged_config(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text)
    assert main(["resume", str(tmp_path)]) == 2
    assert "config.json is damaged" in capsys.readouterr().err


def test_evaluate_prints_every_agent(tiny_run, capsys):
    assert main(["evaluate", str(tiny_run), "--num-episodes", "3", "--stochastic"]) == 0
    out = capsys.readouterr().out
    assert "sampled actions" in out and "all" in out
    assert main(["evaluate", str(tiny_run), "--num-episodes", "0"]) == 2


def test_envs_lists_what_can_be_trained(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "brax", None)  # as if not installed
    assert main(["envs"]) == 0
    out = capsys.readouterr().out
    assert "CartPole-v1" in out and "Discrete(2)" in out and "Box(1) [-2, 2]" in out
    assert "MNISTBandit-bsuite" in out
    assert "pip install '.[brax]'" in out


def test_help_is_fast_and_complete(python):
    def timed():
        start = time.perf_counter()
        result = python("-m", "trpo_jax.cli", "train", "--help")
        return time.perf_counter() - start, result.stdout

    duration, text = min(timed() for _ in range(3))
    assert duration < 1.5
    words = " ".join(text.split())
    for field in dataclasses.fields(Config):
        if field.metadata["flag"]:
            assert f"--{field.name.replace('_', '-')}" in text
            assert f"{' '.join(field.metadata['help'].split()[:3])}" in words
            assert f"(default: {field.default}" in words


def test_default_environment_and_output(tiny_run):
    assert sorted(os.listdir(tiny_run)) == ["checkpoints", "config.json", "learning_curve.png", "metrics.csv"]


def test_compiled_programs_are_kept_for_the_next_start(first_start, tiny_run, python, tmp_path):
    cache = first_start / "cache"
    kept = sorted(cache.glob("trpo_jax/*/*-cache"), key=lambda file: file.stat().st_size)
    assert kept
    start = [*TRAIN, "--output"]
    watched = {**OWN_CACHE, "XDG_CACHE_HOME": str(cache), "JAX_EXPLAIN_CACHE_MISSES": "1", "JAX_LOG_COMPILES": "1"}
    second = python(*start, str(tmp_path / "two"), env=watched)
    assert second.returncode == 0 and "PERSISTENT COMPILATION CACHE MISS" not in second.stderr
    assert "Persistent compilation cache hit" in second.stderr
    assert (tiny_run / "metrics.csv").read_bytes() == (tmp_path / "two" / "metrics.csv").read_bytes()
    smallest = kept[0]
    smallest.write_bytes(smallest.read_bytes()[:100])  # a kill while it was written
    third = python(*start, str(tmp_path / "three"), env={**OWN_CACHE, "XDG_CACHE_HOME": str(cache)})
    assert third.returncode == 0 and third.stderr == ""
    assert (tiny_run / "metrics.csv").read_bytes() == (tmp_path / "three" / "metrics.csv").read_bytes()
