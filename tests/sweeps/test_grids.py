"""A sweep's file: what it means, and one sentence for what it cannot mean."""

import jax
import numpy as np
import pytest

from trpo_jax import Config, UsageError, sweep
from trpo_jax.presets import load_preset
from trpo_jax.runs.descriptions import made_by, write_table
from trpo_jax.settings import value_of
from trpo_jax.sweeps.grids import (
    TUNING_SEEDS,
    make_point,
    make_points,
    make_spec,
    read_spec,
)
from trpo_jax.sweeps.in_folder import run_sweep
from trpo_jax.sweeps.plans import group_by_program, plan, stack_configs
from trpo_jax.sweeps.reports import make_report
from trpo_jax.sweeps.search import _suggest


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


def test_widths_of_layers_are_lists_in_a_list():
    spec = make_spec(
        {
            "base": {"channels": [8]},
            "grid": {"hidden": [[64, 64], [256], [], "auto"]},
            "random": {"count": 2, "value_hidden": {"choice": [[8], "4,4"]}},
        }
    )
    points = make_points(spec)
    assert [point.config.hidden for point in points[::2]] == [(64, 64), (256,), (), "auto"]
    assert {point.config.value_hidden for point in points} <= {(8,), (4, 4)}
    assert all(point.config.channels == (8,) and point.varied["hidden"] == point.config.hidden for point in points)
    assert [value_of(point.config, "hidden") for point in points[::2]] == ["64,64", "256", "[]", "auto"]
    assert len(group_by_program(points)) == len({(p.config.hidden, p.config.value_hidden) for p in points})
    with pytest.raises(UsageError, match=r"^hidden in \[grid\] of the sweep must be widths .* got 256\.$"):
        make_spec({"grid": {"hidden": [256, 256]}})


def test_a_search_names_widths_by_their_text():
    """A database of trials keeps words and numbers only."""
    optuna = pytest.importorskip("optuna")
    asked = optuna.trial.FixedTrial({"hidden": "8,8"})
    found = _suggest(asked, "hidden", {"choice": [[16], [8, 8], []]}, None)
    assert asked.distributions["hidden"].choices == ("16", "8,8", "[]")
    assert make_point({}, {"hidden": found}).config.hidden == (8, 8)


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


