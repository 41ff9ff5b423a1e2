"""Searching: trials share a program, the worse half stops early, a killed search goes on, the best settings train."""

import contextlib
import functools
import json
import os
import random
import re
import shutil
import sqlite3
import sys
import tomllib
import weakref
from pathlib import Path

import jax
import numpy as np
import optuna
import pytest
from scipy import stats
from sqlalchemy.pool import StaticPool
from test_damage import DAMAGES

from trpo_jax import UsageError, load_run
from trpo_jax.cli import main
from trpo_jax.files import locked
from trpo_jax.runs.folders import extend_run, open_run
from trpo_jax.runs.metrics import METRICS
from trpo_jax.settings import checked_settings, read_toml, settings_of
from trpo_jax.sweeps import halving, search, studies
from trpo_jax.sweeps.cohorts import Snapshot
from trpo_jax.sweeps.grids import TUNING_SEEDS, make_spec
from trpo_jax.sweeps.search import train_best, tune
from trpo_jax.sweeps.search_pages import importance, write_search_page

BASE = {"num_envs": 2, "num_steps": 64, "num_iterations": 8, "cg_iterations": 2, "value_cg_iterations": 2}
SPACE = {"max_kl": {"log_uniform": [1e-3, 1e-1]}, "gamma": {"uniform": [0.9, 1.0]}}


def make(count=8, **changes):
    return make_spec({"base": BASE, "random": {"count": count, **SPACE}, "num_seeds": 2, "num_episodes": 1, **changes})


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    reports, seeds = [], []
    compiled = halving.fit_programs

    def compile_and_watch(*arguments):
        made = compiled(*arguments)

        def start(configs, keys):
            seeds.append(np.asarray(jax.random.key_data(keys)))
            return made.start(configs, keys)

        return made._replace(start=start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halving, "fit_programs", compile_and_watch)
        file, best = tune(folder, make(), batch=8, report=reports.append)
    return folder, file, best, reports, seeds


@pytest.mark.long
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
    assert [(r.finished, r.pruned, r.best) for r in reports] == [(8, 6, best)]


@pytest.mark.parametrize("num_iterations, expected", [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4])])
def test_no_iteration_ranks_the_trials_twice(num_iterations, expected):
    shares = halving._distinct_rungs(num_iterations)
    assert [halving._end(share, num_iterations) for share in shares] == expected and shares[-1] == 1


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
    assert [r.finished for r in reports] == [12] and again >= best
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


def test_the_run_of_the_best_settings_is_never_removed(tmp_path, monkeypatch):
    """One that a user has made longer stays, and one of other settings moves aside, unless a process is using it."""
    trained = []
    finished = lambda run, **how: trained.append(run.config.num_iterations) or True  # noqa: E731
    monkeypatch.setattr(search, "continue_run", finished)
    monkeypatch.setattr(search, "plot_learning_curve", lambda run: None)
    file, spec, mark = tmp_path / "best.toml", make(), tmp_path / "best" / "metrics.csv"
    settings = "".join(f"{name} = {value}\n" for name, value in BASE.items())
    file.write_text(settings)
    assert train_best(file, spec) == tmp_path / "best"
    mark.write_text("rows")
    longer = extend_run(open_run(tmp_path / "best"), 2 * 8 * 128)
    assert train_best(file, spec) == tmp_path / "best" and trained == [8, 16] and mark.read_text() == "rows"
    assert open_run(tmp_path / "best").config == longer.config
    for i in (1, 2):
        file.write_text(settings + f"max_kl = 0.0{i}1\n")
        with locked(tmp_path / "best", "checkpoints"), pytest.raises(UsageError, match="another process is using"):
            train_best(file, spec)
        assert train_best(file, spec) == tmp_path / "best"
        assert open_run(tmp_path / "best").config.max_kl == float(f"0.0{i}1") and trained[-1] == 8
    assert (tmp_path / "best-1" / "metrics.csv").read_text() == "rows" and not mark.exists()
    assert sorted(os.listdir(tmp_path)) == ["best", "best-1", "best-2", "best.toml"]
    assert os.listdir(tmp_path / "best-2") == ["config.json"]


