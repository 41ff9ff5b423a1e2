"""Networks that do not fit the environment or the trainer, refused in one sentence before anything runs."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import probes
import pytest
from probes import linear_gaussian, linear_policy, linear_value, small_config

from trpo_jax import Categorical, Config, DiagonalGaussian, MultiCategorical, Network, UsageError, init, train


def multi(*sizes):
    def init(key, observation):
        return {"w": jnp.zeros((1, sum(sizes)))}

    def apply(params, observation):
        logits = observation @ params["w"]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
        return MultiCategorical(tuple(jnp.split(logits, ends, axis=-1)))

    return Network(init, apply)


def changed(network, function):
    return network._replace(apply=lambda *inputs: function(network.apply(*inputs)))


def remembering(after):
    network = linear_policy()
    return Network(network.init, lambda p, carry, o: (after(carry), network.apply(p, o)), lambda: jnp.zeros(2))


BOX = probes.ReachTarget()
WRONG = {
    "too many logits": (
        None,
        {"policy": linear_policy(1, 3)},
        r"^policy chooses among 3 actions, but .* has 2: Discrete",
    ),
    "too few logits": (
        None,
        {"policy": linear_policy(1, 1)},
        r"^policy chooses among 1 actions, but \w+ has 2: Discrete",
    ),
    "a choice for a box": (
        BOX,
        {"policy": linear_policy()},
        r"^policy returns actions int32\[3\] for 3 observations, which",
    ),
    "a float for a choice": (
        None,
        {"policy": linear_gaussian()},
        r"^policy returns actions float32\[3, 1\] for 3 obs.*fit",
    ),
    "too many dimensions": (
        BOX,
        {"policy": linear_gaussian(1, 2)},
        r"^policy returns actions float32\[3, 2\] for 3 obse",
    ),
    "wrong sizes": (
        probes.PairOfChoices(),
        {"policy": multi(3, 2)},
        r"^policy chooses among 3 x 2 actions, .* has 2 x 3",
    ),
    "one choice of two": (
        probes.PairOfChoices(),
        {"policy": linear_policy()},
        r"^policy returns actions int32\[3\] for 3",
    ),
    "no batch": (
        None,
        {"policy": changed(linear_policy(), lambda d: Categorical(d.logits[0]))},
        r"^policy returns actions int32\[\] for 3 observations",
    ),
    "an axis too many": (
        BOX,
        {"policy": changed(linear_gaussian(), lambda d: DiagonalGaussian(d.mean[..., None], d.log_std[..., None]))},
        r"^policy returns actions float32\[3, 1, 1\]",
    ),
    "no distribution": (
        None,
        {"policy": changed(linear_policy(), lambda d: d.logits)},
        r"^policy must return a distribution such as Categorical\(logits\), but returns an array, which has no sample",
    ),
    "values [B, 1]": (
        None,
        {"value": changed(linear_value(), lambda v: v[..., None])},
        r"^value must return values as floats of the batch shape of its observations, \[2, 3\] for \[2, 3, \.\.\.\], "
        r"but returns float32\[2, 3, 1\]",
    ),
    "one value": (
        None,
        {"value": changed(linear_value(), jnp.mean)},
        r"^value must return values .*returns float32\[\]",
    ),
    "integer values": (
        None,
        {"value": changed(linear_value(), lambda v: v.astype(int))},
        r"^value must return values as floats .*returns int32\[2, 3\]",
    ),
    "another carry": (
        None,
        {"policy": remembering(lambda c: c[..., :1])},
        r"^policy must return a carry like its initial_carry, .*\(3, 2\).* but returns .*\(3, 1\)",
    ),
    "a module": (
        None,
        {"policy": nn.Dense(2)},
        r"^policy must be None or a trpo_jax\.Network\(init, apply\)",
    ),
    "a function": (None, {"value": jnp.sum}, r"^value must be None or a trpo_jax\.Network\(init, apply\)"),
    "integer parameters": (
        None,
        {"policy": linear_policy()._replace(init=lambda *_: {"w": jnp.zeros((1, 2)), "b": jnp.zeros(2, int)})},
        r"^policy\['b'\] is an array of int32, which has no gradient; keep it out of the parameters and close over it",
    ),
    "no parameters": (
        None,
        {"value": Network(lambda *_: {}, lambda p, o: jnp.zeros(o.shape[:-1]))},
        r"^value has no array in it, so there is nothing to train",
    ),
}


@pytest.mark.parametrize("env, changes, message", WRONG.values(), ids=WRONG.keys())
def test_networks_that_do_not_fit_are_refused_in_one_sentence(env, changes, message):
    settings = {"policy": linear_gaussian()} if env is BOX else {}
    with pytest.raises(UsageError, match=message) as error:
        config = small_config(env, **{**settings, **changes})
        jax.eval_shape(functools.partial(train, config), jax.random.key(0))
    assert "\n" not in str(error.value)


class Normalising(nn.Module):
    @nn.compact
    def __call__(self, observation):
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(4)(observation))
        return Categorical(nn.Dense(2)(x))


def test_running_averages_are_not_trained():
    module = Normalising()
    with pytest.raises(UsageError, match=r"^policy\['batch_stats'\].* is a running average, which a gradient must not"):
        jax.eval_shape(lambda: init(small_config(policy=Network(module.init, module.apply)), jax.random.key(0)))
    averages = module.init(jax.random.key(0), jnp.zeros(1))["batch_stats"]
    policy = Network(
        lambda key, observation: {"params": module.init(key, observation)["params"]},
        lambda params, observation: module.apply({**params, "batch_stats": averages}, observation),
    )
    jax.eval_shape(lambda: init(small_config(policy=policy), jax.random.key(0)))


def test_networks_that_fit_are_let_in():
    for env, policy in (
        (probes.PairOfChoices(), multi(2, 3)),
        (BOX, linear_gaussian()),
        (None, remembering(lambda c: c + 1)),
    ):
        jax.eval_shape(lambda env=env, policy=policy: init(small_config(env, policy=policy), jax.random.key(0)))


@pytest.mark.parametrize(
    "changes", [{"policy": probes.linear_policy()}, {"value": probes.linear_policy()}], ids=["policy", "value"]
)
def test_one_network_from_outside_is_looked_at_beside_a_default_one(changes):
    with pytest.raises(UsageError, match=r"policy chooses among 2 actions|value must return values"):
        jax.eval_shape(lambda key: init(Config(env=probes.OneStep(), **changes), key), jax.random.key(0))
