"""What the library adds to an environment: resets, time limits, dtypes, clipping and honest refusals."""

import copy
import dataclasses
from types import SimpleNamespace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from probes import step_and_reset

from trpo_jax import Environment, Step, UsageError, make_environment
from trpo_jax.environments.base import Box, Discrete, MultiDiscrete, make_box


def follow(environment, num_steps, action=0):
    """What is `Played` as a list, one entry per step."""
    step, state, rows = jax.jit(step_and_reset(environment)), environment.reset(jax.random.key(0))[1], []
    for i in range(num_steps):
        rows.append(step(jax.random.key(i), state, jnp.int32(action)))
        state = rows[-1].state
    return rows


def test_max_steps_cuts_a_gymnax_environment():
    environment = make_environment("MountainCar-v0", max_steps=4)
    assert environment.max_steps == 4
    assert make_environment("MountainCar-v0").max_steps == 200
    rows = follow(environment, 9)
    assert [i for i, row in enumerate(rows) if row.truncated] == [3, 7]


def test_max_steps_cannot_be_imposed_on_an_environment_that_resets_itself():
    with pytest.raises(UsageError, match=r"it cannot be given max_steps"):
        make_environment(probes.Endless(), max_steps=10)


@pytest.mark.parametrize("shape", [(2,), (2, 3), ()])
def test_box_actions_are_clipped_and_reshaped_for_the_environment(shape):
    size = int(np.prod(shape))
    environment = make_environment(probes.RecordAction(-0.5, 0.25, shape))
    space = environment.action_space
    assert isinstance(space, Box) and space.shape == (size,)
    assert space.low.dtype == space.high.dtype == np.float32
    action = jnp.linspace(-2, 2, size) if size > 1 else jnp.array([2.0])
    result = environment.step(jax.random.key(0), environment.reset(jax.random.key(0))[1], action)
    np.testing.assert_array_equal(result.observation, np.clip(action, -0.5, 0.25).reshape(shape))


def test_boxes_take_scalar_and_array_bounds():
    box = make_box(-1, np.array([[1.0, 2.0]]), (1, 2))
    np.testing.assert_array_equal(box.low, [-1, -1])
    np.testing.assert_array_equal(box.high, [1, 2])
    own = Box(-1.0, np.ones((1, 2)))  # of one's own, in whatever shape
    assert own.shape == (2,) and own.low.tolist() == [-1, -1] and own.low.dtype == np.float32
    for low, high in ((np.zeros(2), np.ones(3)), ("low", 1)):
        with pytest.raises(UsageError, match=r"^bounds of a Box must be numbers, or arrays of one shape, got "):
            Box(low, high)
    assert str(box) == "Box(2) mixed bounds" and str(make_box(-2, 2, (1,))) == "Box(1) [-2, 2]"
    assert str(Discrete(3)) == "Discrete(3)" and str(MultiDiscrete((2, 3))) == "MultiDiscrete(2, 3)"


class Loose(probes.Probe):
    """Returns what an untyped environment returns: Python numbers, integers and weak types."""

    def start(self, key):
        return {"position": 0, "velocity": jnp.asarray(0.5), "flag": False}

    def observe(self, state):
        return jnp.stack([jnp.asarray(state["position"], jnp.int32)] * 2)

    def move(self, key, state, action):
        state = {"position": state["position"] + 0.5, "velocity": jnp.float32(0.25), "flag": True}
        return state, action, state["position"] > 2, False


def test_loose_dtypes_become_fixed_ones():
    environment = make_environment(Loose())
    observation, state = jax.eval_shape(environment.reset, jax.random.key(0))
    result = jax.eval_shape(environment.step, jax.random.key(0), state, jnp.int32(0))
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(result.state), strict=True)
    assert all(a.dtype == b.dtype and not a.weak_type and not b.weak_type for a, b in pairs)
    assert state.state["position"].dtype == jnp.float32  # an integer at the reset, a float after a step
    assert observation.dtype == result.observation.dtype == jnp.float32
    assert result.reward.dtype == jnp.float32 and result.terminated.dtype == result.truncated.dtype == jnp.bool_
    rows = follow(environment, 5, action=1)
    assert [bool(row.terminated) for row in rows] == [False] * 4 + [True]


