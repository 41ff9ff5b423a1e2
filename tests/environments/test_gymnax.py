"""The contract that every gymnax environment meets, gymnax's own trajectories, and training on all of them."""

import copy
import functools
import warnings

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from gymnasium import spaces as gym
from gymnax.environments import spaces
from gymnax.environments.environment import Environment as GymnaxEnvironment
from gymnax.environments.environment import EnvParams, EnvState
from probes import step_and_reset

from trpo_jax import (
    Categorical,
    Config,
    DiagonalGaussian,
    Environment,
    UsageError,
    available_environments,
    init,
    make_environment,
    train,
    train_step,
)
from trpo_jax.environments import make
from trpo_jax.environments.base import Box, Discrete, MultiDiscrete
from trpo_jax.environments.suites import SUITES

OFFLINE = [
    "Acrobot-v1",
    "Asterix-MinAtar",
    "BernoulliBandit-misc",
    "Breakout-MinAtar",
    "CartPole-v1",
    "Catch-bsuite",
    "DeepSea-bsuite",
    "DiscountingChain-bsuite",
    "FourRooms-misc",
    "Freeway-MinAtar",
    "FrozenLake-misc",
    "GaussianBandit-misc",
    "MemoryChain-bsuite",
    "MetaMaze-misc",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Pendulum-v1",
    "PointRobot-misc",
    "Pong-misc",
    "Reacher-misc",
    "Seaquest-MinAtar",
    "SimpleBandit-bsuite",
    "SpaceInvaders-MinAtar",
    "Swimmer-misc",
    "UmbrellaChain-bsuite",
]
# A grid, and one of every kind of space and ending. Each of the others compiles for seconds, shares its spaces with one
# of these, or is trained by other tests.
FEW = {"Breakout-MinAtar", "Catch-bsuite", "FrozenLake-misc", "PointRobot-misc", "UmbrellaChain-bsuite"}
FEW_AT_FIRST = [pytest.param(name, marks=[] if name in FEW else [pytest.mark.long]) for name in OFFLINE]
NUM_ENVS, NUM_STEPS = 3, 30


def random_action(space, key):
    """Uniform; for a Box from twice its range, so that clipping is exercised too."""
    if isinstance(space, Box):
        reach = np.minimum(np.maximum(np.abs(space.low), np.abs(space.high)), 1e3)
        return jax.random.uniform(key, space.shape, minval=-2 * reach, maxval=2 * reach)
    if isinstance(space, MultiDiscrete):
        return jnp.stack([jax.random.randint(key, (), 0, n) for n in space.n])
    return jax.random.randint(key, (), 0, space.n)


def walk(reset, step, space, num_envs, num_steps):
    """A compiled key -> (first observation, step results [T, N, ...]) of a uniformly random policy."""

    def run(key):
        key_reset, key_run = jax.random.split(key)
        observation, state = jax.vmap(reset)(jax.random.split(key_reset, num_envs))

        def one(state, key):
            keys = jax.random.split(key, (2, num_envs))
            action = jax.vmap(functools.partial(random_action, space))(keys[0])
            result = jax.vmap(step)(keys[1], state, action)
            return result[1], result

        return observation, jax.lax.scan(one, state, jax.random.split(key_run, num_steps))[1]

    return jax.jit(run)


@functools.cache
def random_walk(name):
    environment = make_environment(name)
    run = walk(environment.reset, step_and_reset(environment), environment.action_space, NUM_ENVS, NUM_STEPS)
    return run, *run(jax.random.key(0))


@pytest.mark.parametrize("name", FEW_AT_FIRST)
def test_contract(name):
    environment = make_environment(name)
    run, first, steps = random_walk(name)
    batch = NUM_STEPS, NUM_ENVS
    assert environment.name == name and environment.max_steps >= 1
    assert first.shape == (NUM_ENVS, *environment.observation_shape) and first.dtype == jnp.float32
    for observation in (steps.observation, steps.next_observation):
        assert observation.shape == (*batch, *environment.observation_shape) and observation.dtype == jnp.float32
        assert np.isfinite(observation).all()
    assert steps.reward.shape == batch and steps.reward.dtype == jnp.float32 and np.isfinite(steps.reward).all()
    for flag in (steps.terminated, steps.truncated):
        assert flag.shape == batch and flag.dtype == jnp.bool_

    done = np.asarray(steps.terminated | steps.truncated)
    changed = np.any(
        np.asarray(steps.observation != steps.next_observation), axis=tuple(range(2, steps.observation.ndim))
    )
    assert not (changed & ~done).any()  # without an end there is no reset
    assert probes.same_bits(run(jax.random.key(0)), (first, steps))  # equal keys, equal steps


