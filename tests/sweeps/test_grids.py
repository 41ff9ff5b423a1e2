"""A sweep's file: what it means, and one sentence for what it cannot mean."""

import numpy as np
import pytest

from trpo_jax import Config, UsageError
from trpo_jax.sweeps.grids import TUNING_SEEDS, group_by_program, make_points, make_spec, read_spec, stack_configs


def test_grid_zip_and_random_are_multiplied():
    spec = make_spec(
        {
            "base": {"num_envs": 4, "gamma": 1},
            "grid": {"max_kl": [0.01, 0.02], "cg_iterations": [5, 10]},
            "zip": {"env": ["CartPole-v1", "Acrobot-v1"], "total_steps": [10_240, 5_120.0]},
            "random": {"count": 3, "seed": 1, "cg_damping": {"log_uniform": [1e-3, 1]}},
        }
    )
    points = make_points(spec)
    assert len(points) == 2 * 2 * 2 * 3
    assert points[0].varied.keys() == {"max_kl", "cg_iterations", "env", "total_steps", "cg_damping"}
    assert [p.config.env for p in points[:4]] == ["CartPole-v1"] * 3 + ["Acrobot-v1"]
    assert points[0].config.num_iterations == 20 and points[3].config.num_iterations == 10
    assert all(p.config.gamma == 1.0 and isinstance(p.config.gamma, float) for p in points)
    assert [p.config.cg_damping for p in points[:3]] == [p.config.cg_damping for p in points[-3:]]
    assert [p.varied for p in make_points(spec)] == [p.varied for p in points]


def test_random_draws_follow_their_distributions():
    count = 4000
    random = {
        "count": count,
        "max_kl": {"log_uniform": [1e-4, 1e-1]},
        "gamma": {"uniform": [0.9, 1.0]},
        "cg_iterations": {"uniform": [5, 15]},
        "line_search": {"choice": ["backtracking", "parallel"]},
    }
    configs = [point.config for point in make_points(make_spec({"random": random}))]
    exponent = np.log10([config.max_kl for config in configs])
    # Uniform on [-4, -1]: mean -2.5, standard error of it √(3²/12/4000).
    assert abs(exponent.mean() + 2.5) < 5 * np.sqrt(9 / 12 / count) and exponent.min() >= -4 and exponent.max() <= -1
    gamma = np.array([config.gamma for config in configs])
    assert abs(gamma.mean() - 0.95) < 5 * 0.1 / np.sqrt(12 * count)
    whole = {config.cg_iterations for config in configs}
    assert whole == set(range(5, 16)) and all(isinstance(n, int) for n in whole)
    share = np.mean([config.line_search == "parallel" for config in configs])
    assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(count)


def test_traced_settings_share_a_program_and_static_ones_do_not():
    grid = {"max_kl": [0.01, 0.02], "gamma": [0.9, 0.99], "num_envs": [2, 4], "line_search_shrink": [0.5, 0.8]}
    points = make_points(make_spec({"grid": grid}))
    groups = group_by_program(points)
    assert [len(group) for group in groups] == [8, 8]
    assert {points[i].config.num_envs for i in groups[0]} == {2}
    stacked = stack_configs(points[i].config for i in groups[1])
    assert stacked.num_envs == 4 and stacked.max_kl.shape == (8,) and stacked.max_kl.dtype == np.float32
    np.testing.assert_array_equal(stacked.gamma, np.float32([points[i].config.gamma for i in groups[1]]))


def test_empty_spec_is_one_point_of_defaults():
    (point,) = make_points(make_spec({}))
    assert point.varied == {} and point.config == Config()


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("[grid", "is not TOML"),
        ("max_kl = 0.1", "unknown entry 'max_kl'; put settings into [base]"),
        ("num_seed = 3", "unknown entry 'num_seed'; did you mean num_seeds"),
        ("num_seeds = 0", "num_seeds in {file} must be a whole number from 1 to 1,000,000, got 0."),
        ("num_seeds = 2.5", "num_seeds in {file} must be a whole number from 1 to 1,000,000, got 2.5."),
        ("[base]\nmax_kll = 1", "[base] of {file} has no setting 'max_kll'; did you mean max_kl"),
        ("[base]\nmax_kl = -1", "max_kl in [base] of {file} must lie in (0, 1e6], got -1"),
        ("[base]\nenv = 'CartPol-v1'", "there is no environment 'CartPol-v1'; did you mean CartPole-v1"),
        ("[base]\ntotal_steps = 100", "total_steps=100 is less than one iteration"),
        ("[base]\ntotal_steps = 100_000\nnum_iterations = 3", "give one of them"),
        ("[grid]\nmax_kl = 0.1", "max_kl in [grid] of {file} must be a list of values, got 0.1."),
        ("[grid]\nmax_kl = []", "max_kl in [grid] of {file} must be a list of values, got []."),
        ("[grid]\nmax_kl = [0.1, 'b']", "max_kl in [grid] of {file} must be a number in (0, 1e6], got 'b'."),
        ("[base]\nmax_kl = 0.1\n[grid]\nmax_kl = [0.1]", "max_kl is set in more than one section"),
        ("[zip]\nmax_kl = [0.1]\ngamma = [0.9, 0.99]", "must be of one length, but max_kl has 1, gamma has 2."),
        ("[random]\nmax_kl = { uniform = [0, 1] }", "[random] of {file} needs count"),
        ("[random]\ncount = 3", "[random] of {file} names no setting to draw."),
        (
            "[random]\ncount = 3\nmax_kl = { normal = [0, 1] }",
            "max_kl in [random] of {file} must be {{ uniform = [low, high] }}",
        ),
        (
            "[random]\ncount = 3\nmax_kl = { uniform = [1, 0] }",
            "max_kl in [random] of {file} must be {{ uniform = [low, high] }}",
        ),
        ("[random]\ncount = 3\nmax_kl = { log_uniform = [0, 1] }", "log_uniform bounds of max_kl"),
        (f"seed = {TUNING_SEEDS}", "belong to tuning"),
        ("grid = 3", "grid in {file} must be a table of settings, got 3."),
    ],
)
def test_bad_file_is_one_sentence_and_leaves_nothing(text, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        make_points(read_spec(file))
    message = str(error.value)
    assert sentence.replace("{file}", str(file)).replace("{{", "{").replace("}}", "}") in message
    assert "\n" not in message and message[-1] in ".?"
    assert [entry.name for entry in tmp_path.iterdir()] == ["sweep.toml"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["sweep", "missing.toml"], "cannot read missing.toml: No such file or directory."),
        (["sweep", "s.toml", "--agents-per-device", "0"], "agents_per_device must be a whole number from 1 to"),
        (["sweep", "s.toml", "--checkpoint-seconds", "nan"], "checkpoint_seconds must lie in [0, 1e9], got nan."),
        (["sweep", "s.toml", "--num-processes", "2"], "num_processes and process_id belong together"),
        (["sweep", "s.toml", "--num-processes", "2", "--process-id", "2"], "process_id must lie in 0 … "),
        (["report", "missing"], "missing is not the folder of a sweep"),
        (["tune", "s.toml"], "tune searches the distributions in [random]"),
        (["train", "--config", "missing.toml"], "cannot read missing.toml"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, sentence, tmp_path, python):
    (tmp_path / "s.toml").write_text("[base]\nnum_envs = 2\nnum_steps = 8\n")
    result = python("-m", "trpo_jax.cli", *arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert sentence in result.stderr and result.stderr.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.toml"]
