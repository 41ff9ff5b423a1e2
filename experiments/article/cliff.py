"""The cliff: what one update with a larger KL budget does to a trained policy."""

from typing import Any

import jax
import numpy as np
from scipy import stats

import trpo_jax
from experiments.article.drawing import LIMITED, NATURAL, PLAIN, Findings, finish, panels
from experiments.article.networks import train_steps, trained
from trpo_jax import Config


def compute_cliff(
    num_groups: int = 8,
    num_seeds: int = 64,
    num_iterations: int = 48,
    times: Any = (1, 2, 4, 8, 12, 16, 20),
    factors: Any = (1, 10, 100, 1000),
    num_episodes: int = 16,
    max_kl: float = 0.01,
    seed: int = 0,
) -> Findings:
    """CartPole: one update at a multiple of the KL budget from a trained policy, then training as before.

    The groups are independent runs of `num_seeds` agents; `times` are iterations at which the policies are judged.
    """
    config = Config(env="CartPole-v1", num_iterations=num_iterations, max_kl=max_kl)

    @jax.jit
    @jax.vmap
    def judge(state: Any) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(state.key, 2**31), state.iteration)
        return trpo_jax.evaluate(
            config, state, key, num_episodes=num_episodes, deterministic=False
        ).episode_return.mean()

    def continue_after(factor: float, good: Any) -> Any:
        state, metrics = train_steps(config.replace(max_kl=factor * max_kl), good)
        returns = [judge(state)]
        for time in range(2, times[-1] + 1):
            state, _ = train_steps(config, state)
            if time in times:
                returns.append(judge(state))
        return np.stack(returns, axis=1), np.asarray(metrics.mean_kl)

    def group(key: Any) -> Any:
        _, good, _ = trained(num_iterations, num_seeds, max_kl, key)
        returns, kl = map(np.stack, zip(*(continue_after(factor, good) for factor in factors), strict=True))
        return np.asarray(judge(good)), returns, kl

    groups = [group(key) for key in group_keys(seed, num_groups)]
    before, returns, kl = (np.stack(leaves) for leaves in zip(*groups, strict=True))  # [G, A], [G, F, A, times], …
    curves = {"factors": factors, "before": before, "returns": returns, "times": times}
    curves["steps"] = config.steps_per_iteration
    by_factor = {
        factor: after_update(returns[:, i, :, 0], returns[:, i, :, -1], kl[:, i]) for i, factor in enumerate(factors)
    }
    numbers = {"num_groups": num_groups, "num_seeds": num_seeds, "seed": seed}
    return Findings(curves, {**numbers, "mean_return_before": before.mean(), "by_factor": by_factor})


def group_keys(seed: int, num_groups: int) -> Any:
    """Keys of the groups; the groups of one seed are not among those of another."""
    return jax.random.split(jax.random.key(seed), num_groups)


def after_update(first: np.ndarray, last: np.ndarray, kl: np.ndarray) -> dict[str, Any]:
    """What became of agents [groups, agents]: returns after the larger update and at the end, and its KL.

    Of no single agent, and no time at which a mean crosses a line: neither comes out again on another machine.
    """
    return {
        "median_kl_of_the_update": np.median(kl),
        "interval_of_the_median": median_interval(kl.ravel()),
        "mean_return_after_it": first.mean(),
        "two_standard_errors_of_it": 2 * standard_error(first.ravel()),
        "mean_return_after_it_by_group": first.mean(axis=1),
        "share_below_475": (first < 475).mean(),
        "share_below_475_by_group": (first < 475).mean(axis=1),
        "share_below_250": (first < 250).mean(),
        "share_below_250_by_group": (first < 250).mean(axis=1),
        "mean_return_at_the_end": last.mean(),
        "two_standard_errors_at_the_end": 2 * standard_error(last.ravel()),
        "mean_return_at_the_end_by_group": last.mean(axis=1),
    }


def standard_error(values: np.ndarray) -> Any:
    """Of the mean of independent values, along the first axis."""
    return np.std(values, axis=0, ddof=1) / np.sqrt(len(values))


def median_interval(values: np.ndarray) -> np.ndarray:
    """95 % interval of the median of independent values, between two of them: their ranks are binomial."""
    low = int(stats.binom.ppf(0.025, len(values), 0.5))
    return np.sort(values)[[max(low - 1, 0), min(len(values) - low, len(values) - 1)]]


def draw_cliff(findings: Findings) -> Any:
    curves = findings.curves
    figure, (left, right) = panels(2, width=4.8, sharey=True)
    shades = (LIMITED, NATURAL, PLAIN, "#67000d")
    time = np.array([0, *curves["times"]])
    paths_of = {
        factor: np.concatenate([curves["before"][..., None], curves["returns"][:, i]], axis=-1)
        for i, factor in enumerate(curves["factors"])
    }
    for (factor, paths), colour in zip(paths_of.items(), shades, strict=False):
        agents = paths.reshape(-1, time.size)
        mean, around = agents.mean(0), 2 * standard_error(agents)
        left.plot(time, mean, "o-", markersize=3, color=colour, label=f"{factor}×")
        left.fill_between(time, mean - around, mean + around, color=colour, alpha=0.15, linewidth=0)
    index = min(2, len(curves["factors"]) - 1)
    shown = paths_of[curves["factors"][index]]
    for i, agent in enumerate(shown[0]):
        label = "one agent of the first group" if i == 0 else None
        right.plot(time, agent, color=shades[index], alpha=0.25, linewidth=1, label=label)
    for i, mean in enumerate(shown.mean(axis=1)):
        right.plot(time, mean, color="black", linewidth=1, label="mean of a group" if i == 0 else None)
    labels = {
        "xlabel": f"iterations of {int(curves['steps']):,} environment steps",
        "ylim": (0, 520),
        "xticks": range(0, time[-1] + 1, 5),
    }
    finish(
        left,
        "lower right",
        title="one update at a multiple of δ = 0.01, mean ± 2 s.e.",
        ylabel="return of the sampled policy",
        **labels,
    )
    finish(right, "lower right", title=f"after the {curves['factors'][index]}× update, by agent", **labels)
    return figure
