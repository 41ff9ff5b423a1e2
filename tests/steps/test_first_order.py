"""The baselines' updates: the policy gradient against its formula, the objectives against what they maximise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import brentq

from trpo_jax import Batch, Categorical, DiagonalGaussian, log_barrier
from trpo_jax.steps.first_order import first_order_update
from trpo_jax.steps.objectives import clipped_objective, penalized_objective, surrogate_objective


def categorical(params, observation):
    return Categorical(jnp.tanh(observation @ params["hidden"]) @ params["out"])


def update(policy, params, *batch, optimizer, **options):
    """`first_order_update` from the optimizer's start, as one compiled program."""
    return jax.jit(
        lambda params, *batch: first_order_update(
            policy, params, optimizer.init(params), *batch, optimizer=optimizer, **options
        )
    )(params, *batch)


def make_problem(batch=24):
    rng = np.random.default_rng(0)
    params = {"hidden": jnp.asarray(rng.normal(size=(3, 4))), "out": jnp.asarray(rng.normal(size=(4, 2)))}
    return (
        params,
        jnp.asarray(rng.normal(size=(batch, 3))),
        jnp.asarray(rng.integers(0, 2, batch)),
        jnp.asarray(rng.normal(size=batch)),
    )


def bandit(params, observation):
    """One state, three actions."""
    return Categorical(jnp.broadcast_to(params, (*observation.shape[:1], 3)))


# Ten pulls that match the probabilities exactly, so that the batch mean is the expectation.
PROBABILITIES, ADVANTAGE = np.array([0.5, 0.3, 0.2]), np.array([0.1, -0.9, 1.1])
PULLS = np.repeat([0, 1, 2], [5, 3, 2])


def pulls():
    return jnp.log(PROBABILITIES), jnp.zeros((10, 1)), jnp.asarray(PULLS), jnp.asarray(ADVANTAGE[PULLS])


def test_one_plain_step_is_the_policy_gradient(x64):
    params, observation, action, advantage = make_problem()
    optimizer = optax.sgd(0.3)
    new, _, info = update(categorical, params, observation, action, advantage, optimizer=optimizer)
    gradient = jax.jit(jax.grad(lambda p: jnp.mean(categorical(p, observation).log_prob(action) * advantage)))(params)
    for name in params:
        np.testing.assert_allclose(new[name], params[name] + 0.3 * gradient[name], rtol=1e-12)
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in gradient.values()))
    np.testing.assert_allclose(info.gradient_norm, norm, rtol=1e-12)
    np.testing.assert_allclose(info.predicted_gain, 0.3 * norm**2, rtol=1e-12)

    @jax.jit
    def kl_and_gain(params, new):
        old, now = categorical(params, observation), categorical(new, observation)
        ratio = jnp.exp(now.log_prob(action) - old.log_prob(action))
        return jnp.mean(old.kl(now)), jnp.mean((ratio - 1) * advantage)

    kl, gain = kl_and_gain(params, new)
    np.testing.assert_allclose(info.mean_kl, kl, rtol=1e-12)
    np.testing.assert_allclose(info.surrogate_gain, gain, rtol=1e-10)
    assert info.accepted and info.step_fraction == 1 and info.divergence == info.mean_kl


def test_samples_of_another_policy_count_by_their_ratio(x64):
    """With a behaviour policy the step is along the gradient of mean[π_θ/π_b · A], and its gain is that objective's."""
    params, observation, action, advantage = make_problem()
    behaviour = categorical(jax.tree.map(lambda leaf: leaf + 0.3, params), observation).log_prob(action)
    batch = Batch(observation, action, advantage, behaviour)
    optimizer = optax.sgd(1e-4)
    new, _, info = jax.jit(
        lambda params: first_order_update(categorical, params, optimizer.init(params), batch, optimizer=optimizer)
    )(params)

    def objective(p):
        weight = jnp.exp(categorical(p, observation).log_prob(action) - behaviour)
        return jnp.mean(weight * advantage), weight.sum() ** 2 / (len(weight) * (weight**2).sum())

    gradient = jax.grad(lambda p: objective(p)[0])(params)
    for name, leaf in params.items():
        np.testing.assert_allclose(new[name] - leaf, 1e-4 * gradient[name], rtol=1e-8, atol=1e-16)
    np.testing.assert_allclose(info.surrogate_gain, objective(new)[0] - objective(params)[0], rtol=1e-6)
    np.testing.assert_allclose(info.effective_sample_fraction, objective(new)[1], rtol=1e-8)


def test_the_bandit_step_is_the_one_by_hand(x64):
    """∇ of Σ p A in logits is p ⊙ (A − pᵀA), and pᵀA = 0."""
    logits, observation, action, advantage = pulls()
    optimizer = optax.sgd(1.0)
    new, _, _ = update(bandit, logits, observation, action, advantage, optimizer=optimizer)
    np.testing.assert_allclose(new - logits, [0.05, -0.27, 0.22], atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"bonus": log_barrier}], ids=["entropy", "log barrier"])
def test_a_bonus_adds_its_gradient(x64, options):
    params, observation, action, _ = make_problem()
    optimizer, bonus = optax.sgd(1.0), options.get("bonus", Categorical.entropy)
    options = options | {"optimizer": optimizer, "entropy_coefficient": 0.01}
    new, _, info = update(categorical, params, observation, action, jnp.zeros(24), **options)
    gradient = jax.jit(jax.grad(lambda p: 0.01 * jnp.mean(bonus(categorical(p, observation)))))(params)
    np.testing.assert_allclose(new["out"] - params["out"], gradient["out"], rtol=1e-8)
    assert jnp.mean(categorical(new, observation).entropy()) > info.entropy
    assert info.surrogate_gain > 0