@pytest.mark.parametrize("name", OFFLINE)
def test_step_keeps_every_dtype_and_shape_of_reset(name):
    environment = make_environment(name)
    key = jax.random.key(0)
    observation, state = jax.eval_shape(environment.reset, key)
    space = environment.action_space
    action = jax.ShapeDtypeStruct(space.shape, jnp.float32 if isinstance(space, Box) else jnp.int32)
    result = jax.eval_shape(environment.step, key, state, action)
    assert (result.observation, result.state) == (observation, state)
    leaves = jax.tree.leaves((observation, state, result))
    assert not any(leaf.weak_type for leaf in leaves)


def test_an_environment_made_with_64_bits_works_without_them():
    with jax.enable_x64(True):
        environment = make_environment("CartPole-v1", max_steps=77)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, state = environment.reset(jax.random.key(0))
        step = environment.step(jax.random.key(1), state, jnp.int32(0))
    assert {leaf.dtype.itemsize for leaf in jax.tree.leaves((state, step))} <= {1, 4}


def test_every_registered_environment_is_listed():
    found = available_environments()
    suites = {name: sentence for name, sentence in found.items() if name.endswith("/")}
    assert sorted(found.keys() - suites) == sorted([*OFFLINE, "MNISTBandit-bsuite"])
    assert set(suites) == {f"{suite}/" for suite in SUITES}
    for name, sentence in suites.items():  # all it has, or what to install
        assert sentence.startswith(f"{name}: ") or f"pip install '.[{name[:-1]}]'" in sentence
    assert "CartPole-v1, " in suites["gymnasium/"]
    for name in OFFLINE:
        assert isinstance(found[name], Environment), found[name]


def test_a_data_set_out_of_reach_is_one_sentence(monkeypatch):
    def unreachable(*_):
        raise OSError("Name or service not known\nand a second line")

    monkeypatch.setattr("gymnax.environments.bsuite.mnist.load_mnist.load_mnist", unreachable)
    make._by_name.cache_clear()
    reason = available_environments()["MNISTBandit-bsuite"]
    make._by_name.cache_clear()
    assert reason == (
        "MNISTBandit-bsuite cannot be made without its data set, which could not be downloaded "
        "(OSError: Name or service not known)."
    )


