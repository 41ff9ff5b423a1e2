"""What the adapters make of the suites' signals, on small environments with the suites' own interfaces.

The real packages are tested in test_suites.py, where they are installed.
"""

from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from flax import struct

from trpo_jax import Config, UsageError, init, make_environment, make_policy, train_step
from trpo_jax.environments import brax, craftax, jumanji, suites
from trpo_jax.environments.base import Discrete, MultiDiscrete
from trpo_jax.environments.hidden_entries import keep_entries


def walk(environment, actions):
    """What is `Played` [T] of one environment under given actions."""

    def one(state, inputs):
        result = probes.step_and_reset(environment)(inputs[0], state, inputs[1])
        return result.state, result._replace(state=())

    def run(key, actions):
        state = environment.reset(key)[1]
        return jax.lax.scan(one, state, (jax.random.split(key, len(actions)), actions))[1]

    return jax.jit(run)(jax.random.key(0), jnp.asarray(actions))


# Jumanji: dm_env's time steps. The agent sees a counter; action 1 ends the episode, and five steps are its limit.


class Observation(NamedTuple):
    count: Any
    action_mask: Any


class TimeStep(NamedTuple):
    observation: Observation
    reward: Any
    discount: Any
    is_last: Any

    def last(self):
        return self.is_last


class Legal:
    """Only the actions of `allowed(count)` are legal; an illegal one ends the episode."""

    reward_spec = SimpleNamespace(shape=())
    time_limit = 5

    def __init__(self, sizes, allowed, mask_shape=None):
        self.sizes, self.allowed = np.atleast_1d(sizes), allowed
        self.action_spec = SimpleNamespace(num_values=np.asarray(sizes), shape=np.shape(sizes))
        self.mask_shape = mask_shape

    def observe(self, count):
        mask = self.allowed(count)
        return Observation(count.astype(jnp.int8), mask if self.mask_shape is None else mask.reshape(self.mask_shape))

    def reset(self, key):
        count = jnp.int32(0)
        return count, TimeStep(self.observe(count), jnp.float32(0), jnp.float32(1), jnp.bool_(False))

    def step(self, count, action):
        mask = self.allowed(count).reshape(len(self.sizes), -1)
        legal = jnp.all(jnp.take_along_axis(mask, jnp.atleast_1d(action)[:, None], axis=1))
        count = count + 1
        observation, last = self.observe(count), ~legal | (count >= 5)
        return count, TimeStep(observation, jnp.where(legal, 1, -9), jnp.where(legal, 1.0, 0.0), last)


def only_zero(count):
    return jnp.arange(2) == 0


