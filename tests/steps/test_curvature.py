"""The implicit Fisher product is the dense JᵀMJ, and the Hessian of the mean KL in both directions at θ_old."""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from trpo_jax import (
    Categorical,
    DiagonalGaussian,
    Environment,
    MultiCategorical,
    fisher_vector_product,
    make_policy,
    mean_kl,
    trpo_update,
)
from trpo_jax.environments.base import Discrete, MultiDiscrete, make_box

BATCHES = [(7,), (3, 4)]


def categorical(params, observation):
    return Categorical(jnp.tanh(observation @ params["w"]) @ params["v"])


def gaussian(params, observation):
    return DiagonalGaussian(jnp.tanh(observation @ params["w"]) @ params["v"], params["log_std"])


def multi_categorical(params, observation):
    features = jnp.tanh(observation @ params["w"])
    return MultiCategorical((features @ params["v"], features @ params["v"][:, :2] ** 2))


POLICIES = [categorical, gaussian, multi_categorical]


def problem(policy, batch):
    """distribution_fn over a flat parameter vector, and the vector; double precision."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": jax.random.normal(keys[0], (2, 4)), "v": jax.random.normal(keys[1], (4, 3))}
    if policy is gaussian:
        params["log_std"] = jax.random.normal(keys[2], (3,)) / 2
    observation = jax.random.normal(keys[3], (*batch, 2))
    vector, unravel = jax.flatten_util.ravel_pytree(params)
    return (lambda v: policy(unravel(v), observation)), vector, unravel


def dense(matvec, vector):
    return jax.vmap(matvec)(jnp.eye(vector.size)).T


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("policy", POLICIES)
def test_product_is_the_hessian_of_the_kl(policy, batch, x64):
    distribution_fn, theta, _ = problem(policy, batch)

    @jax.jit
    def compute(theta):
        old = jax.lax.stop_gradient(distribution_fn(theta))
        fisher = dense(fisher_vector_product(distribution_fn, theta), theta)
        forward = jax.hessian(lambda v: mean_kl(old, distribution_fn(v)))(theta)
        backward = jax.hessian(lambda v: mean_kl(distribution_fn(v), old))(theta)
        return fisher, forward, backward, jax.grad(lambda v: mean_kl(old, distribution_fn(v)))(theta)

    fisher, forward, backward, gradient = map(np.asarray, compute(theta))
    np.testing.assert_allclose(fisher, forward, atol=1e-10 * np.abs(forward).max())
    np.testing.assert_allclose(fisher, backward, atol=1e-10 * np.abs(forward).max())
    np.testing.assert_allclose(fisher, fisher.T, atol=1e-14)
    assert np.linalg.eigvalsh(fisher).min() > -1e-13
    np.testing.assert_allclose(gradient, 0, atol=1e-14)


@pytest.mark.parametrize("policy", [categorical, gaussian])
def test_product_is_dense_jacobian_metric_jacobian(policy, x64):
    distribution_fn, theta, _ = problem(policy, (7,))
    jacobian = jax.jacobian(distribution_fn)(theta)
    distribution = distribution_fn(theta)
    if policy is categorical:
        probs = jax.nn.softmax(distribution.logits)
        metric = jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(probs)
        expected = jnp.einsum("nip,nij,njq->pq", jacobian.logits, metric, jacobian.logits) / 7
    else:
        precision = jnp.exp(-2 * distribution.log_std)
        expected = jnp.einsum("nip,ni,niq->pq", jacobian.mean, precision, jacobian.mean) / 7
        expected += 2 * jnp.einsum("nip,niq->pq", jacobian.log_std, jacobian.log_std) / 7
    actual = dense(fisher_vector_product(distribution_fn, theta), theta)
    np.testing.assert_allclose(actual, expected, atol=1e-12 * jnp.abs(expected).max())


def test_log_std_block_is_two(x64):
    distribution_fn, theta, unravel = problem(gaussian, (7,))
    direction = jax.tree.map(jnp.zeros_like, unravel(theta)) | {"log_std": jnp.array([1.0, -2.0, 3.0])}
    product = fisher_vector_product(lambda p: distribution_fn(jax.flatten_util.ravel_pytree(p)[0]), unravel(theta))(
        direction
    )
    np.testing.assert_allclose(product["log_std"], 2 * direction["log_std"], rtol=1e-12)


def test_damping_adds_a_multiple_of_the_identity():
    distribution_fn, theta, _ = problem(categorical, (7,))
    v = jnp.arange(theta.size, dtype=theta.dtype)
    plain = fisher_vector_product(distribution_fn, theta)(v)
    damped = jax.jit(lambda d: fisher_vector_product(distribution_fn, theta, damping=d)(v))(0.3)
    np.testing.assert_allclose(damped, plain + 0.3 * v, rtol=1e-5)


def test_pytrees_equal_flat_vectors():
    distribution_fn, theta, unravel = problem(gaussian, (7,))
    v = jax.random.normal(jax.random.key(5), theta.shape)
    flat = fisher_vector_product(distribution_fn, theta)(v)
    tree = fisher_vector_product(lambda p: distribution_fn(jax.flatten_util.ravel_pytree(p)[0]), unravel(theta))(
        unravel(v)
    )
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(tree)[0], flat, rtol=1e-5, atol=1e-6)


def test_weights_select_samples():
    # Weight B/n on n samples and 0 elsewhere is the Fisher matrix of those n samples.
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (2, 4)), "v": jax.random.normal(keys[1], (4, 3))}
    observation = jax.random.normal(keys[2], (10, 2))
    chosen = jnp.array([1, 4, 8])
    weight = jnp.zeros(10).at[chosen].set(10 / 3)
    some = fisher_vector_product(lambda p: categorical(p, observation[chosen]), params)(params)
    weighted = fisher_vector_product(lambda p: categorical(p, observation), params, weight=weight)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), weighted, some)


def test_products_ask_for_full_precision():
    distribution_fn, theta, _ = problem(categorical, (7,))
    text = str(jax.make_jaxpr(lambda v: fisher_vector_product(distribution_fn, theta)(v))(theta))
    products = text.count("dot_general[")
    assert products > 4 and text.count("HIGHEST") >= products


SPACES = {"discrete": Discrete(3), "multi-discrete": MultiDiscrete((3, 2)), "box": make_box(-1, 2, (2,))}


@pytest.mark.parametrize(
    "network, shape, space, options",
    [
        ("cnn", (4, 5, 2), "discrete", {}),
        ("cnn", (4, 5, 2), "box", {}),
        ("cnn", (21, 12, 1), "multi-discrete", {}),
        ("mlp", (3,), "multi-discrete", {}),
        ("mlp", (3,), "box", {"state_dependent_std": True}),
        ("cnn", (4, 5, 2), "box", {"state_dependent_std": True}),
    ],
)
def test_product_is_the_hessian_of_the_kl_of_every_default_policy(network, shape, space, options, x64):
    """Of KL in both directions, by differentiating it twice; networks of thousands of parameters, direction by
    direction."""
    environment = Environment("shapes", shape, SPACES[space], None, reset=None, step=None)
    policy = make_policy(environment, network=network, hidden=(5, 4), **options)
    keys = jax.random.split(jax.random.key(0), 3)
    observation = jax.random.normal(keys[0], (6, *shape))
    params = policy.init(keys[1], observation[0])
    theta, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(float), params))
    theta += 0.05 * jax.random.normal(keys[2], theta.shape)

    def distribution_fn(theta):
        return policy.apply(unravel(theta), observation)

    @jax.jit
    def products(direction):
        old = jax.lax.stop_gradient(distribution_fn(theta))
        forward = jax.grad(lambda v: mean_kl(old, distribution_fn(v)))
        backward = jax.grad(lambda v: mean_kl(distribution_fn(v), old))
        fisher = fisher_vector_product(distribution_fn, theta)(direction)
        return fisher, *(jax.jvp(g, (theta,), (direction,))[1] for g in (forward, backward))

    for seed in range(2):
        fisher, forward, backward = products(jax.random.normal(jax.random.key(seed), theta.shape))
        scale = np.abs(forward).max()
        assert scale > 1e-4
        np.testing.assert_allclose(fisher, forward, atol=1e-10 * scale)
        np.testing.assert_allclose(fisher, backward, atol=1e-10 * scale)


def test_a_large_batch_in_half_precision_has_a_curvature():
    """65,520 is infinite in float16."""
    size = 66_000
    observation = jax.random.normal(jax.random.key(0), (size, 3))
    product = {}
    for dtype in (jnp.float16, jnp.float32):
        inputs = observation.astype(dtype)
        matvec = fisher_vector_product(lambda w, o=inputs: Categorical(o @ w), jnp.zeros((3, 4), dtype))
        product[dtype] = np.asarray(matvec(jnp.eye(3, 4, dtype=dtype)), np.float32)
    np.testing.assert_allclose(product[jnp.float16], product[jnp.float32], atol=0.02)
    assert np.abs(product[jnp.float16]).max() > 0.1


def test_weights_may_be_wider_than_the_parameters(x64):
    observation = jax.random.normal(jax.random.key(0), (8, 3), jnp.float32)
    policy = lambda w: Categorical(observation @ w)  # noqa: E731
    vector = jnp.ones((3, 2), jnp.float32).at[0, 0].set(3)
    products = [
        fisher_vector_product(policy, 0 * vector, weight=w)(vector) for w in (np.ones(8), np.ones(8, int), None)
    ]
    assert all(product.dtype == jnp.float32 for product in products)
    for product in products[:2]:
        np.testing.assert_allclose(product, products[2], rtol=1e-6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedStd:
    """A Gaussian of a user whose log σ has no axis for the batch."""

    mean: jax.Array
    log_std: jax.Array

    def entropy(self):
        return DiagonalGaussian(self.mean, self.log_std).entropy()

    def log_prob(self, action):
        return DiagonalGaussian(self.mean, self.log_std).log_prob(action)


@pytest.mark.parametrize("size", [4, 2**15])
def test_a_parameter_that_samples_share_must_be_broadcast(size):
    """Its share of the Fisher matrix would otherwise be that of one sample."""
    observation, params = jnp.ones((size, 2)), {"w": jnp.ones((2, 2)), "log_std": jnp.zeros(2)}

    def policy(params, observation):
        return SharedStd(observation @ params["w"], params["log_std"])

    message = r"begin with the shape of the batch, \(\d+,\), but \.log_std has the shape \(2,\); broadcast"
    with pytest.raises(ValueError, match=message):
        fisher_vector_product(lambda params: policy(params, observation), params)
    with pytest.raises(ValueError, match=message):
        trpo_update(policy, params, observation, observation, observation[:, 0])
