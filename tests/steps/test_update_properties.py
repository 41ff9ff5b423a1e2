"""The TRPO update: exact answers, guarantees over ten thousand random problems, policies of every library."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from trpo_jax import (
    Batch,
    Categorical,
    DiagonalGaussian,
    MultiCategorical,
    Solver,
    backtracking_line_search,
    mean_kl,
    natural_gradient,
    parallel_line_search,
    trpo_update,
)
from trpo_jax.steps.curvature import curvature_sample
from trpo_jax.steps.policy_updates import surrogate_gradient

LINE_SEARCHES = [backtracking_line_search, parallel_line_search]
EXACT = Solver(tolerance=0.0)
UNDAMPED = Solver(damping=0.0, iterations=10, tolerance=0.0)


def update(apply, *arrays, **options):
    """`trpo_update` as one compiled program; exact, unless the options say otherwise."""
    options = {"solver": EXACT, "fisher_fraction": 1.0, **options}
    return jax.jit(lambda *traced: trpo_update(apply, *traced, **options))(*arrays)


def natural_step(apply, params, gradient, observation, **options):
    """The step of `natural_gradient` by one compiled program."""

    def step(params, gradient, observation):
        return natural_gradient(lambda p: apply(p, observation), params, gradient, **options)[0]

    return jax.jit(step)(params, gradient, observation)


def kl_of_logits(old, new):
    return Categorical(old).kl(Categorical(new))


# --- golden numbers, computed by an independent NumPy program


def two_state_mdp():
    """Exact V, A and ρ of the two-state MDP, by linear solves."""
    gamma, mu = 0.9, np.array([1.0, 0.0])
    transition = np.array([[[0.9, 0.1], [0.1, 0.9]], [[0.1, 0.9], [0.9, 0.1]]])  # [s, a, s']
    reward = np.array([[0.0, 1.0], [2.0, 0.0]])
    logits = np.array([[0.0, 0.5], [0.0, -0.3]])
    policy = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p_policy = np.einsum("sa,sat->st", policy, transition)
    value = np.linalg.solve(np.eye(2) - gamma * p_policy, (policy * reward).sum(1))
    advantage = reward + gamma * transition @ value - value[:, None]
    rho = np.linalg.solve(np.eye(2) - gamma * p_policy.T, mu)

    def expected_return(policy):
        p = np.einsum("sa,sat->st", policy, transition)
        return np.linalg.solve(np.eye(2) - gamma * p, (policy * reward).sum(1))[0]

    return logits, policy, value, advantage, rho, gamma, expected_return


def test_two_state_mdp_golden(x64):
    logits, policy, value, advantage, rho, gamma, expected_return = two_state_mdp()
    np.testing.assert_allclose(value, [8.9629901502, 9.4718243814], rtol=1e-10)
    np.testing.assert_allclose(rho, [4.7981323375, 5.2018676625], rtol=1e-10)
    np.testing.assert_allclose(advantage, [[-0.8505039342, 0.5158567123], [1.0070224810, -1.3593381655]], rtol=1e-9)

    # One sample a state, weighted by the normalised state distribution d = (1 − γ) ρ; the "batch" is exact.
    weight = jnp.asarray(2 * (1 - gamma) * rho)  # the mean over two samples divides by 2

    def apply(theta, _):
        return Categorical(theta)

    def exact_surrogate(theta):  # Σ_s ρ(s) Σ_a π(a|s) A(s, a): its gradient is ∇η
        return jnp.sum(rho[:, None] * jax.nn.softmax(theta) * advantage)

    theta = jnp.asarray(logits)
    gradient = jax.jit(jax.grad(exact_surrogate))(theta)
    np.testing.assert_allclose(gradient[:, 1], [1.5406794497, -3.0091583471], rtol=1e-9)

    step = natural_step(apply, theta, gradient, None, max_kl=0.01, solver=UNDAMPED, weight=weight)
    natural = np.array([[-6.8318032325, 6.8318032325], [11.8318032325, -11.8318032325]])
    np.testing.assert_allclose(step, 0.0147235031 * natural, rtol=1e-8)
    assert np.vdot(gradient, natural) == pytest.approx(92.2587766074, rel=1e-9)

    new = theta + step
    probs = softmax(new, axis=1)
    np.testing.assert_allclose(probs, [[0.3315515114, 0.6684484886], [0.6566523372, 0.3433476628]], rtol=1e-8)
    kl = np.asarray(jax.jit(kl_of_logits)(theta, new))
    assert (1 - gamma) * rho @ kl == pytest.approx(0.0097914243, rel=1e-8)
    assert kl.max() == pytest.approx(0.0145143095, rel=1e-8)
    assert expected_return(policy) == pytest.approx(8.9629901502, rel=1e-10)
    assert expected_return(probs) == pytest.approx(10.3374129265, rel=1e-9)


def test_softmax_bandit_golden(x64):
    # Counts of the sample stand in the ratio of p = (.5, .3, .2), so that sample means are exact expectations.
    theta = np.log([0.5, 0.3, 0.2])
    action = np.array([0] * 5 + [1] * 3 + [2] * 2)
    advantage = np.array([0.1, -0.9, 1.1])[action]
    assert np.var(advantage) == pytest.approx(0.49)

    def apply(theta, observation):
        return Categorical(jnp.broadcast_to(theta, (observation.shape[0], 3)))

    observation = np.zeros((10, 1))
    gradient = jax.jit(jax.grad(lambda t: jnp.mean(apply(t, observation).log_prob(action) * advantage)))(theta)
    step = natural_step(apply, theta, gradient, observation, max_kl=0.01, solver=UNDAMPED)
    np.testing.assert_allclose(step, 0.2020305089 * np.array([0.0, -1.0, 1.0]), atol=1e-10)
    full = theta + step
    np.testing.assert_allclose(softmax(full), [0.5051025106, 0.2476224649, 0.2472750246], rtol=1e-9)
    assert jax.jit(kl_of_logits)(theta, full) == pytest.approx(
        0.0100497494, rel=1e-8
    )  # > δ: the full step must be refused

    for line_search in LINE_SEARCHES:
        new, info = update(
            apply, theta, observation, action, advantage, max_kl=0.01, solver=UNDAMPED, line_search=line_search
        )
        assert info.accepted and info.step_fraction == pytest.approx(0.8)
        np.testing.assert_allclose(new, theta + 0.8 * step, rtol=1e-12)


def test_linear_gaussian_step_has_kl_delta(x64):
    # With σ fixed and a mean linear in θ the KL is exactly quadratic: the undamped full step lies on the boundary.
    rng = np.random.default_rng(0)
    observation, params, advantage = rng.normal(size=(200, 3)), rng.normal(size=(3, 2)), rng.normal(size=200)
    log_std = np.array([-0.5, 0.3])
    solver = Solver(damping=0.1, iterations=20, tolerance=0.0)  # damps the direction, not the length

    def apply(params, observation):
        return DiagonalGaussian(observation @ params, log_std)

    action = observation @ params + np.exp(log_std) * rng.normal(size=(200, 2))
    for search in LINE_SEARCHES:
        options = {"max_kl": 0.01, "solver": solver, "line_search": search}
        _, info = update(apply, params, observation, action, advantage, **options)
        assert info.accepted and info.step_fraction == 1
        assert float(info.mean_kl) == pytest.approx(0.01, abs=1e-12)

    @jax.jit
    def kl_of_step(params):
        gradient = jax.grad(lambda p: jnp.mean(apply(p, observation).log_prob(action) * advantage))(params)
        step, _ = natural_gradient(lambda p: apply(p, observation), params, gradient, max_kl=0.01, solver=solver)
        return mean_kl(apply(params, observation), apply(params + step, observation))

    assert float(kl_of_step(params)) == pytest.approx(0.01, abs=1e-12)


# --- invariance and equivalence


def mlp_problem(dtype=np.float32):
    """A small tanh network over a batch, its actions and advantages."""
    rng = np.random.default_rng(0)
    params = {"hidden": rng.normal(size=(3, 5)) / 2, "out": rng.normal(size=(5, 4)) / 2}
    observation, advantage = rng.normal(size=(64, 3)), rng.normal(size=64)
    logits = np.tanh(observation @ params["hidden"]) @ params["out"]
    action = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return *jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, observation)), action, jnp.asarray(advantage, dtype)


def bare_apply(params, observation):
    return Categorical(jnp.tanh(observation @ params["hidden"]) @ params["out"])


COMPILED = {s: jax.jit(functools.partial(trpo_update, bare_apply, line_search=s)) for s in LINE_SEARCHES}


def test_step_is_invariant_to_reparametrisation(x64):
    # θ = B φ: the natural step in φ is B⁻¹ times the one in θ, so the new *policy* is the same.
    params, observation, action, advantage = mlp_problem(np.float64)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    # The Fisher matrix of a softmax net is singular along a shift of all logits; three free logits make it regular.
    matrix = np.random.default_rng(9).normal(size=(flat.size, flat.size)) + 4 * np.eye(flat.size)
    phi = np.linalg.solve(matrix, flat)

    @jax.jit
    def updated_policy(matrix, parameters):
        def apply(v, o):
            return bare_apply(unravel(matrix @ v), o)

        new, info = trpo_update(
            apply,
            parameters,
            observation,
            action,
            advantage,
            max_kl=0.01,
            fisher_fraction=1.0,
            solver=Solver(damping=0.0, iterations=300, tolerance=0.0),
            line_search=functools.partial(backtracking_line_search, shrink=0.5),
        )
        return apply(parameters, observation).logits, apply(new, observation).logits, info.accepted

    old, by_theta, accepted = updated_policy(np.eye(flat.size), flat)
    _, by_phi, _ = updated_policy(matrix, phi)
    assert accepted
    a, b = log_softmax(by_theta, axis=1), log_softmax(by_phi, axis=1)
    np.testing.assert_allclose(a, b, atol=1e-8)
    assert np.abs(a - log_softmax(old, axis=1)).max() > 1e-3


def test_step_does_not_depend_on_the_scale_of_advantages():
    params, observation, action, advantage = mlp_problem()
    compiled = COMPILED[LINE_SEARCHES[0]]
    new, info = compiled(params, observation, action, advantage)
    assert info.accepted
    for scale in (1e-12, 1e6):
        scaled, scaled_info = compiled(params, observation, action, scale * advantage)
        assert scaled_info.accepted
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), scaled, new)


@functools.cache
def library_policies():
    """The same kind of policy from each library: name -> (apply, params)."""
    import equinox as eqx
    import flax.linen as nn
    from flax import nnx

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, observation):
            return Categorical(nn.Dense(4)(nn.tanh(nn.Dense(5)(observation))))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.out = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)

        def __call__(self, observation):
            return Categorical(self.out(nnx.tanh(self.hidden(observation))))

    linen = Linen()
    graph, nnx_params = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param)
    network = eqx.nn.MLP(3, 4, 5, 1, activation=jnp.tanh, key=jax.random.key(0))
    arrays, static = eqx.partition(network, eqx.is_inexact_array)
    return {
        "linen": (linen.apply, jax.jit(linen.init)(jax.random.key(0), np.zeros(3))),
        "nnx": (lambda params, o: nnx.merge(graph, params)(o), nnx_params),
        "equinox": (lambda params, o: Categorical(jax.vmap(eqx.combine(params, static))(o)), arrays),
        "dict": (bare_apply, mlp_problem()[0]),
    }


@pytest.mark.parametrize("library", ["linen", "nnx", "equinox", "dict"])
def test_policies_of_every_library(library):
    apply, params = library_policies()[library]
    _, observation, _, advantage = mlp_problem()

    @jax.jit
    def sample_and_update(params):
        action = apply(params, observation).sample(jax.random.key(3))
        new, info = trpo_update(apply, params, observation, action, advantage)
        return new, info, mean_kl(apply(params, observation), apply(new, observation))

    new, info, recomputed = sample_and_update(params)
    assert info.accepted and 0 < info.mean_kl <= 0.01
    assert jax.tree.structure(new) == jax.tree.structure(params)
    np.testing.assert_allclose(recomputed, info.mean_kl, rtol=1e-3)


def test_multicategorical_and_batches_of_any_rank():
    rng = np.random.default_rng(0)
    observation, advantage = np.float32(rng.normal(size=(6, 5, 3))), np.float32(rng.normal(size=(6, 5)))  # [T, N, ...]
    params = {"a": np.zeros((3, 2), np.float32), "b": np.zeros((3, 4), np.float32)}
    action = np.stack([rng.integers(2, size=(6, 5)), rng.integers(4, size=(6, 5))], axis=-1)

    def apply(params, observation):
        return MultiCategorical((observation @ params["a"], observation @ params["b"]))

    new, info = update(apply, params, observation, action, advantage, fisher_fraction=0.5)
    assert info.accepted and info.mean_kl <= 0.01
    flat = [x.reshape(30, *x.shape[2:]) for x in (observation, action, advantage)]
    same, _ = update(apply, params, *flat, fisher_fraction=0.5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), new, same)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1, 1 / 64])
def test_a_fraction_of_the_fisher_matrix_is_the_one_of_its_samples(fraction):
    """The step is the one by the matrix in which the samples that are chosen count alone, and those equally."""
    params, observation, action, advantage = mlp_problem()
    _, info = update(bare_apply, params, observation, action, advantage, fisher_fraction=fraction)
    size = len(advantage)
    chosen = curvature_sample(np.arange(size), (size,), fraction)
    weight = jnp.zeros(size).at[chosen].set(size / len(chosen))
    batch = Batch(observation, action, advantage)

    @jax.jit
    def by_weights(params):
        gradient, _ = surrogate_gradient(bare_apply, params, batch)
        options = {"max_kl": 0.01, "solver": EXACT, "weight": weight}
        return natural_gradient(lambda p: bare_apply(p, observation), params, gradient, **options)

    _, solve = by_weights(params)
    np.testing.assert_allclose(info.predicted_gain, solve.predicted_gain, rtol=2e-3)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_fisher_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match="fisher_fraction must lie in"):
        update(bare_apply, *mlp_problem(), fisher_fraction=fraction)


def test_one_trace_serves_all_floats_and_vmap_equals_separate_calls():
    problem, traces = mlp_problem(), []

    @jax.jit
    def traced_update(max_kl, damping, shrink):
        traces.append(1)
        return trpo_update(
            bare_apply,
            *problem,
            max_kl=max_kl,
            solver=Solver(damping),
            line_search=functools.partial(backtracking_line_search, shrink=shrink),
            fisher_fraction=1.0,
        )

    cases = [(0.01, 0.1, 0.8), (0.1, 0.01, 0.5), (0.001, 1.0, 0.9)]
    separate = [traced_update(*case) for case in cases]
    assert len(traces) == 1
    batched = jax.vmap(traced_update)(*(jnp.array(column) for column in zip(*cases, strict=True)))
    for i, expected in enumerate(separate):
        got = jax.tree.map(lambda leaf, i=i: leaf[i], batched)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, expected)


def test_line_searches_give_one_answer():
    problem = mlp_problem()
    sequential, parallel = (
        jax.jit(lambda max_kl, s=search: trpo_update(bare_apply, *problem, max_kl=max_kl, line_search=s))
        for search in LINE_SEARCHES
    )
    for max_kl in (1e-4, 0.01, 1.0, 30.0):
        (a, info_a), (b, info_b) = sequential(max_kl), parallel(max_kl)
        assert info_a.step_fraction == info_b.step_fraction
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), a, b)


# --- guarantees


def assert_bit_identical(new, old):
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["advantage", "observation", "params"])
@pytest.mark.parametrize("line_search", LINE_SEARCHES)
def test_non_finite_input_changes_nothing(bad, where, line_search):
    params, observation, action, advantage = mlp_problem()
    if where == "advantage":
        advantage = advantage.at[3].set(bad)
    elif where == "observation":
        observation = observation.at[3].set(bad)
    else:
        params = {**params, "out": params["out"].at[1, 2].set(bad)}
    new, info = COMPILED[line_search](params, observation, action, advantage)
    assert not info.accepted and info.step_fraction == 0 and info.mean_kl == 0
    assert_bit_identical(new, params)


def test_no_gradient_no_step():
    params, observation, action, advantage = mlp_problem()
    new, info = COMPILED[LINE_SEARCHES[0]](params, observation, action, jnp.zeros_like(advantage))
    assert not info.accepted and info.effective_sample_fraction == 1
    assert_bit_identical(new, params)


def random_problem(seed, scale, spoil):
    """A random net and a random batch; `spoil` > 0.9 puts a NaN somewhere."""
    keys = jax.random.split(jax.random.key(seed), 5)
    params = {
        "hidden": scale * jax.random.normal(keys[0], (3, 5)),
        "out": scale * jax.random.normal(keys[1], (5, 4)),
    }
    observation = jax.random.normal(keys[2], (16, 3))
    action = bare_apply(params, observation).sample(keys[3])
    advantage = jax.random.normal(keys[4], (16,))
    advantage = jnp.where((jnp.arange(16) == 2) & (spoil > 0.9), jnp.nan, advantage)
    return params, observation, action, advantage


def random_update(params, observation, action, advantage, log_max_kl, damping):
    max_kl = 10.0**log_max_kl
    batch = Batch(observation, action, advantage)
    new, info = trpo_update(bare_apply, params, batch, max_kl=max_kl, solver=Solver(damping))
    with jax.default_matmul_precision("highest"):
        old_distribution, distribution = bare_apply(params, observation), bare_apply(new, observation)
    kl = mean_kl(old_distribution, distribution)
    gain = jnp.mean(
        (jnp.exp(distribution.log_prob(action) - old_distribution.log_prob(action)) - 1) * jnp.nan_to_num(advantage)
    )
    same = jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda a, b: jnp.all(a == b), new, params))
    finite = jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda a: jnp.all(jnp.isfinite(a)), new))
    return info, kl, gain, same, finite, max_kl


# Two programs: in one, XLA may compute the random parameters twice, and round them otherwise each time.
RANDOM_PROBLEMS, RANDOM_UPDATES = jax.jit(jax.vmap(random_problem)), jax.jit(jax.vmap(random_update))
EXAMPLES, LANES = 20, 512  # 10,240 updates


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31 - 1 - LANES),
    log_max_kl=st.floats(-5, 1),
    damping=st.floats(1e-4, 1),
    scale=st.floats(0.01, 20),
)
def test_ten_thousand_updates_keep_their_promise(seed, log_max_kl, damping, scale):
    lanes = np.arange(LANES, dtype=np.int32)
    log_max_kls, dampings, scales = (np.full(LANES, value, np.float32) for value in (log_max_kl, damping, scale))
    spoil = np.float32(np.random.default_rng(seed).uniform(size=LANES))
    problems = RANDOM_PROBLEMS(np.int32(seed) + lanes, scales, spoil)
    info, kl, gain, same, finite, max_kl = jax.tree.map(np.asarray, RANDOM_UPDATES(*problems, log_max_kls, dampings))
    accepted = info.accepted
    assert finite.all()
    assert (info.mean_kl[accepted] <= max_kl[accepted]).all() and (info.surrogate_gain[accepted] > 0).all()
    # Recomputed apart from the update: equal but for rounding.
    np.testing.assert_allclose(kl[accepted], info.mean_kl[accepted], rtol=1e-3, atol=3e-6)
    np.testing.assert_allclose(gain[accepted], info.surrogate_gain[accepted], rtol=1e-2, atol=1e-5)
    assert same[~accepted].all() and not accepted[spoil > 0.9].any()
    assert (info.step_fraction[~accepted] == 0).all()
