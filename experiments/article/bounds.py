"""What the lower bounds subtract from the predicted gain of a step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.article.drawing import (
    BOUND,
    FAINT,
    NATURAL,
    SURROGATE,
    TRUE,
    Findings,
    finish,
    panels,
)
from experiments.article.problems import random_problems
from trpo_jax.theory import (
    certify,
    softmax_policy,
    tabular_natural_gradient,
)


def compute_bounds(num_problems: int = 1000, gammas: Any = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)) -> Findings:
    """What each bound subtracts from the predicted gain of a step of mean KL 0.01, by γ; and the true gain."""
    names = ("maximum_kl", "mean_kl", "mean_tv")

    def ratios(logits: Any, mdp: Any) -> Any:
        old = softmax_policy(logits)
        direction = tabular_natural_gradient(logits, mdp)

        def kl(size: Any) -> Any:
            return certify(old, softmax_policy(logits + size * direction), mdp).mean_kl

        def halve(_: int, ends: Any) -> Any:
            middle = jnp.sqrt(ends[0] * ends[1])
            short = kl(middle) < 0.01
            return jnp.where(short, middle, ends[0]), jnp.where(short, ends[1], middle)

        size = jax.lax.fori_loop(0, 40, halve, (jnp.array(1e-6), jnp.array(1e3)))[0]
        found = certify(old, softmax_policy(logits + size * direction), mdp)
        gain = found.surrogate_gain
        penalties = [(gain - getattr(found, f"{name}_bound")) / gain for name in names]
        return jnp.stack([*penalties, found.true_gain / gain])

    compute = jax.jit(jax.vmap(ratios))
    table = np.stack([compute(*random_problems(num_problems, gamma)) for gamma in gammas])
    low, median, high = np.quantile(table, [0.1, 0.5, 0.9], axis=1)
    curves = {"gammas": gammas, "low": low, "median": median, "high": high}
    columns = (*names, "true_gain")
    numbers = {name: dict(zip(gammas, median[:, i], strict=True)) for i, name in enumerate(columns)}
    numbers["share_guaranteed"] = {
        gamma: dict(zip(names, (table[j, :, :3] < 1).mean(axis=0), strict=True)) for j, gamma in enumerate(gammas)
    }
    return Findings(curves, numbers)


def draw_bounds(findings: Findings) -> Any:
    curves = findings.curves
    figure, (axes,) = panels(1, width=6, height=4)
    x = 1 / (1 - np.array(curves["gammas"]))
    labels = (
        (0, BOUND, "4εγ/(1−γ)² max KL (Schulman et al.)"),
        (1, NATURAL, "√2 γε′/(1−γ)² √(mean KL) (Achiam et al.)"),
        (2, SURROGATE, "2γε′/(1−γ)² mean TV (Achiam et al.)"),
        (3, TRUE, "true gain / predicted gain"),
    )
    for i, colour, label in labels:
        axes.fill_between(x, curves["low"][:, i], curves["high"][:, i], color=colour, alpha=0.15)
        axes.plot(x, curves["median"][:, i], "o-", markersize=4, color=colour, label=label)
    axes.fill_between([], [], [], color=FAINT, alpha=0.3, label="10 to 90 % of the MDPs")
    axes.axhline(1, color=FAINT, linestyle=":")
    axes.text(x[-1], 0.83, "below: improvement guaranteed", fontsize=8, color=FAINT, ha="right", va="top")
    finish(
        axes,
        "upper left",
        xscale="log",
        yscale="log",
        xlabel="γ",
        ylabel="penalty of the bound / predicted gain",
        title="one step of mean KL 0.01 on random MDPs",
    )
    axes.set_xticks(x, [f"{gamma:g}" for gamma in curves["gammas"]])
    axes.minorticks_off()
    return figure
