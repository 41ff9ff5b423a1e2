"""The trainer as a pure function: one trace, vmap = loop, exact continuation, frozen statistics, known optima."""

import dataclasses
import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from probes import assert_trees_close, lane, raw, same_bits, small_config, stack

from trpo_jax import (
    Config,
    Metrics,
    Network,
    TrainState,
    UsageError,
    evaluate,
    init,
    load,
    make_environment,
    make_policy,
    make_value,
    save,
    train,
    train_step,
)
from trpo_jax.training.agents import make_agent
from trpo_jax.training.estimates import next_values
from trpo_jax.training.loop import train_chunk
from trpo_jax.training.rollouts import rollout
from trpo_jax.training.state import Transition

TRACED = [field.name for field in dataclasses.fields(Config) if not field.metadata["static"]]


@functools.cache
def trainers():
    """`train` on small settings as one program for a key, and as another for many configs and keys at once."""
    return jax.jit(train), jax.jit(jax.vmap(train, in_axes=(0, 0)))


BASE = small_config()


@functools.cache
def run_of(seed):
    return trainers()[0](BASE, jax.random.key(seed))


# --- One trace ---------------------------------------------------------------------------------------------------


def test_one_program_serves_keys_and_numbers_of_every_kind(caplog):
    traces = []

    def counted_step(config, state):
        traces.append(1)
        return train_step(config, state)

    step = jax.jit(counted_step)
    state = jax.jit(init)(BASE, jax.random.key(0))
    kinds = [float, np.float32, np.float64, np.asarray, jnp.float32, jnp.asarray]
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for kind in kinds:
            for name in TRACED:
                step(BASE.replace(**{name: kind(0.5)}), state)
        for integer in (1, np.int64(1), jnp.int32(1)):
            step(BASE.replace(gamma=integer, gae_lambda=integer, cg_damping=integer), state)
        after, _ = step(BASE, state)
        step(BASE, after)  # what a step returns is what the next one takes
        step(BASE, dataclasses.replace(state, key=jax.random.key(7)))
    assert len(traces) == 1
    assert sum("XLA compilation of jit(counted_step)" in message for message in caplog.messages) == 1


def test_a_step_keeps_the_types_of_the_state():
    state = jax.eval_shape(lambda key: init(BASE, key), jax.random.key(0))
    after, metrics = jax.eval_shape(functools.partial(train_step, BASE), state)
    assert after == state
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for path, leaf in jax.tree_util.tree_leaves_with_path((state, metrics)):
        assert not leaf.weak_type, path
    for field in dataclasses.fields(Metrics):
        leaf = getattr(metrics, field.name)
        assert leaf.shape == () and leaf.dtype == (jnp.int32 if field.name == "num_episodes" else jnp.float32)


def test_a_step_keeps_the_types_of_the_state_with_default_networks_and_a_box():
    config = Config(env="Pendulum-v1", num_envs=2, num_steps=4, value_minibatches=1, initial_log_std=-1)
    state = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    after, _ = jax.eval_shape(functools.partial(train_step, config), state)
    assert after == state
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


# --- Many agents are many runs -----------------------------------------------------------------------------------


def test_eight_seeds_at_once_are_eight_runs_and_seeds_differ():
    keys = jax.vmap(jax.random.key)(jnp.arange(8))
    state, metrics = jax.jit(jax.vmap(train, in_axes=(None, 0)))(BASE, keys)
    for seed in range(8):
        alone = run_of(seed)
        assert_trees_close((lane(state, seed), lane(metrics, seed)), alone, rtol=1e-5, atol=1e-5)
    weights = np.asarray(state.learner.policy_params["w"]).reshape(8, -1)
    assert len(np.unique(weights, axis=0)) == 8


