"""The length of the natural-gradient step, and hyperparameters as Python numbers or as traced arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from trpo_jax import (
    Batch,
    Categorical,
    DiagonalGaussian,
    Solver,
    backtracking_line_search,
    full_step,
    mean_kl,
    natural_gradient,
    trpo_update,
)
from trpo_jax.steps.curvature import curvature_sample

DEFAULTS = {"max_kl": 0.01, "damping": 0.1, "shrink": 0.8}


def categorical(params, observation):
    return Categorical(jnp.tanh(observation @ params["hidden"]) @ params["out"])


def gaussian(params, observation):
    return DiagonalGaussian(jnp.tanh(observation @ params["hidden"]) @ params["out"], params["log_std"])


def make_problem(policy=categorical, batch=40):
    """Parameters, observations, actions and advantages from a fixed seed, in the default precision."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), float)

    params = {"hidden": normal(3, 4), "out": normal(4, 2)}
    if policy is gaussian:
        params["log_std"] = 0.3 * normal(2)
    observation, advantage = normal(batch, 3), normal(batch)
    action = normal(batch, 2) if policy is gaussian else jnp.asarray(rng.integers(0, 2, batch))
    return params, observation, action, advantage


def test_a_tolerance_stops_the_solver_before_its_last_product(x64):
    params, observation, action, advantage = make_problem()
    problem = categorical, params, observation, action, advantage
    loosely = Solver(iterations=50, tolerance=0.05)
    _, exact = trpo_update(*problem, solver=Solver(iterations=50, tolerance=0.0), fisher_fraction=1.0)
    _, loose = trpo_update(*problem, solver=loosely, fisher_fraction=1.0)
    assert exact.cg_residual < 1e-6 < loose.cg_residual <= 0.05
    np.testing.assert_allclose(loose.predicted_gain, exact.predicted_gain, rtol=0.01)
    gradient = jax.grad(lambda p: jnp.mean(categorical(p, observation).log_prob(action) * advantage))(params)
    _, few = natural_gradient(lambda p: categorical(p, observation), params, gradient, max_kl=0.01, solver=loosely)
    assert 0 < few.cg_iterations < 15