HALVES = ("gamma", "gae_lambda", "max_kl", "cg_damping")


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("[grid", "is not TOML"),
        ("max_kl = 0.1", "unknown entry 'max_kl'; put settings into [base]"),
        ("num_seed = 3", "unknown entry 'num_seed'; did you mean num_seeds"),
        ("num_seeds = 0", "num_seeds in {file} must be a whole number from 1 to 1,000,000, got 0."),
        *(
            (f"num_episodes = {value}", "num_episodes in {file} must be a whole number")
            for value in ("false", "0.0", "-1")
        ),
        ("num_seeds = 2.5", "num_seeds in {file} must be a whole number from 1 to 1,000,000, got 2.5."),
        ("[base]\nmax_kll = 1", "[base] of {file} has no setting 'max_kll'; did you mean max_kl"),
        ("[base]\nmax_kl = -1", "max_kl in [base] of {file} must lie in (0, 1e6], got -1"),
        ("[base]\nenv = 'CartPol-v1'", "there is no environment 'CartPol-v1'; did you mean CartPole-v1"),
        ("[base]\neval_every = 500", "eval_every=500 is more than num_iterations=150"),
        ("[base]\ntotal_steps = 100", "total_steps=100 is less than one iteration"),
        ("[base]\ntotal_steps = 100_000\nnum_iterations = 3", "give one of them"),
        ("[grid]\nmax_kl = 0.1", "max_kl in [grid] of {file} must be a list of values, got 0.1."),
        ("[grid]\nmax_kl = []", "max_kl in [grid] of {file} must be a list of values, got []."),
        ("[grid]\nmax_kl = [0.1, 'b']", "max_kl in [grid] of {file} must be a number in (0, 1e6], got 'b'."),
        ("[base]\nmax_kl = 0.1\n[grid]\nmax_kl = [0.1]", "max_kl is set in more than one section"),
        ("[zip]\nmax_kl = [0.1]\ngamma = [0.9, 0.99]", "must have the same length, but max_kl has 1, gamma has 2."),
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
        (f"seed = {TUNING_SEEDS}", "are for tuning"),
        ("grid = 3", "grid in {file} must be a table of settings, got 3."),
        ("num_sed = 3", "unknown entry 'num_sed'; did you mean num_seeds or num_episodes?"),
        ("num_seeds = 1e300", "num_seeds in {file} must be a whole number from 1 to 1,000,000, got 1e+300."),
        ("seed = 4294967303", "seed in {file} must be a whole number from 0 to 2,147,483,647, got 4294967303."),
        (f"seed = {TUNING_SEEDS - 5}\nnum_seeds = 6", "are for tuning"),
        (f"seed = {'9' * 5000}", "{file} is not TOML: Exceeds the limit (4300 digits)"),
        ("x = " + "[" * 3000 + "]" * 3000, "{file} is not TOML: it is nested too deeply."),
        ("[base]\npolicy = 'x'", "[base] of {file} has no setting 'policy'"),
        (
            "[base]\nfisher_fraction = [0.5]",
            "fisher_fraction in [base] of {file} must be a number in (0, 1], got [0.5].",
        ),
        ("[base]\nmax_kl = true", "max_kl in [base] of {file} must be a number in (0, 1e6], got True."),
        ("[base]\nmax_kl = 1e-46", "got 1e-46, which is 0 in float32."),
        (
            "[base]\nnum_envs = 1e300",
            "num_envs in [base] of {file} must be a whole number from 1 to 10,000,000, got 1000",
        ),
        ("[base]\nnormalize_rewards = 1", "normalize_rewards in [base] of {file} must be True or False, got 1."),
        ("[base]\nenv = 3", "env in [base] of {file} must be the name of an environment, got 3."),
        (
            "[base]\nenv = 'gymnasium/m:N'",
            "env in [base] of {file} names a module to import, 'gymnasium/m:N'; if you trust it",
        ),
        (
            "[grid]\nenv = ['CartPole-v1', 'm:N']",
            "env in [grid] of {file} names a module to import, 'm:N'; if you trust it",
        ),
        ("[random]\ncount = 1\nenv = { choice = ['m:N'] }", "env in [random] of {file} names a module to import"),
        (
            "[random]\ncount = 1\nseed = 'x'\ngamma = { choice = [1] }",
            "seed in [random] of {file} must be a whole number",
        ),
        ("[random]\ncount = 1e9\ngamma = { choice = [1] }", "count in [random] of {file} must be a whole number"),
        ("[random]\ncount = 1\ngamma = { uniform = [0, nan] }", "gamma in [random] of {file} must be {{ uniform"),
        (
            "[random]\ncount = 1\ngamma = { uniform = [0.9, 2] }",
            "gamma in [random] of {file} must lie in [0, 1], got 2",
        ),
        ("[random]\ncount = 1\nline_search = { uniform = [0, 1] }", "line_search in [random] of {file} must be one of"),
        ("[base]\ntotal_steps = 'x'", "total_steps in [base] of {file} must be a whole number"),
        (
            "[grid]\n" + "\n".join(f"{n} = {[0.5] * 1000}" for n in HALVES),
            "has 1000000000000 points with 1 seed each",
        ),
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
    assert "\n" not in message and message[-1] in ".?" and "?." not in message and len(message) < 500
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
    result = python("-m", "trpo_jax", *arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert sentence in result.stderr and result.stderr.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.toml"]


def test_a_file_may_begin_with_the_mark_of_its_encoding(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text("[base]\r\nmax_kl = 0.02\r\n", encoding="utf-8-sig")
    assert read_spec(file).base == {"max_kl": 0.02}
    file.write_text("[base]", encoding="utf-16")
    with pytest.raises(UsageError, match="is not text in UTF-8; save it in that encoding"):
        read_spec(file)


@pytest.mark.parametrize(
    "grid, options, sentence",
    [
        ({"max_kl": 0.1}, {}, "max_kl in the grid must be a list of values, got 0.1."),
        ({"line_search": "none"}, {}, "line_search in the grid must be a list of values, got 'none'."),
        ({"max_kl": []}, {}, "max_kl in the grid must be a list of values, got []."),
        ({"max_kl": [True]}, {}, "max_kl must be a number in (0, 1e6], got True."),
        ({"max_kll": [1]}, {}, "Config has no setting 'max_kll'; did you mean max_kl"),
        ({}, {"num_seeds": 0}, "num_seeds must be a whole number from 1 to 1,000,000, got 0."),
        ({}, {"num_episodes": 1.5}, "num_episodes must be a whole number from 0 to 1,000,000, got 1.5."),
        ({}, {"num_episodes": False}, "num_episodes must be a whole number from 0 to 1,000,000, got False."),
    ],
)
def test_a_sweep_from_python_is_checked_before_it_compiles(grid, options, sentence):
    with pytest.raises(UsageError) as error:
        sweep(Config(), grid, jax.random.key(0), **options)
    assert sentence in str(error.value)


def test_whole_settings_of_an_environment_are_drawn_whole():
    drawn = {"count": 20, "env.max_steps_in_episode": {"uniform": [100, 200]}, "env.gravity": {"uniform": [5, 20]}}
    points = make_points(make_spec({"random": drawn}))
    limits = {point.varied["env.max_steps_in_episode"] for point in points}
    assert all(type(limit) is int and 100 <= limit <= 200 for limit in limits) and len(limits) > 5
    assert all(isinstance(point.varied["env.gravity"], float) for point in points)
    assert len({point.varied["env.gravity"] for point in points}) == 20


@pytest.mark.parametrize("old", [False, True], ids=["today", "begun by an earlier version"])
def test_a_sweep_varies_what_its_preset_sets(old, tmp_path):
    small = {"num_envs": 2, "num_steps": 8, "num_iterations": 1, "hidden": [4], "gauss_newton_steps": 1}
    table = {"base": {"preset": "classic", **small}, "grid": {"max_kl": [0.001, 0.5]}, "num_episodes": 0}
    spec = make_spec(table)
    preset = load_preset("classic").settings
    assert "max_kl" not in spec.base and spec.base["cg_damping"] == preset["cg_damping"]
    assert [point.config.max_kl for point in make_points(spec)] == [np.float32(0.001), 0.5]
    if old:  # it kept the preset's value
        before = {**spec.description, "base": {**spec.base, "max_kl": preset["max_kl"]}}
        write_table(tmp_path / "sweep.json", {**before, "made_by": made_by()})
    assert run_sweep(tmp_path, spec) == "complete"
    assert make_report(tmp_path).num_agents == 2


def test_equal_points_of_an_extension_are_one():
    first = make_spec({"grid": {"gamma": [0.5, 0.5]}, "num_seeds": 2})
    more = make_spec({"random": {"count": 8, "gamma": {"choice": [0.9, 0.95]}}, "num_seeds": 2})
    points, groups = plan(more, [first])
    assert [point.config.gamma for point in points[:2]] == [0.5, 0.5] and len(points) == 4
    agents = [agent for one in groups for agent in zip(*map(list, one.agents(0, one.num_agents)), strict=True)]
    assert len(agents) == len(set(agents)) == 8
