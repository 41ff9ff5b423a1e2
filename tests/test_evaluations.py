"""Evaluation during a run: eval.csv, the best policies, stopped agents, kept checkpoints; none leaves a mark."""

import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trpo_jax import Config, UsageError, load, train
from trpo_jax.cli import main
from trpo_jax.runs.continuing import continue_run
from trpo_jax.runs.evaluations import Evaluator, best_states, evaluate_best, read_evaluations
from trpo_jax.runs.folders import chosen_state, create_run, newest_state, open_run
from trpo_jax.runs.learning_curve import plot_learning_curve
from trpo_jax.runs.metrics import read_metrics
from trpo_jax.training.evaluation import Evaluation, evaluate_in_training

pytestmark = pytest.mark.long

CONFIG = Config(num_envs=2, num_steps=32, cg_iterations=2, num_iterations=7, eval_every=3, eval_episodes=6)


def begin(path, config=CONFIG, num_seeds=2, **options):
    return create_run(path, config, seed=3, num_seeds=num_seeds, **options)


def contents(run):
    files = [run.path / "metrics.csv", run.path / "eval.csv", *sorted((run.path / "checkpoints").glob("*.npz"))]
    return {file.relative_to(run.path): file.read_bytes() for file in files if file.exists()}


@pytest.fixture(scope="module")
def logged():
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory, logged):
    run, seen = begin(tmp_path_factory.mktemp("evaluations") / "run", keep_every=2), []
    assert continue_run(run, seen.append, [lambda *row: logged.append(row)])
    assert np.isnan(seen[0].evaluation) and seen[-1].evaluation == np.mean(means_of(run)[-2:])
    return run


def means_of(run):
    return [np.float32(values["mean"]) for *_, values in read_evaluations(run.path)]


@pytest.fixture(scope="module")
def alone():
    """What `train` gives for the same agents: (state, metrics, evaluations)."""
    return jax.jit(jax.vmap(train, in_axes=(None, 0)))(CONFIG, jax.vmap(jax.random.key)(np.arange(3, 5)))


def test_rows_are_those_of_train(run, alone, logged):
    rows = list(read_evaluations(run.path))
    assert [row[:3] for row in rows] == [(3, 192, 3), (3, 192, 4), (6, 384, 3), (6, 384, 4)]
    returns = np.asarray(alone[2].episode_return).transpose(1, 0, 2).reshape(4, 6)
    for (*_, values), expected in zip(rows, returns, strict=True):
        half = 2.5705818 * expected.std(ddof=1) / np.sqrt(6)  # Student's t of five degrees of freedom, 97.5 %
        assert values["mean"] == pytest.approx(expected.mean()) and values["finished"] == 1
        assert values["length"] == pytest.approx(values["mean"])  # CartPole pays 1 per step
        found = [values[name] for name in ("std", "low", "high")]
        wanted = [expected.std(), expected.mean() - half, expected.mean() + half]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    told = [
        (seed, steps, np.float32(row["evaluation/mean"])) for seed, steps, row in logged if "evaluation/mean" in row
    ]
    assert told == [(seed, steps, np.float32(values["mean"])) for _, steps, seed, values in rows]


