"""Figures that can be trusted: what is timed and what is predicted; and peers that answer or are named."""

import contextlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from probes import Countdown, small_config

from trpo_jax import Config
from trpo_jax.benchmarks import machine, report
from trpo_jax.benchmarks.measure import (
    PARTS,
    measure_many,
    measure_one,
    measure_policy_update,
    measure_time_to,
    time_in_turn,
    update_samples,
)
from trpo_jax.cli import main
from trpo_jax.settings import settings_of
from trpo_jax.training import memory

sys.path.append(str(Path(__file__).parent.parent))
from experiments.throughput import compare, peers


def test_programs_run_in_turn_after_a_warm_up_and_wait_for_their_results():
    order = []

    def program(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)
            return np.zeros(1)

        return run

    seconds = time_in_turn({"short": program("short", 0.001), "long": program("long", 0.02)}, 3)
    assert order == ["short", "long"] * 4
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert seconds["long"].min() >= 0.02 > np.median(seconds["short"])


@pytest.fixture(scope="module")
def result():
    config = small_config(Countdown())
    one, many = measure_one(config, 3), measure_many(config, 32, 2)
    update = measure_policy_update(config, 64, 2)
    reached = measure_time_to(1e9, config, 1, 2 * config.steps_per_iteration)
    parts = {"one_agent": one, "many_agents": many, "policy_update": update, "time_to_threshold": reached}
    return {"setting": machine.setting(), "settings": settings_of(config), "repetitions": 2, **parts}


@pytest.mark.long
def test_the_limit_is_rollout_and_two_gradients(result):
    one = result["one_agent"]
    parts = {name: values["median"] for name, values in one["parts_ms"].items()}
    assert set(parts) == {*PARTS, "value gradient"} and min(parts.values()) > 0
    assert one["limit_ms"] == pytest.approx(parts["rollout"] + parts["gradient"] + parts["value gradient"])
    assert one["iteration_over_limit"] == pytest.approx(one["iteration_ms"]["median"] / one["limit_ms"])
    steps, seconds = one["env_steps_per_second"]["median"], one["iteration_ms"]["median"] / 1e3
    assert steps * seconds == pytest.approx(32)  # medians of an odd number of quotients and of their inverses