def test_epochs_of_minibatches_are_a_loop_over_strided_parts(x64):
    params, observation, action, advantage = make_problem()
    optimizer, objective = optax.adam(0.05), clipped_objective(0.2)
    old_log_prob = categorical(params, observation).log_prob(action)

    def loss(new, part):
        ratio = jnp.exp(categorical(new, observation[part]).log_prob(action[part]) - old_log_prob[part])
        clipped = jnp.clip(ratio, 0.8, 1.2)
        return -jnp.mean(jnp.minimum(ratio * advantage[part], clipped * advantage[part]))

    expected, state = params, optimizer.init(params)

    @jax.jit
    def step(params, state, part):
        updates, state = optimizer.update(jax.grad(loss)(params, part), state)
        return optax.apply_updates(params, updates), state

    for _ in range(2):
        for m in range(3):
            expected, state = step(expected, state, np.arange(24)[m::3])
    options = {"objective": objective, "epochs": 2, "minibatches": 3}
    new, new_state, _ = update(categorical, params, observation, action, advantage, optimizer=optimizer, **options)
    for a, b in zip(jax.tree.leaves((new, new_state)), jax.tree.leaves((expected, state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [(1.1, 2.0, 2.2, 2.0), (1.5, 2.0, 2.4, 0.0), (0.5, 2.0, 1.0, 2.0), (0.5, -2.0, -1.6, 0.0), (1.5, -2.0, -3.0, -2.0)],
)
def test_clipping_takes_the_gain_of_leaving_and_not_the_harm(ratio, advantage, value, slope, x64):
    found, found_slope = jax.value_and_grad(lambda r: clipped_objective(0.2)(None, None, r, advantage))(ratio)
    assert (found, found_slope) == pytest.approx((value, slope))
    assert surrogate_objective(None, None, ratio, advantage) == ratio * advantage


@pytest.mark.parametrize("bad", [np.nan, 0.0, -1.0])
def test_a_clip_ratio_that_is_none_changes_nothing(bad):
    params, *batch = make_problem()
    options = {"optimizer": optax.adam(0.05), "epochs": 2, "entropy_coefficient": 0.01}
    new, _, info = update(categorical, params, *batch, objective=clipped_objective(bad), **options)
    assert not info.accepted
    jax.tree.map(np.testing.assert_array_equal, new, params)


@pytest.mark.parametrize("penalty", [1.5, 4.0])
def test_the_penalty_climbs_to_the_maximum_of_its_minorizer(penalty, x64):
    """max_π Σ π A − β KL(p ‖ π) has the solution π = β p/(ν − A) with Σ π = 1."""

    def policy(nu):
        return penalty * PROBABILITIES / (nu - ADVANTAGE)

    exact = policy(brentq(lambda nu: policy(nu).sum() - 1, ADVANTAGE.max() + 1e-9, 100, xtol=1e-14))
    logits, observation, action, advantage = pulls()
    optimizer = optax.adam(0.01)
    options = {"objective": penalized_objective(penalty), "epochs": 3000}
    new, _, info = update(bandit, logits, observation, action, advantage, optimizer=optimizer, **options)
    np.testing.assert_allclose(jax.nn.softmax(new), exact, atol=1e-6)
    np.testing.assert_allclose(info.surrogate_gain, exact @ ADVANTAGE, atol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_leaves_everything_as_it_was(bad):
    params, observation, action, advantage = make_problem()
    params = jax.tree.map(jnp.float32, params)
    optimizer, advantage = optax.adam(0.1), advantage.at[3].set(bad)
    state, options = optimizer.init(params), {"epochs": 2, "minibatches": 2}
    new, new_state, info = update(categorical, params, observation, action, advantage, optimizer=optimizer, **options)
    assert not info.accepted and info.step_fraction == info.mean_kl == 0 and info.effective_sample_fraction == 1
    assert all(np.isfinite(jnp.asarray(leaf, jnp.float32)) for leaf in jax.tree.leaves(info))
    for a, b in zip(jax.tree.leaves((new, new_state)), jax.tree.leaves((params, state)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.sgd(0.1)], ids=["adam", "sgd"])
def test_what_is_told_of_an_update_is_finite_however_large_the_advantages(optimizer):
    params, observation, action, advantage = make_problem()
    params = jax.tree.map(jnp.float32, params)
    options = {"objective": clipped_objective(0.2), "epochs": 2, "minibatches": 2, "key": jax.random.key(0)}

    @jax.jit
    def run(size, max_grad_norm):
        batch = observation, action, size * jnp.sign(advantage)
        state = optimizer.init(params)
        return first_order_update(
            categorical, params, state, *batch, optimizer=optimizer, max_grad_norm=max_grad_norm, **options
        )

    for size in (1.0, 1e19, 1e30, 3e38):
        for max_grad_norm in (0.0, 0.5):
            new, state, info = run(size, max_grad_norm)
            assert all(
                np.isfinite(jnp.asarray(leaf, jnp.float32)).all() for leaf in jax.tree.leaves((new, state, info))
            )
            moved = any((new[name] != params[name]).any() for name in params)
            assert moved == info.accepted
            assert info.accepted or size > 1


def test_a_step_out_of_all_bounds_is_refused():
    def shifted(params, observation):
        return DiagonalGaussian(observation @ params, jnp.zeros(1))

    params, observation = jnp.zeros((3, 1)), jnp.ones((8, 3))
    optimizer = optax.sgd(1e30)
    new, _, info = update(shifted, params, observation, jnp.ones((8, 1)), jnp.ones(8), optimizer=optimizer)
    assert not info.accepted  # the KL overflows
    np.testing.assert_array_equal(new, params)
