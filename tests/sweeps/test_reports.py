"""The report: statistics that agree with others', a sorted table, pictures, and a page that stands alone."""

import base64
import dataclasses
import html
import re
import subprocess

import numpy as np
import pyarrow.parquet as parquet
import pytest
from scipy import stats

from trpo_jax import UsageError
from trpo_jax.cli import main
from trpo_jax.config_pytree import Config
from trpo_jax.runs.descriptions import write_table
from trpo_jax.runs.metrics import METRICS
from trpo_jax.settings import setting_names, value_of
from trpo_jax.sweeps.cohorts import training_return
from trpo_jax.sweeps.drawing import scale_axis
from trpo_jax.sweeps.iqm import interquartile_mean, stratified_bootstrap
from trpo_jax.sweeps.outcomes import agents_by_point
from trpo_jax.sweeps.pages import _color_range, _draw_heat_map, _draw_summary, _file_name, write_report
from trpo_jax.sweeps.plans import Block
from trpo_jax.sweeps.reports import Row, make_report, narrow_table_of, table_of
from trpo_jax.sweeps.storage import Folder

SEEDS, ITERATIONS = 8, 20


def test_interquartile_mean():
    assert interquartile_mean([1, 2, 3, 4]) == 2.5
    assert interquartile_mean([5]) == 5
    assert interquartile_mean([0, 1, 2, 3, 4, 5, 6, 100]) == 3.5
    values = np.random.default_rng(0).normal(size=(7, 33))
    np.testing.assert_allclose(interquartile_mean(values, axis=1), stats.trim_mean(values, 0.25, axis=1))


def test_not_a_number_counts_as_worst():
    assert interquartile_mean([np.nan, 1, 2, 3]) == 1.5  # the lowest quarter is left out
    assert np.isnan(interquartile_mean([np.nan, np.nan, 2, 3]))


@pytest.mark.parametrize("sizes", [(30,), (24, 40)])
def test_bootstrap_agrees_with_scipy(sizes):
    rng = np.random.default_rng(1)
    scores = [rng.gamma(2, size=n) + i for i, n in enumerate(sizes)]
    ours = stratified_bootstrap(scores, resamples=20_000)

    def statistic(*tasks, axis=-1):
        return stats.trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)

    theirs = stats.bootstrap(scores, statistic, n_resamples=20_000, method="percentile", rng=rng, vectorized=True)
    # The ends of an interval from 20,000 samples have a standard error of about a hundredth of its width.
    width = ours[1] - ours[0]
    np.testing.assert_allclose(ours, theirs.confidence_interval, atol=0.04 * width)
    assert stratified_bootstrap(scores) == stratified_bootstrap(scores)


def sweep_folder(path, points, failed=(), rejected=(), num_episodes=4, **asked):
    """Results as a sweep writes them, from (settings, scores [SEEDS]) made up here."""
    folder = Folder(path)
    table = {"num_seeds": SEEDS, "num_episodes": num_episodes, **asked, "made_by": {"jax": "0"}}
    write_table(folder.path / "sweep.json", table)
    for i, (settings, scores) in enumerate(points):
        config = Config(num_iterations=ITERATIONS).replace(**settings)
        flags = {name: [value_of(config, name)] * SEEDS for name in setting_names([config])}
        rise = np.linspace(0.05, 1, ITERATIONS, dtype=np.float32)
        metrics = {name: np.ones((SEEDS, ITERATIONS), np.float32) for name in METRICS}
        metrics["episode_return"] = np.float32(scores)[:, None] * rise
        metrics["accepted"][[seed for point, seed in rejected if point == i], 4:] = 0
        at = np.array([3 if (i, seed) in failed else 0 for seed in range(SEEDS)])
        columns = {
            "point": np.full(SEEDS, i, np.int32),
            "seed": np.arange(SEEDS, dtype=np.int32),
            **flags,
            "env_steps": np.full(SEEDS, 1, np.int64),
            "final_return": np.float32(scores),
            "training_return": np.float32(scores) / 2,
            "failed_at": np.ma.masked_equal(at, 0),
            **metrics,
        }
        folder.write_results(Block(0, i, 0, SEEDS), columns)
    return path


def _flags():
    return [field.name for field in dataclasses.fields(Config) if field.metadata["flag"]]


def scores(mean):
    return mean + np.random.default_rng(int(mean)).normal(size=SEEDS)


