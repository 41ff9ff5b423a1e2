"""Tabular Markov decision processes, whose returns, advantages and gradients are exact.

Shapes: S states, A actions. A policy is a table of probabilities π(a|s), [S, A]; policies come first among the
arguments, so that `jax.grad` differentiates with respect to them. Every function takes one policy and one MDP; `vmap`
it over many of either. Results have the dtype of the inputs.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp

from trpo_jax.steps.distributions import Categorical
from trpo_jax.steps.types import Array, Scalar
from trpo_jax.theory.linear_algebra import contract, solve


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TabularMDP:
    """A finite Markov decision process with known dynamics.

    Attributes:
      transition: P(s'|s, a), [S, A, S], each [s, a] summing to 1.
      reward: r(s, a), expected reward of one step, [S, A].
      initial: μ(s), distribution of the first state, [S].
      gamma: discount γ in [0, 1), scalar; 1 is for `finite_horizon_values` only.
    """

    transition: Array
    reward: Array
    initial: Array
    gamma: Scalar


def garnet(key: Array, num_states: int, num_actions: int, branching: int, gamma: Scalar) -> TabularMDP:
    """Make a random MDP: each (s, a) leads to `branching` distinct states, with flat Dirichlet probabilities.

    Rewards are standard normal, the first state is uniform, the dtype is JAX's default.

    Args:
      key: random key.
      num_states: S (static).
      num_actions: A (static).
      branching: successors of each state and action, 1 … S (static).
      gamma: γ in [0, 1].

    Raises:
      ValueError: if `branching` is outside 1 … S.

    Source: Archibald, McKinnon & Thomas 1995.
    """
    if not 1 <= branching <= num_states:
        raise ValueError(f"branching must be in 1 … num_states = {num_states}, got {branching}")
    successor_key, probability_key, reward_key = jax.random.split(key, 3)
    shape = num_states, num_actions, num_states
    order = jax.random.uniform(successor_key, shape)
    rank = jnp.sum(order[..., None, :] < order[..., None], axis=-1)
    # Normalised exponentials are a flat Dirichlet sample.
    mass = jnp.where(rank < branching, jax.random.exponential(probability_key, shape), 0)
    transition = mass / jnp.sum(mass, axis=-1, keepdims=True)
    reward = jax.random.normal(reward_key, shape[:2])
    initial = jnp.full(num_states, 1 / num_states, reward.dtype)
    return TabularMDP(transition, reward, initial, jnp.asarray(gamma, reward.dtype))


def softmax_policy(logits: Array) -> Array:
    """Softmax policy of logits θ, π(a|s) = exp θ(s, a) / Σ_b exp θ(s, b), [S, A]."""
    return jax.nn.softmax(logits)


def state_values(policy: Array, mdp: TabularMDP) -> Array:
    """Expected discounted return from each state, V = (I − γ P_π)⁻¹ r_π, [S]."""
    transition, reward = _chain(policy, mdp)
    return solve(jnp.eye(reward.size, dtype=reward.dtype) - mdp.gamma * transition, reward)


def action_values(policy: Array, mdp: TabularMDP) -> Array:
    """Action values, Q(s, a) = r(s, a) + γ Σ_s' P(s'|s, a) V(s'), [S, A]."""
    return mdp.reward + mdp.gamma * contract("sat,t->sa", mdp.transition, state_values(policy, mdp))


def advantages(policy: Array, mdp: TabularMDP) -> Array:
    """Advantages, A(s, a) = Q(s, a) − V(s), [S, A]; their mean under the policy is 0 in every state."""
    values = action_values(policy, mdp)
    return values - jnp.sum(policy * values, axis=-1, keepdims=True)


def visitation(policy: Array, mdp: TabularMDP) -> Array:
    """Discounted visits, ρ(s) = Σ_t γᵗ P(s_t = s) = [(I − γ P_πᵀ)⁻¹ μ](s), [S], summing to 1/(1 − γ).

    The normalised distribution is d = (1 − γ) ρ.
    """
    transition, reward = _chain(policy, mdp)
    return solve(jnp.eye(reward.size, dtype=reward.dtype) - mdp.gamma * transition.T, mdp.initial)


def expected_return(policy: Array, mdp: TabularMDP) -> Array:
    """Expected return, η(π) = Σ_s μ(s) V(s) = E[Σ_t γᵗ r_t], a scalar."""
    return jnp.sum(mdp.initial * state_values(policy, mdp))


def finite_horizon_values(policy: Array, mdp: TabularMDP, num_steps: int) -> Array:
    """Expected return of the remaining steps, V_t = r_π + γ P_π V_{t+1} with V_T = 0.

    Args:
      policy: [S, A], the same at every step.
      mdp: its γ may be 1.
      num_steps: T ≥ 0, the length of an episode (static).

    Returns:
      [T + 1, S], the time t first; the return of an episode is Σ_s μ(s) V_0(s).
    """
    transition, reward = _chain(policy, mdp)

    def back(value: Array, _: None) -> tuple[Array, Array]:
        value = reward + mdp.gamma * contract("st,t->s", transition, value)
        return value, value

    last = jnp.zeros_like(reward)
    _, values = jax.lax.scan(back, last, None, length=num_steps, reverse=True)
    return jnp.concatenate([values, last[None]])


def policy_gradient(logits: Array, mdp: TabularMDP) -> Array:
    """Gradient of the return of a softmax policy, ∂η/∂θ(s, a) = ρ(s) π(a|s) A(s, a), [S, A].

    The policy gradient theorem, Σ_s ρ(s) Σ_a ∇π(a|s) Q(s, a), with the derivative of the softmax.
    Source: Sutton et al. 1999; Agarwal et al. 2021, "On the Theory of Policy Gradient Methods", lemma C.1.
    """
    policy = softmax_policy(logits)
    return visitation(policy, mdp)[:, None] * policy * advantages(policy, mdp)


def sampled_policy_gradient(key: Array, logits: Array, mdp: TabularMDP, num_samples: int) -> Array:
    """Estimate `policy_gradient` without bias, mean_n[∇ log π(a_n|s_n) A(s_n, a_n)] / (1 − γ), [S, A].

    States are drawn from d = (1 − γ) ρ and actions from the policy, independently; the advantages are exact, so all
    of the noise is that of the samples.

    Args:
      key: random key.
      logits: θ, [S, A].
      mdp: γ < 1.
      num_samples: N ≥ 1 (static).
    """
    policy = softmax_policy(logits)
    state_key, action_key = jax.random.split(key)
    occupancy = jnp.maximum(visitation(policy, mdp), 0)  # rounding may leave −1e-17 in unreachable states
    state = jax.random.categorical(state_key, jnp.log(occupancy), shape=(num_samples,))
    action = Categorical(logits[state]).sample(action_key)
    weight = advantages(policy, mdp)[state, action] / ((1 - mdp.gamma) * num_samples)
    # ∇_θ(s, ·) log π(a|s) = onehot(a) − π(·|s)
    score_sum = jnp.zeros_like(policy).at[state, action].add(weight)
    return score_sum - policy * jnp.sum(score_sum, axis=-1, keepdims=True)


def performance_difference(old: Array, new: Array, mdp: TabularMDP) -> Array:
    """Exact gain of a new policy, η(new) − η(old) = Σ_s ρ_new(s) Σ_a new(a|s) A_old(s, a), a scalar.

    Exactly 0 for equal policies, without the cancellation of subtracting two returns. Source: Kakade & Langford 2002,
    lemma 6.1.
    """
    # Under the old policy the mean advantage is 0, so only the change of the policy counts.
    return contract("s,sa,sa->", visitation(new, mdp), new - old, advantages(old, mdp))


def _chain(policy: Array, mdp: TabularMDP) -> tuple[Array, Array]:
    """P_π, [S, S], and r_π, [S]: the Markov reward process that remains once the policy is fixed."""
    chex.assert_equal_shape([policy, mdp.reward])
    chex.assert_shape(mdp.transition, (*policy.shape, policy.shape[0]))
    return contract("sa,sat->st", policy, mdp.transition), jnp.sum(policy * mdp.reward, axis=-1)
