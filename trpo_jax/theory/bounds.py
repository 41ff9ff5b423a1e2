"""Lower bounds on the gain of a policy change, η(new) − η(old), and the gain itself.

Shapes: S states, A actions; policies are tables of probabilities [S, A], see `mdps`. d = (1 − γ) ρ_old.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from trpo_jax.steps.distributions import Categorical
from trpo_jax.steps.types import Array
from trpo_jax.theory.linear_algebra import contract
from trpo_jax.theory.mdps import TabularMDP, advantages, expected_return, performance_difference, visitation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Certificate:
    """Bounds on the gain of a policy change before it is tried, and its true gain; scalars in units of return.

    Attributes:
      surrogate_gain: L(new) − L(old), the gain to first order.
      maximum_kl_bound: surrogate_gain − 4εγ/(1−γ)² · max_s KL (Schulman et al. 2015).
      mean_tv_bound: surrogate_gain − 2γε'/(1−γ)² · E_d[TV] (Achiam et al. 2017).
      mean_kl_bound: surrogate_gain − √2 γε'/(1−γ)² · √(E_d[KL]) (Achiam et al. 2017).
      true_gain: η(new) − η(old), never below any of the bounds.
      maximum_kl: max_s KL(old ‖ new), nats.
      mean_kl: E_d[KL(old ‖ new)], nats.
      mean_tv: E_d[TV(old, new)], in [0, 1].
    """

    surrogate_gain: Array
    maximum_kl_bound: Array
    mean_tv_bound: Array
    mean_kl_bound: Array
    true_gain: Array
    maximum_kl: Array
    mean_kl: Array
    mean_tv: Array


def state_kl(old: Array, new: Array) -> Array:
    """KL divergence in every state, KL(old(·|s) ‖ new(·|s)), nats, [S]; exactly 0 for equal policies."""
    return Categorical(jnp.log(old)).kl(Categorical(jnp.log(new)))


def mean_state_kl(old: Array, new: Array, mdp: TabularMDP) -> Array:
    """Mean KL divergence over the states that the old policy visits, E_d[KL(old ‖ new)], nats; needs γ < 1."""
    return (1 - mdp.gamma) * jnp.sum(_times(visitation(old, mdp), state_kl(old, new)))


def surrogate_return(old: Array, new: Array, mdp: TabularMDP) -> Array:
    """Surrogate return of a new policy, L(new) = η(old) + Σ_s ρ_old(s) Σ_a new(a|s) A_old(s, a), a scalar.

    Linear in the new policy, and equal to η in value and gradient at the old one.
    Source: Schulman et al. 2015, equation 3.
    """
    return expected_return(old, mdp) + surrogate_return_gain(old, new, mdp)


def surrogate_return_gain(old: Array, new: Array, mdp: TabularMDP) -> Array:
    """Gain of the surrogate return, L(new) − L(old) = Σ_s ρ_old(s) Σ_a (new − old)(a|s) A_old(s, a).

    Exactly 0 for equal policies.
    """
    return contract("s,sa,sa->", visitation(old, mdp), new - old, advantages(old, mdp))


def log_prob_objective(old: Array, new: Array, mdp: TabularMDP) -> Array:
    """The objective behind ∇ log π · A, Σ_s ρ_old(s) Σ_a old(a|s) log new(a|s) A_old(s, a), a scalar.

    Its gradient is that of `surrogate_return` at new = old and nowhere else. It has no maximum: where an advantage is
    negative it grows without bound as the probability of that action goes to 0.
    """
    weight = visitation(old, mdp)[:, None] * old * advantages(old, mdp)
    return jnp.sum(weight * jnp.log(jnp.where(weight == 0, 1, new)))  # not `_times`: 0 has no gradient through log


def penalty_coefficient(policy: Array, mdp: TabularMDP) -> Array:
    """Coefficient of the largest KL in a lower bound, C = 4εγ/(1 − γ)² with ε = max |A|, in units of return per nat.

    Source: Schulman et al. 2015, theorem 1.
    """
    return 4 * jnp.max(jnp.abs(advantages(policy, mdp))) * mdp.gamma / (1 - mdp.gamma) ** 2


def minorizer(old: Array, new: Array, mdp: TabularMDP) -> Array:
    """Lower bound on η(new), M(new) = L(new) − C · max_s KL(old ‖ new).

    It equals η in value and gradient at the old policy.
    Source: Schulman et al. 2015, equation 9 and theorem 1.
    """
    return surrogate_return(old, new, mdp) - _times(penalty_coefficient(old, mdp), jnp.max(state_kl(old, new)))


def certify(old: Array, new: Array, mdp: TabularMDP) -> Certificate:
    """Compute every lower bound on the gain of going from `old` to `new`, and the gain itself.

        η(new) − η(old) ≥ ΔL − 4εγ/(1−γ)² max_s KL,              ε  = max_{s,a} |A(s, a)|
        η(new) − η(old) ≥ ΔL − 2γε'/(1−γ)² E_d[TV],              ε' = max_s |Σ_a new(a|s) A(s, a)|
        η(new) − η(old) ≥ ΔL − √2 γε'/(1−γ)² √(E_d[KL])          (by Pinsker's and Jensen's inequalities)

    ε' depends on the new policy and vanishes with the change, so the last two penalties are of second order as well.

    Args:
      old: the policy whose states and advantages are known, [S, A].
      new: the candidate, [S, A].
      mdp: γ < 1.

    Returns:
      A `Certificate` of scalars.

    Source: Schulman et al. 2015, theorem 1; Achiam et al. 2017, corollaries 1 and 3.
    """
    advantage, occupancy, kl = advantages(old, mdp), visitation(old, mdp), state_kl(old, new)
    tv = jnp.sum(jnp.abs(new - old), axis=-1) / 2
    expected = jnp.sum((new - old) * advantage, axis=-1)  # Σ_a new(a|s) A(s, a): A has mean 0 under `old`
    gain = jnp.sum(occupancy * expected)
    mean_kl, mean_tv = ((1 - mdp.gamma) * jnp.sum(_times(occupancy, distance)) for distance in (kl, tv))
    scale = mdp.gamma * jnp.max(jnp.abs(expected)) / (1 - mdp.gamma) ** 2
    return Certificate(
        surrogate_gain=gain,
        maximum_kl_bound=gain - _times(penalty_coefficient(old, mdp), jnp.max(kl)),
        mean_tv_bound=gain - 2 * scale * mean_tv,
        # The rounding of a KL near 0 may leave it below 0.
        mean_kl_bound=gain - _times(jnp.sqrt(2.0) * scale, jnp.sqrt(jnp.maximum(mean_kl, 0))),
        true_gain=performance_difference(old, new, mdp),
        maximum_kl=jnp.max(kl),
        mean_kl=mean_kl,
        mean_tv=mean_tv,
    )


def _times(weight: Array, value: Array) -> Array:
    """weight · value, where a weight of 0 leaves nothing even of an infinite KL."""
    return weight * jnp.where(weight == 0, 0, value)
