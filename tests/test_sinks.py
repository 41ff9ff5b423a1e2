"""Reports that end a run or a sweep, and where metrics go beside the files of its folder."""

import os

import numpy as np
import pytest

from trpo_jax import Config, continue_run, create_run, run_sweep
from trpo_jax.cli import main
from trpo_jax.runs.metrics import METRICS, read_metrics
from trpo_jax.runs.sinks import open_sink
from trpo_jax.sentences import UsageError
from trpo_jax.sweeps.grids import Spec
from trpo_jax.sweeps.storage import Folder

pytestmark = pytest.mark.long

BASE = {"num_envs": 2, "num_steps": 16, "num_iterations": 4, "cg_iterations": 2}


def test_a_report_ends_a_run_that_then_goes_on_to_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("trpo_jax.runs.runner._CHUNK_SECONDS", 0)
    rows = {}
    for name, reports in (("whole", [lambda progress: None]), ("cut", [lambda p: p.iteration < 2, lambda p: True])):
        run = create_run(tmp_path / name, Config(**BASE), seed=5, num_seeds=2)
        complete = [continue_run(run, report) for report in reports]
        assert complete == [False] * (len(reports) - 1) + [True]
        rows[name] = (run.path / "metrics.csv").read_bytes()
    assert rows["whole"] == rows["cut"]
    fed = []
    run = create_run(tmp_path / "fed", Config(**BASE), seed=5, num_seeds=2)
    assert continue_run(run, sinks=[lambda *row: fed.append(row)])
    table = read_metrics(run.path)
    assert [(seed, steps) for seed, steps, _ in fed] == list(zip(table["seed"], table["env_steps"], strict=True))
    np.testing.assert_allclose([row["mean_kl"] for *_, row in fed], table["mean_kl"], rtol=1e-6)


def test_a_report_ends_a_sweep_and_sinks_get_every_agent(tmp_path):
    spec = Spec(base={**BASE, "eval_every": 2, "eval_episodes": 2}, grid={"gamma": [0.9, 0.99]}, num_seeds=2)
    fed, opened, closed = {}, {}, []

    def open_sinks(part, settings):
        opened[part] = settings["gamma"]
        sink = lambda seed, steps, values: fed.setdefault((part, seed), []).append((steps, values))  # noqa: E731
        return [(sink, lambda: closed.append(part))]

    assert run_sweep(tmp_path, spec, report=lambda progress: False) == "interrupted"
    assert run_sweep(tmp_path, spec, open_sinks=open_sinks) == "complete"
    assert opened == {"point_0": 0.9, "point_1": 0.99} and sorted(set(closed)) == sorted(opened)
    results = Folder(tmp_path).read_results().to_pylist()
    assert len(results) == len(fed) == 4
    for row in results:
        found = fed[f"point_{row['point']}", row["seed"]]
        trained = [(steps, values) for steps, values in found if "mean_kl" in values]
        assert [steps for steps, _ in trained] == [32, 64, 96, 128]
        for name in METRICS:
            np.testing.assert_array_equal([values[name] for _, values in trained], row[name])
        evaluated = [(steps, values["evaluation/mean"]) for steps, values in found if "evaluation/mean" in values]
        assert evaluated == list(zip((64, 128), row["eval_return"], strict=True))


def test_wandb_gets_one_run_per_seed_in_a_group(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setitem(os.environ, "WANDB_MODE", "offline")
    started = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: started.append(options) or init(**options))
    sink, close = open_sink("wandb", tmp_path, {"gamma": 0.9}, part="point_3", wandb_project="mine", wandb_name="first")
    for seed in (0, 1, 0):
        sink(seed, 2048, {"episode_return": 3.0, "penalty": float("nan")})
    close()
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 2
    name = (tmp_path / "wandb_id").read_text()
    assert [options["id"] for options in started] == [f"{name}-point_3-seed_0", f"{name}-point_3-seed_1"]
    assert {(options["project"], options["group"]) for options in started} == {("mine", "first")}
    assert started[1]["config"] == {"gamma": 0.9, "seed": 1}


def test_flags_of_a_sink_that_is_not_asked_for_are_refused(tmp_path, capsys):
    assert main(["train", "--output", str(tmp_path / "run"), "--num-iterations", "1", "--wandb-name", "x"]) == 2
    assert "--wandb-name has no effect without --log wandb; add that." in capsys.readouterr().err


def test_an_unknown_sink_and_a_folder_that_is_none_are_one_sentence(tmp_path):
    with pytest.raises(UsageError, match=r"^there is no sink 'tensorbord'; choose tensorboard or wandb\.$"):
        open_sink("tensorbord", tmp_path, {})
    with pytest.raises(UsageError, match=r"^3 is not the path of a file or folder"):
        open_sink("wandb", 3, {})
