"""Observations of several entries, what each network sees of them, and masks of legal actions."""

import dataclasses
import functools

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from gymnasium import spaces
from probes import small_config

from trpo_jax import (
    Categorical,
    Config,
    Discrete,
    Environment,
    MultiDiscrete,
    UsageError,
    append_time,
    check_environment,
    evaluate,
    flatten_observations,
    hide_entries,
    init,
    make_environment,
    make_policy,
    make_value,
    stack_frames,
    train,
    validate,
)
from trpo_jax.deployment import acting_policy, export_policy
from trpo_jax.environments.hidden_entries import keep_entries
from trpo_jax.playing import play
from trpo_jax.training.agents import make_agent
from trpo_jax.training.rollouts import rollout

CAMERA = (4, 4, 2)


class Guessing(probes.Probe):
    """One step; the reward is a number that only the privileged entry tells."""

    def start(self, key):
        return jax.random.uniform(key, (), minval=-1.0)

    def observe(self, state):
        return {
            "privileged_state": jnp.array([state, 0.0]),
            "camera": jnp.full(CAMERA, state * 0),
            "speed": jnp.zeros(3),
            "nested": {"a": jnp.zeros((2, 2)), "b": state * 0},
        }

    def move(self, key, state, action):
        return state, state, True, False


class Forbidden(probes.Probe):
    """Three steps; action t is illegal at time t, and pays 100. The others pay nothing."""

    actions = probes.discrete(4)

    def start(self, key):
        return jnp.int32(0)

    def move(self, key, state, action):
        return state + 1, 100.0 * (action == state), state >= 2, False

    def action_mask(self, state):
        return jnp.arange(4) != state


def entries_environment(space=None, **entries):
    """Networks look at spaces and shapes only."""
    size = sum(int(np.prod(shape)) for shape in entries.values())
    return Environment("shapes", (size,), space or Discrete(3), None, None, None, entries=entries)


def apply(network, observation, seed=0):
    return network.apply(network.init(jax.random.key(seed), observation[0]), observation)


def test_a_dictionary_is_one_vector_whose_parts_are_known():
    environment = make_environment(Guessing())
    assert environment.entries == {"camera": CAMERA, "nested": (5,), "privileged_state": (2,), "speed": (3,)}
    assert environment.observation_shape == (42,)
    observation = jnp.arange(2 * 42.0).reshape(2, 42)
    parts = environment.split(observation)
    np.testing.assert_array_equal(parts["camera"][1], jnp.arange(42.0, 74).reshape(CAMERA))
    np.testing.assert_array_equal(parts["privileged_state"], [[37, 38], [79, 80]])
    first, state = environment.reset(jax.random.key(0))
    assert first[37] != 0 and environment.step(jax.random.key(1), state, 0).observation[37] == first[37]
    assert check_environment(Guessing()) == []


def test_each_network_sees_its_entries_alone():
    environment = make_environment(Guessing())
    observation = jax.random.normal(jax.random.key(0), (5, 42))
    other = {"camera": observation.at[:, 0].add(1), "privileged_state": observation.at[:, 37].add(1)}

    def value(view):
        return make_value(environment, observation=view)

    networks = {
        "policy": (lambda o: apply(make_policy(environment), o).logits, {"camera"}),
        "value": (lambda o: apply(make_value(environment), o), {"camera"}),
        "privileged": (
            lambda o: apply(value("privileged_state"), o),
            {"privileged_state"},
        ),
        "both": (lambda o: apply(value("privileged_state,camera"), o), other.keys()),
        "dense": (lambda o: apply(make_policy(environment, network="mlp"), o).logits, {"camera"}),
    }
    for name, (outputs, seen) in networks.items():
        changed = {entry for entry, o in other.items() if not np.array_equal(outputs(o), outputs(observation))}
        assert changed == set(seen), name


@pytest.mark.parametrize("shape, network", [(CAMERA, "auto"), ((6,), "auto"), ((2, 3), "gru")], ids=str)
def test_one_visible_entry_is_a_single_observation(shape, network):
    plain = Environment("plain", shape, Discrete(3), None, None, None)
    environment = entries_environment(action_mask=(3,), observation=shape)
    observation = jax.random.normal(jax.random.key(0), (5, *shape))
    flat = jnp.concatenate([jnp.ones((5, 3)), observation.reshape(5, -1)], axis=-1)
    policies = make_policy(plain, network=network), make_policy(environment, network=network)
    params = policies[0].init(jax.random.key(1), observation[0])
    assert jax.tree.all(jax.tree.map(np.array_equal, params, policies[1].init(jax.random.key(1), flat[0])))
    carry = (jnp.zeros((5, 64)),) if network == "gru" else ()
    outputs = [policy.apply(params, *carry, o) for policy, o in zip(policies, (observation, flat), strict=True)]
    jax.tree.map(np.testing.assert_array_equal, *outputs)


