"""Wrapped environments are those wrapped by hand, whoever resets them, and wrappers go together."""

import dataclasses
import functools

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from probes import resetting_itself, step_and_reset

from trpo_jax import (
    Discrete,
    Environment,
    Step,
    UsageError,
    append_time,
    cache_resets,
    flatten_observations,
    hide_entries,
    limit_steps,
    make_environment,
    repeat_actions,
    stack_frames,
    train,
)
from trpo_jax.training.resets import step_environments


@functools.cache
def cart_pole(resets):
    """CartPole, or CartPole that resets itself."""
    environment = make_environment("CartPole-v1")
    return environment if resets == "reset by us" else resetting_itself(environment)


RESETS = pytest.mark.parametrize("resets", ["reset by us", "resets itself"])


def play(environment, num_steps=120):
    """The first observation, and what is `Played` [T] at random."""

    def one(state, key):
        action = jax.random.randint(jax.random.fold_in(key, 7), (), 0, 2)
        result = step_and_reset(environment)(key, state, action)
        return result.state, result._replace(state=())

    def run(key):
        first, state = environment.reset(key)
        return first, jax.lax.scan(one, state, jax.random.split(key, num_steps))[1]

    return jax.tree.map(np.asarray, jax.jit(run)(jax.random.key(2)))


def seen_by_hand(first, steps, see):
    """What a wrapper would show of `steps`: `see(observations of the episode up to now)` at its start and each step."""
    episode, observations, next_observations = [first], [], []
    for t, done in enumerate(steps.terminated | steps.truncated):
        episode.append(steps.next_observation[t])
        next_observations.append(see(episode))
        episode = [steps.observation[t]] if done else episode
        observations.append(see(episode))
    return see([first]), np.stack(observations), np.stack(next_observations)


SHOWN = {  # a wrapper, and what it shows of the observations of an episode up to now
    "frames": (lambda e: stack_frames(e, 3), lambda seen: np.concatenate(([seen[0]] * 2 + seen)[-3:])),
    "one frame": (lambda e: stack_frames(e, 1), lambda seen: seen[-1]),
    "hidden": (lambda e: hide_entries(e, [1, -1]), lambda seen: seen[-1][[0, 2]]),
    "none hidden": (lambda e: hide_entries(e, []), lambda seen: seen[-1]),
    "flat": (flatten_observations, lambda seen: seen[-1]),
    "time": (append_time, lambda seen: np.append(seen[-1], np.float32((len(seen) - 1) / 500))),
    "hidden, then frames": (
        lambda e: stack_frames(hide_entries(e, [0, 1, 2]), 2),
        lambda seen: np.concatenate((seen[:1] + seen)[-2:])[[3, 7]],
    ),
    "frames, then hidden": (
        lambda e: hide_entries(stack_frames(e, 2), [0, 1, 2, 4, 5, 6]),
        lambda seen: np.concatenate((seen[:1] + seen)[-2:])[[3, 7]],
    ),
}


@functools.cache
def unwrapped():
    first, steps = play(cart_pole("reset by us"))
    assert np.sum(steps.terminated) >= 2
    return first, steps


@RESETS
@pytest.mark.parametrize("wrap, see", SHOWN.values(), ids=SHOWN.keys())
def test_observations_are_those_shown_by_hand(wrap, see, resets):
    environment = wrap(cart_pole(resets))
    first, steps = play(environment)
    expected = seen_by_hand(*unwrapped(), see)
    for found, right in zip((first, steps.observation, steps.next_observation), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-6)
        assert found.shape[-1:] == environment.observation_shape and found.dtype == np.float32
    for name in ("reward", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(steps, name), getattr(unwrapped()[1], name))
    assert environment.max_steps == 500


@RESETS
def test_actions_are_repeated_until_the_episode_ends(resets):
    environment = cart_pole(resets)
    repeated = repeat_actions(environment, 3)
    assert repeated.max_steps == 167 and repeat_actions(environment, 1) is environment
    step, once = jax.jit(repeated.step), jax.jit(environment.step)
    state, lengths = environment.reset(jax.random.key(0))[1], []
    for t in range(30):
        result, by_hand, total = step(jax.random.key(t), state, jnp.int32(0)), Step((), state, *[np.bool_(0)] * 3), 0
        for key in jax.random.split(jax.random.key(t), 3):
            if not by_hand.done:
                by_hand, total = once(key, by_hand.state, jnp.int32(0)), total + 1
        probes.assert_trees_close(result, by_hand._replace(reward=jnp.float32(total)), rtol=1e-4, atol=1e-5)
        lengths.append(total)
        first = environment.reset(jax.random.key(t))[1] if environment.restart is None else result.state
        state = first if result.done else result.state
    assert set(lengths) >= {3} and min(lengths) < 3