def test_importance_is_the_share_that_groups_explain():
    rng = np.random.default_rng(0)
    values = rng.permutation(np.arange(40.0))
    groups = np.ceil((values + 1) / 10).astype(int)
    # Ranks that the quarters decide alone: between them lies all but what is left inside a quarter.
    f = stats.f_oneway(*(values[groups == g] for g in range(1, 5))).statistic
    eta2 = 3 * f / (3 * f + 36)
    assert importance(values.tolist(), values) == pytest.approx(1 - (1 - eta2) * 39 / 36)  # ε², of the textbook's η²
    kinds = [["a", "b"][int(value >= 20)] for value in values]
    assert importance(kinds, values) == pytest.approx(0.75, abs=0.02)
    assert np.mean([importance(values.tolist(), rng.normal(size=40)) for _ in range(200)]) < 0.06
    assert importance([1.0] * 40, values) == importance(values.tolist(), np.ones(40)) == 0


def test_page_shows_history_importance_and_best(tmp_path):
    space = {"max_kl": {"log_uniform": [0.001, 0.1]}, "line_search": {"choice": ["parallel", "backtracking"]}}
    distributions = {
        "max_kl": optuna.distributions.FloatDistribution(0.001, 0.1, log=True),
        "line_search": optuna.distributions.CategoricalDistribution(["parallel", "backtracking"]),
    }
    rng, found, state = np.random.default_rng(0), [], optuna.trial.TrialState
    for i in range(24):
        params = {"max_kl": float(np.exp(rng.uniform(-6.9, -2.4))), "line_search": ["parallel", "backtracking"][i % 2]}
        first = 100 + 40 * np.log10(params["max_kl"]) + rng.normal()
        told = {"params": params, "distributions": distributions, "user_attrs": {"index": i}}
        if i % 3 == 0:
            told |= {"state": state.COMPLETE, "value": first + 50, "intermediate_values": {2: first, 8: first + 50}}
        else:
            told |= {"state": state.PRUNED, "intermediate_values": {2: first}}
        found.append(optuna.trial.create_trial(**told))
    why = {"index": 24, "why": "it is <odd>"}
    found.append(optuna.trial.create_trial(state=state.PRUNED, user_attrs=why))
    file = write_search_page(tmp_path, found, 40, space)
    page = file.read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page) and "<script" not in page and page.count("<img") == 2
    assert "25 of 40 trials: 8 trained to the end, 17 stopped early" in page and "it is &lt;odd&gt;" in page
    scores = [float(x) for x in re.findall(r"<tr><td>\d+</td><td>([\d.]+)</td>", page)]
    assert len(scores) == 8 and scores == sorted(scores, reverse=True)
    shares = dict(re.findall(r"<td>(max_kl|line_search)</td><td>(\d+)%</td>", page))
    assert int(shares["max_kl"]) > 70 and int(shares["line_search"]) < 30


@pytest.mark.long
def test_command_line(tmp_path, python):
    lines = ["num_seeds = 2", "[base]", *(f"{name} = {value}" for name, value in BASE.items())]
    lines += ["[random]", "count = 99", "max_kl = { log_uniform = [0.001, 0.1] }"]
    (tmp_path / "space.toml").write_text("\n".join(lines))
    arguments = ("-m", "trpo_jax", "tune", "space.toml", "--num-trials", "4", "--batch", "4")
    result = python(*arguments, cwd=tmp_path, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "4 of 4 trials, 3 of the last batch stopped early" in result.stdout
    assert "trpo-jax train --config searches/space/best.toml" in re.sub(r"\s+", " ", result.stdout)
    folder = tmp_path / "searches" / "space"
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "best",
        "best.toml",
        "report.html",
        "search.json",
        "study.db",
    ]
    page = (folder / "report.html").read_text()
    assert "4 trials: 1 trained to the end, 3 stopped early" in page and "at least 8 trials" in page
    assert f"Page: {Path('searches/space/report.html')}" in result.stdout and page.count("<img") == 1
    config, states = load_run(folder / "best")
    assert states.iteration.tolist() == [config.num_iterations] * 2
    asked_for = checked_settings(read_toml(folder / "best.toml"), "best.toml")
    assert {**settings_of(config), "channels": tuple(config.channels)} == asked_for
    # The best settings are others now: their agents take the place of those.
    (folder / "best.toml").write_text((folder / "best.toml").read_text().replace("gamma = 0.99", "gamma = 0.9"))
    spec = make(base={**BASE})
    assert train_best(folder / "best.toml", spec) == folder / "best"
    assert load_run(folder / "best")[0].gamma == 0.9