@pytest.mark.parametrize(
    "name, suggestion",
    [("CartPole", "CartPole-v1"), ("pendulum-v1", "Pendulum-v1"), ("Breakout-Minatar", "Breakout-MinAtar")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, suggestion):
    with pytest.raises(UsageError, match=rf"there is no environment '{name}'; did you mean .*{suggestion}") as caught:
        make_environment(name)
    assert "`trpo-jax envs`" in str(caught.value)


def test_a_name_like_no_other_is_answered_with_the_list():
    with pytest.raises(UsageError, match=r"there is no environment 'zzz'\. `trpo-jax envs` lists"):
        make_environment("zzz")


OWN_STEPS = [
    ("CartPole-v1", 40),
    ("Catch-bsuite", 30),
    ("DeepSea-bsuite", 20),
    ("FourRooms-misc", 501),
    ("FrozenLake-misc", 30),
    ("PointRobot-misc", 120),
    ("SimpleBandit-bsuite", 10),
    ("DiscountingChain-bsuite", 120),
    ("UmbrellaChain-bsuite", 30),
]


@pytest.mark.long
@pytest.mark.parametrize("name, num_steps", OWN_STEPS)
def test_trajectories_are_those_of_gymnax(name, num_steps):
    environment = make_environment(name)
    theirs, params = gymnax.make(name)
    space = environment.action_space

    def step(key, state, action):
        if isinstance(space, Box):
            action = jnp.clip(action, space.low, space.high)
        observation, state, reward, terminated, truncated, info = theirs.step(key, state, action, params)
        return observation, state, reward, terminated, truncated, info["final_observation"]

    key = jax.random.key(1)
    first, ours = walk(environment.reset, step_and_reset(environment), space, 2, num_steps)(key)
    their_first, other = walk(lambda key: theirs.reset(key, params), step, space, 2, num_steps)(key)
    if name == "FrozenLake-misc":
        one_hot = functools.partial(jax.nn.one_hot, num_classes=16)
        their_first = one_hot(their_first)
        other = (one_hot(other[0]), *other[1:5], one_hot(other[5]))
    np.testing.assert_allclose(first, their_first, rtol=1e-6)
    for mine, their in zip(
        (ours.observation, ours.reward, ours.terminated, ours.truncated, ours.next_observation),
        (other[0], other[2], other[3], other[4], other[5]),
        strict=True,
    ):
        np.testing.assert_allclose(mine, np.asarray(their), rtol=1e-5, atol=1e-6)
    assert (ours.terminated | ours.truncated).any()  # an end and a reset were among the steps


def test_pendulum_is_cut_off_after_200_steps_and_never_terminates():
    environment = make_environment("Pendulum-v1")
    _, steps = walk(environment.reset, step_and_reset(environment), environment.action_space, 2, 401)(jax.random.key(2))
    assert not steps.terminated.any()
    np.testing.assert_array_equal(np.flatnonzero(steps.truncated[:, 0]), [199, 399])
    np.testing.assert_array_equal(np.flatnonzero(steps.truncated[:, 1]), [199, 399])
    # The observation before the reset follows from the one before it: cos and sin move by at most 8 · 0.05 in angle,
    # where a fresh start would be anywhere; and it differs from the first observation of the next episode.
    before, after, fresh = (
        np.asarray(x) for x in (steps.observation[198], steps.next_observation[199], steps.observation[199])
    )
    assert (np.abs(after - before)[:, :2] <= 0.41).all()
    assert not np.allclose(after, fresh)
    assert (np.abs(fresh[:, 2]) <= 1).all()  # speeds at a start lie in ±1


def test_deep_sea_raises_both_flags_at_once():
    environment = make_environment("DeepSea-bsuite")
    _, steps = walk(environment.reset, step_and_reset(environment), environment.action_space, 2, 16)(jax.random.key(0))
    np.testing.assert_array_equal(steps.terminated, steps.truncated)
    np.testing.assert_array_equal(np.flatnonzero(steps.terminated[:, 0]), [7, 15])


def test_cart_pole_falls_and_starts_again_near_upright():
    _, _, steps = random_walk("CartPole-v1")
    fallen = np.asarray(steps.terminated)
    assert fallen.any() and not steps.truncated.any()
    assert (np.abs(np.asarray(steps.observation)[fallen]) <= 0.05).all()
    assert (np.abs(np.asarray(steps.next_observation)[fallen])[:, 2] > 0.2).all()


def test_frozen_lake_observes_unit_vectors():
    _, first, steps = random_walk("FrozenLake-misc")
    assert make_environment("FrozenLake-misc").observation_shape == (16,)
    for observation in (first, steps.observation, steps.next_observation):
        assert set(np.unique(observation)) == {0, 1} and (np.sum(observation, -1) == 1).all()


def test_declared_spaces():
    expected = {"CartPole-v1": Discrete(2), "Seaquest-MinAtar": Discrete(6), "SimpleBandit-bsuite": Discrete(11)}
    for name, space in expected.items():
        assert make_environment(name).action_space == space
    box = make_environment("PointRobot-misc").action_space
    np.testing.assert_allclose([box.low, box.high], [[-0.1, -0.1], [0.1, 0.1]])


def test_point_robot_moves_no_further_than_its_bounds():
    environment = make_environment("PointRobot-misc")
    state = environment.reset(jax.random.key(0))[1]
    step = jax.jit(environment.step)
    far, edge, inside = (step(jax.random.key(1), state, jnp.full(2, x)).observation for x in (50.0, 0.1, 0.05))
    np.testing.assert_array_equal(far, edge)
    assert not np.array_equal(far, inside)


def test_an_environment_made_inside_a_trace_leaves_no_tracer_behind():
    make._by_name.cache_clear()

    @jax.jit
    def first_observation(key):
        return make_environment("DiscountingChain-bsuite").reset(key)[0]

    inside = first_observation(jax.random.key(0))
    outside = make_environment("DiscountingChain-bsuite")  # from the cache
    np.testing.assert_array_equal(outside.reset(jax.random.key(0))[0], inside)
    result = jax.jit(outside.step)(jax.random.key(1), outside.reset(jax.random.key(0))[1], jnp.int32(1))
    assert np.isfinite(result.observation).all()


def test_what_is_imported_inside_a_trace_keeps_no_tracer(python):
    # In a process of its own, where gymnax's modules, and their arrays, are not there yet.
    code = """
import sys, jax
from trpo_jax import make_environment
for name in ("FrozenLake-misc", "MetaMaze-misc"):
    reset = lambda key: make_environment(name).reset(key)[0]
    first = jax.jit(reset)(jax.random.key(0))
    assert (jax.jit(jax.vmap(reset))(jax.random.key(0)[None])[0] == first).all()
    environment = make_environment(name)
    environment.step(jax.random.key(1), environment.reset(jax.random.key(0))[1], 1)
modules = [(name, module) for name, module in sys.modules.items() if type(module) is type(sys)]  # those that have run
kept = [(n, k) for n, m in modules for k, v in vars(m).items() if issubclass(type(v), jax.core.Tracer)]
assert not kept, kept
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


def test_names_are_made_once_and_environments_are_copyable():
    environment = make_environment("CartPole-v1")
    assert make_environment("CartPole-v1") is environment
    twin = copy.deepcopy(environment)
    assert hash(environment) == hash(environment) and twin.observation_shape == environment.observation_shape
    assert probes.same_bits(twin.reset(jax.random.key(0)), environment.reset(jax.random.key(0)))


class Halfway(GymnaxEnvironment):
    """A gymnax environment that defines `step_env` and `reset_env` only, as its authors recommend."""

    @property
    def default_params(self):
        return EnvParams(max_steps_in_episode=3)

    def reset_env(self, key, params):
        return jnp.zeros(2), EnvState(time=0)

    def step_env(self, key, state, action, params):
        state = EnvState(time=state.time + 1)
        return jnp.full(2, state.time, jnp.float32), state, action, jnp.bool_(False), {}

    def action_space(self, params):
        return spaces.Discrete(4)


class Restless(Halfway):
    """Overrides the public `step`, which must then be the one that is used: its reward is ten times as large."""

    def step(self, key, state, action, params=None):
        observation, state, reward, terminated, truncated, info = super().step(key, state, action, params)
        return observation, state, 10 * reward, terminated, truncated, info


class Pairs(Halfway):
    """Actions in gymnax's own Tuple of Discrete."""

    def action_space(self, params):
        return spaces.Tuple([spaces.Discrete(2), spaces.Discrete(3)])

    def step_env(self, key, state, action, params):
        return super().step_env(key, state, action[0] + 2 * action[1], params)


class Dictionaries(Halfway):
    def reset_env(self, key, params):
        return {"position": jnp.zeros(2)}, EnvState(time=0)


def test_a_subclass_with_step_env_and_reset_env_is_enough():
    environment = make_environment(Halfway())
    assert environment.max_steps == 3 and environment.action_space == Discrete(4)
    _, steps = walk(environment.reset, step_and_reset(environment), environment.action_space, 1, 7)(jax.random.key(0))
    np.testing.assert_array_equal(np.flatnonzero(steps.truncated), [2, 5])
    np.testing.assert_array_equal(steps.next_observation[:, 0, 0], [1, 2, 3, 1, 2, 3, 1])
    np.testing.assert_array_equal(steps.observation[:, 0, 0], [1, 2, 0, 1, 2, 0, 1])
    assert make_environment(Halfway(), max_steps=2).max_steps == 2
    assert make_environment(Halfway(), params=EnvParams(max_steps_in_episode=9)).max_steps == 9


def test_a_subclass_with_a_step_of_its_own_is_taken_at_its_word():
    environment = make_environment(Restless())
    result = environment.step(jax.random.key(0), environment.reset(jax.random.key(0))[1], jnp.int32(2))
    assert float(result.reward) == 20


def test_gymnax_tuples_and_dictionaries():
    assert make_environment(Pairs()).action_space == MultiDiscrete((2, 3))
    with pytest.raises(
        UsageError, match=r"^Dictionaries returns a different observation after a step than after a reset"
    ):
        make_environment(Dictionaries())


class Elsewhere(Halfway):
    """Spaces of Gymnasium's; its state is told what the environment was given."""

    def __init__(self, actions, observations=None, observation=()):
        super().__init__()
        self.actions, self.observations, self.observation = actions, observations, observation
        self.given = None

    def action_space(self, params):
        return self.actions

    def observation_space(self, params):
        return self.observations

    def reset_env(self, key, params):
        return jnp.asarray(self.observation), EnvState(time=0)

    def step_env(self, key, state, action, params):
        self.given = action
        return jnp.asarray(self.observation), EnvState(time=state.time + 1), 0.0, jnp.bool_(False), {}


@pytest.mark.parametrize(
    "space, ours, action, given",
    [
        (gym.Discrete(3, start=10), Discrete(3), 2, 12),
        (gym.MultiBinary(3), MultiDiscrete((2, 2, 2)), [1, 0, 1], [1, 0, 1]),
        (gym.MultiBinary((1, 2)), MultiDiscrete((2, 2)), [1, 0], [[1, 0]]),
        (gym.MultiDiscrete([2, 3], start=[1, 5]), MultiDiscrete((2, 3)), [1, 0], [2, 5]),
        (gym.MultiDiscrete([[2], [3]]), MultiDiscrete((2, 3)), [1, 0], [[1], [0]]),
        (gym.Tuple((gym.Discrete(2, start=4), gym.Discrete(3))), MultiDiscrete((2, 3)), [1, 2], [5, 2]),
        (gym.Box(0, 5, (2,), np.int32), None, [1.7, 9.0], [2, 5]),
    ],
    ids=str,
)
def test_actions_in_spaces_of_gymnasium_arrive_as_the_spaces_say(space, ours, action, given):
    env = Elsewhere(space, observation=0.0)
    environment = make_environment(env)
    assert ours is None or environment.action_space == ours
    with jax.disable_jit():
        environment.step(jax.random.key(0), environment.reset(jax.random.key(0))[1], jnp.asarray(action))
    found = np.asarray(env.given)
    np.testing.assert_array_equal(found, given)
    assert np.issubdtype(found.dtype, np.integer)


def test_an_index_among_categories_counts_from_their_start():
    environment = make_environment(Elsewhere(gym.Discrete(2), gym.Discrete(4, start=10), 11))
    np.testing.assert_array_equal(environment.reset(jax.random.key(0))[0], [0, 1, 0, 0])


@pytest.mark.parametrize("name", FEW_AT_FIRST)
def test_every_environment_trains(name):
    config = Config(
        env=name,
        num_envs=2,
        num_steps=8,
        cg_iterations=2,
        fisher_fraction=1.0,  # a tenth of 16 samples would point nowhere
    )

    def run(key):
        state = init(config, key)
        return state, *train_step(config, state)

    before, after, metrics = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 2))
    for leaf in jax.tree.leaves((after.learner.policy_params, after.learner.value_params, after.actor.observation)):
        assert np.isfinite(leaf).all()
    assert (metrics.accepted == 1).any() or (metrics.gradient_norm == 0).all()
    assert (metrics.mean_kl <= 0.01).all()
    assert not probes.same_bits(before.learner.value_params, after.learner.value_params)
    assert (after.iteration == 1).all()