def test_a_cnn_has_convolutions_for_each_picture_and_takes_vectors_beside_them():
    environment = entries_environment(front=CAMERA, speed=(3,), back=(5, 5, 1), place=(2, 2))
    policy = make_policy(environment, channels=(4,), hidden=(8,))
    params = policy.init(jax.random.key(0), jnp.zeros(64))["params"]
    assert [params[f"Conv_{i}"]["kernel"].shape for i in range(2)] == [(3, 3, 2, 4), (3, 3, 1, 4)]
    assert params["Dense_0"]["kernel"].shape == (4 * 16 + 4 * 25 + 3 + 4, 8)
    assert apply(policy, jnp.zeros((2, 5, 64))[0]).logits.shape == (5, 3)
    policy = make_policy(environment, network="mlp", hidden=(8,))
    assert policy.init(jax.random.key(0), jnp.zeros(64))["params"]["Dense_0"]["kernel"].shape == (64, 8)


@pytest.mark.long
def test_a_value_function_that_sees_more_explains_more():
    explained = {}
    for view in ("auto", "privileged_state", "speed, privileged_state"):
        config = small_config(Guessing(), policy=None, value=None, num_iterations=8, num_envs=32, num_steps=8)
        config = config.replace(value_observation=view, network="mlp", gae_lambda=1.0)
        assert make_agent(config).environment.observation_shape == ((40,) if view == "auto" else (42,))
        explained[view] = jax.jit(train)(config, jax.random.key(0))[1].explained_variance[-1]
    assert explained["auto"] < 0.1 and min(explained["privileged_state"], explained["speed, privileged_state"]) > 0.9


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"value_observation": "sped"},
            r"^value_observation names 'sped', but .* of Guessing have the entries camera,",
        ),
        ({"value_observation": "speed,"}, r"^value_observation names '', but"),
        (
            {"env": "CartPole-v1", "value_observation": "x"},
            r"^value_observation=x names entries, but .* of CartPole",
        ),
        (
            {"network": "cnn", "value_observation": "speed"},
            r"^network=cnn needs observations .* has \(3,\)\.$",
        ),
        ({"shared_trunk": True, "value_observation": "speed"}, r"^value_observation=speed needs shared_trunk=False"),
    ],
)
def test_what_cannot_be_seen_is_said_in_one_sentence(settings, message):
    with pytest.raises(UsageError, match=message):
        make_agent(Config(**{"env": Guessing(), **settings}))
    for value in ("", 3, None):
        with pytest.raises(UsageError, match=r"^value_observation must be text, got"):
            validate(Config(value_observation=value))


# Masks


@pytest.mark.long
def test_illegal_actions_are_never_taken_and_their_mask_is_kept():
    config = small_config(Forbidden(), policy=None, value=None, num_envs=8, num_steps=12, entropy_coefficient=0.1)
    config = config.replace(normalize_observations=True)  # which a mask must not see
    agent, state = make_agent(config), init(config, jax.random.key(0))
    _, batch, _ = rollout(agent, state.learner, state.actor, jax.random.key(1))
    assert agent.environment.entries == {"action_mask": (4,), "observation": (1,)}
    parts = agent.environment.split(batch.observation)
    np.testing.assert_array_equal(parts["action_mask"], np.arange(4) != parts["observation"])
    assert (batch.action != parts["observation"][..., 0]).all() and len(np.unique(batch.action)) == 4
    state, metrics = jax.jit(train)(config, jax.random.key(0))
    assert (metrics.episode_return == 0).all() and (metrics.finite == 1).all() and metrics.accepted.any()
    assert (metrics.entropy <= np.log(3) + 1e-6).all() and metrics.entropy[0] > 1.09
    for deterministic in (True, False):
        found = evaluate(config, state, jax.random.key(2), num_episodes=8, deterministic=deterministic)
        assert (found.episode_return == 0).all() and found.finished.all()
    act, _ = acting_policy(config, state)
    illegal = act((), jnp.array([[0.0, 1, 1, 1, 0], [1, 1, 0, 1, 2], [0, 0, 0, 1, 0]]))[1]
    assert (illegal != np.array([0, 2, 0])).all() and illegal[2] == 3
    assert check_environment(Forbidden()) == []


