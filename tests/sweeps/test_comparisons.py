"""Comparisons: the statistics are those of the reference implementation, and what is compared is said."""

import json
import os
import re

import numpy as np
import pytest
from test_reports import ITERATIONS, SEEDS, sweep_folder

from trpo_jax import UsageError, compare, probability_of_improvement, stratified_bootstrap
from trpo_jax.cli import main
from trpo_jax.config_pytree import Config
from trpo_jax.env_args import EnvArgs
from trpo_jax.runs.descriptions import write_table
from trpo_jax.runs.evaluations import COLUMNS
from trpo_jax.runs.metrics import METRICS, TableFile
from trpo_jax.settings import settings_of
from trpo_jax.sweeps.comparisons import _profile
from trpo_jax.sweeps.iqm import _times_drawn, bootstrap_band, interquartile_mean
from trpo_jax.sweeps.outcomes import Curves, read_outcomes
from trpo_jax.sweeps.reports import make_report, table_of

# Scores of two methods on two tasks, and what rliable 1.2 says of them: metrics.aggregate_iqm and
# metrics.probability_of_improvement, library.get_interval_estimates and library.create_performance_profile (20,000
# resamples or more). It and its dependencies (arch, pandas, an older SciPy) are not needed to compare with its numbers.
A = [np.array([0.5, 0.6, 0.4, 0.8, 0.4, 0.4]), np.array([0.8, 0.8, 0.9, 1.0, 0.5, 0.8])]
B = [np.array([-0.1, 0.2, 0.3, 0.5, 0.4, 0.3, 0.6, 0.3]), np.array([0.9, 0.8, 0.8, 1.1, 1.2, 1.0, 0.9, 0.7])]
IQM = {"A": (2 / 3, (0.51666667, 0.8)), "B": (0.625, (0.55, 0.7125))}
A_OVER_B = 0.5625, (0.38020833, 0.74479167)
TAU = np.array([0.0, 0.3, 0.5, 0.7, 0.9])
PROFILE = {
    "A": ([1, 1, 7 / 12, 1 / 2, 1 / 12], [1, 1, 1 / 3, 1 / 3, 0], [1, 1, 5 / 6, 2 / 3, 1 / 4]),
    "B": (
        [15 / 16, 11 / 16, 9 / 16, 7 / 16, 3 / 16],
        [13 / 16, 9 / 16, 1 / 2, 5 / 16, 1 / 16],
        [1, 7 / 8, 11 / 16, 1 / 2, 3 / 8],
    ),
}
C = np.array(
    [
        [[0.2, 0.36, 0.57], [0.44, 0.45, 0.66]],
        [[0.3, 0.56, 0.61], [0.46, 0.74, 0.95]],
        [[0.12, 0.9, 0.95], [0.41, 0.58, 0.73]],
        [[0.94, 1.04, 1.09], [0.14, 0.61, 0.89]],
        [[0.11, 0.5, 0.7], [0.62, 0.63, 0.71]],
        [[0.14, 0.3, 0.37], [0.15, 0.35, 1.02]],
    ]
)  # runs, tasks, points of a curve
CURVE = [0.27333333, 0.555, 0.77333333], [0.15166667, 0.43166667, 0.65833333], [0.44333333, 0.7, 0.92166667]
# An end of a bootstrapped interval is itself a draw: of 2,000 resamples its standard error is about 0.01 here.
NEAR = {"atol": 0.035}


@pytest.mark.parametrize("name, scores", [("A", A), ("B", B)])
def test_iqm_and_profile_are_those_of_the_reference(name, scores):
    iqm, interval = IQM[name]
    assert interquartile_mean(np.concatenate(scores)) == pytest.approx(iqm)
    assert np.isnan(interquartile_mean([]))
    np.testing.assert_allclose(stratified_bootstrap(scores), interval, **NEAR)
    band, (middle, low, high) = _profile(scores, TAU), PROFILE[name]
    np.testing.assert_allclose(band.middle, middle)
    np.testing.assert_allclose([band.low, band.high], [low, high], atol=1 / 12 + 1e-9)  # of one run more or less


