"""What takes networks and samples to see: neighbouring states, and how unevenly a step spreads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import trpo_jax
from experiments.article.drawing import FAINT, LIMITED, NATURAL, PLAIN, Findings, finish, panels
from experiments.article.problems import random_problems
from trpo_jax import Categorical, Config, gae, make_environment, make_policy
from trpo_jax.theory import certify, softmax_policy, tabular_trpo_step

train_steps = jax.jit(jax.vmap(trpo_jax.train_step, in_axes=(None, 0)))


init = jax.jit(jax.vmap(trpo_jax.init, in_axes=(None, 0)))


def trained(num_iterations: int, num_seeds: int, max_kl: float, key: Any) -> Any:
    """A configuration, agents trained by it on CartPole, and their metrics [num_seeds, num_iterations]."""
    config = Config(env="CartPole-v1", num_iterations=num_iterations, max_kl=max_kl)
    state = init(config, jax.random.split(key, num_seeds))
    rows = []
    for _ in range(config.num_iterations):
        state, metrics = train_steps(config, state)
        rows.append(metrics)
    return config, state, jax.tree.map(lambda *columns: np.stack(columns, axis=1), *rows)


def compute_neighbours(num_steps: int = 128, num_runs: int = 512, step_size: float = 3e-3) -> Findings:
    """CartPole: how alike the gradients of neighbouring states are, and what updating at every step does with it."""
    environment = make_environment("CartPole-v1")
    policy = make_policy(environment)

    def step_or_reset(key: Any, state: Any, action: Any) -> Any:
        step_key, reset_key = jax.random.split(key)
        result = environment.step(step_key, state, action)
        onward, start = (result.observation, result.state), environment.reset(reset_key)
        return result.reward, result.done, jax.tree.map(lambda a, b: jnp.where(result.done, a, b), start, onward)

    def collect(key: Any, distribution: Any) -> Any:
        def step(carry: Any, key: Any) -> Any:
            observation, state = carry
            action_key, step_key = jax.random.split(key)
            action = distribution(observation).sample(action_key)
            reward, done, onward = jax.vmap(step_or_reset)(jax.random.split(step_key, num_runs), state, action)
            return onward, (observation, action, reward, done)

        reset_key, run_key = jax.random.split(key)
        start = jax.vmap(environment.reset)(jax.random.split(reset_key, num_runs))
        _, batch = jax.lax.scan(step, start, jax.random.split(run_key, 2 * num_steps))
        zeros = jnp.zeros_like(batch[2])
        advantage = gae(batch[2], zeros, zeros, batch[3], batch[3] & False, gamma=0.99, gae_lambda=1.0)
        # The later half: by then the environments are at different points of their episodes.
        observation, action, advantage = (leaf[num_steps:] for leaf in (batch[0], batch[1], advantage))
        return observation, action, (advantage - advantage.mean()) / advantage.std()

    @jax.jit
    def measure() -> Any:
        keys = jax.random.split(jax.random.key(0), 3)
        params, unravel = ravel_pytree(policy.init(keys[0], jnp.zeros(environment.observation_shape)))

        def distribution(vector: Any, observation: Any) -> Categorical:
            return policy.apply(unravel(vector), observation)

        batch = collect(keys[1], lambda observation: distribution(params, observation))
        observation, action, advantage = (leaf.reshape(-1, *leaf.shape[2:]) for leaf in batch)
        sample = observation[:: max(1, action.size // 256)]
        old = distribution(params, sample)

        def objective(vector: Any, index: Any) -> Any:
            log_prob = distribution(vector, observation[index]).log_prob(action[index])
            return jnp.mean(advantage[index] * log_prob)

        whole = jax.grad(objective)(params, slice(None))

        def update(vector: Any, index: Any) -> Any:
            vector = vector + step_size * jax.grad(objective)(vector, index)
            gone = vector - params
            cosine = jnp.sum(gone * whole) / (jnp.linalg.norm(gone) * jnp.linalg.norm(whole))
            return vector, (old.kl(distribution(vector, sample)).mean(), cosine)

        # [2 R, T] samples: R trajectories, and as many draws from anywhere.
        along = jnp.arange(num_steps)[None] * num_runs + jnp.arange(num_runs)[:, None]
        order = jnp.concatenate([along, jax.random.randint(keys[2], along.shape, 0, along.size)])
        growth = jax.lax.map(lambda indices: jax.lax.scan(update, params, indices)[1], order, batch_size=32)
        averaged = old.kl(distribution(params + step_size * whole, sample)).mean()

        kernel_of = jax.vmap(lambda seen: jax.grad(lambda v: jnp.diff(distribution(v, seen).logits)[0])(params))
        jacobian = kernel_of(batch[0][:, 0])
        jacobian = jacobian / jnp.linalg.norm(jacobian, axis=1, keepdims=True)
        return growth, averaged, jacobian @ jacobian.T

    (kl, cosine), averaged, kernel = jax.tree.map(np.asarray, measure())
    names = ("trajectory", "scattered")
    kls = {name: np.median(rows, axis=0) for name, rows in zip(names, np.split(kl, 2), strict=True)}
    cosines = {name: np.mean(rows, axis=0) for name, rows in zip(names, np.split(cosine, 2), strict=True)}
    curves = {"kernel": kernel, "kl": kls, "cosine": cosines}
    half = num_steps // 2
    numbers = {
        "kernel_of_neighbours": np.median(np.diagonal(kernel, 1)),
        "kernel_of_any_two": np.median(kernel[np.triu_indices(num_steps, 1)]),
        "kernel_smallest": kernel.min(),
        "kl_after_all": {name: value[-1] for name, value in kls.items()},
        "growth_exponent": {name: np.log(v[half - 1] / v[half // 8 - 1]) / np.log(8) for name, v in kls.items()},
        "cosine_after_16": {name: value[min(15, num_steps - 1)] for name, value in cosines.items()},
        "cosine_after_all": {name: value[-1] for name, value in cosines.items()},
        "kl_of_one_averaged_update": averaged,
        "kl_of_separate_over_averaged": kls["trajectory"][-1] / averaged,
    }
    return Findings(curves, numbers)


def draw_neighbours(findings: Findings) -> Any:
    curves = findings.curves
    figure, (left, middle, right) = panels(3, width=4.1, height=3.6)
    image = left.imshow(curves["kernel"], cmap="RdBu_r", vmin=-1, vmax=1)
    figure.colorbar(image, ax=left, label="cosine of the gradients", shrink=0.8)
    left.set(title="gradients along one trajectory", xlabel="step", ylabel="step")
    for name, colour, label in (
        ("trajectory", PLAIN, "one update per step of a trajectory"),
        ("scattered", NATURAL, "as many updates, scattered samples"),
    ):
        count = np.arange(1, curves["kl"][name].size + 1)
        middle.plot(count, curves["kl"][name], color=colour, label=label)
        right.plot(count, curves["cosine"][name], color=colour, label=label)
    middle.axhline(findings.numbers["kl_of_one_averaged_update"], color=LIMITED, label="one update by the mean of all")
    right.axhline(1, color=LIMITED, label="one update by the mean of all")
    finish(
        middle,
        "upper left",
        xscale="log",
        yscale="log",
        title="how far the policy drifts",
        xlabel="updates",
        ylabel="mean KL from the first policy, nats",
    )
    finish(
        right,
        "lower right",
        xscale="log",
        title="… and in which direction",
        xlabel="updates",
        ylabel="cosine with the gradient of all samples",
    )
    return figure


def compute_spread(
    num_problems: int = 1000, num_seeds: int = 16, num_iterations: int = 48, max_kl: float = 0.01
) -> Findings:
    """Mean and largest KL of a step, on exact problems and while CartPole is learned."""

    @jax.jit
    @jax.vmap
    def step(logits: Any, mdp: Any) -> Any:
        new, _ = tabular_trpo_step(logits, mdp, max_kl=max_kl)
        return certify(softmax_policy(logits), softmax_policy(new), mdp)

    with jax.enable_x64(True):
        exact = step(*random_problems(num_problems))
    _, _, metrics = trained(num_iterations, num_seeds, max_kl, jax.random.key(0))
    accepted = np.asarray(metrics.accepted) > 0
    steps = {
        "exact": (np.asarray(exact.mean_kl), np.asarray(exact.maximum_kl)),
        "cartpole": (np.asarray(metrics.mean_kl)[accepted], np.asarray(metrics.maximum_kl)[accepted]),
    }
    numbers = {
        name: {
            "steps": values[0].size,
            "largest_mean_kl_over_delta": values[0].max() / max_kl,
            "median_mean_kl_over_delta": np.median(values[0]) / max_kl,
            "median_maximum_kl_over_delta": np.median(values[1]) / max_kl,
            "99_percent_maximum_kl_over_delta": np.quantile(values[1], 0.99) / max_kl,
        }
        for name, values in steps.items()
    }
    numbers["cartpole"]["accepted_share"] = accepted.mean()
    return Findings({"max_kl": max_kl, **steps}, numbers)


def draw_spread(findings: Findings) -> Any:
    curves = findings.curves
    figure, axes = panels(2, width=4.6)
    for panel, name, title in (
        (axes[0], "exact", "random MDPs, exact steps"),
        (axes[1], "cartpole", "CartPole-v1 in training"),
    ):
        bins = np.logspace(-1.5, 2, 71)
        for values, colour, label in zip(curves[name], (LIMITED, PLAIN), ("mean KL", "largest KL"), strict=True):
            panel.hist(values / curves["max_kl"], bins=bins, color=colour, alpha=0.6, label=label)
        panel.axvline(1, color=FAINT, linestyle=":", label="δ")
        finish(panel, xscale="log", title=title, xlabel="KL(old ‖ new) / δ", ylabel="steps")
    return figure
