from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trpo_jax.steps.advantages import gae, parallel_gae

COMPILED = [jax.jit(gae), jax.jit(parallel_gae)]
METHODS = pytest.mark.parametrize("method", COMPILED, ids=["scan", "associative_scan"])

REWARDS, VALUES, LAST_VALUE = np.array([1.0, 2, 3, 4]), np.array([0.5, 1, 1.5, 2]), 2.5
NONE, AT_1 = np.zeros(4, bool), np.array([False, True, False, False])


def random_rollout(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, *shape))
    terminated, truncated = rng.random((2, *shape)) < 0.2
    return rewards, values, next_values, terminated, truncated


def brute_force(rewards, values, next_values, terminated, truncated, gamma, gae_lambda) -> np.ndarray:
    """A_t = Σ_l (γλ)ˡ δ_{t+l}, up to and including the first step that ended its episode; for [T, N]."""
    advantages = np.zeros_like(rewards)
    for n in range(rewards.shape[1]):
        for t in range(rewards.shape[0]):
            for k in range(t, rewards.shape[0]):
                future = 0 if terminated[k, n] else gamma * next_values[k, n]
                delta = rewards[k, n] + future - values[k, n]
                advantages[t, n] += (gamma * gae_lambda) ** (k - t) * delta
                if terminated[k, n] or truncated[k, n]:
                    break
    return advantages


@pytest.mark.usefixtures("x64")
@METHODS
@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [
        (0.0, (1.4, 2.35, 3.3, 4.25)),
        (0.95, (8.4779945938, 8.27835625, 6.93375, 4.25)),
        (1.0, (9.28625, 8.7625, 7.125, 4.25)),
    ],
)
def test_golden_values(method, gae_lambda, expected):
    next_values = np.append(VALUES[1:], LAST_VALUE)
    advantages = method(REWARDS, VALUES, next_values, NONE, NONE, gamma=0.9, gae_lambda=gae_lambda)
    np.testing.assert_allclose(advantages, expected, rtol=1e-10)


# At t = 1 the episode ends; the next one starts from s_2, so only t = 0 and 1 change. With γλ = .855:
#   terminated: δ_1 = 2 − 1 = 1,                  A_0 = δ_0 + .855 · 1   = 1.4 + .855  = 2.255
#   truncated:  δ_1 = 2 + .9 · 7 − 1 = 7.3,       A_0 = δ_0 + .855 · 7.3 = 1.4 + 6.2415 = 7.6415
# with V = 7 for the last observation before the reset. Where both flags are set, terminated wins.
@pytest.mark.usefixtures("x64")
@METHODS
@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        (AT_1, NONE, (2.255, 1, 6.93375, 4.25)),
        (NONE, AT_1, (7.6415, 7.3, 6.93375, 4.25)),
        (AT_1, AT_1, (2.255, 1, 6.93375, 4.25)),
    ],
)
def test_ends_of_episodes(method, terminated, truncated, expected):
    next_values = np.array([VALUES[1], 7.0, VALUES[3], LAST_VALUE])
    advantages = method(REWARDS, VALUES, next_values, terminated, truncated, gamma=0.9, gae_lambda=0.95)
    np.testing.assert_allclose(advantages, expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@METHODS
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_double_loop_on_random_flags(method, gamma, gae_lambda, seed):
    rollout = random_rollout(seed, (12, 5))
    assert any((rollout[3] & rollout[4]).ravel()) or seed  # both flags at once occur
    advantages = method(*rollout, gamma=gamma, gae_lambda=gae_lambda)
    np.testing.assert_allclose(advantages, brute_force(*rollout, gamma, gae_lambda), rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("x64")
@METHODS
def test_lambda_one_is_the_discounted_return_minus_the_value(method):
    rewards, values, _, flags, _ = random_rollout(3, (9, 2))
    flags = np.zeros_like(flags)
    flags[-1] = True
    returns = np.zeros_like(rewards)
    for t in reversed(range(9)):
        returns[t] = rewards[t] + (0.9 * returns[t + 1] if t < 8 else 0)
    next_values = np.concatenate([values[1:], np.full((1, 2), 1e6)])
    advantages = method(rewards, values, next_values, flags, np.zeros_like(flags), gamma=0.9, gae_lambda=1.0)
    np.testing.assert_allclose(advantages, returns - values, rtol=1e-11)


@METHODS
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_the_value_after_a_terminal_state_does_not_leak(method, poison):
    rewards, values, next_values, terminated, truncated = random_rollout(4, (16, 4))
    assert terminated.any()
    clean = method(rewards, values, next_values, terminated, truncated, gamma=0.9, gae_lambda=0.9)
    poisoned = np.where(terminated, poison, next_values)
    dirty = method(rewards, values, poisoned, terminated, truncated, gamma=0.9, gae_lambda=0.9)
    np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("shape", [(1,), (7,), (64, 3), (300, 2, 2)])
def test_scan_and_associative_scan_agree_in_float32(shape):
    rollout = tuple(jnp.asarray(x) for x in random_rollout(5, shape))
    a = jax.jit(functools.partial(gae, gamma=0.99, gae_lambda=0.95))(*rollout)
    b = jax.jit(functools.partial(parallel_gae, gamma=0.99, gae_lambda=0.95))(*rollout)
    assert a.shape == b.shape == shape
    assert a.dtype == b.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.max(np.abs(a)))


@METHODS
def test_gamma_and_lambda_may_be_traced_and_vmapped_with_one_trace(method):
    rollout = tuple(jnp.asarray(x) for x in random_rollout(6, (10, 3)))
    traces = 0

    @jax.jit
    def compute(gamma, gae_lambda):
        nonlocal traces
        traces += 1
        return method(*rollout, gamma=gamma, gae_lambda=gae_lambda)

    for gamma, gae_lambda in ((0.9, 0.5), (0.99, 0.0), (1.0, 1.0)):
        expected = method(*rollout, gamma=gamma, gae_lambda=gae_lambda)
        traced = compute(jnp.float32(gamma), jnp.float32(gae_lambda))
        np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-5)
    assert traces == 1
    gammas = jnp.array([0.5, 0.9])
    swept = jax.vmap(compute, in_axes=(0, None))(gammas, jnp.float32(0.5))
    np.testing.assert_allclose(swept[1], compute(gammas[1], jnp.float32(0.5)), rtol=1e-6, atol=1e-6)


