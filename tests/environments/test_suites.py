"""The contract that the adapter of every suite meets, on the real package where it is installed."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest

from trpo_jax import Config, UsageError, init, make_environment, train_step
from trpo_jax.environments.base import Box, MultiDiscrete
from trpo_jax.environments.suites import SUITES, adapter

pytestmark = [
    pytest.mark.filterwarnings("default"),  # the suites' own
    pytest.mark.timeout(600),
]

NUM_ENVS, NUM_STEPS = 3, 7
PACKAGES = {"playground": "mujoco_playground"}

EXTRA_NEEDS = {"gymnasium/HalfCheetah-v5": ["mujoco"]}

# (name, a time limit that is sooner than any other end)
CASES = [
    ("gymnasium/CartPole-v1", 3),
    ("gymnasium/Pendulum-v1", 3),
    ("gymnasium/HalfCheetah-v5", 3),
    ("brax/fast", 3),
    ("brax/inverted_pendulum/spring", 3),
    ("playground/CartpoleBalance", 3),
    ("jumanji/Game2048-v1", 3),
    ("jumanji/RubiksCube-v0", 3),
    ("craftax/Craftax-Classic-Symbolic-v1", 3),
    ("xminigrid/MiniGrid-EmptyRandom-5x5", 3),
    ("navix/Navix-Empty-Random-5x5-v0", 3),
]
# Environments that a random policy soon brings to an end of their own: (name, steps)
MORTAL = [
    ("gymnasium/CartPole-v1", 60),
    ("brax/inverted_pendulum/spring", 60),
    ("jumanji/Tetris-v0", 60),
    ("xminigrid/MiniGrid-EmptyRandom-5x5", 60),
    ("navix/Navix-Empty-Random-5x5-v0", 60),
]
# How each suite is told a time limit of its own
OWN_LIMITS = [
    ("gymnasium/Pendulum-v1", "max_episode_steps"),
    ("playground/CartpoleBalance", "episode_length"),
    ("craftax/Craftax-Classic-Symbolic-v1", "max_timesteps"),
    ("xminigrid/MiniGrid-Empty-5x5", "max_steps"),
    ("navix/Navix-Empty-5x5-v0", "max_steps"),
]


def need(name):
    """Skip where a suite, an optional dependency, is not installed; `.ci/run` has a stage that installs all of them."""
    suite = name.split("/")[0]
    missing = [p for p in (PACKAGES.get(suite, suite), *EXTRA_NEEDS.get(name, ())) if not importlib.util.find_spec(p)]
    if missing:
        pytest.skip(f"{name} needs {', '.join(missing)}: pip install '.[{suite}]'")


def random_action(space, key):
    """Uniform; for a Box from twice its range, so that clipping is exercised too."""
    if isinstance(space, Box):
        return jax.random.uniform(key, space.shape, minval=2 * space.low, maxval=2 * space.high)
    if isinstance(space, MultiDiscrete):
        return jax.random.randint(key, space.shape, 0, jnp.array(space.n))
    return jax.random.randint(key, (), 0, space.n)


@functools.cache
def walk(name, max_steps, num_steps, own_limit=None):
    """(first observation, what is `Played` without its states [T, N]) of a random policy, twice."""
    params = None if own_limit is None else {own_limit: 3}
    environment = make_environment(name, params=params, max_steps=max_steps)

    def run(key):
        key_reset, key_run = jax.random.split(key)
        first, state = jax.vmap(environment.reset)(jax.random.split(key_reset, NUM_ENVS))

        def one(state, key):
            keys = jax.random.split(key, (2, NUM_ENVS))
            action = jax.vmap(functools.partial(random_action, environment.action_space))(keys[0])
            result = jax.vmap(probes.step_and_reset(environment))(keys[1], state, action)
            return result.state, result._replace(state=())

        return first, jax.lax.scan(one, state, jax.random.split(key_run, num_steps))[1]

    run = jax.jit(run)
    return environment, run(jax.random.key(1)), run(jax.random.key(1))


@pytest.mark.parametrize("name", ["gymnasium/HalfCheetah-v5", "brax/halfcheetah", "playground/CartpoleBalance"])
def test_making_one_leaves_nothing_in_the_users_folder(name, tmp_path, monkeypatch):
    need(name)
    monkeypatch.chdir(tmp_path)  # MuJoCo logs there what it thinks of a model
    make_environment(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, limit", CASES)
def test_contract(name, limit):
    need(name)
    environment, (first, steps), again = walk(name, limit, NUM_STEPS)
    batch = NUM_STEPS, NUM_ENVS
    assert environment.name == name and environment.max_steps == limit
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
    assert probes.same_bits((first, steps), again)  # equal keys, equal steps


@pytest.mark.parametrize("name, limit", CASES)
def test_a_time_limit_truncates_and_shows_the_observation_before_the_reset(name, limit):
    need(name)
    _, (first, limited), _ = walk(name, limit, NUM_STEPS)
    _, (same_first, free), _ = walk(name, 2 * NUM_STEPS, NUM_STEPS)
    np.testing.assert_array_equal(first, same_first)
    assert not limited.terminated.any() and not free.truncated.any()
    ends = np.arange(1, NUM_STEPS + 1) % limit == 0
    np.testing.assert_array_equal(limited.truncated, np.broadcast_to(ends[:, None], limited.truncated.shape))
    # Until the first limit both episodes are the same; what followed without it is what the limit cut off.
    np.testing.assert_allclose(limited.next_observation[:limit], free.observation[:limit], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(limited.reward[:limit], free.reward[:limit], rtol=1e-5, atol=1e-5)
    assert (limited.observation[limit - 1] != limited.next_observation[limit - 1]).any()


@pytest.mark.parametrize("name, setting", OWN_LIMITS)
def test_a_limit_of_the_suites_own_truncates_too(name, setting):
    need(name)
    environment, (_, steps), _ = walk(name, None, NUM_STEPS, setting)
    assert environment.max_steps == 3 and not steps.terminated.any()
    ends = np.arange(1, NUM_STEPS + 1) % 3 == 0
    np.testing.assert_array_equal(steps.truncated, np.broadcast_to(ends[:, None], steps.truncated.shape))


@pytest.mark.parametrize("name, num_steps", MORTAL)
def test_an_end_of_its_own_terminates(name, num_steps):
    need(name)
    _, (_, steps), _ = walk(name, 10 * num_steps, num_steps)
    assert steps.terminated.any() and not steps.truncated.any()
    ended = np.asarray(steps.terminated)
    assert (np.asarray(steps.observation)[ended] != np.asarray(steps.next_observation)[ended]).any()


@pytest.mark.parametrize("name", [name for name, _ in CASES if name != "gymnasium/Pendulum-v1"])
def test_it_trains(name):
    need(name)
    config = Config(env=name, num_envs=2, num_steps=8, cg_iterations=2, fisher_fraction=1.0)
    state = init(config, jax.random.key(0))
    after, metrics = jax.jit(train_step)(config, state)
    assert metrics.finite == 1 and metrics.mean_kl <= 0.01
    for leaf in jax.tree.leaves((after.learner.policy_params, after.learner.value_params, after.actor.observation)):
        assert np.isfinite(leaf).all()
    assert not probes.same_bits(state.learner.value_params, after.learner.value_params)
    before, then = jax.eval_shape(lambda: (state, after))  # no second trace, no mismatch in a scan
    assert jax.tree.structure(before) == jax.tree.structure(then)
    assert jax.tree.leaves(before) == jax.tree.leaves(then)


# Of each suite one; in a process of its own, where its modules, and the arrays in them, are not there yet. What is
# imported and made inside the first trace must serve in those that follow. (Quick:
# traced alone, for some compile for minutes.)
FIRST = {name.split("/")[0]: name for name, _ in reversed(CASES)} | {"playground": "playground/CartpoleBalance"}
IN_A_TRACE = """
import sys, jax
from trpo_jax import Config, evaluate, init, train
config = Config(env=sys.argv[1], num_envs=2, num_steps=2, num_iterations=1, cg_iterations=1, value_cg_iterations=1)
trace = jax.eval_shape if sys.argv[2] == "traced" else lambda function, *arguments: jax.jit(function)(*arguments)
key = jax.random.key(0)
state, _ = trace(lambda key: train(config, key), key)
trace(lambda state, key: evaluate(config, state, key, num_episodes=2, max_steps=3), state, key)
trace(lambda key: train(config.replace(num_steps=3), key), key)
modules = [(n, getattr(m, "__dict__", {})) for n, m in list(sys.modules.items()) if not n.startswith("jax")]
kept = [(n, k) for n, contents in modules for k, v in list(contents.items()) if type(v).__name__.endswith("Tracer")]
assert not kept, kept
"""


@pytest.mark.parametrize("how", ["traced", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("suite", SUITES)
def test_train_evaluate_and_train_again_where_the_suite_is_imported_inside_a_trace(suite, how, python):
    need(FIRST[suite])
    result = python("-c", IN_A_TRACE, FIRST[suite], how, timeout=550)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("suite", SUITES)
def test_a_missing_package_is_one_sentence_that_names_the_extra(suite, monkeypatch):
    package = PACKAGES.get(suite, suite)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UsageError) as caught:
        make_environment(f"{suite}/Some-Name-v0")
    assert str(caught.value) == (
        f"environments {suite}/… need the package {package}, which is not installed: pip install '.[{suite}]'."
    )


@pytest.mark.parametrize("suite", SUITES)
def test_unknown_names_and_listings(suite):
    need(f"{suite}/")
    with pytest.raises(UsageError, match=rf"there is no environment {suite}/Nonsense.*`trpo-jax envs`"):
        make_environment(f"{suite}/Nonsense")
    assert {name.split("/")[1] for name, _ in CASES if name.startswith(suite)} <= set(adapter(suite).names())


def test_an_unknown_suite_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"there is no suite 'gymnasum'; did you mean gymnasium\? `trpo-jax envs`"):
        make_environment("gymnasum/CartPole-v1")
    with pytest.raises(UsageError, match=r"params of gymnasium/CartPole-v1 must be a dict of keyword arguments"):
        make_environment("gymnasium/CartPole-v1", params=3)