@pytest.fixture
def grid(tmp_path):
    """Two fields, best at max_kl = .03 and gamma = .99; one agent failed."""
    points = [
        ({"max_kl": kl, "gamma": gamma}, scores(100 * (kl == 0.03) + 10 * (gamma == 0.99) + i))
        for i, (kl, gamma) in enumerate((kl, g) for kl in (0.01, 0.03, 0.1) for g in (0.9, 0.99))
    ]
    return sweep_folder(tmp_path / "grid", points, failed={(2, 5)})


def test_table_is_sorted_by_iqm(grid):
    report = make_report(grid)
    (rows,) = report.rows.values()
    assert rows[0].settings == {"gamma": 0.99, "max_kl": 0.03} and rows[0].iqm > 100
    assert [row.iqm for row in rows] == sorted((row.iqm for row in rows), reverse=True)
    np.testing.assert_allclose(rows[0].iqm, stats.trim_mean(rows[0].scores, 0.25))
    assert all(row.interval[0] <= row.iqm <= row.interval[1] and row.num_seeds == SEEDS for row in rows)
    assert report.failures == [("CartPole-v1", {"gamma": 0.9, "max_kl": 0.03}, 5, 3)]
    assert report.num_agents == 6 * SEEDS and "4 episodes by the policy's mode" in report.score
    titles, cells = table_of(rows)
    assert titles[:3] == ["gamma", "max_kl", "IQM"] and cells[0][:2] == ["0.99", "0.03"]


def test_agents_whose_updates_are_all_rejected_are_named_unless_their_method_has_no_trust_region(tmp_path, capsys):
    methods = [("trpo", 0.5), ("ppo", 0.5), ("trpo", 0.2)]
    points = [({"update": update, "max_kl": kl}, scores(i)) for i, (update, kl) in enumerate(methods)]
    everyone = {(i, seed) for i in range(len(points)) for seed in (2, 6)}
    report = make_report(folder := sweep_folder(tmp_path / "x", points, rejected=everyone))
    assert [(row[1]["max_kl"], *row[2:]) for row in report.stalled] == [
        (0.5, 2, 4),
        (0.5, 6, 4),
        (0.2, 2, 4),
        (0.2, 6, 4),
    ]
    assert not report.failures
    assert main(["report", str(folder)]) == 0
    assert "4 agents accepted no update any more; the page lists them." in " ".join(capsys.readouterr().out.split())
    assert "Raise cg_damping" in (folder / "report.html").read_text()
    assert make_report(sweep_folder(tmp_path / "y", points)).stalled == []


@pytest.mark.parametrize(
    "ways, words", [([True, True], "4 episodes by sampled actions"), ([True, False], "4 episodes")]
)
def test_how_the_agents_acted_is_said_unless_it_differs(tmp_path, ways, words):
    points = [({"eval_stochastic": way}, scores(i)) for i, way in enumerate(ways)]
    assert make_report(sweep_folder(tmp_path / "x", points)).score == f"mean return of {words}"


def test_training_return_is_the_score_where_nothing_was_evaluated(tmp_path):
    report = make_report(sweep_folder(tmp_path / "s", [({}, np.full(SEEDS, 8.0))], num_episodes=0))
    assert report.rows["CartPole-v1"][0].iqm == 4 and report.score.startswith("training return")


def test_several_environments_are_ranked_together(tmp_path):
    points = [
        ({"env": env, "gamma": gamma}, scores(scale * (1 + (gamma == better))))
        for env, scale, better in (("CartPole-v1", 1000, 0.9), ("Acrobot-v1", 10, 0.9))
        for gamma in (0.9, 0.99)
    ]
    report = make_report(sweep_folder(tmp_path / "s", points))
    assert list(report.rows) == ["CartPole-v1", "Acrobot-v1"]
    assert [settings for settings, *_ in report.overall] == [{"gamma": 0.9}, {"gamma": 0.99}]
    # Training begins at a twentieth of the final score of each agent, the better half at twice the other's score.
    assert report.overall[0][1] == pytest.approx(1, abs=0.1)
    assert report.overall[1][1] == pytest.approx((0.5 - 0.0375) / (1 - 0.0375), abs=0.1)