@pytest.mark.parametrize("policy", [categorical, gaussian])
@pytest.mark.parametrize("iterations", [1, 5, 40])
def test_damping_bends_the_direction_and_not_the_length(policy, iterations, x64):
    # ½ sᵀF s = δ with the dense, undamped F = Hessian of the mean KL, however far conjugate gradient got.
    params, observation, _, _ = make_problem(policy)
    theta, unravel = ravel_pytree(params)

    def distribution_fn(theta):
        return policy(unravel(theta), observation)

    @jax.jit
    def compute(theta, gradient):
        old = jax.lax.stop_gradient(distribution_fn(theta))
        fisher = jax.hessian(lambda v: mean_kl(old, distribution_fn(v)))(theta)
        solver = Solver(damping=0.1, iterations=iterations, tolerance=0.0)
        return fisher, *natural_gradient(distribution_fn, theta, gradient, max_kl=0.02, solver=solver)

    gradient = np.random.default_rng(1).normal(size=theta.size)
    fisher, step, info = compute(theta, gradient)
    np.testing.assert_allclose(0.5 * step @ fisher @ step, 0.02, rtol=1e-9)
    np.testing.assert_allclose(info.predicted_gain, gradient @ step, rtol=1e-9)
    np.testing.assert_allclose(info.gradient_norm, np.linalg.norm(gradient), rtol=1e-12)
    if iterations == 40:
        x = np.linalg.solve(fisher + 0.1 * np.eye(theta.size), gradient)
        expected = x * np.sqrt(0.04 / (x @ fisher @ x))
        np.testing.assert_allclose(step, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("policy", [categorical, gaussian])
def test_a_penalised_step_maximises_gain_less_penalty_within_the_region(policy, x64):
    params, observation, _, _ = make_problem(policy)
    theta, unravel = ravel_pytree(params)
    solver = Solver(damping=0.1, iterations=40, tolerance=0.0)

    def distribution_fn(theta):
        return policy(unravel(theta), observation)

    @jax.jit
    def compute(theta, gradient, penalty):
        return natural_gradient(distribution_fn, theta, gradient, max_kl=0.02, kl_penalty=penalty, solver=solver)

    old = distribution_fn(theta)
    fisher = jax.jit(jax.hessian(lambda v: mean_kl(old, distribution_fn(v))))(theta)
    gradient = np.random.default_rng(1).normal(size=theta.size)
    x = np.linalg.solve(fisher + 0.1 * np.eye(theta.size), gradient)
    full, info = compute(theta, gradient, 0.0)
    meets = np.sqrt(x @ fisher @ x / 0.04)  # the penalty with which x / penalty ends where the KL is δ
    for penalty in (meets * 1.01, 100 * meets):
        step, info = compute(theta, gradient, penalty)
        np.testing.assert_allclose(step, x / penalty, rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(info.predicted_gain, gradient @ step, rtol=1e-9)
        # Half the gradient makes half of the step, where without a penalty the length stays.
        np.testing.assert_allclose(compute(theta, gradient / 2, penalty)[0], step / 2, rtol=1e-9)
    np.testing.assert_array_equal(compute(theta, gradient, meets / 1.01)[0], full)
    np.testing.assert_allclose(compute(theta, gradient / 2, 0.0)[0], full, rtol=1e-9)
    for nothing in (0 * gradient, np.nan * gradient):
        np.testing.assert_array_equal(compute(theta, nothing, meets)[0], 0)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_with_a_penalty_small_advantages_make_small_steps(num_steps, x64):
    params, observation, action, advantage = make_problem(batch=400)

    @jax.jit
    def update(scale, penalty):
        batch = observation, action, scale * advantage
        options = {"fisher_fraction": 1.0, "num_steps": num_steps, "kl_penalty": penalty}
        return trpo_update(categorical, params, *batch, **options)[1]

    small, smaller = update(1e-3, 1.0), update(1e-4, 1.0)
    assert small.accepted and 0 < small.mean_kl < 0.001
    np.testing.assert_allclose(smaller.mean_kl / small.mean_kl, 0.01, rtol=0.05)  # the KL grows with the square
    assert update(1e-3, 0.0).mean_kl > 0.002
    same = update(10.0, 1e-9), update(10.0, 0.0)
    jax.tree.map(np.testing.assert_array_equal, *same)


@functools.cache
def compiled(**static):
    """`trpo_update`, solved exactly, with some settings as Python numbers and the others traced."""

    def update(problem, traced):
        settings = {**DEFAULTS, **static, **traced}
        return trpo_update(
            categorical,
            *problem,
            max_kl=settings["max_kl"],
            fisher_fraction=1.0,
            solver=Solver(settings["damping"], tolerance=0.0),
            line_search=functools.partial(backtracking_line_search, shrink=settings["shrink"]),
        )

    return jax.jit(update)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_kl", 0.03), ("damping", 0.01), ("shrink", 0.5)],
)
def test_a_python_number_and_a_traced_array_give_one_answer(name, value):
    problem = make_problem()
    number, number_info = compiled(**{name: value})(problem, {})
    traced, traced_info = compiled()(problem, {k: jnp.float32(v) for k, v in {**DEFAULTS, name: value}.items()})
    default, _ = compiled()(problem, {k: jnp.float32(v) for k, v in DEFAULTS.items()})
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (number, number_info), (traced, traced_info))
    if name != "shrink":  # which changes nothing where the full step passes
        assert np.abs(traced["out"] - default["out"]).max() > 1e-3