def test_of_time_steps_last_with_a_discount_is_a_time_limit():
    environment = jumanji.from_timesteps(Legal(2, only_zero), "jumanji/Legal", None)
    assert environment.action_space == Discrete(2) and environment.max_steps == 5
    steps = walk(environment, jnp.array([0, 0, 0, 0, 0, 0, 1, 0]))
    np.testing.assert_array_equal(steps.truncated, [0, 0, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(steps.terminated, [0, 0, 0, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(steps.next_observation[:, 2], [1, 2, 3, 4, 5, 1, 2, 1])
    np.testing.assert_array_equal(steps.observation[:, 2], [1, 2, 3, 4, 0, 1, 0, 1])
    np.testing.assert_array_equal(steps.reward, [1, 1, 1, 1, 1, 1, -9, 1])
    assert steps.reward.dtype == steps.observation.dtype == jnp.float32
    shorter = jumanji.from_timesteps(Legal(2, only_zero), "jumanji/Legal", 3)
    np.testing.assert_array_equal(walk(shorter, jnp.zeros(6, jnp.int32)).truncated, [0, 0, 1, 0, 0, 1])


def turning(count):
    """Each of three components has one legal action, which depends on the count; none at all at the fourth."""
    legal = jnp.arange(4) == jnp.array([0, 1, 3])[:, None]
    return jnp.roll(legal, count, axis=1) & (count != 4)


MASKED = {
    "discrete": (Legal(5, lambda count: jnp.arange(5) == count), Discrete(5), (5,), False),
    "components, normalised": (Legal((4, 4, 4), turning), MultiDiscrete((4, 4, 4)), (3, 4), True),
}


@pytest.mark.long
@pytest.mark.parametrize("env, space, mask_shape, normalize", MASKED.values(), ids=MASKED.keys())
def test_the_default_policy_takes_legal_actions_only(env, space, mask_shape, normalize):
    environment = jumanji.from_timesteps(env, "jumanji/Legal", None)
    assert environment.action_space == space and environment.observation_shape == (int(np.prod(mask_shape)) + 1,)
    config = Config(env=environment, num_envs=2, num_steps=12, fisher_fraction=1.0, normalize_observations=normalize)
    state = init(config, jax.random.key(0))
    observation = state.actor.observation[0]
    expected = env.allowed(jnp.int32(0)).ravel()
    np.testing.assert_array_equal(environment.action_mask(observation), expected)

    policy = make_policy(environment)
    params = policy.init(jax.random.key(1), observation)
    distribution = policy.apply(params, jnp.stack([observation] * 50))
    actions = np.asarray(distribution.sample(jax.random.key(2))).reshape(50, -1)
    assert np.take_along_axis(np.asarray(expected).reshape(actions.shape[1], -1), actions.T, axis=1).all()
    np.testing.assert_allclose(distribution.entropy(), 0, atol=1e-6)  # one action is left
    np.testing.assert_allclose(distribution.kl(distribution), 0, atol=1e-6)

    step = jax.jit(train_step)
    for _ in range(2):
        state, metrics = step(config, state)
        assert metrics.finite == 1 and metrics.mean_kl <= 0.01
        assert metrics.episode_length == 5  # an illegal action would have ended one sooner


def test_a_mask_over_joint_actions_is_but_a_part_of_the_observation():
    env = Legal((2, 3), lambda count: jnp.ones(6, bool), mask_shape=(2, 3))
    environment = jumanji.from_timesteps(env, "jumanji/Legal", None)
    assert environment.action_mask is None and environment.observation_shape == (7,)


def test_jumanjis_crowds_and_real_actions_are_refused():
    crowd = Legal(2, only_zero)
    crowd.reward_spec = SimpleNamespace(shape=(3,))
    with pytest.raises(UsageError, match=r"^jumanji/Crowd has several agents, each with its own reward"):
        jumanji.from_timesteps(crowd, "jumanji/Crowd", None)
    real = Legal(2, only_zero)
    real.action_spec = SimpleNamespace(shape=(2,))
    with pytest.raises(UsageError, match=r"^actions of jumanji/Real lie in .*DiscreteArray and MultiDiscreteArray can"):
        jumanji.from_timesteps(real, "jumanji/Real", None)


# Brax and Playground: a state with obs, reward and done, and no time limit.


@struct.dataclass
class State:
    obs: Any
    reward: Any
    done: Any


class Runner:
    """Runs by its action; falls over beyond 2. Asks for a raw key, as Brax does."""

    action_size = 1

    def __init__(self, observe=lambda x: x):
        self.observe = observe

    def reset(self, rng):
        assert rng.dtype == jnp.uint32
        return State(self.observe(jnp.zeros(1)), jnp.float32(0), jnp.float32(0))

    def step(self, state, action):
        x = state.obs["state"] if isinstance(state.obs, dict) else state.obs
        x = x + action
        return state.replace(obs=self.observe(x), reward=x[0], done=(x[0] > 2).astype(jnp.float32))


@pytest.mark.parametrize("observe", [lambda x: x, lambda x: {"state": x, "privileged_state": jnp.zeros(9)}])
def test_brax_falls_by_itself_and_is_cut_off_by_us(observe):
    environment = brax.from_brax(Runner(observe), "brax/runner", 4)
    assert environment.max_steps == 4
    if environment.entries is not None:
        assert environment.entries == {"privileged_state": (9,), "state": (1,)}
        environment = keep_entries(environment, ["state"])  # what the networks see by default
    assert environment.observation_shape == (1,)
    assert str(environment.action_space) == "Box(1) [-1, 1]"
    steps = walk(environment, jnp.array([9.0, 1, 1, -9, 0, 0, 0, 0])[:, None])  # clipped to ±1
    np.testing.assert_array_equal(steps.terminated, [0, 0, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(steps.truncated, [0, 0, 0, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(steps.next_observation[:, 0], [1, 2, 3, -1, -1, -1, -1, 0])
    np.testing.assert_array_equal(steps.observation[:, 0], [1, 2, 0, -1, -1, -1, 0, 0])


def test_brax_pictures_are_entries():
    pictures = Runner(lambda x: {"state": x, "pixels/view_0": jnp.zeros((4, 4, 3))})
    assert brax.from_brax(pictures, "brax/eye", 4).entries == {"pixels/view_0": (4, 4, 3), "state": (1,)}


# XLand-MiniGrid and Navix: a time step is the state; Craftax: gymnax's old five values, and its own limit as a death.


@struct.dataclass
class GridStep:
    time: Any
    observation: Any
    reward: Any
    discount: Any
    step_type: Any
    state: Any = None

    def last(self):
        return self.step_type == 2

    def is_termination(self):
        return self.step_type == 2

    def is_truncation(self):
        return self.step_type == 1


def grid_step(time, ended, limited, *, xland):
    observation = jnp.full((1, 1, 2), time % 3, jnp.uint8)
    last = ended | limited
    kind = jnp.where(last, 2, 1) if xland else jnp.where(ended, 2, jnp.where(limited, 1, 0))
    return GridStep(time, observation, ended * 1.0, jnp.where(ended, 0.0, 1.0), kind)


class XLand:
    """Action 1 reaches the goal; three steps are the limit."""

    def num_actions(self, params):
        return 2

    def reset(self, params, key):
        return grid_step(jnp.int32(0), jnp.bool_(False), jnp.bool_(False), xland=True)

    def step(self, params, timestep, action):
        time = timestep.time + 1
        return grid_step(time, action == 1, time == params.max_steps, xland=True)


class NavixRoom:
    """The same; its public `step` would reset an episode one step too late."""

    max_steps, action_space, observation_fn = 3, SimpleNamespace(n=2), "symbolic"

    def reset(self, key):
        return grid_step(jnp.int32(0), jnp.bool_(False), jnp.bool_(False), xland=False)

    def _step(self, timestep, action):
        time = timestep.time + 1
        return grid_step(time, action == 1, time == self.max_steps, xland=False)


def package(name, monkeypatch, **contents):
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(__import__("sys").modules, name, module)
    return module


@pytest.fixture
def grids(monkeypatch):
    """Packages of the two suites' names, with one environment each."""
    package("xminigrid", monkeypatch, registered_environments=lambda: ("G",), make=lambda name: (XLand(), LIMIT))
    package("xminigrid.core", monkeypatch)
    package("xminigrid.core.constants", monkeypatch, NUM_TILES=3, NUM_COLORS=3)
    observations = SimpleNamespace(symbolic="ids", symbolic_first_person="ids", rgb="bytes", rgb_first_person="bytes")
    package(
        "navix", monkeypatch, registry=lambda: {"G": None}, make=lambda name: NavixRoom(), observations=observations
    )


LIMIT = SimpleNamespace(max_steps=3)


@pytest.mark.parametrize("suite, final", [("xminigrid", [0, 1, 0, 0, 1, 0]), ("navix", [1, 1])])
def test_grids_tell_their_goal_from_their_limit(suite, final, grids):
    environment = suites.adapter(suite).make("G", {}, None)
    assert environment.max_steps == 3 and environment.action_space == Discrete(2)
    steps = walk(environment, jnp.array([0, 0, 0, 1, 0, 0, 1, 0]))
    np.testing.assert_array_equal(steps.truncated, [0, 0, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(steps.terminated, [0, 0, 0, 1, 0, 0, 1, 0])  # at the limit, but at the goal
    np.testing.assert_array_equal(steps.reward, [0, 0, 0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(jnp.ravel(steps.observation[0]), final)


@struct.dataclass
class CraftaxParams:
    max_timesteps: int = 4


@struct.dataclass
class CraftaxState:
    timestep: Any
    health: Any


class Survivor:
    """Action 1 costs one of two lives."""

    default_params = CraftaxParams()

    def action_space(self, params):
        return SimpleNamespace(n=2)

    def reset_env(self, key, params):
        return jnp.zeros(1), CraftaxState(jnp.int32(0), jnp.int32(2))

    def step_env(self, key, state, action, params):
        state = CraftaxState(state.timestep + 1, state.health - action)
        done = (state.health <= 0) | (state.timestep >= params.max_timesteps)
        return state.timestep[None] * 1.0, state, 0.1, done, {}


def test_craftax_ends_by_death_and_its_limit_truncates(monkeypatch):
    factory = lambda name, auto_reset: Survivor()  # noqa: E731
    package("craftax", monkeypatch)
    package("craftax.craftax_env", monkeypatch, make_craftax_env_from_name=factory)
    environment = make_environment("craftax/Craftax-Symbolic-v1", params={"max_timesteps": 3})
    assert environment.max_steps == 3 and environment.costly_reset
    steps = walk(environment, jnp.array([0, 1, 0, 1, 1, 0, 0, 0]))
    np.testing.assert_array_equal(steps.truncated, [0, 0, 1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(steps.terminated, [0, 0, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(steps.next_observation[:, 0], [1, 2, 3, 1, 2, 1, 2, 3])
    assert craftax.make("Craftax-Symbolic-v1", {}, 2).max_steps == 2
    assert probes.same_bits(steps, walk(environment, jnp.array([0, 1, 0, 1, 1, 0, 0, 0])))
