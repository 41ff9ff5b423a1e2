"""What experiments/article/README.md claims of each figure holds at a reduced size, and every figure draws."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "experiments" / "article"
specification = importlib.util.spec_from_file_location("article_run", FOLDER / "run.py")
article = importlib.util.module_from_spec(specification)
specification.loader.exec_module(article)


def numbers_of(name, **sizes):
    findings = article.compute(name, **sizes)
    getattr(article.chapter(name), f"draw_{name}")(findings)
    return findings.numbers


def test_every_figure_is_shown_and_its_numbers_are_kept():
    readme, results = (FOLDER / "README.md").read_text(), json.loads((FOLDER / "results.json").read_text())
    assert list(results) == list(article.FIGURES)
    for name in article.FIGURES:
        assert f"({name}.png)" in readme
        assert 5_000 < (FOLDER / f"{name}.png").stat().st_size < 150_000
    assert len(list(FOLDER.glob("*.png"))) == len(article.FIGURES)


def test_a_readers_run_writes_outside_git(tmp_path, monkeypatch):
    exact = article.figures("exact")
    assert len(exact) == 14 and set(exact) < set(article.figures("all")) == set(article.FIGURES)
    before = {file: file.read_bytes() for file in FOLDER.iterdir() if file.is_file()}
    monkeypatch.chdir(tmp_path)
    curves = {f"method {i}": np.linspace(0, 1, 9) for i in range(6)}
    findings = article.chapter("climbing").Findings(curves, {"number": 0.123456789})
    monkeypatch.setattr(article, "compute", lambda name: findings)
    monkeypatch.setattr("sys.argv", ["run.py", "climbing"])
    article.main()
    assert json.loads((tmp_path / "runs" / "article" / "results.json").read_text()) == {
        "climbing": {"number": 0.123457}
    }
    assert {file.name for file in (tmp_path / "runs" / "article").iterdir()} == {"climbing.png", "results.json"}
    assert {file: file.read_bytes() for file in before} == before
    assert "/runs/" in (FOLDER.parents[1] / ".gitignore").read_text().split()


def test_estimator_has_no_bias_and_an_error_of_one_over_root_n():
    found = numbers_of("estimator", num_samples=(10, 100, 1000), num_repeats=200)
    assert found["slope"] == pytest.approx(-0.5, abs=0.05)
    assert found["bias_over_its_own_noise"].max() < 3


def test_hump_is_narrow_and_moves_and_the_limited_step_has_a_plateau():
    found = numbers_of("hump", num_sizes=41, starts=(0.01, 1.0))
    assert found["plain_works_from_every_start"] == []
    assert found["plain_diverged_share"] > 0.25
    assert found["limited_decades_from_every_start"] > found["unchecked_decades_from_every_start"] + 2 > 2.5
    assert found["limited_diverged_share"] == 0


def test_gradients_explode_and_vanish_and_natural_ones_do_not():
    found = numbers_of("terrain", num_points=30, num_steps=600)
    assert found["lqr_gradient_at_distance"]["0.0001"] > 1e7
    assert found["lqr_limited_step_range"][1] < 0.2
    assert found["bandit_gradient_range"][0] < 2e-4
    np.testing.assert_allclose(found["bandit_natural_range"], np.sqrt(0.5), rtol=1e-6)
    assert found["steps_to_one_half"]["limited"] < 20 < 400 < found["steps_to_one_half"]["plain"]
    assert found["limited_kl_range_until_one_half"][1] <= 0.01


def test_the_table_of_the_cliff_is_that_of_its_numbers_and_they_carry_its_sentences():
    page, found = ((FOLDER / name).read_text() for name in ("README.md", "results.json"))
    cliff = json.loads(found)["cliff"]
    assert cliff["num_groups"] * cliff["num_seeds"] == 512 and cliff["mean_return_before"] > 495
    rows = list(cliff["by_factor"].values())
    for budget, row in zip(("δ = 0.01", "10 δ", "100 δ", "1000 δ"), rows, strict=True):
        kl = f"{row['median_kl_of_the_update']:.2g} ({{:.2g}} … {{:.2g}})".format(*row["interval_of_the_median"])
        means = [
            f"{row[f'mean_return_{when}']:.0f} ± {row[f'two_standard_errors_{error}']:.0f}"
            for when, error in (("after_it", "of_it"), ("at_the_end", "at_the_end"))
        ]
        shares = []
        for name in ("share_below_475", "share_below_250"):
            share, low, high = (100 * value for value in (row[name], *np.quantile(row[f"{name}_by_group"], (0, 1))))
            shares.append(f"{share:.0f} % ({low:.0f} … {high:.0f})")
        assert f"| {budget} | {kl} | {means[0]} | {' | '.join(shares)} | {means[1]} |" in page
    small, ten, hundred, thousand = rows
    assert ten["share_below_475"] < 0.1 > 10 * small["share_below_475"]
    assert hundred["share_below_475"] == pytest.approx(1 / 2, abs=0.06)  # three standard errors of a share
    assert hundred["share_below_250"] == pytest.approx(1 / 3, abs=0.06)
    assert thousand["share_below_475"] == pytest.approx(0.7, abs=0.06)
    assert thousand["share_below_250"] == pytest.approx(0.6, abs=0.06)
    assert ten["mean_return_at_the_end"] > 495 > 480 > hundred["mean_return_at_the_end"] > 450
    for few, many in ((small, ten), (ten, hundred), (hundred, thousand)):
        falls = [row["mean_return_after_it"] for row in (few, many)]
        errors = [row["two_standard_errors_of_it"] / 2 for row in (few, many)]
        assert falls[0] - falls[1] > 4 * np.hypot(*errors)


@pytest.mark.slow
def test_updates_of_a_hundred_times_the_budget_fall():
    found = numbers_of("cliff", num_groups=1, num_seeds=16, times=(1, 2), factors=(1, 100, 1000), num_episodes=8)
    small, middle, large = found["by_factor"].values()
    assert small["median_kl_of_the_update"] <= 0.01 < 0.1 < large["median_kl_of_the_update"]
    assert small["mean_return_after_it"] > 0.95 * found["mean_return_before"]
    for fallen in (middle, large):  # half of the seeds fall, so that among sixteen none hardly ever happens
        assert fallen["mean_return_after_it"] < 0.95 * found["mean_return_before"]
        assert fallen["share_below_475"] >= 3 / 16


def test_distance_depends_on_the_parametrisation_unless_it_is_natural():
    found = numbers_of("distance", num_parametrisations=3)
    np.testing.assert_allclose(list(found["kl_of_a_shift_of_0.1_by_sigma"].values()), [0.005, 0.5, 50], rtol=1e-12)
    np.testing.assert_allclose(found["natural_kl_range"], 0.01, rtol=1e-12)
    assert found["natural_paths_apart"] < 1e-8
    assert found["plain_paths_apart"] > 0.1


def test_neighbours_move_together():
    found = numbers_of("neighbours", num_steps=64, num_runs=32)
    assert found["kernel_of_neighbours"] > 0.9 > 0.8 > found["kernel_of_any_two"]
    assert found["kl_of_separate_over_averaged"] > 64


def test_minorizer_touches_and_stays_below():
    found = numbers_of("minorizer", num_points=81, num_pairs=500)
    assert found["touches_within"] == 0
    assert found["gradients_differ_by"] < 1e-12
    assert found["bound_above_return_on_the_line"] < 1e-12
    assert found["smallest_margin_on_random_pairs"] > -1e-12
    assert 0 < found["guaranteed_gain"] < found["gain_there"]


def test_model_is_concave_and_exact_in_the_limit():
    found = numbers_of("model", penalties=(5, 100, 1000, 10000), num_points=11)
    assert found["curvatures_of_the_model"].max() < 0
    assert found["largest_curvature_of_the_exact_bound"] < 0
    assert found["order_in_kl"] == pytest.approx(0.5, abs=0.02)


def test_climbing_never_steps_down_and_theory_climbs_slowest():
    found = numbers_of("climbing", num_problems=3, num_iterations=25)
    methods = {name: entry for name, entry in found.items() if isinstance(entry, dict)}
    assert all(entry["decreases"] == 0 for entry in methods.values())
    share = {name: entry["median_share_at_the_end"] for name, entry in methods.items()}
    assert min(share, key=share.get) == "MM, C of the theory"
    assert share["TRPO, δ = 0.01"] > 0.99


def test_steps_stay_in_their_circles():
    found = numbers_of("circles", num_iterations=30, num_line_searches=60)
    assert found["longest_step_over_radius"] <= 1 + 1e-9
    assert found["iterations_to_1e-8"]["steepest"] == -1
    assert 0 < found["iterations_to_1e-8"]["trust region"] < 30
    assert found["steps_refused"] > 0


def test_radius_recovers_from_both_sides():
    found = numbers_of("radius")
    assert max(found["ratio_iterations_to_1_percent"].values()) < 15
    assert max(found["ratio_excess_cost_at_the_end"].values()) < 1e-4
    low, _, high = found["divergence_kl_over_target_from_the_4th_step"]
    assert 0.25 < low < high < 4


def test_importance_samples_follow_the_line():
    found = numbers_of("importance", kls=(0.01, 0.16, 0.36), num_batches=30, batch_size=2000)
    assert max(map(abs, found["sigmas_apart"].values())) < 3
    spread = [found[name] for name in ("spread_over_on_policy", "spread_theory")]
    np.testing.assert_allclose(*(list(entry.values()) for entry in spread), rtol=0.1)


def test_reuse_ends_soon_and_sooner_for_trajectories():
    found = numbers_of("reuse", updates=(0, 1, 2, 4), num_batches=30, batch_size=1000)
    assert found["largest_sigmas_apart"] < 3
    np.testing.assert_allclose(list(found["per_decision"].values()), [1, 0.980, 0.923, 0.726], atol=5e-4)
    assert found["trajectory_of_100"][4] < 1e-13


def test_objectives_share_a_gradient_and_not_a_maximum():
    found = numbers_of("objectives", num_points=21, num_steps=400)
    assert found["gradients_differ_at_old_by"] < 1e-12
    assert found["smallest_cosine_on_the_line"] < 0
    assert found["log_prob_departs_from_linear_by"] < 1e-12
    assert found["ratio_curvatures_at_old"].min() < 0 < found["ratio_curvatures_at_old"].max()
    assert found["ascent_of_the_ratio_ends_at"] > 1.9
    assert found["ascent_of_log_prob_ends_at"] == pytest.approx(1.5)


def test_bounds_grow_with_the_horizon_and_the_gain_is_as_predicted():
    found = numbers_of("bounds", num_problems=100, gammas=(0.5, 0.9))
    for name in ("maximum_kl", "mean_kl", "mean_tv"):
        assert found[name][0.9] > 4 * found[name][0.5]
    assert found["mean_tv"][0.9] < found["mean_kl"][0.9] < found["maximum_kl"][0.9]
    np.testing.assert_allclose(list(found["true_gain"].values()), 1, atol=0.03)


def test_judgement_is_good_close_by():
    found = numbers_of("judgement", num_problems=3, num_candidates=8, batch_size=500, sizes=(0.2, 6.0), resamples=50)
    near, far = found["by_size"].values()
    assert near["surrogate_inside_the_interval"] > 0.8
    assert near["rank_correlation_with_the_true_gain"] > 0.9
    assert far["true_gain_inside_the_interval"] < near["true_gain_inside_the_interval"]


@pytest.mark.slow
def test_mean_kl_is_bounded_and_the_largest_is_not():
    found = numbers_of("spread", num_problems=100, num_seeds=8)
    for steps in found.values():
        assert steps["largest_mean_kl_over_delta"] <= 1
        assert steps["median_maximum_kl_over_delta"] > 1.5


@pytest.mark.slow
def test_reuse_keeps_its_samples_effective_and_two_batches_beat_one():
    found = numbers_of("batches", reuses=(1, 2), env_steps=40_000, num_seeds=8)
    assert found["2"]["radius"] == pytest.approx(0.01 / 1.5**2)
    assert all(entry["median_effective_fraction"] > 0.97 for entry in found.values())
    assert found["2"]["iqm_return_of_the_second_half"] > found["1"]["iqm_return_of_the_second_half"] - 5


@pytest.mark.slow
def test_methods_need_samples_in_the_order_of_the_table():
    found = numbers_of("efficiency", env_steps=60_000, num_tuning=4, num_seeds=16)
    needed = [found[name]["iqm_steps_to_475"] for name in ("REINFORCE", "TRPO", "TRPO, 2 batches of half the size")]
    assert needed[0] > 1.2 * needed[1] > 1.2 * needed[2]