def test_an_object_without_base_class_or_parameters_is_enough():
    environment = make_environment(probes.Countdown())
    assert environment.name == "Countdown" and environment.action_space == Discrete(2)
    assert environment.observation_shape == (1,) and environment.max_steps is None
    observation, state = environment.reset(jax.random.key(3))
    for left in range(int(observation[0]), 0, -1):
        result = environment.step(jax.random.key(left), state, jnp.int32(0))
        state = result.state
        assert float(result.observation[0]) == left - 1
        assert bool(result.terminated) == (left == 1)


class Parametrized:
    """gymnax's signature with parameters; the reward is the parameter `scale`."""

    name = "scaled"
    default_params = SimpleNamespace(scale=3.0, max_steps_in_episode=7.0)

    def action_space(self, params):
        return probes.discrete(2)

    def reset(self, key, params):
        return jnp.zeros(2), jnp.int32(0)

    def step(self, key, state, action, params):
        observation = jnp.zeros(2)
        return observation, state, params.scale, False, False, {"final_observation": observation}


def test_own_parameters_are_passed_on():
    environment = make_environment(Parametrized())
    assert environment.name == "scaled" and environment.max_steps == 7
    state = environment.reset(jax.random.key(0))[1]
    assert float(environment.step(jax.random.key(0), state, jnp.int32(0)).reward) == 3
    other = make_environment(Parametrized(), params=SimpleNamespace(scale=-1.0))
    assert float(other.step(jax.random.key(0), state, jnp.int32(0)).reward) == -1
    assert other.max_steps is None
    assert make_environment(Parametrized(), params={"scale": 1.0, "max_steps_in_episode": 4.0}).max_steps == 4


def test_a_dict_of_parameters_has_a_time_limit_too():
    environment = Parametrized()
    environment.default_params = {"scale": 3.0, "max_steps_in_episode": 7}
    environment.step = lambda key, state, action, params: Parametrized().step(
        key, state, action, SimpleNamespace(**params)
    )
    assert make_environment(environment).max_steps == 7


def test_an_environment_passes_through_and_is_hashable_and_copyable():
    environment = make_environment(probes.Countdown())
    assert make_environment(environment) is environment
    assert environment == environment and environment != make_environment(probes.Countdown())
    assert {environment: 1}[environment] == 1
    twin = copy.deepcopy(environment)
    assert isinstance(twin, Environment) and twin.action_space == environment.action_space
    key = jax.random.key(1)
    assert probes.same_bits(twin.reset(key), environment.reset(key))
    copied = dataclasses.replace(environment, name="other")
    assert copied.name == "other" and copied.reset is environment.reset


def test_spaces_and_steps_are_plain_data():
    assert copy.deepcopy(Discrete(3)) == Discrete(3)
    assert hash(MultiDiscrete((2, 3))) == hash(MultiDiscrete((2, 3)))


def test_a_tuple_of_discrete_actions_becomes_multi_discrete():
    environment = make_environment(probes.PairOfChoices())
    assert environment.action_space == MultiDiscrete((2, 3))
    state = environment.reset(jax.random.key(0))[1]
    rewards = [
        float(environment.step(jax.random.key(0), state, jnp.array(action)).reward)
        for action in ([0, 0], [1, 0], [1, 2])
    ]
    assert rewards == [0, 1, 2]


class FiveValues(probes.OneStep):
    def step(self, key, state, action):
        observation, state, reward, terminated, _, info = super().step(key, state, action)
        return observation, state, reward, terminated, info


class NoFinalObservation(probes.OneStep):
    def step(self, key, state, action):
        return *super().step(key, state, action)[:5], {}


class DictObservation(probes.OneStep):
    def observe(self, state):
        return {"position": jnp.zeros(2), "camera": [jnp.zeros((3, 3))]}


class StrangeActions(probes.OneStep):
    actions = "up or down"


class NoActions(probes.OneStep):
    actions = probes.discrete(0)


class Changeable(probes.OneStep):
    def move(self, key, state, action):
        return jnp.zeros(3), 1.0, True, False

    def step(self, key, state, action):
        state, *rest = self.move(key, state, action)
        return jnp.zeros(1), state, *rest, {"final_observation": jnp.zeros(1)}