# Every float setting, a value for it, and the static settings under which it matters.
SWEPT = [
    (
        {},
        {
            "gamma": 0.3,
            "gae_lambda": 0.2,
            "max_kl": 0.05,
            "kl_penalty": 10.0,
            "anneal_max_kl": 0.5,
            "smallest_explained_variance": 1.0,
            "entropy_coefficient": 0.5,
            "cg_damping": 1.0,
            "cg_tolerance": 0.5,
            "line_search_shrink": 0.9,
            "value_damping": 3.0,
            "reward_clip": 0.1,
            "initial_log_std": -1.0,
        },
    ),
    ({"natural_gradient_steps": 2}, {"clip_ratio": 0.01}),
    ({"normalize_observations": True}, {"observation_clip": 0.1}),
    ({"radius_rule": "divergence"}, {"target_kl": 1e-4, "smallest_max_kl": 0.02, "largest_max_kl": 0.005}),
    (
        {"update": "ppo", "value_fit": "adam"},
        {
            "clip_ratio": 0.01,
            "max_grad_norm": 1e-3,
            "policy_learning_rate": 0.1,
            "value_learning_rate": 0.1,
            "value_clip": 1e-3,
            "anneal_learning_rates": 0.9,
        },
    ),
    ({"update": "kl-penalty"}, {"initial_penalty": 30.0}),
]


LANES = {
    "trpo": (),
    "several steps": (),
    "normalised": pytest.mark.slow,
    "divergence": pytest.mark.slow,
    "ppo": (),
    "kl-penalty": pytest.mark.slow,
}


@pytest.mark.long
@pytest.mark.parametrize(
    "choices, values",
    [pytest.param(*case, id=name, marks=marks) for case, (name, marks) in zip(SWEPT, LANES.items(), strict=True)],
)
def test_a_lane_for_each_float_setting_is_a_run_with_it(choices, values):
    """Every float setting is swept in one program: lane i changes the i-th setting."""
    gaussian = small_config(
        probes.ReachTarget(),
        policy=None,
        initial_log_std=0.0,
        num_iterations=2,
        line_search_shrink=0.5,
        policy_epochs=2,
        policy_minibatches=2,
        **choices,
    )  # the default policy, which reads initial_log_std
    configs = [gaussian, *(gaussian.replace(**{name: value}) for name, value in values.items())]
    one, many = trainers()
    key = jax.random.key(0)
    # First-order updates take TF32 products where a GPU has them, which round otherwise in a batch.
    with jax.default_matmul_precision("highest"):
        together = many(stack(configs), jnp.stack([key] * len(configs)))
        every_alone = [one(config, key) for config in configs]
    for i, alone in enumerate(every_alone):
        assert_trees_close(lane(together, i), alone, rtol=1e-4, atol=1e-5)
    base = lane(together, 0)[1]
    for i, name in enumerate(values, start=1):
        if name not in ("gamma", "gae_lambda", "line_search_shrink"):  # one-step episodes; nothing rejected
            assert not same_bits(lane(together, i)[1], base), name


def test_every_float_setting_was_swept():
    assert {name for _, values in SWEPT for name in values} == set(TRACED)


class Places(probes.ReachTarget):
    """The same, whose observations have two entries."""

    def observe(self, state):
        return {"place": super().observe(state), "speed": super().observe(state)}


