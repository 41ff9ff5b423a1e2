"""How far a change of the parameters moves the policy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.article.drawing import LIMITED, PLAIN, Findings, finish, panels
from experiments.article.problems import two_state
from trpo_jax import DiagonalGaussian
from trpo_jax.theory import (
    expected_return,
    mean_state_kl,
    softmax_policy,
    solve,
)


def compute_distance(num_steps: int = 10, num_parametrisations: int = 6, shift: float = 0.1) -> Findings:
    """KL of a fixed change of parameters against σ, and paths of one problem written in several parametrisations."""
    max_kl, std, golden = 0.01, np.geomspace(0.005, 3, 60), (1.0, 0.1, 0.01)
    logits, mdp = two_state()

    def kl_of(move: Any, sigma: Any) -> Any:
        old, new = (DiagonalGaussian(mean[None], jnp.log(sigma)[None]) for mean in (0 * move, move))
        return old.kl(new)

    def to_policy(log_odds: Any) -> Any:
        return softmax_policy(jnp.stack([jnp.zeros(2), log_odds], axis=-1))

    def value(log_odds: Any) -> Any:
        return expected_return(to_policy(log_odds), mdp)

    def steps_of(log_odds: Any, mixing: Any) -> Any:
        """The natural and the plain step in φ, where z = M φ, both of KL 0.01, turned back into log-odds z."""
        gradient = mixing.T @ jax.grad(value)(log_odds)

        def divergence(z: Any) -> Any:
            return mean_state_kl(to_policy(log_odds), to_policy(z), mdp)

        fisher = mixing.T @ jax.hessian(divergence)(log_odds) @ mixing
        natural = solve(fisher, gradient)
        # Either is as long as the KL allows, so that only the directions differ.
        steps = (jnp.sqrt(2 * max_kl / (step @ fisher @ step)) * step for step in (natural, gradient))
        return jnp.stack([mixing @ step for step in steps])

    def paths(mixing: Any) -> Any:
        def iterate(both: Any, _: Any) -> tuple[Any, Any]:
            taken = jax.vmap(steps_of, (0, None))(both, mixing)
            return both + jnp.stack([taken[0, 0], taken[1, 1]]), jax.vmap(to_policy)(both)[..., 1]

        first = logits[:, 1] - logits[:, 0]
        return jax.lax.scan(iterate, jnp.stack([first, first]), None, length=num_steps)[1]

    rng = np.random.default_rng(1)
    mixings = [np.eye(2)]
    for angle in rng.uniform(0, np.pi, num_parametrisations - 1):
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        mixings.append(rotation @ np.diag([3.0, 1 / 3]) @ rotation.T)
    probability = np.linspace(0.005, 0.995, 60)
    table = np.stack(np.meshgrid(probability, probability, indexing="ij"), axis=-1).reshape(-1, 2)

    @jax.jit
    def measure(std: Any, mixings: Any, table: Any) -> Any:
        moves = shift * jnp.ones_like(std), std * jnp.sqrt(2 * max_kl)
        returns = jax.vmap(lambda p: expected_return(jnp.stack([1 - p, p], axis=-1), mdp))(table)
        return [jax.vmap(kl_of)(move, std) for move in moves], jax.vmap(paths)(mixings), returns

    found = measure(np.concatenate([std, golden]), np.stack(mixings), table)
    (fixed, natural), both, returns = jax.tree.map(np.asarray, found)
    natural_paths, plain_paths = both[:, :, 0], both[:, :, 1]
    curves = {
        "std": std,
        "fixed": fixed[: std.size],
        "natural": natural[: std.size],
        "probability": probability,
        "returns": returns.reshape(60, 60),
        "natural_paths": natural_paths,
        "plain_paths": plain_paths,
    }
    numbers = {
        "kl_of_a_shift_of_0.1_by_sigma": dict(zip(golden, fixed[std.size :], strict=True)),
        "natural_kl_range": [natural.min(), natural.max()],
        "natural_paths_apart": np.abs(natural_paths - natural_paths[0]).max(),
        "plain_paths_apart": np.abs(plain_paths - plain_paths[0]).max(),
    }
    return Findings(curves, numbers)


def draw_distance(findings: Findings) -> Any:
    curves = findings.curves
    figure, (left, right) = panels(2, width=4.8, height=3.9)
    left.plot(curves["std"], curves["fixed"], color=PLAIN, label="the mean moves by 0.1")
    left.plot(curves["std"], curves["natural"], color=LIMITED, label="the mean moves by σ√(2δ), δ = 0.01")
    for sigma, kl in findings.numbers["kl_of_a_shift_of_0.1_by_sigma"].items():
        left.plot(float(sigma), kl, "o", color=PLAIN)
        left.annotate(f"{kl:.3g}", (float(sigma), kl), (6, 4), textcoords="offset points", fontsize=8)
    finish(
        left,
        "lower left",
        xscale="log",
        yscale="log",
        title="one Δθ, many distances",
        xlabel="standard deviation σ of the policy",
        ylabel="KL(old ‖ new), nats",
        ylim=(1e-5, None),
    )
    p = curves["probability"]
    contours = right.contourf(p, p, curves["returns"].T, levels=14, cmap="Greys", alpha=0.6)
    figure.colorbar(contours, ax=right, label="η")
    for i, path in enumerate(curves["plain_paths"]):
        right.plot(*path.T, color=PLAIN, linewidth=1, label="plain, 6 parametrisations" if i == 0 else None)
    for i, path in enumerate(curves["natural_paths"]):
        right.plot(*path.T, color=LIMITED, linewidth=2, label="natural, the same 6" if i == 0 else None)
    right.plot(*curves["natural_paths"][0][0], "o", color="black", markersize=5, label="start")
    finish(
        right,
        "upper right",
        title="one problem, many parametrisations",
        xlabel="π(second action | first state)",
        ylabel="π(second action | second state)",
    )
    return figure