@pytest.mark.parametrize("space, sizes", [(Discrete(5), (5,)), (MultiDiscrete((2, 3)), (2, 3))], ids=str)
def test_a_masked_policy_is_the_restricted_distribution(space, sizes):
    environment = entries_environment(space, action_mask=(5,), observation=(4,))
    masked = make_policy(environment)
    free = make_policy(dataclasses.replace(environment, action_mask=lambda o: o[..., :5] >= 0))
    mask = np.array([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [1, 1, 0, 0, 1]])
    observation = jnp.concatenate([mask, jax.random.normal(jax.random.key(0), (3, 4))], axis=-1)
    params = [jax.tree.map(lambda w: 30 * w, masked.init(jax.random.key(s), observation[0])) for s in (1, 2)]
    old, new = (masked.apply(p, observation) for p in params)
    tangent = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), old)
    product = old.fisher_product(tangent)
    unmasked = [jax.tree.leaves(free.apply(p, observation)) for p in params]
    for n in range(3):
        entropy, kl, log_prob, action = 0, 0, 0, []
        for k, choices in enumerate(np.split(mask[n], np.cumsum(sizes)[:-1])):
            legal = np.flatnonzero(choices)
            p, q = (Categorical(leaves[k][n][legal]) for leaves in unmasked)
            action.append(int(legal[-1]))
            entropy, kl = entropy + p.entropy(), kl + p.kl(q)
            log_prob += p.log_prob(jnp.int32(len(legal) - 1))
            direction = jax.tree.leaves(tangent)[k][n]
            expected = np.zeros(sizes[k])
            expected[legal] = p.fisher_product(Categorical(direction[legal])).logits
            np.testing.assert_allclose(jax.tree.leaves(product)[k][n], expected, rtol=1e-4, atol=1e-6)
            probabilities = jax.nn.softmax(jax.tree.leaves(old)[k][n])
            np.testing.assert_array_equal(np.flatnonzero(probabilities), legal)  # elsewhere exactly 0
        taken = jnp.broadcast_to(jnp.array(action).reshape(space.shape), (3, *space.shape))
        found = [old.entropy()[n], old.kl(new)[n], old.log_prob(taken)[n]]
        np.testing.assert_allclose(found, [entropy, kl, log_prob], rtol=1e-5)
    np.testing.assert_array_equal(old.kl(old), 0)


class OnlyInfo(Forbidden):
    action_mask = None

    def step(self, key, state, action):
        *values, info = super().step(key, state, action)
        return *values, {**info, "action_mask": jnp.ones(4, bool)}


class TooShort(Forbidden):
    def action_mask(self, state):
        return jnp.ones(3, bool)


class NoChoice(Forbidden):
    actions = probes.box(-1, 1)


@pytest.mark.parametrize(
    "probe, message",
    [
        (
            OnlyInfo,
            r"OnlyInfo\.step returns info\['action_mask'\], but its reset returns no info, .* a method action_mask",
        ),
        (TooShort, r"^action_mask of TooShort must have an entry for each action, 4 in all, got 3\.$"),
        (NoChoice, r"^NoChoice has a mask of legal actions, action_mask, but its actions are not discrete"),
    ],
)
def test_masks_that_do_not_fit_are_refused_in_one_sentence(probe, message):
    with pytest.raises(UsageError, match=message):
        make_environment(probe())


def test_an_environment_of_ones_own_declares_its_entries():
    environment = make_environment(Forbidden())
    assert make_environment(dataclasses.replace(environment)).entries == environment.entries
    with pytest.raises(UsageError, match=r"^entries of Forbidden have 6 numbers, but observation_shape is \(5,\)"):
        make_environment(dataclasses.replace(environment, entries={"action_mask": (4,), "observation": (2,)}))


# Wrappers


