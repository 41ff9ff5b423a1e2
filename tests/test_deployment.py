"""A trained policy elsewhere: in Gymnasium's own environments, as StableHLO, and its metrics in other places."""

import dataclasses
import functools
import re
import runpy
import struct
import sys
from ctypes.util import find_library
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from PIL import Image
from tensorboardX.proto import event_pb2

from trpo_jax import (
    Categorical,
    Config,
    DiagonalGaussian,
    MultiCategorical,
    Network,
    UsageError,
    evaluate,
    init,
    make_environment,
    train,
)
from trpo_jax.cli import main
from trpo_jax.deployment import acting_policy, export_policy
from trpo_jax.environments.base import Box, Discrete
from trpo_jax.playing import play
from trpo_jax.runs.folders import open_run
from trpo_jax.runs.metrics import read_metrics
from trpo_jax.runs.sinks import open_sink

SMALL = {"num_envs": 2, "num_steps": 8, "num_iterations": 2, "cg_iterations": 2, "value_cg_iterations": 2}


@pytest.fixture(scope="module")
def trained():
    """CartPole after 20,480 steps: far better than chance, which lasts about 20 steps."""
    config = Config(num_iterations=10, max_kl=0.03)
    return config, jax.jit(train)(config, jax.random.key(0))[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two small agents, logged to TensorBoard."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert main(["train", "--output", str(folder), "--num-seeds", "2", "--log", "tensorboard", *flags]) == 0
    return folder


def test_the_policy_is_as_good_in_another_implementation_of_the_world(trained):
    config, state = trained
    here = np.asarray(evaluate(config, state, jax.random.key(0), num_episodes=32).episode_return)
    there = play(config, state, "CartPole-v1", num_episodes=8, seed=1)
    assert there.shape == (8,) and there.mean() > 100
    error = np.hypot(here.std() / np.sqrt(32), there.std() / np.sqrt(8))
    assert abs(here.mean() - there.mean()) < 4 * error + 10
    np.testing.assert_array_equal(play(config, state, "CartPole-v1", num_episodes=2, seed=1), there[:2])


def test_real_actions_are_given_in_their_bounds_and_shape():
    config = Config(env="Pendulum-v1", initial_log_std=3.0, **SMALL)
    state = init(config, jax.random.key(0))
    assert (play(config, state, "Pendulum-v1", num_episodes=1) < 0).all()
    act, _ = acting_policy(config, state)
    _, action = act((), 1e6 * jnp.ones((4, 3)))
    assert action.shape == (4, 1) and (abs(action) <= 2).all()


def test_a_memory_is_played_from_its_start():
    config = Config(network="gru", **SMALL)
    state = init(config, jax.random.key(0))
    assert play(config, state, "CartPole-v1", num_episodes=2).min() >= 8


@pytest.mark.parametrize(
    "env, message",
    [
        ("Pendulum-v1", r"Pendulum-v1 observes Box.* trained on observations of shape \(4,\); choose another --env\.$"),
        ("Nothing-v0", r"Gymnasium cannot make Nothing-v0 \(.*\); name one of its environments with --env, or"),
    ],
)
def test_another_world_is_refused_in_one_sentence(env, message, trained):
    with pytest.raises(UsageError, match=message) as caught:
        play(*trained, env)
    assert "\n" not in str(caught.value)


def test_other_actions_are_refused():
    config = Config(env="MountainCar-v0", **SMALL)
    with pytest.raises(UsageError, match=r"MountainCarContinuous-v0 takes actions of Box.*trained on Discrete\(3\)"):
        play(config, init(config, jax.random.key(0)), "MountainCarContinuous-v0")


@pytest.mark.long
def test_a_picture_of_an_episode(trained, tmp_path):
    file = tmp_path / "new" / "cartpole.gif"
    returns = play(*trained, "CartPole-v1", num_episodes=1, video=file)
    with Image.open(file) as picture:
        assert returns[0] / 4 < picture.n_frames <= min(500, returns[0])  # equal ones in a row are one
        assert picture.width == 300
        first = np.asarray(picture.convert("L"), float)
        picture.seek(picture.n_frames - 1)
        assert np.abs(np.asarray(picture.convert("L"), float) - first).max() > 50  # something moved


def test_mujoco_is_drawn_without_a_screen(tmp_path, monkeypatch):
    pytest.importorskip("mujoco", reason="needs the extra gymnasium")
    if not find_library("EGL"):  # MuJoCo draws with it where there is no screen; no Python package installs it
        pytest.skip("needs the system's libegl1")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    config = Config(env="gymnasium/Hopper-v5", **SMALL)
    play(config, init(config, jax.random.key(0)), "Hopper-v5", num_episodes=1, video=tmp_path / "hopper.gif")
    with Image.open(tmp_path / "hopper.gif") as picture:
        assert picture.n_frames > 1 and len(picture.convert("L").getcolors()) > 8


def test_what_cannot_be_drawn_is_refused_in_one_sentence(trained, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("no screen.\nA second line")

    monkeypatch.setattr(gymnasium.core.Wrapper, "render", fail)
    with pytest.raises(UsageError, match=r"^CartPole-v1 cannot be drawn here \(no screen\); play without pictures"):
        play(*trained, "CartPole-v1", num_episodes=1, video=tmp_path / "none.gif")
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "Breakout-MinAtar"])
def test_an_exported_policy_acts_as_the_agent_does(env, tmp_path):
    config = Config(env=env, normalize_observations=True, **SMALL)
    state = init(config, jax.random.key(0))
    exported = jax.export.deserialize(bytearray(export_policy(config, state, tmp_path).read_bytes()))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    act, _ = acting_policy(config, state)
    for batch in (1, 5):
        observation = jax.random.normal(jax.random.key(batch), (batch, *state.actor.observation.shape[1:]))
        np.testing.assert_allclose(exported.call(observation), act((), observation)[1], rtol=1e-5, atol=1e-6)


