"""Settings of the environment and the time limit, as settings of a run: traced or static, kept, and refused."""

import dataclasses
import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest

from trpo_jax import Config, UsageError, evaluate, init, load_agent, make_environment, sweep, train, trust
from trpo_jax.cli import main
from trpo_jax.environments.make import mark_traced
from trpo_jax.runs.folders import open_run
from trpo_jax.settings import settings_of, trusting
from trpo_jax.sweeps.grids import make_points, make_spec, static_part
from trpo_jax.sweeps.plans import group_by_program
from trpo_jax.sweeps.reports import make_report
from trpo_jax.training.agents import make_agent

TINY = {"num_steps": 4, "num_iterations": 1, "cg_iterations": 1, "value_cg_iterations": 1}


def leaf_names(config):
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(config)}


def test_floats_are_leaves_and_the_rest_is_static():
    config = Config(env_args={"gravity": 20.0, "max_steps_in_episode": 30, "flag": True, "word": "x"})
    assert leaf_names(config) - leaf_names(Config()) == {".env_args.gravity"}
    again = jax.tree.unflatten(*reversed(jax.tree.flatten(config)))
    assert again.env_args == config.env_args and again.env_args.traced == ("gravity",)
    for change in ({"max_steps_in_episode": 31}, {"flag": 1}, {"other": 1.0}):
        assert static_part(config) != static_part(config.replace(env_args={**config.env_args, **change}))
    assert static_part(config) == static_part(config.replace(env_args={**config.env_args, "gravity": 1.0}))
    assert hash(config) == hash(config.replace()) and config.replace(env_args={}) == Config()


def test_axes_and_placeholders_keep_the_structure():
    config = Config(env_args={"gravity": 20.0, "limit": 3})
    mapped = jax.tree_util.tree_map_with_path(lambda path, leaf: 0 if "gravity" in str(path) else None, config)
    axes = jax.tree.map(lambda leaf: 1, config)
    assert jax.tree.structure(axes) == jax.tree.structure(config)
    stacked = config.replace(env_args={"gravity": jnp.array([20.0, 40.0]), "limit": 3})
    np.testing.assert_array_equal(jax.vmap(lambda c: c.env_args["gravity"], in_axes=(mapped,))(stacked), [20, 40])


def test_settings_of_another_suite_are_static():
    assert leaf_names(Config(env="brax/hopper", env_args={"x": 2.0})) == leaf_names(Config())
    with pytest.raises(UsageError, match=r"^env\.x of brax/hopper must be one number, truth value or word, got"):
        Config(env="brax/hopper", env_args={"x": jnp.ones(2)})


@pytest.mark.parametrize(
    "env, name, num_envs",
    [
        pytest.param("CartPole-v1", "gravity", 32, marks=pytest.mark.long),
        ("Pendulum-v1", "g", 4),
        pytest.param("CartPole-v1", "gravity", 4, marks=pytest.mark.slow),
        pytest.param("Pendulum-v1", "g", 32, marks=pytest.mark.slow),
        pytest.param("Pendulum-v1", "g", 64, marks=pytest.mark.slow),
    ],
)
def test_many_values_are_one_program_with_the_results_of_each_alone(env, name, num_envs):
    """At 32 environments and more the agents take turns on a CPU."""
    config = Config(env=env, num_envs=num_envs, **TINY)
    traces = []

    def run(value, key):
        traces.append(1)
        return train(config.replace(env_args={name: value}), key)[0].actor.observation

    values, key = jnp.array([5.0, 10.0, 20.0]), jax.random.key(0)
    together = jax.jit(jax.vmap(run, (0, None)))(values, key)
    assert len(traces) == 1
    one = jax.jit(train)
    for value, observation in zip(values, together, strict=True):
        alone = one(config.replace(env_args={name: float(value)}), key)[0].actor.observation
        np.testing.assert_allclose(observation, alone, rtol=1e-4, atol=1e-5)
    assert not np.allclose(together[0], together[2])


def test_no_tracer_outlives_its_trace():
    config = Config(num_envs=2, **TINY)
    jax.jit(lambda g: init(config.replace(env_args={"gravity": g}), jax.random.key(0)).actor.observation)(20.0)
    environment = make_agent(config.replace(env_args={"gravity": 20.0})).environment
    _, state = environment.reset(jax.random.key(0))
    assert np.isfinite(environment.step(jax.random.key(0), state, jnp.int32(0)).observation).all()
    limited = config.replace(env_args={"max_steps_in_episode": 7})
    assert make_agent(limited).environment is make_agent(limited).environment  # static: built once
    assert make_agent(limited).environment.max_steps == 7
    assert make_agent(config).environment is make_environment("CartPole-v1")


