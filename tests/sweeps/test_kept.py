"""What a sweep keeps of its trained agents, how they are taken up again, and sweeps that grow."""

import shutil

import jax
import numpy as np
import probes
import pytest

from trpo_jax import Config, UsageError, evaluate, load_agent, run_sweep, sweep, train
from trpo_jax.cli import main
from trpo_jax.sweeps.grids import Spec, make_spec
from trpo_jax.sweeps.plans import plan
from trpo_jax.sweeps.reports import make_report
from trpo_jax.sweeps.storage import Folder
from trpo_jax.training.checkpoints import save

pytestmark = pytest.mark.long

SMALL = {"num_envs": 2, "num_steps": 16, "num_iterations": 2, "cg_iterations": 2}
SPEC = Spec(base=SMALL, grid={"gamma": [0.9, 0.99]}, num_seeds=2, num_episodes=3, keep="all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished sweep whose agents are all kept."""
    path = tmp_path_factory.mktemp("sweep") / "sweep"
    assert run_sweep(path, SPEC) == "complete"
    return path


def files(path):
    """The bytes of results and trained states, and whatever checkpoints are left."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for part in ("results", "states", "checkpoints")
        for file in sorted((path / part).glob("[!.]*"))
    }


def results(path):
    return Folder(path).read_results().to_pylist()


def learner(state):
    return state.learner.policy_params, state.learner.value_params


def test_an_agent_of_a_sweep_is_the_one_that_train_trains(folder):
    config, state = load_agent(folder, point=1, seed=1)
    assert config.gamma == 0.99
    alone, _ = jax.jit(train)(Config(**SMALL, gamma=0.99), jax.random.key(1))
    assert probes.same_bits(learner(state), learner(alone))
    assert evaluate(config, state, jax.random.key(0), num_episodes=2).finished.all()


def test_without_a_name_it_is_the_best_one(folder):
    rows = results(folder)
    best = max(rows, key=lambda row: row["final_return"])
    config, state = load_agent(folder)
    named, same = load_agent(folder, best["point"], best["seed"])
    assert config == named and probes.same_bits(state, same)
    of_point = max((row for row in rows if row["point"] == 0), key=lambda row: row["final_return"])
    assert probes.same_bits(load_agent(folder, 0)[1], load_agent(folder, 0, of_point["seed"])[1])


def test_the_best_of_each_point_is_kept_and_results_stay_as_they_are(folder, tmp_path):
    spec = Spec(**{**SPEC.__dict__, "keep": "best"})
    assert run_sweep(tmp_path, spec, most_agents=2) == "complete"
    for point in (0, 1):
        assert probes.same_bits(load_agent(tmp_path, point)[1], load_agent(folder, point)[1])
    rows = results(tmp_path)
    other = min((row for row in rows if row["point"] == 0), key=lambda row: row["final_return"])
    with pytest.raises(UsageError, match="keeps only the best agent of each point, not seed"):
        load_agent(tmp_path, 0, other["seed"])
    plain = tmp_path / "none"
    assert run_sweep(plain, Spec(**{**SPEC.__dict__, "keep": "none"})) == "complete"
    assert str(results(plain)) == str(results(folder))  # NaN is not equal to itself
    with pytest.raises(UsageError, match=r"keeps no trained states; sweep with --keep best or all into another"):
        load_agent(plain)
    with pytest.raises(UsageError, match="has no finished agent of point 7"):
        load_agent(folder, 7)


class Killed(Exception):
    """Stands for a kill."""


def killed_twice(path, spec, monkeypatch, **options):
    """Start a sweep that is interrupted after its first chunk, then dies between writing states and results."""
    with monkeypatch.context() as patch:
        patch.setattr("trpo_jax.runs.runner._CHUNK_SECONDS", 0)
        assert run_sweep(path, spec, report=lambda progress: False, **options) == "interrupted"
    assert any((path / "checkpoints").glob("[!.]*.npz"))

    def die(self, block, columns):
        assert self._states_file(block).exists()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_results", die)
        with pytest.raises(Killed):
            run_sweep(path, spec)


def test_a_sweep_that_was_killed_keeps_the_same_states(folder, tmp_path, monkeypatch):
    killed_twice(tmp_path, SPEC, monkeypatch)
    with pytest.raises(UsageError, match="has no finished agent; its report lists what there is"):
        load_agent(tmp_path)
    assert run_sweep(tmp_path, SPEC) == "complete"
    assert files(tmp_path) == files(folder)


def test_a_sweep_that_was_killed_as_it_grew_is_the_one_that_grew(folder, tmp_path, monkeypatch):
    more = Spec(**{**SPEC.__dict__, "num_seeds": 3})
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    for path in (killed, alone):
        shutil.copytree(folder, path)
    assert run_sweep(alone, more, extend=True) == "complete"
    killed_twice(killed, more, monkeypatch, extend=True)
    assert run_sweep(killed, more) == "complete"  # it is that sweep already, so that it need not be extended again
    assert files(killed) == files(alone)
    assert files(folder).items() <= files(killed).items()
    _, third = load_agent(killed, point=1, seed=2)
    assert probes.same_bits(learner(third), learner(load_agent(alone, point=1, seed=2)[1]))


def test_states_that_are_damaged_or_missing_are_trained_anew(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    whole = files(folder)
    states = [tmp_path / name for name in whole if name.startswith("states/")]

    def damage(file):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 255
        file.write_bytes(data)

    for spoil in (damage, lambda file: file.unlink()):
        for file in states:
            spoil(file)
        with pytest.raises(UsageError, match=r"npz is missing or damaged; run the command of the sweep again"):
            load_agent(tmp_path)
        assert run_sweep(tmp_path, SPEC) == "complete"
        assert f"{states[0]} is missing or damaged. Its agents are trained again." in capsys.readouterr().err
        assert files(tmp_path) == whole


def test_states_under_the_name_of_others_are_one_sentence_and_stay(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (file,) = (tmp_path / "states").glob("*.npz")
    save(file, {"a": np.zeros(2)}, note={"of": "another sweep or block"})
    swapped = files(tmp_path)
    for use in (lambda: run_sweep(tmp_path, SPEC), lambda: load_agent(tmp_path, point=0, seed=0)):
        with pytest.raises(UsageError, match=r"npz holds other agents than it should; restore it"):
            use()
    assert files(tmp_path) == swapped


def test_in_memory_states_are_those_in_the_folder(folder):
    config = Config(**SMALL)
    all_of_them = sweep(config, {"gamma": [0.9, 0.99]}, jax.random.key(0), num_seeds=2, num_episodes=3, keep="all")
    assert [jax.tree.leaves(state)[0].shape for state in all_of_them.states] == [(2,), (2,)]
    best = sweep(config, {"gamma": [0.9, 0.99]}, jax.random.key(0), num_seeds=2, num_episodes=3, keep="best")
    for point, seed in enumerate(np.argmax(best.final_return, axis=1)):
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], all_of_them.states[point])
        assert probes.same_bits(best.states[point], one)
    assert sweep(config, {"gamma": [0.9]}, jax.random.key(0), num_episodes=0).states == []
    with pytest.raises(UsageError, match=r"keep must be none, best, all, got 'some'\."):
        sweep(config, {"gamma": [0.9]}, jax.random.key(0), keep="some")


def test_commands_take_an_agent_of_a_sweep(folder, tmp_path, capsys):
    assert main(["evaluate", str(folder), "--point", "1", "--agent", "0", "--num-episodes", "2"]) == 0
    assert f"Point 1, seed 0 of {folder}." in capsys.readouterr().out
    assert main(["export", str(folder), "--output", str(tmp_path / "policy")]) == 0
    assert main(["play", str(folder), "--num-episodes", "1"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--checkpoint", "best"]) == 2
    assert "--checkpoint is for runs" in capsys.readouterr().err
    assert main(["evaluate", str(folder), "--point", "0", "--agent", "7"]) == 2
    assert "has no finished agent of point 0 and seed 7; its report" in capsys.readouterr().err


def test_a_sweep_takes_new_values_and_more_seeds(folder, tmp_path, capsys):
    first = Spec(base=SMALL, grid={"gamma": [0.9, 0.99]}, num_seeds=2, num_episodes=3)
    more = Spec(base=SMALL, grid={"gamma": [0.99, 0.95], "cg_damping": [0.1]}, num_seeds=3, num_episodes=3)
    path = tmp_path / "grown"
    assert run_sweep(path, first) == "complete"
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.glob("results/*")}
    with pytest.raises(UsageError, match=r"holds a sweep with another .*; .* or add the new agents with --extend\."):
        run_sweep(path, more)
    with pytest.raises(UsageError, match=r"holds a sweep with num_episodes=3, which all of its agents share"):
        run_sweep(path, Spec(**{**more.__dict__, "num_episodes": 4}), extend=True)
    assert run_sweep(path, more, extend=True) == "complete"
    for name, (content, time) in before.items():
        assert (path / "results" / name).read_bytes() == content
        assert (path / "results" / name).stat().st_mtime_ns == time
    found = {(row["gamma"], row["seed"]): row["final_return"] for row in results(path)}
    agents = [(gamma, seed) for gamma, seeds in ((0.9, 2), (0.95, 3), (0.99, 3)) for seed in range(seeds)]
    assert sorted(found) == agents
    whole = tmp_path / "whole"
    assert run_sweep(whole, more) == "complete"
    for row in results(whole):
        assert found[row["gamma"], row["seed"]] == row["final_return"]
    # It is the larger sweep from now on, and can grow once more.
    assert run_sweep(path, more) == "complete"
    assert run_sweep(path, Spec(**{**more.__dict__, "num_seeds": 4}), extend=True) == "complete"
    report = make_report(path)
    assert report.num_agents == report.num_asked == 2 + 4 + 4


def test_agents_keep_their_places_as_a_sweep_grows():
    first = make_spec({"base": SMALL, "grid": {"gamma": [0.9, 0.9, 0.99]}, "num_seeds": 2})
    more = make_spec({"base": SMALL, "grid": {"gamma": [0.95, 0.99], "fisher_fraction": [0.1, 0.5]}, "num_seeds": 3})
    alone, (group,) = plan(first)
    points, groups = plan(more, [first])
    assert [point.config for point in points[:3]] == [point.config for point in alone]
    assert groups[0].points == group.points and groups[0].configs == group.configs
    agents = [
        (point, seed) for one in groups for point, seed in zip(*map(list, one.agents(0, one.num_agents)), strict=True)
    ]
    assert len(agents) == len(set(agents)) == 6 + 1 + 3 * 3