@pytest.mark.long
def test_memory_is_predicted_within_a_tenth(result):
    assert result["many_agents"]["memory_bytes"] > 0
    assert result["many_agents"]["predicted_over_measured_memory"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("num_agents", [4, 16, 32, 1000])
def test_memory_of_few_and_of_many_agents_may_lie_on_two_lines(num_agents, monkeypatch):
    monkeypatch.setattr(memory, "compile_agents", lambda config, agents, iterations: agents)
    monkeypatch.setattr(memory, "program_memory", lambda agents: max(5_000 + 160 * agents, 250 * agents))
    assert memory.predict_memory(small_config(Countdown()), num_agents) == max(
        5_000 + 160 * num_agents, 250 * num_agents
    )


def test_the_plain_update_is_ours(result):
    update = result["policy_update"]
    assert update["largest_difference"] < 1e-3 * update["largest_change"]


def test_a_return_out_of_reach_is_never_and_costs_no_more_than_allowed(result):
    assert result["time_to_threshold"]["seconds"] == result["time_to_threshold"]["env_steps"] == math.inf


def test_a_return_within_reach_takes_one_iteration():
    config = small_config(Countdown())
    reached = measure_time_to(-1e9, config, 1, 10 * config.steps_per_iteration)
    assert reached["env_steps"] == config.steps_per_iteration and 0 < reached["seconds"] < 10


def test_tables_say_what_the_figures_are(result):
    found = report.tables(result)
    text = "\n".join(" ".join(row) for _, _, rows in found for row in rows)
    for phrase in ("line search", "limit", "memory of 32 agents", "inf"):
        assert phrase in text, phrase
    assert f"{result['setting']['cores']} cores" in found[0][0]


def test_a_busy_machine_is_reported():
    assert report.warning_of(None) is None and report.warning_of(0.05) is None
    assert "other programs take 62% of the processors" in report.warning_of(0.62)


def test_work_of_others_is_seen_and_their_absence_is(monkeypatch):
    ticks = iter([(100, 1000), (160, 1200), (160, 1200), (160, 1400)])
    monkeypatch.setattr(machine, "_ticks", lambda: next(ticks))
    assert machine.busy_share(0.0) == 0.3 and machine.busy_share(0.0) == 0.0
    monkeypatch.undo()
    found = machine._ticks()
    assert (found is not None) == Path("/proc/stat").exists()  # only Linux tells
    assert found is None or 0 < found[0] < found[1]


def test_a_figure_names_its_machine_flags_and_commit(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    found = machine.setting()
    assert found["processor"] and found["flags"]["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false"
    in_repository = (Path(machine.__file__).parents[2] / ".git").exists()
    assert found["command"] and (len(found["commit"]) in (12, 13) if in_repository else found["commit"] is None)


def test_what_compares_with_others_is_named(capsys):
    assert main(["benchmark", "--compare", "rejax"]) == 2
    assert "compared by `python experiments/throughput/run.py` instead" in capsys.readouterr().err


WORKER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    print("a library's greeting")
    if request["do"] == "stop":
        sys.exit("out of luck")
    print(json.dumps({"sum": sum(request["numbers"]), "trpo_jax": "trpo_jax" in sys.modules}), flush=True)
"""


@pytest.mark.long
def test_a_peer_answers_from_its_own_environment_or_says_why_it_stopped(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    peer = peers.Peer("somebody", str(worker), ())
    with peers.running(peer) as ask:
        assert ask("add", numbers=[1, 2]) == {"sum": 3, "trpo_jax": False}
        with pytest.raises(peers.PeerError, match="somebody stopped: out of luck"):
            ask("stop")


@pytest.mark.long
def test_a_peer_that_cannot_be_installed_is_named(monkeypatch):
    absent = peers.Peer("somebody", "none.py", (("--no-index", "no-such-distribution==1"),))
    monkeypatch.setitem(peers.PEERS, "somebody", absent)
    answer = compare.compare("somebody", small_config(Countdown()))
    assert answer["error"].startswith("somebody could not be installed: ERROR: No matching distribution found")
    assert compare.rows("somebody", answer) == [("somebody", answer["error"])]


@pytest.fixture
def echo(monkeypatch):
    """A peer that answers each request at once with one second; the requests that it got."""
    requests = []

    @contextlib.contextmanager
    def running(peer, environments):
        def ask(do, **request):
            requests.append((do, request))
            return {"seconds": [1.0] if do == "policy update" else 1.0, "env_steps": 64.0}

        yield ask

    monkeypatch.setattr(compare, "running", running)
    monkeypatch.setattr(compare, "SAMPLES", 64)
    return requests


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.PEERS)
def test_a_comparison_has_every_figure_of_both_sides(name, echo):
    config = Config(num_envs=2, num_steps=16, gamma=0.9, cg_iterations=2)
    found = compare.compare(name, config, repetitions=1, num_agents=2, threshold=-1.0, seeds=range(1))
    assert {"num_envs": 2, "num_steps": 16, "gamma": 0.9, "env": "CartPole-v1"}.items() <= echo[0][1].items()
    assert found["theirs_env_steps_per_second"]["median"] == 32
    assert found["speed_ratio"] == pytest.approx(found["ours_env_steps_per_second"]["median"] / 32)
    if name == "rejax":
        both = found["many_agents"], found["time_to_threshold"]
        assert both[0]["theirs_env_steps_per_second"]["median"] == 64 and both[1]["env_steps_ratio"] == 2048 / 64
    text = "\n".join(" ".join(row) for row in compare.rows(name, found))
    assert text.count("÷") > 4 and "nan" not in text


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--repetitions", "0"], "repetitions must be a whole number from 1 to 10,000, got 0."),
        (["--output", "no/such/folder/b.json"], "there is no folder no/such/folder"),
        (["--picture", "curves.png"], "--picture needs a curve"),
        (["--num-agents", "1,2", "--picture", "no/such/folder/b.png"], "there is no folder no/such/folder"),
        (["--num-agents", "1,2", "--picture", "curves.jpg"], "--picture must name a file that ends in .png"),
        (["--env-counts", "0,2"], "num_envs must be"),
        (["CartPol-v1"], "did you mean CartPole-v1"),
        (["--network", "gru"], "with networks that are not recurrent"),
        (["--update", "ppo"], "measures the parts of update=trpo"),
    ],
)
def test_bad_input_to_the_command_is_one_sentence(arguments, sentence, capsys):
    assert main(["benchmark", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, settings",
    [
        ([], {"env": "CartPole-v1", "num_envs": 64, "max_kl": 0.01}),
        (["--preset", "minatar"], {"env": "CartPole-v1", "num_steps": 32, "gae_lambda": 0.8}),
        (["Breakout-MinAtar", "--preset"], {"env": "Breakout-MinAtar", "num_steps": 128, "max_kl": 0.03}),
        (["--config", "mine.toml"], {"env": "Pendulum-v1", "num_envs": 8, "max_kl": 0.02}),
        (
            ["Acrobot-v1", "--config", "mine.toml", "--max-kl", "0.5"],
            {"env": "Acrobot-v1", "num_envs": 8, "max_kl": 0.5},
        ),
    ],
)
def test_the_command_measures_the_settings_of_a_preset_a_file_and_flags(
    arguments, settings, tmp_path, monkeypatch, capsys
):
    (tmp_path / "mine.toml").write_text('env = "Pendulum-v1"\nnum_envs = 8\nmax_kl = 0.02\nclip_ratio = 0.3\n')
    monkeypatch.chdir(tmp_path)
    measured = []

    def stop(config, **options):
        measured.append(settings_of(config))
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "run_benchmark", stop)
    assert main(["benchmark", *arguments]) == 130
    assert settings.items() <= measured[0].items()
    idle = "note: clip_ratio in mine.toml" in capsys.readouterr().err
    assert idle == ("--config" in arguments)


@pytest.mark.parametrize(
    "settings, samples", [({}, 65_536), ({"hidden": (256, 256)}, 8192), ({"hidden": (8192, 8192)}, 256)]
)
def test_a_large_policy_is_measured_on_fewer_samples(settings, samples):
    assert update_samples(Config(**settings)) == samples


def test_a_long_measurement_says_how_long_it_takes(monkeypatch):
    def result(*_):
        return {"iteration_ms": {"median": 500.0}}

    for name in ("measure_one", "measure_policy_update", "measure_many", "measure_environments"):
        monkeypatch.setattr(report, name, result)
    said = []
    options = {"num_agents": [1, 64], "env_counts": [64, 256], "threshold": None, "num_seeds": 1, "max_steps": 1}
    report.run_benchmark(Config(num_envs=64), repetitions=7, report=said.append, **options)
    assert said[1:] == [
        "a policy update of 65,536 samples",
        "1 agent (up to 2 minutes)",
        "64 agents (up to 40 minutes)",
        "one agent with 64 environments (up to 1 minute)",
        "one agent with 256 environments (up to 5 minutes)",
    ]


@pytest.mark.slow
def test_the_command_writes_every_figure(tmp_path, capsys, monkeypatch):
    file = tmp_path / "benchmark.json"
    tiny = ["--num-envs", "2", "--num-steps", "16", "--num-agents", "1,3", "--repetitions", "1", "--num-seeds", "1"]
    tiny += ["--env-counts", "2,4", "--threshold-steps", "64", "--output", str(file)]
    picture = tmp_path / "curves.png"
    assert main(["benchmark", *tiny, "--picture", str(picture)]) == 0
    written = json.loads(file.read_text())
    assert written["settings"]["num_envs"] == 2 and written["many_agents"]["num_agents"] == 3
    assert [row["num_agents"] for row in written["agents_curve"]] == [1, 3]
    assert [row["num_envs"] for row in written["environments_curve"]] == [2, 4]
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "env steps/s" in out and "double backward: " in out
    found = written | {"time_to_threshold": written["time_to_threshold"] | {"seconds": math.inf}}
    monkeypatch.setattr(report, "run_benchmark", lambda *arguments, **options: found)
    assert main(["benchmark", *tiny, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["time_to_threshold"].pop("seconds") is None
    found["time_to_threshold"].pop("seconds")
    assert printed == found