def test_the_environment_is_the_one_with_these_parameters():
    """And evaluation acts in it."""
    config = Config(num_envs=2, env_args={"gravity": 20.0, "force_mag": 1e3}, max_steps=9, **TINY)
    environment, whole = make_agent(config).environment, make_environment("CartPole-v1", params=config.env_args)
    _, state = whole.reset(jax.random.key(0))
    expected = whole.step(jax.random.key(0), state, jnp.int32(1)).observation
    (state, _), key = environment.reset(jax.random.key(0))[1], jax.random.key(0)
    np.testing.assert_array_equal(environment.step(key, (state, 0), jnp.int32(1)).observation, expected)
    assert environment.max_steps == 9
    lengths = evaluate(config, init(config, key), key, num_episodes=4).episode_length
    assert lengths.max() <= 9 and lengths.min() < 9  # such a force soon topples the pole


def test_a_whole_number_for_a_float_is_traced_in_a_sweep_and_what_bounds_actions_never_is():
    base = {"env": "Pendulum-v1", "env.max_torque": 1}
    points = make_points(make_spec({"base": base, "grid": {"env.g": list(range(1, 65))}}))
    assert len(points) == 64 and len(group_by_program(points)) == 1
    assert points[0].config.env_args == {"g": 1.0, "max_torque": 1} and points[0].config.env_args.traced == ("g",)
    assert make_agent(points[0].config).environment.action_space.high == 1
    with pytest.raises(UsageError, match=r"^action bounds of Pendulum-v1 depend on a traced parameter"):
        jax.jit(lambda c: init(c, jax.random.key(0)))(Config(env="Pendulum-v1", env_args={"max_torque": 1.0}))


@pytest.mark.parametrize("key", ["env.g", "env"])
def test_a_table_a_dotted_key_and_a_quoted_one_are_one(key):
    def table(value):
        return {"env.g": value} if key == "env.g" else {"env": {"g": value}}

    spec = make_spec({"base": table(5), "random": {"count": 2, "env": {"m": {"uniform": [1, 2]}}}})
    assert spec.base == {"env.g": 5} and spec.random["env.m"] == {"uniform": [1, 2]}
    assert make_spec({"random": {"count": 1, "env": {"choice": ["CartPole-v1"]}}}).random["env"] == {
        "choice": ["CartPole-v1"]
    }


WRONG = {
    "unknown": ({"gravty": 1.0}, r"^CartPole-v1 has no parameter 'gravty'; did you mean gravity\?$"),
    "whole": (
        {"max_steps_in_episode": 2.5},
        r"^parameter max_steps_in_episode of CartPole-v1 must be like 500, got 2\.5",
    ),
    "no step": (
        {"max_steps_in_episode": -1},
        r"^max_steps_in_episode of CartPole-v1 must be a whole number from 1 to 2,147,483,647, got -1\.$",
    ),
    "truth": ({"gravity": True}, r"^parameter gravity of CartPole-v1 must be like 9\.8, got True\.$"),
    "word": ({"gravity": "high"}, r"^parameter gravity of CartPole-v1 must be like 9\.8, got 'high'\.$"),
    "nan": ({"gravity": float("nan")}, r"^env\.gravity must lie in \[-3e38, 3e38\], got nan\.$"),
    "list": ({"gravity": [1.0]}, r"^env\.gravity must be one number, truth value or word, got \[1\.0\]\.$"),
    "large": ({"x": 2**40}, r"^env\.x must be a whole number from -2,147,483,648 to"),
    "name": ({"a b": 1}, r"^'env\.a b' must be env\.NAME"),
    "no mapping": (3, r"^env_args must map names of an environment's settings to values, got 3\.$"),
    "several": (
        {"gravity": jnp.ones(2)},
        r"^env\.gravity must be one number for one agent, got an array of shape \(2,\)",
    ),
}


@pytest.mark.parametrize("args, message", WRONG.values(), ids=WRONG.keys())
def test_wrong_settings_are_refused_in_one_sentence(args, message):
    with pytest.raises(UsageError, match=message):
        make_agent(Config(env_args=args))


