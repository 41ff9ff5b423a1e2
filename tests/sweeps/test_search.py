"""Searching: trials share a program, the worse half stops early, a killed search goes on, the best settings train."""

import re
import sys
import tomllib

import jax
import numpy as np
import optuna
import pytest

from trpo_jax import UsageError
from trpo_jax.cli import main
from trpo_jax.sweeps import search
from trpo_jax.sweeps.grids import TUNING_SEEDS, make_spec
from trpo_jax.sweeps.search import tune

BASE = {"num_envs": 2, "num_steps": 64, "num_iterations": 8, "cg_iterations": 2, "value_cg_iterations": 2}
SPACE = {"max_kl": {"log_uniform": [1e-3, 1e-1]}, "gamma": {"uniform": [0.9, 1.0]}}


def make(count=8, **changes):
    return make_spec({"base": BASE, "random": {"count": count, **SPACE}, "num_seeds": 2, "num_episodes": 1, **changes})


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    reports, seeds = [], []
    compiled = search.fit_programs

    def compile_and_watch(*arguments):
        programs = compiled(*arguments)

        def start(configs, keys):
            seeds.append(np.asarray(jax.random.key_data(keys)))
            return programs.start(configs, keys)

        return programs._replace(start=start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "fit_programs", compile_and_watch)
        file, best = tune(folder, make(), batch=8, report=reports.append)
    return folder, file, best, reports, seeds


def trials(folder):
    (study,) = optuna.get_all_study_summaries(f"sqlite:///{folder / 'study.db'}")
    return optuna.load_study(study_name=study.study_name, storage=f"sqlite:///{folder / 'study.db'}").trials


def test_worse_half_stops_at_each_stage(searched):
    folder, _, best, reports, _ = searched
    found = trials(folder)
    stages = sorted(max(trial.intermediate_values) for trial in found)
    assert stages == [2] * 4 + [4] * 2 + [8] * 2  # a quarter, a half, all of 8 iterations
    at_first = {trial.number: trial.intermediate_values[2] for trial in found}
    stopped = [trial.number for trial in found if max(trial.intermediate_values) == 2]
    assert max(at_first[n] for n in stopped) <= min(at_first[n] for n in at_first if n not in stopped)
    complete = [trial for trial in found if trial.state == optuna.trial.TrialState.COMPLETE]
    assert len(complete) == 2 and best == max(trial.value for trial in complete)
    assert [(r.told, r.pruned, r.best) for r in reports] == [(8, 6, best)]


@pytest.mark.parametrize("num_iterations, expected", [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4])])
def test_no_iteration_ranks_the_trials_twice(num_iterations, expected):
    shares = search._distinct_rungs(num_iterations)
    assert [search._end(share, num_iterations) for share in shares] == expected and shares[-1] == 1


def test_seeds_of_tuning_are_nobody_elses(searched):
    *_, seeds = searched
    mine = {tuple(key) for keys in seeds for key in keys}
    assert mine == {tuple(np.asarray(jax.random.key_data(jax.random.key(TUNING_SEEDS + i)))) for i in range(2)}


def test_search_goes_on_where_it_stopped(searched):
    folder, _, best, *_ = searched
    study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}")
    study.ask()  # as of a process that was killed while it trained
    reports = []
    _, again = tune(folder, make(count=12), batch=4, report=reports.append)
    assert [r.told for r in reports] == [12] and again >= best
    states = [trial.state.name for trial in trials(folder)]
    assert states.count("FAIL") == 1 and len(states) == 13
    with pytest.raises(UsageError, match="holds a search with another num_seeds"):
        tune(folder, make(num_seeds=3), batch=4)


def test_best_settings_train(searched, tmp_path, capsys):
    _, file, *_ = searched
    best = tomllib.loads(file.read_text())
    assert best["num_envs"] == 2 and 0.001 <= best["max_kl"] <= 0.1 and 0.9 <= best["gamma"] <= 1
    assert main(["train", "--config", str(file), "--num-iterations", "2", "--output", str(tmp_path / "run")]) == 0
    import json

    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["max_kl"] == best["max_kl"] and config["num_iterations"] == 2


def test_command_line(tmp_path, python):
    lines = ["num_seeds = 2", "[base]", *(f"{name} = {value}" for name, value in BASE.items())]
    lines += ["[random]", "count = 99", "max_kl = { log_uniform = [0.001, 0.1] }"]
    (tmp_path / "space.toml").write_text("\n".join(lines))
    arguments = ("-m", "trpo_jax.cli", "tune", "space.toml", "--num-trials", "4", "--batch", "4")
    result = python(*arguments, cwd=tmp_path, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "4 of 4 trials, 3 of the last batch stopped early" in result.stdout
    assert "trpo-jax train --config searches/space/best.toml" in re.sub(r"\s+", " ", result.stdout)
    assert sorted(entry.name for entry in (tmp_path / "searches" / "space").iterdir()) == ["best.toml", "study.db"]


def test_missing_optuna_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"tune needs Optuna; install it with `pip install 'trpo_jax\[tune\]'`."):
        tune(tmp_path / "new", make())
    assert not (tmp_path / "new").exists()


def test_storage_that_cannot_be_opened_is_one_sentence(tmp_path):
    (tmp_path / "study.db").write_text("not a database, but long enough to look like one to a careless reader")
    with pytest.raises(UsageError, match="cannot be opened"):
        tune(tmp_path, make())