def test_probability_of_improvement_is_that_of_the_reference():
    value, interval = probability_of_improvement(A, B)
    assert value == pytest.approx(A_OVER_B[0])
    np.testing.assert_allclose(interval, A_OVER_B[1], **NEAR)
    assert probability_of_improvement(B, A)[0] == pytest.approx(1 - value)
    assert probability_of_improvement(A, [task - 2 for task in A]) == (1, (1, 1))
    assert probability_of_improvement([np.array([np.nan, 1.0])], [np.array([np.nan])])[0] == 0.75


def test_curve_and_its_band_are_those_of_the_reference():
    band = bootstrap_band(np.arange(3), list(C.transpose(1, 0, 2)))
    np.testing.assert_allclose(band.middle, CURVE[0])
    np.testing.assert_allclose([band.low, band.high], CURVE[1:], **NEAR)


def test_a_curve_has_its_newest_return_at_any_number_of_steps():
    curve = Curves(np.array([10, 20, 30]), np.array([[np.nan, 2, 3], [4, np.nan, 6]]))
    found = curve.at(np.array([5, 10, 19.9999999999, 29, 30, 99]))
    np.testing.assert_array_equal(found, [[np.nan, np.nan, 2, 2, 3, 3], [np.nan, 4, 4, 4, 6, 6]])


# Folders


def run_folder(path, scores, evaluated=False, **settings):
    """A run as `train` writes it whose training returns rise from 0 to the scores, evaluations to twice them."""
    config = Config(num_iterations=20).replace(**settings)
    table = {**settings_of(config), "seed": 3, "num_seeds": len(scores), "keep_every": 0}
    write_table(path / "config.json", table)
    files = TableFile(path / "metrics.csv"), TableFile(path / "eval.csv", COLUMNS)
    for file in files[: 1 + evaluated]:
        file.truncate({})
    for i in range(config.num_iterations):
        place = i + 1, (i + 1) * config.steps_per_iteration
        returns = [score * i / (config.num_iterations - 1) for score in scores]
        ones = dict.fromkeys(METRICS, 1.0)
        rows = [(*place, 3 + a, {**ones, "episode_return": value}) for a, value in enumerate(returns)]
        files[0].append(rows, "")
        if evaluated:
            rows = [(*place, 3 + a, {**dict.fromkeys(COLUMNS, 1.0), "mean": 2 * v}) for a, v in enumerate(returns)]
            files[1].append(rows, "")
    return path


def test_runs_of_one_task_are_compared_in_its_own_units(tmp_path):
    found = compare([run_folder(tmp_path / name, 100 * s, True) for name, s in (("a", A[0]), ("b", B[0]))])
    assert list(found.methods) == ["a", "b"] and list(found.tasks) == ["CartPole-v1"]
    assert found.score == "mean return of the last evaluation during training" and not found.notes
    a = found.methods["a"]
    np.testing.assert_allclose(a.scores["CartPole-v1"], 200 * A[0])
    assert a.iqm == pytest.approx(200 * interquartile_mean(A[0])) and a.overall is None
    assert a.curves["CartPole-v1"].middle[-1] == pytest.approx(a.iqm)
    (pair,) = [row for row in found.improvement if row[:2] == ("a", "b")]
    assert pair[2:] == probability_of_improvement(A[:1], B[:1])
    text = json.dumps(found.as_json(), allow_nan=False)
    assert json.loads(text)["improvement"][0] == {
        "method": "a", "over": "b", "probability": pair[2], "interval": list(pair[3])
    }  # fmt: skip


