"""The default networks: shapes, first policies and the units of Box actions."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trpo_jax import (
    Categorical,
    DiagonalGaussian,
    Environment,
    MultiCategorical,
    Network,
    UsageError,
    make_policy,
    make_value,
)
from trpo_jax.environments.base import Box, Discrete, MultiDiscrete, make_box
from trpo_jax.networks.default import make_value_head
from trpo_jax.networks.layers import convolution, orthogonal, product
from trpo_jax.networks.recurrent import lift, lower


def environment(space, observation_shape=(3,)):
    """Networks look at spaces and shapes only."""
    return Environment("shapes", observation_shape, space, None, reset=None, step=None)


def start(network, observation_shape=(3,), seed=0):
    return network.init(jax.random.key(seed), jnp.zeros(observation_shape))


@pytest.mark.parametrize("batch", [(), (5,), (4, 2), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("observation_shape", [(3,), (), (10, 5), (4, 4, 2)], ids=str)
def test_any_leading_axes_and_grids(observation_shape, batch):
    def outputs(network):
        """Shapes and dtypes by tracing alone."""

        def both(key):
            return network.apply(
                network.init(key, jnp.zeros(observation_shape)), jnp.zeros((*batch, *observation_shape))
            )

        return jax.eval_shape(both, jax.random.key(0))

    discrete = outputs(make_policy(environment(Discrete(4), observation_shape)))
    assert discrete.logits.shape == (*batch, 4) and discrete.logits.dtype == jnp.float32
    several = outputs(make_policy(environment(MultiDiscrete((2, 3)), observation_shape)))
    assert [logits.shape for logits in several.logits] == [(*batch, 2), (*batch, 3)]
    gaussian = outputs(make_policy(environment(make_box(-1, 1, (2,)), observation_shape)))
    assert gaussian.mean.shape == gaussian.log_std.shape == (*batch, 2)
    value = outputs(make_value(environment(Discrete(4), observation_shape)))
    assert value.shape == batch and value.dtype == jnp.float32


def test_a_batch_is_its_elements():
    network = make_value(environment(Discrete(2), (2, 3)))
    params = start(network, (2, 3))
    observation = jax.random.normal(jax.random.key(0), (4, 5, 2, 3))
    each = jax.vmap(jax.vmap(lambda x: network.apply(params, x)))(observation)
    np.testing.assert_allclose(network.apply(params, observation), each, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("space", [Discrete(4), MultiDiscrete((4, 4))], ids=str)
def test_the_first_policy_is_nearly_uniform(space):
    policy = make_policy(environment(space))
    observation = 3 * jax.random.normal(jax.random.key(1), (200, 3))
    distribution = policy.apply(start(policy), observation)
    assert isinstance(distribution, Categorical if isinstance(space, Discrete) else MultiCategorical)
    logits = distribution.logits if isinstance(space, Discrete) else distribution.logits[1]
    assert np.abs(jax.nn.softmax(logits) - 0.25).max() < 0.02
    assert np.std(logits) > 0  # yet not blind to the observation


@pytest.mark.parametrize("low, high", [(-2.0, 2.0), (-0.1, 0.1), (0.0, 10.0)])
def test_the_first_gaussian_spans_half_the_box_from_its_centre(low, high):
    half, centre = (high - low) / 2, (high + low) / 2
    policy = make_policy(environment(make_box(low, high, (3,))))
    distribution = policy.apply(start(policy), jax.random.normal(jax.random.key(1), (50, 3)))
    assert isinstance(distribution, DiagonalGaussian)
    np.testing.assert_allclose(jnp.exp(distribution.log_std), half, rtol=1e-5)
    np.testing.assert_allclose(distribution.mean, centre, atol=0.05 * half)
    half_as_wide = make_policy(environment(make_box(low, high, (3,))), initial_log_std=float(np.log(0.5)))
    narrow = half_as_wide.apply(start(half_as_wide), jnp.zeros(3))
    np.testing.assert_allclose(jnp.exp(narrow.log_std), half / 2, rtol=1e-5)


def test_each_dimension_has_its_own_unit():
    box = make_box(np.array([-1.0, 0.0]), np.array([1.0, 100.0]), (2,))
    policy = make_policy(environment(box))
    distribution = policy.apply(start(policy), jnp.zeros(3))
    np.testing.assert_allclose(jnp.exp(distribution.log_std), [1, 50], rtol=1e-5)
    np.testing.assert_allclose(distribution.mean, [0, 50], atol=1e-5)


@pytest.mark.parametrize("low, high", [(-np.inf, np.inf), (-3.4e38, 3.4e38), (1.0, 1.0)], ids=["inf", "max", "empty"])
def test_bounds_that_say_nothing_mean_unit_scale(low, high):
    policy = make_policy(environment(Box(np.full(2, low, np.float32), np.full(2, high, np.float32))))
    distribution = policy.apply(start(policy), jnp.zeros(3))
    np.testing.assert_allclose(jnp.exp(distribution.log_std), 1, rtol=1e-6)
    np.testing.assert_allclose(distribution.mean, 0, atol=1e-6)


@pytest.mark.parametrize("low, high", [(5, np.inf), (0, np.inf), (-np.inf, 5), (1e5, 3.4e38), (-1e5, np.inf)])
def test_the_first_policy_acts_within_one_bound(low, high):
    policy = make_policy(environment(make_box(low, high, (2,))))
    distribution = policy.apply(start(policy), jnp.zeros(3))
    assert ((distribution.mean > low) & (distribution.mean < high)).all()
    bound = low if abs(low) < 1e12 else high
    # One σ from the bound: five in six actions are not clipped.
    np.testing.assert_allclose(np.abs(distribution.mean - bound), jnp.exp(distribution.log_std), rtol=0.05)


@pytest.mark.parametrize("low, high", [(0.0, 5e6), (-1e9, 1e9), (0.0, 2**32)])
def test_large_bounds_are_a_unit_like_any_other(low, high):
    policy = make_policy(environment(make_box(low, high, (1,))))
    distribution = policy.apply(start(policy), jnp.zeros(3))
    half = (high - low) / 2
    np.testing.assert_allclose(jnp.exp(distribution.log_std), half, rtol=1e-4)
    np.testing.assert_allclose(distribution.mean, low + half, atol=0.05 * half)
    scaled = distribution.fisher_product(distribution)
    assert np.isfinite(scaled.mean).all() and (np.abs(scaled.mean) > 0).all() == (low + half > 0)


def test_the_deviation_does_not_depend_on_the_observation():
    policy = make_policy(environment(make_box(-1, 1, (2,))))
    params = start(policy)
    assert params["log_std"].shape == (2,) and params["log_std"].dtype == jnp.float32
    distribution = policy.apply(params, jax.random.normal(jax.random.key(0), (6, 3)))
    np.testing.assert_array_equal(distribution.log_std, jnp.broadcast_to(distribution.log_std[0], (6, 2)))


@pytest.mark.parametrize("make, scale", [(make_policy, 0.01), (make_value, 1.0)], ids=["policy", "value"])
def test_layers_start_orthogonal_with_their_scales(make, scale):
    network = make(environment(Discrete(4)), hidden=(16, 8))
    kernels = [leaf for leaf in jax.tree.leaves(start(network)) if leaf.ndim == 2]
    biases = [leaf for leaf in jax.tree.leaves(start(network)) if leaf.ndim == 1]
    assert sorted(kernel.shape for kernel in kernels) == sorted(
        [(3, 16), (16, 8), (8, 4 if make is make_policy else 1)]
    )
    for kernel in kernels:
        gain = np.sqrt(2) if kernel.shape[1] in (16, 8) else scale
        np.testing.assert_allclose(np.linalg.svd(kernel, compute_uv=False), gain, rtol=1e-4)
    assert all((bias == 0).all() for bias in biases)


def shapes(network, observation_shape=(3,)):
    """Of the kernels, by tracing alone."""
    params = jax.eval_shape(lambda: start(network, observation_shape))
    return sorted(leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 1)


def test_each_network_has_the_layers_asked_for():
    grid, flat = environment(Discrete(4), (10, 8, 3)), environment(Discrete(4))
    mlp = make_policy(flat, hidden=(16, 8))
    assert shapes(mlp) == sorted([(3, 16), (16, 8), (8, 4)])
    assert shapes(make_policy(flat, hidden=())) == [(3, 4)]  # linear
    cnn = make_policy(grid, channels=(5, 6), hidden=[7, 9])
    assert shapes(cnn, (10, 8, 3)) == sorted([(3, 3, 3, 5), (3, 3, 5, 6), (10 * 8 * 6, 7), (7, 9), (9, 4)])
    gru = make_policy(flat, network="gru", hidden=(5, 6))
    assert gru.initial_carry().shape == (6,)
    assert shapes(gru) == sorted([(3, 5), (5, 6), *6 * [(6, 6)], (6, 4)])
    assert shapes(make_value_head((5,))) == [(3, 5), (5, 1)]


@pytest.mark.parametrize("network, shape", [("mlp", (3,)), ("gru", (3,)), ("cnn", (4, 4, 2))])
def test_auto_is_the_network_that_it_stands_for(network, shape):
    space = environment(Discrete(2), shape)
    hidden = {"mlp": (64, 64), "gru": (64,), "cnn": (128,)}[network]
    activation = "relu" if network == "cnn" else "tanh"
    auto = make_value(space, network=network)
    named = make_value(space, network=network, hidden=hidden, channels=(16,), activation=activation)
    params, observation = start(auto, shape), jax.random.normal(jax.random.key(1), (1, *shape))
    carry = () if auto.initial_carry is None else (auto.initial_carry()[None],)
    jax.tree.map(np.testing.assert_array_equal, params, start(named, shape))
    outputs = [jax.tree.leaves(net.apply(params, *carry, observation))[-1] for net in (auto, named)]
    np.testing.assert_array_equal(*outputs)


FUNCTIONS = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2,
}


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_layer_is_its_formula(name, layer_norm):
    """V = b' + w'·f(n(W x + b)), with n the normalisation to mean 0 and variance 1 over the units."""
    network = make_value(environment(Discrete(2)), hidden=(6,), activation=name, layer_norm=layer_norm)
    observation = np.asarray(jax.random.normal(jax.random.key(1), (5, 3)))
    layers = jax.tree.map(np.asarray, start(network))["params"]
    x = observation @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"]
    if layer_norm:
        x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
        assert layers["LayerNorm_0"]["scale"].shape == (6,)
    expected = FUNCTIONS[name](x) @ layers["Dense_1"]["kernel"][:, 0] + layers["Dense_1"]["bias"]
    np.testing.assert_allclose(network.apply(start(network), observation), expected, atol=2e-3)  # gelu by tanh


@pytest.mark.parametrize("network, shape", [("mlp", (300,)), ("gru", (300,)), ("cnn", (10, 10, 3))])
def test_lecun_normal_has_variance_one_by_inputs(network, shape):
    policy = make_policy(environment(Discrete(100), shape), network=network, initialisation="lecun-normal")
    layers = start(policy, shape)["params"]
    for name, scale in (("Dense_0", 1.0), (sorted(layers, key=lambda n: (n[:5] == "Dense", n))[-1], 0.01)):
        kernel = layers[name]["kernel"]
        inputs = np.prod(kernel.shape[:-1])
        np.testing.assert_allclose(np.std(kernel) * np.sqrt(inputs), scale, rtol=0.05)


def test_arguments_of_the_default_networks_are_checked():
    with pytest.raises(UsageError, match=r"^activation must be one of auto, tanh"):
        make_policy(environment(Discrete(2)), activation="elu")
    with pytest.raises(UsageError, match=r"^hidden must be widths of layers"):
        make_value(environment(Discrete(2)), hidden=(0,))


def test_policy_and_value_share_nothing_and_seeds_differ():
    policy, value = make_policy(environment(Discrete(2))), make_value(environment(Discrete(2)))
    one, two = jax.tree.leaves(start(policy, seed=0)), jax.tree.leaves(start(policy, seed=1))
    assert any((a != b).any() for a, b in zip(one, two, strict=True))
    assert jax.tree.structure(start(policy)) == jax.tree.structure(start(value))


def test_parameters_are_strong_float32():
    for space in (Discrete(2), make_box(-1, 1, (2,))):
        policy = make_policy(environment(space), initial_log_std=0)
        for leaf in jax.tree.leaves(jax.eval_shape(policy.init, jax.random.key(0), jnp.zeros(3))):
            assert leaf.dtype == jnp.float32 and not leaf.weak_type


class Branching(nn.Module):
    """A user's module."""

    @nn.compact
    def __call__(self, observation):
        x = nn.relu(nn.Dense(8)(observation))
        return Categorical(nn.Dense(2)(x))