def test_an_environment_that_is_made_takes_none():
    for change in ({"env_args": {"gravity": 1.0}}, {"max_steps": 3}):
        with pytest.raises(
            UsageError, match=r"is an Environment already; set a time limit with limit_steps, params where"
        ):
            make_agent(Config(env=make_environment("CartPole-v1"), **change))


def test_an_object_without_parameters_takes_none():
    with pytest.raises(UsageError, match="TwoSteps takes no settings"):
        make_agent(Config(env=probes.TwoSteps(), env_args={"gravity": 1.0}))


def test_a_run_keeps_them(tmp_path, capsys):
    tiny = [f"--{name.replace('_', '-')}={value}" for name, value in ({"num_envs": 2} | TINY).items()]
    (tmp_path / "file.toml").write_text("[env]\ngravity = 20\nforce_mag = 5.0\n")
    run, given = str(tmp_path / "run"), ["--config", str(tmp_path / "file.toml"), "--env-arg", "force_mag=1e3"]
    assert main(["train", *tiny, *given, "--max-steps", "9", "--output", run]) == 0
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (described["env.gravity"], described["env.force_mag"], described["max_steps"]) == (20.0, 1000.0, 9)
    config = open_run(run).config
    assert config.env_args == {"force_mag": 1e3, "gravity": 20.0} and len(config.env_args.traced) == 2
    assert main(["resume", run]) == main(["evaluate", run, "--num-episodes", "2"]) == main(["export", run]) == 0
    assert main(["train", *tiny, *given, "--output", run]) == 2
    assert "another max_steps" in capsys.readouterr().err
    assert main(["play", run, "--num-episodes", "1"]) == 2  # Gymnasium's CartPole has no such settings
    assert "cannot be made with force_mag, gravity as in training" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["gravity", "=3", "a b=3"])
def test_a_flag_that_is_no_name_and_value_is_refused(given, capsys):
    assert main(["train", "--env-arg", given]) == 2
    assert "is not NAME=VALUE, such as gravity=20" in capsys.readouterr().err


def test_a_sweep_varies_them_and_its_report_names_them(tmp_path):
    file = tmp_path / "sweep.toml"
    base = "\n".join(f"{name} = {value}" for name, value in ({"num_envs": 2} | TINY).items())
    file.write_text(f'num_episodes = 0\n[base]\n{base}\nenv = "Pendulum-v1"\n[grid]\n"env.g" = [5, 10.5]\n')
    assert main(["sweep", str(file), "--output", str(tmp_path / "out"), "--num-devices", "1"]) == 0
    rows = make_report(tmp_path / "out").rows["Pendulum-v1"]
    assert {row.settings["env.g"] for row in rows} == {5.0, 10.5}


def test_a_sweep_in_memory_varies_them():
    config = Config(env="Pendulum-v1", num_envs=2, env_args={"m": 2.0}, **TINY)
    found = sweep(config, {"env.g": [5, 20]}, jax.random.key(0), num_episodes=1)
    assert found.points == [{"env.g": 5}, {"env.g": 20}]
    one = dataclasses.replace(config, env_args={"m": 2.0, "g": 20.0})
    expected = train(one, jax.random.split(jax.random.key(0), 1)[0])[1].value_loss
    np.testing.assert_allclose(found.metrics.value_loss[1, 0], expected, rtol=1e-4)


def test_they_are_named_one_by_one_in_files():
    config = mark_traced(Config(env_args={"gravity": 20, "max_steps_in_episode": 3}))
    named = {name: value for name, value in settings_of(config).items() if "." in name}
    assert named == {"env.gravity": 20.0, "env.max_steps_in_episode": 3}
    assert mark_traced(config) == config and config.env_args.traced == ("gravity",)


