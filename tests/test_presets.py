"""Presets: each is sound, each published row names its own, and the command line and files take them."""

import json
from pathlib import Path

import pytest

from experiments.results.run import table
from trpo_jax import Config, UsageError, load_preset, validate
from trpo_jax.cli import main
from trpo_jax.cli.arguments import make_parser
from trpo_jax.cli.choices import settings_in_file
from trpo_jax.presets import available_presets, preset_of
from trpo_jax.settings import with_length
from trpo_jax.sweeps.grids import make_spec

RESULTS = sorted((Path(__file__).parents[1] / "experiments" / "results").glob("*.json"))


@pytest.mark.parametrize("name", available_presets())
def test_a_preset_is_a_sound_configuration_of_each_of_its_tasks(name):
    preset = load_preset(name)
    assert preset.tasks and preset.about.endswith(".")
    for env in preset.tasks:
        config = with_length(preset.settings_for(env), Config(env=env))
        validate(config)
        assert 0 <= preset.tasks[env] - config.num_iterations * config.steps_per_iteration < config.steps_per_iteration


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_a_published_row_was_run_with_the_preset_that_it_names(file):
    record = json.loads(file.read_text())
    for row in record["tasks"]:
        preset = load_preset(row["preset"])
        assert preset.settings == record["settings"][row["method"]]
        if row["name"] in preset.tasks:  # an environment of the experiment's own cannot be named
            config = with_length(preset.settings_for(row["name"]), Config(env=row["name"]))
            assert config.num_iterations * config.steps_per_iteration == row["env_steps"]


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_the_page_of_results_has_every_row_as_it_was_measured(file):
    page = (file.parent / "README.md").read_text().splitlines()
    assert [row for row in table(json.loads(file.read_text())).splitlines() if row not in page] == []


@pytest.mark.parametrize("method", ["", "-ppo"])
def test_swimmer_differs_in_its_horizon_alone(method):
    longer = {"gamma": 0.9999, "gae_lambda": 0.99, "num_envs": 2, "num_steps": 1024}
    assert load_preset(f"mujoco-swimmer{method}").settings == {**load_preset(f"mujoco{method}").settings, **longer}


def test_a_preset_comes_first_then_the_file_then_the_flags(tmp_path):
    file, out = tmp_path / "own.toml", tmp_path / "out"
    file.write_text("max_kl = 0.5\ncg_damping = 0.25\nnum_iterations = 3\n")
    arguments = ["train", "Pendulum-v1", "--preset", "--config", str(file), "--output", str(out)]
    assert main([*arguments, "--max-kl", "0.125", "--total-steps", "1600"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert {**load_preset("classic").settings, "cg_damping": 0.25, "max_kl": 0.125}.items() <= config.items()
    assert config["num_iterations"] == 1


def test_the_length_is_that_of_the_table_unless_it_is_set_elsewhere():
    assert make_spec({"base": {"preset": "classic"}}).base["total_steps"] == 100_000
    assert make_spec({"base": {"preset": "classic", "env": "MountainCarContinuous-v0"}}).base["total_steps"] == 50_000
    for elsewhere in ({"num_iterations": [2]}, {"total_steps": [5000]}, {"env": ["Acrobot-v1"]}):
        assert "total_steps" not in make_spec({"base": {"preset": "classic"}, "grid": elsewhere}).base
    assert make_spec({"base": {"preset": "classic", "reuse": 3}}).base["reuse"] == 3


def test_the_length_of_a_preset_in_a_file_is_that_of_the_environment_of_the_command_line(tmp_path):
    file = tmp_path / "mine.toml"
    for text in ('preset = "classic"', 'preset = "classic"\nenv = "CartPole-v1"'):
        file.write_text(text)
        namespace = make_parser().parse_args(["train", "MountainCarContinuous-v0", "--config", str(file)])
        settings = settings_in_file(namespace)
        assert settings["total_steps"] == load_preset("classic").tasks["MountainCarContinuous-v0"]
        assert settings["total_steps"] != load_preset("classic").tasks["CartPole-v1"]


def test_the_first_table_that_names_an_environment_is_its_preset():
    assert preset_of("CartPole-v1").name == "classic" and preset_of("Seaquest-MinAtar").name == "minatar-cnn"
    assert preset_of("FrozenLake-misc").name == "gymnax"


@pytest.mark.parametrize("wrong", ["clasic", "", "../classic", 3, None, ["classic"]])
def test_an_unknown_preset_is_one_sentence(wrong):
    with pytest.raises(UsageError, match=r"there is no preset .*`trpo-jax presets` lists them"):
        load_preset(wrong)
    if wrong is not None:
        with pytest.raises(UsageError, match="there is no preset"):
            make_spec({"base": {"preset": wrong}})


def test_what_has_no_preset_is_one_sentence(capsys, tmp_path):
    out = str(tmp_path / "out")
    assert main(["train", "gymnasium/Nowhere-v0", "--preset", "--output", out]) == 2
    assert "no preset has 'gymnasium/Nowhere-v0'" in capsys.readouterr().err
    assert main(["train", "--preset", "clasic", "--output", out]) == 2
    assert "there is no preset 'clasic'; did you mean classic or classic-ppo?" in capsys.readouterr().err
    assert not Path(out).exists()


def test_presets_are_listed(capsys):
    assert main(["presets"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in available_presets()) and "max_kl=0.02" in printed


def test_presets_of_trpo_come_first():
    of_trpo = [load_preset(name).settings.get("update", "trpo") == "trpo" for name in available_presets()]
    assert of_trpo == sorted(of_trpo, reverse=True) and not all(of_trpo)
