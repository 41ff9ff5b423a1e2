"""Linear-quadratic regulation: a problem with a cliff, where the return and its gradient are exact.

    x_{t+1} = A x_t + B u_t,   u = −K x,   η(K) = −E[Σ_t γᵗ (xᵀQ x + uᵀR u)]

A gain K outside the stable set has return −∞, and the gradient grows without bound towards its edge. The policy whose
KL divergence limits a step is N(−K x, σ² I); η is the return of its mean.

Shapes: n state dimensions, m control dimensions; gains are [m, n].
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from trpo_jax.steps.line_searches import LineSearchInfo, backtracking_line_search
from trpo_jax.steps.types import Array, Scalar
from trpo_jax.theory.linear_algebra import product, solve

_DOUBLINGS = 40  # 2⁴⁰ steps: further than float64 can tell the edge of the stable set


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LQR:
    """A linear system with a quadratic cost.

    Attributes:
      dynamics: A, [n, n].
      control: B, [n, m].
      state_cost: Q, positive definite, [n, n].
      control_cost: R, positive definite, [m, m].
      initial: E[x_0 x_0ᵀ], positive definite, [n, n].
      gamma: γ in [0, 1]; a KL needs γ < 1.
    """

    dynamics: Array
    control: Array
    state_cost: Array
    control_cost: Array
    initial: Array
    gamma: Scalar


def scalar_lqr(a: Scalar = 1.0, b: Scalar = 1.0, q: Scalar = 1.0, r: Scalar = 1.0, gamma: Scalar = 0.99) -> LQR:
    """Make a problem of one state and one control with E[x_0²] = 1: η(k) = −(q + r k²) / (1 − γ (a − b k)²)."""
    a, b, q, r, one = (jnp.full((1, 1), value, float) for value in (a, b, q, r, 1.0))
    return LQR(a, b, q, r, one, jnp.asarray(gamma, float))


def lqr_return(gain: Array, problem: LQR) -> Array:
    """Return of a gain, η(K) = −tr(P E[x_0 x_0ᵀ]); −∞ if K is not stabilising.

    P = Q + KᵀR K + γ (A − B K)ᵀ P (A − B K).
    """
    value, stable = _cost_to_go(gain, problem)
    return jnp.where(stable, -jnp.sum(value * problem.initial), -jnp.inf)


def lqr_gradient(gain: Array, problem: LQR) -> Array:
    """Gradient of the return, [m, n]; NaN if K is not stabilising.

    ∇η(K) = −2 [(R + γ BᵀP B) K − γ BᵀP A] X with X = Σ_t γᵗ E[x_t x_tᵀ] and P as in `lqr_return`.

    Source: Fazel et al. 2018, lemma 1, with a discount.
    """
    value, stable = _cost_to_go(gain, problem)
    closed_loop = _closed_loop(gain, problem)
    moment, _ = _discounted_sum(closed_loop.T, problem.initial, problem.gamma)
    slope = product(problem.control_cost, gain) - problem.gamma * product(problem.control.T, value, closed_loop)
    return jnp.where(stable, -2 * product(slope, moment), jnp.nan)


def optimal_gain(problem: LQR, num_iterations: int = 1000) -> Array:
    """The optimal gain, K* = (R + γ BᵀP B)⁻¹ γ BᵀP A, [m, n]; P is the fixed point of the discounted Riccati equation.

    P ← Q + γ AᵀP (A − B K) is value iteration; it contracts by γ ρ(A − B K*)² per step.

    Args:
      problem: (A, B) stabilisable up to √γ.
      num_iterations: steps of value iteration (static).

    Source: Bertsekas, "Dynamic Programming and Optimal Control", volume 1, section 3.1.
    """
    a, b, gamma = problem.dynamics, problem.control, problem.gamma

    def greedy(value: Array) -> Array:
        return solve(problem.control_cost + gamma * product(b.T, value, b), gamma * product(b.T, value, a))

    def iterate(_: int, value: Array) -> Array:
        return problem.state_cost + gamma * product(a.T, value, a - product(b, greedy(value)))

    return greedy(jax.lax.fori_loop(0, num_iterations, iterate, problem.state_cost))


def stable_interval(problem: LQR) -> tuple[Array, Array]:
    """The open interval of gains k with γ (a − b k)² < 1, for one state and one control.

    Returns:
      The lower and the upper end, (a ∓ 1/√γ)/b, scalars.

    Raises:
      ValueError: for more than one state or control.
    """
    if problem.control.shape != (1, 1):
        raise ValueError(f"an interval of gains needs one state and one control, got B of {problem.control.shape}")
    a, b, reach = problem.dynamics[0, 0], problem.control[0, 0], 1 / jnp.sqrt(problem.gamma)
    ends = (a - reach) / b, (a + reach) / b
    return jnp.minimum(*ends), jnp.maximum(*ends)


def state_moment(gain: Array, problem: LQR, std: Scalar) -> Array:
    """Second moment of the states, E_d[x xᵀ], [n, n], under the policy N(−K x, σ² I).

    d is the normalised discounted state distribution. X = Σ_t γᵗ E[x_t x_tᵀ] solves
    X = E[x_0 x_0ᵀ] + γ (A − B K) X (A − B K)ᵀ + γ/(1 − γ) σ² B Bᵀ, where the last term is the noise that every later
    step adds; E_d[x xᵀ] = (1 − γ) X.

    Args:
      gain: K, [m, n].
      problem: γ < 1.
      std: σ ≥ 0.
    """
    noise = problem.gamma * std**2 * product(problem.control, problem.control.T)
    source = (1 - problem.gamma) * problem.initial + noise
    return _discounted_sum(_closed_loop(gain, problem).T, source, problem.gamma)[0]


def gain_kl(old: Array, new: Array, problem: LQR, std: Scalar) -> Array:
    """Mean KL divergence of a change of gain, E_d[KL(old ‖ new)] = tr(Δ E_d[x xᵀ] Δᵀ) / 2σ² with Δ = new − old, nats.

    At a state x the means −K x differ by −Δ x, and equal-variance Gaussians have KL ‖Δ x‖² / 2σ². As that is exactly
    quadratic in Δ, the Fisher matrix gives it without error.
    """
    change = new - old
    return jnp.sum(product(change, state_moment(old, problem, std)) * change) / (2 * std**2)


def plain_gain_step(gain: Array, problem: LQR, step_size: Scalar) -> Array:
    """Take a plain gradient step, K + step_size · ∇η(K), [m, n]; from outside the stable set there is no way back."""
    return gain + step_size * lqr_gradient(gain, problem)


def kl_limited_gain_step(
    gain: Array, problem: LQR, *, std: Scalar, max_kl: Scalar = 0.01, shrink: Scalar = 0.8, max_steps: int = 20
) -> tuple[Array, LineSearchInfo]:
    """Take the natural-gradient step with E_d[KL] = δ, shortened until the exact return improves.

    The natural direction is ∇η E_d[x xᵀ]⁻¹, as F maps Δ to Δ E_d[x xᵀ]/σ².

    Args:
      gain: K, stabilising, [m, n].
      problem: γ < 1.
      std: σ > 0 of the policy.
      max_kl: δ > 0, nats.
      shrink: α in (0, 1).
      max_steps: candidates (static).

    Returns:
      The new gain, bit-identical to the old one if no candidate improves the return, and a `LineSearchInfo`, whose
      `surrogate_gain` is here the gain in η itself.
    """
    gradient = lqr_gradient(gain, problem)
    direction = solve(state_moment(gain, problem, std), gradient.T).T
    curvature = jnp.sum(gradient * direction) / std**2
    positive = curvature > 0
    inside = 1 - 16 * jnp.finfo(gain.dtype).eps  # the KL is exactly δ: rounding must not reject the full step
    beta = jnp.where(positive, inside * jnp.sqrt(2 * max_kl / jnp.where(positive, curvature, 1)), 0)
    start = lqr_return(gain, problem)

    def evaluate(candidate: Array) -> tuple[Array, Array]:
        return lqr_return(candidate, problem) - start, gain_kl(gain, candidate, problem, std)

    step = beta * direction
    return backtracking_line_search(evaluate, gain, step, max_kl=max_kl, shrink=shrink, max_steps=max_steps)


def _cost_to_go(gain: Array, problem: LQR) -> tuple[Array, Array]:
    cost = problem.state_cost + product(gain.T, problem.control_cost, gain)
    return _discounted_sum(_closed_loop(gain, problem), cost, problem.gamma)


def _closed_loop(gain: Array, problem: LQR) -> Array:
    return problem.dynamics - product(problem.control, gain)


def _discounted_sum(matrix: Array, term: Array, gamma: Scalar) -> tuple[Array, Array]:
    """Σ_t γᵗ (matrixᵗ)ᵀ term matrixᵗ, and whether it converges; by doubling, S_2t = S_t + (Lᵗ)ᵀ S_t Lᵗ."""

    def double(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, power = carry
        return total + product(power.T, total, power), product(power, power)

    total, power = jax.lax.fori_loop(0, _DOUBLINGS, double, (term, jnp.sqrt(gamma) * matrix))
    return total, jnp.max(jnp.abs(power)) < 0.1  # false for NaN, where an unstable sum ends