def test_several_tasks_are_normalised_between_the_beginning_and_the_best(tmp_path):
    for name, scale in (("trpo", 1.0), ("ppo", 0.5)):
        points = [({"env": "CartPole-v1", "update": name}, np.linspace(490, 500, SEEDS) * scale)]
        points.append(({"env": "Acrobot-v1", "update": name}, np.linspace(50, 60, SEEDS) * scale))
        sweep_folder(tmp_path / name, points)
    paths = [tmp_path / "ppo", tmp_path / "trpo"]
    found = compare(paths)
    assert list(found.methods) == ["trpo", "ppo"] and found.score.endswith("mode after training")
    zero, one = found.tasks["CartPole-v1"]
    # The training returns made up there rise from a twentieth of the score of each agent.
    assert zero == pytest.approx(0.05 * 495 * 0.75) and one == pytest.approx(495)
    assert found.methods["trpo"].iqm == pytest.approx(1, abs=0.01)
    assert found.methods["ppo"].iqm == pytest.approx((0.5 - 0.0375) / (1 - 0.0375), abs=0.01)
    overall = found.methods["trpo"].overall
    assert overall.x[-1] == 1 and overall.middle[-1] == pytest.approx(1, abs=0.01)
    by = compare(paths, by=["update"])
    assert set(by.methods) == {"update=trpo", "update=ppo"}
    assert by.methods["update=ppo"].iqm == found.methods["ppo"].iqm


def test_what_must_be_known_is_said(tmp_path):
    a = run_folder(tmp_path / "a", [1.0, 2.0, 3.0], evaluated=True)
    b = run_folder(tmp_path / "b", [1.0, 2.0], num_iterations=10)
    pooled = sweep_folder(tmp_path / "s", [({"gamma": gamma}, np.ones(SEEDS)) for gamma in (0.9, 0.99)])
    found = compare([a, b, pooled])
    assert found.score == found.returns + " at the end" == "training return at the end"  # all have that alone
    notes = " ".join(found.notes)
    assert "differ in gamma" in notes and "different numbers of steps" in notes and "Fewer than three seeds" in notes
    table = json.loads((a / "config.json").read_text())
    write_table(a / "config.json", {**table, "num_iterations": 40, "checksum": None})
    assert "Not finished: 1 of 4" in " ".join(compare([a, b, pooled]).notes)
    assert set(compare([pooled], by=["gamma"]).methods) == {"gamma=0.9", "gamma=0.99"}


def test_what_has_stopped_early_or_was_extended_is_finished(tmp_path):
    """A run whose agents have reached their return, and points that were not asked for more seeds."""
    a = run_folder(tmp_path / "a", [50.0, 60.0], evaluated=True, eval_every=1, stop_at_return=100.0)
    table = json.loads((a / "config.json").read_text())
    for goal, finished in ((100.0, True), (101.0, False)):
        asked = {"num_iterations": 40, "stop_at_return": goal, "checksum": None}
        write_table(a / "config.json", {**table, **asked})
        (outcome,) = read_outcomes(a)
        assert outcome.complete == finished
    size = {"num_iterations": ITERATIONS}
    form = {"base": size, "grid": {"gamma": [0.9, 0.99]}, "num_seeds": SEEDS, "seed": 0, "num_episodes": 4}
    more = {**form, "grid": {"gamma": [0.99]}, "num_seeds": SEEDS + 1}
    points = [({"gamma": gamma}, np.ones(SEEDS)) for gamma in (0.9, 0.99)]
    b = sweep_folder(tmp_path / "b", points, **more, before=[form], begun_as="b")
    assert [outcome.complete for outcome in read_outcomes(b)] == [True, False]


def test_folders_whose_names_are_no_text_have_a_page(tmp_path, capsys):
    names = [os.fsdecode(b"a\xff"), os.fsdecode(b"a\xfe")]
    folders = [sweep_folder(tmp_path / name, [({}, np.ones(SEEDS) * i)]) for i, name in enumerate(names)]
    assert len(compare(folders).methods) == 2
    page = folders[0] / "page.html"
    assert main(["compare", *map(str, folders), "--output", str(page), "--json", str(page.with_suffix(".json"))]) == 0
    assert "a\ufffd" in page.read_text()
    assert main(["report", str(folders[0])]) == 0 and "a\ufffd" in (folders[0] / "report.html").read_text()
    capsys.readouterr()


