"""Gymnasium through the host: its own trajectories, and the purity of a step whose state is but a history."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from gymnasium import spaces

from trpo_jax import Config, UsageError, evaluate, init, load, make_environment, save
from trpo_jax.environments import gymnasium as adapter
from trpo_jax.environments.base import MultiDiscrete

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
def recorder():
    """The name of a registered `Recorder`."""
    name = "Recorder-v0"
    gymnasium.register(name, Recorder, max_episode_steps=5)
    adapter_name = f"gymnasium/{name}"
    yield adapter_name
    del gymnasium.registry[name]


def play(environment, num_envs, actions):
    """`Step`s [T, N] of given actions [T, N, ...]."""

    def run(key, actions):
        state = jax.vmap(environment.reset)(jax.random.split(key, num_envs))[1]

        def one(state, inputs):
            result = jax.vmap(environment.step)(jax.random.split(inputs[0], num_envs), state, inputs[1])
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
    monkeypatch.setattr(adapter, "MOST_INSTANCES", 0)  # then it is four times the batch: 8 for the 10 at work
    environment = make_environment(recorder, max_steps=5)
    step = jax.jit(jax.vmap(environment.step))
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
            result = jax.vmap(environment.step)(jax.random.split(inputs[0], 2), state, inputs[1])
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


def test_an_environment_that_does_not_repeat_itself_says_so():
    host = adapter.Host(Unsteady, lambda o: np.append(o["history"], o["draw"]).astype(np.float32), int, (5,))
    nowhere, seed = np.zeros(2, np.uint32), np.int32(7)
    first = host(np.int32(adapter._RESET), nowhere, seed, np.int32(0))
    assert host(np.int32(adapter._STEP), first.token, seed, np.int32(1)).found
    assert not host(np.int32(adapter._STEP), first.token, seed, np.int32(1)).found  # its instance has gone on
    host(np.int32(adapter._RESET), nowhere, seed, np.int32(0))  # what a rebuilding would do
    with pytest.raises(RuntimeError, match="does not repeat itself from equal seeds and actions"):
        host(np.int32(adapter._MUST_STEP), first.token, seed, np.int32(1))


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
    ours_found, act = adapter._action_space(spaces, space, "x")
    if ours is not None:
        assert ours_found == ours
        corners = (np.zeros(len(ours.n), np.int32), np.array(ours.n, np.int32) - 1)
    else:
        corners = (ours_found.low, ours_found.high)
    assert all(space.contains(act(corner)) for corner in corners)


REFUSED = {
    "no limit": ({}, {}, r"^gymnasium/Odd-v0 has no time limit; set one: make_environment\('gymnasium/Odd-v0', max_"),
    "text": (
        {"observation_space": spaces.Sequence(spaces.Discrete(2))},
        {"max_episode_steps": 5},
        r"^observations of gymnasium/Odd-v0 lie in Sequence.*which has no fixed size",
    ),
    "graph": (
        {"action_space": spaces.Dict(a=spaces.Discrete(2))},
        {"max_episode_steps": 5},
        r"^actions of gymnasium/Odd-v0 lie in Dict.*Discrete, MultiDiscrete, MultiBinary and Box can be trained",
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
    with pytest.raises(UsageError, match=r"there is no environment gymnasium/CartPol-v1; did you mean CartPole-v1"):
        make_environment("gymnasium/CartPol-v1")
