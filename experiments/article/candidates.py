"""What a batch of the old policy says about candidates for the new one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.article.drawing import (
    FAINT,
    SHADES,
    Findings,
    finish,
    panels,
)
from experiments.article.problems import random_problems
from trpo_jax import Categorical, estimate_candidate
from trpo_jax.theory import (
    advantages,
    performance_difference,
    softmax_policy,
    surrogate_return_gain,
    tabular_natural_gradient,
    visitation,
)


def compute_judgement(
    num_problems: int = 12,
    num_candidates: int = 16,
    batch_size: int = 2000,
    sizes: Any = (0.2, 0.7, 2.0, 6.0),
    resamples: int = 200,
) -> Findings:
    """What a batch of the old policy predicts of candidates at several KLs, and what each truly gains."""

    def apply(params: Any, observation: Any) -> Categorical:
        return Categorical(params[observation])

    def judge(key: Any, theta: Any, mdp: Any) -> Any:
        keys = jax.random.split(key, 4)
        old = softmax_policy(theta)
        occupancy = (1 - mdp.gamma) * visitation(old, mdp)
        state = jax.random.categorical(keys[0], jnp.log(occupancy), shape=(batch_size,))
        action = Categorical(theta[state]).sample(keys[1])
        table = advantages(old, mdp)
        natural = tabular_natural_gradient(theta, mdp)
        natural = natural / jnp.linalg.norm(natural)
        noise = jax.random.normal(keys[2], (len(sizes), num_candidates, *theta.shape))
        noise = noise / jnp.linalg.norm(noise, axis=(-2, -1), keepdims=True)
        candidates = theta + jnp.array(sizes)[:, None, None, None] * (natural + noise)

        def one(candidate: Any) -> Any:
            found = estimate_candidate(
                apply, theta, candidate, state, action, table[state, action], keys[3], resamples=resamples
            )
            new = softmax_policy(candidate)
            scale = 1 - mdp.gamma  # from a return to a mean over decisions
            return (
                found.surrogate_gain,
                found.low,
                found.high,
                found.mean_kl,
                found.effective_sample_fraction,
                scale * surrogate_return_gain(old, new, mdp),
                scale * performance_difference(old, new, mdp),
            )

        return jax.lax.map(one, candidates.reshape(-1, *theta.shape))

    @jax.jit
    def measure(logits: Any, mdps: Any) -> Any:
        keys = jax.random.split(jax.random.key(4), num_problems)
        return jax.lax.map(lambda arguments: judge(*arguments), (keys, logits, mdps))

    found = measure(*random_problems(num_problems, seed=3))
    # [problems, sizes, candidates]
    shape = num_problems, len(sizes), num_candidates
    gain, low, high, kl, fraction, surrogate, true = (np.asarray(leaf).reshape(shape) for leaf in found)

    def rank_correlation(one: Any, two: Any) -> float:
        """Spearman's, of the candidates of each problem; the mean over problems."""
        ranks = (np.argsort(np.argsort(values, axis=1), axis=1) for values in (one, two))
        return float(np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(*ranks, strict=True)]))

    by_size = {
        size: {
            "median_kl": np.median(kl[:, i]),
            "median_ess_fraction": np.median(fraction[:, i]),
            "surrogate_inside_the_interval": ((low <= surrogate) & (surrogate <= high))[:, i].mean(),
            "true_gain_inside_the_interval": ((low <= true) & (true <= high))[:, i].mean(),
            "rank_correlation_with_the_true_gain": rank_correlation(gain[:, i], true[:, i]),
        }
        for i, size in enumerate(sizes)
    }
    curves = {"gain": gain, "low": low, "high": high, "kl": kl, "true": true, "sizes": sizes}
    return Findings(curves, {"batch_size": batch_size, "candidates": gain.size, "by_size": by_size})


def draw_judgement(findings: Findings) -> Any:
    curves = findings.curves
    count = len(curves["sizes"])
    figure, axes = panels(count, width=3.2, height=3.3)
    for i, (panel, colour) in enumerate(zip(axes, SHADES, strict=False)):
        gain, true = curves["gain"][:, i].ravel(), curves["true"][:, i].ravel()
        errors = np.stack([gain - curves["low"][:, i].ravel(), curves["high"][:, i].ravel() - gain])
        panel.errorbar(
            gain,
            true,
            xerr=errors,
            fmt="o",
            markersize=3,
            linewidth=0.6,
            color=colour,
            label="candidate, 95 % interval",
        )
        reach = min(gain.min(), true.min()), max(gain.max(), true.max())
        panel.plot(reach, reach, ":", color=FAINT, label="predicted = true")
        kl = findings.numbers["by_size"][curves["sizes"][i]]["median_kl"]
        finish(panel, "lower right", title=f"median KL {float(kl):.2g}", xlabel="predicted gain per decision")
    axes[0].set_ylabel("true gain per decision")
    return figure