# Every static setting, a value for it, and the settings under which it matters.
PPO, ADAM, DEFAULT_NETWORKS = {"update": "ppo"}, {"value_fit": "adam"}, {"policy": None, "value": None}
EVALUATED = {"eval_every": 1}
CHOICES = {
    "max_steps": (3, {**DEFAULT_NETWORKS, "env": "CartPole-v1"}),
    "randomize": ("g=5..20", {**DEFAULT_NETWORKS, "env": "Pendulum-v1"}),
    "wrappers": ("stack_frames=2", {**DEFAULT_NETWORKS, "env": "CartPole-v1"}),
    "num_envs": (8, {}),
    "num_steps": (4, {}),
    "num_iterations": (4, {}),
    "baseline": (False, {}),
    "update": ("policy-gradient", {}),
    "constraint": ("max-kl", {}),
    "radius_rule": ("ratio", {}),
    "reuse": (2, {}),
    "bonus": ("log-barrier", {**DEFAULT_NETWORKS, "env": "CartPole-v1", "entropy_coefficient": 0.01}),
    "natural_gradient_steps": (2, {}),
    "cg_iterations": (4, {}),
    "fisher_fraction": (0.5, {"update": "policy-gradient"}),  # that of the value fit
    "line_search": ("parallel", {}),
    "line_search_steps": (3, {}),
    "policy_optimizer": ("sgd", {"update": "policy-gradient"}),
    "policy_epochs": (3, PPO),
    "policy_minibatches": (4, PPO),
    "value_fit": ("adam", {}),
    "value_cg_iterations": (2, {}),
    "gauss_newton_steps": (2, {}),
    "value_epochs": (3, ADAM),
    "value_minibatches": (4, ADAM),
    "normalize_advantages": (False, {}),
    "normalize_observations": (True, {}),
    "normalize_rewards": (True, {}),
    "network": ("gru", DEFAULT_NETWORKS),
    "hidden": ((64, 65), DEFAULT_NETWORKS),
    "value_hidden": ((64, 65), DEFAULT_NETWORKS),
    "channels": ((16, 16), {**DEFAULT_NETWORKS, "env": "Breakout-MinAtar"}),
    "activation": ("gelu", DEFAULT_NETWORKS),
    "layer_norm": (True, DEFAULT_NETWORKS),
    "initialisation": ("lecun-normal", DEFAULT_NETWORKS),
    "shared_trunk": (True, DEFAULT_NETWORKS),
    "action_distribution": ("tanh", {**DEFAULT_NETWORKS, "env": "Pendulum-v1"}),
    "value_observation": ("speed", {**DEFAULT_NETWORKS, "env": Places()}),
    "state_dependent_std": (True, DEFAULT_NETWORKS),
    "eval_every": (2, {}),
    "eval_episodes": (3, EVALUATED),
    "eval_stochastic": (True, EVALUATED),
    "stop_at_return": (1.0, EVALUATED),
}


@functools.cache
def program(**changes):
    config = small_config(**{"env": probes.ReachTarget(), "policy": probes.linear_gaussian(), **changes})
    return str(jax.make_jaxpr(lambda key: train(config, key))(jax.random.key(0)))


@pytest.mark.long
@pytest.mark.parametrize("name", CHOICES)
def test_every_static_setting_changes_the_program(name):
    value, choices = CHOICES[name]
    assert program(**choices, **{name: value}) != program(**choices)


def test_every_static_setting_was_tried():
    static = {field.name for field in dataclasses.fields(Config) if field.metadata["static"]}
    assert static == {"env", "env_args", "policy", "value", *CHOICES}


@pytest.mark.parametrize("name", TRACED)
def test_vmap_over_one_setting_by_axes(name):
    axes = BASE.replace(**{**dict.fromkeys(TRACED), name: 0})
    config = BASE.replace(**{name: jnp.array([0.5, 0.6, 0.7])})
    state = jax.eval_shape(lambda key: init(BASE, key), jax.random.key(0))
    batched = jax.eval_shape(jax.vmap(train_step, in_axes=(axes, None)), config, state)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(batched))


def test_radii_by_axes_and_by_closure_are_separate_runs():
    radii = jnp.array([0.001, 0.01, 0.1])
    key = jax.random.key(0)
    axes = BASE.replace(**{**dict.fromkeys(TRACED), "max_kl": 0})
    by_axes = jax.jit(jax.vmap(train, in_axes=(axes, None)))(BASE.replace(max_kl=radii), key)
    by_closure = jax.jit(jax.vmap(lambda max_kl: train(BASE.replace(max_kl=max_kl), key)))(radii)
    for i, radius in enumerate(radii):
        alone = trainers()[0](BASE.replace(max_kl=float(radius)), key)
        assert_trees_close(lane(by_axes, i), alone, rtol=1e-5, atol=1e-5)
        assert_trees_close(lane(by_closure, i), alone, rtol=1e-5, atol=1e-5)
    kl = by_axes[1].mean_kl
    assert (kl <= radii[:, None]).all() and (kl[2] > kl[0]).all()


# --- Continuing is exact -----------------------------------------------------------------------------------------

LONG = small_config(probes.Countdown(), num_iterations=7, normalize_observations=True)


