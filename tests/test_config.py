"""Settings: their pytree, their ranges and the sentences that refuse them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr
from probes import small_config

from trpo_jax import Config, Metrics, Network, UsageError, train, train_step, validate
from trpo_jax.fields import as_text
from trpo_jax.sentences import check_limits, counted
from trpo_jax.settings import cast
from trpo_jax.training import loop
from trpo_jax.validation import _OF_NETWORKS, _REFUSED, without_effect

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
TRACED = [
    "gamma",
    "gae_lambda",
    "max_kl",
    "kl_penalty",
    "smallest_max_kl",
    "largest_max_kl",
    "target_kl",
    "anneal_max_kl",
    "smallest_explained_variance",
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


def test_truth_values_of_numpy_are_truth_values():
    config = Config(baseline=np.bool_(False), normalize_rewards=np.True_)
    assert config == Config(baseline=False, normalize_rewards=True)
    with pytest.raises(UsageError, match="baseline must be True or False"):
        Config(baseline=np.array([True]))


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


def test_a_fisher_fraction_given_as_an_array_is_refused():
    with pytest.raises(UsageError, match=r"^fisher_fraction must be a number in \(0, 1\], got"):
        Config(fisher_fraction=jnp.array([0.25, 0.5]))


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
    ("hidden", 256, r"widths of layers such as 256,256 \(in files \[256, 256\]\) or auto, .* got 256"),
    ("hidden", (64, 0), r"each from 1 to 65,536, at most 64 layers, got \(64, 0\)"),
    ("hidden", [64, True], r"got \(64, True\)"),
    ("hidden", "64,x", r"got '64,x'"),
    ("hidden", "", r"got ''"),
    ("hidden", [[64]], r"got \(\[64\],\)"),
    ("hidden", (1,) * 65, r"at most 64 layers"),
    ("hidden", None, r"got None"),
    ("value_hidden", {"a": 1}, r"widths of layers"),
    ("channels", "auto", r"such as 256,256 \(in files \[256, 256\]\), each .* got 'auto'"),
    ("activation", "elu", r"one of auto, tanh, relu, swish, gelu, got 'elu'"),
    ("layer_norm", 1, r"True or False, got 1"),
    ("initialisation", "zeros", r"one of orthogonal, lecun-normal, got 'zeros'"),
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


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("max_kl", 1e39, "max_kl must lie in (0, 1e6], got 1e+39."),
        ("max_kl", 1e-46, "max_kl must lie in (0, 1e6], got 1e-46, which is 0 in float32."),
        ("max_kl", 1e-40, "max_kl must lie in (0, 1e6], got 1e-40, which is 0 in float32."),  # subnormal
        ("line_search_shrink", 0.99999999999, "(0, 1), got 0.99999999999, which is 1 in float32."),
        ("max_kl", -(10**400), "max_kl must lie in (0, 1e6], got -1000"),
        pytest.param(
            "gamma", 10**5000, "gamma must lie in [0, 1], got a number too long to be shown.", id="5000 digits"
        ),
        ("gamma", True, "gamma must be a number in [0, 1], got True."),
        ("gamma", np.bool_(True), "gamma must be a number in [0, 1], got True."),
        ("gamma", 1j, "gamma must be a number in [0, 1], got 1j."),
        ("gamma", np.array([[0.5, np.nan]]), "gamma must lie in [0, 1]"),
        ("fisher_fraction", [0.5], "fisher_fraction must be a number in (0, 1], got [0.5]."),
        ("num_envs", 2**31, "num_envs must be a whole number from 1 to 10,000,000, got 2147483648."),
        ("num_envs", 1e300, "num_envs must be a whole number from 1 to 10,000,000, got 1e+300."),
        ("cg_iterations", 10**400, "cg_iterations must be a whole number from 1 to 10,000, got 1000"),
        ("line_search", ["none"], "line_search must be one of auto, backtracking, parallel, none, got ['none']."),
        ("policy", "x", "policy must be None or a trpo_jax.Network(init, apply), got 'x'."),
    ],
)
def test_numbers_from_hell_are_refused_when_a_config_is_made(name, value, message):
    for make in (Config, Config().replace):
        with pytest.raises(UsageError) as caught:
            make(**{name: value})
        assert message in str(caught.value) and str(caught.value).endswith(".") and len(str(caught.value)) < 200


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.metadata["kind"] in ("int", "float")])
def test_every_number_has_bounds_and_keeps_to_them(name):
    whole, interval = FIELDS[name].metadata["kind"] == "int", FIELDS[name].metadata["interval"]
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    assert np.isfinite([low, high]).all()
    beyond = (int(low) - 1, int(high) + 1) if whole else (low - 1e-6 * max(1, -low), high + 1e-6 * max(1, high))
    for value in beyond:
        with pytest.raises(UsageError, match=name):
            Config(**{name: value})
    for value, closed in ((low, interval[0] == "["), (high, interval[-1] == "]")):
        if closed:
            Config(**{name: int(value) if whole else value})


def test_what_cannot_be_looked_at_passes_when_a_config_is_made():
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    assert Config(max_kl=shape).replace(num_envs=3).max_kl is shape
    jax.jit(lambda gamma: Config(gamma=gamma).replace(max_kl=gamma).max_kl)(99.0)
    assert Config(**dict.fromkeys(TRACED)).replace(max_kl=-1).max_kl == -1  # an axis, not a radius
    Config(max_kl=np.linspace(0.1, 1, 5))


def test_whether_settings_go_together_is_seen_at_use_so_that_they_can_be_replaced_one_by_one():
    config = Config(value_fit="adam", num_envs=3, num_steps=5)
    with pytest.raises(UsageError, match="value_minibatches=8 does not divide"):
        validate(config)
    validate(config.replace(num_steps=16))
    with pytest.raises(UsageError, match="100,000,000,000 samples per update are more than 2,147,483,647"):
        validate(Config(num_envs=10**6, num_steps=10**5))


OWN = Network(None, None)


@pytest.mark.parametrize("given", [(64, 32), [64, 32], "64,32", "[64, 32]", "(64, 32)", [np.int64(64), 32], "64,32,"])
def test_widths_are_one_tuple_however_they_are_given(given):
    config = Config(hidden=given, channels=given)
    assert config.hidden == config.channels == (64, 32) and config == Config(hidden=(64, 32), channels=(64, 32))
    assert jax.tree.structure(config) == jax.tree.structure(Config(hidden=(64, 32), channels=(64, 32)))
    assert cast("hidden", as_text(config.hidden)) == config.hidden


@pytest.mark.parametrize("widths", [(), (1,), (64, 64), "auto"], ids=str)
def test_the_text_of_widths_reads_as_they_are(widths):
    assert Config(hidden=as_text(widths)).hidden == widths


def test_settings_of_networks_are_refused_beside_networks_of_ones_own():
    with pytest.raises(UsageError, match=r"^hidden=8,8 needs policy=None or value=None; .* has no effect\.$"):
        validate(Config(policy=OWN, value=OWN, hidden=(8, 8)))
    with pytest.raises(UsageError, match=r"^network=gru needs at least one width"):
        validate(Config(network="gru", hidden=()))


@pytest.mark.parametrize(
    "settings, name, why",
    [
        ({"update": "ppo"}, "max_kl", "needs update=trpo; with update=ppo it has no effect"),
        ({}, "clip_ratio", "needs update=ppo or natural_gradient_steps=2 or more; with update=trpo and"),
        ({"update": "ppo"}, "natural_gradient_steps", "needs update=trpo; with update=ppo it has no effect"),
        ({}, "value_epochs", "needs value_fit=adam; with value_fit=gauss-newton it has no effect"),
        ({"line_search": "none"}, "line_search_steps", "needs line_search=auto or backtracking or parallel"),
        ({}, "target_kl", "needs radius_rule=divergence or update=kl-penalty; with radius_rule=fixed and update=trpo"),
        ({"radius_rule": "ratio", "update": "ppo"}, "smallest_max_kl", "needs radius_rule=ratio or divergence"),
        ({}, "observation_clip", "needs normalize_observations=True"),
        ({"update": "ppo"}, "cg_tolerance", ""),  # the value function's solver
        ({"update": "ppo", "value_fit": "adam"}, "cg_tolerance", "needs update=trpo or value_fit=gauss-newton"),
        ({"update": "kl-penalty"}, "target_kl", ""),
        ({}, "gamma", ""),
        ({"network": "mlp"}, "channels", "needs network=auto or cnn; with network=mlp it has no effect"),
        ({"policy": OWN, "value": OWN}, "hidden", "needs policy=None or value=None; with policy=a Network and value=a"),
        ({"policy": OWN, "value_hidden": (8,)}, "hidden", "needs policy=None or value_hidden=auto"),
        ({"policy": OWN}, "hidden", ""),
        ({"natural_gradient_steps": np.int64(2)}, "clip_ratio", ""),
        ({"value": OWN}, "value_hidden", "needs value=None; with value=a Network it has no effect"),
    ],
)
def test_a_setting_without_effect_is_known(settings, name, why):
    found = without_effect(Config(**settings), name)
    assert found.startswith(why) and bool(found) == bool(why)


METHODS = ("trpo", "gauss-newton"), ("ppo", "adam")


@pytest.mark.parametrize(
    "update, fit",
    [
        pytest.param(update, fit, marks=[] if (update, fit) in METHODS else pytest.mark.slow)
        for update in FIELDS["update"].metadata["choices"]
        for fit in FIELDS["value_fit"].metadata["choices"]
    ],
)
def test_settings_without_effect_leave_the_program_as_it_is(update, fit, monkeypatch):
    """What is called without effect does not enter the program: a static one its text, a traced one its inputs."""
    monkeypatch.setattr(loop, "take_turns", lambda function, *arguments: function(*arguments))
    shared = {"update": update, "value_fit": fit, "num_envs": 2, "num_steps": 4}
    config = small_config(**shared, policy_minibatches=2, policy_epochs=1)
    state = jax.eval_shape(train, config, jax.random.key(0))[0]

    def program(config):
        return jax.make_jaxpr(train_step.__wrapped__)(config, state)

    def used(jaxpr, names):
        _, needed = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
        return {name for name, need in zip(names, needed, strict=False) if need}

    idle = [name for name in FIELDS if FIELDS[name].metadata["flag"] and without_effect(config, name)]
    assert idle
    jaxpr = program(config)
    assert not {name for name in idle if name in TRACED} & used(jaxpr, TRACED)
    others = {"bool": True, "int": 2, "float": 2.0, "widths": (3,)}
    for name in idle:
        field = FIELDS[name]
        if field.metadata["static"] and name not in (*_REFUSED, *_OF_NETWORKS, "fisher_fraction"):
            choices = field.metadata.get("choices")
            other = next(c for c in choices if c != field.default) if choices else others[field.metadata["kind"]]
            assert str(program(config.replace(**{name: other}))) == str(jaxpr), name


def test_seeds_stay_where_each_trains_an_agent_of_its_own():
    check_limits({"seed": 2**31 - 5, "num_seeds": 5})
    for values in (
        {"seed": 2**32 + 7},
        {"seed": -1},
        {"seed": 1e20},
        {"seed": True},
        {"seed": 2**31 - 5, "num_seeds": 6},
    ):
        with pytest.raises(UsageError, match=r"seed"):
            check_limits(values)


@pytest.mark.parametrize("number, text", [(1, "1 episode"), (0, "0 episodes"), (2000, "2,000 episodes")])
def test_what_is_counted_is_in_the_plural_but_for_one(number, text):
    assert counted(number, "episode") == text