FACTORY = """
import probes
from trpo_jax import make_environment

def make_env(gravity=9.8):
    return make_environment("CartPole-v1", params={"gravity": gravity})

def make_other():
    return make_environment("CartPole-v1")

def make_object():
    return probes.TwoSteps()

def fail():
    raise ValueError("no")
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user's in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_environments.py").write_text(FACTORY)
    with trusting():  # what a test trusts is forgotten
        yield


def test_a_file_causes_no_import_until_its_environment_is_trusted(own_module, capsys):
    name = "own_environments:make_env"
    tiny = [f"--{key.replace('_', '-')}={value}" for key, value in ({"num_envs": 2} | TINY).items()]
    assert main(["train", name, *tiny, "--env-arg", "gravity=20.0", "--max-steps", "5", "--output", "run"]) == 0
    assert main(["evaluate", "run"]) == 2
    assert f"if you trust it, name it again: --trust {name}" in capsys.readouterr().err
    assert main(["evaluate", "run", "--trust", name, "--num-episodes", "1"]) == main(["check", name]) == 0
    assert main(["evaluate", "run", "--env", name, "--num-episodes", "1"]) == 0  # as earlier versions named it
    assert open_run("run", name).config.env_args == {"gravity": 20.0}
    drawn = {"count": 1, "env": {"choice": [name]}}
    for section in ({"base": {"env": name}}, {"grid": {"env": [name]}}, {"random": drawn}):
        with pytest.raises(UsageError, match="names a module to import"):
            make_spec(section)
        with trusting(name):
            assert make_spec(section)
    assert main(["train", "CartPole-v1", "--init-from", "run", "--output", "other"]) == 2
    assert main(["train", name, *tiny, "--init-from", "run", "--output", "other"]) == 0
    other = "own_environments:make_other"
    assert main(["train", other, *tiny, "--init-from", "run", "--output", "third"]) == 2
    assert main(["train", other, *tiny, "--init-from", "run", "--output", "third", "--trust", name]) == 0
    assert main(["play", "third", "--env", "CartPole-v1"]) == 2 and f"--trust {other}" in capsys.readouterr().err
    played = ["play", "third", "--env", "CartPole-v1", "--num-episodes", "1", "--trust", other]
    assert main(played) == 0 and "CartPole-v1 of Gymnasium, 1 episode" in capsys.readouterr().out
    assert main(["evaluate", "run", "--trust", "CartPole-v1"]) == 2
    assert "--trust is for an environment that names a module" in capsys.readouterr().err
    assert make_agent(Config(env="own_environments:make_object")).environment.name == "TwoSteps"


def test_a_factory_is_swept_and_tuned_once_it_is_trusted(own_module, tmp_path, capsys):
    name = "own_environments:make_env"
    base = "".join(f"{setting} = {value}\n" for setting, value in ({"num_envs": 2, "max_steps": 2} | TINY).items())
    base = f"[base]\nenv = '{name}'\n{base}"
    grid = "[grid]\n'env.gravity' = [9.0, 12.0]\n"
    (tmp_path / "s.toml").write_text(f"keep = 'all'\nnum_episodes = 1\n{base}{grid}")
    assert main(["sweep", "s.toml"]) == 2 and f"--trust {name}" in capsys.readouterr().err
    assert not (tmp_path / "sweeps").exists()
    assert main(["sweep", "s.toml", "--trust", name]) == main(["report", "sweeps/s"]) == 0
    compare = ["compare", "sweeps/s", "--by", "env.gravity"]
    assert main(compare) == 0
    (tmp_path / "s.toml").write_text(f"keep = 'all'\nnum_episodes = 1\nnum_seeds = 2\n{base}{grid}")
    assert main(["sweep", "s.toml", "--trust", name, "--extend"]) == 0
    commands = ["evaluate", "sweeps/s", "--num-episodes", "1"], ["report", "sweeps/s"], compare
    for command in (*commands, ["sweep", "s.toml"]):  # they make the agents of the earlier forms
        assert main(command) == 2 and f"--trust {name}" in capsys.readouterr().err
        assert main([*command, "--trust", name]) == 0
    trust(name)
    with trusting():  # what a block trusts ends with it, and only that
        assert load_agent("sweeps/s")[0].env == name
    (tmp_path / "t.toml").write_text(f"{base}[random]\ncount = 2\nmax_kl = {{uniform = [0.01, 0.02]}}\n")
    assert main(["tune", "t.toml", "--batch", "2", "--trust", name]) == 0
    *_, again = [line for line in " ".join(capsys.readouterr().out.split()).split("`") if "--config" in line]
    assert again.endswith(f"--trust {name}") and main(shlex.split(again)[1:]) == 0


@pytest.mark.parametrize(
    "name, message",
    [
        ("own_environments:make_en", r"^own_environments has no function make_en; did you mean make_env"),
        ("own_environments:fail", r"^own_environments:fail fails \(ValueError: no, own_environments\.py"),
        ("nothing_here:make_env", r"^import of nothing_here fails \(ModuleNotFoundError"),
        (":", r"^env must be MODULE:FACTORY to name a function that makes it, got ':'\.$"),
    ],
)
def test_a_factory_that_cannot_be_used_is_one_sentence(own_module, name, message):
    with pytest.raises(UsageError, match=message):
        make_environment(name)