def test_cached_resets_begin_every_episode_of_an_instance_alike():
    environment = make_environment("CartPole-v1")
    cached = cache_resets(environment)
    keys = jax.random.split(jax.random.key(0), 3)
    first, state = jax.vmap(cached.reset)(keys)
    plain, inner = jax.vmap(environment.reset)(keys)
    np.testing.assert_array_equal(first, plain)
    assert len(np.unique(first, axis=0)) == 3
    advance, step_inner = jax.jit(functools.partial(step_environments, cached)), jax.jit(jax.vmap(environment.step))
    ends = np.zeros(3)
    for t in range(40):
        key, action = jax.random.key(t), jnp.zeros(3, int)
        step, (observation, state) = advance(key, state, action)
        by_hand = step_inner(jax.random.split(key, 3), inner, action)
        done = np.asarray(step.done)
        np.testing.assert_array_equal(step.observation, by_hand.observation)
        np.testing.assert_array_equal(observation, np.where(done[:, None], first, step.observation))
        inner, ends = state[0], ends + done
    assert (ends >= 2).all()


def test_frames_of_cached_resets_begin_anew():
    _, steps = play(stack_frames(cache_resets(make_environment("CartPole-v1")), 2))
    starts = steps.observation[steps.terminated]
    assert len(starts) >= 2 and (starts == starts[0]).all() and (starts[0, :4] == starts[0, 4:]).all()


def test_a_time_limit_truncates_and_its_clock_starts_again():
    environment = probes.without_resets(probes.Endless())
    _, steps = play(limit_steps(environment, 3), 7)
    np.testing.assert_array_equal(steps.truncated, [0, 0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(steps.next_observation[:, 0], [1, 2, 3, 1, 2, 3, 1])
    np.testing.assert_array_equal(steps.observation[:, 0], [1, 2, 0, 1, 2, 0, 1])
    assert not steps.terminated.any()


def test_a_time_limit_leaves_terminations_and_sooner_limits_alone():
    environment = limit_steps(probes.without_resets(probes.TwoSteps()), 3)
    _, steps = play(environment, 6)
    np.testing.assert_array_equal(steps.terminated, [0, 1, 0, 1, 0, 1])
    assert not steps.truncated.any()
    for limits in ((2, 5), (5, 2)):
        limited = functools.reduce(limit_steps, limits, probes.without_resets(probes.Endless()))
        assert limited.max_steps == 2
        np.testing.assert_array_equal(play(limited, 4)[1].truncated, [0, 1, 0, 1])


def test_a_limit_of_repeated_actions_is_a_limit_of_actions():
    environment = probes.without_resets(probes.Endless())
    _, few = play(limit_steps(repeat_actions(environment, 2), 3), 8)
    _, many = play(repeat_actions(limit_steps(environment, 6), 2), 8)
    assert probes.same_bits(few, many)
    np.testing.assert_array_equal(few.reward, np.full(8, 2))
    _, odd = play(repeat_actions(limit_steps(environment, 3), 2), 4)
    np.testing.assert_array_equal(odd.reward, [2, 1, 2, 1])
    np.testing.assert_array_equal(odd.next_observation[:, 0], [2, 3, 2, 3])


def pictures(shape):
    """An environment without end whose observation counts on, 1 per entry and step; entry k of its mask is k < time."""
    size = int(np.prod(shape))

    def observe(time):
        return (time + jnp.arange(size, dtype=jnp.float32)).reshape(shape)

    def step(key, time, action):
        return Step(observe(time + 1), time + 1, jnp.float32(1), jnp.bool_(False), jnp.bool_(False))

    def mask(observation):
        return jnp.arange(4) < observation.reshape(*observation.shape[: observation.ndim - len(shape)], size)[..., :1]

    def reset(key):
        return observe(0.0), jnp.float32(0)

    return Environment("pictures", shape, Discrete(4), None, reset, step, action_mask=mask)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (4, 4, 2)])
def test_pictures_are_stacked_by_channels_and_flattened_row_by_row(shape):
    environment = pictures(shape)
    _, plain = play(environment, 4)
    stacked, flat = stack_frames(environment, 2), flatten_observations(environment)
    frames, vectors = play(stacked, 4)[1].observation, play(flat, 4)[1].observation
    width = shape[-1] if shape else 1
    assert frames.shape[1:] == stacked.observation_shape == (*shape[:-1], 2 * width)
    assert vectors.shape[1:] == flat.observation_shape == (int(np.prod(shape)),)
    np.testing.assert_array_equal(frames[..., width:].reshape(plain.observation.shape), plain.observation)
    np.testing.assert_array_equal(frames[1:, ..., :width], frames[:-1, ..., width:])
    np.testing.assert_array_equal(vectors, plain.observation.reshape(4, -1))


MASKED = {
    "frames": lambda e: stack_frames(e, 3),
    "flat": flatten_observations,
    "limit": lambda e: limit_steps(e, 9),
    "all": lambda e: append_time(stack_frames(flatten_observations(limit_steps(e, 9)), 2)),
}


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 1)])
@pytest.mark.parametrize("wrap", MASKED.values(), ids=MASKED.keys())
def test_a_mask_is_asked_about_what_it_knows(wrap, shape):
    environment = wrap(pictures(shape))
    first, steps = play(environment, 6)
    mask = environment.action_mask(steps.observation)
    np.testing.assert_array_equal(np.sum(mask, axis=-1), [1, 2, 3, 4, 4, 4])
    assert not environment.action_mask(first).any()