def test_missing_optuna_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"tune needs Optuna; install it with `pip install '.\[tune\]'`."):
        tune(tmp_path / "new", make())
    assert not (tmp_path / "new").exists()


def scores_of(config):
    """What a trial's two agents come to, in the searches that train nothing: best at δ = .03."""
    return np.array([0, 1]) - abs(np.log(config.max_kl / 0.03))


def train_nothing(spec, alive, rung, *others):
    for trial in alive:
        end = halving._end(rung, trial.config.num_iterations)
        trial.snapshot = Snapshot((), {name: np.ones((2, end), np.float32) for name in METRICS})
        trial.snapshot.metrics["episode_return"] *= scores_of(trial.config)[:, None]
        trial.score = float(halving.interquartile_mean(scores_of(trial.config)))


@pytest.fixture
def untrained(monkeypatch):
    """Trials come to what their settings say, at once."""
    monkeypatch.setattr(halving, "_train_groups", train_nothing)


def outcome(folder):
    """All that a search found: of each trial that was told its settings, stages and score; and best.toml."""
    told = [(t.params, t.intermediate_values, t.value, t.state.name) for t in trials(folder) if t.state.name != "FAIL"]
    return told, (folder / "best.toml").read_bytes()


def trials(folder):
    with contextlib.closing(sqlite3.connect(folder / "study.db")) as database:
        copy = sqlite3.connect(":memory:", check_same_thread=False)
        database.backup(copy)
    storage = optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": lambda: copy, "poolclass": StaticPool})
    (summary,) = optuna.get_all_study_summaries(storage)
    found = optuna.load_study(study_name=summary.study_name, storage=storage).trials
    storage.engine.dispose()
    copy.close()
    return found


ALL = 12  # trials; the sampler has learned from ten on


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcome of a search without a cut."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halving, "_train_groups", train_nothing)
        tune(folder, make(ALL), batch=4)
    return outcome(folder)


def test_search_in_parts_is_the_search_at_once(whole, tmp_path, untrained):
    for count in (4, ALL):
        tune(tmp_path / "parts", make(count), batch=4)
    assert outcome(tmp_path / "parts") == whole
    assert len({tuple(params.values()) for params, *_ in whole[0]}) == ALL
    tune(tmp_path / "other seed", make(random={"count": 4, "seed": 1, **SPACE}), batch=4)
    assert outcome(tmp_path / "other seed")[0][0] != whole[0][0]


class Failing(sqlite3.Connection):
    """A connection whose commits fail from one on: before it is done or, a kill, just after."""

    left, error, after = 10**9, None, False

    def commit(self):
        Failing.left -= 1
        if Failing.left < 0:
            if Failing.after:
                super().commit()
            raise Failing.error
        super().commit()


def fail(monkeypatch, commits, error, after=False):
    monkeypatch.setattr(Failing, "left", commits)
    monkeypatch.setattr(Failing, "error", error)
    monkeypatch.setattr(Failing, "after", after)
    monkeypatch.setattr(studies.sqlite3, "connect", functools.partial(CONNECT, factory=Failing))


CONNECT = sqlite3.connect
KILL = KeyboardInterrupt("cut off")
FULL = sqlite3.OperationalError("database or disk is full")