@functools.cache
def whole_run():
    # The default compiler options: bits are compared.
    return jax.jit(train)(LONG, jax.random.key(1))


@functools.cache
def chunk():
    return jax.jit(train_chunk, static_argnames="capacity")


@functools.cache
def first_state():
    return jax.jit(init)(LONG, jax.random.key(1))


def in_pieces(lengths, visit=lambda state: state):
    state, rows = first_state(), []
    for length in lengths:
        state, metrics = chunk()(LONG, visit(state), jnp.int32(length), capacity=7)
        rows.append(jax.tree.map(lambda column, length=length: column[:length], metrics))
    return state, jax.tree.map(lambda *columns: jnp.concatenate(columns), *rows)


@pytest.mark.parametrize("lengths", [(7,), (1,) * 7, (3, 4), (5, 1, 1), (2, 0, 5)], ids=str)
def test_pieces_of_any_length_are_the_whole_run(lengths):
    assert same_bits(in_pieces(lengths), whole_run())
    assert chunk()._cache_size() == 1


def test_single_steps_are_the_whole_run():
    step = jax.jit(train_step)
    state, rows = first_state(), []
    for _ in range(LONG.num_iterations):
        state, metrics = step(LONG, state)
        rows.append(metrics)
    assert same_bits((state, stack(rows)), whole_run())


def test_a_run_saved_and_loaded_goes_on_to_the_same_bits(tmp_path):
    def through_a_file(state):
        save(tmp_path / "state.npz", state)
        return load(tmp_path / "state.npz", LONG)

    assert same_bits(in_pieces((2, 3, 2), through_a_file), whole_run())


def test_a_chunk_fills_only_its_rows():
    _, metrics = chunk()(LONG, first_state(), jnp.int32(2), capacity=7)
    assert (metrics.entropy[:2] > 0).all() and (metrics.entropy[2:] == 0).all()


def test_iteration_numbers_decide_the_randomness():
    # The same state at another iteration number draws other actions.
    state = first_state()
    step = jax.jit(train_step)
    here, _ = step(LONG, state)
    there, _ = step(LONG, dataclasses.replace(state, iteration=jnp.int32(5)))
    assert int(there.iteration) == 6 and not same_bits(here.learner.policy_params, there.learner.policy_params)
    assert same_bits(here.key, state.key)  # one constant key


# --- Metrics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Metrics, TrainState, Transition], ids=lambda cls: cls.__name__)
def test_every_field_is_documented(cls):
    documented = [
        line.split(":")[0].strip()
        for line in inspect.getdoc(cls).splitlines()  # Python 3.13 takes the indentation away by itself
        if line.startswith("  ") and line[2] != " " and ":" in line
    ]
    assert documented == [field.name for field in dataclasses.fields(cls)]


ABSENT = "gain_ratio", "penalty"  # NaN: the defaults have none of them


def test_metrics_are_finite_and_within_their_meaning():
    for state, metrics in [whole_run(), *map(run_of, range(3))]:
        for name, column in vars(metrics).items():
            assert column.ndim == 1 and np.isfinite(column).all() == (name not in ABSENT), name
        assert int(state.iteration) == metrics.accepted.size
        assert set(np.unique(metrics.accepted)) <= {0, 1} and metrics.accepted.any()
        taken = np.asarray(metrics.accepted == 1)
        assert (metrics.mean_kl <= 0.01).all() and (metrics.mean_kl[taken] > 0).all()
        assert (metrics.mean_kl <= metrics.maximum_kl).all() and (metrics.radius == np.float32(0.01)).all()
        np.testing.assert_array_equal(metrics.divergence, metrics.mean_kl)
        assert (metrics.surrogate_gain[taken] > 0).all()
        assert (metrics.surrogate_gain[~taken] == 0).all() and (metrics.step_fraction[~taken] == 0).all()
        assert (metrics.effective_sample_fraction > 0).all() and (metrics.effective_sample_fraction <= 1 + 1e-6).all()
        assert (metrics.explained_variance <= 1).all() and (metrics.entropy <= np.log(2) + 1e-6).all()
        assert (metrics.cg_residual < 1).all() and (metrics.gradient_norm > 0).all()