@METHODS
def test_flags_may_be_numbers_and_rewards_integers(method):
    _, values, next_values, terminated, truncated = random_rollout(7, (6, 2))
    rewards = np.arange(12).reshape(6, 2)
    expected = method(rewards.astype(np.float32), values, next_values, terminated, truncated, gamma=0.9, gae_lambda=0.9)
    numbers = terminated.astype(np.float32), truncated.astype(np.int32)
    np.testing.assert_allclose(method(rewards, values, next_values, *numbers, gamma=0.9, gae_lambda=0.9), expected)


@METHODS
@pytest.mark.parametrize("dtype", [int, bool, np.int8, jnp.float16, jnp.bfloat16], ids=str)
def test_whatever_the_dtype_of_rewards_and_values_advantages_are_float32(method, dtype):
    """300 steps of reward 1, undiscounted: the first advantage is 300, which bfloat16 cannot say."""
    rewards, flags = jnp.ones((300, 1), dtype), jnp.zeros((300, 1), bool)
    zeros = jnp.zeros((300, 1), dtype)
    advantages = method(rewards, zeros, zeros, flags, flags, gamma=1, gae_lambda=1)
    assert advantages.dtype == jnp.float32
    np.testing.assert_array_equal(advantages[:, 0], np.arange(300, 0, -1))
    assert method(rewards, zeros, zeros, flags, flags, gamma=1, gae_lambda=1, ratios=rewards)[0, 0] == 300


@METHODS
def test_shapes_that_differ_are_refused(method):
    rewards, values, next_values, terminated, truncated = random_rollout(8, (6, 2))
    with pytest.raises(AssertionError):
        method(rewards, values, next_values[:, 0], terminated, truncated, gamma=0.9, gae_lambda=0.9)


@METHODS
def test_ratios_count_where_gamma_and_lambda_are_whole_numbers(method):
    ones, flags = jnp.ones(3), jnp.zeros(3, bool)
    advantages = method(ones, 0 * ones, 0 * ones, flags, flags, gamma=1, gae_lambda=1, ratios=jnp.full(3, 0.5))
    np.testing.assert_array_equal(advantages, [1.75, 1.5, 1])


@METHODS
def test_lists_are_arrays_and_no_time_axis_is_refused(method):
    no = [False, False]
    np.testing.assert_array_equal(method([1, 2], [0, 0], [0, 0], no, no, gamma=0.5, gae_lambda=1.0), [2, 2])
    with pytest.raises(AssertionError, match="must have a time axis"):
        method(1.0, 0.0, 0.0, False, False, gamma=0.5, gae_lambda=1.0)


@pytest.mark.parametrize("method", [gae, parallel_gae])
@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_nothing_after_an_end_reaches_the_steps_before_it(method, poison):
    zero, ended, never = jnp.zeros(3), jnp.array([False, True, False]), jnp.zeros(3, bool)
    for flags in ((ended, never), (never, ended)):
        found = method(jnp.array([1, 1, poison]), zero, zero, *flags, gamma=0.9, gae_lambda=0.9)
        np.testing.assert_allclose(found[:2], [1.81, 1])
        ratios = jnp.array([1, 1, poison])
        found = method(jnp.ones(3), zero, zero, *flags, gamma=0.9, gae_lambda=0.9, ratios=ratios)
        np.testing.assert_allclose(found, [1.81, 1, 1])
