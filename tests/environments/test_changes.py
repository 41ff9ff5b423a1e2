"""Wrappers by name, and settings of an environment that are drawn for each episode."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest

import trpo_jax
from trpo_jax import Config, UsageError, evaluate, hide_entries, init, make_environment, stack_frames, sweep, train
from trpo_jax.cli import main
from trpo_jax.environments.changes import apply_wrappers
from trpo_jax.environments.make import environment_of
from trpo_jax.fields import parse_ranges
from trpo_jax.runs.folders import open_run

long = pytest.mark.long

SMALL = {"num_envs": 4, "num_steps": 16, "num_iterations": 2, "cg_iterations": 2}
BOTH = "hide_entries=1,3 stack_frames=2"


@long
def test_wrappers_by_name_are_those_by_hand():
    by_hand = stack_frames(hide_entries(make_environment("CartPole-v1"), [1, 3]), 2)
    named = Config(**SMALL, wrappers=BOTH)
    assert environment_of(named).observation_shape == (4,)
    assert environment_of(named) is environment_of(named.replace(gamma=0.9)), "one trace"
    key = jax.random.key(0)
    results = [jax.jit(train)(config, key) for config in (named, Config(**SMALL, env=by_hand))]
    assert probes.same_bits(*results)


@pytest.mark.parametrize(
    "name, value",
    [
        ("stack_frames", 2),
        ("repeat_actions", 3),
        ("limit_steps", 5),
        ("flatten_observations", None),
        ("append_time", None),
        ("cache_resets", None),
        ("hide_entries", [0, -1]),
    ],
)
def test_each_wrapper_has_its_name(name, value):
    base, wrap = make_environment("CartPole-v1"), getattr(trpo_jax, name)
    by_hand = wrap(base) if value is None else wrap(base, value)
    text = ",".join(str(one) for one in np.ravel(value)) if value is not None else ""
    named = apply_wrappers(base, f"{name}={text}" if text else name)
    assert (named.observation_shape, named.max_steps) == (by_hand.observation_shape, by_hand.max_steps)
    one, other = (jax.eval_shape(environment.reset, jax.random.key(0)) for environment in (named, by_hand))
    chex.assert_trees_all_equal_shapes_and_dtypes(one, other)


@pytest.mark.parametrize(
    "wrappers, message",
    [
        (
            "stack_frame=4",
            "wrappers cannot be 'stack_frame'; choose among stack_frames, repeat_actions, limit_steps",
        ),
        ("stack_frames", r"wrappers must have the form stack_frames=4, got 'stack_frames'\."),
        ("stack_frames=4,5", r"stack_frames takes one number, as stack_frames=4, got '4,5'\."),
        ("stack_frames=²", r"num_frames must be a whole number from 1 to 1,000, got '²'\."),
        ("hide_entries=--1", r"hidden must be indices among the 4 entries of CartPole-v1, got \['--1'\]\."),
        ("append_time=3", r"wrappers must have the form append_time, got 'append_time=3'\."),
        ("hide_entries=9", "hidden must be indices among the 4 entries"),
        ("repeat_actions=many", r"times must be a whole number .*, got 'many'\."),
        (" ", r"wrappers must be text, got ' '\."),
    ],
)
def test_what_is_no_wrapper_is_one_sentence(wrappers, message):
    with pytest.raises(UsageError, match=message):
        environment_of(Config(wrappers=wrappers))


def lengths(config, num_envs=64):
    """What was drawn for each of many environments."""
    _, (_, values) = jax.vmap(environment_of(config).reset)(jax.random.split(jax.random.key(0), num_envs))
    return values


def test_ranges_are_drawn_for_each_episode_of_each_environment():
    config = Config(env="CartPole-v1", randomize={"gravity": (5, 20), "length": (0.4, 0.6)})
    assert config.randomize == "gravity=5..20 length=0.4..0.6" and hash(config.randomize)
    values = lengths(config)
    for name, low, high in (("gravity", 5, 20), ("length", 0.4, 0.6)):
        assert low <= values[name].min() < values[name].max() <= high
        assert len(np.unique(values[name])) == 64
        np.testing.assert_allclose(values[name].mean(), (low + high) / 2, atol=0.15 * (high - low))
    # What is drawn decides the dynamics: the step is that of an environment with this very gravity.
    environment, key = environment_of(config), jax.random.key(3)
    _, (inner, drawn) = environment.reset(key)
    after = environment.step(key, (inner, drawn), jnp.int32(1))
    fixed = make_environment("CartPole-v1", params={name: float(value) for name, value in drawn.items()})
    np.testing.assert_allclose(after.observation, fixed.step(key, inner, jnp.int32(1)).observation, rtol=1e-5)
    assert after.state[1] == drawn


@long
def test_a_range_of_one_value_is_that_value_and_evaluation_is_without_unless_asked():
    key = jax.random.key(1)
    one = Config(**SMALL, env="Pendulum-v1", randomize={"g": [10.0, 10.0]})
    state, metrics = jax.jit(train)(one, key)
    assert np.isfinite(metrics.mean_kl).all()
    plain = one.replace(randomize={})
    assert plain.randomize == "none"
    wide = one.replace(randomize={"g": [1.0, 60.0]})
    returns = {
        name: evaluate(config, state, key, num_episodes=8, randomize=asked).episode_return
        for name, config, asked in (("plain", plain, False), ("not asked", wide, False), ("asked", wide, True))
    }
    np.testing.assert_array_equal(returns["plain"], returns["not asked"])
    assert (returns["plain"] != returns["asked"]).any()


@long
def test_settings_that_are_traced_go_with_ranges_and_wrappers():
    config = Config(**SMALL, env_args={"gravity": 9.8}, randomize={"length": [0.4, 0.6]}, wrappers="stack_frames=2")
    result = sweep(config.replace(env_args={}), {"env.gravity": [5.0, 20.0]}, jax.random.key(0), num_episodes=2)
    assert np.isfinite(result.final_return).all()
    states = jax.vmap(lambda g: init(config.replace(env_args={"gravity": g}), jax.random.key(0)))(
        jnp.array([5.0, 20.0])
    )
    assert states.actor.observation.shape == (2, 4, 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"randomize": {"gravity": [20, 5]}}, r"randomize must be ranges such as gravity=5\.\.20"),
        ({"randomize": {"gravity": 5}}, "must be ranges such as"),
        ({"randomize": "gravity"}, "must be ranges such as"),
        ({"randomize": 3}, "must be ranges, or a randomization_fn of Brax or Playground, got 3"),
        (
            {"randomize": {"gravty": [5, 20]}},
            r"CartPole-v1 has no parameter gravty that can be drawn; it has gravity",
        ),
        ({"randomize": {"max_steps_in_episode": [5, 20]}}, "has no parameter max_steps_in_episode that can be drawn"),
        ({"env": "brax/ant", "randomize": {"x": [5, 20]}}, "draws parameters of gymnax's environments"),
        ({"randomize": lambda model, keys: None}, "randomize may be a function for brax/ and playground/ only"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(changes, message):
    with pytest.raises(UsageError, match=message):
        environment_of(Config(**changes))
    assert parse_ranges("a=1..2 b=-1e-3..0") == {"a": (1, 2), "b": (-1e-3, 0)}


@long
def test_a_run_keeps_them(tmp_path, capsys):
    file = tmp_path / "settings.toml"
    file.write_text(f'wrappers = "{BOTH}"\nnum_envs = 2\nnum_steps = 16\nrandomize = {{ gravity = [5, 20] }}\n')
    run = str(tmp_path / "run")
    assert main(["train", "--config", str(file), "--num-iterations", "1", "--output", run]) == 0
    config = open_run(run).config
    assert (config.wrappers, config.randomize) == (BOTH, "gravity=5..20")
    assert main(["evaluate", run, "--num-episodes", "2"]) == main(["evaluate", run, "--randomize"]) == 0
    flags = ["--wrappers", BOTH, "--randomize", "gravity=5..20", "--max-steps", "20", "--env-arg", "length=0.4"]
    assert main(["check", "CartPole-v1", *flags]) == 0
    capsys.readouterr()
    assert main(["check", "CartPole-v1", "--wrappers", "stack_frames=0"]) == 2
    assert "num_frames must be a whole number from 1 to 1,000, got 0." in capsys.readouterr().err


def double_mass(model, keys):
    """A `randomization_fn`, of Brax: bodies of one to two times their mass."""
    draw = lambda key: model.link.inertia.mass * jax.random.uniform(key, (), minval=1.0, maxval=2.0)  # noqa: E731
    axes = jax.tree.map(lambda leaf: None, model).tree_replace({"link.inertia.mass": 0})
    return model.tree_replace({"link.inertia.mass": jax.vmap(draw)(keys)}), axes


@long
@pytest.mark.filterwarnings("default")  # the suite's own
def test_a_randomization_fn_of_brax_passes_through():
    pytest.importorskip("brax", reason="needs the extra brax")
    environment = environment_of(Config(env="brax/inverted_pendulum", randomize=double_mass))
    _, states = jax.vmap(environment.reset)(jax.random.split(jax.random.key(0), 3))
    assert [leaf.shape for leaf in jax.tree.leaves(states) if leaf.ndim == 2]
    config = Config(env="brax/inverted_pendulum", randomize=double_mass, **SMALL)
    state, metrics = jax.jit(train)(config, jax.random.key(0))
    assert np.isfinite(metrics.mean_kl).all()
    # The model is as it was once nothing is traced any more.
    plain = config.replace(randomize={})
    assert np.isfinite(evaluate(plain, state, jax.random.key(0), num_episodes=2, max_steps=20).episode_return).all()