class Growing(probes.OneStep):
    def step(self, key, state, action):
        return jnp.zeros(2), state, 1.0, True, False, {"final_observation": jnp.zeros(2)}


class TwoRewards(probes.OneStep):
    def move(self, key, state, action):
        return state, jnp.ones(2), True, False


class Broken(probes.OneStep):
    def move(self, key, state, action):
        return state["position"], 1.0, True, False


class Imaginary(probes.OneStep):
    def observe(self, state):
        return jnp.zeros(2, jnp.complex64)


def own(**changes):
    """An `Environment` made by hand, in one way or another not as it says."""
    right = make_environment(probes.TwoSteps())
    return dataclasses.replace(right, name="own", **changes)


def resets_itself(key, state, action):
    return jnp.zeros(1), state, jnp.float32(0), jnp.bool_(False), jnp.bool_(True), jnp.ones(1)


def six_values(key, state, action):
    return Step(*resets_itself(key, state, action))


class Hopper:
    """What Brax has."""

    action_size = observation_size = 3

    def reset(self, rng): ...

    def step(self, state, action): ...


Hopper.__module__ = "brax.envs.hopper"


REFUSED = {
    "five values": (FiveValues(), r"^FiveValues\.step must return gymnax 1\.x's six values .* returned 5"),
    "no final observation": (NoFinalObservation(), r"^NoFinalObservation\.step must .*info\['final_observation'\]"),
    "dict observations": (DictObservation(), r"^observations of DictObservation, entry camera, must be single arrays"),
    "strange actions": (StrangeActions(), r"^actions of StrangeActions lie in 'up or down'; only Discrete, Multi"),
    "no step": (
        SimpleNamespace(reset=lambda key: key),
        r"has no method step\(\); an environment needs reset, step and",
    ),
    "no reset": (SimpleNamespace(step=lambda key: key), r"has no method reset\(\)"),
    "no action_space": (SimpleNamespace(reset=len, step=len), r"has no method action_space\(\)"),
    "no actions": (NoActions(), r"^actions of NoActions lie in Discrete\(0\), which contains no action"),
    "another state": (
        Changeable(),
        r"^Changeable returns a different state after a step than after a reset: \.state \[3\] instead of \.state \[\]",
    ),
    "another observation": (Growing(), r"^Growing returns a different observation after .*: \[2\] instead of \[1\]"),
    "two rewards": (TwoRewards(), r"^TwoRewards must return one reward per step, got an array of shape \(2,\)"),
    "an error": (Broken(), r"^step of Broken fails \(\w+: .*, test_base\.py:\d+ in move\)"),
    "complex": (Imaginary(), r"^observations of Imaginary are complex"),
    "a class": (probes.OneStep, r"^env must be an environment, but OneStep is a class; give one of its instances"),
    "brax": (
        Hopper(),
        r"^Hopper is an environment object of brax; give its name instead, such as env=.brax/NAME",
    ),
    "gymnasium": (
        gymnasium.make("CartPole-v1"),
        r"^TimeLimit|OrderEnforcing is an environment object of gymnasium; .* such as env=.gymnasium/CartPole-v1.",
    ),
    "own shape": (
        own(observation_shape=(7,)),
        r"^own\.reset must return an observation of float32\[7\], got float32\[1\]",
    ),
    "own actions": (
        own(action_space=3),
        r"^own\.action_space must be a Discrete, MultiDiscrete or Box of trpo_jax, got 3",
    ),
    "own step": (own(step=lambda *_: 3), r"^step of own fails \(TypeError"),
    "own step that resets": (
        own(step=resets_itself),
        r"^own\.step returns six values, but a step must not reset",
    ),
    "own Step of six": (
        own(step=six_values),
        r"^own\.step returns six values, but a step must not reset the environment: return ",
    ),
    "own state": (
        own(
            step=lambda key, state, action: Step(jnp.zeros(1), jnp.float32(0), *resets_itself(key, state, action)[2:5])
        ),
        r"^own\.step must keep the state of reset, of \.state int32\[\], got float32\[\]",
    ),
    "own restart": (
        own(restart=lambda key, state: (jnp.zeros(2), state)),
        r"^own\.restart must return an observation of float32\[1\], got float32\[2\]",
    ),
    "own limit": (own(max_steps=-3), r"^max_steps of own must be a whole number from 1 to 2,147,483,647, got -3"),
    "own limit of a half": (own(max_steps=2.5), r"^max_steps of own must be a whole number .* got 2\.5"),
    "own number of actions": (
        own(action_space=Discrete(3.0)),
        r"^n of Discrete of own must be a whole number, got 3\.0",
    ),
    "own tuple of actions": (own(action_space=Discrete((2, 3))), r"^n of Discrete of own must be a whole number, got"),
    "own choices": (own(action_space=MultiDiscrete(3)), r"^n of MultiDiscrete of own must be a tuple of whole numbers"),
    "own choices of halves": (own(action_space=MultiDiscrete((2.0, 3))), r"^n of MultiDiscrete of own must be a tuple"),
    "own shape that is none": (own(observation_shape=1), r"^observation_shape of own must be a tuple of whole numbers"),
    "own shape of nothing": (own(observation_shape=(0,)), r"^observation_shape of own must be .* got \(0,\)"),
    "own entries": (own(entries=["a"]), r"^entries of own must be names with shapes"),
    "own entry": (own(entries={"a": 1}), r"^the shape of the entry 'a' of own must be a tuple of whole numbers"),
    "own mask": (
        own(action_mask=lambda o: jnp.ones((*o.shape[:-1], 5), bool)),
        r"^own\.action_mask must return bool\[2\] for observations of \[1\], got bool\[5\]",
    ),
    "own mask of numbers": (
        own(action_mask=lambda o: jnp.ones((*o.shape[:-1], 2))),
        r"^own\.action_mask must return bool\[2\] .* got float32\[2\]",
    ),
    "own mask of one": (
        own(action_mask=lambda o: jnp.ones(2, bool)),
        r"^own\.action_mask must return bool\[3,2\]|bool\[3, 2\] for observations of \[3, 1\], got bool\[2\]",
    ),
    "own mask of a Box": (
        own(action_space=make_box(-1, 1, (2,)), action_mask=lambda o: o > 0),
        r"^own has an action_mask, but its actions are not discrete",
    ),
    "None": (None, r"^env must be a name, an Environment or an environment object, got None"),
    "a number": (3, r"^env must be a name.*got 3"),
    "a list": (["CartPole-v1"], r"^env must be a name"),
}