def test_training_has_the_same_bits_without_it(run, tmp_path):
    plain = begin(tmp_path / "plain", CONFIG.replace(eval_every=0))
    assert continue_run(plain, lambda _: None)
    assert (plain.path / "metrics.csv").read_bytes() == (run.path / "metrics.csv").read_bytes()
    assert not (plain.path / "eval.csv").exists() and not (plain.path / "checkpoints" / "best.npz").exists()
    ours, theirs = newest_state(run), newest_state(plain)
    for a, b in zip(jax.tree.leaves(ours.learner), jax.tree.leaves(theirs.learner), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_cut_and_continued_is_the_same(run, tmp_path):
    cut = begin(tmp_path / "cut", keep_every=2)

    def die_at(iteration):
        def report(progress):
            if progress.iteration >= iteration:
                raise KeyboardInterrupt

        return report

    for iteration in (1, 3, 5):
        with pytest.raises(KeyboardInterrupt):
            continue_run(open_run(cut.path), die_at(iteration))
        # Rows whose state did not reach the disk.
        with open(cut.path / "eval.csv", "a") as file:
            file.write("6,384,3,1")
    assert continue_run(open_run(cut.path), lambda _: None)
    ours, theirs = contents(cut), contents(run)
    newest = [name for name in theirs if name.stem in ("metrics", "eval", "best", "00000002", "00000004", "00000007")]
    assert {name: ours[name] for name in newest} == {name: theirs[name] for name in newest}


def test_rows_and_best_policies_that_are_missing_are_said_and_made_anew(run, tmp_path, capsys):
    shutil.copytree(run.path, tmp_path / "run")
    text = (tmp_path / "run" / "eval.csv").read_text()
    (tmp_path / "run" / "eval.csv").write_text(text[:-3])
    (tmp_path / "run" / "checkpoints" / "best.npz").write_bytes(b"")
    again = open_run(tmp_path / "run")
    assert continue_run(again, lambda _: None)
    said = capsys.readouterr().err
    assert "eval.csv lacks rows of the 7 iterations done; the checkpoint before it is used, 00000004.npz." in said
    assert (again.path / "eval.csv").read_text() == text
    assert (
        "best.npz is damaged or not a checkpoint of trpo_jax (BadZipFile); the best policies are chosen again" in said
    )
    assert np.asarray(best_states(again).iteration).tolist() == [6, 6]
    assert [best.chosen_by for best in evaluate_best(again)] == means_of(run)[-2:]


def test_a_finished_run_without_its_best_policies_is_finished(run, tmp_path, capsys):
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "best.npz").unlink()
    assert main(["resume", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert "there is no checkpoint" in said.err and "Best by evaluation" not in said.out
    assert "All iterations are done already." in said.out and "Next: " in said.out


def test_the_best_is_the_state_that_was_evaluated_and_is_evaluated_anew(run):
    table = np.array(means_of(run)).reshape(2, 2)  # evaluations, seeds
    best, found = best_states(run), evaluate_best(run)
    chosen = table.argmax(axis=0)  # the first of equal ones
    assert np.asarray(best.iteration).tolist() == [3 * (i + 1) for i in chosen]
    for i in range(2):
        state = jax.tree.map(lambda leaf, i=i: leaf[i], best)
        assert float(evaluate_in_training(CONFIG, state).episode_return.mean()) == pytest.approx(table[chosen[i], i])
        anew = evaluate_in_training(CONFIG, state, anew=True).episode_return
        assert found[i][:3] == (3 + i, int(state.iteration), table[chosen[i], i])
        assert found[i].mean == pytest.approx(float(anew.mean())) and found[i].low < found[i].mean < found[i].high


def test_checkpoints_are_kept_and_chosen(run, capsys):
    kept = sorted(file.name for file in (run.path / "checkpoints").glob("*.npz"))
    assert kept == ["00000002.npz", "00000004.npz", "00000006.npz", "00000007.npz", "best.npz"]
    for which, iterations in (("last", [7, 7]), ("4", [4, 4]), ("best", np.asarray(best_states(run).iteration))):
        assert np.asarray(chosen_state(run, which).iteration).tolist() == list(iterations)
        assert main(["evaluate", str(run.path), "--checkpoint", which, "--num-episodes", "2"]) == 0
    assert int(load(run.path / "checkpoints" / "00000002.npz", CONFIG).iteration[0]) == 2
    capsys.readouterr()
    for which, sentence in {
        "5": "has no checkpoint of iteration 5; it has those of 2, 4, 6, 7 (--keep-every keeps more).",
        "x": "checkpoint must be best, last or a number of iterations, got 'x'.",
    }.items():
        assert main(["export", str(run.path), "--checkpoint", which]) == 2
        assert sentence in capsys.readouterr().err


def test_without_evaluation_there_is_no_best(tmp_path, capsys):
    plain = begin(tmp_path / "plain", CONFIG.replace(eval_every=0, num_iterations=1))
    with pytest.raises(UsageError, match=r"was trained without evaluation \(eval_every=0\); use --checkpoint last"):
        chosen_state(plain, "best")
    with pytest.raises(UsageError, match="has no evaluation yet; train it further, or use --checkpoint last"):
        chosen_state(begin(tmp_path / "begun"), "best")
    with pytest.raises(UsageError, match="has no checkpoint of iteration 3; train first"):
        chosen_state(plain, "3")


def test_an_agent_that_has_reached_its_goal_stays_and_all_of_them_end_the_run(run, tmp_path):
    first = np.array(means_of(run))[:2]
    assert first[0] != first[1]
    fast = int(first.argmax())
    goal = float(first.mean())
    config = CONFIG.replace(stop_at_return=goal)
    stopping = begin(tmp_path / "stopping", config)
    assert continue_run(stopping, lambda _: None)
    iterations = np.asarray(newest_state(stopping).iteration)
    assert iterations[fast] == 3 and iterations[1 - fast] > 3
    metrics, whole = read_metrics(stopping.path), read_metrics(run.path)
    for agent, last in enumerate(iterations):
        kl, expected = (table["mean_kl"][table["seed"] == 3 + agent] for table in (metrics, whole))
        np.testing.assert_array_equal(kl[:last], expected[:last])
        assert np.isnan(kl[last:]).all()
    evaluated = [seed for _, _, seed, _ in read_evaluations(stopping.path)]
    assert evaluated.count(3 + fast) == 1
    state, *_ = jax.jit(jax.vmap(train, in_axes=(None, 0)))(config, stopping.keys)
    assert np.asarray(state.iteration).tolist() == iterations.tolist()

    done = begin(tmp_path / "done", CONFIG.replace(stop_at_return=1.0))
    reports = []
    assert continue_run(done, reports.append) and reports[-1].iteration == 3
    assert continue_run(open_run(done.path), lambda _: pytest.fail("it goes on"))


def test_a_policy_without_a_score_gives_way_to_the_first_with_one(run):
    evaluator = Evaluator(run, "")
    kept = []
    evaluator.file = SimpleNamespace(append=lambda *_: None)
    evaluator._keep = lambda states, improved: kept.append(improved.tolist())
    for done, means in enumerate(([np.nan, 1], [np.nan, 0], [-5, 2], [np.nan, np.nan], [-6, 3]), 1):
        returns = jnp.repeat(jnp.float32(means)[:, None], 6, axis=1)
        evaluator.program = lambda *_, r=returns: Evaluation(r, jnp.ones((2, 6), jnp.int32), jnp.ones((2, 6), bool))
        evaluator(SimpleNamespace(done=3 * done, states=None))
    assert kept == [[True, True], [True, False], [True, True], [False, True]]
    np.testing.assert_array_equal(evaluator._best, [-5, 3])


def test_one_agent_alone_stops(tmp_path):
    run = begin(tmp_path / "one", CONFIG.replace(stop_at_return=1.0), num_seeds=1)
    assert continue_run(run, lambda _: None)
    assert np.asarray(newest_state(run).iteration).tolist() == [3]


def test_the_learning_curve_has_both(run, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = {}, Axes.plot

    def watch(self, x, y, **options):
        drawn[options.get("label")] = np.asarray(x), np.asarray(y)
        return plot(self, x, y, **options)

    monkeypatch.setattr(Axes, "plot", watch)
    plot_learning_curve(run)
    steps, means = drawn["evaluation"]
    assert steps.tolist() == [192, 384] and "mean of 2 seeds" in drawn
    np.testing.assert_allclose(means, np.array(means_of(run)).reshape(2, 2).mean(axis=1))


def test_the_command_evaluates_the_best_anew_before_it_quotes_it(tmp_path, capsys):
    settings = ["--num-envs=2", "--num-steps=32", "--cg-iterations=2", "--num-iterations=4"]
    evaluation = ["--eval-every=2", "--eval-episodes=3", "--eval-stochastic", "--keep-every=1"]
    assert main(["train", *settings, *evaluation, "--output", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    (best,) = evaluate_best(open_run(tmp_path / "run"))
    assert "Best by evaluation, evaluated again on 3 episodes" in printed
    row = next(line.split() for line in printed.splitlines() if line.startswith("0 "))
    assert row[:3] == ["0", str(best.iteration), f"{best.mean:.1f}"] and row[-1] == f"{best.chosen_by:.1f}"
    assert len(list((tmp_path / "run" / "checkpoints").glob("0*.npz"))) == 4
    for flags, how in (([], "sampled actions"), (["--no-stochastic"], "deterministic actions")):
        assert main(["evaluate", str(tmp_path / "run"), "--num-episodes=3", *flags]) == 0
        assert how in capsys.readouterr().out
    assert main(["train", *settings, "--eval-episodes=3", "--output", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "eval_episodes needs eval_every=1 or more; with eval_every=0 it has no effect; leave it out." in error
