"""The checker of environments: silent about sound ones, and one sentence about each fault."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from jax.experimental import io_callback

from trpo_jax import Discrete, Environment, Step, check_environment
from trpo_jax.cli import main


def make(step=None, **fields):
    """A sound environment of three steps, with something in another's place."""

    def reset(key):
        return jax.random.uniform(key, (2,)), jnp.int32(0)

    def sound(key, state, action):
        end = state == 2
        return Step(jax.random.uniform(key, (2,)), state + 1, jnp.float32(1), end, jnp.bool_(False))

    return Environment("Mine", (2,), Discrete(2), None, reset, step(sound) if step else sound, **fields)


def replaced(**what):
    return lambda sound: lambda *arguments: sound(*arguments)._replace(**what)


def host_counter(sound):
    count = itertools.count()

    def step(key, state, action):
        number = io_callback(lambda: np.float32(next(count)), jax.ShapeDtypeStruct((), np.float32))
        return sound(key, state, action)._replace(reward=number)

    return step


FAULTS = {
    "observation": (make(replaced(observation=jnp.full(2, jnp.nan))), r"^observations must be finite, .* at step 1\.$"),
    "reward": (make(replaced(reward=jnp.float32(jnp.inf))), r"^rewards must be finite"),
    "endless": (make(replaced(terminated=jnp.bool_(False))), r"^no episode ended within 1,000 random steps"),
    "dtype": (make(replaced(reward=jnp.int32(1))), r"step must return a reward of float32\[\], got int32\[\]\.$"),
    "state": (make(replaced(state=(jnp.int32(0), 1))), r"must keep the state"),
    "host": (make(host_counter), r"^two runs from the same key differ"),
    "mask": (
        make(action_mask=lambda o: jnp.zeros((*o.shape[:-1], 2), bool)),
        r"^the mask of legal actions forbids all",
    ),
}


@pytest.mark.parametrize("environment, message", FAULTS.values(), ids=FAULTS.keys())
def test_each_fault_is_one_sentence(environment, message):
    wrong = check_environment(environment)
    assert any(re.search(message, sentence) for sentence in wrong), wrong
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in wrong)


@pytest.mark.parametrize(
    "env",
    [make(), "CartPole-v1", "Pendulum-v1", probes.TwoSteps()],
    ids=["Environment", "CartPole", "Pendulum", "gymnax-like"],
)
def test_a_sound_one_passes(env):
    assert check_environment(env) == []


def test_observations_outside_their_space_are_found():
    class Outside(probes.TwoSteps):
        def observation_space(self):
            return probes.box(0.0, 1.0)  # and the time goes up to 2

    assert check_environment(Outside()) == [
        "observations must lie in the declared SimpleNamespace, but one has an entry of 2."
    ]


def test_the_command_says_whether_anything_is_wrong(capsys, monkeypatch):
    assert main(["check", "CartPole-v1"]) == 0
    assert capsys.readouterr().out == "CartPole-v1: nothing is wrong.\n"
    assert main(["check", "CartPol-v1"]) == 2
    monkeypatch.setattr("trpo_jax.environments.contract.check_environment", lambda env: ["it is odd."])
    assert main(["check", "CartPole-v1"]) == 1
    assert capsys.readouterr().out == "CartPole-v1: it is odd.\n"
