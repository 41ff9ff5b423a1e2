"""Running statistics where rounding matters: constant entries, and long runs of batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trpo_jax.steps.statistics import init_statistics, normalize, update_statistics
from trpo_jax.steps.values import explained_variance

merge = jax.jit(update_statistics)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, -0.7, 123.456, 1e6 + 0.1])
def test_an_entry_that_never_varies_maps_to_zero(constant):
    # The float32 mean of equal numbers is not always that number, so their variance is not always 0.
    for n in (7, 100, 2048):
        statistics = init_statistics((2,))
        for size in (n, n + 3):
            batch = np.stack([np.full(size, constant), np.linspace(-1, 1, size)], axis=-1)
            statistics = merge(statistics, jnp.asarray(batch, jnp.float32))
        z = normalize(statistics, jnp.array([constant, 1.0]))
        assert z[0] == 0
        # A uniform distribution on [−1, 1] has σ = 1/√3; on an even grid of n points it is √((n + 1)/(n − 1)) larger.
        np.testing.assert_allclose(z[1], np.sqrt(3), rtol=2 / n)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, -0.7, 123.456])
def test_constant_targets_leave_no_variance_to_explain(constant):
    for n in (7, 100, 2048):
        targets = jnp.full(n, constant, jnp.float32)
        assert explained_variance(jnp.linspace(0, 1, n), targets) == 0


@pytest.mark.parametrize("mean", [1.0, 100.0])
def test_a_small_variation_about_a_large_mean_is_no_constant(mean):
    batch = jnp.asarray(mean + 1e-3 * np.random.default_rng(0).normal(size=(512, 1)), jnp.float32)
    normal = normalize(merge(init_statistics((1,)), batch), batch)
    np.testing.assert_allclose(np.std(normal), 1, rtol=1e-2)
    assert explained_variance(batch, batch) == 1


def test_the_order_and_the_cut_of_the_batches_do_not_matter():
    data = np.random.default_rng(1).normal(size=(240, 3)) * [1, 10, 0.1] + [0, -5, 3]
    for parts in (1, 2, 24):
        statistics = init_statistics((3,))
        for batch in np.split(data[::-1], parts):
            statistics = merge(statistics, jnp.asarray(batch, jnp.float32))
        assert statistics.count == 240
        np.testing.assert_allclose(statistics.mean, data.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(statistics.variance, data.var(0), rtol=1e-4)


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 1e6 + 0.1])
def test_a_million_equal_numbers_have_no_variance(constant):
    batch = jnp.full((2**20, 1), constant, jnp.float32)
    statistics = merge(merge(init_statistics((1,)), batch), batch[:1000])
    assert statistics.variance == 0 and statistics.mean == batch[0]
    assert explained_variance(jnp.arange(2**20), batch[:, 0]) == 0


@pytest.mark.parametrize("dtype", [int, bool, jnp.float16], ids=str)
def test_statistics_of_every_dtype_are_float32(dtype):
    batch = jnp.arange(300)[:, None].astype(dtype)
    statistics = merge(init_statistics((1,)), batch)
    expected = np.asarray(batch, np.float64)
    np.testing.assert_allclose(statistics.variance, expected.var(0), rtol=1e-5)
    assert statistics.mean.dtype == statistics.variance.dtype == jnp.float32
    assert explained_variance(batch[:, 0], batch[:, 0]) == 1