def test_episode_metrics_are_means_over_the_episodes_that_ended():
    _, metrics = whole_run()
    np.testing.assert_array_equal(metrics.episode_return, metrics.episode_length)  # reward 1 a step
    assert ((metrics.episode_return > 1) & (metrics.episode_return < 5)).all()
    steps = np.asarray(metrics.num_episodes * metrics.episode_length).sum()
    assert abs(steps - LONG.steps_per_iteration * LONG.num_iterations) <= 5 * LONG.num_envs  # but for the running ones


def test_where_no_episode_ends_the_return_is_carried_forward():
    """Time limits after 5, 10, 15, … steps, in iterations of 4: none ends in the first and the sixth."""
    env = probes.RecordAction(-1.0, 1.0, (1,))
    settings = {"policy": probes.linear_gaussian(), "num_steps": 4, "num_iterations": 6}
    _, metrics = trainers()[0](small_config(env, **settings), jax.random.key(0))
    np.testing.assert_array_equal(metrics.num_episodes, [0, 4, 4, 4, 4, 0])
    for column in (metrics.episode_return, metrics.episode_length):
        assert np.isnan(column[0]) and np.isfinite(column[1:]).all() and column[5] == column[4]
    np.testing.assert_array_equal(metrics.episode_length[1:], 5)


def test_before_the_first_end_the_mean_return_is_nan_and_the_rest_is_finite():
    _, metrics = trainers()[0](small_config(probes.Endless(), num_iterations=1), jax.random.key(0))
    assert int(metrics.num_episodes[0]) == 0
    for name, column in vars(metrics).items():
        assert np.isnan(column).all() == (name in ("episode_return", "episode_length", *ABSENT)), name


def test_memory_grows_only_by_the_metrics():
    def memory(num_iterations):
        compiled = jax.jit(train).lower(BASE.replace(num_iterations=num_iterations), jax.random.key(0)).compile()
        return compiled.memory_analysis()

    short, long = memory(10), memory(100)
    metrics = 90 * 4 * len(dataclasses.fields(Metrics))
    assert long.output_size_in_bytes - short.output_size_in_bytes == metrics
    assert long.temp_size_in_bytes - short.temp_size_in_bytes <= 2 * metrics  # one copy in the loop, one outside


# --- Faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value_fit, learned_parts",
    [
        ("gauss-newton", ("policy_params", "value_params")),
        ("adam", ("policy_params", "value_params", "value_fit")),
    ],
)
def test_nan_rewards_cost_their_iteration_and_nothing_else(value_fit, learned_parts):
    # With 8 steps an iteration, steps 8 … 15 are those of the second one.
    for first, last in ((8, 15), (11, 11)):
        config = small_config(probes.Faulty(first, last), num_iterations=4, value_fit=value_fit)
        step = jax.jit(train_step)
        states, rows = [jax.jit(init)(config, jax.random.key(0))], []
        for _ in range(4):
            state, metrics = step(config, states[-1])
            states.append(state)
            rows.append(metrics)
        learned = [
            {name: not same_bits(getattr(a.learner, name), getattr(b.learner, name)) for name in learned_parts}
            for a, b in itertools.pairwise(states)
        ]
        assert [set(changes.values()) for changes in learned] == [{True}, {False}, {True}, {True}]
        assert [float(row.accepted) for row in rows] == [1, 0, 1, 1]
        assert [float(row.mean_kl) > 0 for row in rows] == [True, False, True, True]
        for leaf in jax.tree.leaves(states[-1]):
            assert np.isfinite(raw(leaf)).all()
        assert np.isnan(rows[1].episode_return) and np.isfinite(rows[3].episode_return)


@pytest.mark.parametrize(
    "key",
    [jnp.zeros(2, jnp.uint32), 0, np.zeros(2, np.uint32), jax.random.split(jax.random.key(0), 2)],
    ids=["raw", "int", "numpy", "several"],
)
def test_anything_but_one_typed_key_is_refused(key):
    for function in (init, train):
        with pytest.raises(UsageError, match=r"^key must be one typed PRNG key, jax\.random\.key\(seed\); for several"):
            function(BASE, key)


