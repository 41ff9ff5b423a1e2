"""Old samples for new policies: importance weights, how long they last, and two objectives with one gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.article.drawing import (
    FAINT,
    LIMITED,
    NATURAL,
    PLAIN,
    SURROGATE,
    TRUE,
    Findings,
    finish,
    panels,
)
from experiments.article.problems import bandit
from trpo_jax.theory import (
    effective_fraction,
    effective_sample_size,
    gaussian_effective_fraction,
    log_prob_objective,
    per_decision_fraction,
    softmax_policy,
    state_kl,
    surrogate_return,
    trajectory_fraction,
)


def weights_of(key: Any, shift: Any, num_batches: int, batch_size: int, decisions: int) -> Any:
    """log w of N(shift, 1) against samples of N(0, 1), and the samples' last decision; w is a product of decisions."""

    def one(key: Any) -> Any:
        sample = jax.random.normal(key, (batch_size, decisions))
        # log N(x; s, 1) − log N(x; 0, 1) = s x − s²/2
        return jnp.sum(shift * sample - shift**2 / 2, axis=-1), sample[:, -1]

    return jax.lax.map(one, jax.random.split(key, num_batches))


def fraction_and_error(log_weight: Any) -> tuple[Any, Any]:
    """ESS/N over batches [R, N]: its mean and the standard error of that."""
    fraction = effective_sample_size(log_weight) / log_weight.shape[-1]
    return fraction.mean(), fraction.std(ddof=1) / np.sqrt(fraction.shape[0])


def compute_importance(
    kls: Any = (0.001, 0.01, 0.04, 0.16, 0.36, 0.64, 1.0, 1.5, 2.5), num_batches: int = 100, batch_size: int = 10_000
) -> Findings:
    """ESS/N and the error of a weighted mean against KL: theory's line, Monte Carlo, and random softmax policies."""

    def at(arguments: Any) -> Any:
        key, kl = arguments
        shift = jnp.sqrt(2 * kl)
        log_weight, sample = weights_of(key, shift, num_batches, batch_size, 1)
        # Of E_p[x] = s, estimated from samples of q by the mean of w (x − s), whose expectation is 0.
        spread = jnp.sqrt(jnp.mean((jnp.exp(log_weight) * (sample - shift)) ** 2))
        return *fraction_and_error(log_weight), spread

    @jax.jit
    def measure(kls: Any) -> Any:
        logits = 1.5 * jax.random.normal(jax.random.key(1), (400, 2, 4))
        old, new = softmax_policy(logits[:, 0]), softmax_policy(logits[:, 0] + 0.6 * logits[:, 1])
        softmax = state_kl(old, new), effective_fraction(new, old)
        keys = jax.random.split(jax.random.key(0), kls.size)
        return jax.lax.map(at, (keys, kls)), gaussian_effective_fraction(kls), softmax

    (fraction, error, spread), theory, softmax = jax.tree.map(np.asarray, measure(np.array(kls)))
    # w² q is exp(s²) N(2s, 1): E_q[w² (x − s)²] = exp(2 KL) (1 + s²), against 1 with samples of p.
    spread_theory = np.sqrt(np.exp(2 * np.array(kls)) * (1 + 2 * np.array(kls)))
    curves = {"kls": kls, "fraction": fraction, "error": error, "spread": spread, "softmax": softmax}
    numbers = {
        "theory": dict(zip(kls, theory, strict=True)),
        "monte_carlo": dict(zip(kls, fraction, strict=True)),
        "sigmas_apart": dict(zip(kls, (fraction - theory) / error, strict=True)),
        "spread_over_on_policy": dict(zip(kls, spread, strict=True)),
        "spread_theory": dict(zip(kls, spread_theory, strict=True)),
        "softmax_fraction_over_the_line": np.quantile(softmax[1] / np.exp(-2 * softmax[0]), [0.05, 0.5, 0.95]),
    }
    return Findings(curves, numbers)


def draw_importance(findings: Findings) -> Any:
    curves = findings.curves
    figure, (left, right) = panels(2, width=4.6)
    kl = np.linspace(0, 2.6, 200)
    left.plot(*curves["softmax"], ".", color=FAINT, alpha=0.4, markersize=4, label="random softmax policies, exact")
    left.plot(kl, np.exp(-2 * kl), color=LIMITED, label="exp(−2 KL)")
    left.errorbar(
        curves["kls"],
        curves["fraction"],
        3 * curves["error"],
        fmt="o",
        markersize=4,
        color=TRUE,
        label="Gaussians, sampled",
    )
    finish(
        left,
        xlabel="KL between the policies, nats",
        ylabel="effective samples, ESS/N",
        title="what the samples are worth",
        xlim=(-0.05, 2.6),
    )
    right.plot(kl, np.sqrt(np.exp(2 * kl) * (1 + 2 * kl)), color=LIMITED, label="theory")
    right.plot(curves["kls"], curves["spread"], "o", markersize=4, color=TRUE, label="sampled")
    finish(
        right,
        yscale="log",
        xlabel="KL between the policies, nats",
        ylabel="relative to samples of its own",
        title="error of a weighted mean",
    )
    return figure


