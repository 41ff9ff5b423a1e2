"""Exact policy improvement in a tabular MDP: minorize–maximize, natural gradient, TRPO and the plain gradient.

Shapes: S states, A actions; policies π are tables of probabilities [S, A], logits θ their softmax parameters.
"""

from __future__ import annotations

import jax.numpy as jnp

from trpo_jax.steps.line_searches import LineSearchInfo, backtracking_line_search
from trpo_jax.steps.types import Array, Scalar
from trpo_jax.theory.bounds import penalty_coefficient, state_kl
from trpo_jax.theory.linear_algebra import decreasing_root
from trpo_jax.theory.mdps import TabularMDP, action_values, advantages, policy_gradient, softmax_policy, visitation


def best_policy_within(policy: Array, advantage: Array, max_kl: Scalar) -> Array:
    """The best policy within a KL bound, state by state: argmax_π̃ Σ_a π̃(a|s) A(s, a) subject to KL(π ‖ π̃) ≤ κ.

    Stationarity of the Lagrangian gives π̃ = λ π/(ν − A) with ν > max A. λ normalises, and KL falls from ∞ to 0 as ν
    grows, so ν is the root of one equation in one unknown.

    Args:
      policy: π, [S, A].
      advantage: A, [S, A]; a constant added to a state's row changes nothing.
      max_kl: κ > 0, nats, a scalar or [S].

    Returns:
      π̃, [S, A]. A state in which all advantages are equal keeps its policy. κ is reached up to about 30 (1 − π*) nats,
      where π* is the probability of the best action: by then π̃ is greedy for all purposes.
    """
    return _best_within(policy, advantage, max_kl)[0]


def minorizer_step(policy: Array, mdp: TabularMDP, penalty: Scalar | None = None) -> Array:
    """Compute the exact maximiser of M(π̃) = L(π̃) − C max_s KL(π ‖ π̃), which never lowers the return.

    For a given κ = max_s KL the states separate, see `best_policy_within`. The gain g_s(κ) of a state is concave and
    its slope is the multiplier λ_s, so the best κ solves Σ_s ρ(s) λ_s(κ) = C: a root within a root.

    Args:
      policy: π, [S, A].
      mdp: γ < 1.
      penalty: C > 0; None: `penalty_coefficient(policy, mdp)`, with which M is a lower bound on η. With a smaller one
        the return may fall.

    Returns:
      π̃, [S, A]. κ is at most 20 nats, since C may be 0.

    Source: Schulman et al. 2015, algorithm 1; the solution of the maximisation is our own derivation.
    """
    advantage, occupancy = _beyond_rounding(policy, mdp), visitation(policy, mdp)
    if penalty is None:
        penalty = penalty_coefficient(policy, mdp)

    def slope(log_kl: Array) -> Array:
        multiplier = _best_within(policy, advantage, jnp.exp(log_kl))[1]
        return jnp.sum(occupancy * multiplier) - penalty

    low, high = jnp.asarray(-60, advantage.dtype), jnp.asarray(jnp.log(20), advantage.dtype)
    return _best_within(policy, advantage, jnp.exp(decreasing_root(slope, low, high, num_iterations=40)))[0]


def tabular_natural_gradient(logits: Array, mdp: TabularMDP) -> Array:
    """Natural gradient F⁺∇η in closed form, [S, A]: (A(s, a) − mean_b A(s, b)) / (1 − γ) where ρ(s) > 0, else 0.

    It is the shortest solution of F x = ∇η. F = diag_s d(s) (diag π_s − π_s π_sᵀ) is the Hessian of the mean KL at θ.
    A constant added to the logits of a state does not change it, and the shortest solution adds none. Needs γ < 1.

    Source: Kakade 2001, theorem 1.
    """
    policy = softmax_policy(logits)
    advantage = _beyond_rounding(policy, mdp)
    centred = advantage - jnp.mean(advantage, axis=-1, keepdims=True)
    return jnp.where(visitation(policy, mdp)[:, None] > 0, centred / (1 - mdp.gamma), 0)