def test_points_of_equal_iqm_are_ranked_by_mean_then_worst_seed_then_area(tmp_path):
    """Of eight seeds the middle four are equal; the last two points differ in their learning curves alone."""
    middle = [500.0] * 4
    points = [
        ({"max_kl": 0.01}, [300.0, 500, *middle, 500, 500]),
        ({"max_kl": 0.02}, [400.0, 400, *middle, 500, 500]),
        ({"max_kl": 0.03}, [500.0, 500, *middle, 500, 500]),
        ({"max_kl": 0.04}, [500.0, 500, *middle, 500, 500]),
    ]
    folder = sweep_folder(tmp_path / "s", [(settings, np.array(scores)) for settings, scores in points])
    (rows,) = make_report(folder).rows.values()
    assert [row.settings["max_kl"] for row in rows[2:]] == [0.02, 0.01] and len({row.iqm for row in rows}) == 1
    lower = dataclasses.replace(rows[0], returns=rows[0].returns - 1)
    assert lower.merit < rows[0].merit and lower.merit[:3] == rows[0].merit[:3]


def test_colours_do_not_exaggerate():
    """Where training began at 20, 499 and 500 are all but one colour; 100 and 500 are the two ends."""
    numbers = {"interval": (0, 1), "mean": 1, "num_seeds": 1, "num_failed": 0, "worst": 1, "scores": np.ones(1)}
    arrays = {"steps": np.arange(2), "returns": np.array([[20.0, 500.0]])}
    for scores, expected in (
        ([499, 500], (380, 500)),
        ([100, 500], (100, 500)),
        ([7, 7], (3.75, 7)),
    ):  # the last learned nothing
        rows = [Row(env="E", settings={}, iqm=float(iqm), **numbers, **arrays) for iqm in scores]
        assert _color_range(rows) == expected


def test_axes_are_logarithmic_where_values_ask_for_it():
    from matplotlib.figure import Figure

    def scale(values, **asked):
        axes = Figure().add_subplot()
        scale_axis(axes, values, **asked)
        return axes.get_xscale()

    assert [scale([0.01, 0.03, 0.1]), scale([1, 2, 4, 8, 16]), scale([0.1, 9])] == ["log"] * 3
    assert [scale([0.9, 0.95, 0.99]), scale([1, 2, 3, 4, 5]), scale([0, 1, 100]), scale([-1, 0.1, 9])] == ["linear"] * 4
    uneven = [0.1, 0.5, 0.6, 0.7, 0.75]
    assert scale(uneven) == "linear" and scale(uneven, logarithmic=True) == "log"


def test_a_table_fits_the_terminal(tmp_path):
    one = {"max_kl": 0.01, "gae_lambda": 0.95, "line_search": "backtracking", "cg_iterations": 12}
    two = {"max_kl": 0.1, "gae_lambda": 0.9, "line_search": "parallel", "cg_iterations": 5}
    points = [(settings, scores(i)) for i, settings in enumerate((one, two))]
    (rows,) = make_report(sweep_folder(tmp_path / "s", points)).rows.values()
    titles, cells = narrow_table_of(rows, 80)
    assert titles == ["settings", "IQM", "95 % interval", "median", "worst seed"]
    assert "line_search=parallel" in cells[1][0] + cells[0][0]
    assert narrow_table_of(rows, 120)[0][:4] == list(rows[0].settings)


@pytest.mark.parametrize(
    "points, drawn",
    [
        ([({"max_kl": 0.01 * 3**i}, scores(10 * i)) for i in range(4)], 2),
        ([({"line_search": kind}, scores(3)) for kind in ("backtracking", "parallel")], 2),
        ([({"max_kl": 0.01 * i, "gamma": 0.9 + 0.01 * i, "cg_damping": i}, scores(i)) for i in range(1, 8)], 2),
        ([({}, scores(3))], 1),
    ],
    ids=["line", "choices", "scatter", "nothing varied"],
)
def test_pictures_are_drawn(points, drawn, tmp_path):
    from matplotlib.image import imread

    folder = sweep_folder(tmp_path / "s", points)
    write_report(folder, make_report(folder))
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == drawn
    for file in pictures:
        picture = imread(file)
        assert picture.shape[0] > 300 and picture[..., :3].std() > 0.02  # not a blank sheet


def test_page_stands_alone(grid, capsys):
    assert main(["report", str(grid)]) == 0
    out = capsys.readouterr().out
    assert out.index("0.03") < out.index("Page:") and "1 agent met a number that was not finite" in out
    page = (grid / "report.html").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page) and "<script" not in page
    images = re.findall(r"src='data:image/png;base64,([^']+)'", page)
    assert [base64.b64decode(image) for image in images] == [
        (grid / name).read_bytes() for name in ("learning_curves.png", "settings.png")
    ]
    assert (grid / "table.csv").read_text().splitlines()[1].startswith("CartPole-v1,0.99,0.03,")