def test_a_linen_module_is_a_network():
    module = Branching()
    network = Network(module.init, module.apply)
    params = network.init(jax.random.key(0), jnp.zeros(3))
    assert network.apply(params, jnp.zeros((7, 3))).logits.shape == (7, 2)
    assert hash(network) == hash(Network(module.init, module.apply))  # it can be a static setting


@pytest.mark.parametrize("shape", [(4, 64), (64, 64), (64, 1), (3600, 64), (1, 1), (256, 256)])
def test_orthogonal_initialisation(shape):
    matrices = jax.jit(jax.vmap(lambda key: orthogonal(2.0)(key, shape)))(jax.random.split(jax.random.key(0), 2))
    for matrix in np.asarray(matrices, np.float64):
        small = matrix.T @ matrix if shape[0] >= shape[1] else matrix @ matrix.T
        np.testing.assert_allclose(small, 4 * np.eye(min(shape)), atol=1e-4)
    assert not np.allclose(*matrices)


@pytest.mark.parametrize("columns", [1, 2, 4, 5])
def test_products_by_columns_are_the_product(columns):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (6, 7, 3)), jax.random.normal(keys[1], (3, columns))
    cotangent = jax.random.normal(keys[2], (6, 7, columns))
    axes = (((2,), (0,)), ((), ()))
    outputs, pull_back = jax.vjp(lambda x, kernel: product(x, kernel, axes, precision=None), x, kernel)
    expected, expected_pull_back = jax.vjp(jnp.matmul, x, kernel)
    for a, b in zip((outputs, *pull_back(cotangent)), (expected, *expected_pull_back(cotangent)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples, longest", [((128, 64), 512), ((9830,), 9830), ((4096,), 4096)], ids=str)
def test_no_gradient_of_a_large_batch_on_a_gpu_is_one_sum_over_it(samples, longest, monkeypatch):
    monkeypatch.setattr("trpo_jax.backend.platform", lambda: "gpu")
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernels = jax.random.normal(keys[0], (2, *samples, 3)), jax.random.normal(keys[1], (2, 3, 5))

    def gradients(multiply):
        """Of two agents side by side: of their inputs and kernels."""

        def loss(x, kernels):
            outputs = jax.vmap(multiply)(x, kernels)
            return jnp.mean(jnp.sin(outputs)), outputs

        return jax.value_and_grad(loss, (0, 1), has_aux=True)

    axes = (((len(samples),), (0,)), ((), ()))
    ours = gradients(lambda x, kernel: product(x, kernel, axes, precision=None))
    for a, b in zip(jax.tree.leaves(ours(x, kernels)), jax.tree.leaves(gradients(jnp.matmul)(x, kernels)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    sums = [
        math.prod(equation.invars[0].aval.shape[axis] for axis in equation.params["dimension_numbers"][0][0])
        for equation in jax.make_jaxpr(ours)(x, kernels).eqns
        if equation.primitive.name == "dot_general"
    ]
    assert max(sums) == longest


@pytest.mark.long
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("width", [5, 8])  # an odd and an even number of outputs in a row
@pytest.mark.parametrize(
    "samples, kernel, strides",
    [
        (7, (3, 3), (1, 1)),
        (40, (3, 3), (1, 1)),
        (7, (4, 2), (1, 1)),
        (7, (3, 3), (2, 1)),
        (7, (5, 5), (2, 2)),
        (3, (4, 7), (3, 2)),
    ],
)
def test_convolutions_by_patches_are_the_convolution(samples, kernel, strides, width, backend, monkeypatch):
    monkeypatch.setattr("trpo_jax.backend.platform", lambda: backend)
    shapes = (2, samples, 6, width, 3), (2, *kernel, 3, 4)
    grids, kernels = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": jax.lax.Precision.HIGHEST}

    def each(convolve):
        """Of two agents side by side, with the gradients of kernels and grids."""

        def loss(kernels, grids):
            outputs = jax.vmap(lambda k, x: convolve(x, k, strides, "SAME", **numbers))(kernels, grids)
            return jnp.sum(jnp.sin(outputs)), outputs

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(kernels, grids)

    for ours, theirs in zip(
        *(jax.tree.leaves(each(f)) for f in (convolution, jax.lax.conv_general_dilated)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("side", [4, 10])
def test_no_convolution_of_a_small_kernel_is_left_to_xla(side, backend, monkeypatch):
    monkeypatch.setattr("trpo_jax.backend.platform", lambda: backend)
    network = make_policy(environment(Discrete(3), (side, side, 4)))

    def loss(params, observation):
        return jnp.sum(network.apply(params, observation).logits)

    params = jax.eval_shape(
        jax.vmap(lambda key: network.init(key, jnp.zeros((side, side, 4)))), jax.random.split(jax.random.key(0), 2)
    )
    program = jax.make_jaxpr(jax.vmap(jax.grad(loss)))(params, jnp.zeros((2, 5, side, side, 4)))
    assert "conv_general_dilated" not in str(program)


def test_the_matmul_precision_asked_for_reaches_the_last_layer():
    policy = make_policy(environment(Discrete(2)))
    params = jax.eval_shape(policy.init, jax.random.key(0), jnp.zeros(3))
    with jax.default_matmul_precision("highest"):
        text = str(jax.make_jaxpr(policy.apply)(params, jax.ShapeDtypeStruct((5, 3), jnp.float32)))
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") >= 3


# --- the one form in which the trainer uses every network


def masked(observation):
    """Allowed are action 0, and action 1 where the first number is positive."""
    return jnp.stack(
        [observation[..., 0] > -jnp.inf, observation[..., 0] > 0, jnp.zeros_like(observation[..., 0], bool)], -1
    )


def user_module(remembers=False):
    """A network as users give it: two functions, or, with a memory, three."""
    module = Branching()
    if not remembers:
        return Network(module.init, module.apply)

    def apply(params, carry, observation):
        carry = {"sum": carry["sum"] + observation}
        return carry, module.apply(params, carry["sum"])

    return Network(module.init, apply, lambda: {"sum": jnp.zeros(3)})


FORMS = {
    "mlp": lambda: make_policy(environment(Discrete(3))),
    "masked": lambda: make_policy(dataclasses.replace(environment(Discrete(3)), action_mask=masked)),
    "gaussian": lambda: make_policy(environment(make_box(-1, 3, (2,)))),
    "gaussian, σ of the state": lambda: make_policy(environment(make_box(-1, 3, (2,))), state_dependent_std=True),
    "gru": lambda: make_policy(environment(Discrete(3)), network="gru"),
    "gru, gaussian": lambda: make_policy(environment(make_box(-1, 3, (2,))), network="gru"),
    "value": lambda: make_value(environment(Discrete(3))),
    "a user's": user_module,
    "a user's, with a memory": lambda: user_module(remembers=True),
}


def twice_shifted(observation):
    return 2 * observation - 0.5


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", FORMS)
def test_a_network_lowered_and_lifted_is_itself(name):
    """Outputs, carries and features, plain and of changed observations, bit for bit."""
    network = lift(FORMS[name]())
    again = lift(lower(network))
    assert again.is_recurrent == network.is_recurrent == ("memory" in name or "gru" in name)
    params = start(network)
    assert_equal(start(again), params)
    assert_equal(again.initial_carry(), network.initial_carry())
    observation = jax.random.normal(jax.random.key(1), (5, 3))
    carry = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf + 0.3, (5, *leaf.shape)), network.initial_carry())
    found = []
    for form in (network, again):
        functions = [form.step, form.with_inputs(twice_shifted).step]
        if form.features is not None:
            functions += [form.features, form.with_inputs(twice_shifted).features]
        found.append([function(params, carry, observation) for function in functions])
    assert_equal(*found)
    plain, changed, *_ = found[0]
    leaves = [jax.tree.leaves(outputs)[0] for _, outputs in (plain, changed)]
    assert (leaves[0] != leaves[1]).any()


@pytest.mark.parametrize("name", FORMS)
def test_a_changed_observation_is_what_the_learned_part_sees(name):
    """Given f(x), a network answers what the one on f(x) answers for x; a mask is asked about x itself."""
    network, observation = lift(FORMS[name]()), jax.random.normal(jax.random.key(1), (50, 3))
    params, carry = start(network), network.initial_carry()
    carry = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (50, *leaf.shape)), carry)
    changed = network.with_inputs(twice_shifted)
    assert (network.features is None) == (changed.features is None) == ("user" in name)
    if network.features is not None:
        expected = network.features(params, carry, twice_shifted(observation))
        assert_equal(changed.features(params, carry, observation), expected)
    _, seen = changed.step(params, carry, observation)
    _, expected = network.step(params, carry, twice_shifted(observation))
    if name == "masked":
        allowed = masked(observation)
        assert (allowed != masked(twice_shifted(observation))).any()
        np.testing.assert_array_equal(jax.nn.softmax(seen.logits) > 0, allowed)
        _, unmasked = lift(FORMS["mlp"]()).step(params, carry, twice_shifted(observation))
        seen, expected = (jnp.where(allowed, outputs.logits, 0) for outputs in (seen, unmasked))
    assert_equal(seen, expected)
