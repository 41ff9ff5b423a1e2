"""Exact improvement steps: golden numbers, optimality, monotonicity and invariance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_problems import bandit, random_logits, random_mdps, two_state

from trpo_jax import Categorical, Solver, natural_gradient
from trpo_jax.theory import (
    TabularMDP,
    best_policy_within,
    certify,
    expected_return,
    garnet,
    mean_state_kl,
    minorizer,
    minorizer_step,
    natural_gradient_step,
    penalty_coefficient,
    plain_gradient_step,
    policy_gradient,
    softmax_policy,
    state_kl,
    tabular_natural_gradient,
    tabular_trpo_step,
    visitation,
)

# Compiled once: one operation at a time they take longer.
exact_gradient, exact_natural_gradient = jax.jit(policy_gradient), jax.jit(tabular_natural_gradient)
trpo_step, mm_step = jax.jit(tabular_trpo_step), jax.jit(minorizer_step)
best_within, certificate_of = jax.jit(best_policy_within), jax.jit(certify)
lower_bounds = jax.jit(jax.vmap(minorizer, in_axes=(None, 0, None)))


@jax.jit
def dense_fisher(logits, mdp):
    """The Hessian of the mean KL at θ, [S·A, S·A]."""
    old = softmax_policy(logits)

    def divergence(flat):
        return mean_state_kl(old, softmax_policy(flat.reshape(logits.shape)), mdp)

    return jax.hessian(divergence)(logits.ravel())


def test_two_state_golden_step():
    logits, mdp = two_state()
    direction = exact_natural_gradient(logits, mdp)
    expected = [[-6.8318032325, 6.8318032325], [11.8318032325, -11.8318032325]]
    np.testing.assert_allclose(direction, expected, atol=1e-10)
    np.testing.assert_allclose(np.sum(exact_gradient(logits, mdp) * direction), 92.2587766074, atol=1e-9)
    new, info = trpo_step(logits, mdp)
    assert info.accepted
    assert info.step_fraction == 1
    np.testing.assert_allclose((new - logits) / direction, 0.0147235031, atol=1e-10)
    policy = softmax_policy(new)
    expected = [[0.3315515114, 0.6684484886], [0.6566523372, 0.3433476628]]
    np.testing.assert_allclose(policy, expected, atol=1e-10)
    certificate = certificate_of(softmax_policy(logits), policy, mdp)
    np.testing.assert_allclose(info.divergence, 0.0097914243, atol=1e-10)
    np.testing.assert_allclose(certificate.mean_kl, 0.0097914243, atol=1e-10)
    np.testing.assert_allclose(certificate.maximum_kl, 0.0145143095, atol=1e-10)
    np.testing.assert_allclose(expected_return(policy, mdp), 10.3374129265, atol=1e-10)


def test_bandit_golden_step_must_backtrack():
    logits, mdp = bandit()
    direction = exact_natural_gradient(logits, mdp)
    np.testing.assert_allclose(direction, [[0, -1, 1]], atol=1e-14)
    full = softmax_policy(logits + 0.2020305089 * direction)
    np.testing.assert_allclose(full, [[0.5051025106, 0.2476224649, 0.2472750246]], atol=1e-10)
    np.testing.assert_allclose(state_kl(softmax_policy(logits), full), 0.0100497494, atol=1e-10)
    new, info = trpo_step(logits, mdp)
    assert info.num_rejected == 1
    np.testing.assert_allclose(new - logits, 0.8 * 0.2020305089 * direction, atol=1e-10)
    assert info.divergence <= 0.01


@pytest.mark.parametrize("problem", [two_state, bandit])
def test_the_update_for_samples_takes_the_exact_step(problem):
    # States as a batch weighted by d, and the exact gradient, in the machinery that training uses.
    logits, mdp = problem()
    density = (1 - mdp.gamma) * visitation(softmax_policy(logits), mdp)
    gradient = exact_gradient(logits, mdp)
    options = {"max_kl": 0.01, "solver": Solver(damping=0.0, tolerance=0.0), "weight": density * density.size}
    step, _ = jax.jit(lambda g: natural_gradient(Categorical, logits, g, **options))(gradient)
    direction = exact_natural_gradient(logits, mdp)
    expected = direction * np.sqrt(0.02 / np.sum(gradient * direction))
    np.testing.assert_allclose(softmax_policy(logits + step), softmax_policy(logits + expected), atol=1e-10)


def test_natural_gradient_is_the_shortest_solution():
    for mdp, logits in ((two_state()[1], two_state()[0]), (bandit()[1], bandit()[0])):
        pseudo_inverse = np.linalg.pinv(dense_fisher(logits, mdp), rcond=1e-10, hermitian=True)
        expected = pseudo_inverse @ exact_gradient(logits, mdp).ravel()
        np.testing.assert_allclose(exact_natural_gradient(logits, mdp).ravel(), expected, atol=1e-9)


def test_a_state_never_visited_is_left_alone():
    logits, mdp = two_state()
    transition = jnp.array([[[1.0, 0.0], [1.0, 0.0]], [[0.5, 0.5], [1.0, 0.0]]])  # from state 0 nothing leads to 1
    lonely = TabularMDP(transition, mdp.reward, mdp.initial, mdp.gamma)
    np.testing.assert_array_equal(exact_natural_gradient(logits, lonely)[1], 0)
    new, info = trpo_step(logits, lonely)
    assert info.accepted
    np.testing.assert_array_equal(new[1], logits[1])


def test_only_the_natural_step_ignores_the_parametrisation():
    # θ = M φ: a step in φ by F_φ⁺ ∇_φ with F_φ = MᵀF M must be the same change of policy.
    logits, mdp = two_state()
    mixing = np.random.default_rng(0).normal(size=(4, 4)) + 2 * np.eye(4)
    gradient = mixing.T @ exact_gradient(logits, mdp).ravel()
    fisher = mixing.T @ dense_fisher(logits, mdp) @ mixing
    natural = mixing @ np.linalg.pinv(fisher, rcond=1e-10, hermitian=True) @ gradient
    plain = mixing @ gradient
    step = 0.01
    exact = softmax_policy(natural_gradient_step(logits, mdp, step))
    np.testing.assert_allclose(softmax_policy(logits + step * natural.reshape(2, 2)), exact, atol=1e-8)
    exact = softmax_policy(plain_gradient_step(logits, mdp, step))
    assert np.abs(softmax_policy(logits + step * plain.reshape(2, 2)) - exact).max() > 1e-2


def test_kl_is_the_fisher_form_up_to_third_order():
    logits, mdp = two_state()
    fisher, change = dense_fisher(logits, mdp), random_logits(2, 2, seed=5)

    @jax.jit
    def remainder(size):
        kl = mean_state_kl(softmax_policy(logits), softmax_policy(logits + size * change), mdp)
        return (kl - 0.5 * size**2 * change.ravel() @ fisher @ change.ravel()) / size**3

    # A remainder of third order, and not of fourth: its coefficient has a limit other than 0.
    coarse, fine = remainder(2e-2), remainder(1e-2)
    assert abs(fine) > 1e-3
    np.testing.assert_allclose(coarse, fine, rtol=0.05)


@pytest.mark.parametrize("max_kl", [1e-12, 1e-3, 0.1, 2.0])
def test_best_policy_within_a_divergence_is_stationary(max_kl):
    policy, advantage = softmax_policy(random_logits(20, 4)), random_logits(20, 4, seed=2)
    advantage[0] = 3  # nothing to gain here
    best = best_within(policy, advantage, max_kl)
    np.testing.assert_allclose(best.sum(-1), 1, rtol=1e-13)
    np.testing.assert_array_equal(best[0], policy[0])
    change = best[1:] / policy[1:] - 1  # of mean 0 under π: subtracting it keeps the digits of a small KL
    np.testing.assert_allclose(np.sum(policy[1:] * (change - np.log1p(change)), -1), max_kl, rtol=1e-7)
    # d/dπ̃(a) of the Lagrangian, A + λ π/π̃ − ν, is 0: A and π/π̃ lie on a line of negative slope.
    ratio = policy[1:] / best[1:]
    centred_ratio = ratio - ratio.mean(-1, keepdims=True)
    centred = advantage[1:] - advantage[1:].mean(-1, keepdims=True)
    slope = np.sum(centred * centred_ratio, -1, keepdims=True) / np.sum(centred_ratio**2, -1, keepdims=True)
    assert slope.max() < 0
    np.testing.assert_allclose(centred, slope * centred_ratio, atol=1e-6)


def test_best_policy_within_keeps_what_the_policy_never_does():
    policy, advantage = jnp.array([[0.6, 0.4, 0.0]]), jnp.array([[0.0, 1.0, 50.0]])
    best = best_within(policy, advantage, 0.05)
    assert best[0, 2] == 0
    np.testing.assert_allclose(best[:, :2], best_within(policy[:, :2], advantage[:, :2], 0.05), rtol=1e-12)


@pytest.mark.parametrize("gamma", [0.3, 0.9])
def test_minorizer_step_is_the_maximum(gamma):
    # M is concave in the policy: no better policy nearby is no better policy at all.
    mdp = jax.tree.map(lambda leaf: leaf[0], random_mdps(1, gamma))
    old = softmax_policy(random_logits(5, 3))
    new = mm_step(old, mdp)
    start, best = lower_bounds(old, jnp.stack([old, new]), mdp)
    scale = jnp.linalg.norm(new - old)
    size = scale * 10 ** jnp.linspace(-4, 0.3, 4000)[:, None, None]
    candidates = softmax_policy(jnp.log(new) + size * random_logits(4000, 5, 3))
    outside = (1 + size) * new - size * old  # along the line from the old policy, and beyond
    outside = jnp.where((outside > 0).all((1, 2), keepdims=True), outside, new)
    candidates = jnp.concatenate([candidates, outside])
    assert best > start + 1e-6
    assert np.all(lower_bounds(old, candidates, mdp) <= best + 1e-12)
    np.testing.assert_allclose(state_kl(old, new), state_kl(old, new).max(), rtol=1e-5)


def test_minorizer_is_quadratic_near_the_old_policy():
    # One state: M ≈ η + gᵀΔ − ½ C ΔᵀF Δ, concave, with its maximum at F⁺g/C.
    logits, mdp = bandit()
    old = softmax_policy(logits)
    for penalty, tolerance in ((1e2, 1e-2), (1e4, 1e-4)):
        change = old * (jnp.exp(exact_natural_gradient(logits, mdp) / penalty) - 1)
        change -= old * change.sum()
        exact = mm_step(old, mdp, penalty) - old
        np.testing.assert_allclose(exact, change, rtol=3 * tolerance, atol=0.1 * tolerance / penalty)


def test_without_a_penalty_the_minorizer_step_is_greedy():
    logits, mdp = bandit()  # γ = 0: the surrogate is the return
    np.testing.assert_allclose(mm_step(softmax_policy(logits), mdp), [[0, 0, 1]], atol=1e-8)


def test_minorize_maximize_never_steps_down():
    mdps, policies = random_mdps(4), jnp.full((4, 5, 3), 1 / 3)

    def step(policies, _):
        return jax.vmap(minorizer_step)(policies, mdps), jax.vmap(expected_return)(policies, mdps)

    policies, returns = jax.jit(lambda p: jax.lax.scan(step, p, None, length=300))(policies)
    assert np.diff(returns, axis=0).min() > -1e-12
    assert (returns[-1] - returns[0]).min() > 0.5
    np.testing.assert_allclose(policies.sum(-1), 1, rtol=1e-12)
    assert jax.vmap(penalty_coefficient)(policies, mdps).min() > 1  # theory's penalty, not an easy one


def test_trpo_step_keeps_its_promise_on_random_problems():
    mdps, logits = random_mdps(200), 3 * random_logits(200, 5, 3)

    @jax.jit
    @jax.vmap
    def compute(mdp, theta):
        new, info = tabular_trpo_step(theta, mdp, max_kl=0.02)
        return info, certify(softmax_policy(theta), softmax_policy(new), mdp)

    info, certificate = compute(mdps, logits)
    assert info.accepted.all()
    assert np.all(certificate.mean_kl <= 0.02)
    assert np.median(certificate.mean_kl) > 0.01
    assert np.all(certificate.surrogate_gain > 0)
    np.testing.assert_allclose(info.surrogate_gain, certificate.surrogate_gain, rtol=1e-10)


def test_nothing_to_gain_changes_nothing():
    logits, mdp = two_state()
    flat = TabularMDP(mdp.transition, jnp.zeros((2, 2)), mdp.initial, mdp.gamma)
    policy = softmax_policy(logits)
    np.testing.assert_array_equal(mm_step(policy, flat), policy)
    new, info = trpo_step(logits, flat)
    np.testing.assert_array_equal(new, logits)
    assert not info.accepted


@pytest.mark.parametrize("seed", range(5))
def test_rounding_errors_are_no_advantages(seed):
    """With a constant reward all policies are equally good: no step may follow the errors of the action values."""
    mdp = garnet(jax.random.key(seed), 5, 3, 3, 0.9)
    mdp = TabularMDP(mdp.transition, jnp.full_like(mdp.reward, 5.0), mdp.initial, mdp.gamma)
    logits = jax.random.normal(jax.random.key(seed + 9), (5, 3))
    new, info = tabular_trpo_step(logits, mdp)
    assert not info.accepted
    np.testing.assert_array_equal(new, logits)
    np.testing.assert_array_equal(natural_gradient_step(logits, mdp, 1.0), logits)
    policy = softmax_policy(logits)
    np.testing.assert_array_equal(minorizer_step(policy, mdp, 1e-9), policy)