class Memory(NamedTuple):
    """A carry of a class of the user's."""

    short: Any
    long: Any


def two_leaves(make):
    """A policy on CartPole with a memory of two arrays that does not start at zero: it acts by both."""

    def apply(params, carry, observation):
        short, long = jax.tree.leaves(carry)
        after = make(short + observation[..., 0:2], long * 0.5)
        logits = (
            params["w"] * (after[0] if isinstance(after, tuple) else after["a"]) + jax.tree.leaves(after)[1][..., :2]
        )
        return after, Categorical(logits)

    start = make(jnp.array([0.0, 2.0]), jnp.array([3.0, -1.0, 7.0]))
    return Network(lambda key, observation: {"w": jnp.ones(2)}, apply, lambda: start)


def forbidding(environment):
    """The same environment, in which only the last action is allowed."""
    number = environment.action_space.n
    mask = lambda observation: jnp.broadcast_to(jnp.arange(number) == number - 1, (*observation.shape[:-1], number))  # noqa: E731
    return dataclasses.replace(environment, action_mask=mask)


EXPORTED = {
    "no memory": {},
    "normalised": {"normalize_observations": True},
    "gated unit": {"network": "gru"},
    "two arrays": {"policy": two_leaves(lambda a, b: (a, b))},
    "a dictionary": {"policy": two_leaves(lambda a, b: {"a": a, "b": b})},
    "a class": {"policy": two_leaves(Memory)},
    "masked": {"env": forbidding(make_environment("CartPole-v1"))},
}


@pytest.mark.long
@pytest.mark.parametrize("settings", EXPORTED.values(), ids=EXPORTED.keys())
def test_the_script_beside_an_export_acts_as_the_agent_does(settings, tmp_path, capsys):
    config = Config(**{**SMALL, **settings})
    state = init(config, jax.random.key(0))
    file = export_policy(config, state, tmp_path)
    act, carry = acting_policy(config, state)
    carry = jax.tree.map(lambda leaf: jnp.repeat(leaf, 3, axis=0), carry)
    observation = jnp.zeros((3, 4))
    after, expected = act(carry, observation)
    runpy.run_path(str(tmp_path / "load_policy.py"))  # needs nothing of trpo_jax
    assert capsys.readouterr().out.split() == str(np.asarray(expected)).split()
    assert "trpo_jax" not in re.findall(r"^(?:from|import) (\w+)", (tmp_path / "load_policy.py").read_text(), re.M)
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    for _ in range(3 if jax.tree.leaves(carry) else 0):  # of the second step, too
        (inputs, _), _ = jax.tree.unflatten(exported.in_tree, [*jax.tree.leaves(carry), observation])
        carry, expected = act(carry, observation)
        after, action = exported.call(inputs, observation)
        np.testing.assert_array_equal(action, expected)
        for mine, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(carry), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-6)
        observation = observation + 1


