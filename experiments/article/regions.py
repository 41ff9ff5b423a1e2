"""Trust regions: a length first and then the direction, and a length that learns from its mistakes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from experiments.article.drawing import BOUND, FAINT, LIMITED, NATURAL, PLAIN, Findings, finish, panels
from experiments.article.problems import two_state
from trpo_jax.theory import (
    adapt_radius_by_divergence,
    adapt_radius_by_ratio,
    expected_return,
    lqr_gradient,
    lqr_return,
    mean_state_kl,
    optimal_gain,
    policy_gradient,
    scalar_lqr,
    softmax_policy,
    solve,
    state_moment,
    trust_region_minimize,
)


def rosenbrock(x: Any) -> Any:
    """A bent valley with its minimum, 0, at (1, 1)."""
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def compute_circles(num_iterations: int = 60, num_line_searches: int = 20_000) -> Findings:
    """Rosenbrock's valley by a line search along −∇f, by one along Newton's direction, and by a trust region."""
    gradient = jax.grad(rosenbrock)

    def search(direction_of: Any, start: Any) -> Any:
        def iterate(x: Any, _: Any) -> Any:
            direction, slope = direction_of(x), gradient(x)
            direction = jnp.where(direction @ slope < 0, direction, -slope)

            def too_long(size: Any) -> Any:
                enough = rosenbrock(x + size * direction) <= rosenbrock(x) + 1e-4 * size * (slope @ direction)
                return ~enough & (size > 1e-12)

            size = jax.lax.while_loop(too_long, lambda size: size / 2, jnp.ones_like(x[0]))
            return x + size * direction, x

        return jax.lax.scan(iterate, start, None, length=num_line_searches)[1]

    @jax.jit
    def measure(start: Any) -> Any:
        steepest = search(lambda x: -gradient(x), start)
        newton = search(lambda x: -solve(jax.hessian(rosenbrock)(x), gradient(x)), start)
        return (
            steepest,
            newton,
            trust_region_minimize(rosenbrock, start, radius=0.5, maximum_radius=2.0, num_iterations=num_iterations),
        )

    steepest, newton, (last, trace) = jax.tree.map(np.asarray, measure(np.array([-1.2, 1.0])))
    length = np.linalg.norm(trace.step, axis=1)

    def iterations(path: Any) -> int:
        close = rosenbrock(path.T) < 1e-8
        return int(np.argmax(close)) if close.any() else -1

    paths = {"steepest": steepest, "newton": newton, "trust region": trace.position}
    curves = {"paths": paths, "radius": trace.radius, "step": trace.step, "accepted": trace.accepted}
    count = iterations(trace.position)
    numbers = {
        "iterations_to_1e-8": {name: iterations(path) for name, path in paths.items()},
        "longest_step_over_radius": np.max(length / trace.radius),
        "steps_at_the_radius": int((length > 0.999 * trace.radius)[:count].sum()),
        "steps_refused": int((~trace.accepted)[:count].sum()),
        "last_value": rosenbrock(last),
    }
    return Findings(curves, numbers)


def draw_circles(findings: Findings) -> Any:
    curves, numbers = findings.curves, findings.numbers
    figure, axes = panels(2, width=4.8, height=3.9, sharey=True)
    x, y = np.linspace(-1.7, 1.5, 200), np.linspace(-0.5, 1.8, 200)
    surface = rosenbrock(np.stack(np.meshgrid(x, y)))
    counts = numbers["iterations_to_1e-8"]
    for panel in axes:
        panel.contour(x, y, np.log10(surface + 1e-3), levels=12, cmap="Greys", linewidths=0.7, alpha=0.8)
        panel.plot(1, 1, "*", color="black", markersize=10, linestyle="none", label="minimum")
    paths = curves["paths"]
    shown = paths["steepest"][:400]
    axes[0].plot(*shown.T, ".-", color=PLAIN, markersize=3, linewidth=0.8, label=f"−∇f: {counts['steepest']:,} steps")
    axes[0].plot(
        *paths["newton"][: counts["newton"] + 1].T,
        "o-",
        color=NATURAL,
        markersize=3,
        label=f"Newton: {counts['newton']} steps",
    )
    count = counts["trust region"]
    path = paths["trust region"][: count + 1]
    axes[1].plot(*path.T, "o-", color=LIMITED, markersize=3, label=f"trust region: {count} steps")
    for i in range(count):
        colour, style = (LIMITED, "-") if curves["accepted"][i] else (PLAIN, ":")
        axes[1].add_patch(Circle(path[i], curves["radius"][i], fill=False, color=colour, alpha=0.5, linestyle=style))
        if not curves["accepted"][i]:
            axes[1].plot(*(path[i] + curves["step"][i]), "x", color=PLAIN, markersize=5)
    axes[1].plot([], [], "-", color=LIMITED, alpha=0.5, label="radius of an accepted step")
    axes[1].plot([], [], "x:", color=PLAIN, label="refused step, its radius")
    for panel, title in zip(axes, ("direction, then length", "length, then direction"), strict=True):
        panel.set_aspect("equal")
        finish(panel, "upper center", title=title, xlabel="x₁", xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    axes[0].set_ylabel("x₂")
    return figure


def compute_radius(num_iterations: int = 16, target: float = 0.01) -> Findings:
    """Radii that start right, 100 times too small and 100 times too large, and the two rules that mend them."""
    factors = np.array([0.01, 1.0, 100.0])
    problem, std, first = scalar_lqr(), 0.3, jnp.full((1, 1), 0.03)

    def by_ratio(radius: Any) -> Any:
        best = lqr_return(optimal_gain(problem), problem)

        def iterate(carry: Any, _: Any) -> Any:
            gain, radius = carry
            slope = lqr_gradient(gain, problem)
            step = jnp.sqrt(2 * radius * std**2 / state_moment(gain, problem, std)) * jnp.sign(slope)
            actual = lqr_return(gain + step, problem) - lqr_return(gain, problem)
            ratio = actual / jnp.sum(slope * step)
            new = jnp.where(actual > 0, gain + step, gain)
            cost = (best - lqr_return(gain, problem)) / -best
            return (new, adapt_radius_by_ratio(radius, ratio, True, 1e-8, 10.0)), (radius, ratio, cost)

        return jax.lax.scan(iterate, (first, radius), None, length=num_iterations)[1]

    logits, mdp = two_state()
    kl_target = target / 10  # smaller steps, for the problem is soon solved

    def by_divergence(radius: Any) -> Any:
        def iterate(carry: Any, _: Any) -> Any:
            logits, radius = carry
            gradient = policy_gradient(logits, mdp)
            new = logits + radius * gradient / jnp.linalg.norm(gradient)
            old_policy = softmax_policy(logits)
            kl = mean_state_kl(old_policy, softmax_policy(new), mdp)
            radius_after = adapt_radius_by_divergence(radius, kl, kl_target, 1e-6, 1e3)
            return (new, radius_after), (radius, kl, expected_return(old_policy, mdp))

        return jax.lax.scan(iterate, (logits, radius), None, length=num_iterations)[1]

    @jax.jit
    def measure(radius: Any, length: Any) -> Any:
        return jax.vmap(by_ratio)(radius), jax.vmap(by_divergence)(length)

    # A length of 0.13 in logits is a KL of about 0.001 at the start, and the KL goes with its square.
    found = measure(target * factors, 0.13 * np.sqrt(factors))
    (radius, ratio, cost), (length, kl, returns) = jax.tree.map(np.asarray, found)
    names = ("100 times too small", "right", "100 times too large")
    numbers = {
        "ratio_iterations_to_1_percent": dict(zip(names, (int(np.argmax(row < 0.01)) for row in cost), strict=True)),
        "ratio_excess_cost_at_the_end": dict(zip(names, cost[:, -1], strict=True)),
        "ratio_refused_steps": dict(zip(names, (int((row <= 0).sum()) for row in ratio), strict=True)),
        "divergence_first_kl_over_target": dict(zip(names, kl[:, 0] / kl_target, strict=True)),
        "divergence_kl_over_target_from_the_4th_step": [
            kl[:, 3:].min() / kl_target,
            np.median(kl[:, 3:]) / kl_target,
            kl[:, 3:].max() / kl_target,
        ],
        "divergence_return_at_the_end": dict(zip(names, returns[:, -1], strict=True)),
    }
    curves = {"ratio": (radius, ratio, cost), "divergence": (length, kl, returns), "names": names, "target": kl_target}
    return Findings(curves, numbers)


def draw_radius(findings: Findings) -> Any:
    curves = findings.curves
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(3, 2, sharex=True)
    for column, rule in enumerate(("ratio", "divergence")):
        for row, values in enumerate(curves[rule]):
            for line, name, colour in zip(values, curves["names"], (NATURAL, LIMITED, PLAIN), strict=True):
                shown = np.clip(line, -0.5, None) if (row, rule) == (1, "ratio") else line
                axes[row, column].plot(shown, ".-", color=colour, label=f"KL starts {name}" if row != 1 else None)
    target = curves["target"]
    finish(axes[0, 0], "lower left", yscale="log", title="LQR, by actual/predicted gain r", ylabel="radius δ, nats")
    axes[1, 0].axhspan(0.75, 1.6, color=BOUND, alpha=0.12, label="r > ¾: expand")
    axes[1, 0].axhspan(-0.55, 0.25, color=PLAIN, alpha=0.08, label="r < ¼: shrink")
    finish(axes[1, 0], "upper right", ylabel="r (−½: −½ or less)", ylim=(-0.55, 1.6))
    finish(axes[2, 0], "lower left", yscale="log", xlabel="iteration", ylabel="excess cost, relative")
    finish(
        axes[0, 1],
        "upper left",
        yscale="log",
        title="two states, plain gradient, by divergence",
        ylabel="step length ‖Δθ‖, logits",
        ylim=(1e-2, 1e2),
    )
    axes[1, 1].axhspan(target / 1.5, 1.5 * target, color=FAINT, alpha=0.25, label="target ÷ 1.5 … target × 1.5")
    finish(axes[1, 1], "lower right", yscale="log", ylabel="KL of the step, nats", ylim=(1e-6, None))
    finish(axes[2, 1], "best", xlabel="iteration", ylabel="return η")
    return figure