def cut_and_continue(folder, monkeypatch, commits, error, after):
    expected = KeyboardInterrupt if error is KILL else UsageError
    with monkeypatch.context() as patch:
        fail(patch, commits, error, after)
        with pytest.raises(expected, match=r"disk is full|cut off"):
            tune(folder, make(ALL), batch=4)
    tune(folder, make(ALL), batch=4)
    return outcome(folder)


@pytest.mark.parametrize("commits, after", [(40, True), (70, False)])
def test_search_that_is_killed_goes_on_to_the_same_end(whole, tmp_path, monkeypatch, untrained, commits, after):
    assert cut_and_continue(tmp_path / "cut", monkeypatch, commits, KILL, after) == whole


def test_batch_that_is_half_told_is_told_to_its_end(whole, tmp_path, monkeypatch, untrained):
    told = []

    def tell(study, *arguments):
        told.append(arguments)
        if len(told) == 7:
            raise KeyboardInterrupt
        return original(study, *arguments)

    original = optuna.Study.tell
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Study, "tell", tell)
        tune(tmp_path / "cut", make(ALL), batch=4)
    assert [trial.state.name for trial in trials(tmp_path / "cut")].count("RUNNING") == 2
    tune(tmp_path / "cut", make(ALL), batch=4)
    assert outcome(tmp_path / "cut") == whole and len(trials(tmp_path / "cut")) == ALL


def test_full_disk_is_one_sentence_and_loses_nothing(whole, tmp_path, monkeypatch, untrained):
    assert cut_and_continue(tmp_path / "full", monkeypatch, 60, FULL, False) == whole


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_search_that_is_killed_at_any_write_goes_on_to_the_same_end(whole, tmp_path, monkeypatch, untrained):
    with monkeypatch.context() as patch:
        fail(patch, 10**6, None)
        tune(tmp_path / "count", make(ALL), batch=4)
        writes = 10**6 - Failing.left
    assert writes > 80
    for commits in range(writes):
        folder = tmp_path / f"{commits}"
        assert cut_and_continue(folder, monkeypatch, commits, KILL, bool(commits % 2)) == whole
        assert sorted(entry.name for entry in folder.iterdir()) == ["best.toml", "search.json", "study.db"]


def test_second_process_in_a_folder_is_refused_and_the_first_goes_on(whole, tmp_path, untrained):
    folder, refused = tmp_path / "held", []

    def second(batch):
        with pytest.raises(UsageError, match=r"another process is using .*held; wait for it, or choose another"):
            tune(folder, make(ALL), batch=4)
        refused.append(batch.finished)

    tune(folder, make(ALL), batch=4, report=second)
    assert refused == [4, 8, 12] and outcome(folder) == whole


def test_machines_that_share_a_storage_leave_each_other_their_trials(tmp_path, untrained):
    storage = f"sqlite:///{tmp_path / 'shared.db'}"

    def join(batch):
        if batch.finished == 2:
            tune(tmp_path / "b" / "search", make(4), batch=2, storage=storage)

    tune(tmp_path / "a" / "search", make(6), batch=2, storage=storage, report=join)
    study = optuna.load_study(study_name="search", storage=storage)
    assert [trial.state.name for trial in study.trials].count("FAIL") == 0 and len(study.trials) == 6
    study.ask().set_user_attr("owner", "another machine")
    tune(tmp_path / "a" / "search", make(8), batch=2, storage=storage)
    assert [trial.state.name for trial in study.trials].count("RUNNING") == 1
    assert len({tuple(trial.params.values()) for trial in study.trials if trial.params}) == 8
    assert sorted(entry.name for entry in (tmp_path / "a" / "search").iterdir()) == ["best.toml", "search.json"]


def of_a_search(folder, name):
    tune(folder.parent / "good", make(1), batch=1)
    return (folder.parent / "good" / name).read_bytes()