@pytest.mark.parametrize(
    "name, distribution", [("CartPole-v1", Categorical), ("Pendulum-v1", DiagonalGaussian)], ids=["discrete", "box"]
)
def test_default_policies_fit_the_action_space(name, distribution):
    from trpo_jax import make_policy

    environment = make_environment(name)
    policy = make_policy(environment)
    observation = jnp.zeros(environment.observation_shape)
    assert isinstance(policy.apply(policy.init(jax.random.key(0), observation), observation), distribution)


DRAWING = """
import sys
{before}
from trpo_jax import make_environment
make_environment("Pong-misc")
print(sorted({{"matplotlib.figure", "seaborn.utils", "pandas"}} & set(sys.modules)))
import gymnax.environments.misc.pong as pong
{after}
print(pong.plt is matplotlib.pyplot is plt, pong.plt.Figure.__name__, pong.colors.ListedColormap.__name__)
print(len(pong.sns.color_palette("cubehelix", 4)), "set_theme" in dir(seaborn))
"""
IMPORTS = "import matplotlib.pyplot, matplotlib.pyplot as plt, seaborn"


def test_plotting_libraries_run_when_something_is_drawn(python):
    code = DRAWING.format(before="", after=IMPORTS)
    assert python("-c", code).stdout.splitlines() == ["[]", "True Figure ListedColormap", "4 True"]


