"""Episodes in the environment of training: what they return, what is drawn of them, and the files that hold it."""

import subprocess
from ctypes.util import find_library

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments.classic_control.cartpole import EnvState
from PIL import Image, ImageSequence
from probes import Countdown

from trpo_jax import Config, UsageError, init, make_environment, repeat_actions, stack_frames
from trpo_jax.cli import main
from trpo_jax.environments.base import Film
from trpo_jax.environments.pictures import color_grid
from trpo_jax.playing import play, play_here
from trpo_jax.videos import check_video, write_video

SMALL = {"num_envs": 2, "num_steps": 8, "num_iterations": 2, "cg_iterations": 2, "value_cg_iterations": 2}


def fresh(env, **settings):
    config = Config(env=env, **SMALL, **settings)
    return config, init(config, jax.random.key(0))


def milliseconds(file):
    """How long an animation lasts: frames that look alike are stored once, and shown for longer."""
    with Image.open(file) as picture:
        return sum(frame.info["duration"] for frame in ImageSequence.Iterator(picture))


def test_every_step_of_the_first_episode_is_a_frame(tmp_path):
    """CartPole pays 1 per step, of which a second has 50."""
    returns = play_here(*fresh("CartPole-v1"), num_episodes=2, seed=3, video=tmp_path / "a.gif")
    assert returns.shape == (2,) and (returns >= 8).all() and milliseconds(tmp_path / "a.gif") == 20 * returns[0]
    np.testing.assert_array_equal(play_here(*fresh("CartPole-v1"), num_episodes=2, seed=3), returns)


def test_classic_control_looks_as_in_gymnasium_with_the_settings_of_training():
    world = gymnasium.make("CartPole-v1", render_mode="rgb_array")
    world.reset(seed=0)
    world.unwrapped.state, world.unwrapped.length = np.array([0.5, 0.0, 0.1, 0.0]), 0.25
    state = EnvState(x=jnp.float32(0.5), x_dot=jnp.float32(0), theta=jnp.float32(0.1), theta_dot=jnp.float32(0), time=0)
    short, long = (make_environment("CartPole-v1", params={"length": length}).render([state]) for length in (0.25, 0.5))
    np.testing.assert_array_equal(short.frames[0], world.render())
    assert (long.frames[0] != short.frames[0]).any() and long.per_second == 50


def test_a_grid_is_drawn_by_colours():
    grid = np.zeros((2, 3, 2))
    grid[0, 1, 0] = grid[1, 2, 1] = grid[1, 2, 0] = 1
    picture = color_grid(grid)
    assert picture.shape == (60, 90, 3) and picture.dtype == np.uint8
    cells = picture[::30, ::30]
    np.testing.assert_array_equal(np.repeat(np.repeat(cells, 30, 0), 30, 1), picture)
    assert (cells.any(axis=-1) == grid.any(axis=-1)).all() and (cells[0, 1] != cells[1, 2]).any()


@pytest.mark.parametrize("env", ["Breakout-MinAtar", "Pendulum-v1", "Catch-bsuite", "FourRooms-misc"])
def test_environments_of_gymnax_are_drawn(env):
    environment = make_environment(env)
    _, state = environment.reset(jax.random.key(0))
    states = [state]
    for i in range(3):
        action = jnp.ones(environment.action_space.shape, jnp.int32 if env != "Pendulum-v1" else jnp.float32)
        states.append(environment.step(jax.random.key(i), states[-1], action).state)
    film = environment.render(states)
    assert len(film.frames) == 4 and film.per_second > 0
    for frame in film.frames:
        assert frame.dtype == np.uint8 and frame.shape == film.frames[0].shape and frame.shape[2] == 3
    assert (film.frames[3] != film.frames[0]).any()


def test_wrappers_draw_what_they_hold_and_keep_its_time():
    inner = make_environment("Breakout-MinAtar")
    outer = stack_frames(repeat_actions(inner, 2), 3)
    _, state = inner.reset(jax.random.key(0))
    _, wrapped = outer.reset(jax.random.key(0))
    plain, film = inner.render([state]), outer.render([wrapped])
    np.testing.assert_array_equal(film.frames, plain.frames)
    assert film.per_second == plain.per_second / 2


class Drawn(Countdown):
    picture = np.zeros((5, 7, 3), np.uint8)

    def render(self, state):
        return self.picture


