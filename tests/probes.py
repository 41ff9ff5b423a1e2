"""Small environments whose optimal values and policies are known, and what the tests of the trainer share.

Each is a plain object with gymnax's public interface (no base class, no parameters), so that training on one also
shows that a user's own object is enough. The answer is derived in each docstring; γ is the discount.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trpo_jax import Categorical, Config, DiagonalGaussian, Discrete, Environment, Network, Step


def discrete(n):
    return SimpleNamespace(n=n)


def box(low, high, shape=(1,)):
    return SimpleNamespace(low=low, high=high, shape=shape)


class Probe:
    """Turns `start`, `move` and `observe` into `reset` and the six-value, self-resetting `step`.

    `start(key)` -> state; `move(key, state, action)` -> (state, reward, terminated, truncated).
    """

    actions = discrete(2)

    def action_space(self):
        return self.actions

    def observe(self, state):
        return jnp.reshape(state, (1,)).astype(jnp.float32)

    def reset(self, key):
        state = self.start(key)
        return self.observe(state), state

    def step(self, key, state, action):
        key_step, key_reset = jax.random.split(key)
        next_state, reward, terminated, truncated = self.move(key_step, state, action)
        final = self.observe(next_state)
        done = jnp.logical_or(terminated, truncated)
        observation, state = jax.tree.map(
            lambda new, old: jnp.where(done, new, old), self.reset(key_reset), (final, next_state)
        )
        return observation, state, reward, terminated, truncated, {"final_observation": final}


class OneStep(Probe):
    """One action, reward 1, the end: V = 1."""

    actions = discrete(1)

    def start(self, key):
        return jnp.int32(0)

    def move(self, key, state, action):
        return state, 1.0, True, False


class TwoSteps(Probe):
    """Two steps, reward 1 at the second: V(s₁) = 1 and V(s₀) = γ. The observation is the time."""

    def start(self, key):
        return jnp.int32(0)

    def move(self, key, state, action):
        return state + 1, jnp.where(state == 1, 1.0, 0.0), state == 1, False


class RewardedAction(Probe):
    """One step; action 1 earns 1, action 0 earns −1: the optimum is 1."""

    def start(self, key):
        return jnp.int32(1)

    def move(self, key, state, action):
        return state, 2 * action - 1, True, False


class MatchObservation(Probe):
    """One step; the observation is ±1 and the action must name it (0 for −1, 1 for +1): the optimum is 1."""

    def start(self, key):
        return 2 * jax.random.bernoulli(key).astype(jnp.int32) - 1

    def move(self, key, state, action):
        return state, jnp.where((state > 0) == (action == 1), 1.0, -1.0), True, False


class CutShort(Probe):
    """Reward 1 a step for ever, but a time limit after every step: V = 1/(1 − γ).

    Taken for a termination, the limit would give V = 1.
    """

    def start(self, key):
        return jnp.int32(1)

    def move(self, key, state, action):
        return state, 1.0, False, True


class LeapThenCut(Probe):
    """From A (observation 0), reward 0, to B, where a time limit cuts; from B (observation 1), reward 1, the end.

    A reset draws A or B evenly. V(B) = 1 and V(A) = γ V(B) = γ. Bootstrapping from the observation *after* the reset
    would give V(A) = γ (V(A) + V(B))/2, which is γ/(2 − γ): 1/3 for γ = ½ in place of 1/2.
    """

    def start(self, key):
        return jax.random.bernoulli(key).astype(jnp.int32)

    def move(self, key, state, action):
        return jnp.int32(1), state, state == 1, state == 0


class ReachTarget(Probe):
    """One step; reward −(a − x/2)² for the observation x in [−1, 1]: the best action is x/2, the optimum 0."""

    actions = box(-1.0, 1.0)

    def start(self, key):
        return jax.random.uniform(key, (), minval=-1.0)

    def move(self, key, state, action):
        return state, -jnp.sum((action - state / 2) ** 2), True, False


class RecordAction(Probe):
    """The observation is the action that the environment received; a time limit after five steps."""

    def __init__(self, low=-0.1, high=0.1, shape=(1,)):
        self.actions = box(low, high, shape)

    def start(self, key):
        return jnp.zeros(self.actions.shape), jnp.int32(0)

    def observe(self, state):
        return state[0]

    def move(self, key, state, action):
        return (action, state[1] + 1), jnp.sum(action), False, state[1] + 1 >= 5


class Countdown(Probe):
    """A reset draws L in 1 … 5; reward 1 a step, the end after L steps. The observation is what remains."""

    def start(self, key):
        return jax.random.randint(key, (), 1, 6)

    def move(self, key, state, action):
        return state - 1, 1.0, state <= 1, False


class Endless(Probe):
    """Reward 1 a step and no end. The observation is the time."""

    def start(self, key):
        return jnp.int32(0)

    def move(self, key, state, action):
        return state + 1, 1.0, False, False


class Faulty(MatchObservation):
    """`MatchObservation` whose reward is NaN at the steps first … last (counted over the environment's whole life)."""

    def __init__(self, first, last):
        self.first, self.last = first, last

    def start(self, key):
        return super().start(key), jnp.int32(0)

    def observe(self, state):
        return super().observe(state[0])

    def move(self, key, state, action):
        state, time = state
        _, reward, terminated, truncated = super().move(key, state, action)
        faulty = (time >= self.first) & (time <= self.last)
        return (state, time), jnp.where(faulty, jnp.nan, reward), terminated, truncated

    def step(self, key, state, action):
        observation, new, *rest = super().step(key, state, action)
        return observation, (new[0], state[1] + 1), *rest


class PairOfChoices(Probe):
    """One step; two choices among 2 and 3, asked for as a tuple; reward 1 for each right one: the optimum is 2."""

    actions = SimpleNamespace(spaces=(discrete(2), discrete(3)))

    def start(self, key):
        return jnp.int32(1)

    def move(self, key, state, action):
        first, second = action
        return state, (first == 1) * 1.0 + (second == 2) * 1.0, True, False


def without_resets(probe):
    """An `Environment` of a probe with Discrete actions, with no reset in its step."""

    def step(key, state, action):
        state, reward, terminated, truncated = probe.move(key, state, action)
        flags = jnp.asarray(terminated, bool), jnp.asarray(truncated, bool)
        return Step(probe.observe(state), state, jnp.float32(reward), *flags)

    shape = jax.eval_shape(probe.reset, jax.random.key(0))[0].shape
    return Environment(type(probe).__name__, shape, Discrete(probe.actions.n), None, probe.reset, step)


class Played(NamedTuple):
    """A step, and what the agent acts on next: after the end of an episode the first observation of another."""

    observation: Any
    state: Any
    reward: Any
    terminated: Any
    truncated: Any
    next_observation: Any  # before the reset


def step_and_reset(environment):
    """(key, state, action) -> `Played`, by the definition: one environment stepped, and begun anew where it ended."""

    def step(key, state, action):
        key_step, key_reset = jax.random.split(key) if environment.restart is None else (key, key)
        result = environment.step(key_step, state, action)
        if environment.restart is None:
            first = environment.reset(key_reset)
        else:
            first = environment.restart(key_reset, result.state)
        onward = jax.tree.map(lambda a, b: jnp.where(result.done, a, b), first, (result.observation, result.state))
        return Played(*onward, result.reward, result.terminated, result.truncated, result.observation)

    return step


def resetting_itself(environment):
    """The same with the resets in its own step, as what resets itself comes out of its adapter."""

    def reset(key):
        observation, state = environment.reset(key)
        return observation, (state, observation)

    def step(key, state, action):
        result = step_and_reset(environment)(key, state[0], action)
        onward = result.state, result.observation
        return Step(result.next_observation, onward, result.reward, result.terminated, result.truncated)

    return dataclasses.replace(environment, reset=reset, step=step, restart=lambda key, state: (state[1], state))


def linear_policy(observation_size=1, actions=2):
    """A categorical policy of one matrix and one bias: small programs, and every parameter matters."""

    def init(key, observation):
        return {"w": 0.1 * jax.random.normal(key, (observation_size, actions)), "b": jnp.zeros(actions)}

    return Network(init, lambda params, observation: Categorical(observation @ params["w"] + params["b"]))


def linear_gaussian(observation_size=1, actions=1):
    def init(key, observation):
        return {"w": 0.1 * jax.random.normal(key, (observation_size, actions)), "log_std": jnp.zeros(actions)}

    return Network(init, lambda params, observation: DiagonalGaussian(observation @ params["w"], params["log_std"]))


def linear_value(observation_size=1):
    def init(key, observation):
        return {"w": 0.1 * jax.random.normal(key, (observation_size,)), "b": jnp.zeros(())}

    return Network(init, lambda params, observation: observation @ params["w"] + params["b"])


def small_config(env=None, **changes):
    """Settings of a run that compiles in a second: linear networks, 4 environments, 8 steps, 3 iterations."""
    settings = {
        "env": env or MatchObservation(),
        "policy": linear_policy(),
        "value": linear_value(),
        "num_envs": 4,
        "num_steps": 8,
        "num_iterations": 3,
        "cg_iterations": 3,
        "value_epochs": 2,
        "value_minibatches": 2,
        "value_learning_rate": 1e-2,
    }
    return Config(**{**settings, **changes})


def raw(leaf):
    """A leaf as a NumPy array; a typed key as its data."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def same_bits(first, second):
    """Whether two pytrees of arrays have the same structure, dtypes, shapes and bits (NaN equals the same NaN)."""
    if jax.tree.structure(first) != jax.tree.structure(second):
        return False
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and raw(a).tobytes() == raw(b).tobytes() for a, b in pairs)


def assert_trees_close(first, second, **tolerance):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(raw(a), raw(b), err_msg=jax.tree_util.keystr(path), **tolerance)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def lane(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


# A sweep of twelve agents, as small as sweeps get.
SMALL_SWEEP = """
num_seeds = 3
num_episodes = {episodes}

[base]
num_envs = 2
num_steps = 8
num_iterations = {iterations}
cg_iterations = 2
value_cg_iterations = 2

[grid]
max_kl = [0.001, 0.01]
gae_lambda = [0.9, 0.95]
"""