def tabular_trpo_step(
    logits: Array, mdp: TabularMDP, *, max_kl: Scalar = 0.01, shrink: Scalar = 0.8, max_steps: int = 10
) -> tuple[Array, LineSearchInfo]:
    """Exact TRPO step, θ + αʲ β F⁺∇η with β = √(2δ / ∇ηᵀF⁺∇η), for the first j that passes.

    A candidate passes if ΔL > 0 and E_d[KL(old ‖ new)] ≤ δ. Gradient, Fisher matrix, surrogate and KL are all exact:
    this is the step that samples approximate.

    Args:
      logits: θ, [S, A].
      mdp: γ < 1.
      max_kl: δ > 0, a bound on the mean KL, nats.
      shrink: α in (0, 1).
      max_steps: candidates j = 0 … max_steps − 1 (static).

    Returns:
      New logits, bit-identical to the old ones if no candidate passed, and a `LineSearchInfo`.

    Source: Schulman et al. 2015, Appendix C.
    """
    direction = tabular_natural_gradient(logits, mdp)
    old = softmax_policy(logits)
    occupancy = visitation(old, mdp)
    slope = occupancy[:, None] * _beyond_rounding(old, mdp)  # ∂L/∂π̃(a|s)
    curvature = jnp.sum(old * slope * direction)  # ∇ηᵀF⁺∇η
    positive = curvature > 0
    beta = jnp.where(positive, jnp.sqrt(2 * max_kl / jnp.where(positive, curvature, 1)), 0)

    def evaluate(candidate: Array) -> tuple[Array, Array]:
        new = softmax_policy(candidate)
        return jnp.sum(slope * (new - old)), (1 - mdp.gamma) * jnp.sum(occupancy * state_kl(old, new))

    step = beta * direction
    return backtracking_line_search(evaluate, logits, step, max_kl=max_kl, shrink=shrink, max_steps=max_steps)


def natural_gradient_step(logits: Array, mdp: TabularMDP, step_size: Scalar) -> Array:
    """Take a natural-gradient step, θ + step_size · F⁺∇η, [S, A]. Source: Kakade 2001."""
    return logits + step_size * tabular_natural_gradient(logits, mdp)


def plain_gradient_step(logits: Array, mdp: TabularMDP, step_size: Scalar) -> Array:
    """Take a plain gradient step, θ + step_size · ∇η, [S, A]."""
    return logits + step_size * policy_gradient(logits, mdp)


def _beyond_rounding(policy: Array, mdp: TabularMDP) -> Array:
    """Advantages [S, A], or exact zeros in a state where all of them are rounding errors of its action values."""
    advantage = advantages(policy, mdp)
    largest = jnp.max(jnp.abs(action_values(policy, mdp)))
    errors = 16 * jnp.finfo(advantage.dtype).eps * largest  # three times the largest seen for a constant reward
    return jnp.where(jnp.max(jnp.abs(advantage), axis=-1, keepdims=True) <= errors, 0, advantage)


def _best_within(policy: Array, advantage: Array, max_kl: Scalar) -> tuple[Array, Array]:
    """`best_policy_within`, and the multiplier λ_s of its constraint, [S]."""
    # With A of mean 0 under π, x = A/ν and y = 1 − x > 0: π̃ ∝ π/y, and KL = log Σ π/y + Σ π log y.
    advantage = advantage - jnp.sum(policy * advantage, axis=-1, keepdims=True)
    scale = jnp.max(jnp.where(policy > 0, jnp.abs(advantage), 0), axis=-1, keepdims=True)
    flat = scale <= 4 * jnp.finfo(scale.dtype).eps * jnp.max(jnp.abs(advantage))  # all of it is rounding
    centred = jnp.where(flat, 0, advantage / jnp.where(flat, 1, scale))
    top = jnp.max(jnp.where(policy > 0, centred, -1), axis=-1, keepdims=True)

    def tilt(log_excess: Array) -> tuple[Array, ...]:
        """x, y and ν at ν = max A + exp(log_excess), all in units of `scale`."""
        excess = jnp.exp(log_excess)[:, None]
        nu = top + excess
        return centred / nu, jnp.where(policy > 0, (top - centred + excess) / nu, 1), nu

    def kl_excess(log_excess: Array) -> Array:
        # Σ π/y = 1 + Σ π x²/y, as Σ π x = 0: with the 1 in it, the sum would drown a small KL in rounding.
        x, y, _ = tilt(log_excess)
        log_y = jnp.where(jnp.abs(x) < 0.5, jnp.log1p(-jnp.where(jnp.abs(x) < 0.5, x, 0)), jnp.log(y))
        kl = jnp.log1p(jnp.sum(policy * x**2 / y, axis=-1)) + jnp.sum(policy * log_y, axis=-1)
        return kl - max_kl

    ends = jnp.full(policy.shape[0], 35, policy.dtype)
    _, y, nu = tilt(decreasing_root(kl_excess, -ends, ends, num_iterations=50))
    weight = policy / y
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return jnp.where(flat, policy, weight / total), jnp.where(flat, 0, scale * nu / total)[:, 0]
