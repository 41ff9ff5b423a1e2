"""The command line: flags come from Config, bad input is one sentence and status 2, and nothing is overwritten."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib

import jax
import numpy as np
import pytest
from probes import linear_policy, linear_value, raw, small_config
from rich.console import Console
from scipy import stats

import trpo_jax
import trpo_jax.__main__
from trpo_jax import Config
from trpo_jax.cli import main
from trpo_jax.cli.arguments import make_parser
from trpo_jax.cli.choices import config_of
from trpo_jax.cli.displays import LiveLine, run_status
from trpo_jax.fields import as_text
from trpo_jax.runs.continuing import Progress
from trpo_jax.runs.runner import Clock
from trpo_jax.settings import checked_settings
from trpo_jax.training.loop import init
from trpo_jax.training.memory import least_memory

TINY = ["--num-envs", "2", "--num-steps", "8", "--num-iterations", "3"]


# No cache of compiled programs is named, as where users start.
OWN_CACHE = {"JAX_COMPILATION_CACHE_DIR": None, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": None}
TRAIN = ["-m", "trpo_jax", "train", *TINY, "--num-seeds", "2"]


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
        (["train", "--max-kl", "1e39"], "max_kl must lie in (0, 1e6], got 1e+39."),
        (["train", "--max-kl", "1e-46"], "max_kl must lie in (0, 1e6], got 1e-46, which is 0 in float32."),
        (["train", "--num-envs", "1e300"], "num_envs must be a whole number from 1 to 10,000,000, got 1000"),
        (["train", "--num-envs", "9" * 5000], "is not a whole number"),
        (
            ["train", "--num-steps", str(2**31)],
            "num_steps must be a whole number from 1 to 10,000,000, got 214",
        ),
        (["train", "--num-envs", "1e6", "--num-steps", "1e6"], "samples per update are more than 2,147,483,647"),
        (["train", "--num-envs", "100000000"], "num_envs must be a whole number from 1 to 10,000,000, got 100000000."),
        (["train", "--seed", str(2**32 + 7)], "seed must be a whole number from 0 to 2,147,483,647, got 4294967303."),
        (["train", "--seed", "1e20"], "seed must be a whole number from 0 to"),
        (["train", "--seed", str(2**31 - 1), "--num-seeds", "2"], "reach beyond 2147483647, the largest seed"),
        (["evaluate", "x", "--seed", str(2**32 + 7)], "seed must be a whole number from 0 to"),
        (["play", "x", "--seed", "-1"], "seed must be a whole number from 0 to"),
        (
            ["train", "--update", "ppo", "--max-kl", "0.02"],
            "max_kl needs update=trpo; with update=ppo it has no effect",
        ),
        (["train", "--value-epochs", "3"], "value_epochs needs value_fit=adam;"),
        (["train", "--clip-ratio", "0.3"], "clip_ratio needs update=ppo or natural_gradient_steps=2 or more;"),
        (["train", "--eval-every", "200"], "eval_every=200 is more than num_iterations=150, so nothing would be"),
        (["train", "--stop-at-return", "9"], "stop_at_return needs eval_every=1 or more; with eval_every=0 it has no"),
        (["train", "--keep-every", "-1"], "keep_every must be a whole number from 0 to 10,000,000, got -1."),
        (["benchmark", "--eval-every", "2"], "benchmark measures training without evaluation; leave out eval_every."),
        (["benchmark", "--output", "."], "--output must name a file, but . is a folder; add a name to it."),
        (["evaluate", "missing", "--agent", "1000000"], "missing is not the folder of a run"),
        (["benchmark", "--target-kl", "0.3"], "target_kl needs radius_rule=divergence or update=kl-penalty;"),
        (["train", "--state-dependent-std"], "CartPole-v1 has discrete actions; leave it out."),
        (["train", "--channels", "32"], "channels needs network=cnn; with network=mlp it has no effect; leave"),
        (["benchmark", "--channels", "32"], "channels needs network=cnn; with network=mlp it has no effect; leave"),
        (["train", "--env-arg", "gravity=1", "--env-arg", "gravity=2"], "--env-arg gravity is given twice; leave one"),
        (["train", "--randomize", "gravity=1..2 gravity=5..6"], "randomize has two ranges of gravity; give one."),
        (["resume", "--", "-x", "--total-steps", "400"], "--total-steps must stand after the command resume, and"),
        (["--render", "play", "x"], "--render must stand after the command play, and before any --."),
        (["train", "--output", "a" * 300, *TINY], "File name too long"),
        (["train", "--output", "a\0b"], "output must not contain the character NUL"),
        (["train", "--config", "a" * 300], "File name too long"),
        (["train", "--config", "/dev/zero"], "/dev/zero is not TOML: it is larger than 16 MiB."),
        (["report", "a" * 300], "File name too long"),
        (["sweep", "a" * 300], "File name too long"),
        (["train", "x" * 5000], "there is no environment 'xxx"),
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


@pytest.mark.long
def test_other_settings_leave_a_run_alone(tiny_run, capsys):
    before = snapshot(tiny_run)
    assert main(["train", *TINY, "--num-seeds", "2", "--max-kl", "0.5", "--output", str(tiny_run)]) == 2
    assert "holds a run with another max_kl; choose another --output" in capsys.readouterr().err
    assert snapshot(tiny_run) == before


def test_same_settings_take_the_run_up(tiny_run, capsys):
    before = snapshot(tiny_run / "checkpoints")
    assert main(["train", *TINY, "--num-seeds", "2", "--output", str(tiny_run)]) == 0
    assert "All iterations are done already." in capsys.readouterr().out
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
    assert "sampled actions" in out and "all" in out and "IQM over the agents" in out
    assert main(["evaluate", str(tiny_run), "--num-episodes", "0"]) == 2


@pytest.mark.parametrize("name", ["config.json", "metrics.csv"])
def test_no_output_overwrites_a_file_of_a_run(tiny_run, name, capsys):
    before, file = snapshot(tiny_run), str(tiny_run / name)
    assert main(["benchmark", "--output", file]) == 2
    assert f"--output would overwrite {file}, which belongs to the folder" in capsys.readouterr().err
    if name == "config.json":
        for command in (["evaluate", str(tiny_run), "--output", file], ["compare", str(tiny_run), "--json", file]):
            assert main(command) == 2
            assert f"{command[-2]} would overwrite {file}, which belongs to" in capsys.readouterr().err
    assert snapshot(tiny_run) == before


def test_evaluate_writes_its_figures(tiny_run, tmp_path, capsys):
    file = tmp_path / "x.json"
    assert main(["evaluate", str(tiny_run), "--num-episodes", "5", "--output", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["num_episodes"] == 5 and not found["stochastic"] and f"Figures: {file}" in capsys.readouterr().out
    means = [np.mean(agent["returns"]) for agent in found["agents"]]
    for agent, mean in zip(found["agents"], means, strict=True):
        assert agent["mean"] == pytest.approx(mean) and len(agent["lengths"]) == 5
        low, high = stats.t.interval(0.95, 4, mean, stats.sem(agent["returns"]))
        assert (agent["low"], agent["high"]) == (pytest.approx(low), pytest.approx(high))
    over = found["all"]
    low, high = stats.t.interval(0.95, len(means) - 1, np.mean(means), stats.sem(means))
    assert (over["mean"], over["low"], over["high"]) == pytest.approx((np.mean(means), low, high))
    assert over["iqm_interval"][0] <= over["iqm"] <= over["iqm_interval"][1]
    assert main(["evaluate", str(tiny_run), "--output", str(tiny_run / "config.txt")]) == 2
    assert "--output must name a file that ends in .json" in capsys.readouterr().err


@pytest.mark.long
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
        result = python("-m", "trpo_jax", "train", "--help")
        return time.perf_counter() - start, result.stdout

    duration, text = min(timed() for _ in range(3))
    assert duration < 1.5
    words = " ".join(text.split())
    for field in dataclasses.fields(Config):
        if field.metadata["flag"]:
            assert f"--{field.name.replace('_', '-')}" in text
            assert f"{' '.join(field.metadata['help'].split()[:3])}" in words
            assert f"(default: {as_text(field.default)}" in words


def test_default_environment_and_output(tiny_run):
    assert sorted(os.listdir(tiny_run)) == ["checkpoints", "config.json", "learning_curve.png", "metrics.csv"]


@pytest.mark.long
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


@pytest.mark.parametrize("command", [["train", "--num-envs", "1000000"], ["train", *TINY, "--num-seeds", "1000000"]])
def test_what_needs_more_memory_than_there_is_is_refused_before_it_is_compiled(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trpo_jax.runs.folders.free_memory", lambda devices: 2**30)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"trpo-jax: at least [\d.,]+ GiB are needed for num_envs .*, but 1.0 GiB are free; lower .*\n", error
    )
    assert not list(tmp_path.iterdir())


def test_least_memory_is_states_and_one_batch():
    config = small_config("CartPole-v1", policy=linear_policy(4), value=linear_value(4), num_envs=6, num_steps=8)
    state = sum(raw(leaf).nbytes for leaf in jax.tree.leaves(init(config, jax.random.key(0))))
    sample = 4 * 4 + 4 + 4 + 1 + 1 + 4 * 4  # observation, action, reward, two flags, next observation
    assert least_memory(config, 3) == 3 * state + (6 * 8 * sample)


def test_episodes_are_compared_with_the_memory_too(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr("trpo_jax.training.memory.free_memory", lambda devices: 2**20)
    assert main(["evaluate", str(tiny_run), "--num-episodes", "1000000"]) == 2
    assert "are needed for num_episodes (1,000,000)" in capsys.readouterr().err


# Files


def copy(run, folder, **changes):
    """A copy of a run whose config.json says something else, and has no checksum, as older ones have none."""
    shutil.copytree(run, folder / "run")
    file = folder / "run" / "config.json"
    described = {**json.loads(file.read_text()), **changes}
    described.pop("checksum", None)
    file.write_text(json.dumps(described))
    return folder / "run"


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"num_seeds": 0}, "config.json is damaged (num_seeds must be a whole number from 1 to 1,000,000, got 0)"),
        ({"num_seeds": 1e300}, "config.json is damaged (num_seeds must be a whole number"),
        ({"num_seeds": "2"}, "config.json is damaged (num_seeds must be a whole number"),
        ({"num_seeds": None}, "config.json is damaged (num_seeds must be a whole number"),
        ({"seed": 2**32 + 7}, "config.json is damaged (seed must be a whole number"),
        ({"max_kl": True}, "config.json is damaged (max_kl in it must be a number"),
        ({"fisher_fraction": [0.5]}, "config.json is damaged (fisher_fraction in it must be a number"),
        ({"env": 3}, "config.json is damaged (env in it must be the name of an environment"),
        ({"policy": "x"}, "config.json is damaged (it has no setting 'policy'"),
        ({"env": "gymnasium/evil:Name"}, "if you trust it, name it again: --trust gymnasium/evil:Name, or"),
    ],
    ids=str,
)
def test_what_config_json_says_is_checked(tiny_run, tmp_path, capsys, monkeypatch, changes, sentence):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    run = copy(tiny_run, tmp_path, **changes)
    before = snapshot(run)
    for command in ("resume", "evaluate"):
        assert main([command, str(run)]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    assert snapshot(run) == before


def test_another_number_of_agents_than_the_checkpoint_has_loses_nothing(tiny_run, tmp_path, capsys):
    run = copy(tiny_run, tmp_path, num_seeds=3)
    before = snapshot(run)
    for command in ("resume", "evaluate"):
        assert main([command, str(run)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert snapshot(run) == before


MODULE = """
import gymnasium

