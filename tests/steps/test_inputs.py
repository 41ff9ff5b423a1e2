"""What the steps make of inputs that are not float32, not finite, or no parameters at all."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trpo_jax import (
    Batch,
    Beta,
    Categorical,
    Config,
    DiagonalGaussian,
    Solver,
    TanhGaussian,
    backtracking_line_search,
    clipped_objective,
    conjugate_gradient,
    estimate_candidate,
    first_order_update,
    fisher_vector_product,
    fit_value_function,
    full_step,
    gauss_newton_fit,
    natural_gradient,
    parallel_line_search,
    penalized_objective,
    trpo_update,
)
from trpo_jax.algorithms.trpo import CONSTRAINTS
from trpo_jax.steps import defaults, trees
from trpo_jax.steps.policy_updates import make_evaluate
from trpo_jax.steps.statistics import normalize


def categorical(params, observation):
    return Categorical(observation @ params["w"] + params["b"])


def problem(dtype=jnp.float32, batch=64):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 4)), dtype), "b": jnp.zeros(4, dtype)}
    observation, action = jnp.asarray(rng.normal(size=(batch, 3)), dtype), jnp.asarray(rng.integers(0, 4, batch))
    return params, observation, action, jnp.asarray(rng.normal(size=batch), jnp.float32)


@functools.cache
def update(**options):
    return jax.jit(functools.partial(trpo_update, categorical, fisher_fraction=1.0, **options))


def spoiled(leaf):
    params, *batch = problem()
    return {**params, "b": leaf}, *batch


EVERY_STEP = {
    "trpo": lambda params, observation, action, advantage: trpo_update(
        categorical, params, observation, action, advantage
    ),
    "first order": lambda params, observation, action, advantage: first_order_update(
        categorical, params, None, observation, action, advantage, optimizer=optax.sgd(0.1)
    ),
    "gauss-newton": lambda params, observation, action, advantage: gauss_newton_fit(
        lambda p, o: o @ p["w"][:, 0], params, observation, advantage
    ),
    "adam": lambda params, observation, action, advantage: fit_value_function(
        lambda p, o: o @ p["w"][:, 0], params, None, observation, advantage, optimizer=None, epochs=1, minibatches=1
    ),
}


@pytest.mark.parametrize("step", EVERY_STEP.values(), ids=EVERY_STEP.keys())
@pytest.mark.parametrize(
    "leaf, message",
    [
        (jnp.zeros(4, int), r"^params\['b'\] is an array of int32, which has no gradient; keep it out of the param"),
        (jnp.zeros(4, bool), r"^params\['b'\] is an array of bool, which has no gradient"),
        (jnp.tanh, r"^params\['b'\] is a \w+, not an array of floats; keep it out of the parameters and close over it"),
        (0.5, r"^params\['b'\] is a float, not an array of floats"),
        ({"batch_stats": jnp.zeros(4)}, r"^params\['b'\]\['batch_stats'\] is a running average, which a gradient must"),
    ],
    ids=["integers", "booleans", "a function", "a number", "running averages"],
)
def test_parameters_that_no_gradient_may_train_are_refused(step, leaf, message):
    with pytest.raises(ValueError, match=message):
        step(*spoiled(leaf))


def test_no_parameters_at_all_are_refused():
    with pytest.raises(ValueError, match=r"^params has no array in it, so there is nothing to train\.$"):
        trpo_update(categorical, {}, *problem()[1:])


def test_an_equinox_module_and_nnx_running_averages_are_refused_in_one_sentence():
    import equinox as eqx
    from flax import nnx

    network = eqx.nn.MLP(3, 4, 5, 1, activation=jnp.tanh, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"^params\S* is a \w+, not an array of floats"):
        trpo_update(lambda p, o: Categorical(jax.vmap(p)(o)), network, *problem()[1:])
    _, state = nnx.split(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"^params\S* is a running average"):
        trpo_update(categorical, state, *problem()[1:])


def gaussian(params, observation):
    return DiagonalGaussian(observation @ params["w"][:, :1], params["b"][:1])


BOX_POLICIES = {
    "Gaussian": gaussian,
    "tanh": lambda params, observation: TanhGaussian(gaussian(params, observation), -1.0, 1.0),
    "Beta": lambda params, observation: Beta(*[2 + jnp.abs(observation @ params["w"][:, :1])] * 2, -1.0, 1.0),
}


@pytest.mark.parametrize("policy", BOX_POLICIES.values(), ids=BOX_POLICIES.keys())
@pytest.mark.parametrize("spoil", [lambda a: a[:, 0], lambda a: a.T, lambda a: a[:1], lambda a: a[0, 0]])
def test_actions_that_would_be_broadcast_are_refused(policy, spoil):
    params, observation, _, advantage = problem()
    action = policy(params, observation).sample(jax.random.key(0))
    steps = (
        lambda *batch: trpo_update(policy, params, *batch),
        lambda *batch: first_order_update(policy, params, (), *batch, optimizer=optax.identity()),
        lambda *batch: estimate_candidate(policy, params, params, *batch, jax.random.key(1), resamples=9),
    )
    for step in steps:
        jax.eval_shape(step, observation, action, advantage)
        with pytest.raises(
            ValueError, match=r"^actions of the policy have the shape \(64, 1\), but those of the batch"
        ):
            jax.eval_shape(step, observation, spoil(action), advantage)


@pytest.mark.parametrize("spoil", [lambda b: b[0], lambda b: b[:, :1], lambda b: b[0, :1], lambda b: b[0, 0]])
def test_behaviour_log_probabilities_that_would_be_broadcast_are_refused(spoil):
    params, *batch = problem()
    observation, action, advantage = (leaf.reshape(8, 8, *leaf.shape[1:]) for leaf in batch)
    behaviour = categorical(params, observation).log_prob(action)
    for step in (
        lambda batch: trpo_update(categorical, params, batch),
        lambda batch: first_order_update(categorical, params, (), batch, optimizer=optax.identity()),
    ):
        jax.eval_shape(step, Batch(observation, action, advantage, behaviour_log_prob=behaviour))
        with pytest.raises((AssertionError, ValueError), match="shape"):
            jax.eval_shape(step, Batch(observation, action, advantage, behaviour_log_prob=spoil(behaviour)))


@pytest.mark.parametrize("spoil", [lambda s: s["w"], lambda s: s | {"w": s["w"].reshape(-1)}, lambda s: {}])
def test_a_last_step_that_is_not_like_the_parameters_is_refused(spoil):
    params, *batch = problem()
    for step in (
        lambda last: trpo_update(categorical, params, *batch, last_step=last),
        lambda last: first_order_update(categorical, params, (), *batch, optimizer=optax.identity(), last_step=last),
    ):
        jax.eval_shape(step, params)
        with pytest.raises(ValueError, match=r"^last_step must be a pytree like params: the same structure, with arra"):
            jax.eval_shape(step, spoil(params))


def steps_by_number():
    """(name of a number, a step as a function of it)."""
    params, *batch = problem()
    observation, _, target = batch
    old = categorical(params, observation)
    evaluate = make_evaluate(categorical, old, Batch.of(*batch))

    def policy(params):
        return categorical(params, observation)

    def value(params, observation):
        return observation @ params["w"][:, 0]

    def update(**number):
        return trpo_update(categorical, params, *batch, **number)

    def descent(**number):
        return first_order_update(categorical, params, (), *batch, optimizer=optax.identity(), **number)

    def fit(**number):
        sizes = {"epochs": 1, "minibatches": 1, "optimizer": optax.identity()}
        return fit_value_function(value, params, (), observation, target, old_values=target, **sizes, **number)

    return [
        ("max_kl", lambda x: update(max_kl=x)),
        ("max_kl", lambda x: natural_gradient(policy, params, params, max_kl=x)),
        ("max_kl", lambda x: backtracking_line_search(evaluate, params, params, max_kl=x)),
        ("max_kl", lambda x: parallel_line_search(evaluate, params, params, max_kl=x)),
        ("kl_penalty", lambda x: update(kl_penalty=x)),
        ("kl_penalty", lambda x: natural_gradient(policy, params, params, max_kl=0.1, kl_penalty=x)),
        ("shrink", lambda x: backtracking_line_search(evaluate, params, params, max_kl=0.1, shrink=x)),
        ("shrink", lambda x: parallel_line_search(evaluate, params, params, max_kl=0.1, shrink=x)),
        ("entropy_coefficient", lambda x: update(entropy_coefficient=x)),
        ("entropy_coefficient", lambda x: descent(entropy_coefficient=x)),
        ("damping", lambda x: fisher_vector_product(policy, params, damping=x)(params)),
        ("damping", lambda x: update(solver=Solver(damping=x))),
        ("tolerance", lambda x: conjugate_gradient(lambda v: v, params, tolerance=x)),
        ("tolerance", lambda x: update(solver=Solver(tolerance=x))),
        ("clip_ratio", lambda x: update(clip_ratio=x)),
        ("clip_ratio", lambda x: clipped_objective(x)(old, old, target, target)),
        ("penalty", lambda x: penalized_objective(x)(old, old, target, target)),
        ("max_grad_norm", lambda x: descent(max_grad_norm=x)),
        ("clip", lambda x: fit(clip=x)),
    ]


@pytest.mark.parametrize("name, step", steps_by_number())
def test_what_is_no_number_is_refused(name, step):
    for right in (0.5, 1, np.float64(0.5), np.array(1), jnp.float16(0.5)):
        jax.eval_shape(lambda right=right: step(right))
    jax.eval_shape(step, jnp.float32(0.5))
    for wrong in (None, "1", True, 1j, [0.1], np.ones(1), jnp.ones((1, 1)), np.bool_(True), jax.random.key(0)):
        with pytest.raises(ValueError, match=rf"^{name} must be a number, got "):
            step(wrong)
    with pytest.raises(ValueError, match=rf"^{name} must be a number, got an array of float32, \[4\]"):
        jax.eval_shape(step, jnp.ones(4))


def test_a_list_of_actions_is_an_array_of_them():
    params, observation, action, advantage = problem()
    expected = trpo_update(categorical, params, observation, action, advantage)
    found = trpo_update(categorical, params, observation, action.tolist(), advantage)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_an_index_outside_has_no_probability_in_a_small_type():
    policy = Categorical(jnp.zeros((1, 200)))
    assert np.isnan(policy.log_prob(jnp.array([-1], jnp.int8))).all()
    assert policy.log_prob(jnp.array([199], jnp.uint8)) == policy.log_prob(jnp.array([0]))


@pytest.mark.parametrize(
    "shape, sentence",
    [
        (lambda x: x[:1], r"^advantage must be \[B\] or \[T, N\], with at least 2 at its end, got \(1,\)$"),
        (lambda x: x[:, None], r"^advantage must be \[B\] or \[T, N\], with at least 2 at its end, got \(64, 1\)$"),
        (lambda x: x[:2], r"log_prob\(action\) and advantage differ in shape"),
    ],
)
def test_a_candidate_is_not_estimated_from_other_shapes(shape, sentence):
    params, observation, action, advantage = problem()
    with pytest.raises((ValueError, AssertionError), match=sentence):
        estimate_candidate(categorical, params, params, observation, action, shape(advantage), jax.random.key(0))


def test_a_batch_without_samples_is_refused():
    params, *batch = problem()
    observation, action, advantage = (part[:0] for part in batch)
    with pytest.raises(ValueError, match=r"^the batch of a policy update has no samples$"):
        trpo_update(categorical, params, observation, action, advantage)
    with pytest.raises(ValueError, match=r"^the batch of a value fit has no samples$"):
        gauss_newton_fit(lambda p, o: o @ p["w"][:, 0], params, observation, advantage)


@pytest.mark.parametrize("weight", [jnp.ones(3), 2.0])
def test_weights_of_another_shape_are_refused(weight):
    params, observation, *_ = problem()
    with pytest.raises(ValueError, match=r"^weight must have the shape of the batch, \(64,\), got \("):
        fisher_vector_product(lambda p: categorical(p, observation), params, weight=weight)


@pytest.mark.parametrize("search", [backtracking_line_search, parallel_line_search])
def test_a_step_of_whole_numbers_is_shortened_too(search):
    def evaluate(params):
        return params.sum(), 0.1 * params.sum()

    new, info = search(evaluate, jnp.zeros(2), jnp.ones(2, int), max_kl=0.1)
    assert info.accepted and 0 < info.divergence <= 0.1 and (new > 0).all()


def test_a_line_search_by_name_is_refused():
    message = (
        r"^line_search must be a function, such as backtracking_line_search, parallel_line_search or full_step, "
        r"got 'parallel'$"
    )
    with pytest.raises(ValueError, match=message):
        trpo_update(categorical, *problem(), line_search="parallel")


STEPS = {
    "trpo": functools.partial(trpo_update, categorical),
    "first order": lambda params, *parts: first_order_update(
        categorical, params, optax.sgd(0.1).init(params), *parts, optimizer=optax.sgd(0.1), epochs=2, minibatches=4
    ),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_a_batch_is_its_three_parts_bit_for_bit_within_a_program_and_handed_to_it(step):
    params, *parts = problem()
    results = [
        jax.jit(step)(params, *parts),
        jax.jit(lambda params, *parts: step(params, Batch(*parts)))(params, *parts),
        jax.jit(step)(params, Batch(*parts)),
    ]
    assert results[0][-1].accepted
    for result in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, result, results[0])


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_other_numbers_of_parts_are_refused(step, number):
    params, *parts = problem()
    with pytest.raises(TypeError, match=r"^a step takes one Batch, or an observation, an action and an advantage"):
        step(params, *[*parts, parts[-1]][:number])
    if number == 2:
        with pytest.raises(TypeError, match=r"^a step takes one Batch, or"):
            step(params, Batch(*parts), parts[-1])


def test_curvature_is_estimated_from_whole_sequences_where_one_axis_tells_samples_apart():
    """Of a policy that needs whole sequences, [N, T]: half of 6 sequences is three of them, whole."""
    rng = np.random.default_rng(0)
    observation, advantage = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 5, 3), (6, 5)))
    params, seen = problem()[0], set()

    def remembering(params, observation):
        seen.add(observation.shape)
        return categorical(params, jnp.cumsum(observation, axis=-2))

    batch = Batch(observation, jnp.asarray(rng.integers(0, 4, (6, 5))), advantage, sample_ndim=1)
    options = {"solver": Solver(tolerance=0.0), "max_kl": 0.01}
    _, info = jax.jit(lambda: trpo_update(remembering, params, batch, fisher_fraction=0.5, **options))()
    assert info.accepted and seen == {(6, 5, 3), (3, 5, 3)}


@pytest.mark.parametrize("dtype", [int, bool, jnp.float16], ids=str)
def test_advantages_and_targets_may_be_of_any_dtype(dtype):
    params, observation, action, advantage = problem()
    counts = (10 * jnp.abs(advantage)).astype(dtype)
    update_of = update()
    new, info = update_of(params, observation, action, counts)
    same, _ = update_of(params, observation, action, counts.astype(jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, new, same)
    assert info.accepted and info.surrogate_gain.dtype == jnp.float32
    key = jax.random.key(0)
    estimate = estimate_candidate(categorical, params, new, observation, action, counts, key, resamples=8)
    assert estimate.surrogate_gain > 0

    def value(p, o):
        return o @ p

    fitted, loss = gauss_newton_fit(value, jnp.zeros(3), observation, counts)
    expected, _ = gauss_newton_fit(value, jnp.zeros(3), observation, counts.astype(jnp.float32))
    np.testing.assert_array_equal(fitted, expected)
    assert loss.dtype == jnp.float32


@pytest.mark.parametrize("max_kl", [0.01, 0.003, 0.0301])
def test_in_half_precision_an_accepted_step_is_within_the_radius_that_was_given(max_kl):
    """float16 rounds 0.01 to 0.010002."""
    accepted = []
    for seed in range(8):
        params, observation, action, _ = problem(jnp.float16)
        advantage = jax.random.normal(jax.random.key(seed), (64,))
        new, info = update()(params, observation, action, advantage, max_kl=max_kl)
        assert float(info.divergence) <= max_kl and info.divergence.dtype == jnp.float32
        assert all(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(new))
        accepted.append(bool(info.accepted))
    assert any(accepted)


@pytest.mark.parametrize("bad", [3e38, -3e38, np.inf, np.nan])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_an_update_says_of_itself_is_finite(bad, share):
    params, observation, action, advantage = problem()
    for sign in (1, advantage):
        spoiled = jnp.where(jnp.arange(64) < share * 64, bad * jnp.sign(sign), advantage)
        new, info = update()(params, observation, action, spoiled)
        for path, leaf in jax.tree_util.tree_leaves_with_path(info):
            assert np.isfinite(leaf), path
        if not info.accepted:
            jax.tree.map(np.testing.assert_array_equal, new, params)
        if not np.isfinite(bad):
            assert not info.accepted and info.gradient_norm == jnp.finfo(jnp.float32).max


def test_a_mean_and_a_deviation_of_different_precision_are_one_distribution():
    with jax.enable_x64(True):
        params = {"mean": jnp.zeros((3, 1), jnp.float32), "log_std": jnp.zeros(1, jnp.float64)}
        observation = jnp.asarray(np.random.default_rng(0).normal(size=(32, 3)), jnp.float32)

        def gaussian(params, observation):
            return DiagonalGaussian(observation @ params["mean"], params["log_std"])

        action = gaussian(params, observation).sample(jax.random.key(0))
        new, info = trpo_update(gaussian, params, observation, action, action[:, 0], fisher_fraction=1.0)
        assert info.accepted and info.mean_kl <= 0.01
        assert jax.tree.map(lambda leaf: leaf.dtype, new) == jax.tree.map(lambda leaf: leaf.dtype, params)


def test_the_steps_have_the_defaults_of_config():
    """By what each is called there; what only one of them has is left out."""
    config = Config()
    solver = Solver(config.cg_damping, config.cg_iterations, config.cg_tolerance)
    search = {"shrink": config.line_search_shrink, "max_steps": config.line_search_steps}
    assert Solver() == solver
    for step, expected in {
        trpo_update: {
            "max_kl": config.max_kl,
            "constraint": CONSTRAINTS[config.constraint],
            "fisher_fraction": config.fisher_fraction,
            "solver": solver,
            "entropy_coefficient": config.entropy_coefficient,
            "line_search": backtracking_line_search,  # `auto` on a CPU
        },
        natural_gradient: {"solver": solver},
        backtracking_line_search: search,
        parallel_line_search: search,
        full_step: search,
        gauss_newton_fit: {
            "solver": Solver(config.value_damping, config.value_cg_iterations, config.cg_tolerance),
            "fisher_fraction": config.fisher_fraction,
            "num_steps": config.gauss_newton_steps,
        },
        normalize: {"clip": config.observation_clip},
    }.items():
        parameters = inspect.signature(step).parameters
        for name, value in expected.items():
            assert parameters[name].default == value, (step, name)


def test_what_is_widened_is_arrays_of_half_precision_alone():
    tree = {"half": jnp.float16(1), "single": jnp.float32(2), "count": jnp.int8(3), "number": 4.0, "flag": True}
    wide = trees.widened(tree)
    assert wide["half"].dtype == jnp.float32 and wide["count"].dtype == jnp.int8
    assert wide["single"].dtype == jnp.float32
    assert (wide["number"], wide["flag"]) == (4.0, True)


def test_a_bonus_counts_only_so_much_of_a_deviation():
    log_std = jnp.array([-0.5, 1.0, 5.0])
    wide = DiagonalGaussian(jnp.zeros((2, 3)), log_std, (2.0, 2.0, 2.0))
    free = DiagonalGaussian(jnp.zeros((2, 3)), log_std)
    np.testing.assert_array_equal(wide.entropy(), free.entropy())
    np.testing.assert_allclose(free.bonus(), free.entropy())
    # In full below 0; beyond it ∫ (1 − s/2) ds: up to 1 it is ¾ of the 1, and up to 2 it is 1 of the 5.
    np.testing.assert_allclose(wide.bonus(), free.entropy() - 1 / 4 - 4, rtol=1e-6)
    gradient = jax.grad(lambda d: jnp.sum(d.bonus()))(wide)
    np.testing.assert_allclose(gradient.log_std, [[1, 0.5, 0]] * 2)
    assert jax.tree.structure(wide.fisher_product(wide)) == jax.tree.structure(wide) != jax.tree.structure(free)


@pytest.mark.parametrize("size", [1e38, 2e38, 1e-37, 1.0])
def test_a_direction_of_any_size_is_followed(size):
    """The reciprocal of 1e38 is so small that it counts as 0."""
    gradient = {"w": jnp.zeros((3, 4)), "b": size * jnp.array([1.0, -1.0, 0, 0])}
    for norm_of in (trees.norm, jax.jit(trees.norm)):
        np.testing.assert_allclose(norm_of(gradient), np.sqrt(2) * size, rtol=1e-6)
    params, observation, *_ = problem()
    step, _ = natural_gradient(lambda p: categorical(p, observation), params, gradient, max_kl=0.01)
    unit = {"w": jnp.zeros((3, 4)), "b": jnp.array([1.0, -1.0, 0, 0])}
    expected, _ = natural_gradient(lambda p: categorical(p, observation), params, unit, max_kl=0.01)
    assert trees.max_abs(step) > 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), step, expected)
    x, _ = conjugate_gradient(lambda v: v, jnp.array([size, 0.0]))
    np.testing.assert_allclose(x, [size, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=str)
def test_parameters_of_half_precision_train_beside_settings_of_single(dtype):
    params, observation, action, advantage = problem(dtype)
    batch = Batch(observation, action, advantage)
    update_of = jax.jit(
        lambda max_kl, damping: trpo_update(
            categorical, params, batch, max_kl=max_kl, solver=Solver(damping), fisher_fraction=1.0
        )
    )
    new, info = update_of(jnp.float32(0.01), jnp.float32(0.1))
    assert info.accepted and new["w"].dtype == dtype
    solver = Solver(defaults.VALUE_DAMPING, defaults.VALUE_CG_ITERATIONS)
    fit = jax.jit(
        lambda damping: gauss_newton_fit(
            lambda p, o: o @ p, jnp.zeros(3, dtype), observation, advantage, solver=solver._replace(damping=damping)
        )
    )
    fitted, _ = fit(jnp.float32(0.1))
    assert fitted.dtype == dtype and fitted.any()


def test_a_parameter_without_entries_changes_nothing():
    params, *batch = problem()
    new, info = update()({**params, "empty": jnp.zeros((0, 3))}, *batch)
    assert info.accepted and new["empty"].shape == (0, 3)


def test_a_step_of_zero_is_not_accepted_for_the_rounding_of_its_gain():
    for search in (backtracking_line_search, parallel_line_search, full_step):
        _, info = search(lambda p: (1e-3, 0.0), jnp.ones(2), jnp.zeros(2), max_kl=0.01)
        assert not info.accepted and info.surrogate_gain == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"line_search": functools.partial(backtracking_line_search, max_steps=0)},
            "^max_steps of a line search must be a whole number of at least 1, got 0$",
        ),
        (
            {"line_search": functools.partial(parallel_line_search, max_steps=1.5)},
            "^max_steps of a line search must be a whole number",
        ),
        ({"fisher_fraction": "x"}, r"^fisher_fraction must lie in \(0, 1\], got 'x'$"),
        (
            {"fisher_fraction": jnp.float32(0.5)},
            r"^fisher_fraction must lie in \(0, 1\], got Array\(0.5, dtype=float32\)$",
        ),
        ({"fisher_fraction": None}, r"^fisher_fraction must lie in \(0, 1\], got None$"),
    ],
)
def test_options_of_the_update_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        trpo_update(categorical, *problem(), **options)