FOREIGN = {
    "a note": lambda folder: (folder / "notes.txt").write_text("mine"),
    "settings of one's own": lambda folder: (folder / "best.toml").write_text("gamma = 0.5\n"),
    "a run": lambda folder: (folder / "config.json").write_text("{}"),
    "a database of one's own": lambda folder: make_database(folder / "study.db"),
    "a study of one's own": lambda folder: optuna.create_study(storage=f"sqlite:///{folder / 'study.db'}").ask(),
    "text": lambda folder: (folder / "study.db").write_text("not a database, but long enough to look like one" * 9),
    "nothing": lambda folder: (folder / "study.db").write_bytes(b""),
    "half a study": lambda folder: (folder / "study.db").write_bytes(of_a_search(folder, "study.db")[:50_000]),
    "a garbled study": lambda folder: (folder / "study.db").write_bytes(
        of_a_search(folder, "study.db").replace(b"sweep", b"sheep")
    ),
    "a lost study": lambda folder: (folder / "search.json").write_bytes(of_a_search(folder, "search.json")),
}


def make_database(file):
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE mine (name)")


HERE, ELSEWHERE = None, "sqlite:///{}/elsewhere.db"


@pytest.mark.parametrize(
    "what, storage",
    # A study that is lost here may be where the storage says: that is no foreign folder.
    [
        (what, storage)
        for what in FOREIGN
        for storage in (HERE, ELSEWHERE)
        if (what, storage) != ("a lost study", ELSEWHERE)
    ],
)
def test_folder_that_is_not_a_searchs_is_left_alone(what, storage, tmp_path, untrained, capsys):
    folder = tmp_path / "theirs"
    folder.mkdir()
    FOREIGN[what](folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UsageError, match=r"^[^\n]*choose another --output[^\n]*\.$"):
        tune(folder, make(4), batch=4, storage=storage and storage.format(tmp_path))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not (tmp_path / "elsewhere.db").exists()


def test_file_in_the_place_of_a_folder_is_one_sentence(tmp_path, untrained):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="choose a"):
            tune(path, make(4), batch=4)


