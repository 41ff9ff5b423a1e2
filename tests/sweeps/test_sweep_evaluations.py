"""Evaluation during training in sweeps and searches: the same figures as a run alone, and what they decide."""

import jax
import numpy as np
import pytest

from trpo_jax import Config, sweep, train
from trpo_jax.sweeps.grids import Spec
from trpo_jax.sweeps.in_folder import run_sweep
from trpo_jax.sweeps.search import tune
from trpo_jax.sweeps.storage import Folder

pytestmark = pytest.mark.long

SMALL = Config(num_envs=2, num_steps=32, cg_iterations=2, num_iterations=5, eval_every=2, eval_episodes=4)
GRID = {"gamma": [0.9, 0.99]}
BASE = {name: getattr(SMALL, name) for name in ("num_envs", "num_steps", "num_iterations", "cg_iterations")}
JUDGED = {**BASE, "eval_every": 2, "eval_episodes": 4}


@pytest.fixture(scope="module")
def alone():
    """The evaluations and the metrics of the agent with γ = .9 and the first of two keys, by `train`."""
    key = jax.random.split(jax.random.key(3), 2)[0]
    _, metrics, evaluation = jax.jit(train)(SMALL.replace(gamma=0.9), key)
    return metrics, np.asarray(evaluation.episode_return).mean(axis=1)


@pytest.fixture(scope="module")
def evaluated():
    """The sweep without a goal."""
    return sweep(SMALL, GRID, jax.random.key(3), num_seeds=2, num_episodes=0)


def test_a_sweep_evaluates_each_agent_as_train_does(alone, evaluated):
    metrics, means = alone
    assert evaluated.eval_return.shape == (2, 2, 2)
    np.testing.assert_array_equal(evaluated.eval_return[0, 0], means)
    np.testing.assert_array_equal(evaluated.metrics.mean_kl[0, 0], metrics.mean_kl)


def test_an_agent_that_has_reached_the_goal_stands_still_and_others_go_on(evaluated):
    first = evaluated.eval_return[..., 0]
    goal, everyone = float(np.median(first)), 0.0
    found = sweep(SMALL.replace(stop_at_return=goal), GRID, jax.random.key(3), num_seeds=2, num_episodes=0)
    learned = np.isfinite(found.metrics.mean_kl)
    reached = first >= goal
    assert reached.any() and not reached.all()
    assert (learned.sum(axis=-1) == 2).tolist() == reached.tolist()
    np.testing.assert_array_equal(found.metrics.mean_kl[learned], evaluated.metrics.mean_kl[learned])
    np.testing.assert_array_equal(found.eval_return[reached], np.repeat(first[reached][:, None], 2, axis=1))
    found = sweep(SMALL.replace(stop_at_return=everyone), GRID, jax.random.key(3), num_seeds=2, num_episodes=0)
    assert (np.isfinite(found.metrics.mean_kl).sum(axis=-1) == 2).all()
    np.testing.assert_array_equal(found.eval_return, np.repeat(first[..., None], 2, axis=-1))


def test_a_sweep_in_a_folder_goes_on_to_the_same_columns(tmp_path, monkeypatch):
    spec = Spec(base={**JUDGED, "stop_at_return": 22.0}, grid=GRID, num_seeds=2, num_episodes=0)
    assert run_sweep(tmp_path / "whole", spec) == "complete"
    monkeypatch.setattr("trpo_jax.runs.runner._CHUNK_SECONDS", 0)

    class KilledError(Exception):
        pass

    def kill(progress):
        if progress.iteration == 4:
            raise KilledError

    with pytest.raises(KilledError):
        run_sweep(tmp_path / "cut", spec, checkpoint_seconds=0, report=kill)
    assert run_sweep(tmp_path / "cut", spec) == "complete"
    (whole,), (cut,) = ((tmp_path / name / "results").glob("*.parquet") for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    whole = Folder(tmp_path / "whole").read_results()
    means = np.array(whole["eval_return"].to_pylist())
    assert means.shape == (4, 2)
    stopped = [row.index(True) * 2 + 2 if any(row) else None for row in (means >= 22).tolist()]
    assert whole["stopped_at"].to_pylist() == stopped
    assert len({at is None for at in stopped}) == 2, "a goal that some reach and others do not"


def test_a_search_ranks_by_the_last_evaluation(tmp_path, monkeypatch):
    scored = []
    ranked = "trpo_jax.sweeps.halving.interquartile_mean"
    monkeypatch.setattr(ranked, lambda values: scored.append(np.array(values)) or np.mean(values))
    monkeypatch.setattr("trpo_jax.sweeps.halving.training_return", lambda metrics: pytest.fail("not by training"))
    space = {"count": 2, "gamma": {"uniform": [0.9, 0.99]}}
    spec = Spec(base={**JUDGED, "num_iterations": 8}, random=space, num_seeds=2, num_episodes=0)
    _, score = tune(tmp_path, spec, batch=2)
    assert np.isfinite(score) and all(np.isfinite(values).all() for values in scored) and len(scored) == 4