def everything(environment):
    """All wrappers at once; a limit only where one can be imposed."""
    flat = flatten_observations(repeat_actions(environment, 2))
    flat = flat if environment.restart else limit_steps(flat, 7)
    return append_time(hide_entries(stack_frames(flat, 2), [0]))


ALL = [*gymnax.registered_envs, "gymnasium/CartPole-v1"]
SOME = ("Breakout-MinAtar", "DeepSea-bsuite", "FrozenLake-misc", "Pendulum-v1", "gymnasium/CartPole-v1")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in SOME else [pytest.mark.slow]) for n in ALL if "MNIST" not in n]
)
def test_every_environment_wrapped_is_what_it_says(name):
    environment = make_environment(name)
    wrapped = everything(environment)
    assert make_environment(wrapped) is wrapped  # traced, and compared with its declaration
    assert wrapped.observation_shape == (2 * int(np.prod(environment.observation_shape)),)
    assert wrapped.max_steps == (7 if environment.restart is None else -(-environment.max_steps // 2))


@RESETS
def test_it_trains(resets):
    networks = {"policy": probes.linear_policy(8), "value": probes.linear_value(8)}
    config = probes.small_config(everything(cart_pole(resets)), **networks, num_steps=16)
    _, metrics = jax.jit(train)(config, jax.random.key(0))
    assert (metrics.accepted == 1).any() and (metrics.num_episodes > 0).all()
    two_each = metrics.episode_return - 2 * metrics.episode_length  # but for an end after the first of the two
    assert (two_each <= 0).all() and (two_each >= -1).all() and (two_each < 0).any()


def test_gymnasiums_host_follows():
    environment = make_environment("gymnasium/CartPole-v1")
    first, plain = play(environment, 60)
    _, frames = play(stack_frames(environment, 2), 60)
    _, right, _ = seen_by_hand(first, plain, lambda seen: np.concatenate((seen[:1] + seen)[-2:]))
    np.testing.assert_array_equal(frames.observation, right)
    _, repeated = play(repeat_actions(environment, 2), 60)
    halves = repeated.reward == 1
    assert plain.terminated.any() and set(repeated.reward) == {1, 2} and repeated.terminated[halves].all()


OBSERVED = make_environment("CartPole-v1")
SOLE = dataclasses.replace(pictures((3,)), action_mask=None)
REFUSED = {
    "a name": (
        lambda: stack_frames("CartPole-v1", 2),
        r"^stack_frames takes an Environment, got 'CartPole-v1'; ",
    ),
    "an object": (lambda: append_time(probes.Endless()), r"^append_time takes an Environment, got "),
    "own resets": (
        lambda: cache_resets(cart_pole("resets itself")),
        r"resets itself in its own step, so its resets cannot be cached; leave it out\.$",
    ),
    "no frames": (lambda: stack_frames(OBSERVED, 0), r"^num_frames must be a whole number from 1 to 1,000, got 0"),
    "no action": (
        lambda: repeat_actions(OBSERVED, 0),
        r"^times must be a whole number from 1 to 1,000, got 0",
    ),
    "no limit": (lambda: limit_steps(OBSERVED, None), r"^max_steps must be a whole number from 1 to .*, got None"),
    "a limit of another's": (
        lambda: limit_steps(make_environment(probes.Endless()), 3),
        r"^Endless resets itself in its own step, so it cannot be given max_steps",
    ),
    "an entry that is none": (
        lambda: hide_entries(OBSERVED, [4]),
        r"^hidden must be indices among the 4 entries of CartPole-v1, got \[4\]",
    ),
    "one number": (lambda: hide_entries(OBSERVED, 1), r"^hidden must be indices among .*, got 1\."),
    "truth values": (lambda: hide_entries(OBSERVED, [True, False]), r"^hidden must be indices among"),
    "all entries": (
        lambda: hide_entries(OBSERVED, range(4)),
        r"^hidden has all 4 entries of CartPole-v1; keep at least one",
    ),
    "a picture": (
        lambda: hide_entries(make_environment("Breakout-MinAtar"), [0]),
        r"^hide_entries needs observations that are vectors, but those of Breakout-MinAtar have shape \(10, 10, 4\)",
    ),
    "a time of a picture": (
        lambda: append_time(make_environment("Breakout-MinAtar")),
        r"^append_time needs observations",
    ),
    "a time without limit": (
        lambda: append_time(SOLE),
        r"^pictures has no time limit, which append_time needs; set one",
    ),
    "a mask repeated": (lambda: repeat_actions(pictures((3,)), 2), r"^actions of pictures cannot be repeated"),
    "a mask half seen": (
        lambda: hide_entries(pictures((3,)), [0]),
        r"^the legal actions of pictures depend",
    ),
}


@pytest.mark.parametrize("call, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_wrapped_is_refused_in_one_sentence(call, message):
    with pytest.raises(UsageError, match=message) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 300
