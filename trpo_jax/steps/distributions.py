"""Action distributions, each with its log-probability, KL divergence and Fisher metric.

Shapes: `...` is any batch shape ([B], [T, N], none); A the number of actions; D the action dimensions; K the
number of discrete components. Every distribution is a pytree of float arrays, so it passes through `jit`, `vmap`
and `jax.linearize`, whose tangents and cotangents are distributions of the same type.

`fisher_product(tangent)` multiplies a tangent of the distribution's parameters by the Fisher matrix M of those
parameters, sample by sample: the metric in F = Jᵀ M J (Schulman et al. 2015, Appendix C).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp

Array = jax.Array


class Distribution(Protocol):
    """The methods that the update steps need from a policy's output. `...` is the batch shape."""

    def sample(self, key: Array) -> Array:
        """Sample one action per batch element."""
        ...

    def log_prob(self, action: Array) -> Array:
        """Log-probability of an action, log π(action), [...]."""
        ...

    def entropy(self) -> Array:
        """Differential or discrete entropy in nats, [...]."""
        ...

    def kl(self, other: Any) -> Array:
        """KL divergence, KL(self ‖ other), in nats, summed over action dimensions, [...]."""
        ...

    def mode(self) -> Array:
        """The most probable action."""
        ...

    def fisher_product(self, tangent: Any) -> Any:
        """Product with the Fisher matrix, M · tangent, as a distribution of the same type."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Categorical:
    """A choice among A actions, π(a) = softmax(logits)_a.

    Attributes:
      logits: unnormalised log-probabilities, [..., A]; −inf forbids an action.
    """

    logits: Array

    def sample(self, key: Array) -> Array:
        """Sample action indices, int32 [...]."""
        return jax.random.categorical(key, self.logits)

    def log_prob(self, action: Array) -> Array:
        """Log-probability of action indices [...], log π(action); NaN for an index outside of 0 … A − 1."""
        log_probs = jax.nn.log_softmax(self.logits)
        action = jnp.asarray(action)
        index = action.astype(jnp.int32) if action.dtype.itemsize < 4 else action  # a small type may end before A
        index = jnp.where(index < 0, log_probs.shape[-1], index)  # −1 would be the last action
        return jnp.take_along_axis(log_probs, index[..., None], axis=-1)[..., 0]

    def entropy(self) -> Array:
        """Entropy, −Σ_a π(a) log π(a), [...]."""
        log_probs = jax.nn.log_softmax(self.logits)
        return -_expectation(log_probs, log_probs)

    def log_barrier(self) -> Array:
        """−KL(uniform ‖ π) over the n actions with a probability above 0, Σ_a log π(a) / n + log n, [...]."""
        log_probs = jax.nn.log_softmax(self.logits)
        possible = jnp.exp(log_probs) > 0
        number = jnp.sum(possible, axis=-1).astype(log_probs.dtype)
        return jnp.sum(jnp.where(possible, log_probs, 0), axis=-1) / number + jnp.log(number)

    def kl(self, other: Categorical) -> Array:
        """KL divergence, Σ_a π(a) [log π(a) − log π_other(a)], [...]; exactly 0 against itself."""
        log_probs = jax.nn.log_softmax(self.logits)
        return _expectation(log_probs, log_probs - jax.nn.log_softmax(other.logits))

    def mode(self) -> Array:
        """The index of the largest logit, int32 [...]."""
        return jnp.argmax(self.logits, axis=-1)

    def fisher_product(self, tangent: Categorical) -> Categorical:
        """Product with the Fisher matrix, (diag(p) − p pᵀ) t, computed as p ⊙ (t − pᵀt)."""
        probs = jax.nn.softmax(self.logits)
        # The tangent of a forbidden action (p = 0) is 0 · ∞; its share of the metric is 0.
        direction = jnp.where(probs > 0, tangent.logits, 0)
        mean = jnp.sum(probs * direction, axis=-1, keepdims=True)
        return Categorical(probs * (direction - mean))


@jax.tree_util.register_pytree_with_keys_class
class DiagonalGaussian:
    """Independent normal action dimensions, N(mean, diag(exp(2 log_std))).

    Args:
      mean: [..., D].
      log_std: natural logarithm of the standard deviation; broadcast to the shape of `mean`, so one [D] vector
        serves a policy whose σ does not depend on the state.
      largest_log_std: largest `log_std` of each dimension that an entropy bonus rewards, D numbers; None: no limit.
        Without one, a bonus that outweighs the advantages lets σ grow until its square overflows.
    """

    mean: Array
    log_std: Array
    largest_log_std: tuple[float, ...] | None

    def __init__(self, mean: Array, log_std: Array, largest_log_std: Sequence[float] | None = None):
        dtype = jnp.result_type(mean, log_std)
        self.mean = jnp.asarray(mean, dtype)
        self.log_std = jnp.broadcast_to(jnp.asarray(log_std, dtype), jnp.shape(mean))
        self.largest_log_std = None if largest_log_std is None else tuple(map(float, largest_log_std))

    def sample(self, key: Array) -> Array:
        """Sample mean + σ · noise, [..., D]."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(self.log_std) * noise

    def log_prob(self, action: Array) -> Array:
        """Log-density at `action` [..., D], summed over D."""
        z = (action - self.mean) * jnp.exp(-self.log_std)
        return jnp.sum(-0.5 * z**2 - self.log_std - 0.5 * jnp.log(2 * jnp.pi), axis=-1)

    def entropy(self) -> Array:
        """Entropy, Σ_d log σ_d + ½ log(2πe), [...]."""
        return jnp.sum(self.log_std + 0.5 * (1 + jnp.log(2 * jnp.pi)), axis=-1)

    def bonus(self) -> Array:
        """The entropy for an entropy bonus: its slope in log σ falls from 1 to 0 over the last 2 before the largest.

        With a kink in its place, no step would gain once σ had reached it.
        """
        if self.largest_log_std is None:
            return self.entropy()
        least = jnp.asarray(self.largest_log_std, self.log_std.dtype) - 2
        beyond = jnp.clip(self.log_std - least, 0, 2)
        return self._with(self.mean, jnp.minimum(self.log_std, least) + beyond - beyond**2 / 4).entropy()

    def kl(self, other: DiagonalGaussian) -> Array:
        """KL divergence, Σ_d log(σ'/σ) + (σ² + (μ − μ')²)/(2σ'²) − ½, [...]."""
        # Written with expm1 of the difference: no cancellation of order-one terms, and exactly 0 against itself.
        difference = self.log_std - other.log_std
        shift = (self.mean - other.mean) * jnp.exp(-other.log_std)
        return jnp.sum(0.5 * jnp.expm1(2 * difference) - difference + 0.5 * shift**2, axis=-1)

    def mode(self) -> Array:
        """The mean, [..., D]."""
        return self.mean

    def fisher_product(self, tangent: DiagonalGaussian) -> DiagonalGaussian:
        """Product with the Fisher matrix, (t_mean / σ², 2 t_log_std)."""
        return self._with(tangent.mean * jnp.exp(-2 * self.log_std), 2 * tangent.log_std, self.largest_log_std)

    def __repr__(self) -> str:
        return f"DiagonalGaussian(mean={self.mean!r}, log_std={self.log_std!r})"

    # Unflattening bypasses __init__: JAX also rebuilds pytrees from placeholders, which cannot be broadcast.
    @classmethod
    def _with(cls, mean: Any, log_std: Any, largest_log_std: tuple[float, ...] | None = None) -> Self:
        distribution = object.__new__(cls)
        distribution.mean, distribution.log_std, distribution.largest_log_std = mean, log_std, largest_log_std
        return distribution

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Any]:
        """Return leaves and static parts, for JAX."""
        key = jax.tree_util.GetAttrKey
        return ((key("mean"), self.mean), (key("log_std"), self.log_std)), self.largest_log_std

    @classmethod
    def tree_unflatten(cls, largest_log_std: Any, children: tuple[Any, Any]) -> Self:
        """Rebuild the distribution, for JAX."""
        return cls._with(*children, largest_log_std)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MultiCategorical:
    """K independent choices, the k-th among A_k actions.

    Attributes:
      logits: a tuple of K arrays [..., A_k]. Actions are int32 [..., K].
    """

    logits: tuple[Array, ...]

    @property
    def components(self) -> tuple[Categorical, ...]:
        """The K categorical distributions."""
        return tuple(Categorical(logits) for logits in self.logits)

    def sample(self, key: Array) -> Array:
        """Sample action indices, int32 [..., K]."""
        keys = jax.random.split(key, len(self.logits))
        return jnp.stack([c.sample(k) for c, k in zip(self.components, keys, strict=True)], axis=-1)

    def log_prob(self, action: Array) -> Array:
        """Log-probability, Σ_k log π_k(action_k), [...]."""
        return sum_of(c.log_prob(action[..., k]) for k, c in enumerate(self.components))

    def entropy(self) -> Array:
        """Sum of the components' entropies, [...]."""
        return sum_of(c.entropy() for c in self.components)

    def log_barrier(self) -> Array:
        """Sum of the components' log barriers, [...]."""
        return sum_of(c.log_barrier() for c in self.components)

    def kl(self, other: MultiCategorical) -> Array:
        """KL divergence, Σ_k KL(π_k ‖ π_other,k), [...]."""
        return sum_of(c.kl(o) for c, o in zip(self.components, other.components, strict=True))

    def mode(self) -> Array:
        """The most probable index of each component, int32 [..., K]."""
        return jnp.stack([c.mode() for c in self.components], axis=-1)

    def fisher_product(self, tangent: MultiCategorical) -> MultiCategorical:
        """The block-diagonal product of the components."""
        pairs = zip(self.components, tangent.components, strict=True)
        return MultiCategorical(tuple(c.fisher_product(t).logits for c, t in pairs))


def sum_of(terms: Any) -> Array:
    """Sum arrays without the integer 0 that the built-in `sum` starts from."""
    return jax.tree.reduce(jnp.add, list(terms))


def _expectation(log_probs: Array, values: Array) -> Array:
    """Σ_a exp(log_probs) · values where the probability is not 0; 0 · ∞ counts as 0, in the gradient too."""
    support = log_probs > -jnp.inf
    return jnp.sum(jnp.where(support, jnp.exp(log_probs) * jnp.where(support, values, 0), 0), axis=-1)