@pytest.mark.long
def test_plotting_libraries_that_were_there_are_left_alone(python):
    code = DRAWING.format(before=f"{IMPORTS}; plt.mark = seaborn.mark = 1", after="print(pong.plt.mark, pong.sns.mark)")
    all_there = "['matplotlib.figure', 'pandas', 'seaborn.utils']"
    assert python("-c", code).stdout.splitlines() == [all_there, "1 1", "True Figure ListedColormap", "4 True"]


def test_parameters_are_given_by_name():
    environment = make_environment("CartPole-v1", params={"gravity": 20.0, "max_steps_in_episode": 30})
    assert environment.max_steps == 30
    defaults = gymnax.make("CartPole-v1")[1]
    whole = make_environment("CartPole-v1", params=defaults.replace(gravity=20.0))
    usual = make_environment("CartPole-v1")
    key, action = jax.random.key(0), jnp.int32(1)
    state = usual.reset(key)[1]
    one, other, third = (e.step(key, state, action).observation for e in (environment, whole, usual))
    np.testing.assert_array_equal(one, other)
    assert (one != third).any()


WRONG_PARAMETERS = {
    "unknown": ({"gravty": 20.0}, r"^CartPole-v1 has no parameter 'gravty'; did you mean gravity\?$"),
    "no number": ({"gravity": "high"}, r"^parameter gravity of CartPole-v1 must be like 9\.8, got 'high'\.$"),
    "many": ({"gravity": np.ones(3)}, r"^parameter gravity of CartPole-v1 must be like 9\.8, got array"),
    "of no kind": (
        9.8,
        r"^params of CartPole-v1 must be a dict of changes, or an object with all of them, got 9\.8\.$",
    ),
}


@pytest.mark.parametrize("params, message", WRONG_PARAMETERS.values(), ids=WRONG_PARAMETERS.keys())
def test_parameters_that_are_none_are_refused(params, message):
    with pytest.raises(UsageError, match=message):
        make_environment("CartPole-v1", params=params)


def test_training_maps_over_parameters_of_the_environment():
    def run(num_envs):
        def agent(limit, gravity, key):
            env = make_environment("CartPole-v1", params={"gravity": gravity, "max_steps_in_episode": limit})
            networks = {"policy": probes.linear_policy(4), "value": probes.linear_value(4)}
            config = probes.small_config(env, **networks, num_envs=num_envs, num_iterations=1, num_steps=5)
            return train(config, key)[1]

        values = jnp.array([2, 3]), jnp.array([9.8, 20.0]), jax.random.split(jax.random.key(0), 2)
        return jax.jit(jax.vmap(agent))(*values)

    for num_envs in (4, 32):  # on a CPU, environments enough for agents to take turns
        metrics = run(num_envs)
        np.testing.assert_array_equal(metrics.episode_length[:, 0], [2, 3])
        np.testing.assert_array_equal(metrics.num_episodes[:, 0], [2 * num_envs, num_envs])
