"""Settings: their pytree, their ranges and the sentences that refuse them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trpo_jax import Config, Metrics, UsageError, validate

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
TRACED = [
    "gamma",
    "gae_lambda",
    "max_kl",
    "smallest_max_kl",
    "largest_max_kl",
    "target_kl",
    "anneal_max_kl",
    "entropy_coefficient",
    "cg_damping",
    "cg_tolerance",
    "line_search_shrink",
    "policy_learning_rate",
    "clip_ratio",
    "max_grad_norm",
    "initial_penalty",
    "value_damping",
    "value_learning_rate",
    "value_clip",
    "anneal_learning_rates",
    "observation_clip",
    "reward_clip",
    "initial_log_std",
]


def leaf_names(config):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(config)]


def test_floats_are_leaves_and_the_rest_is_static():
    assert leaf_names(Config()) == [f".{name}" for name in TRACED]
    assert [name for name, field in FIELDS.items() if not field.metadata["static"]] == TRACED


@pytest.mark.parametrize(
    "value",
    [1, 1.0, np.float32(1), np.float64(1), np.int64(1), np.array(1.0), jnp.asarray(1.0), jnp.int32(1)],
    ids=repr,
)
def test_a_number_is_one_strong_float32_leaf_however_it_was_given(value):
    leaf = jax.tree.leaves(Config(gamma=value))[0]
    assert leaf.dtype == np.float32 and leaf.shape == () and not getattr(leaf, "weak_type", False)
    inside = jax.jit(lambda config: config.gamma)(Config(gamma=value))
    assert inside.dtype == jnp.float32 and not inside.weak_type and inside == 1


def test_no_setting_bears_the_name_of_a_metric():
    """Both are columns of a sweep's results."""
    assert not FIELDS.keys() & {field.name for field in dataclasses.fields(Metrics)}


def test_unflattening_gives_the_same_config():
    config = Config(env="Pendulum-v1", num_envs=3, gamma=0.5, fisher_fraction=0.25, normalize_observations=True)
    leaves, structure = jax.tree.flatten(config)
    again = jax.tree.unflatten(structure, leaves)
    assert isinstance(again, Config)
    for name in FIELDS:
        value, expected = getattr(again, name), getattr(config, name)
        assert value == (np.float32(expected) if name in TRACED else expected)


def test_the_structure_is_hashable_and_tells_static_settings_apart():
    structure = jax.tree.structure(Config())
    assert structure == jax.tree.structure(Config(gamma=0.5, max_kl=jnp.float32(0.1)))
    assert hash(structure) == hash(jax.tree.structure(Config()))
    for change in ({"num_envs": 3}, {"env": "Pendulum-v1"}, {"fisher_fraction": 0.5}, {"line_search": "parallel"}):
        assert structure != jax.tree.structure(Config(**change))


def test_a_config_with_python_numbers_is_hashable():
    assert hash(Config()) == hash(Config()) and Config() == Config() and Config() != Config(gamma=0.5)
    assert len({Config(), Config(), Config(num_envs=3)}) == 2


def test_settings_cannot_be_assigned():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().gamma = 0.5


def test_axes_for_vmap_are_a_config_with_none():
    config = Config(max_kl=jnp.array([0.1, 0.2, 0.3]), gamma=jnp.array([0.5, 0.6, 0.7]))
    axes = Config(**dict.fromkeys(TRACED)).replace(max_kl=0, gamma=0)
    product = jax.vmap(lambda c, x: c.max_kl * c.gamma + 0 * c.cg_damping + x, in_axes=(axes, None))(config, 1.0)
    np.testing.assert_allclose(product, [1.05, 1.12, 1.21], rtol=1e-6)


def test_axes_where_every_float_is_swept():
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), Config())
    twice = jax.vmap(lambda c: c.max_kl, in_axes=0)(stacked)
    np.testing.assert_allclose(twice, [0.01, 0.02], rtol=1e-6)


def test_a_fisher_fraction_given_as_an_array_is_traced():
    config = Config(fisher_fraction=jnp.array([0.25, 0.5]))
    assert ".fisher_fraction" in leaf_names(config)
    assert jax.vmap(lambda f: Config(fisher_fraction=f).fisher_fraction)(config.fisher_fraction).shape == (2,)
    validate(config)


def test_replace_returns_a_changed_copy():
    config = Config()
    changed = config.replace(gamma=0.5, num_envs=3)
    assert (changed.gamma, changed.num_envs, config.gamma, config.num_envs) == (0.5, 3, 0.99, 16)


@pytest.mark.parametrize(
    "name, suggestion",
    [("max_kll", "max_kl"), ("num_env", "num_envs"), ("Gamma", "gamma"), ("lambda_gae", "gae_lambda")],
)
def test_an_unknown_setting_is_answered_with_the_nearest(name, suggestion):
    with pytest.raises(UsageError, match=rf"Config has no setting '{name}'; did you mean .*{suggestion}.*\?$"):
        Config().replace(**{name: 1})


