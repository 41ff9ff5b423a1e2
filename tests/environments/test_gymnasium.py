"""Gymnasium through the host: its own trajectories, and the purity of a step whose state is but a history."""

import gc
import re
import signal

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from gymnasium import spaces
from probes import step_and_reset

from trpo_jax import Config, UsageError, evaluate, init, load, make_environment, save, train
from trpo_jax.cli import main
from trpo_jax.environments import gymnasium as adapter
from trpo_jax.environments import host, make
from trpo_jax.environments.base import MultiDiscrete
from trpo_jax.runs.continuing import continue_run
from trpo_jax.runs.folders import create_run

pytestmark = pytest.mark.filterwarnings("default")


class Recorder(gymnasium.Env):
    """Observes all its actions of the episode so far and a draw of its own; the end once their sum is above 3."""

    def __init__(self, action_space=None, observation_space=None):
        self.action_space = action_space or spaces.Discrete(3, start=-1)
        self.observation_space = observation_space or spaces.Dict(
            {"history": spaces.Box(-9, 9, (4,)), "last": spaces.Discrete(4), "draw": spaces.Box(0, 1, ())}
        )

    def observe(self):
        if not isinstance(self.observation_space, spaces.Dict):
            return self.observation_space.sample()
        history = np.array((self.history + [0] * 4)[:4], np.float32)
        return {"history": history, "last": int(history[-1] > 0), "draw": np.float32(self.np_random.uniform())}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.history = []
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.history.append(float(np.sum(action)))
        return self.observe(), sum(self.history), sum(self.history) > 3, False, {}


@pytest.fixture
def register():
    """A function that registers an environment for a test and returns its name here."""
    names = []

    def add(name, entry_point, **options):
        make._by_name.cache_clear()
        gymnasium.register(name, entry_point, **{"max_episode_steps": 5, **options})
        names.append(name)
        return f"gymnasium/{name}"

    yield add
    for name in names:
        del gymnasium.registry[name]
    make._by_name.cache_clear()


@pytest.fixture
def recorder(register):
    """The name of a registered `Recorder`."""
    return register("Recorder-v0", Recorder)


def play(environment, num_envs, actions):
    """What is `Played` [T, N] of given actions [T, N, ...]."""

    def run(key, actions):
        state = jax.vmap(environment.reset)(jax.random.split(key, num_envs))[1]

        def one(state, inputs):
            result = jax.vmap(step_and_reset(environment))(jax.random.split(inputs[0], num_envs), state, inputs[1])
            return result.state, result

        return state, jax.lax.scan(one, state, (jax.random.split(key, len(actions)), actions))[1]

    return jax.jit(run)(jax.random.key(0), actions)


@pytest.mark.parametrize("name, num_steps", [("CartPole-v1", 60), ("Pendulum-v1", 210), ("Acrobot-v1", 20)])
def test_trajectories_are_those_of_gymnasium(name, num_steps):
    theirs = gymnasium.make(name)
    theirs.action_space.seed(0)
    actions = np.stack([[theirs.action_space.sample() for _ in range(2)] for _ in range(num_steps)])
    start, ours = play(make_environment(f"gymnasium/{name}"), 2, jnp.asarray(actions))
    for i in range(2):
        theirs.reset(seed=int(start.seed[i]))
        for t in range(num_steps):
            final, reward, terminated, truncated, _ = theirs.step(actions[t, i])
            np.testing.assert_array_equal(ours.next_observation[t, i], final.astype(np.float32))
            assert ours.reward[t, i] == np.float32(reward)
            assert (ours.terminated[t, i], ours.truncated[t, i]) == (terminated, truncated)
            if terminated or truncated:
                final, _ = theirs.reset(seed=int(ours.state.seed[t, i]))
            np.testing.assert_array_equal(ours.observation[t, i], final.astype(np.float32))
    assert (ours.terminated | ours.truncated).any() == (name != "Acrobot-v1")