ODD = [
    "gymnasium/CartPole-v1",
    "gymnasium-CartPole-v1",
    "gymnasium CartPole-v1",
    "../x",
    "..",
    "",
    "ü",
    "é",
    "$x_{",
]  # no closing brace


def test_odd_names_make_distinct_names_of_files():
    names = ["CartPole-v1", *ODD, "x" * 300, "x" * 299 + "y", "a\0b", "a\nb"]
    files = [_file_name(name) for name in names]
    assert files[0] == "CartPole-v1" and len({file.lower() for file in files}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", file) and len(file) <= 64 for file in files)


def test_environments_of_odd_names_have_their_pictures(tmp_path):
    envs = ["CartPole-v1", *ODD[::3]]
    folder = sweep_folder(tmp_path / "s", [({"env": env}, scores(i)) for i, env in enumerate(envs)])
    page = write_report(folder, make_report(folder)).read_text()
    assert len(list(folder.glob("learning_curves_*.png"))) == len(envs)
    for env in envs:
        section = page.split(f"<h2>{html.escape(env)}</h2>")[1].split("<h2>")[0]
        assert section.count("<img") == 1 and f"learning_curves_{_file_name(env)}.png" in section
    assert {entry.name for entry in tmp_path.iterdir()} == {"s"}


def test_pictures_of_an_older_report_go_and_no_others(grid):
    write_report(grid, make_report(grid))
    assert {file.name for file in grid.glob("*.png")} == {"learning_curves.png", "settings.png"}
    (grid / "settings_mine.png").write_bytes(b"\x89PNG mine")
    other = sweep_folder(grid.parent / "other", [({"env": env}, scores(3)) for env in ("CartPole-v1", "Acrobot-v1")])
    write_report(grid, make_report(other))
    assert {file.name for file in grid.glob("*.png")} == {
        "learning_curves_CartPole-v1.png",
        "learning_curves_Acrobot-v1.png",
        "settings_mine.png",
    }


def test_report_of_an_unfinished_sweep_says_of_how_many(tmp_path, capsys):
    asked = {"grid": {"gamma": [0.9, 0.99]}, "zip": {"max_kl": [0.01, 0.1, 0.2, 0.3]}, "random": {"count": 6}}
    points = [({"gamma": gamma, "max_kl": 0.01}, scores(i)) for i, gamma in enumerate((0.9, 0.99, 0.95))]
    folder = sweep_folder(tmp_path / "s", points, **asked)
    (folder / "checkpoints" / "00-0003" / "00000002").mkdir(parents=True)  # of a block at work
    assert main(["report", str(folder)]) == 0
    assert "24 of 384 agents" in capsys.readouterr().out
    assert "24 of 384 agents" in (folder / "report.html").read_text()
    whole = sweep_folder(tmp_path / "whole", points, zip={"gamma": [0.9, 0.99, 0.95]})
    assert make_report(whole).extent == "24 agents"


@pytest.mark.long
@pytest.mark.parametrize(
    "values",
    [[np.nan] * SEEDS, [np.nan] * 3 + [1.0] * 5, [-np.inf] + [np.inf] * 7, [3e38] * SEEDS],
    ids=["none", "some", "infinities", "huge"],
)
@pytest.mark.parametrize("varied", [(), ("max_kl",), ("gamma", "max_kl"), ("gamma", "max_kl", "cg_damping")], ids=len)
def test_scores_that_are_no_numbers_leave_a_report(values, varied, tmp_path):
    points = [
        ({name: 0.5 + 0.1 * (i >> k & 1) for k, name in enumerate(varied)}, np.array(values))
        for i in range(2 ** len(varied))
    ]
    everyone = {(i, seed) for i in range(len(points)) for seed in range(SEEDS)}
    folder = sweep_folder(tmp_path / "s", points, failed=everyone)
    report = make_report(folder)
    page = write_report(folder, report).read_text()
    assert len(report.failures) == len(points) * SEEDS and page.endswith("</html>\n")


def test_heat_map_of_many_points_has_room():
    numbers = {"iqm": 1.0, "interval": (0, 1), "mean": 1, "worst": 1, "num_seeds": 1, "num_failed": 0}
    arrays = {"scores": np.ones(1), "steps": np.ones(1), "returns": np.ones((1, 1))}
    for size, ticks in ((3, 3), (900, 8)):
        settings = [{"gamma": gamma, "max_kl": kl} for gamma in (0, 1) for kl in range(size)]
        rows = [Row(env="E", settings=setting, **numbers, **arrays) for setting in settings]
        figure = _draw_heat_map("E", rows, ["gamma", "max_kl"])
        assert 0 < len(figure.axes[0].get_xticks()) <= ticks and figure.get_size_inches().max() <= 10


def test_report_of_very_many_points_is_short(tmp_path):
    """The page and the pictures have their limits, and the table beside them has every point."""
    settings = [{"max_kl": 0.001 * (1 + i), "gamma": g, "cg_damping": 0.1} for i in range(1200) for g in (0.9, 0.99)]
    folder = many_points(tmp_path / "s", [*settings, {"max_kl": 0.01, "gamma": 0.9, "cg_damping": 0.2}])
    report = make_report(folder)
    (rows,) = report.rows.values()
    assert len(rows) == 2401 and [row.iqm for row in rows] == sorted(range(2401), reverse=True)
    assert rows[0].settings == {"cg_damping": 0.2, "gamma": 0.9, "max_kl": 0.01} and rows[0].interval == (2400, 2400)
    page = write_report(folder, report).read_text()
    assert page.count("<tr>") < 1010 and "The best 1,000 of 2,401 points; table.csv has all." in page
    assert len((folder / "table.csv").read_text().splitlines()) == 2402
    assert all(folder.joinpath(name).stat().st_size < 500_000 for name in ("learning_curves.png", "settings.png"))


def many_points(path, settings):
    """One seed of each point, with the point's number as its score, two iterations."""
    folder, n = Folder(path), len(settings)
    write_table(folder.path / "sweep.json", {"num_seeds": 1, "num_episodes": 4, "made_by": {"jax": "0"}})
    configs = [Config(num_iterations=2).replace(**one) for one in settings]
    columns = {
        "point": np.arange(n, dtype=np.int32),
        "seed": np.zeros(n, np.int32),
        **{name: [value_of(config, name) for config in configs] for name in ("env", *_flags())},
        "final_return": np.arange(n, dtype=np.float32),
        "training_return": np.arange(n, dtype=np.float32),
        "failed_at": np.ma.masked_equal(np.zeros(n), 0),
        **{name: np.ones((n, 2), np.float32) for name in METRICS},
    }
    folder.write_results(Block(0, 0, 0, n), columns)
    return path


def test_summary_of_many_points_has_their_quartiles():
    from trpo_jax.runs.learning_curve import make_figure

    axes = make_figure(4, 3).add_subplot()
    _draw_summary(axes, [1.0] * 5 + [2.0] * 5, [0, 1, 2, 3, 4, 10, 20, 30, 40, np.nan])
    median, best = (line.get_ydata() for line in axes.lines)
    assert list(median) == [2, 25] and list(best) == [4, 40] and list(axes.lines[0].get_xdata()) == [1, 2]


def test_agents_are_grouped_by_point_in_order_of_appearance():
    points = np.array([7, 7, 2, 7, 2, 5])
    found = agents_by_point(points)
    assert {point: list(agents) for point, agents in found.items()} == {7: [0, 1, 3], 2: [2, 4], 5: [5]}
    assert list(found) == [7, 2, 5]


def test_a_sweep_in_which_no_episode_ended_is_said_to_be_one(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda *arguments, **_: written.append(arguments[3]))
    folder = sweep_folder(tmp_path / "s", [({}, np.full(SEEDS, np.nan))])
    write_report(folder, make_report(folder))
    assert written == ["no episode has ended"]


def test_environment_without_scores_leaves_the_ranking_of_the_others(tmp_path):
    points = [
        ({"env": env, "gamma": gamma}, np.full(SEEDS, score))
        for env, some in (("CartPole-v1", [1.0, 3.0]), ("Acrobot-v1", [np.nan, np.nan]), ("Pendulum-v1", [2.0, 4.0]))
        for gamma, score in zip((0.9, 0.99), some, strict=True)
    ]
    report = make_report(sweep_folder(tmp_path / "s", points))
    assert [len(rows) for rows in report.rows.values()] == [2, 2, 2] and len(report.overall) == 2


def test_points_of_an_unfinished_sweep_are_not_taken_for_each_other(tmp_path):
    """Of a grid of γ and δ, one environment has finished γ = .9 and the other one γ = .99."""
    points = [
        ({"env": env, "gamma": gamma, "max_kl": kl}, scores(i))
        for env, gamma in (("CartPole-v1", 0.9), ("Acrobot-v1", 0.99))
        for i, kl in enumerate((0.01, 0.1))
    ]
    grid = {"env": ["CartPole-v1", "Acrobot-v1"], "gamma": [0.9, 0.99], "max_kl": [0.01, 0.1]}
    report = make_report(sweep_folder(tmp_path / "s", points, grid=grid))
    assert [row.settings["gamma"] for row in report.rows["CartPole-v1"]] == [0.9, 0.9]
    assert not report.overall


def test_interval_counts_what_is_not_a_number_as_worst():
    some = np.array([np.nan, np.nan, *np.arange(6.0)])
    lowest = np.where(np.isnan(some), -1e300, some)
    low, high = stratified_bootstrap([some])
    assert np.isnan(low) and stratified_bootstrap([lowest])[0] < -1e200
    assert high == stratified_bootstrap([lowest])[1]
    assert np.isnan(stratified_bootstrap([np.full(4, np.nan)])).all()
    assert stratified_bootstrap([np.full(4, 7.0)]) == (7, 7)


def test_report_on_a_disk_that_cannot_be_written_to(grid, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert main(["report", str(grid)]) == 2
    shown = capsys.readouterr()
    assert "0.03" in shown.out and re.fullmatch(r"trpo-jax: cannot write .*No space left on device; .*\.\n", shown.err)
    assert not any(file.suffix in (".png", ".tmp", ".html") for file in grid.iterdir())


def test_description_with_impossible_numbers_leaves_the_results(tmp_path):
    impossible = [
        {"num_seeds": "x"},
        {"num_seeds": -1},
        {"grid": {"gamma": 3}},
        {"random": {"count": 1e400}},
        {"zip": 3},
    ]
    for i, asked in enumerate(impossible):
        assert make_report(sweep_folder(tmp_path / str(i), [({}, scores(1))], **asked)).extent == "8 agents"


def test_results_of_another_version(tmp_path):
    folder = sweep_folder(tmp_path / "s", [({"gamma": 0.9}, scores(1)), ({"gamma": 0.99}, scores(2))])
    for file in (folder / "results").iterdir():
        table = parquet.read_table(file)
        table = table.replace_schema_metadata(None).drop_columns(["reuse", "line_search"])  # which it did not have
        parquet.write_table(table, file)
    assert make_report(folder).rows["CartPole-v1"][0].settings == {"gamma": 0.99}
    for file in (folder / "results").iterdir():
        parquet.write_table(parquet.read_table(file).drop_columns(["point"]), file)
    with pytest.raises(UsageError, match=r"results in .* lack point; restore them, or sweep again"):
        make_report(folder)


def test_training_return_is_of_the_last_episodes_that_ended():
    """Of twenty iterations the last two count, else the last one in which an episode ended."""
    returns, ended = np.full((5, 20), np.nan, np.float32), np.zeros((5, 20), np.float32)
    ended[0, [4, 18, 19]], returns[0, 4:] = [1, 1, 3], 7  # carried forward where none ended
    returns[0, 18:] = [1, 5]
    ended[1, [4, 12]], returns[1, 4:12], returns[1, 12:] = [1, 2], 7, 9
    ended[2, 0], returns[2] = 1, 3
    ended[4], returns[4, :19] = 1, 1  # a reward that was not a number in the last one
    rows = {"episode_return": returns, "num_episodes": ended}
    np.testing.assert_equal(training_return(rows), np.float32([4, 9, 3, np.nan, np.nan]))


def test_page_in_a_browser(grid, tmp_path, browser):
    write_report(grid, make_report(grid))
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic"
    options = ["--headless", "--no-sandbox", "--disable-gpu", *quiet.split(), f"--user-data-dir={tmp_path / 'browser'}"]
    page = f"file://{grid / 'report.html'}"
    shot = tmp_path / "page.png"
    arguments = ["--hide-scrollbars", "--window-size=1000,2400", f"--screenshot={shot}", page]
    subprocess.run([browser, *options, *arguments], check=True, capture_output=True, timeout=120)
    dumped = subprocess.run(
        [browser, *options, "--dump-dom", page], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert dumped.count("<tr>") == 1 + 6 + 2 and dumped.index("<td>0.99</td><td>0.03</td>") > 0
    from matplotlib.image import imread

    picture = imread(shot)[..., :3]
    # The heat map's colours (viridis: violet and yellow) are on the sheet only if the picture was decoded and drawn.
    violet = (abs(picture - np.array([0.267, 0.005, 0.329])) < 0.05).all(axis=2).sum()
    yellow = (abs(picture - np.array([0.993, 0.906, 0.144])) < 0.05).all(axis=2).sum()
    assert violet > 1000 and yellow > 1000
