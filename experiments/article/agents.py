"""What takes whole training runs to see: how many samples each method needs, and what old samples are good for."""

from typing import Any

import jax
import numpy as np

from experiments.article.drawing import FAINT, LIMITED, NATURAL, PLAIN, SURROGATE, Findings, finish, panels
from trpo_jax import Config, interquartile_mean, stratified_bootstrap, sweep

TUNING_KEY, EVALUATION_KEY = 10_000, 0  # other seeds choose a step size than judge it
SOLVED = 475
_RADII, _RATES = (0.003, 0.01, 0.03, 0.1), (1e-3, 3e-3, 1e-2, 3e-2)
# Each method with as many step sizes to choose from.
METHODS: dict[str, tuple[dict[str, Any], str, tuple[float, ...], str]] = {
    "REINFORCE": (
        {"update": "policy-gradient", "baseline": False, "gae_lambda": 1.0},
        "policy_learning_rate",
        _RATES,
        FAINT,
    ),
    "policy gradient": ({"update": "policy-gradient"}, "policy_learning_rate", _RATES, PLAIN),
    "PPO": ({"update": "ppo"}, "policy_learning_rate", _RATES, SURROGATE),
    "natural gradient": ({"line_search": "none"}, "max_kl", _RADII, NATURAL),
    "TRPO": ({}, "max_kl", _RADII, LIMITED),
    "TRPO, 2 batches of half the size": ({"reuse": 2, "num_steps": 64}, "max_kl", _RADII, "#041f4a"),
}


def train(settings: dict[str, Any], grid: dict[str, Any], env_steps: int, seed: int, num_seeds: int) -> Any:
    """CartPole's training returns [points, seeds, iterations], without gaps, and the steps of an iteration."""
    config = Config(**settings)
    config = config.replace(num_iterations=env_steps // config.steps_per_iteration)
    metrics = sweep(config, grid, jax.random.key(seed), num_seeds=num_seeds, num_episodes=0).metrics
    return filled(np.asarray(metrics.episode_return)), config.steps_per_iteration, metrics


def filled(returns: np.ndarray) -> np.ndarray:
    """Where no episode ended in an iteration, the return of the one before."""
    returns = returns.copy()
    for t in range(1, returns.shape[-1]):
        missing = np.isnan(returns[..., t])
        returns[..., t][missing] = returns[..., t - 1][missing]
    return returns


def compute_efficiency(env_steps: int = 100_000, num_tuning: int = 8, num_seeds: int = 64) -> Findings:
    """Every method at the best of four step sizes (by its mean return over the run, on other seeds)."""
    curves: dict[str, Any] = {}
    numbers: dict[str, Any] = {}
    for name, (settings, setting, sizes, _) in METHODS.items():
        tuning, *_ = train(settings, {setting: sizes}, env_steps, TUNING_KEY, num_tuning)
        best = sizes[int(np.argmax(np.nanmean(tuning, axis=(1, 2))))]
        returns, per_iteration, _ = train(settings, {setting: [best]}, env_steps, EVALUATION_KEY, num_seeds)
        returns = returns[0]
        solved = returns >= SOLVED
        # A run that never gets there counts as one that does after its last step.
        needed = np.where(solved.any(1), (np.argmax(solved, axis=1) + 1) * per_iteration, env_steps)
        curves[name] = {
            "steps": per_iteration * np.arange(1, returns.shape[1] + 1),
            "iqm": np.array([interquartile_mean(column) for column in returns.T]),
            "interval": np.array([stratified_bootstrap([column]) for column in returns.T]),
        }
        numbers[name] = {
            setting: best,
            "iqm_steps_to_475": float(interquartile_mean(needed)),
            "interval": stratified_bootstrap([needed]),
            "seeds_that_got_there": int(solved.any(1).sum()),
            "iqm_of_the_last_tenth": float(interquartile_mean(returns[:, -returns.shape[1] // 10 :].mean(axis=1))),
        }
    return Findings(curves, numbers)


def draw_efficiency(findings: Findings) -> Any:
    """Learning curves, and env steps to a return of 475."""
    figure, (left, right) = panels(2, width=5.2, height=4.0)
    for i, (name, curve) in enumerate(findings.curves.items()):
        color = METHODS[name][3]
        steps = np.asarray(curve["steps"]) / 1000
        left.plot(steps, curve["iqm"], color=color, label=name)
        left.fill_between(steps, *np.asarray(curve["interval"]).T, color=color, alpha=0.15)
        found = findings.numbers[name]
        low, high = (bound / 1000 for bound in found["interval"])
        middle = found["iqm_steps_to_475"] / 1000
        right.barh(i, middle, color=color, alpha=0.7)
        right.plot([low, high], [i, i], color="black", linewidth=2)
    right.barh([0], [0], color=FAINT, alpha=0.7, label="IQM of the seeds")
    right.plot([], [], color="black", linewidth=2, label="95 % interval")
    right.set_yticks(range(len(findings.curves)), list(findings.curves))
    right.invert_yaxis()
    finish(left, "lower right", title="CartPole-v1", xlabel="env steps, thousands", ylabel="training return, IQM")
    finish(right, "lower right", title=f"steps to a return of {SOLVED}", xlabel="env steps, thousands")
    return figure


def compute_batches(
    reuses: Any = (1, 2, 4, 8, 16), env_steps: int = 60_000, num_steps: int = 32, num_seeds: int = 32
) -> Findings:
    """TRPO on batches of 16 x 32 steps, learning from the last K of them; δ shrinks with K as the theory asks."""
    curves: dict[str, Any] = {}
    numbers: dict[str, Any] = {}
    for reuse in reuses:
        settings = {"reuse": reuse, "num_steps": num_steps}
        returns, per_iteration, metrics = train(settings, {"max_kl": [0.01]}, env_steps, EVALUATION_KEY, num_seeds)
        fraction, radius = np.asarray(metrics.effective_sample_fraction[0]), np.asarray(metrics.radius[0])
        curves[str(reuse)] = {
            "steps": per_iteration * np.arange(1, returns.shape[2] + 1),
            "iqm": np.array([interquartile_mean(column) for column in returns[0].T]),
            "fraction": np.median(fraction, axis=0),
        }
        late = returns[0][:, returns.shape[2] // 2 :].mean(axis=1)
        numbers[str(reuse)] = {
            "radius": float(radius[0, -1]),
            "median_effective_fraction": float(np.median(fraction[:, reuse:])),
            "effective_samples": float(np.median(fraction[:, reuse:])) * reuse * per_iteration,
            "iqm_return_of_the_second_half": float(interquartile_mean(late)),
            "interval": stratified_bootstrap([late]),
        }
    return Findings(curves, numbers)


def draw_batches(findings: Findings) -> Any:
    """Return and effective share of the samples along training, a curve for each K."""
    figure, (left, right) = panels(2, width=5.0, height=3.6)
    for i, (reuse, curve) in enumerate(findings.curves.items()):
        color = f"C{i}"
        steps = np.asarray(curve["steps"]) / 1000
        smooth = np.convolve(curve["iqm"], np.ones(5) / 5, mode="valid") if len(steps) > 9 else curve["iqm"]
        left.plot(steps[-len(smooth) :], smooth, color=color, label=f"K = {reuse}")
        right.plot(steps, curve["fraction"], color=color, label=f"K = {reuse}")
    finish(left, title="TRPO on the last K batches of 512 steps", xlabel="env steps, thousands", ylabel="return, IQM")
    finish(right, title="effective share of the samples", xlabel="env steps, thousands", ylabel="ESS / N, median")
    return figure