def compute_reuse(
    max_kl: float = 0.01, updates: Any = (0, 1, 2, 3, 4, 6, 8, 12, 16), num_batches: int = 50, batch_size: int = 4000
) -> Findings:
    """ESS/N after j updates of KL δ, of the ratios of single decisions and of whole trajectories."""

    @jax.jit
    def measure(updates: Any) -> Any:
        # Aligned updates add up: j of them move the mean by j √(2δ).
        shifts = updates * jnp.sqrt(2 * max_kl)

        def sampled(seed: int, decisions: int) -> Any:
            def at(arguments: Any) -> Any:
                key, shift = arguments
                return jnp.stack(fraction_and_error(weights_of(key, shift, num_batches, batch_size, decisions)[0]))

            return jax.lax.map(at, (jax.random.split(jax.random.key(seed), updates.size), shifts))

        lines = per_decision_fraction(updates, max_kl), *(trajectory_fraction(updates, max_kl, h) for h in (10, 100))
        return sampled(0, 1), sampled(1, 10), lines

    sampled, ten, (theory, ten_theory, hundred) = jax.tree.map(np.asarray, measure(np.array(updates)))

    def apart(values: Any, line: Any) -> Any:
        # N samples show too few of the rare large weights, so that ESS looks too good where it is small: not there.
        resolved = (np.array(updates) > 0) & (line > 0.25)
        return np.abs((values[resolved, 0] - line[resolved]) / values[resolved, 1]).max()

    curves = {
        "max_kl": max_kl,
        "updates": updates,
        "sampled": sampled,
        "ten": ten,
        "floor": 1 / batch_size,
    }
    numbers = {
        "per_decision": dict(zip(updates, theory, strict=True)),
        "per_decision_sampled": dict(zip(updates, sampled[:, 0], strict=True)),
        "trajectory_of_100": dict(zip(updates, hundred, strict=True)),
        "trajectory_of_10_sampled": dict(zip(updates, ten[:, 0], strict=True)),
        "trajectory_of_10": dict(zip(updates, ten_theory, strict=True)),
        "largest_sigmas_apart": max(apart(sampled, theory), apart(ten, ten_theory)),
        "updates_until_half_is_left": {
            "per decision": np.sqrt(np.log(2) / (2 * max_kl)),
            "trajectory of 100": np.sqrt(np.log(2) / (200 * max_kl)),
            "per decision, updates at right angles": np.log(2) / (2 * max_kl),
        },
    }
    return Findings(curves, numbers)


def draw_reuse(findings: Findings) -> Any:
    curves = findings.curves
    figure, (axes,) = panels(1, width=6.2, height=4)
    max_kl, last = curves["max_kl"], curves["updates"][-1]
    fine = np.linspace(0, last, 200)
    axes.plot(fine, np.exp(-2 * max_kl * fine), "--", color=FAINT, label="per decision, updates at right angles")
    for horizon, colour, label in (
        (1, LIMITED, "per decision, aligned updates"),
        (10, NATURAL, "whole trajectory, H = 10"),
        (100, PLAIN, "whole trajectory, H = 100"),
    ):
        axes.plot(fine, np.exp(-2 * horizon * max_kl * fine**2), color=colour, label=label)
    for values, colour in ((curves["sampled"], LIMITED), (curves["ten"], NATURAL)):
        axes.errorbar(curves["updates"], values[:, 0], 3 * values[:, 1], fmt="o", markersize=4, color=colour)
    axes.plot([], [], "o", color=FAINT, markersize=4, label="sampled, 3 standard errors")
    axes.axhline(curves["floor"], color=FAINT, linestyle=":")
    axes.text(last, 1.2 * curves["floor"], "1/N: one sample outweighs all", fontsize=8, color=FAINT, ha="right")
    finish(
        axes,
        "lower left",
        yscale="log",
        ylim=(1e-6, 1.6),
        xlabel=f"updates of KL {max_kl:g} since the samples were drawn",
        ylabel="effective samples, ESS/N",
    )
    return figure