def test_wrappers_keep_entries_and_the_newest_mask():
    environment = dataclasses.replace(make_environment(Forbidden()), max_steps=3)
    stacked = append_time(stack_frames(environment, 2))
    assert stacked.entries == {"action_mask": (4,), "observation": (2,), "time": (1,)}
    observation, state = stacked.reset(jax.random.key(0))
    np.testing.assert_allclose(observation, [0, 1, 1, 1, 0, 0, 0])
    step = stacked.step(jax.random.key(0), state, jnp.int32(3))
    np.testing.assert_allclose(step.observation, [1, 0, 1, 1, 0, 1, 1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(stacked.action_mask(step.observation[None]), [[1, 0, 1, 1]])
    guess = make_environment(Guessing())
    assert flatten_observations(guess).entries["camera"] == (32,)
    frames = stack_frames(guess, 2)
    assert frames.entries["camera"] == (4, 4, 4) and frames.observation_shape == (84,)
    first, _ = guess.reset(jax.random.key(0))
    both = frames.split(frames.reset(jax.random.key(0))[0])["privileged_state"]
    np.testing.assert_array_equal(both, jnp.tile(guess.split(first)["privileged_state"], 2))


def test_what_a_mask_follows_from_is_kept():
    environment = entries_environment(state=(2,), privileged_state=(3,))
    masked = dataclasses.replace(environment, action_mask=lambda o: o[..., 2:] > 0)
    assert keep_entries(environment, ["state"]).entries == {"state": (2,)}
    assert keep_entries(masked, ["state"]) is masked
    with pytest.raises(UsageError, match=r"^the legal actions of shapes depend on its whole observation"):
        hide_entries(masked, ["state"])
    with pytest.raises(UsageError, match=r"^observations of CartPole-v1 are single arrays, and have no entries"):
        make_environment("CartPole-v1").split(jnp.zeros(4))


def test_entries_are_hidden_by_name():
    guess = make_environment(Guessing())
    hidden = hide_entries(guess, ["camera", "nested"])
    assert hidden.entries == {"privileged_state": (2,), "speed": (3,)} and hidden.observation_shape == (5,)
    np.testing.assert_array_equal(hidden.reset(jax.random.key(0))[0], guess.reset(jax.random.key(0))[0][37:])
    masked = make_environment(Guessing())
    for names in (["x"], "camera", [0], list(guess.entries)):
        with pytest.raises(UsageError, match=r"^hidden must be names among the entries of Guessing, camera, nested, "):
            hide_entries(masked, names)
    with pytest.raises(UsageError, match=r"^hidden must be names among the entries of Forbidden, observation, "):
        hide_entries(make_environment(Forbidden()), ["action_mask"])


# Gymnasium


class Turnstile(gymnasium.Env):
    """Four steps; at each one action is legal, which info says alone. An illegal one pays −1."""

    def __init__(self, dictionary=False, render_mode=None):
        place = spaces.Box(0, 1, (2,))
        self.action_space = spaces.Discrete(3)
        self.observation_space = spaces.Dict(place=place, privileged=spaces.Discrete(4)) if dictionary else place
        self.dictionary = dictionary

    def observe(self):
        place = np.array([self.time % 2, 0.5], np.float32)
        observation = {"place": place, "privileged": self.time % 4} if self.dictionary else place
        return observation, {"action_mask": np.arange(3) == self.time % 3}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe()

    def step(self, action):
        reward = -float(action != self.time % 3)
        self.time += 1
        observation, info = self.observe()
        return observation, reward, False, False, ({} if self.time == 4 else info)


@pytest.mark.parametrize("dictionary", [pytest.param(False, marks=pytest.mark.long), True])
def test_gymnasium_says_in_its_info_which_actions_are_legal(dictionary, tmp_path, capsys):
    name = f"Turnstile{dictionary}-v0"
    gymnasium.register(name, functools.partial(Turnstile, dictionary), max_episode_steps=4)
    try:
        config = small_config(f"gymnasium/{name}", policy=None, value=None, num_envs=2, num_steps=8)
        config = config.replace(num_iterations=2, value_observation="privileged,place" if dictionary else "auto")
        environment = make_agent(config).environment
        expected = {"place": (2,), "privileged": (4,)} if dictionary else {"observation": (2,)}
        assert environment.entries == {**expected, "action_mask": (3,)}
        state, metrics = jax.jit(train)(config, jax.random.key(0))
        assert (metrics.episode_return == 0).all() and (metrics.entropy == 0).all()
        assert (evaluate(config, state, jax.random.key(1), num_episodes=2).episode_return == 0).all()
        assert (play(config, state, name, num_episodes=2) == 0).all()
        with pytest.raises(UsageError, match=r"^CartPole-v1 observes .* was trained on observations of .*action_mask"):
            play(config, state, "CartPole-v1")
        export_policy(config, state, tmp_path)
        script = (tmp_path / "load_policy.py").read_text()
        assert "action_mask [3]" in script and "privileged" not in script  # what the value function alone has seen
        act, _ = acting_policy(config, state)
        assert act((), jnp.array([[0, 0.5, 0, 0, 1.0]]))[1].item() == 2
    finally:
        del gymnasium.registry[name]