@pytest.mark.parametrize("name", ["gamma", "max_kl"])
def test_several_values_of_a_setting_for_one_agent_are_refused(name):
    with pytest.raises(UsageError, match=rf"^{name} must be one number for one agent, got an array of shape \(2,\)"):
        jax.eval_shape(lambda key: train(small_config(**{name: jnp.array([0.5, 0.9])}), key), jax.random.key(0))


@pytest.mark.parametrize(
    "settings",
    [{}, {"radius_rule": "ratio", "reuse": 2, "normalize_observations": True, "normalize_rewards": True}],
    ids=["defaults", "all that adapts"],
)
def test_where_jax_computes_in_64_bits_it_trains(settings):
    with jax.enable_x64(True):
        config = small_config(**settings)
        first = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
        last, _ = jax.eval_shape(lambda key: train(config, key), jax.random.key(0))
    assert [leaf.dtype for leaf in jax.tree.leaves(last)] == [leaf.dtype for leaf in jax.tree.leaves(first)]


def test_bad_settings_are_refused_before_anything_runs():
    with pytest.raises(UsageError, match=r"value_minibatches=5 does not divide"):
        train(BASE.replace(value_fit="adam", value_minibatches=5), jax.random.key(0))
    with pytest.raises(UsageError, match=r"there is no environment 'CartPole'"):
        jax.jit(train)(Config(env="CartPole"), jax.random.key(0))


# --- Observation statistics --------------------------------------------------------------------------------------


def test_statistics_are_frozen_within_an_iteration_and_exact_after_it():
    # Observations are the actions, and the actions depend on normalised observations: were the statistics not those
    # of the iteration's start, every observation after the first step would differ.
    settings = {"policy": probes.linear_gaussian(2, 2), "value": probes.linear_value(2)}
    config = small_config(probes.RecordAction(-3.0, 1.0, (2,)), normalize_observations=True, **settings)
    raw = config.replace(normalize_observations=False)

    def collect(state):
        def policy_apply(params, observation):
            std = jnp.sqrt(state.learner.statistics.variance)
            normalized = jnp.clip((observation - state.learner.statistics.mean) / std, -10, 10)
            return config.policy.apply(params, normalized)

        agent = make_agent(raw.replace(policy=Network(config.policy.init, policy_apply)))
        return rollout(agent, state.learner, state.actor, jax.random.fold_in(state.key, state.iteration))

    step, collect = jax.jit(train_step), jax.jit(collect)
    state, seen = jax.jit(init)(config, jax.random.key(0)), []
    # What the first policy sees in one rollout comes before all.
    key = jax.random.fold_in(state.key, 2**32 - 2)
    _, batch, _ = jax.jit(lambda s: rollout(make_agent(raw), s.learner, s.actor, key))(state)
    seen.append(np.asarray(batch.observation, np.float64).reshape(-1, 2))
    for _ in range(4):
        collected, batch, _ = collect(state)
        state, _ = step(config, state)
        np.testing.assert_allclose(state.actor.observation, collected.observation, rtol=1e-4, atol=1e-5)
        seen.append(np.asarray(batch.observation, np.float64).reshape(-1, 2))
        everything = np.concatenate(seen)
        assert float(state.learner.statistics.count) == len(everything)
        np.testing.assert_allclose(state.learner.statistics.mean, everything.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.learner.statistics.variance, everything.var(0), rtol=1e-4)


def test_without_normalisation_statistics_stay_untouched():
    before = jax.jit(init)(BASE, jax.random.key(0)).learner.statistics
    after = run_of(0)[0].learner.statistics
    assert same_bits(before, after)
    assert float(after.count) == 0 and (after.mean == 0).all() and (after.variance == 1).all()


# --- Known optima ------------------------------------------------------------------------------------------------

GAMMA = 0.5