def test_a_disk_that_takes_no_files_is_one_sentence(tmp_path):
    config = Config(**SMALL)
    trained = config, init(config, jax.random.key(0))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UsageError, match=r"^cannot write .*policy\.stablehlo: .*; choose another --output\.$"):
        export_policy(*trained, tmp_path / "file" / "policy")
    with pytest.raises(UsageError, match=r"^cannot write .*x\.gif: .*; choose another --output\.$"):
        play(*trained, "CartPole-v1", num_episodes=1, video=tmp_path / "file" / "x.gif")
    (tmp_path / "x.gif").mkdir()
    with pytest.raises(UsageError, match=r"^cannot write .*x\.gif: .*; choose another --output\.$"):
        play(*trained, "CartPole-v1", num_episodes=1, video=tmp_path / "x.gif")
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")] == []


class Puzzle(gymnasium.Env):
    """Pays 1 for the action that the observation stands for, which is one of two, in turn. Four steps."""

    def __init__(self, action_space, actions, observation_space, observations, render_mode=None):
        self.action_space, self.observation_space = action_space, observation_space
        self.actions, self.observations = actions, observations

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observations[0], {}

    def step(self, action):
        assert self.action_space.contains(action), action
        right = bool(np.all(np.asarray(action) == np.asarray(self.actions[self.time % 2])))
        self.time += 1
        return self.observations[self.time % 2], [float(right)], False, False, {}


LINE = spaces.Box(-1, 1, (2,)), [np.array([1, -1], np.float32), np.array([-1, 1], np.float32)]
BYTES = spaces.Box(0, 255, (3, 3, 1), np.uint8), [np.zeros((3, 3, 1), np.uint8), np.full((3, 3, 1), 255, np.uint8)]
NESTED = (
    spaces.Dict(a=spaces.Tuple((spaces.Discrete(2, start=5), spaces.MultiBinary(2))), b=spaces.Box(-1, 1, (1, 2))),
    [{"a": (np.int64(5 + i), np.array([i, 1], np.int8)), "b": np.full((1, 2), i, np.float32)} for i in range(2)],
)
CHOICE = spaces.Discrete(3, start=10), [np.int64(12), np.int64(10)]
WORLDS = {  # actions and observations
    "actions from 10": (*CHOICE, *LINE),
    "observations within others": (*CHOICE, *NESTED),
    "pictures": (*CHOICE, *BYTES),
    "an index": (*CHOICE, spaces.Discrete(2, start=-1), [np.int64(-1), np.int64(0)]),
    "several choices": (
        spaces.MultiDiscrete([2, 3], start=[4, -1]),
        [np.array([5, 1]), np.array([4, -1])],
        spaces.Box(-1, 1, (2,), np.float64),
        [np.array([1.0, -1]), np.array([-1.0, 1])],
    ),
    "a table of choices": (spaces.MultiDiscrete([[2], [2]]), [np.array([[1], [0]]), np.array([[0], [1]])], *LINE),
    "switches": (spaces.MultiBinary(2), [np.array([1, 0], np.int8), np.array([0, 1], np.int8)], *LINE),
    "reals in a table": (spaces.Box(-2, 2, (2, 1)), [np.array([[2], [-2]]), np.array([[-2], [2]])], *LINE),
    "whole numbers": (spaces.Box(0, 2, (1,), np.int16), [np.array([2]), np.array([0])], *LINE),
}


def oracle(environment, right):
    """A policy that takes, of the two observations, the right action of each; `right` in our space."""
    space = environment.action_space

    def apply(params, observation):
        flat = observation.reshape(*observation.shape[: observation.ndim - len(environment.observation_shape)], -1)
        first = jnp.all(jnp.abs(flat - params["first"]) < 1e-3, axis=-1)
        action = jnp.where(first.reshape(first.shape + (1,) * len(space.shape)), *map(jnp.asarray, right))
        if isinstance(space, Box):
            return DiagonalGaussian(10.0 * action, jnp.zeros_like(action, jnp.float32))
        if isinstance(space, Discrete):
            return Categorical(9.0 * jax.nn.one_hot(action, space.n))
        return MultiCategorical(tuple(9.0 * jax.nn.one_hot(action[..., k], n) for k, n in enumerate(space.n)))

    return Network(lambda key, observation: {"first": jnp.ravel(observation)}, apply)


