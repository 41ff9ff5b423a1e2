"""A callback within the program: called when it is due, on what `train_step` gives, without a mark on training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from probes import lane, same_bits, small_config

from trpo_jax import UsageError, evaluate, init, train, train_step
from trpo_jax.training.evaluation import evaluate_in_training

pytestmark = pytest.mark.long

CONFIG = small_config(probes.MatchObservation(), num_iterations=7)
KEY = jax.random.key(3)


@functools.cache
def plain():
    return jax.jit(train)(CONFIG, KEY)


def watched(callback, every, config=CONFIG):
    return jax.jit(functools.partial(train, callback=callback, every=every))(config, KEY)


@pytest.mark.parametrize("every, due", [(3, [3, 6]), (8, [])])
def test_it_sees_each_state_that_is_due_and_changes_none(every, due):
    state, metrics, (states, rows, number) = watched(lambda config, state, metrics: (state, metrics, 2.5), every)
    assert same_bits((state, metrics), plain())
    assert np.asarray(states.iteration).tolist() == due and np.asarray(number).tolist() == [2.5] * len(due)
    step, at = jax.jit(train_step), jax.jit(init)(CONFIG, KEY)
    for i in range(1, 8):
        at, row = step(CONFIG, at)
        if i in due:
            assert same_bits((lane(states, due.index(i)), lane(rows, due.index(i))), (at, row))


def test_it_is_given_the_settings_and_may_evaluate():
    def judge(config, state, metrics):
        return config.gamma, evaluate(config, state, jax.random.key(1), num_episodes=5).episode_return

    *_, (gamma, returns) = watched(judge, 3, CONFIG.replace(gamma=0.25))
    assert np.asarray(gamma).tolist() == [0.25, 0.25] and returns.shape == (2, 5)
    states = watched(lambda config, state, metrics: state, 3, CONFIG.replace(gamma=0.25))[2]
    for i in range(2):
        expected = evaluate(CONFIG, lane(states, i), jax.random.key(1), num_episodes=5).episode_return
        np.testing.assert_array_equal(returns[i], expected)


def test_under_vmap_it_runs_for_every_agent_when_due_and_only_then():
    seen = []

    def note(config, state, metrics):
        jax.debug.callback(lambda at, _: seen.append(int(at)), state.iteration, metrics.mean_kl)  # of each agent
        return state.iteration, metrics.mean_kl

    keys = jax.random.split(KEY, 3)
    run = jax.jit(jax.vmap(functools.partial(train, callback=note, every=2), in_axes=(None, 0)))
    _, metrics, (iterations, kl) = run(CONFIG, keys)
    jax.effects_barrier()
    assert sorted(seen) == [2, 2, 2, 4, 4, 4, 6, 6, 6]
    assert np.asarray(iterations).tolist() == [[2, 4, 6]] * 3
    np.testing.assert_array_equal(kl, metrics.mean_kl[:, 1:6:2])


def test_without_one_the_program_is_the_plain_scan():
    def reference(config, key):
        return jax.lax.scan(lambda s, _: train_step(config, s), init(config, key), None, length=7)

    assert str(jax.make_jaxpr(train)(CONFIG, KEY)) == str(jax.make_jaxpr(reference)(CONFIG, KEY))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"callback": lambda *_: jnp.ones(2), "every": 0}, "every must be a whole number from 1 to 10,000,000, got 0."),
        ({"callback": 3}, r"callback must be a function of \(config, state, metrics\), got 3."),
    ],
)
def test_what_cannot_be_called_back_is_refused(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        train(CONFIG, KEY, **options)


# --- Evaluation during training ----------------------------------------------------------------------------------


class Growing(probes.Probe):
    """One step that earns the policy's Gaussian action: what is learned shows in each evaluation by the mode."""

    actions = probes.box(-1000.0, 1000.0)

    def start(self, key):
        return jnp.int32(1)

    def move(self, key, state, action):
        return state, jnp.sum(action), True, False


def growing(**settings):
    networks = {"policy": probes.linear_gaussian(), "value": probes.linear_value()}
    return small_config(Growing(), **networks, num_iterations=7, eval_every=2, eval_episodes=5, **settings)


@functools.cache
def grown():
    return jax.jit(train)(growing(), KEY)


def test_evaluations_are_stacked_and_change_no_bit():
    state, metrics, evaluations = grown()
    assert same_bits((state, metrics), jax.jit(train)(growing().replace(eval_every=0), KEY))
    assert evaluations.episode_return.shape == evaluations.finished.shape == (3, 5)
    states = jax.jit(functools.partial(train, callback=lambda c, s, m: s, every=2))(growing(), KEY)[3]
    for i, returns in enumerate(evaluations.episode_return):
        np.testing.assert_array_equal(returns, evaluate_in_training(growing(), lane(states, i)).episode_return)
    means = np.asarray(evaluations.episode_return).mean(axis=1)
    assert means[0] < means[1] < means[2]  # by the mode: no noise


def test_it_samples_where_asked_and_draws_anew_each_time_and_for_the_choice():
    config = growing(eval_stochastic=True)
    state, _, evaluations = jax.jit(train)(config, KEY)
    evaluated = [evaluate_in_training(config, state, anew=anew).episode_return for anew in (False, True)]
    noise = [row - row.mean() for row in map(np.asarray, (*evaluations.episode_return, *evaluated))]
    assert all(len(set(row)) == 5 for row in noise)
    assert all(not np.allclose(a, b, atol=1e-3) for i, a in enumerate(noise) for b in noise[:i])


def test_an_agent_that_has_reached_the_return_stays_and_others_go_on():
    _, rows, evaluations = grown()
    means = np.asarray(evaluations.episode_return).mean(axis=1)
    goal = float(means[:2].mean())  # reached at the second evaluation, after iteration 4
    states = jax.jit(functools.partial(train, callback=lambda c, s, m: s))(growing(), KEY)[3]
    state, metrics, stopped = jax.jit(train)(growing(stop_at_return=goal), KEY)
    assert same_bits(state, lane(states, 3)) and int(state.iteration) == 4
    assert same_bits(lane(metrics, slice(4)), lane(rows, slice(4)))
    assert np.isnan(metrics.mean_kl[4:]).all() and (metrics.num_episodes[4:] == 0).all()
    np.testing.assert_array_equal(stopped.episode_return, evaluations.episode_return[jnp.array([0, 1, 1])])

    # Another key has another course: a goal between the two ends one and lets the other go on.
    keys = jnp.stack([KEY, jax.random.key(5)])
    run = jax.jit(jax.vmap(train, in_axes=(None, 0)))
    _, _, both = run(growing(), keys)
    ends = np.asarray(both.episode_return).mean(axis=-1)[:, 1]
    assert abs(ends[0] - ends[1]) > 1e-3
    first = int(np.argmax(ends))
    after, *_ = run(growing(stop_at_return=float(ends.mean())), keys)
    assert after.iteration[first] <= 4 and after.iteration[1 - first] > 4


def test_before_its_goal_nothing_is_frozen():
    state, metrics, _ = jax.jit(train)(growing(stop_at_return=1e29), KEY)
    assert same_bits((state, metrics), grown()[:2])


def test_more_iterations_than_there_are_are_refused():
    with pytest.raises(UsageError, match="eval_every=8 is more than num_iterations=7, so nothing would be eval"):
        train(growing().replace(eval_every=8), KEY)