def learned(env, *, gae_lambda=0.95, num_iterations=60, **changes):
    """Train with the default networks; (policy, value) as functions of an observation, and the metrics."""
    environment = make_environment(env)
    config = Config(
        env=environment,
        num_envs=8,
        num_steps=16,
        num_iterations=num_iterations,
        gamma=GAMMA,
        gae_lambda=gae_lambda,
        value_learning_rate=1e-2,
        value_minibatches=2,
        **{"max_kl": 0.02, **changes},
    )
    state, metrics = jax.jit(train)(config, jax.random.key(0))
    policy = functools.partial((config.policy or make_policy(environment)).apply, state.learner.policy_params)
    value = functools.partial(make_value(environment).apply, state.learner.value_params)
    return policy, value, metrics


def test_probe_one_action_and_one_step():
    policy, value, metrics = learned(probes.OneStep())
    np.testing.assert_allclose(value(jnp.zeros(1)), 1, atol=0.02)
    # With one action there is nothing to choose: no gradient, no step, and no harm.
    assert (metrics.accepted == 0).all() and (metrics.mean_kl == 0).all() and (metrics.entropy == 0).all()
    assert np.isfinite(policy(jnp.zeros(1)).logits).all()


def test_probe_two_steps_discount():
    _, value, _ = learned(probes.TwoSteps())
    np.testing.assert_allclose(value(jnp.array([[0.0], [1.0]])), [GAMMA, 1], atol=0.05)


def test_probe_rewarded_action():
    policy, value, metrics = learned(probes.RewardedAction())
    assert jax.nn.softmax(policy(jnp.ones(1)).logits)[1] > 0.95
    assert float(metrics.episode_return[-1]) > 0.9 > float(metrics.episode_return[0])
    np.testing.assert_allclose(value(jnp.ones(1)), 1, atol=0.15)


def test_probe_match_observation():
    policy, _, metrics = learned(probes.MatchObservation())
    probabilities = jax.nn.softmax(policy(jnp.array([[-1.0], [1.0]])).logits)
    assert probabilities[0, 0] > 0.95 and probabilities[1, 1] > 0.95
    assert float(metrics.episode_return[-1]) > 0.9


@pytest.mark.parametrize("gae_lambda", [0.0, 1.0])
def test_probe_a_time_limit_is_not_an_end(gae_lambda):
    _, value, _ = learned(probes.CutShort(), gae_lambda=gae_lambda)
    np.testing.assert_allclose(value(jnp.ones(1)), 1 / (1 - GAMMA), atol=0.05)  # as an end it would be 1


def test_probe_bootstraps_from_the_observation_before_the_reset():
    _, value, _ = learned(probes.LeapThenCut())
    np.testing.assert_allclose(value(jnp.array([[0.0], [1.0]])), [GAMMA, 1], atol=0.05)  # after it: 1/3


def test_probe_reach_target():
    policy, _, metrics = learned(probes.ReachTarget(), num_iterations=120, max_kl=0.05)
    observation = jnp.array([[-0.8], [0.0], [0.8]])
    np.testing.assert_allclose(policy(observation).mode(), observation / 2, atol=0.1)
    assert float(metrics.episode_return[-1]) > -0.05 > float(metrics.episode_return[0])


def test_probe_pair_of_choices():
    policy, _, metrics = learned(probes.PairOfChoices())
    assert policy(jnp.ones(1)).mode().tolist() == [1, 2]
    assert float(metrics.episode_return[-1]) > 1.8 > float(metrics.episode_return[0])


class ReachUnit(probes.Probe):
    """One step; the reward is minus the distance to a target, in units of its own size."""

    def __init__(self, low, high, target):
        self.actions, self.target = probes.box(low, high), target

    def start(self, key):
        return jnp.int32(1)

    def move(self, key, state, action):
        return state, -jnp.sum(jnp.abs(action - self.target)) / abs(self.target), True, False


def small_networks(env):
    environment = make_environment(env)
    policy, value = make_policy(environment, hidden=(8,)), make_value(environment, hidden=(8,))
    return Config(
        env=environment, policy=policy, value=value, num_envs=8, num_steps=16, fisher_fraction=1.0, max_kl=0.05
    )


