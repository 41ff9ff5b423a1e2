"""Exact evaluation: golden numbers, enumeration, and identities between independent formulas."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_problems import random_logits, random_mdps, two_state

from trpo_jax.theory import (
    TabularMDP,
    action_values,
    advantages,
    expected_return,
    finite_horizon_values,
    garnet,
    performance_difference,
    policy_gradient,
    sampled_policy_gradient,
    softmax_policy,
    state_values,
    visitation,
)
from trpo_jax.theory.linear_algebra import solve


@pytest.mark.parametrize("shape", [(6,), (6, 2)])
def test_solve_is_the_inverse_also_batched_and_differentiated(shape):
    rng = np.random.default_rng(0)
    matrix, rhs, seed = rng.normal(size=(10, 6, 6)), rng.normal(size=(10, *shape)), rng.normal(size=(10, *shape))
    matrix[:, 0, 0] = 0  # elimination without pivoting would divide by it
    expected = np.stack([np.linalg.solve(a, b) for a, b in zip(matrix, rhs, strict=True)])
    x, pullback = jax.vjp(jax.jit(jax.vmap(solve)), matrix, rhs)
    np.testing.assert_allclose(x, expected, rtol=1e-9, atol=1e-11)
    # d(A⁻¹b) = A⁻¹(db − dA x): the cotangents are y = A⁻ᵀ seed for b and −y xᵀ for A.
    matrix_bar, rhs_bar = pullback(seed)
    y = np.stack([np.linalg.solve(a.T, s) for a, s in zip(matrix, seed, strict=True)])
    np.testing.assert_allclose(rhs_bar, y, rtol=1e-9, atol=1e-11)
    outer = np.einsum("nik,njk->nij", y.reshape(10, 6, -1), expected.reshape(10, 6, -1))
    np.testing.assert_allclose(matrix_bar, -outer, rtol=1e-8, atol=1e-10)


def test_garnet_has_distinct_successors_and_probabilities():
    mdps = random_mdps(2500)
    np.testing.assert_allclose(mdps.transition.sum(-1), 1, rtol=1e-14)
    np.testing.assert_array_equal((mdps.transition > 0).sum(-1), 3)
    # One of 3 flat Dirichlet probabilities: mean 1/3, variance 1/18. Every state is a successor equally often.
    positive = mdps.transition[mdps.transition > 0]
    assert abs(positive.var() - 1 / 18) < 1e-3
    assert abs((mdps.transition > 0).mean((0, 1, 2)) - 3 / 5).max() < 0.01
    np.testing.assert_allclose(mdps.initial.sum(-1), 1, rtol=1e-14)
    with pytest.raises(ValueError, match="branching must be in 1 … num_states = 3, got 4"):
        garnet(jax.random.key(0), 3, 2, 4, 0.9)


def test_two_state_golden_numbers():
    logits, mdp = two_state()
    policy = softmax_policy(logits)
    functions = state_values, advantages, visitation, expected_return
    values, advantage, occupancy, performance = jax.jit(lambda p: [fn(p, mdp) for fn in functions])(policy)
    np.testing.assert_allclose(policy, [[0.3775406688, 0.6224593312], [0.5744425168, 0.4255574832]], atol=1e-10)
    np.testing.assert_allclose(values, [8.9629901502, 9.4718243814], atol=1e-10)
    expected = [[-0.8505039342, 0.5158567123], [1.0070224810, -1.3593381655]]
    np.testing.assert_allclose(advantage, expected, atol=1e-10)
    np.testing.assert_allclose(occupancy, [4.7981323375, 5.2018676625], atol=1e-10)
    np.testing.assert_allclose(performance, 8.9629901502, atol=1e-10)
    expected = [[-1.5406794497, 1.5406794497], [3.0091583471, -3.0091583471]]
    np.testing.assert_allclose(jax.jit(policy_gradient)(logits, mdp), expected, atol=1e-10)


def test_policy_gradient_is_the_derivative_of_the_return():
    mdps, logits = random_mdps(50), random_logits(50, 5, 3)

    @jax.jit
    @jax.vmap
    def compute(mdp, logits):
        automatic = jax.grad(lambda theta: expected_return(softmax_policy(theta), mdp))(logits)
        return policy_gradient(logits, mdp), automatic

    closed, automatic = compute(mdps, logits)
    error = np.linalg.norm(closed - automatic, axis=(1, 2)) / np.linalg.norm(automatic, axis=(1, 2))
    assert error.max() < 1e-10


def test_performance_difference_is_the_difference_of_returns():
    mdps, old, new = random_mdps(200), random_logits(200, 5, 3), random_logits(200, 5, 3, seed=2)

    @jax.jit
    @jax.vmap
    def compute(mdp, old, new):
        old, new = softmax_policy(old), softmax_policy(new)
        return performance_difference(old, new, mdp), expected_return(new, mdp) - expected_return(old, mdp)

    lemma, difference = compute(mdps, old, new)
    assert np.abs(difference).min() > 1e-5
    np.testing.assert_allclose(lemma, difference, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_finite_horizon_equals_the_enumeration_of_all_trajectories(gamma):
    mdp = jax.tree.map(lambda leaf: np.asarray(leaf[0]), random_mdps(1, gamma))
    policy = np.asarray(softmax_policy(random_logits(5, 3)))
    total = 0.0
    for states in itertools.product(range(5), repeat=3):
        for actions in itertools.product(range(3), repeat=3):
            probability = mdp.initial[states[0]]
            for t in range(3):
                probability *= policy[states[t], actions[t]]
                probability *= mdp.transition[states[t], actions[t], states[t + 1]] if t < 2 else 1
            total += probability * sum(gamma**t * mdp.reward[states[t], actions[t]] for t in range(3))
    values = jax.jit(lambda p: finite_horizon_values(p, mdp, 3))(policy)
    assert values.shape == (4, 5)
    np.testing.assert_array_equal(values[3], 0)
    np.testing.assert_allclose(np.sum(mdp.initial * values[0]), total, rtol=1e-13)


def test_a_long_horizon_is_the_discounted_return():
    logits, mdp = two_state()
    policy = softmax_policy(logits)
    values, limit = jax.jit(lambda p: (finite_horizon_values(p, mdp, 400)[0], state_values(p, mdp)))(policy)
    np.testing.assert_allclose(values, limit, rtol=1e-13)


def test_sampled_gradient_is_unbiased():
    # 10³ means of 10³ samples: their scatter is the error of the mean of all 10⁶. A bias of 1 % would be |z| > 10.
    logits, mdp = two_state()
    keys = jax.random.split(jax.random.key(0), 1000)
    means = np.asarray(jax.jit(jax.vmap(lambda key: sampled_policy_gradient(key, logits, mdp, 1000)))(keys))
    np.testing.assert_allclose(means.sum(-1), 0, atol=1e-12)  # a score does not move the mean of the logits
    error = means.std(0, ddof=1) / np.sqrt(len(means))
    exact = np.asarray(jax.jit(policy_gradient)(logits, mdp))
    assert (error < 2e-3 * np.abs(exact).max()).all()
    assert np.abs((means.mean(0) - exact) / error).max() < 4


def test_vmap_is_a_loop():
    mdps, policies = random_mdps(4), softmax_policy(random_logits(3, 5, 3))
    table = jax.jit(jax.vmap(jax.vmap(action_values, in_axes=(None, 0)), in_axes=(0, None)))(policies, mdps)
    one = jax.jit(action_values)
    for i, j in itertools.product(range(4), range(3)):
        expected = one(policies[j], jax.tree.map(lambda leaf, i=i: leaf[i], mdps))
        np.testing.assert_allclose(table[j, i], expected, rtol=1e-12, atol=1e-13)


def test_single_precision_stays_single_and_agrees():
    logits, mdp = two_state()
    logits32, mdp32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (logits, mdp))
    python_gamma = TabularMDP(mdp32.transition, mdp32.reward, mdp32.initial, 0.9)
    for problem in (mdp32, python_gamma):
        gradient = jax.jit(policy_gradient)(logits32, problem)
        assert gradient.dtype == jnp.float32
        np.testing.assert_allclose(gradient, jax.jit(policy_gradient)(logits, mdp), rtol=1e-5)