def test_scores_of_the_mode_and_of_sampled_actions_are_not_compared(tmp_path):
    folders = [
        sweep_folder(tmp_path / name, [({"eval_stochastic": sampled}, np.ones(SEEDS))])
        for name, sampled in (("a", False), ("b", True), ("c", True))
    ]
    assert compare(folders[:2]).score == "training return at the end"
    assert compare(folders[1:]).score == "mean return by sampled actions after training"


def test_page_stands_alone_and_holds_what_the_command_prints(tmp_path, capsys):
    points = [
        ({"env": e, "update": u}, s * 100)
        for u, x in (("trpo", A), ("ppo", A))
        for e, s in zip(("CartPole-v1", "Acrobot-v1"), [np.resize(t, SEEDS) for t in x], strict=True)
    ]
    folder = sweep_folder(tmp_path / "s", points)
    html, file = tmp_path / "page.html", tmp_path / "all.json"
    assert main(["compare", str(folder), "--by", "update", "--output", str(html), "--json", str(file)]) == 0
    printed, page = capsys.readouterr().out, html.read_text()
    assert "update=trpo" in printed and f"Page: {html}" in printed and "normalised" in printed
    assert not re.search(r"(src|href)=['\"](?!data:)", page) and "<script" not in page and "viewport" in page
    assert page.count("<img") == 5 and page.count("0.50 (") == 3 and "Performance profiles" in page
    assert len(json.loads(file.read_text())["methods"]["update=ppo"]["scores"]["Acrobot-v1"]) == SEEDS


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a"], "there is only one method, a, but two are needed; give another folder"),
        (["s"], "there is only one method, s, .* --by gamma"),
        (["a", "missing"], "missing is the folder of neither a run nor a sweep"),
        (["a", "./a"], "given twice"),
        (["a", "s", "--by", "gama"], "--by names no setting, 'gama'; did you mean gamma"),
        (["a", "other"], "have no environment in common"),
        (["a", "other", "--by", "env"], "--by env would compare returns of different environments"),
        (["a", "empty"], "empty has no results yet"),
        (["a", "damaged"], "damaged is damaged .*; restore it"),
        (["a", "s", "--output", "page.txt"], "--output must name a file that ends in .html"),
        (["a", "s", "--json", "page"], "--json must name a file that ends in .json"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "a", [1.0, 2.0])
    sweep_folder(tmp_path / "s", [({"gamma": gamma}, np.ones(SEEDS)) for gamma in (0.9, 0.99)])
    run_folder(tmp_path / "other", [1.0], env="Acrobot-v1")
    (run_folder(tmp_path / "empty", [1.0]) / "metrics.csv").unlink()
    (run_folder(tmp_path / "damaged", [1.0]) / "metrics.csv").write_text("iteration,seed\n1,x\n")
    before = sorted(tmp_path.rglob("*"))
    assert main(["compare", *arguments]) == 2
    assert re.fullmatch(f"trpo-jax: .*{message}.*[.?]\n", capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before


def test_agents_without_numbers_leave_a_page(tmp_path, capsys):
    for name in "ab":
        run_folder(tmp_path / name, [np.nan, np.nan, np.nan])
    out = tmp_path / "p.html"
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(out)]) == 0
    assert "–" in capsys.readouterr().out and out.exists()


def test_too_many_methods_are_refused(tmp_path):
    folder = sweep_folder(tmp_path / "s", [({"gamma": 0.9 + i / 1000}, np.ones(SEEDS)) for i in range(11)])
    with pytest.raises(UsageError, match="there are 11 methods, more than 10"):
        compare([folder], by=["gamma"])


# Many agents


