"""Minorize–maximize: a lower bound that touches the return, its quadratic model, and what climbs by it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.article.drawing import (
    BOUND,
    FAINT,
    LIMITED,
    NATURAL,
    PLAIN,
    SHADES,
    SURROGATE,
    TRUE,
    Findings,
    finish,
    panels,
)
from experiments.article.problems import bandit, random_problems, two_state
from trpo_jax.theory import (
    advantages,
    certify,
    expected_return,
    minorizer,
    minorizer_step,
    natural_gradient_step,
    penalty_coefficient,
    plain_gradient_step,
    policy_gradient,
    softmax_policy,
    solve,
    state_kl,
    surrogate_return,
    tabular_natural_gradient,
    tabular_trpo_step,
)


def compute_minorizer(gamma: float = 0.5, num_points: int = 401, num_pairs: int = 10_000) -> Findings:
    """η, L and M along a line of policies through θ_old, and M against η on random pairs of policies."""
    position = np.linspace(-2.5, 5, num_points)

    @jax.jit
    def measure(logits: Any, mdp: Any, position: Any) -> Any:
        direction = tabular_natural_gradient(logits, mdp)
        direction = direction / jnp.linalg.norm(direction)
        old = softmax_policy(logits)

        def along(origin: Any) -> Any:
            def at(t: Any) -> Any:
                new = softmax_policy(logits + t * direction)
                return expected_return(new, mdp), surrogate_return(origin, new, mdp), minorizer(origin, new, mdp)

            return jax.vmap(at)(position)

        true, surrogate, bound = along(old)
        # The next round, from where the bound on this line is highest.
        best = position[jnp.argmax(bound)]
        slope = jax.grad(lambda z: minorizer(old, softmax_policy(z), mdp))(logits)
        return {
            "true": true,
            "surrogate": surrogate,
            "bound": bound,
            "next_bound": along(softmax_policy(logits + best * direction))[2],
            "start": expected_return(old, mdp),
            "touch": minorizer(old, old, mdp) - expected_return(old, mdp),
            "slopes": jnp.abs(slope - policy_gradient(logits, mdp)).max(),
            "penalty": penalty_coefficient(old, mdp),
        }

    @jax.jit
    def margins(logits: Any, mdps: Any) -> Any:
        size = jnp.logspace(-3, 0.7, num_pairs)[:, None, None]
        new_logits = logits + size * jax.random.normal(jax.random.key(5), logits.shape)

        def margin(old: Any, new: Any, mdp: Any) -> Any:
            certificate = certify(softmax_policy(old), softmax_policy(new), mdp)
            return certificate.true_gain - certificate.maximum_kl_bound

        return jax.vmap(margin)(logits, new_logits, mdps)

    found = {name: np.asarray(value) for name, value in measure(*two_state(gamma), position).items()}
    peak = int(np.argmax(found["bound"]))
    names = ("true", "surrogate", "bound", "next_bound", "start")
    curves = {"gamma": gamma, "position": position, **{name: found[name] for name in names}}
    numbers = {
        "penalty_coefficient": found["penalty"],
        "penalty_coefficient_at_gamma_0.9": measure(*two_state(0.9), position)["penalty"],
        "touches_within": abs(found["touch"]),
        "gradients_differ_by": found["slopes"],
        "bound_above_return_on_the_line": (found["bound"] - found["true"]).max(),
        "random_pairs": num_pairs,
        "smallest_margin_on_random_pairs": np.min(margins(*random_problems(num_pairs))),
        "step_to_the_bounds_maximum": position[peak],
        "guaranteed_gain": found["bound"][peak] - found["start"],
        "gain_there": found["true"][peak] - found["start"],
        "largest_gain_on_the_line": found["true"].max() - found["start"],
    }
    return Findings(curves, numbers)


def draw_minorizer(findings: Findings) -> Any:
    curves = findings.curves
    figure, axes = panels(2, width=4.8, height=3.9)
    t, true, bound = curves["position"], curves["true"], curves["bound"]
    start, peak = curves["start"], int(np.argmax(bound))
    for panel in axes:
        lines = [
            *panel.plot(t, true, color=TRUE, linewidth=2, label="η, the return"),
            *panel.plot(t, curves["surrogate"], color=SURROGATE, label="L, the surrogate"),
            *panel.plot(t, bound, color=BOUND, label="M = L − C max KL"),
            *panel.plot(t, curves["next_bound"], "--", color=BOUND, alpha=0.7, label="M of the next round"),
        ]
        panel.plot([t[peak], t[peak]], [bound[peak], true[peak]], ":", color=FAINT)
        points = [
            *panel.plot(0, start, "o", color=TRUE, label="θ_old"),
            *panel.plot(t[peak], bound[peak], "^", color=BOUND, label="maximum of M: gain guaranteed"),
            *panel.plot(t[peak], true[peak], "o", color=TRUE, fillstyle="none", label="return there"),
        ]
        finish(panel, None, xlabel="distance from θ_old along F⁺∇η, in logits", ylabel="discounted return")
    axes[0].legend(handles=lines, fontsize=8, loc="lower right")
    axes[1].legend(handles=points, fontsize=8, loc="upper left")
    axes[0].set(ylim=(true.min() - 1.5, curves["surrogate"].max() + 0.2), title=f"two states, γ = {curves['gamma']:g}")
    gain = bound[peak] - start
    axes[1].set(
        xlim=(-1.5 * t[peak], 4 * t[peak]),
        ylim=(start - 4 * gain, start + 9 * gain),
        title="close to θ_old",
    )
    return figure


def compute_model(penalties: Any = (2, 5, 20, 100, 1000, 10000), num_points: int = 121, shown: float = 5.0) -> Findings:
    """M of a bandit over two logits beside its quadratic model, and the distance of their maximisers by C."""
    one, two = np.linspace(-0.9, 0.6, num_points), np.linspace(-0.6, 1.0, num_points)
    grid = np.stack(np.meshgrid(one, two, indexing="ij"), axis=-1).reshape(-1, 2)

    @jax.jit
    def measure(logits: Any, mdp: Any, penalties: Any, grid: Any) -> Any:
        old = softmax_policy(logits)
        first = logits[0, 1:] - logits[0, 0]

        def to_policy(change: Any) -> Any:
            return softmax_policy(jnp.concatenate([jnp.zeros(1), first + change])[None])

        def divergence(change: Any) -> Any:
            return state_kl(old, to_policy(change))[0]

        gradient = jax.grad(lambda change: expected_return(to_policy(change), mdp))(jnp.zeros(2))
        probability = old[0, 1:]
        fisher = jnp.diag(probability) - jnp.outer(probability, probability)

        def exact(change: Any) -> Any:
            return surrogate_return(old, to_policy(change), mdp) - shown * divergence(change)

        def model(change: Any) -> Any:
            return expected_return(old, mdp) + gradient @ change - shown / 2 * change @ fisher @ change

        def maximiser(penalty: Any) -> Any:
            log_odds = jnp.log(minorizer_step(old, mdp, penalty)[0])
            return log_odds[1:] - log_odds[0] - first

        best = jax.lax.map(maximiser, penalties)
        predicted = solve(fisher, gradient) / penalties[:, None]
        return {
            "surfaces": [jax.vmap(exact)(grid), jax.vmap(model)(grid)],
            "best": best,
            "predicted": predicted,
            "gradient": gradient,
            "error": jnp.linalg.norm(best - predicted, axis=1) / jnp.linalg.norm(best, axis=1),
            "kl": jax.vmap(divergence)(best),
            "curvature": -shown * fisher,
            "exact_curvature": jax.hessian(exact)(jnp.zeros(2)),
        }

    found = measure(*bandit([0.3, 0.65, 0.05], [1.0, 0.0, 2.0]), np.array(penalties, float), grid)
    found = jax.tree.map(np.asarray, found)
    error, kl, index = found["error"], found["kl"], list(penalties).index(shown)
    curves = {
        "grid": (one, two),
        "surfaces": [surface.reshape(num_points, num_points) for surface in found["surfaces"]],
        "best": found["best"][index],
        "predicted": found["predicted"][index],
        "gradient": found["gradient"],
        "penalties": penalties,
        "error": error,
        "kl": kl,
        "shown": shown,
    }
    numbers = {
        "curvatures_of_the_model": np.linalg.eigvalsh(found["curvature"]),
        "largest_curvature_of_the_exact_bound": np.linalg.eigvalsh(found["exact_curvature"]).max(),
        "relative_distance_of_the_maximisers": dict(zip(penalties, error, strict=True)),
        "kl_of_the_exact_maximiser": dict(zip(penalties, kl, strict=True)),
        "order_in_kl": np.polyfit(np.log(kl[-3:]), np.log(error[-3:]), 1)[0],
    }
    return Findings(curves, numbers)


def draw_model(findings: Findings) -> Any:
    curves = findings.curves
    figure, (left, middle, right) = panels(3, width=4)
    one, two = curves["grid"]
    levels = np.linspace(np.max(curves["surfaces"][0]) - 0.6, np.max(curves["surfaces"][0]), 16)
    for panel, surface, title in (
        (left, curves["surfaces"][0], f"M = L − C KL, C = {curves['shown']:g}"),
        (middle, curves["surfaces"][1], "η + gᵀΔ − ½ C ΔᵀFΔ"),
    ):
        panel.contourf(one, two, surface.T, levels=levels, cmap="Greens", extend="min")
        arrow = 0.3 * curves["gradient"] / np.linalg.norm(curves["gradient"])
        panel.annotate("", arrow, (0, 0), arrowprops={"arrowstyle": "->", "color": PLAIN})
        panel.plot([], [], color=PLAIN, label="∇η, direction")
        panel.plot(*curves["predicted"], "s", color=LIMITED, label="maximum of the model, F⁻¹g/C")
        panel.plot(*curves["best"], "^", color=TRUE, label="maximum of M")
        panel.plot(0, 0, "o", color=TRUE, fillstyle="none", label="θ_old")
        finish(panel, "lower right", title=title, xlabel="change of the 2nd logit", ylabel="change of the 3rd logit")
    right.plot(curves["kl"], curves["error"], "o-", color=BOUND, label="model against M, at six C")
    for kl, error, penalty in zip(curves["kl"], curves["error"], curves["penalties"], strict=True):
        right.annotate(f"C = {penalty:g}", (kl, error), (6, -8), textcoords="offset points", fontsize=8)
    finish(
        right,
        "upper left",
        xscale="log",
        yscale="log",
        title="the model is as good as the step is short",
        xlabel="KL of the step, nats",
        ylabel="relative distance of the maxima",
    )
    right.set_xlim(None, 3)
    return figure


def compute_climbing(num_problems: int = 64, num_iterations: int = 1000) -> Findings:
    """Share of the way from the first to the optimal return, by iteration, of methods on random MDPs."""
    methods = {
        "MM, C of the theory": lambda z, m: jnp.log(minorizer_step(softmax_policy(z), m)),
        "TRPO, δ = 0.001": lambda z, m: tabular_trpo_step(z, m, max_kl=0.001)[0],
        "TRPO, δ = 0.01": lambda z, m: tabular_trpo_step(z, m, max_kl=0.01)[0],
        "TRPO, δ = 0.1": lambda z, m: tabular_trpo_step(z, m, max_kl=0.1)[0],
        "natural gradient, step 0.01": lambda z, m: natural_gradient_step(z, m, 0.01),
        "plain gradient, step 0.1": lambda z, m: plain_gradient_step(z, m, 0.1),
    }

    def best_return(mdp: Any) -> Any:
        def improve(policy: Any, _: Any) -> Any:
            return jax.nn.one_hot(jnp.argmax(advantages(policy, mdp), axis=-1), policy.shape[-1]), None

        # Policy iteration ends after far fewer rounds on 5 states.
        return expected_return(jax.lax.scan(improve, jnp.full((5, 3), 1 / 3), None, length=30)[0], mdp)

    def climb(step: Any) -> Any:
        def run(logits: Any, mdp: Any) -> Any:
            def iterate(z: Any, _: Any) -> Any:
                return step(z, mdp), expected_return(softmax_policy(z), mdp)

            return jax.lax.scan(iterate, logits, None, length=num_iterations)[1]

        return jax.vmap(run)

    @jax.jit
    def measure(logits: Any, mdps: Any) -> Any:
        coefficient = jax.vmap(lambda z, m: penalty_coefficient(softmax_policy(z), m))(logits, mdps)
        return jax.vmap(best_return)(mdps), coefficient, [climb(step)(logits, mdps) for step in methods.values()]

    best, coefficient, found = jax.tree.map(np.asarray, measure(*random_problems(num_problems)))
    curves: dict[str, Any] = {}
    numbers: dict[str, Any] = {"num_problems": num_problems, "num_iterations": num_iterations}
    for name, values in zip(methods, found, strict=True):
        share = (values - values[:, :1]) / (best - values[:, 0])[:, None]
        curves[name] = np.median(share, axis=0)
        reached = np.where(share >= 0.9, np.arange(num_iterations), num_iterations).min(axis=1)
        numbers[name] = {
            "decreases": int((np.diff(values, axis=1) < -1e-12).sum()),
            "largest_decrease": max(0.0, -np.diff(values, axis=1).min()),
            "median_iterations_to_90_percent": int(np.median(reached)),
            "median_share_at_the_end": curves[name][-1],
        }
    numbers["median_penalty_coefficient"] = np.median(coefficient)
    return Findings(curves, numbers)


def draw_climbing(findings: Findings) -> Any:
    figure, (axes,) = panels(1, width=6.4, height=4)
    colours = (BOUND, *SHADES[:3], NATURAL, PLAIN)
    for (name, share), colour in zip(findings.curves.items(), colours, strict=True):
        axes.plot(np.arange(1, share.size), share[1:], color=colour, label=name)
    finish(
        axes,
        "lower right",
        xscale="log",
        xlabel="iteration",
        ylabel="share of the way to the optimal return, median",
        ylim=(-0.02, 1.05),
    )
    return figure