def test_an_object_of_ones_own_draws_itself(tmp_path):
    play_here(*fresh(Drawn()), num_episodes=1, video=tmp_path / "own.gif")
    with Image.open(tmp_path / "own.gif") as picture:
        assert picture.size == (300, 214)
    wrong = Drawn()
    wrong.picture = np.zeros((5, 7))
    with pytest.raises(UsageError, match=r"must return .* uint8 \[height, width, 3\], but returns float64 \[5, 7\]\.$"):
        play_here(*fresh(wrong), num_episodes=1, video=tmp_path / "wrong.gif")


@pytest.mark.parametrize("env", [Countdown(), "gymnasium/CartPole-v1"])
def test_what_has_no_pictures_is_one_sentence(env, tmp_path):
    with pytest.raises(UsageError, match=r"^[^\n]* cannot be drawn: [^\n]*\.$"):
        play_here(*fresh(env), num_episodes=1, video=tmp_path / "none.gif")
    assert not list(tmp_path.iterdir()) and play_here(*fresh(env), num_episodes=1).shape == (1,)


@pytest.mark.parametrize(
    "env, package", [("brax/inverted_pendulum", "brax"), ("playground/CartpoleBalance", "mujoco_playground")]
)
@pytest.mark.long
def test_bodies_are_drawn(env, package, python, tmp_path):
    pytest.importorskip(package, reason="needs the extra of the suite")
    if not find_library("EGL"):  # MuJoCo draws with it where there is no screen; no Python package installs it
        pytest.skip("needs the system's libegl1")
    arguments = ["-m", "trpo_jax"]
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    run = str(tmp_path / "run")
    python(*arguments, "train", env, "--output", run, "--max-steps=6", *small)
    python(*arguments, "play", run, "--render", "--num-episodes", "1")
    with Image.open(tmp_path / "run" / "episode.gif") as picture:
        assert 2 <= picture.n_frames <= 6 and len(picture.convert("L").getcolors()) > 8


def test_a_video_has_the_frames_and_the_time_of_the_film(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs the extra play")
    frames = [np.full((41, 61, 3), 20 * i, np.uint8) for i in range(10)]
    write_video(tmp_path / "a.mp4", Film(frames, 5.0))
    decode = [ffmpeg.get_ffmpeg_exe(), "-i", str(tmp_path / "a.mp4"), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    result = subprocess.run(decode, capture_output=True, check=True)
    assert b"Duration: 00:00:02.00" in result.stderr
    pictures = np.frombuffer(result.stdout, np.uint8).reshape(10, 40, 60, 3)
    np.testing.assert_allclose(pictures.mean(axis=(1, 2, 3)), 20 * np.arange(10), atol=4)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_what_cannot_be_a_video_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"^a video must be a file that ends in \.gif or \.mp4, got 'a\.avi'\.$"):
        check_video(tmp_path.__class__("a.avi"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"imageio-ffmpeg: pip install '\.\[play\]'; or choose \.gif\.$"):
        check_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("wrappers", ["hide_entries=0,1 stack_frames=2", "repeat_actions=4"])
def test_gymnasium_has_no_wrappers_of_training(wrappers):
    config = Config(**SMALL, wrappers=f"limit_steps=50 {wrappers}")
    with pytest.raises(
        UsageError, match=f"^the policy was trained with the wrappers {wrappers}, which Gymnasium's Cart"
    ):
        play(config, init(config, jax.random.key(0)), "CartPole-v1", num_episodes=1)


def test_the_command_line_plays_where_the_agent_was_trained(tmp_path, capsys):
    run = str(tmp_path / "run")
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    options = ["--wrappers", "limit_steps=5", "--env-arg", "gravity=12"]
    assert main(["train", "CartPole-v1", "--output", run, *options, *small]) == 0
    assert main(["play", run, "--render", "--num-episodes", "2"]) == 0
    assert "CartPole-v1, 2 episodes: return 5.0 on average" in capsys.readouterr().out
    assert milliseconds(tmp_path / "run" / "episode.gif") == 100
    for flags, sentence in {
        (
            "--render",
            "--env",
            "Acrobot-v1",
        ): "--render draws the environment of training, CartPole-v1; leave out --env",
        ("--output", "x.png"): "a video must be a file that ends in .gif or .mp4, got 'x.png'",
    }.items():
        assert main(["play", run, *flags]) == 2
        assert capsys.readouterr().err == f"trpo-jax: {sentence}.\n"
