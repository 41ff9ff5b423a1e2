"""Both line searches give one answer, accept only what they may, and leave rejected parameters bit-identical."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trpo_jax import backtracking_line_search, full_step, parallel_line_search

SEARCHES = [backtracking_line_search, parallel_line_search]
PARAMS = {"a": jnp.array([1.0, -0.0]), "b": jnp.array([[3.0]])}
STEP = {"a": jnp.array([0.5, 1.0]), "b": jnp.array([[-2.0]])}


def fraction(candidate):
    """The fraction of the step that a candidate has gone."""
    return (candidate["a"][0] - 1.0) / 0.5


# (what evaluate returns at fraction x, the j that must be accepted or None); shrink is ½, max_kl 1.
CASES = {
    "full step": (lambda x: (x, 0.5 * x), 0),
    "kl on the bound is allowed": (lambda x: (x, x), 0),
    "kl too large until a quarter": (lambda x: (x, 4 * x), 2),
    "gain only for small steps": (lambda x: (x * (0.3 - x), x), 2),
    "never a gain": (lambda x: (-x, x), None),
    "gain of zero is no gain": (lambda x: (0 * x, x), None),
    "kl too large always": (lambda x: (x, 1e6 * x), None),
    "gain is nan": (lambda x: (x * jnp.nan, x), None),
    "kl is nan at first": (lambda x: (x, jnp.where(x > 0.6, jnp.nan, x)), 1),
    "gain is infinite at first": (lambda x: (jnp.where(x > 0.3, jnp.inf, x), x), 2),
    "kl is minus infinity": (lambda x: (x, -jnp.inf * (x + 1)), None),
}


@pytest.mark.parametrize("search", [*SEARCHES, full_step])
@pytest.mark.parametrize("step", [PARAMS["a"], {"a": STEP["a"]}, {"a": jnp.ones((5, 2)), "b": STEP["b"]}, 1.0])
def test_a_step_that_would_be_broadcast_is_refused(search, step):
    with pytest.raises(ValueError, match=r"^step must be a pytree like params: the same structure, with arrays of the"):
        search(lambda c: (jnp.float32(1), jnp.float32(0)), PARAMS, step, max_kl=1.0)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("case", CASES)
def test_accepts_the_first_that_passes(search, case):
    evaluate, expected = CASES[case]
    new, info = jax.jit(
        lambda p, s: search(lambda c: (*evaluate(fraction(c)), fraction(c)), p, s, max_kl=1.0, shrink=0.5, max_steps=5)
    )(PARAMS, STEP)
    if expected is None:
        assert not info.accepted and info.num_rejected == 5
        assert info.step_fraction == info.surrogate_gain == info.divergence == info.extra[0] == 0
        for name in PARAMS:  # also the sign of −0
            np.testing.assert_array_equal(
                np.asarray(new[name]).view(np.uint32), np.asarray(PARAMS[name]).view(np.uint32)
            )
    else:
        alpha = 0.5**expected
        assert info.accepted and info.num_rejected == expected and info.step_fraction == alpha
        gain, kl = evaluate(jnp.float32(alpha))
        np.testing.assert_allclose((info.surrogate_gain, info.divergence, info.extra[0]), (gain, kl, alpha), rtol=1e-6)
        jax.tree.map(lambda n, p, s: np.testing.assert_allclose(n, p + alpha * s), new, PARAMS, STEP)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_candidate_is_refused_whatever_evaluate_says(search, bad):
    step = {**STEP, "b": jnp.array([[bad]])}
    new, info = search(lambda _: (jnp.float32(1.0), jnp.float32(0.0)), PARAMS, step, max_kl=1.0)
    assert not info.accepted
    jax.tree.map(np.testing.assert_array_equal, new, PARAMS)


@pytest.mark.parametrize("evaluation", [(jnp.nan, 0.0), (1.0, jnp.nan), (1.0, jnp.inf)])
def test_a_full_step_is_refused_where_gain_or_divergence_is_not_finite(evaluation):
    new, info = full_step(lambda _: tuple(map(jnp.float32, evaluation)), PARAMS, STEP, max_kl=1.0)
    assert not info.accepted
    jax.tree.map(np.testing.assert_array_equal, new, PARAMS)


@pytest.mark.parametrize("search", SEARCHES)
def test_traced_settings_under_vmap(search):
    def run(max_kl, shrink):
        _, info = search(lambda c: (fraction(c), fraction(c)), PARAMS, STEP, max_kl=max_kl, shrink=shrink, max_steps=8)
        return info.step_fraction

    max_kl, shrink = jnp.array([1.0, 0.6, 0.1, 1e-9]), jnp.array([0.5, 0.5, 0.8, 0.9])
    expected = [1.0, 0.5, 0.0, 0.0]  # 0.8⁷ = 0.21 is still above 0.1
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(max_kl, shrink), expected)


@pytest.mark.parametrize("search", [backtracking_line_search, parallel_line_search])
@pytest.mark.parametrize("gain", [1.0, -1.0])
def test_one_candidate_is_the_whole_step_or_none(search, gain):
    new, info = search(
        lambda p: (gain * jnp.ones(()), jnp.zeros(())), jnp.zeros(2), jnp.ones(2), max_kl=1.0, max_steps=1
    )
    np.testing.assert_array_equal(new, float(gain > 0))
    assert info.accepted == (gain > 0) == info.step_fraction and info.num_rejected == (gain < 0)