def test_a_setting_like_no_other_is_still_one_sentence():
    with pytest.raises(UsageError, match=r"^Config has no setting 'xyzzy'\.$"):
        Config().replace(xyzzy=1)


BAD = [
    ("num_envs", 0, r"whole number from 1 to 10,000,000, got 0"),
    ("num_envs", -3, r"whole number from 1 to"),
    ("num_envs", 2.0, r"whole number"),
    ("num_envs", True, r"whole number"),
    ("num_envs", "4", r"whole number .* got '4'"),
    ("num_steps", 0, r"whole number from 1 to"),
    ("num_iterations", 0, r"whole number from 1 to"),
    ("cg_iterations", 0, r"whole number from 1 to"),
    ("line_search_steps", 0, r"whole number from 1 to"),
    ("value_epochs", 0, r"whole number from 1 to"),
    ("value_minibatches", 0, r"whole number from 1 to"),
    ("gamma", 1.01, r"must lie in \[0, 1\], got 1\.01"),
    ("gamma", -0.1, r"\[0, 1\]"),
    ("gamma", float("nan"), r"\[0, 1\], got nan"),
    ("gamma", None, r"\[0, 1\]"),
    ("gamma", "high", r"\[0, 1\], got 'high'"),
    ("gamma", "0.5", r"\[0, 1\], got '0\.5'"),
    ("gae_lambda", 2, r"\[0, 1\]"),
    ("max_kl", 0, r"\(0, 1e6\]"),
    ("max_kl", -0.01, r"\(0, 1e6\]"),
    ("max_kl", float("inf"), r"\(0, 1e6\]"),
    ("cg_damping", -1e-3, r"\[0, 1e6\]"),
    ("cg_tolerance", 1.0, r"\[0, 1\)"),
    ("fisher_fraction", 0, r"\(0, 1\]"),
    ("fisher_fraction", 1.5, r"\(0, 1\]"),
    ("line_search", "newton", r"one of auto, backtracking, parallel, none, got 'newton'"),
    ("line_search_shrink", 1, r"\(0, 1\)"),
    ("line_search_shrink", 0, r"\(0, 1\)"),
    ("value_learning_rate", -1, r"\[0, 1e6\]"),
    ("normalize_advantages", 1, r"True or False, got 1"),
    ("normalize_observations", "yes", r"True or False, got 'yes'"),
    ("initial_log_std", float("inf"), r"\[-20, 20\]"),
    ("max_kl", jnp.array([0.1, 0.0]), r"\(0, 1e6\]"),
    ("gamma", [0.5, 1.5], r"\[0, 1\]"),
]


def test_minibatches_of_adam_divide_the_batch():
    with pytest.raises(
        UsageError, match=r"does not divide the batch of num_envs x num_steps = 16 x 128 = 2048; choose"
    ):
        validate(Config(value_fit="adam", value_minibatches=7))
    validate(Config(value_minibatches=7))  # gauss-newton uses none


@pytest.mark.parametrize("name, value, message", BAD, ids=[f"{name}={value!r}" for name, value, _ in BAD])
def test_bad_values_are_refused_in_one_sentence(name, value, message):
    with pytest.raises(UsageError, match=message) as caught:
        validate(Config(**{name: value}))
    text = str(caught.value)
    assert text.startswith(name) and text.endswith(".") and "\n" not in text


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gamma": 0, "gae_lambda": 0},
        {"gamma": 1, "gae_lambda": 1.0},
        {"cg_damping": 0, "value_learning_rate": 0},
        {"fisher_fraction": 1e-3},
        {"num_envs": 1, "num_steps": 1, "value_minibatches": 1},
        {"max_kl": jnp.array([0.1, 0.2]), "gamma": np.float32(0.5)},
        {"initial_log_std": -20},
    ],
    ids=str,
)
def test_every_edge_that_is_allowed_passes(settings):
    validate(Config(**settings))


def test_traced_values_pass():
    def check(gamma):
        validate(Config(gamma=gamma, max_kl=gamma))
        return gamma

    jax.jit(check)(2.0)
    jax.vmap(check)(jnp.array([-1.0, 2.0]))
    jax.grad(check)(3.0)


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_says_what_it_is(name):
    meta = FIELDS[name].metadata
    assert len(meta["help"]) >= 10 and not meta["help"].endswith(".")
    assert isinstance(meta["static"], bool) and isinstance(meta["flag"], bool)
    assert not isinstance(getattr(Config(), name), float) or meta["interval"]


def test_steps_per_iteration():
    assert Config(num_envs=3, num_steps=5).steps_per_iteration == 15


def test_unhashable_environment_objects_are_static_by_identity():
    @dataclasses.dataclass
    class Unhashable:
        size: int = 3

    one, other = Unhashable(), Unhashable()
    structure = jax.tree.structure(Config(env=one))
    assert structure == jax.tree.structure(Config(env=one)) != jax.tree.structure(Config(env=other))
    assert hash(structure) == hash(jax.tree.structure(Config(env=one)))
    assert jax.tree.map(lambda leaf: leaf, Config(env=one)).env is one