class Env(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 1, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.low, {}

    def step(self, action):
        return self.observation_space.low, 1.0, True, False, {}

gymnasium.register("Named-v0", Env, max_episode_steps=3)
"""


def test_a_module_is_imported_where_the_command_line_names_it(tmp_path, capsys, monkeypatch):
    (tmp_path / "own_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    env, run = "gymnasium/own_module:Named-v0", ["--output", "run"]
    assert main(["train", env, *TINY, *run]) == 0
    assert main(["evaluate", "run"]) == 2 and f"name it again: --trust {env}" in capsys.readouterr().err
    assert main(["evaluate", "run", "--num-episodes", "2", "--trust", env]) == 0
    assert main(["train", env, *TINY, *run]) == 0 and "done already" in capsys.readouterr().out
    (tmp_path / "file.toml").write_text(f"env = '{env}'")
    assert main(["train", "--config", "file.toml"]) == 2
    assert "env in file.toml names a module to import" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, flags, iterations",
    [
        ("total_steps = 64", [], 4),
        ("total_steps = 64", ["--num-iterations", "3"], 3),
        ("total_steps = 64", ["--total-steps", "32"], 2),
        ("num_iterations = 5", ["--total-steps", "32"], 2),
        ("num_iterations = 5", [], 5),
        ("", [], 150),
    ],
)
def test_a_file_gives_the_length_of_a_run_and_flags_count(text, flags, iterations):
    arguments = make_parser().parse_args(["train", "--num-envs", "2", "--num-steps", "8", *flags])
    assert config_of(arguments, checked_settings(tomllib.loads(text), "file")).num_iterations == iterations


def test_a_setting_of_a_file_that_has_no_effect_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trpo_jax.cli.train_commands._continue", lambda *_: 0)
    (tmp_path / "a.toml").write_text("max_kl = 0.02\nclip_ratio = 0.2\ngamma = 0.9")
    assert main(["train", "--config", "a.toml", "--update", "ppo"]) == 0
    note = "trpo-jax: note: max_kl in a.toml needs update=trpo; with update=ppo it has no effect.\n"
    assert capsys.readouterr().err == note
    (tmp_path / "b.toml").write_text("channels = [8]\ninitial_log_std = -1.0")
    assert main(["train", "--config", "b.toml", "--output", "b"]) == 0
    assert capsys.readouterr().err == (
        "trpo-jax: note: channels in b.toml needs network=cnn; with network=mlp it has no effect.\n"
        "trpo-jax: note: initial_log_std in b.toml sets σ of a Gaussian policy, but CartPole-v1 has discrete actions.\n"
    )


# Words and displays


def test_version_and_help(capsys):
    for arguments in (["--version"], ["benchmark", "--help"]):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"trpo_jax {trpo_jax.__version__} ")
    assert "environments stepped in parallel, N (default: 64" in text


def test_time_left_is_seen_on_80_columns():
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    clock = Clock(total=1_234_567 * 3724, done=0)
    clock.count(1_234_567)
    clock.seconds = 1.0
    metrics = {"episode_return": -1234.5, "mean_kl": 0.01, "step_fraction": 1.0}
    with LiveLine(console, 150, seconds=1) as line:
        line.show(75, run_status(Progress(75, metrics, clock), Config()))
        line.bar.refresh()
    last = next(text for text in reversed(out.getvalue().splitlines()) if "steps/s" in text)
    assert "1:02:03 left" in last and "1,234,567 steps/s" in last and "return  -1234.5" in last


class Refusing(io.StringIO):
    """A stream on a full disk, or whose reader is gone."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


FULL, GONE = OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("error", [FULL, GONE], ids=["full", "gone"])
def test_training_goes_on_where_its_display_is_lost(error, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout", Refusing(error))
    assert main(["train", *TINY, "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "metrics.csv").read_text().count("\n") == 4
    assert (
        capsys.readouterr().err
        == f"trpo-jax: output is no longer possible ({error.strerror}); the command continues without it.\n"
    )


@pytest.mark.long
@pytest.mark.parametrize("error, status", [(FULL, 2), (GONE, 0)], ids=["full", "gone"])
@pytest.mark.parametrize("command", [["envs"], ["evaluate", "RUN", "--num-episodes", "1"]], ids=lambda c: c[0])
def test_an_answer_that_cannot_be_shown_is_one_sentence(command, error, status, tiny_run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout", Refusing(error))
    assert main([str(tiny_run) if word == "RUN" else word for word in command]) == status
    said = "trpo-jax: cannot read or write: No space left on device; choose another path, or make room.\n"
    assert capsys.readouterr().err == (said if status else "")


# Linux alone has this device, on which every write fails.
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments, status", [(["--help"], 2), (["evaluate", "missing"], 2)])
def test_exit_is_quiet_on_a_full_disk(arguments, status):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "trpo_jax", *arguments]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert result.returncode == status and result.stderr.count("\n") == 1 and result.stderr.startswith("trpo-jax: ")


INTERRUPTED = """
import os, signal, sys
from importlib.abc import MetaPathFinder

class Finder(MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "{module}":
            {how}

class Lost:
    def __del__(self):  # an exception is swallowed here
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))

sys.meta_path.insert(0, Finder())
sys.argv = ["trpo-jax", "train"]
from trpo_jax.__main__ import run
run()
"""


@pytest.mark.parametrize("module", ["argparse", "trpo_jax.config", "jax"])
@pytest.mark.parametrize("how", ["os.kill(os.getpid(), signal.SIGINT)", "Lost()"])
def test_ctrl_c_while_python_imports_is_no_traceback_and_never_status_0(module, how, python, tmp_path):
    result = python("-c", INTERRUPTED.format(module=module, how=how), cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "trpo-jax: interrupted.\n")
    assert not list(tmp_path.iterdir())


NOWHERE = """
import os, pathlib, jax
from trpo_jax.cli.startup import start_quickly

def unknown():
    raise RuntimeError("Could not determine home directory.")

for home in ("/dev/null/x", "/proc/x", None):
    pathlib.Path.home = unknown if home is None else pathlib.Path.home
    os.environ.pop("XDG_CACHE_HOME", None)
    if home:
        os.environ["XDG_CACHE_HOME"] = home
    start_quickly()
    print(jax.config.jax_compilation_cache_dir)
"""


def test_without_a_place_for_compiled_programs_it_goes_on_without(python):
    result = python("-c", NOWHERE, env=OWN_CACHE)
    assert result.stdout.split() == ["None"] * 3, result.stderr


def test_where_jax_cannot_start_one_sentence_names_what_it_was_told(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("Unable to initialize backend 'nonsense'\nand more")

    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setattr(jax, "local_devices", fail)
    assert main(["train", "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("trpo-jax: JAX cannot start (Unable to initialize backend 'nonsense'); change or unset ")
    assert "JAX_PLATFORMS='nonsense'" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["jax_enable_x64", "jax_disable_jit"])
def test_ways_of_jax_that_no_program_goes_are_refused_before_anything_is_written(name, tmp_path, capsys):
    jax.config.update(name, True)
    try:
        assert main(["train", "--output", str(tmp_path / "run")]) == 2
    finally:
        jax.config.update(name, False)
    assert capsys.readouterr().err.startswith(f"trpo-jax: {name.upper()} is set")
    assert not list(tmp_path.iterdir())


def test_pictures_need_no_backend_of_the_users(monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "nonsense")
    monkeypatch.setattr(sys, "argv", ["trpo-jax", "--version"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit):
        trpo_jax.__main__.run()
    assert os.environ["MPLBACKEND"] == "agg"