def test_a_fraction_counts_as_float32_has_it():
    # At ½ the rounding of the product decides: .59 · 50 is 29.5 in float64 and below it in float32.
    for batch_size in (10, 50, 75, 150, 1000):
        observation = np.arange(batch_size)
        for fraction in np.arange(1, 100) / 100:
            chosen = curvature_sample(observation, (batch_size,), float(fraction))
            count = np.clip(np.round(np.float32(fraction) * np.float32(batch_size)), 1, batch_size)
            assert len(chosen) == count
    few, more = (set(curvature_sample(np.arange(50), (50,), fraction).tolist()) for fraction in (0.3, 0.59))
    assert few < more


@pytest.mark.parametrize("entry", [3, (3, 1)])
@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_an_infinite_observation_changes_nothing(bad, entry):
    # tanh(±∞) = ±1 is finite, and so may be the policy there; the gradient (0 · ∞) is not.
    params, observation, action, advantage = make_problem()
    problem = params, observation.at[entry].set(bad), action, advantage
    new, info = compiled()(problem, {k: jnp.float32(v) for k, v in DEFAULTS.items()})
    assert not info.accepted
    jax.tree.map(np.testing.assert_array_equal, new, params)


# --- several steps within one region

EXACTLY = Solver(damping=0.05, iterations=40, tolerance=0.0)


@functools.cache
def several(policy, num_steps, **options):
    """`trpo_update` with K natural-gradient steps, solved exactly."""
    options = {"solver": EXACTLY, "fisher_fraction": 1.0, "num_steps": num_steps, **options}
    return jax.jit(lambda params, *batch: trpo_update(policy, params, *batch, **options))


