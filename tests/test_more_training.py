"""Runs that are made longer, that start from trained networks, and that are read from Python."""

import jax
import numpy as np
import probes
import pytest

from trpo_jax import (
    Config,
    UsageError,
    continue_run,
    create_run,
    extend_run,
    load_run,
    open_run,
    save,
    warm_start,
)
from trpo_jax.cli import main
from trpo_jax.runs.metrics import read_metrics

pytestmark = pytest.mark.long

CONFIG = Config(num_envs=2, num_steps=16, num_iterations=2, cg_iterations=2, normalize_observations=True)
FLAGS = ("--num-envs", "2", "--num-steps", "16", "--cg-iterations", "2", "--normalize-observations")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two agents."""
    run = create_run(tmp_path_factory.mktemp("run") / "run", CONFIG, seed=3, num_seeds=2)
    assert continue_run(run)
    return run


def test_a_run_is_read_from_its_folder(run, tmp_path):
    config, states = load_run(run.path)
    assert settings(config) == settings(CONFIG) and states.iteration.tolist() == [2, 2]
    _, one = load_run(run.path, agent=1)
    assert probes.same_bits(one, jax.tree.map(lambda leaf: leaf[1], states))
    with pytest.raises(UsageError, match=r"agent of this run must be a whole number from 0 to 1, got 2\."):
        load_run(run.path, agent=2)
    with pytest.raises(UsageError, match="has no checkpoint yet"):
        load_run(create_run(tmp_path / "new", CONFIG, seed=0, num_seeds=1).path)


def settings(config):
    return config.replace(env=str(config.env))


def test_a_longer_run_is_the_one_that_was_begun_with_that_length(run, tmp_path, capsys):
    longer = create_run(tmp_path / "longer", CONFIG, seed=3, num_seeds=2)
    assert continue_run(longer)
    steps = 4 * CONFIG.steps_per_iteration
    assert main(["resume", str(longer.path), "--total-steps", str(steps)]) == 0
    whole = create_run(tmp_path / "whole", CONFIG.replace(num_iterations=4), seed=3, num_seeds=2)
    assert continue_run(whole)
    assert (longer.path / "metrics.csv").read_bytes() == (whole.path / "metrics.csv").read_bytes()
    assert probes.same_bits(load_run(longer.path)[1], load_run(whole.path)[1])
    # It is the longer run from now on: the same command continues it, and so does `train` with that length.
    assert main(["resume", str(longer.path), "--total-steps", str(steps)]) == 0
    train = ("train", *FLAGS, "--seed", "3", "--num-seeds", "2", "--num-iterations", "4", "--output", str(longer.path))
    assert main(list(train)) == 0
    assert "All iterations are done already." in capsys.readouterr().out
    assert extend_run(open_run(longer.path), steps).config.num_iterations == 4
    with pytest.raises(UsageError, match=r"has 128 steps per agent; --total-steps can only make a run longer\."):
        extend_run(open_run(longer.path), steps - 32)


def test_an_interrupted_extension_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("trpo_jax.runs.runner._CHUNK_SECONDS", 0)
    run = create_run(tmp_path, CONFIG, seed=3, num_seeds=1)
    assert continue_run(run)
    longer = extend_run(run, 5 * CONFIG.steps_per_iteration)
    assert not continue_run(longer, lambda progress: False)
    assert continue_run(open_run(tmp_path))
    assert read_metrics(tmp_path)["iteration"].tolist() == [1, 2, 3, 4, 5]


def test_a_run_starts_from_trained_networks(run, tmp_path, capsys):
    path = tmp_path / "tuned"
    train = ["train", *FLAGS, "--num-seeds", "2", "--num-iterations", "1", "--gamma", "0.9", "--output", str(path)]
    assert main([*train, "--init-from", str(run.path)]) == 0
    begun = open_run(path)
    _, trained = load_run(run.path)
    start = np.load(path / "checkpoints" / "start.npz")
    for name in ("policy_params", "value_params", "statistics"):
        leaves = {key: start[key] for key in start.files if f".learner.{name}" in key}
        assert len(leaves) == len(jax.tree.leaves(getattr(trained.learner, name)))
        for found, wanted in zip(leaves.values(), jax.tree.leaves(getattr(trained.learner, name)), strict=True):
            np.testing.assert_array_equal(found, wanted)
    # A run that was killed before its first checkpoint starts from the same networks.
    rows = (path / "metrics.csv").read_bytes()
    for file in (path / "metrics.csv", *path.glob("checkpoints/0*.npz")):
        file.unlink()
    assert continue_run(begun) and (path / "metrics.csv").read_bytes() == rows
    capsys.readouterr()
    assert main(train) == 2
    assert "holds a run with another init_from" in capsys.readouterr().err
    (path / "checkpoints" / "start.npz").unlink()
    assert main(["resume", str(path)]) == 0  # what is done needs it no more


def test_one_agent_is_the_start_of_many(run, tmp_path):
    _, one = load_run(run.path, agent=1)
    many = create_run(tmp_path, CONFIG, seed=7, num_seeds=3, init_from=one)
    assert continue_run(many, lambda progress: True)
    state = warm_start(CONFIG, many.keys[2], one)
    assert probes.same_bits(state.learner.policy_params, one.learner.policy_params)
    assert state.iteration == 0 and not probes.same_bits(state.actor.observation, one.actor.observation)


def test_what_does_not_fit_is_one_sentence(run, tmp_path, capsys):
    def said(*arguments):
        assert main(["train", *FLAGS, "--output", str(tmp_path / "x"), "--init-from", *arguments]) == 2
        return capsys.readouterr().err

    assert "init_from has 2 agents, but num_seeds=3; give" in said(str(run.path), "--num-seeds", "3")
    wider = said(str(run.path), "--num-seeds", "2", "--hidden", "32,32")
    assert "the policy to start from does not fit the settings: its " in wider and "float32[64]" in wider
    assert "normalize_observations=True; its networks need" in said(str(run.path), "--no-normalize-observations")
    relu = said(str(run.path), "--num-seeds", "2", "--activation", "relu")  # shapes that fit, and another function
    assert "was trained with activation=auto; its networks need that, not relu: give the same." in relu
    assert "is not the folder of a run" in said(str(tmp_path))
    assert not (tmp_path / "x").exists()


def test_a_finished_run_feeds_a_new_sink(run):
    rows = []
    assert continue_run(run, late_sinks=[lambda seed, steps, values: rows.append((seed, steps, values))])
    table = read_metrics(run.path)
    assert [row[:2] for row in rows] == list(zip(table["seed"], table["env_steps"], strict=True))
    np.testing.assert_allclose([values["mean_kl"] for *_, values in rows], table["mean_kl"], rtol=1e-6)


def test_a_state_that_was_saved_alone_is_a_start_too(run, tmp_path):
    _, one = load_run(run.path, agent=0)
    save(tmp_path / "agent.npz", one)
    config = CONFIG.replace(hidden=(32,))
    with pytest.raises(UsageError, match="the policy to start from does not fit the settings"):
        warm_start(config, jax.random.key(0), one)


def test_networks_that_would_compute_something_else_are_refused(run, tmp_path, capsys):
    pendulum = ["train", "Pendulum-v1", *FLAGS, "--num-iterations", "1", "--state-dependent-std"]
    assert main([*pendulum, "--output", str(tmp_path / "p")]) == 0
    capsys.readouterr()
    for flags in (["--initial-log-std", "-3"], ["--normalize-rewards"], ["--activation", "swish"]):
        output = str(tmp_path / "x")
        assert main([*pendulum, "--init-from", str(tmp_path / "p"), *flags, "--output", output]) == 2
        name = flags[0].removeprefix("--").replace("-", "_")
        assert f"was trained with {name}=" in capsys.readouterr().err
    assert main([*pendulum, "--init-from", str(tmp_path / "p"), "--activation", "tanh", "--output", output]) == 0


def test_networks_whose_inputs_would_mean_something_else_are_refused(tmp_path, capsys):
    train = ["train", *FLAGS, "--num-iterations", "1", "--wrappers"]
    assert main([*train, "hide_entries=0", "--output", str(tmp_path / "a")]) == 0
    start = ["--init-from", str(tmp_path / "a"), "--output", str(tmp_path / "b")]
    capsys.readouterr()
    assert main([*train, "hide_entries=3", *start]) == 2
    assert "was trained with wrappers=hide_entries=0; its networks need that, not" in capsys.readouterr().err
    assert main([*train, "limit_steps=9 hide_entries=0", *start]) == 0


def test_a_longer_run_whose_agents_have_stopped_says_so(tmp_path, capsys):
    flags = ["--num-iterations", "4", "--eval-every", "1", "--eval-episodes", "1", "--stop-at-return", "1"]
    assert main(["train", *FLAGS, *flags, "--num-seeds", "2", "--output", str(tmp_path)]) == 0
    assert main(["resume", str(tmp_path)]) == 0
    assert "All agents have reached stop_at_return=1 after 1 iteration; nothing is left" in capsys.readouterr().out