def compute_objectives(num_points: int = 301, num_steps: int = 2000) -> Findings:
    """E[log π · A] and E[π/π_old · A]: along a line of policies, and where the ascent of each ends."""
    logits, mdp = bandit([0.6, 0.35, 0.05], [1.5, 0.0, 2.0])
    position = np.linspace(-6, 14, num_points)

    @jax.jit
    def measure(logits: Any, mdp: Any, position: Any) -> Any:
        old = softmax_policy(logits)

        def ratio(z: Any) -> Any:
            return surrogate_return(old, softmax_policy(z), mdp)

        def log_prob(z: Any) -> Any:
            # The constant lets both start at the same height.
            return log_prob_objective(old, softmax_policy(z), mdp) - log_prob_objective(old, old, mdp) + ratio(logits)

        both = ratio, log_prob
        slopes = [jax.grad(objective)(logits) for objective in both]
        direction = slopes[1] / jnp.linalg.norm(slopes[1])

        def at(t: Any) -> Any:
            z = logits + t * direction
            one, two = (jax.grad(objective)(z) for objective in both)
            return ratio(z), log_prob(z), jnp.sum(one * two) / jnp.linalg.norm(one) / jnp.linalg.norm(two)

        def ascend(objective: Any) -> Any:
            def iterate(z: Any, _: Any) -> Any:
                return z + 0.5 * jax.grad(objective)(z), softmax_policy(z)[0]

            return jax.lax.scan(iterate, logits, None, length=num_steps)[1]

        # In logits E[log π · A] = Σ_a π_old(a) A(a) θ(a): linear, as Σ_a π_old(a) A(a) = 0.
        mixing, other = jnp.linspace(0, 1, 5), logits + jnp.array([[3.0, -2.0, 5.0]])
        line = jax.vmap(lambda t: log_prob((1 - t) * logits + t * other))(mixing)
        return {
            "line": jax.vmap(at)(position),
            "paths": [ascend(objective) for objective in both],
            "difference": jnp.abs(slopes[0] - slopes[1]).max(),
            "bend": jnp.abs(line - ((1 - mixing) * line[0] + mixing * line[-1])).max(),
            "hessian": jax.hessian(lambda v: ratio(v[None]))(logits[0]),
        }

    found = jax.tree.map(np.asarray, measure(logits, mdp, position))
    reward = np.asarray(mdp.reward[0])
    ratio_line, log_line, cosine = found["line"]
    ratio_path, log_path = found["paths"]
    curves = {
        "position": position,
        "ratio": ratio_line,
        "log_prob": log_line,
        "cosine": cosine,
        "paths": {"ratio": ratio_path @ reward, "log_prob": log_path @ reward},
        "best": reward.max(),
    }
    numbers = {
        "gradients_differ_at_old_by": found["difference"],
        "smallest_cosine_on_the_line": cosine.min(),
        "log_prob_at_the_end_of_the_line": log_line[-1],
        "ratio_at_the_end_of_the_line": ratio_line[-1],
        "log_prob_departs_from_linear_by": found["bend"],
        "ratio_curvatures_at_old": np.linalg.eigvalsh(found["hessian"]),
        "largest_return": reward.max(),
        "ascent_of_the_ratio_ends_at": ratio_path[-1] @ reward,
        "ascent_of_log_prob_ends_at": log_path[-1] @ reward,
        "last_policy_of_the_ratio": ratio_path[-1],
        "last_policy_of_log_prob": log_path[-1],
    }
    return Findings(curves, numbers)


def draw_objectives(findings: Findings) -> Any:
    curves = findings.curves
    figure, (left, middle, right) = panels(3, width=4)
    left.plot(curves["position"], curves["ratio"], color=SURROGATE, label="E[π/π_old · A]")
    left.plot(curves["position"], curves["log_prob"], color=NATURAL, label="E[log π · A] + constant")
    left.plot(0, curves["paths"]["ratio"][0], "o", color=TRUE, label="π_old")
    finish(left, xlabel="distance along ∇, in logits", ylabel="objective", title="one tangent, two curves")
    middle.plot(curves["position"], curves["cosine"], color=TRUE, label="along the line")
    middle.plot(0, 1, "o", color=TRUE, label="π_old")
    finish(
        middle,
        "upper right",
        xlabel="distance along ∇, in logits",
        ylabel="cosine of the two gradients",
        title="equal at π_old only",
    )
    for name, colour, label in (("ratio", SURROGATE, "ratio"), ("log_prob", NATURAL, "log-probability")):
        path = curves["paths"][name]
        right.plot(np.arange(1, path.size + 1), path, color=colour, label=f"ascent of the {label}")
    right.axhline(curves["best"], color=FAINT, linestyle=":", label="best policy")
    finish(
        right,
        "lower right",
        xscale="log",
        xlabel="gradient step",
        ylabel="return η",
        title="one batch, ascended to the end",
    )
    return figure