def test_what_a_search_can_do_without_is_made_again(whole, tmp_path, untrained):
    folder = tmp_path / "lost"
    tune(folder, make(8), batch=4)
    (folder / "best.toml").unlink()
    (folder / "search.json").write_text("{")
    (folder / "notes.txt").write_text("mine, in a search's folder")
    (folder / ".best.toml.7.tmp").write_text("of a process that was killed")
    folder = folder.rename(tmp_path / "renamed")
    tune(folder, make(ALL), batch=4)
    assert outcome(folder) == whole and json.loads((folder / "search.json").read_text())["num_seeds"] == 2
    assert {file.name for file in folder.iterdir()} == {"best.toml", "search.json", "study.db", "notes.txt"}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A search that was ended after eight of its trials."""
    folder = tmp_path_factory.mktemp("half") / "half"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halving, "_train_groups", train_nothing)
        tune(folder, make(8), batch=4)
    return folder


QUICK = {("study.db", "cut in its end"), ("study.db", "noise"), ("search.json", "cut")}
DAMAGED = [
    pytest.param(name, damage, marks=[] if (name, damage) in QUICK else [pytest.mark.slow])
    for name in ("best.toml", "search.json", "study.db")
    for damage in DAMAGES
    if damage != "another version"
]


@pytest.mark.parametrize("name, damage", DAMAGED)
def test_damaged_search_goes_on_to_the_same_end_or_not_at_all(whole, half, name, damage, tmp_path, untrained):
    folder = tmp_path / "s"
    shutil.copytree(half, folder)
    DAMAGES[damage](folder / name)
    check_damaged(folder, whole, may_stop=damage == "a folder" or name == "study.db")


def check_damaged(folder, whole, may_stop):
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    try:
        tune(folder, make(ALL), batch=4)
    except UsageError as error:
        assert may_stop and "\n" not in str(error) and str(folder) in str(error)
        assert all((folder / name).read_bytes() == data for name, data in before.items() if name == "best.toml")
    else:
        assert outcome(folder) == whole


@pytest.mark.parametrize("number", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 80))])
def test_flipped_bit_of_a_study_is_found_or_does_not_matter(whole, half, number, tmp_path, untrained):
    folder, rng = tmp_path / "s", random.Random(number)
    shutil.copytree(half, folder)
    data = bytearray((folder / "study.db").read_bytes())
    data[rng.choice([at for at, byte in enumerate(data) if byte])] ^= 1 << rng.randrange(8)
    (folder / "study.db").write_bytes(data)
    check_damaged(folder, whole, may_stop=True)


def test_changed_score_of_a_trial_is_found(half, tmp_path, untrained):
    shutil.copytree(half, tmp_path / "s")
    with contextlib.closing(sqlite3.connect(tmp_path / "s" / "study.db")) as database:
        database.execute("UPDATE trial_values SET value = value + 1e-9")
        database.commit()
    with pytest.raises(
        UsageError, match=r"study.db is damaged \(trial \d was changed since it was recorded\); restore it, or"
    ):
        tune(tmp_path / "s", make(ALL), batch=4)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["q?x", "a#b", "100%", "%20", "a b", "{x}", "ü", "a'b", "x" * 255, os.fsdecode(b"\xff")]
)
def test_folder_of_any_name_holds_its_study(name, tmp_path, untrained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for count in (1, 2):
        tune(name, make(count), batch=1)
    assert os.listdir(tmp_path) == [name] and len(trials(tmp_path / name)) == 2


@pytest.mark.parametrize(
    "rows, says",
    [
        ({"num_episodes": 0}, r"no episode ended \(4 of 4\); raise total_steps, or evaluate"),
        ({"finite": 0}, r"a number was not finite \(4 of 4\); move the distributions in \[random\] to smaller steps"),
    ],
)
def test_search_without_a_score_says_what_happened(rows, says, tmp_path, monkeypatch):
    def train_groups(spec, alive, rung, *others):
        for trial in alive:
            end = halving._end(rung, trial.config.num_iterations)
            trial.snapshot = Snapshot((), {name: np.full((2, end), rows.get(name, 1), np.float32) for name in METRICS})
            trial.snapshot.metrics["episode_return"][:] = np.nan
            trial.score = float("nan")

    monkeypatch.setattr(halving, "_train_groups", train_groups)
    reports = []
    for _ in range(2):  # and again from the study
        with pytest.raises(UsageError, match=f"no trial in .* has a score: {says}"):
            tune(tmp_path / "s", make(4, num_episodes=0), batch=4, report=reports.append)
    assert [(report.finished, report.pruned) for report in reports] == [(4, 0)] * 2  # none was stopped on no grounds


def test_settings_that_do_not_go_together_are_no_end_of_a_search(tmp_path, untrained):
    space = {"smallest_max_kl": {"choice": [1e-5, 0.5]}, "largest_max_kl": {"choice": [1.0, 0.1]}}
    spec = make(8, random={"count": 8, **space})
    file, _ = tune(tmp_path / "s", spec, batch=4)
    why = [trial.user_attrs.get("why", "") for trial in trials(tmp_path / "s")]
    assert {trial.state.name for trial in trials(tmp_path / "s")} == {"COMPLETE", "PRUNED"}
    assert 0 < sum("smallest_max_kl must not be above largest_max_kl" in reason for reason in why) < 8
    assert tomllib.loads(file.read_text())["max_kl"]


@pytest.mark.long
def test_programs_are_compiled_once_and_only_a_few_are_kept(monkeypatch, tmp_path):
    compiled, alive = [], []

    class Program:
        pass

    def compile_programs(spec, group, num_rungs, _):
        program = Program()
        compiled.append(group[0].config.num_steps)
        alive.append(weakref.ref(program))
        assert sum(reference() is not None for reference in alive) <= halving._KEPT_PROGRAMS
        return program

    def train_until(program, spec, group, rung):
        end = halving._end(rung, group[0].config.num_iterations)
        for trial in group:
            metrics = {name: np.full((2, end), trial.config.num_steps, np.float32) for name in METRICS}
            trial.snapshot = Snapshot((), metrics)
            trial.score = float(trial.config.num_steps)

    monkeypatch.setattr(halving, "_compile", compile_programs)
    monkeypatch.setattr(halving, "_train_until", train_until)
    monkeypatch.setattr(halving, "_KEPT_PROGRAMS", 4)
    base = {name: value for name, value in BASE.items() if name != "num_steps"}
    few = {"num_steps": {"choice": [8, 9, 10, 11]}}
    tune(tmp_path / "few", make(base=base, random={"count": 16, **few}), batch=8)
    assert len(compiled) == len(set(compiled)) > 1  # over all stages and batches
    compiled.clear()
    many = {"num_steps": {"uniform": [8, 1000]}}
    tune(tmp_path / "many", make(base=base, random={"count": 8, **many}), batch=8)
    assert len(set(compiled)) > 4 and len(compiled) <= len(set(compiled)) + 4  # and none for the last stage


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_memory_levels_off_over_two_hundred_programs(tmp_path, python):
    """In a process of its own, which nothing else has filled; after the programs that are kept it holds no more."""
    code = """
