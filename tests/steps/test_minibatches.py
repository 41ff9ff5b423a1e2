"""Minibatches: every epoch is a partition of the batch, shuffled anew; a clipped gradient has the norm asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trpo_jax import Categorical, fit_value_function
from trpo_jax.steps.first_order import first_order_update
from trpo_jax.steps.minibatches import clip_norm, minibatch_descent, shuffled

EPOCHS, MINIBATCHES, SIZE = 3, 4, 24


def recorder(steps, size):
    """An optimizer that moves nothing and writes the gradient of every step into its state, [steps, size]."""

    def update(gradient, state, params=None):
        count, seen = state
        return jnp.zeros_like(gradient), (count + 1, seen.at[count].set(gradient))

    return optax.GradientTransformation(lambda params: (jnp.int32(0), jnp.zeros((steps, size))), update)


@functools.cache
def members(minibatches=MINIBATCHES):
    """Compiled: key -> which samples each step of each epoch learns from, bool [epochs, minibatches, size].

    The loss is the mean of the parameters that bear the samples' numbers, so its gradient is 1/b at each of them.
    """
    optimizer = recorder(EPOCHS * minibatches, SIZE)

    def run(key):
        start, number = jnp.zeros(SIZE), jnp.arange(SIZE).reshape(4, 6)
        _, (_, seen), _ = minibatch_descent(
            lambda params, number: jnp.mean(params[number]),
            start,
            optimizer.init(start),
            (number,),
            (4, 6),
            optimizer=optimizer,
            epochs=EPOCHS,
            minibatches=minibatches,
            key=key,
        )
        return seen.reshape(EPOCHS, minibatches, SIZE) * (SIZE // minibatches)

    return jax.jit(run)


def test_every_epoch_is_a_partition_of_the_batch_into_equal_parts_shuffled_anew():
    seen = np.asarray(members()(jax.random.key(0)))
    assert set(np.unique(seen)) == {0, 1}
    np.testing.assert_array_equal(seen.sum(axis=1), 1)  # each sample once an epoch
    np.testing.assert_array_equal(seen.sum(axis=2), SIZE // MINIBATCHES)
    strided = np.asarray(members()(None))
    for epoch in strided:
        np.testing.assert_array_equal(epoch, np.arange(SIZE) % MINIBATCHES == np.arange(MINIBATCHES)[:, None])
    orders = [*seen, *members()(jax.random.key(1)), strided[0]]
    assert len({order.tobytes() for order in orders}) == 2 * EPOCHS + 1


def test_the_shuffle_follows_from_the_key_alone_and_many_are_each_a_run_of_their_own():
    keys = jax.random.split(jax.random.key(2), 3)
    together = jax.jit(jax.vmap(members()))(keys)
    for key, seen in zip(keys, together, strict=True):
        np.testing.assert_array_equal(seen, members()(key))


def test_one_minibatch_is_not_shuffled():
    """Its mean would be the same but for the rounding."""
    assert "random_bits" not in str(jax.make_jaxpr(members(1))(jax.random.key(0)))
    assert "random_bits" in str(jax.make_jaxpr(members())(jax.random.key(0)))


@pytest.mark.parametrize("size", [1, 7, 8, 1000])
def test_shuffled_is_a_permutation(size):
    np.testing.assert_array_equal(np.sort(shuffled(jax.random.key(0), size)), np.arange(size))


def test_every_sample_is_as_likely_at_every_place():
    orders = jax.jit(jax.vmap(lambda key: shuffled(key, 6)))(jax.random.split(jax.random.key(0), 6000))
    counts = np.stack([np.bincount(column, minlength=6) for column in np.asarray(orders).T])
    np.testing.assert_allclose(counts, 1000, atol=5 * np.sqrt(1000 * 5 / 6))
    assert len(np.unique(np.asarray(orders), axis=0)) == 720  # 6!


def test_whole_sequences_are_shuffled():
    """Where one leading axis tells samples apart, what belongs to a sample stays together, in its order."""
    observation = jnp.arange(8.0)[:, None] * 10 + jnp.arange(3)  # [N, T]
    seen = []

    def value_apply(params, observation):
        jax.debug.callback(lambda o: seen.append(np.asarray(o)), observation, ordered=True)
        return params * observation

    optimizer = optax.sgd(0.0)
    result = fit_value_function(
        value_apply,
        jnp.float32(0),
        optimizer.init(jnp.float32(0)),
        observation,
        jnp.zeros((8, 3)),
        optimizer=optimizer,
        epochs=1,
        minibatches=4,
        key=jax.random.key(0),
        sample_ndim=1,
    )
    jax.block_until_ready(result)
    jax.effects_barrier()
    assert len(seen) == 4
    rows = np.concatenate(seen)
    np.testing.assert_array_equal(rows[np.argsort(rows[:, 0])], observation)
    assert (np.diff(rows[:, 0]) < 0).any()


def test_the_loss_is_the_mean_over_the_minibatches_of_the_last_epoch():
    """Steps of 1 by a loss that is its parameter plus the sample: epochs start at 0 and at −4."""

    def loss_fn(params, sample):
        return params + jnp.mean(sample)

    start, optimizer = jnp.float32(0), optax.sgd(1.0)
    found = minibatch_descent(
        loss_fn, start, optimizer.init(start), (jnp.arange(4.0),), (4,), optimizer=optimizer, epochs=2, minibatches=4
    )
    np.testing.assert_allclose(found[2], np.mean(-4 - np.arange(4) + np.arange(4)))
    np.testing.assert_allclose(found[0], -8)


# --- Clipping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e30])
def test_a_longer_gradient_is_scaled_to_the_norm_exactly_and_a_shorter_one_is_left_alone(scale):
    gradient = {"a": scale * jnp.array([0.6, -0.8]), "b": scale * jnp.zeros(3)}  # of norm `scale`
    clip = jax.jit(clip_norm)
    clipped = clip(gradient, 0.5)
    expected = gradient["a"] if scale < 0.5 else jnp.array([0.3, -0.4])
    np.testing.assert_allclose(clipped["a"], expected, rtol=1e-6)
    np.testing.assert_array_equal(clipped["b"], 0)
    for never in (0.0, jnp.inf):
        jax.tree.map(np.testing.assert_array_equal, clip(gradient, never), gradient)


def test_the_update_steps_by_the_clipped_gradient(x64):
    """One state, two logits: the gradient is known, and a plain step of length c follows it."""
    observation, action = jnp.zeros((4, 1)), jnp.array([0, 1, 0, 1])
    advantage = jnp.array([8.0, 0.0, 8.0, 0.0])

    def policy(params, observation):
        return Categorical(jnp.broadcast_to(params, (*observation.shape[:1], 2)))

    def step(max_grad_norm):
        start = jnp.zeros(2)
        optimizer = optax.sgd(1.0)
        return first_order_update(
            policy,
            start,
            optimizer.init(start),
            observation,
            action,
            advantage,
            optimizer=optimizer,
            max_grad_norm=max_grad_norm,
        )

    # mean of ∇log π · A over the batch: (8/2) · (½, −½), of norm 2√2.
    new, _, info = jax.jit(step)(0.5)
    np.testing.assert_allclose(new, 0.5 * np.array([1, -1]) / np.sqrt(2), rtol=1e-12)
    assert info.gradient_norm == pytest.approx(2 * np.sqrt(2), rel=1e-12)  # as it was before
    for loose in (0.0, 3.0):
        np.testing.assert_allclose(jax.jit(step)(loose)[0], [2, -2], rtol=1e-12)


def test_numpy_batches_are_those_of_jax():
    """As a loop of one's own around another simulator has them."""
    rng, found = np.random.default_rng(0), []
    observation, target = rng.normal(size=(16, 3)).astype(np.float32), rng.normal(size=16).astype(np.float32)
    for convert in (np.asarray, jnp.asarray):
        optimizer, params = optax.sgd(0.1), jnp.zeros(3)
        found.append(
            fit_value_function(
                lambda p, o: o @ p, params, optimizer.init(params), convert(observation), convert(target),
                optimizer=optimizer, epochs=2, minibatches=2, key=jax.random.key(0),
            )[0]
        )  # fmt: skip
        params = jnp.zeros((3, 2))
        found.append(
            first_order_update(
                lambda p, o: Categorical(o @ p), params, optimizer.init(params), convert(observation),
                convert((target > 0).astype(np.int32)), convert(target), optimizer=optimizer, epochs=2, minibatches=4,
            )[0]
        )  # fmt: skip
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[3])
    assert all(np.abs(params).max() > 0 for params in found)