@pytest.mark.slow
@pytest.mark.parametrize("low, high, target", [(5, np.inf, 8.0), (0.0, 5e6, 4.5e6), (-np.inf, -3.0, -4.0)])
def test_bounds_on_one_side_or_far_apart_can_be_learned(low, high, target):
    config = small_networks(ReachUnit(low, high, target)).replace(num_iterations=60)
    state, _ = jax.jit(train)(config, jax.random.key(0))
    assert evaluate(config, state, jax.random.key(1), num_episodes=2).episode_return.min() > -0.1


@pytest.mark.slow
def test_a_deviation_does_not_run_away_under_an_entropy_bonus():
    config = small_networks(ReachUnit(-1.0, 1.0, 0.3)).replace(
        num_steps=64, max_kl=0.01, num_iterations=100, entropy_coefficient=2.0
    )
    state, metrics = jax.jit(train)(config, jax.random.key(0))
    log_std = float(state.learner.policy_params["log_std"][0])
    assert 1.5 < log_std < 2.5 and metrics.accepted[-20:].mean() > 0.5
    # Without the bonus it comes back, at first slowly: most actions are clipped.
    step = jax.jit(train_step)
    for _ in range(40):
        state, _ = step(config.replace(entropy_coefficient=0.0), state)
    assert float(state.learner.policy_params["log_std"][0]) < log_std - 0.1


# --- Shortcuts that change nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("truncations", ["none", "once", "twice", "last", "every"])
@pytest.mark.parametrize("num_steps", [1, 6])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_values_of_next_observations_without_evaluating_each(truncations, num_steps, backend, monkeypatch):
    monkeypatch.setattr("trpo_jax.backend.platform", lambda: backend)
    rng = np.random.default_rng(0)
    shape = num_steps, 4
    observation = rng.normal(size=(num_steps + 1, 4, 2)).astype(np.float32)
    truncated = np.zeros(shape, bool)
    if truncations == "once":
        truncated[rng.integers(0, num_steps, 4), np.arange(4)] = [True, True, False, True]
    elif truncations == "twice":
        truncated[[0, num_steps // 2], 1] = True
    elif truncations == "last":
        truncated[[0, -1], 2] = True
    elif truncations == "every":
        truncated[:] = True
    terminated = rng.random(shape) < 0.2
    terminated[0, 1] = True  # both flags at once: terminated wins
    done = truncated | terminated
    after = np.where(done[..., None], rng.normal(size=(*shape, 2)), observation[1:]).astype(np.float32)
    flat = jnp.zeros(shape)
    batch = Transition(observation[:-1], flat, flat, *map(jnp.asarray, (terminated, truncated)), jnp.asarray(after))

    def value_fn(observation):
        sizes.append(observation.size // 2)
        return observation @ jnp.array([1.0, -2.0])

    sizes = []
    values = value_fn(batch.observation)
    for limit in (num_steps, 1, None):
        find = jax.jit(jax.vmap(lambda batch, limit=limit: next_values(batch, values, value_fn, max_steps=limit)))
        del sizes[:]
        found = find(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], batch))[0]
        np.testing.assert_allclose(found[~terminated], value_fn(after)[~terminated], rtol=1e-5, atol=1e-6)
        one_of_each = 2 * limit >= num_steps if limit else backend == "cpu"  # step of each environment at a time
        assert max(sizes[:-1]) == (4 if one_of_each else 4 * num_steps)


# On a CPU agents take turns, which keeps the bits of each; an accelerator batches their products and rounds otherwise.
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators run many agents in lockstep")
def test_many_agents_with_many_environments_keep_the_bits_of_each_alone():
    config = small_config(probes.Countdown(), num_envs=32, normalize_observations=True)
    keys = jax.random.split(jax.random.key(0), 3)
    first = jax.jit(jax.vmap(init, in_axes=(None, 0)))(config, keys)  # the default compiler options: bits are compared
    together, metrics = jax.jit(jax.vmap(train_step, in_axes=(None, 0)))(config, first)
    alone = jax.jit(train_step)
    for i in range(3):
        assert same_bits(lane((together, metrics), i), alone(config, lane(first, i)))