import sys
from pathlib import Path
from trpo_jax.sweeps.grids import make_spec
from trpo_jax.sweeps.search import tune

def measure(batch):
    maps = len(Path("/proc/self/maps").read_text().splitlines())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    print(batch.finished, maps, pages * 4096 // 2**20, flush=True)

base = {"num_envs": 2, "num_iterations": 1, "network": "mlp"}
space = {"num_steps": {"choice": list(range(8, 208))}}
spec = make_spec({"base": base, "random": {"count": 200, **space}, "num_episodes": 1})
tune(sys.argv[1], spec, batch=10, report=measure)
"""
    result = python("-c", code, str(tmp_path / "s"), timeout=7000)
    assert result.returncode == 0, result.stderr
    _, maps, memory = np.array([line.split() for line in result.stdout.splitlines()], int).T
    assert len(maps) == 20 and maps.max() < 40_000
    assert maps[10:].max() < 1.1 * maps[1:10].max() and memory[10:].max() < 1.1 * memory[1:10].max() + 50


def test_storage_that_cannot_be_opened_is_one_sentence(tmp_path):
    for storage in (f"sqlite:///{tmp_path}/no/such/folder.db", "redis://nowhere", "no url", f"sqlite:///{tmp_path}"):
        with pytest.raises(
            UsageError, match=r"the study in .* cannot be opened \([^\n]+\); restore it, or choose another"
        ):
            tune(tmp_path / "s", make(), storage=storage)
    assert not (tmp_path / "s").exists()


def test_study_of_ones_own_in_a_storage_is_left_alone(tmp_path):
    storage = f"sqlite:///{tmp_path / 'theirs.db'}"
    study = optuna.create_study(study_name="s", storage=storage)
    study.ask()
    with pytest.raises(UsageError, match=r"the study 's' in .* is not one of `trpo-jax tune`; choose another"):
        tune(tmp_path / "s", make(), storage=storage)
    assert len(study.trials) == 1 and not study.user_attrs


def test_a_study_whose_description_is_none_is_damaged(tmp_path):
    studies._make_database(tmp_path / "study.db", tmp_path.name, 3)
    before = (tmp_path / "study.db").read_bytes()
    spec = make_spec({"random": {"count": 1, "max_kl": {"uniform": [0.01, 0.02]}}})
    with (
        pytest.raises(UsageError, match=r"is damaged \(its description is 3\); restore it"),
        studies.open_study(tmp_path, spec, None, {}),
    ):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["study.db"]
    assert (tmp_path / "study.db").read_bytes() == before


@pytest.mark.parametrize("updates", [["ppo", "trpo"], ["trpo", "ppo"]])
def test_the_order_of_choices_does_not_decide_whether_a_search_begins(updates):
    space = {"update": {"choice": updates}, "constraint": {"choice": ["max-kl", "mean-kl"]}}
    search.check_space({}, space)
    with pytest.raises(UsageError, match="constraint=max-kl needs update=trpo"):
        search.check_space({"update": "ppo"}, {"constraint": {"choice": ["max-kl", "reverse-kl"]}})
