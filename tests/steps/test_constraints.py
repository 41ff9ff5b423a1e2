"""What bounds and what drives the step, other than the mean KL and the surrogate of the policy's own batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trpo_jax import (
    Batch,
    Categorical,
    DiagonalGaussian,
    Solver,
    full_step,
    gae,
    log_barrier,
    maximum_kl,
    mean_kl,
    natural_gradient,
    parallel_gae,
    reverse_kl,
    trpo_update,
)
from trpo_jax.steps.policy_updates import make_evaluate

EXACT = Solver(tolerance=0.0)
CONSTRAINTS = [mean_kl, maximum_kl, reverse_kl]


def categorical(params, observation):
    return Categorical(jnp.tanh(observation @ params["hidden"]) @ params["out"])


def fixed_gaussian(params, observation):
    return DiagonalGaussian(observation @ params["out"], jnp.full(2, -0.5))


def make_problem(policy=categorical, batch=60, seed=0):
    rng = np.random.default_rng(seed)
    params = {"out": jnp.asarray(rng.normal(size=(4, 2)))}
    if policy is categorical:
        params["hidden"] = jnp.asarray(rng.normal(size=(4, 4)))
    observation = jnp.asarray(rng.normal(size=(batch, 4)))
    action = jax.jit(lambda: policy(params, observation).sample(jax.random.key(seed)))()
    return params, observation, action, jnp.asarray(rng.normal(size=batch))


@functools.cache
def update_of(policy, **options):
    """A compiled `trpo_update`, solved exactly, that examples share."""
    return jax.jit(functools.partial(trpo_update, policy, solver=EXACT, fisher_fraction=1.0, **options))


@functools.partial(jax.jit, static_argnums=0)
def divergences(policy, params, new, observation):
    old, now = policy(params, observation), policy(new, observation)
    kl = old.kl(now)
    return {"mean_kl": kl.mean(), "maximum_kl": kl.max(), "reverse_kl": now.kl(old).mean()}


def compiled_gradient(function):
    """Of `function(params)` -> (value, other): params -> ((value, other), gradient of the value)."""
    return jax.jit(jax.value_and_grad(function, has_aux=True))


def norm(tree):
    return np.sqrt(sum(float((np.asarray(leaf) ** 2).sum()) for leaf in tree.values()))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("max_kl", [1e-4, 0.01, 0.3])
@pytest.mark.parametrize("policy", [categorical, fixed_gaussian])
def test_the_chosen_divergence_is_within_its_bound_and_reported(constraint, max_kl, policy, x64):
    problem = make_problem(policy)
    new, info = update_of(policy, constraint=constraint)(*problem, max_kl=max_kl)
    found = divergences(policy, problem[0], new, problem[1])
    assert info.accepted
    assert max_kl / 3 < found[constraint.__name__] <= max_kl  # near the boundary, not just somewhere inside
    np.testing.assert_allclose(info.divergence, found[constraint.__name__], rtol=1e-9)
    np.testing.assert_allclose(info.mean_kl, found["mean_kl"], rtol=1e-9)
    np.testing.assert_allclose(info.maximum_kl, found["maximum_kl"], rtol=1e-9)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_where_every_kl_is_quadratic_the_bound_is_met_at_once(constraint, x64):
    problem = make_problem(fixed_gaussian)
    _, info = update_of(fixed_gaussian, constraint=constraint)(*problem, max_kl=0.01)
    assert info.step_fraction == 1
    np.testing.assert_allclose(info.divergence, 0.01, rtol=1e-12)


def symmetric_kl(old, new):
    return (mean_kl(old, new) + reverse_kl(old, new)) / 2


def twice_the_kl(old, new):
    return 2 * mean_kl(old, new)


@pytest.mark.parametrize("constraint", [maximum_kl, reverse_kl, symmetric_kl, twice_the_kl])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_full_step_is_scaled_to_the_divergence_that_is_bounded(constraint, seed, x64):
    """A divergence grows with the square of a step: D(s) > δ of the natural-gradient step s leaves √(δ/D(s)) s."""
    params, *batch = make_problem(seed=seed)
    whole, whole_info = update_of(categorical, line_search=full_step)(params, *batch, max_kl=0.3)
    excess = constraint(categorical(params, batch[0]), categorical(whole, batch[0])) / 0.3
    factor = min(1.0, 1 / np.sqrt(excess))
    new, info = update_of(categorical, line_search=full_step, constraint=constraint)(params, *batch, max_kl=0.3)
    for name in params:
        np.testing.assert_allclose(new[name] - params[name], factor * (whole[name] - params[name]), rtol=1e-9)
    np.testing.assert_allclose(info.predicted_gain, factor * whole_info.predicted_gain, rtol=1e-9)
    assert (excess > 1) == (seed == 3 or constraint in (maximum_kl, twice_the_kl))  # both cases occur


def test_a_divergence_of_ones_own_is_bounded_and_met_at_once_where_it_is_quadratic(x64):
    problem = make_problem(fixed_gaussian)
    _, info = update_of(fixed_gaussian, constraint=twice_the_kl)(*problem, max_kl=0.01)
    assert info.step_fraction == 1
    np.testing.assert_allclose(info.divergence, 0.01, rtol=1e-12)
    np.testing.assert_allclose(info.mean_kl, 0.005, rtol=1e-12)


@pytest.mark.parametrize("constraint, times", [(mean_kl, 1), (maximum_kl, 1), (reverse_kl, 2), (symmetric_kl, 3)])
def test_the_kl_of_a_candidate_is_computed_once_where_the_constraint_is_made_of_it(constraint, times, monkeypatch):
    calls, kl = [], Categorical.kl
    params, *batch = make_problem()
    monkeypatch.setattr(Categorical, "kl", lambda *both: calls.append(1) or kl(*both))
    evaluate = make_evaluate(categorical, categorical(params, batch[0]), Batch(*batch), constraint=constraint)
    jax.eval_shape(evaluate, params)
    assert len(calls) == times


def test_a_constraint_that_is_no_function_is_refused():
    message = "^constraint must be a function, such as mean_kl, maximum_kl or reverse_kl, got 'max-kl'$"
    with pytest.raises(ValueError, match=message):
        trpo_update(categorical, *make_problem(), constraint="max-kl")


def test_without_a_line_search_it_is_the_natural_gradient_step(x64):
    params, observation, action, advantage = make_problem()
    update = update_of(categorical, line_search=full_step)
    new, info = update(params, observation, action, advantage, max_kl=2.0)

    @jax.jit
    def full(params):
        gradient = jax.grad(lambda p: jnp.mean(categorical(p, observation).log_prob(action) * advantage))(params)
        return natural_gradient(lambda p: categorical(p, observation), params, gradient, max_kl=2.0, solver=EXACT)[0]

    step = full(params)
    for name in params:
        np.testing.assert_allclose(new[name], params[name] + step[name], rtol=1e-10)
    assert info.accepted and info.step_fraction == 1
    assert abs(info.mean_kl - 2.0) > 0.01  # nobody looked
    poisoned, refused = update(params, observation, action, advantage.at[0].set(jnp.nan), max_kl=2.0)
    assert not refused.accepted
    assert all((poisoned[name] == params[name]).all() for name in params)


@pytest.mark.parametrize("options", [{}, {"bonus": log_barrier}], ids=["entropy", "log barrier"])
def test_a_bonus_changes_the_gradient_and_the_gain(x64, options):
    params, observation, action, advantage = make_problem()
    update, bonus = update_of(categorical, **options), options.get("bonus", Categorical.entropy)
    new, info = update(params, observation, action, advantage, entropy_coefficient=0.7)
    old_log_prob = categorical(params, observation).log_prob(action)

    @compiled_gradient
    def evaluate(p):
        distribution = categorical(p, observation)
        mean = bonus(distribution).mean()
        return jnp.mean(jnp.exp(distribution.log_prob(action) - old_log_prob) * advantage) + 0.7 * mean, mean

    (old_value, old_bonus), gradient = evaluate(params)
    np.testing.assert_allclose(info.surrogate_gain, evaluate(new)[0][0] - old_value, rtol=1e-9)
    np.testing.assert_allclose(info.gradient_norm, norm(gradient), rtol=1e-10)
    new, info = update(params, observation, action, jnp.zeros_like(advantage), entropy_coefficient=1.0)
    assert info.accepted and evaluate(new)[0][1] > old_bonus


# --- Samples of other policies -----------------------------------------------------------------------------------


def test_own_log_probabilities_as_behaviour_change_nothing(x64):
    params, observation, action, advantage = make_problem()
    log_prob = categorical(params, observation).log_prob(action)
    plain = update_of(categorical)(params, observation, action, advantage)
    given = update_of(categorical)(params, Batch(observation, action, advantage, log_prob))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(given), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_each_sample_counts_by_its_ratio_to_the_policy_that_took_it(x64):
    params, observation, action, advantage = make_problem()
    behaviour = categorical(jax.tree.map(lambda leaf: leaf + 0.3, params), observation).log_prob(action)
    update = update_of(categorical)
    new, info = update(params, Batch(observation, action, advantage, behaviour))
    assert info.accepted

    @compiled_gradient
    def evaluate(p):
        weight = jnp.exp(categorical(p, observation).log_prob(action) - behaviour)
        return jnp.mean(weight * advantage), weight.sum() ** 2 / (60 * (weight**2).sum())

    (old_value, old_fraction), gradient = evaluate(params)
    (value, fraction), _ = evaluate(new)
    np.testing.assert_allclose(info.gradient_norm, norm(gradient), rtol=1e-10)
    np.testing.assert_allclose(info.surrogate_gain, value - old_value, rtol=1e-9)
    np.testing.assert_allclose(info.effective_sample_fraction, fraction, rtol=1e-10)
    _, refused = update(params, Batch(observation, action, jnp.zeros(60), behaviour))
    np.testing.assert_allclose(refused.effective_sample_fraction, old_fraction, rtol=1e-10)


@pytest.mark.parametrize("estimate", [gae, parallel_gae])
def test_advantages_of_another_policy_are_cut_where_the_two_part(estimate, x64):
    rewards, values = jnp.array([1.0, 2, 3, 4]), jnp.array([0.5, 1, 1.5, 2])
    next_values, never = jnp.array([1, 1.5, 2, 2.5]), jnp.zeros(4, bool)
    settings = {"gamma": 0.9, "gae_lambda": 0.95}

    compiled = jax.jit(lambda ratios: estimate(rewards, values, next_values, never, never, **settings, ratios=ratios))

    def at(*ratios):
        return np.asarray(compiled(np.array(ratios)))

    golden = [8.4779945938, 8.27835625, 6.93375, 4.25]
    np.testing.assert_allclose(at(1.0, 1, 1, 1), golden, atol=1e-10)
    np.testing.assert_allclose(at(0.0, 5, 1, 2), golden, atol=1e-10)  # its own first action does not count, nor a gain
    np.testing.assert_allclose(at(1.0, 0, 0, 0), [1.4, 2.35, 3.3, 4.25], atol=1e-12)  # λ = 0
    half = at(1.0, 1, 0.5, 1)
    np.testing.assert_allclose(half[2:], golden[2:], atol=1e-10)
    np.testing.assert_allclose(half[1], 2.35 + 0.855 * 0.5 * golden[2], atol=1e-8)


class WithoutDivergence(Categorical):
    """A categorical distribution whose KL to others is NaN in one sample of the batch."""

    def kl(self, other):
        return super().kl(other).at[3].set(jnp.nan)

    def fisher_product(self, tangent):
        return WithoutDivergence(super().fisher_product(tangent).logits)


jax.tree_util.register_pytree_node(
    WithoutDivergence, lambda d: ((d.logits,), None), lambda _, children: WithoutDivergence(*children)
)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_one_divergence_that_is_nan_rejects_the_update_of_a_long_batch(constraint):
    params, observation, action, advantage = make_problem(batch=10_000)

    def policy(params, observation):
        return WithoutDivergence(categorical(params, observation).logits)

    new, info = jax.jit(functools.partial(trpo_update, policy, constraint=constraint))(
        params, observation, action, advantage
    )
    assert not info.accepted
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, new, params)))