@pytest.mark.long
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_play_sees_and_does_what_training_does(world):
    action_space, actions, *observed = world
    entry_point = functools.partial(Puzzle, action_space, actions, *observed)
    gymnasium.register("Puzzle-v0", entry_point, max_episode_steps=4)
    try:
        environment = make_environment("gymnasium/Puzzle-v0", max_steps=4)
        start = getattr(action_space, "start", 0)
        right = [np.ravel(np.asarray(action) - start) for action in actions]
        if isinstance(environment.action_space, Discrete):
            right = [action[0] for action in right]
        for policy, best in ((oracle(environment, right), 4), (oracle(environment, right[::-1]), 0)):
            config = Config(env=environment, policy=policy, **SMALL)
            state = init(config, jax.random.key(0))
            evaluated = evaluate(config, state, jax.random.key(1), num_episodes=1)
            assert evaluated.episode_return == best and evaluated.episode_length == 4
            assert play(config, state, "Puzzle-v0", num_episodes=1) == best
    finally:
        del gymnasium.registry["Puzzle-v0"]


def test_play_stops_where_training_does(trained):
    config, state = trained
    short = config.replace(env=make_environment("CartPole-v1", max_steps=7))
    np.testing.assert_array_equal(play(short, state, "CartPole-v1", num_episodes=2), 7)


@pytest.mark.long
def test_commands_play_and_export(run, capsys, python, tmp_path):
    assert main(["play", str(run), "--num-episodes", "2", "--agent", "1"]) == 0
    assert "CartPole-v1 of Gymnasium, 2 episodes: return" in capsys.readouterr().out
    assert main(["export", str(run), "--output", str(tmp_path / "policy")]) == 0
    assert "policy.stablehlo" in capsys.readouterr().out
    loaded = python(str(tmp_path / "policy" / "load_policy.py"), cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    assert len(loaded.stdout.strip("[]\n").split()) == 3
    for wrong, message in (
        (["play", str(run), "--agent", "2"], "agent of this run must be a whole number from 0 to 1, got 2."),
        (["play", str(run), "--num-episodes", "0"], "num_episodes must be a whole number from 1 to 1,000,000, got 0."),
        (["export", str(tmp_path)], f"{tmp_path} is not the folder of a run"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


def test_tensorboard_gets_what_the_table_has(run):
    table = read_metrics(open_run(run).path)
    for seed in (0, 1):
        (file,) = (run / "tensorboard" / f"seed_{seed}").iterdir()
        data, found = file.read_bytes(), []  # records: length, its checksum, event, its checksum
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value if v.tag == "mean_kl"]
            data = data[16 + length :]
        mine = table["seed"] == seed
        expected = zip(table["env_steps"][mine], table["mean_kl"][mine], strict=True)
        assert [(step, pytest.approx(value)) for _, step, value in found] == list(expected)


def test_a_sink_writes_nothing_before_its_first_row_and_no_traceback_where_it_cannot(tmp_path):
    write, close = open_sink("tensorboard", tmp_path, {})
    assert not list(tmp_path.iterdir())
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(UsageError, match=r"cannot write into .*tensorboard: .*; what is done is safe, and"):
        write(0, 16, {"mean_kl": 0.01})
    close()


@pytest.mark.parametrize("command", [["export", "--output"], ["play", "--num-episodes", "1", "--gif"]])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half(run, tmp_path, monkeypatch, capsys, command):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main([command[0], str(run), *command[1:], str(tmp_path / "out.gif")]) == 2
    error = capsys.readouterr().err
    assert "cannot write" in error and "No space left on device; choose" in error and error.count("\n") == 1
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_sink_is_named_with_its_mend(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, {"tensorboard": "tensorboardX", "wandb": "wandb"}[name], None)
    assert main(["train", "--output", str(tmp_path / "run"), "--num-iterations", "1", "--log", name]) == 2
    assert f"pip install '.[{name}]'" in capsys.readouterr().err