@pytest.mark.parametrize("policy", [categorical, gaussian])
def test_several_steps_are_those_of_dense_linear_algebra(policy, x64):
    params, observation, action, advantage = make_problem(policy)
    theta, unravel = ravel_pytree(params)
    delta, epsilon, bonus, num_steps = 0.02, 0.1, 0.01, 3

    def distribution_fn(theta):
        return policy(unravel(theta), observation)

    old = jax.lax.stop_gradient(distribution_fn(theta))

    def clipped(theta):
        new = distribution_fn(theta)
        ratio = jnp.exp(new.log_prob(action) - old.log_prob(action))
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - epsilon, 1 + epsilon) * advantage)
        return jnp.mean(gain + bonus * new.entropy())

    @jax.jit
    def parts(theta):
        here = jax.lax.stop_gradient(distribution_fn(theta))
        return jax.grad(clipped)(theta), jax.hessian(lambda v: mean_kl(here, distribution_fn(v)))(theta)

    place = theta
    for _ in range(num_steps):
        gradient, fisher = parts(place)
        x = np.linalg.solve(fisher + EXACTLY.damping * np.eye(theta.size), gradient)
        place = place + x * np.sqrt(2 * delta / num_steps**1.5 / (x @ fisher @ x))
    walked = place - theta
    divergence = float(mean_kl(old, distribution_fn(place)))
    if divergence > delta:
        walked = walked * np.sqrt(delta / divergence)

    options = {"max_kl": delta, "clip_ratio": epsilon, "entropy_coefficient": bonus, "line_search": full_step}
    new, info = several(policy, num_steps, **options)(params, observation, action, advantage)
    assert info.accepted
    np.testing.assert_allclose(ravel_pytree(new)[0] - theta, walked, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(info.predicted_gain, parts(theta)[0] @ walked, rtol=1e-6)
    one, _ = several(policy, 1, **options)(params, observation, action, advantage)
    assert np.abs(ravel_pytree(one)[0] - ravel_pytree(new)[0]).max() > 1e-3


@pytest.mark.parametrize("num_steps", [2, 5, 20])
@pytest.mark.parametrize("policy", [categorical, gaussian])
def test_several_steps_stay_within_the_region(policy, num_steps):
    for radius in (0.001, 0.1, 3.0):
        params, *batch = make_problem(policy)
        new, info = several(policy, num_steps, max_kl=radius)(params, *batch)
        divergence = mean_kl(policy(params, batch[0]), policy(new, batch[0]))
        assert info.accepted and info.surrogate_gain > 0
        assert 0 < divergence <= radius * (1 + 1e-3)
        np.testing.assert_allclose(info.divergence, divergence, rtol=1e-3)


def test_a_sample_with_a_large_advantage_stops_at_the_clipped_ratio(x64):
    # One state for each sample, so that the samples only share the region.
    def apply(logits, observation):
        return Categorical(logits[observation])

    batch = 50
    action = jnp.zeros(batch, int)
    advantage = jnp.where(jnp.arange(batch) == 0, 50.0, 1.0)
    ratios = {}
    for num_steps in (1, 30):
        update = several(apply, num_steps, max_kl=0.005, clip_ratio=0.2, solver=Solver(1e-9, 40, 0.0))
        logits, info = update(jnp.zeros((batch, 2)), jnp.arange(batch), action, advantage)
        assert info.accepted
        ratios[num_steps] = 2 * jax.nn.softmax(logits)[:, 0]
    # One step moves each state in proportion to its advantage; once the first is at 1 + ε, only the others move on.
    assert ratios[1][0] > 1.5 and ratios[1][1] < 1.03
    assert ratios[30][0] < 1.25 and ratios[30][1] > 1.06


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_several_steps_leave_the_parameters_where_a_number_is_not_finite(bad):
    params, observation, action, advantage = make_problem()
    new, info = several(categorical, 3)(params, observation, action, advantage.at[3].set(bad))
    assert not info.accepted
    jax.tree.map(np.testing.assert_array_equal, new, params)


def test_several_steps_on_samples_of_another_policy(x64):
    # Ratios to the behaviour policy and advantages reweighted to θ_old are one surrogate, of which the clip sees the
    # ratios to θ_old.
    params, observation, action, advantage = make_problem()
    behaviour = categorical(params, observation).log_prob(action) + 0.1 * jnp.sin(jnp.arange(40.0))
    weight = jnp.exp(categorical(params, observation).log_prob(action) - behaviour)
    new, _ = several(categorical, 3)(params, Batch(observation, action, advantage, behaviour))
    expected, _ = several(categorical, 3)(params, observation, action, weight * advantage)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9), new, expected)


@pytest.mark.parametrize("bad", [np.nan, 0.0, -1.0, -np.inf])
def test_several_steps_with_a_ratio_that_is_none_change_nothing(bad):
    problem = make_problem()
    new, info = jax.jit(lambda ratio: trpo_update(categorical, *problem, num_steps=3, clip_ratio=ratio))(bad)
    assert not info.accepted
    jax.tree.map(np.testing.assert_array_equal, new, problem[0])


def test_several_steps_begin_within_the_region(x64):
    # A single sample gives the curvature and sees little of the step, which then leads far out: nothing is added to it.
    params, *batch = make_problem(gaussian)
    options = {"fisher_fraction": 0.01, "solver": Solver(1e-4, 40, 0.0), "line_search": full_step, "clip_ratio": 1e6}
    radius = 1e-3

    def step(num_steps, max_kl):
        new, info = several(gaussian, num_steps, max_kl=max_kl, **options)(params, *batch)
        return ravel_pytree(jax.tree.map(jnp.subtract, new, params))[0], info.divergence

    first, divergence = step(1, radius / 4**1.5)
    assert divergence > 2 * radius
    both, _ = step(4, radius)
    np.testing.assert_allclose(both / jnp.linalg.norm(both), first / jnp.linalg.norm(first), atol=1e-6)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "2", None])
def test_a_number_of_steps_that_is_none(bad):
    with pytest.raises(ValueError, match="num_steps of a policy update must be a whole number of at least 1"):
        trpo_update(categorical, *make_problem(), num_steps=bad)