def test_every_kind_of_observation_becomes_one_vector(recorder):
    environment = make_environment(recorder)
    assert environment.observation_shape == (9,) and environment.max_steps == 5
    actions = jnp.array([[0], [2], [0], [1], [1], [2], [2], [2], [2]])  # the environment sees them less 1
    _, steps = play(environment, 1, actions)
    # Dict spaces are flattened in the order of their names: draw, history, last (one-hot).
    # Of a history of five steps four are shown.
    expected = [[-1, 0, 0, 0], [-1, 1, 0, 0], [-1, 1, -1, 0], [-1, 1, -1, 0], [-1, 1, -1, 0]]
    np.testing.assert_array_equal(steps.next_observation[:5, 0, 1:5], expected)
    np.testing.assert_array_equal(steps.truncated[:, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(steps.terminated[:, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(steps.reward[:, 0], [-1, 0, -1, -1, -1, 1, 2, 3, 4])
    np.testing.assert_array_equal(steps.observation[4, 0, 1:5], 0)


def test_a_step_can_be_repeated_and_an_old_state_stepped_again(recorder):
    environment = make_environment(recorder)
    step = jax.jit(environment.step)
    keys = jax.random.split(jax.random.key(0), 6)
    states, results = [environment.reset(jax.random.key(9))[1]], []
    for t in range(4):
        results.append(step(keys[t], states[-1], jnp.int32(t % 2)))
        states.append(results[-1].state)
    for t in (0, 3, 1, 2):  # the instance has long gone on
        assert probes.same_bits(step(keys[t], states[t], jnp.int32(t % 2)), results[t])
    other = step(keys[1], states[1], jnp.int32(2))  # another turn from an old state
    assert float(other.reward) == float(results[0].reward) + 1
    assert probes.same_bits(step(keys[2], states[2], jnp.int32(0)), results[2])


def test_more_environments_than_instances_still_agree(recorder, monkeypatch):
    actions = jax.random.randint(jax.random.key(5), (12, 2), 0, 3)
    start, plenty = play(make_environment(recorder), 2, actions)
    monkeypatch.setattr(host, "MOST_INSTANCES", 0)  # then it is four times the batch: 8 for the 10 at work
    environment = make_environment(recorder, max_steps=5)
    step = jax.jit(jax.vmap(step_and_reset(environment)))
    states = [jax.vmap(environment.reset)(jax.random.split(jax.random.key(0), 2))[1] for _ in range(5)]
    assert all(probes.same_bits(state, start) for state in states)
    for t, key in enumerate(jax.random.split(jax.random.key(0), len(actions))):
        for i in range(5):
            result = step(jax.random.split(key, 2), states[i], actions[t])
            states[i] = result.state
            np.testing.assert_array_equal(result.next_observation, plenty.next_observation[t])
            np.testing.assert_array_equal(result.observation, plenty.observation[t])
    assert plenty.truncated.any()


def test_agents_with_equal_seeds_do_not_disturb_each_other(recorder):
    environment = make_environment(recorder)
    actions = jax.random.randint(jax.random.key(5), (3, 12, 2), 0, 3).at[2].set(0).at[1, :3].set(0)

    def agent(actions):
        state = jax.vmap(environment.reset)(jax.random.split(jax.random.key(1), 2))[1]

        def one(state, inputs):
            result = jax.vmap(step_and_reset(environment))(jax.random.split(inputs[0], 2), state, inputs[1])
            return result.state, result

        return jax.lax.scan(one, state, (jax.random.split(jax.random.key(2), len(actions)), actions))

    together = jax.jit(jax.vmap(agent))(actions)
    alone = jax.jit(agent)
    for i in range(3):
        assert probes.same_bits(jax.tree.map(lambda leaf: leaf[i], together), alone(actions[i]))  # noqa: B023


def test_a_saved_state_continues_in_another_process_with_equal_bits(python, tmp_path):
    code = """
import sys, jax, jax.numpy as jnp
from trpo_jax import load, make_environment, save
environment = make_environment("gymnasium/CartPole-v1")
state = load(sys.argv[1], jax.eval_shape(environment.reset, jax.random.key(0))[1])
save(sys.argv[2], environment.step(jax.random.key(5), state, jnp.int32(1)))
"""
    environment = make_environment("gymnasium/CartPole-v1")
    step, state = jax.jit(environment.step), environment.reset(jax.random.key(3))[1]
    for t in range(4):
        state = step(jax.random.key(t), state, jnp.int32(1)).state
    save(tmp_path / "here.npz", state)
    result = python("-c", code, str(tmp_path / "here.npz"), str(tmp_path / "there.npz"))
    assert result.returncode == 0, result.stderr
    expected = step(jax.random.key(5), state, jnp.int32(1))
    assert probes.same_bits(load(tmp_path / "there.npz", expected), expected)


class Unsteady(Recorder):
    """Each reset of any instance is another."""

    count = 0

    def reset(self, *, seed=None, options=None):
        Unsteady.count += 1
        return super().reset(seed=(seed + Unsteady.count) % 2**31)


def test_an_episode_that_cannot_be_rebuilt_is_cut_off_where_it_stood_and_begins_anew(register):
    name = register("Unsteady-v0", Unsteady)
    environment = make_environment(name)
    step = jax.jit(jax.vmap(step_and_reset(environment)))
    first, state = jax.vmap(environment.reset)(jax.random.split(jax.random.key(0), 2))
    after = step(jax.random.split(jax.random.key(1), 2), state, jnp.ones(2, jnp.int32))
    assert not (after.truncated | after.terminated).any()
    with pytest.warns(UserWarning, match=r"^gymnasium/Unsteady-v0 does not repeat itself from equal seeds") as told:
        for _ in range(2):  # its instances have gone on
            again = step(jax.random.split(jax.random.key(2), 2), state, jnp.ones(2, jnp.int32))
            assert again.truncated.all() and not again.terminated.any() and (again.reward == 0).all()
            np.testing.assert_array_equal(again.next_observation, first)  # V is asked about where it stood
            assert (again.state.time == 0).all() and (again.observation != first).any()
    assert len(told) == 1
    onward = step(jax.random.split(jax.random.key(3), 2), again.state, jnp.ones(2, jnp.int32))
    assert not onward.truncated.any() and (onward.state.time == 1).all()


@pytest.mark.long
def test_a_run_in_an_environment_that_does_not_repeat_itself_can_be_resumed(register, tmp_path):
    config = small(register("Unsteady-v0", Unsteady)).replace(num_iterations=4)
    run = create_run(tmp_path / "run", config, seed=0, num_seeds=1)
    stopped = []

    def stop(progress):
        if not stopped:
            stopped.append(progress.iteration)
            signal.raise_signal(signal.SIGINT)

    assert not continue_run(run, stop)
    make._by_name.cache_clear()  # as in another process: no instance is left
    jax.clear_caches()
    with pytest.warns(UserWarning, match="does not repeat itself"):
        assert continue_run(run, lambda progress: None)


class Counted(Recorder):
    """Counts instances that were made and not closed."""

    made, alive = 0, 0

    def __init__(self):
        super().__init__()
        Counted.made, Counted.alive = Counted.made + 1, Counted.alive + 1

    def close(self):
        Counted.alive -= 1


def small(env):
    """Settings of a program that compiles quickly, for a `Recorder`."""
    networks = {"policy": probes.linear_policy(9, 3), "value": probes.linear_value(9)}
    return probes.small_config(env, **networks, num_iterations=1, cg_iterations=1, line_search_steps=1)


@pytest.mark.parametrize("rounds", [6, pytest.param(250, marks=pytest.mark.slow)])
def test_instances_of_training_and_evaluation_level_off(register, rounds):
    config = small(register("Counted-v0", Counted))
    run = jax.jit(train)
    play = jax.jit(lambda state, key: evaluate(config, state, key, num_episodes=4))
    alive, Counted.made, Counted.alive = [], 0, 0
    for i in range(rounds):  # 8 more environments each
        play(run(config, jax.random.key(i))[0], jax.random.key(i))
        alive.append(Counted.alive)
    assert max(alive) == alive[1] == alive[-1] == 16  # four batches of 4
    assert Counted.made == 17  # one showed its spaces


def test_instances_of_environments_no_longer_at_work_are_closed(register, monkeypatch):
    monkeypatch.setattr(host, "MOST_IDLE", 3)
    name = register("Counted-v0", Counted)
    environments = [make_environment(name, max_steps=5) for _ in range(3)]
    jax.clear_caches()
    gc.collect()
    Counted.alive = 0
    for environment in environments:
        jax.vmap(environment.reset)(jax.random.split(jax.random.key(0), 4))
    assert Counted.alive == 4 + 3
    states = [jax.vmap(e.reset)(jax.random.split(jax.random.key(0), 4)) for e in environments]
    del environments, environment, states
    jax.clear_caches()
    gc.collect()
    assert Counted.alive <= 0


class Failing(Recorder):
    """Its third step fails in some way."""

    failure = None

    def step(self, action):
        result = super().step(action)
        if len(self.history) < 3:
            return result
        if Failing.failure == "raises":
            return {}["a missing key"]
        return (np.zeros(2), *result[1:]) if Failing.failure == "another shape" else (*result[:1], "much", *result[2:])


FAILURES = {
    "raises": r"^step of gymnasium/Failing-v0 fails \(KeyError: a missing key, test_gymnasium\.py:\d+ in step\)\.$",
    "another shape": r"^step of gymnasium/Failing-v0 returns an observation of shape \(2,\), but its space has \(4,\)",
    "no number": r"^step of gymnasium/Failing-v0 fails \(ValueError: could not convert string to float: 'much'",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_of_the_environments_own_code_is_one_sentence(failure, register, monkeypatch, caplog):
    monkeypatch.setattr(Failing, "failure", failure)
    environment = make_environment(
        register("Failing-v0", Failing, kwargs={"observation_space": spaces.Box(-1, 1, (4,))})
    )
    step, state = jax.jit(environment.step), environment.reset(jax.random.key(0))[1]
    with pytest.raises((RuntimeError, ValueError)) as caught:
        for _ in range(3):
            state = jax.block_until_ready(step(jax.random.key(0), state, jnp.int32(1))).state
    sentence = str(caught.value).partition("UsageError: ")[2].splitlines()[0]
    assert re.match(FAILURES[failure], sentence) and not caplog.records


def test_so_it_is_on_the_command_line(register, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(Failing, "failure", "raises")
    name = register("Failing-v0", Failing, kwargs={"observation_space": spaces.Box(-1, 1, (4,))})
    settings = ["--num-envs=2", "--num-steps=8", "--num-iterations=1", "--line-search=none", "--cg-iterations=1"]
    assert main(["train", name, *settings, f"--output={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert re.match(FAILURES["raises"], error.removeprefix("trpo-jax: ")), error


def test_evaluation_ends_whole_episodes(recorder):
    config = Config(env=recorder, num_envs=2, num_steps=8)
    result = evaluate(config, init(config, jax.random.key(0)), jax.random.key(1), num_episodes=5, deterministic=False)
    assert result.finished.all() and (result.episode_length <= 5).all()


@pytest.mark.parametrize(
    "space, ours",
    [
        (spaces.MultiDiscrete([2, 3]), MultiDiscrete((2, 3))),
        (spaces.MultiDiscrete([2, 3], start=[1, -1]), MultiDiscrete((2, 3))),
        (spaces.MultiBinary(3), MultiDiscrete((2, 2, 2))),
        (spaces.Box(-1, np.array([[1, 2]], np.float64), (1, 2), np.float64), None),
    ],
)
def test_actions_arrive_in_their_own_space(space, ours):
    ours_found, act = adapter.host_action_space(space, "x")
    if ours is not None:
        assert ours_found == ours
        corners = (np.zeros(len(ours.n), np.int32), np.array(ours.n, np.int32) - 1)
    else:
        corners = (ours_found.low, ours_found.high)
    assert all(space.contains(act(corner)) for corner in corners)


REFUSED = {
    "no limit": ({}, {}, r"^gymnasium/Odd-v0 has no time limit; set one, such as max_steps=1000"),
    "text": (
        {"observation_space": spaces.Sequence(spaces.Discrete(2))},
        {"max_episode_steps": 5},
        r"^observations of gymnasium/Odd-v0 lie in Sequence.*which has no fixed size",
    ),
    "one of several": (
        {"action_space": spaces.OneOf((spaces.Discrete(2),))},
        {"max_episode_steps": 5},
        r"^actions of gymnasium/Odd-v0 lie in OneOf.*can be trained",
    ),
    "graph": (
        {"action_space": spaces.Dict(a=spaces.Discrete(2))},
        {"max_episode_steps": 5},
        r"^actions of gymnasium/Odd-v0 lie in Dict.*; only Discrete, MultiDiscrete, MultiBinary, .* can be trained",
    ),
}


@pytest.mark.parametrize("options, registered, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_trained_is_refused_in_one_sentence(options, registered, message):
    gymnasium.register("Odd-v0", Recorder, kwargs=options, **registered)
    try:
        with pytest.raises(UsageError, match=message):
            make_environment("gymnasium/Odd-v0")
    finally:
        del gymnasium.registry["Odd-v0"]
    with pytest.raises(
        UsageError, match=r"^gymnasium/CartPole-v1 cannot draw on a screen while it trains; `trpo-jax play"
    ):
        make_environment("gymnasium/CartPole-v1", params={"render_mode": "human"})
    with pytest.raises(UsageError, match=r"there is no environment gymnasium/CartPol-v1; did you mean CartPole-v1"):
        make_environment("gymnasium/CartPol-v1")


BYTES = spaces.Box(0, 255, (2, 2, 1), np.uint8)
OBSERVED = {  # space, an observation, what the agent sees
    "bytes": (BYTES, np.full((2, 2, 1), 51, np.uint8), np.full((2, 2, 1), 0.2)),
    "bytes in a row": (spaces.Box(0, 255, (2,), np.uint8), np.array([0, 255], np.uint8), [0, 1]),
    "few of them": (spaces.Box(0, 1, (2,), np.uint8), np.array([0, 1], np.uint8), [0, 1]),
    "a picture of floats": (spaces.Box(0, 255, (1, 1, 2)), np.array([[[0, 255]]], np.float32), [[[0, 1]]]),
    "numbers up to 255": (spaces.Box(0, 255, (2,)), np.array([0, 255], np.float32), [0, 255]),
    "within others": (
        spaces.Dict(a=BYTES, b=spaces.Tuple((spaces.Discrete(2), spaces.Box(-9, 9, (1,), np.float64)))),
        {"a": np.full((2, 2, 1), 255, np.uint8), "b": (1, np.array([7.0]))},
        [1, 1, 1, 1, 0, 1, 7],
    ),
    "truth values": (spaces.MultiBinary(2), np.array([0, 1], np.int8), [0, 1]),
}


@pytest.mark.parametrize("space, observation, expected", OBSERVED.values(), ids=OBSERVED.keys())
def test_bytes_are_seen_between_0_and_1(space, observation, expected):
    shape, observe = adapter.observation_space(space, "x")
    seen = observe(observation)
    assert seen.dtype == np.float32 and seen.shape == shape == np.shape(expected)
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "space, action, expected",
    [
        (spaces.Box(0, 2, (1,), np.int64), [1.6], [2]),  # the nearest, not the next below
        (spaces.Box(0, 0.1, (1,), np.float64), [np.float32(0.1)], [0.1]),  # float32 rounds 0.1 up
        (spaces.Box(0, 255, (2, 1), np.uint8), [300, -4], [[255], [0]]),
        (spaces.MultiDiscrete([[2, 3], [2, 2]]), [1, 2, 0, 1], [[1, 2], [0, 1]]),
        (spaces.MultiBinary((2, 2)), [1, 0, 0, 1], [[1, 0], [0, 1]]),
        (spaces.Discrete(3, start=10), 2, 12),
        (spaces.MultiDiscrete([2, 3], start=[5, -1]), [1, 0], [6, -1]),
        (spaces.Tuple((spaces.Discrete(2), spaces.Discrete(3, start=7))), [1, 0], (1, 7)),
    ],
)
def test_actions_arrive_as_declared(space, action, expected):
    ours, act = adapter.host_action_space(space, "x")
    assert ours.shape == np.shape(np.ravel(action) if np.ndim(expected) else action)
    given = act(np.asarray(action))
    assert space.contains(given)
    np.testing.assert_array_equal(given, expected)


@pytest.mark.parametrize("low, high", [(np.nan, 1), (0, np.nan)])
def test_bounds_that_are_none_are_refused(low, high, register):
    space = spaces.Box(-1, 1, (2,))
    space.low, space.high = np.full(2, low, np.float32), np.full(2, high, np.float32)
    name = register("Odd-v0", Recorder, kwargs={"action_space": space})
    with pytest.raises(UsageError, match=r"^actions of gymnasium/Odd-v0 lie in Box.*which contains no action"):
        make_environment(name)