@pytest.mark.parametrize("env, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_trained_is_refused_in_one_sentence(env, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_environment(env)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 300


BYTES = SimpleNamespace(low=0, high=255, shape=(2, 2, 1), dtype=jnp.uint8)
SEEN = {  # what is declared, what is given, what the agent sees of 51
    "bytes": (BYTES, jnp.uint8, 0.2),
    "undeclared bytes": (None, jnp.uint8, 0.2),
    "a picture of floats": (SimpleNamespace(low=0, high=255, shape=(2, 2, 1), dtype=jnp.float32), jnp.float32, 0.2),
    "floats": (None, jnp.float32, 51),
    "wide bounds": (SimpleNamespace(low=-255, high=255, shape=(2, 2, 1), dtype=jnp.float32), jnp.int32, 51),
}


@pytest.mark.parametrize("declared, dtype, expected", SEEN.values(), ids=SEEN.keys())
def test_bytes_are_seen_between_0_and_1(declared, dtype, expected):
    env = probes.OneStep()
    env.observe = lambda state: jnp.full((2, 2, 1), 51, dtype)
    if declared is not None:
        env.observation_space = lambda: declared
    observation, _ = make_environment(env).reset(jax.random.key(0))
    np.testing.assert_allclose(observation, np.full((2, 2, 1), expected), rtol=1e-6)


@pytest.mark.parametrize("value", [0, -3, 1.5, True, "ten"])
def test_a_limit_that_is_no_number_of_steps_is_refused(value):
    with pytest.raises(UsageError, match=r"^max_steps must be a whole number from 1 to 2,147,483,647, got"):
        make_environment("CartPole-v1", max_steps=value)
