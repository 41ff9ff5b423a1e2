"""Why a plain policy gradient is hard to use: its noise, its step size, and gradients that explode or vanish."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.article.drawing import BOUND, FAINT, LIMITED, NATURAL, PLAIN, SHADES, Findings, decades, finish, panels
from experiments.article.problems import bandit, two_state
from trpo_jax.theory import (
    kl_limited_gain_step,
    lqr_gradient,
    lqr_return,
    optimal_gain,
    plain_gain_step,
    policy_gradient,
    sampled_policy_gradient,
    scalar_lqr,
    softmax_policy,
    stable_interval,
    state_kl,
    state_moment,
    tabular_natural_gradient,
    tabular_trpo_step,
)

REDS = ("#fcae91", "#fb6a4a", "#cb181d", "#67000d")  # of the plain gradient's red


def compute_estimator(num_samples: Any = (10, 30, 100, 300, 1000, 3000, 10000), num_repeats: int = 1000) -> Findings:
    """Bias and spread of the sampled policy gradient, relative to the length of the exact one."""
    block = 10  # an estimate from N samples is the mean of N/10 from 10

    @jax.jit
    def measure(logits: Any, mdp: Any) -> Any:
        exact = policy_gradient(logits, mdp)

        def estimates(key: Any) -> Any:
            keys = jax.random.split(key, max(num_samples) // block)
            blocks = jax.vmap(lambda k: sampled_policy_gradient(k, logits, mdp, block))(keys)
            return jnp.stack([blocks[: count // block].mean(axis=0) for count in num_samples])

        draws = jax.lax.map(estimates, jax.random.split(jax.random.key(0), num_repeats))
        error = (draws - exact) / jnp.linalg.norm(exact)
        spread = jnp.sqrt(jnp.mean(jnp.sum(error**2, axis=(2, 3)), axis=0))
        return spread, jnp.linalg.norm(jnp.mean(error, axis=0), axis=(1, 2))

    spread, bias = map(np.asarray, measure(*two_state()))
    slope = np.polyfit(np.log(num_samples), np.log(spread), 1)[0]
    curves = {"num_samples": np.array(num_samples), "spread": spread, "bias": bias, "noise": spread / num_repeats**0.5}
    numbers = {
        "num_repeats": num_repeats,
        "relative_error": dict(zip(num_samples, spread, strict=True)),
        "bias_over_its_own_noise": bias / curves["noise"],
        "slope": slope,
    }
    return Findings(curves, numbers)


def draw_estimator(findings: Findings) -> Any:
    curves = findings.curves
    figure, (axes,) = panels(1, width=5.5)
    sizes = curves["num_samples"]
    axes.plot(sizes, curves["spread"], "o-", color=PLAIN, label="error of one estimate (root mean square)")
    axes.plot(sizes, curves["spread"][0] * np.sqrt(sizes[0] / sizes), ":", color=FAINT, label="1/√N")
    repeats = findings.numbers["num_repeats"]
    axes.plot(sizes, curves["bias"], "s--", color=NATURAL, label=f"|mean of {repeats:,} estimates − ∇η|")
    axes.fill_between(
        sizes, 1e-5, 2 * curves["noise"], color=NATURAL, alpha=0.15, label="2 standard errors of that mean: no bias"
    )
    labels = {"xlabel": "samples per gradient, N", "ylabel": "error / ‖∇η‖"}
    finish(axes, "upper right", xscale="log", yscale="log", ylim=(1e-5, 20), **labels)
    return figure


def compute_hump(
    num_sizes: int = 81, num_steps: int = 50, starts: Any = (0.01, 0.03, 0.1, 1.0), tolerance: float = 0.01
) -> Findings:
    """Excess cost on the scalar LQR after so many steps, by step size and by KL limit, from several first gains."""
    problem, std = scalar_lqr(), 0.3
    step_size, max_kl = np.logspace(-5, 1, num_sizes), np.logspace(-7, 3, num_sizes)

    def excess(step: Any) -> Any:
        def run(size: Any, start: Any) -> Any:
            first = jnp.full((1, 1), start)
            last, _ = jax.lax.scan(lambda gain, _: (step(gain, size), None), first, None, length=num_steps)
            best = lqr_return(optimal_gain(problem), problem)
            cost = (best - lqr_return(last, problem)) / -best
            return jnp.where(jnp.isfinite(cost), cost, jnp.inf)

        return jax.vmap(jax.vmap(run, (0, None)), (None, 0))

    def unchecked(gain: Any, size: Any) -> Any:
        """The KL-limited step without its line search."""
        length = jnp.sqrt(2 * size * std**2 / state_moment(gain, problem, std))
        return gain + length * jnp.sign(lqr_gradient(gain, problem))

    @jax.jit
    def measure(step_size: Any, max_kl: Any, first: Any) -> Any:
        return {
            "plain": excess(lambda gain, size: plain_gain_step(gain, problem, size))(step_size, first),
            "unchecked": excess(unchecked)(max_kl, first),
            "limited": excess(lambda k, size: kl_limited_gain_step(k, problem, std=std, max_kl=size)[0])(max_kl, first),
        }

    found = jax.tree.map(np.asarray, measure(step_size, max_kl, np.array(starts)))
    curves = {"starts": starts, "step_size": step_size, "max_kl": max_kl, **found}
    numbers: dict[str, Any] = {"num_steps": num_steps, "tolerance": tolerance}
    for name, sizes in (("plain", step_size), ("unchecked", max_kl), ("limited", max_kl)):
        works = found[name] <= tolerance
        numbers[f"{name}_decades"] = dict(zip(starts, [decades(sizes, row) for row in works], strict=True))
        common = sizes[works.all(axis=0)]
        numbers[f"{name}_works_from_every_start"] = [common.min(), common.max()] if common.size else []
        numbers[f"{name}_decades_from_every_start"] = decades(sizes, works.all(axis=0))
        numbers[f"{name}_diverged_share"] = np.mean(np.isinf(found[name]))
    return Findings(curves, numbers)


def draw_hump(findings: Findings) -> Any:
    curves, numbers = findings.curves, findings.numbers
    figure, axes = panels(3, width=3.7, sharey=True)
    which = (
        ("plain", "step_size", REDS, "plain gradient", "step size"),
        ("unchecked", "max_kl", SHADES, "KL-limited step", "KL limit δ of a step, nats"),
        ("limited", "max_kl", SHADES, "KL-limited step and line search", "KL limit δ of a step, nats"),
    )
    top = 1e3
    for panel, (name, sizes, shades, title, label) in zip(axes, which, strict=True):
        for start, row, colour in zip(curves["starts"], curves[name], shades, strict=False):
            panel.plot(curves[sizes], np.clip(row, 1e-8, top), color=colour, label=f"from k = {start:g}")
        panel.axhline(numbers["tolerance"], color=FAINT, linestyle=":", label="1 % above the optimum")
        works = (curves[name] <= numbers["tolerance"]).all(axis=0)
        panel.fill_between(
            curves[sizes], 1e-8, 2 * top, where=works, color=BOUND, alpha=0.12, label="works from every start"
        )
        place = {"plain": "lower left", "unchecked": "lower right", "limited": "upper right"}[name]
        finish(panel, place, xscale="log", yscale="log", title=title, xlabel=label, ylim=(1e-8, 2 * top))
    axes[0].set_ylabel(f"excess cost after {numbers['num_steps']} steps, relative")
    axes[0].text(1.2e-5, 0.7 * top, "at the top: unstable", fontsize=8, color=FAINT, va="top")
    return figure


def compute_terrain(num_points: int = 200, num_steps: int = 2000, step_size: float = 1.0) -> Findings:
    """Gradients that explode (LQR) and vanish (a saturated softmax), and the KL of each step along a run."""
    problem, std = scalar_lqr(), 0.3
    _, mdp = bandit([0.5, 0.5], [0.0, 1.0])
    distance, log_odds = np.geomspace(1e-4, 0.6, num_points), np.linspace(-9, 9, num_points)

    def at_gain(offset: Any) -> tuple[Any, Any]:
        gain = jnp.full((1, 1), stable_interval(problem)[0] + offset)
        limited, _ = kl_limited_gain_step(gain, problem, std=std, max_kl=0.01)
        return jnp.abs(lqr_gradient(gain, problem)[0, 0]), jnp.abs(limited - gain)[0, 0]

    def logits_of(log_odds: Any) -> Any:
        return jnp.array([[-log_odds / 2, log_odds / 2]])

    def at_odds(log_odds: Any) -> tuple[Any, Any]:
        logits = logits_of(log_odds)
        return jnp.linalg.norm(policy_gradient(logits, mdp)), jnp.linalg.norm(tabular_natural_gradient(logits, mdp))

    def run(step: Any) -> Any:
        def iterate(logits: Any, _: Any) -> tuple[Any, Any]:
            new = step(logits)
            old_policy, new_policy = softmax_policy(logits), softmax_policy(new)
            return new, (old_policy[0, 1], state_kl(old_policy, new_policy)[0])

        return jax.lax.scan(iterate, logits_of(jnp.log(1e-3 / 0.999)), None, length=num_steps)[1]

    @jax.jit
    def measure() -> Any:
        plain = run(lambda logits: logits + step_size * policy_gradient(logits, mdp))
        limited = run(lambda logits: tabular_trpo_step(logits, mdp, max_kl=0.01)[0])
        return jax.vmap(at_gain)(jnp.array(distance)), jax.vmap(at_odds)(jnp.array(log_odds)), plain, limited

    (gradient, limited_step), (plain_norm, natural_norm), plain, limited = jax.tree.map(np.asarray, measure())
    curves = {
        "distance": distance,
        "gradient": gradient,
        "limited_step": limited_step,
        "log_odds": log_odds,
        "plain_norm": plain_norm,
        "natural_norm": natural_norm,
        "plain_run": plain,
        "limited_run": limited,
    }
    escape = {name: int(np.argmax(run[0] > 0.5)) for name, run in (("plain", plain), ("limited", limited))}
    numbers = {
        "lqr_gradient_at_distance": {"0.0001": gradient[0], "0.6": gradient[-1]},
        "lqr_limited_step_range": [limited_step.min(), limited_step.max()],
        "bandit_gradient_at_0.001": np.interp(np.log(1e-3 / 0.999), log_odds, plain_norm),
        "bandit_gradient_range": [plain_norm.min(), plain_norm.max()],
        "bandit_natural_range": [natural_norm.min(), natural_norm.max()],
        "steps_to_one_half": escape,
        "plain_kl_range_until_one_half": [plain[1][: escape["plain"]].min(), plain[1][: escape["plain"] + 1].max()],
        "limited_kl_range_until_one_half": [
            limited[1][: escape["limited"]].min(),
            limited[1][: escape["limited"]].max(),
        ],
    }
    return Findings(curves, numbers)


def draw_terrain(findings: Findings) -> Any:
    curves = findings.curves
    figure, (left, middle, right) = panels(3, width=4)
    left.plot(curves["distance"], curves["gradient"], color=PLAIN, label="|∂η/∂k|")
    left.plot(curves["distance"], curves["limited_step"], color=LIMITED, label="|Δk| of a step of KL ≤ 0.01")
    finish(
        left,
        xscale="log",
        yscale="log",
        title="explodes: LQR near its edge",
        xlabel="distance of the gain k from instability",
        ylabel="size",
    )
    odds = curves["log_odds"] / np.log(10)
    middle.plot(odds, curves["plain_norm"], color=PLAIN, label="‖∇η‖ = √2 p(1 − p)")
    middle.plot(odds, curves["natural_norm"], color=LIMITED, label="‖F⁺∇η‖")
    finish(
        middle,
        yscale="log",
        title="vanishes: a saturated softmax",
        xlabel="probability p of the better action",
        ylabel="size",
    )
    middle.set_xticks([-3, -2, -1, 0, 1, 2, 3], [".001", ".01", ".09", ".5", ".91", ".99", ".999"])
    for name, colour, label in (("plain_run", PLAIN, "step size 1"), ("limited_run", LIMITED, "δ = 0.01")):
        _, kl = curves[name]
        seen = kl > 1e-9
        right.plot(np.arange(1, kl.size + 1)[seen], kl[seen], color=colour, label=label)
        half = findings.numbers["steps_to_one_half"]["plain" if name == "plain_run" else "limited"]
        right.plot(half + 1, kl[half], "o", color=colour)
    right.plot([], [], "o", color=FAINT, label="p passes ½")
    finish(
        right,
        xscale="log",
        yscale="log",
        title="the same bandit, from p = 0.001",
        xlabel="step",
        ylabel="KL of the step, nats",
    )
    return figure