def test_improvement_counts_every_pair():
    """Against the definition, pair by pair, where scores are equal, infinite or missing."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=40).astype(float), rng.integers(5, size=31).astype(float)
    x[:3], y[:4] = (np.nan, np.inf, -np.inf), (np.nan, np.nan, np.inf, 2)
    lowest = [np.where(np.isnan(scores), -np.inf, scores) for scores in (x, y)]
    wins = (lowest[0][:, None] > lowest[1]) + 0.5 * (lowest[0][:, None] == lowest[1])
    value, interval = probability_of_improvement([x], [y])
    assert value == wins.mean() and interval[0] <= value <= interval[1]
    draws = np.random.default_rng(0)
    times = [_times_drawn(draws, len(scores), 2000) for scores in (x, y)]
    drawn = ((times[0] @ wins) * times[1]).sum(axis=1) / wins.size
    np.testing.assert_array_equal(interval, np.quantile(drawn, (0.025, 0.975)))


def test_bootstrap_in_slices_is_the_bootstrap(monkeypatch):
    scores = [np.random.default_rng(0).normal(size=300)]
    whole = stratified_bootstrap(scores)
    monkeypatch.setattr("trpo_jax.sweeps.iqm._AT_ONCE", 10_000)
    assert stratified_bootstrap(scores) == whole


def test_interval_of_very_many_agents_is_that_of_large_samples():
    """The IQM of n normal scores has variance (∫ of x² in the middle half + 2q²/4) / (n/4) by Huber; q = 0.6745."""
    q, density = 0.674489750196, 0.317776572684
    inside = 0.5 - 2 * q * density
    n = 100_000
    deviation = np.sqrt((inside + q**2 / 2) * 4 / n)
    low, high = stratified_bootstrap([np.random.default_rng(0).normal(size=n)])
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.25)


def test_methods_without_runs_have_no_probability_of_improvement():
    nothing = np.array([])
    with np.errstate(invalid="ignore"):
        found, interval = probability_of_improvement([nothing], [nothing])
    assert np.isnan([found, *interval]).all()


def test_values_that_are_close_are_methods_of_their_own(tmp_path):
    values = [0.99, 0.99995, 0.99999, 1.0, 0.123456789, 0.123456788]
    path = sweep_folder(tmp_path / "s", [({"gamma": value}, np.ones(SEEDS)) for value in values])
    found = compare([path], by=["gamma"])
    names = {"0.99", "0.99995", "0.99999", "1", "0.123456789", "0.123456788"}
    assert set(found.methods) == {f"gamma={name}" for name in names}
    assert {row[0] for row in table_of(make_report(path).rows["CartPole-v1"])[1]} == names


def test_settings_of_an_environment_make_tasks_of_their_own_in_that_environment_alone(tmp_path):
    for name, update in (("a", "trpo"), ("b", "ppo")):
        points = [({"env": "CartPole-v1", "max_steps": limit, "update": update}, np.ones(SEEDS)) for limit in (50, 60)]
        sweep_folder(tmp_path / name, [*points, ({"env": "Acrobot-v1", "update": update}, np.ones(SEEDS))])
    tasks = set(compare([tmp_path / "a", tmp_path / "b"]).tasks)
    assert tasks == {"CartPole-v1, max_steps=50", "CartPole-v1, max_steps=60", "Acrobot-v1"}
    c = run_folder(tmp_path / "c", [1.0], max_steps=70)
    d = run_folder(tmp_path / "d", [1.0], max_steps=80)
    message = r"no task is common to all methods.*c has CartPole-v1, max_steps=70; d has .*=80; .* with --by\."
    with pytest.raises(UsageError, match=message):
        compare([c, d])
    assert set(compare([c, d], by=["max_steps"]).methods) == {"max_steps=70", "max_steps=80"}


def test_settings_of_earlier_forms_stay_in_the_tables(tmp_path):
    points = [({"env_args": EnvArgs({"gravity": gravity})}, np.ones(SEEDS) * gravity) for gravity in (5.0, 10.0)]
    form = {"grid": {"env.gravity": [5.0, 10.0]}, "num_seeds": SEEDS, "seed": 0, "num_episodes": 4}
    now = {"random": {"count": 1, "gamma": {"log_uniform": [0.9, 0.99]}}}
    path = sweep_folder(tmp_path / "s", points, before=[form], begun_as="s", **now)
    report = make_report(path)
    assert [row.settings["env.gravity"] for row in report.rows["CartPole-v1"]] == [10.0, 5.0]
    assert {outcome.settings["env.gravity"] for outcome in read_outcomes(path)} == {5.0, 10.0}
