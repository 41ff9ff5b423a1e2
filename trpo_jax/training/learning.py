"""What one batch teaches an agent: advantages → policy update → value fit, and what adapts from update to update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from trpo_jax.config import Config, UsageError, validate
from trpo_jax.environments.base import Environment
from trpo_jax.environments.make import make_environment
from trpo_jax.networks import make_policy, make_value
from trpo_jax.steps.advantages import gae, parallel_gae
from trpo_jax.steps.first_order import clipped_objective, first_order_update, penalized_objective, surrogate_objective
from trpo_jax.steps.line_searches import backtracking_line_search, full_step, parallel_line_search
from trpo_jax.steps.radii import adapt_radius_by_divergence, adapt_radius_by_ratio
from trpo_jax.steps.statistics import RunningStatistics, normalize, update_statistics
from trpo_jax.steps.trust_region import UpdateInfo, trpo_update
from trpo_jax.steps.types import Array, PyTree, Scalar
from trpo_jax.steps.values import explained_variance, fit_value_function, gauss_newton_fit
from trpo_jax.training.recurrence import Sequence, advance, restart, starts, unroll
from trpo_jax.types import Control, LastUpdate, Memory, Network, Transition

_INVERSE_PENALTIES = 1e-4, 1e4  # bounds of 1/β


class Agent(NamedTuple):
    """What a `Config` stands for: the environment and the two networks."""

    environment: Environment
    policy: Network
    value: Network


def make_agent(config: Config) -> Agent:
    """Build the environment and the networks that a configuration names; raise `UsageError` for what cannot be."""
    validate(config)
    environment = make_environment(config.env)
    policy = config.policy or make_policy(
        environment,
        network=config.network,
        initial_log_std=config.initial_log_std,
        state_dependent_std=config.state_dependent_std,
    )
    agent = Agent(environment, policy, config.value or make_value(environment, network=config.network))
    if is_recurrent(agent):
        _check_sequences(config)
    return agent


def _check_sequences(config: Config) -> None:
    """A network with a memory needs whole sequences: an environment's steps are one sample."""
    if config.reuse > 1:
        raise UsageError(f"reuse={config.reuse} needs networks without a memory, such as network=mlp.")
    for name, used in (
        ("policy_minibatches", config.update in ("ppo", "kl-penalty")),
        ("value_minibatches", config.value_fit == "adam"),
    ):
        if used and config.num_envs % getattr(config, name):
            raise UsageError(
                f"{name}={getattr(config, name)} must divide num_envs={config.num_envs} where a network has a memory."
            )


class Learned(NamedTuple):
    """The part of a `TrainState` that a batch changes."""

    policy_params: PyTree
    value_params: PyTree
    policy_optimizer: PyTree
    value_optimizer: PyTree
    control: Control
    memory: Any
    statistics: RunningStatistics
    return_statistics: Any
    discounted_return: Any
    value_carry: PyTree


class Lesson(NamedTuple):
    """What is worth telling of a batch, each a scalar; NaN where the settings have none of it."""

    update: UpdateInfo
    value_loss: Array
    explained_variance: Array
    radius: Array
    gain_ratio: Array
    penalty: Array


@jax.jit  # traced once, however often `vmap` and `lax.map` ask for it
def learn(
    config: Config, old: Learned, batch: Transition, iteration: Array, policy_carry: PyTree
) -> tuple[Learned, Lesson]:
    """Advantages, policy update and value fit from one batch [T, N], before which the policy remembered its carry."""
    agent = make_agent(config)
    policy = on_normalized(config, old.statistics, agent.policy)
    value = on_normalized(config, old.statistics, agent.value)
    num_new, memory, ratios = batch.reward.size, old.memory, None
    return_statistics, discounted_return = old.return_statistics, old.discounted_return
    if config.normalize_rewards:
        return_statistics, discounted_return = observe_returns(config, old, batch)
    if config.reuse > 1:
        batch, memory, ratios = recall(config, policy.apply, old, batch, iteration)

    # One batch axis: a product over two of them makes XLA's CPU backend transpose its operands, at twice the time. The
    # environments lead, so that a batch whose environments are spread over devices stays where it is. Only a memory
    # needs the two axes, and whole sequences.
    recurrent = is_recurrent(agent)
    flatten = by_environment if recurrent else flatten_batch
    observation, action = jax.tree.map(flatten, (batch.observation, batch.action))
    start = by_environment(starts(batch.terminated, batch.truncated)) if recurrent else None
    policy_apply, policy_input = over_batch(policy, observation, start, policy_carry)
    value_apply, value_input = over_batch(value, observation, start, old.value_carry)
    values, value_of_next, value_carry = evaluate_values(value, old, value_apply, value_input, batch)
    batch = dataclasses.replace(batch, reward=scale_rewards(config, return_statistics, batch.reward))
    advantage = estimate_advantages(config, batch, values, value_of_next, ratios, flatten=flatten)
    # Of a value target, unlike of an advantage, the first action may be off-policy too.
    on_policy = 1 if ratios is None else jnp.minimum(flatten_batch(ratios), 1)
    targets = on_policy * advantage + values
    weight = advantage if config.baseline else targets

    newest = jax.tree.map(lambda leaf: leaf[:num_new], (policy_input, action, advantage))
    control, gain_ratio = measure_last_update(config, agent, policy_apply, old, *newest)
    radius = radius_of(config, control, iteration)
    behaviour = None if ratios is None else flatten_batch(memory.log_prob)
    scale, weight = normalize_weights(config, weight)
    policy_params, policy_optimizer, update = update_policy(
        config,
        policy_apply,
        old,
        policy_input,
        action,
        weight,
        radius=radius,
        learning_rate=annealed(config.policy_learning_rate, config.anneal_learning_rates, config, iteration),
        behaviour_log_prob=behaviour,
        sample_ndim=1 if recurrent else None,
    )
    control = adapt(config, control, old, update, radius=radius, gain=scale * update.surrogate_gain)

    learning_rate = annealed(config.value_learning_rate, config.anneal_learning_rates, config, iteration)
    value_params, value_optimizer, value_loss = fit_value(
        config, value_apply, old, value_input, targets, values, learning_rate, sample_ndim=1 if recurrent else None
    )
    statistics = old.statistics
    if config.normalize_observations:
        statistics = update_statistics(statistics, observation[:num_new])
    if config.reuse > 1:
        memory = jax.tree.map(lambda leaf: leaf[:, : (config.reuse - 1) * config.num_envs], memory)
    new = Learned(
        policy_params,
        value_params,
        policy_optimizer,
        value_optimizer,
        control,
        memory,
        statistics,
        return_statistics,
        discounted_return,
        value_carry,
    )
    absent = jnp.float32(jnp.nan)
    lesson = Lesson(
        update=update,
        value_loss=value_loss,
        explained_variance=explained_variance(values, targets),
        radius=jnp.asarray(radius, jnp.float32) if config.update == "trpo" else absent,
        gain_ratio=gain_ratio,
        penalty=absent if old.control.penalty is None else old.control.penalty,
    )
    return new, lesson


def is_recurrent(agent: Agent) -> bool:
    """Whether one of the networks has a memory."""
    return agent.policy.initial_carry is not None or agent.value.initial_carry is not None


def on_normalized(config: Config, statistics: RunningStatistics, network: Network) -> Network:
    """A network on observations as the settings have them normalised."""
    if not config.normalize_observations:
        return network

    def apply(params: PyTree, *carry_and_observation: Any) -> Any:
        *carry, observation = carry_and_observation
        return network.apply(params, *carry, normalize(statistics, observation, clip=config.observation_clip))

    return network._replace(apply=apply)


def over_batch(network: Network, observation: Array, start: Any, carry: PyTree) -> tuple[Any, Any]:
    """`apply(params, input)` of a network on a whole batch, and that input: observations, or sequences of them."""
    memoryless = network.initial_carry is None
    return batch_apply(network), observation if memoryless else Sequence(observation, start, carry)


def batch_apply(network: Network) -> Callable[[PyTree, Any], Any]:
    """`apply(params, input)` on the input of `over_batch`."""
    if network.initial_carry is None:
        return network.apply
    return lambda params, sequence: unroll(network, params, sequence)[0]


def evaluate_values(
    value: Network, old: Learned, value_apply: Any, value_input: Any, batch: Transition
) -> tuple[Array, Callable[[Array], Array] | None, PyTree]:
    """V of a batch, V as a function of what steps led to, and what V remembers after the last step.

    With a memory, a next observation is judged by what is remembered at its step; that needs all of [T, N].
    """
    if value.initial_carry is None:
        values = value_apply(old.value_params, value_input)
        return values, lambda observation: value_apply(old.value_params, observation), ()
    values, carries = unroll(value, old.value_params, value_input)

    def value_of_next(observation: Array) -> Array:
        return by_environment(advance(value, old.value_params, carries, by_environment(observation))[1])

    last = jax.tree.map(lambda leaf: leaf[:, -1], carries)
    return values, value_of_next, restart(value, batch.terminated[-1] | batch.truncated[-1], last)


def by_environment(leaf: Array) -> Array:
    """[T, N, ...] <-> [N, T, ...]."""
    return jnp.swapaxes(leaf, 0, 1)


def observe_returns(config: Config, old: Learned, batch: Transition) -> tuple[RunningStatistics, Array]:
    """Statistics of the running discounted return R ← γ R + r of every environment, with those of a batch merged.

    R starts at 0 with each episode. Unlike those of observations they are merged before they are used: no reward is
    looked at while the batch is collected, so even the first batch is scaled.

    Returns:
      The statistics, and R of the running episodes, [N].

    Source: Engstrom et al. 2020, section 3.
    """

    def step(running: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, done = inputs
        running = config.gamma * running + reward
        return jnp.where(done, 0, running), running

    done = batch.terminated | batch.truncated
    running, returns = jax.lax.scan(step, old.discounted_return, (batch.reward, done))
    return update_statistics(old.return_statistics, returns), running


def scale_rewards(config: Config, statistics: RunningStatistics, reward: Array) -> Array:
    """Rewards as the settings have them normalised and clipped; normalised ones are divided by σ, not centred."""
    if config.normalize_rewards:
        varies = statistics.variance > 0
        reward = reward / jnp.where(varies, jnp.sqrt(jnp.where(varies, statistics.variance, 1)), 1)
    clip = config.reward_clip
    return jnp.where(clip > 0, jnp.clip(reward, -clip, clip), reward)


def annealed(value: Any, share: Any, config: Config, iteration: Array) -> Array:
    """A setting of which a share is gone at the end of the run: value (1 − share k/n) in iteration k of n."""
    return value * (1 - share * iteration / config.num_iterations)


def estimate_advantages(
    config: Config,
    batch: Transition,
    values: Array,
    value_fn: Any,
    ratios: Array | None = None,
    flatten: Callable[[Array], Array] | None = None,
) -> Array:
    """GAE over the rollout, as a flat batch like `values` [N·T]: sequential on CPU, associative on accelerators."""
    estimate = gae if jax.default_backend() == "cpu" else parallel_gae
    values = values.reshape(batch.reward.shape[::-1]).T
    advantage = estimate(
        batch.reward,
        values,
        _next_values(batch, values, value_fn, sparse=flatten is not by_environment),
        batch.terminated,
        batch.truncated,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        ratios=ratios,
    )
    return (flatten or flatten_batch)(advantage)


def flatten_batch(leaf: Array) -> Array:
    """[T, N, ...] -> [N·T, ...], environment by environment."""
    return jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])


def _next_values(batch: Transition, values: Array, value_fn: Callable[[Array], Array], sparse: bool = True) -> Array:
    """V of the observation that each step led to, [T, N]; anything after a terminal state, where nothing asks for it.

    It is V of the next row, but for truncated steps and the last row. Where no environment was truncated twice (and on
    CPU, where a branch is cheap), V is evaluated for those alone, if it can be (`sparse`).
    """
    next_observation = batch.next_observation
    if jax.default_backend() != "cpu" or not sparse:
        return value_fn(next_observation)
    truncated = batch.truncated & ~batch.terminated
    here = jnp.argmax(truncated, axis=0), jnp.arange(truncated.shape[1])  # the one truncated step of each environment

    def once_each() -> Array:
        at_truncation, at_end = jnp.split(value_fn(jnp.concatenate([next_observation[here], next_observation[-1]])), 2)
        next_values = jnp.concatenate([values[1:], at_end[None]])
        return next_values.at[here].set(jnp.where(truncated[here], at_truncation, next_values[here]))

    twice = jnp.any(jnp.sum(truncated[:-1], axis=0) > 1)
    return jax.lax.cond(twice, lambda: value_fn(next_observation), once_each)


def recall(
    config: Config, policy_apply: Any, old: Learned, batch: Transition, iteration: Array
) -> tuple[Transition, Memory, Array]:
    """The newest K batches side by side [T, K·N]: transitions, the same as `Memory`, and ratios to today's policy.

    In the first K − 1 iterations, copies of the first batch take the places of those that never were.
    """

    def log_prob(batch: Transition) -> Array:
        return policy_apply(old.policy_params, batch.observation).log_prob(batch.action)

    new = Memory(batch, log_prob(batch))
    copies = jax.tree.map(lambda leaf: jnp.tile(leaf, (1, config.reuse - 1, *[1] * (leaf.ndim - 2))), new)
    earlier = jax.tree.map(lambda copy, kept: jnp.where(iteration == 0, copy, kept), copies, old.memory)
    memory = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), new, earlier)
    return memory.batch, memory, jnp.exp(log_prob(memory.batch) - memory.log_prob)


def radius_of(config: Config, control: Control, iteration: Array) -> Array:
    """The trust-region radius of this update, nats.

    Learning from batches up to K − 1 policies old, the policies since then have used up part of what may be trusted:
    δ / (Σ_i ν_i (i + 1))², where ν_i is the share of the samples that are i policies old (Queeney et al. 2021, with
    δ = ε²/2).
    """
    radius = config.max_kl if control.radius is None else control.radius
    radius = annealed(radius, config.anneal_max_kl, config, iteration)
    if config.reuse > 1:
        age = jnp.minimum(np.arange(config.reuse), iteration)
        radius /= jnp.mean(age + 1.0) ** 2
    return radius


def measure_last_update(
    config: Config, agent: Agent, policy_apply: Any, old: Learned, observation: Any, action: Array, advantage: Array
) -> tuple[Control, Array]:
    """Realised over predicted gain of the last update, and the radius that follows from it (`radius_rule="ratio"`).

    From this batch, which the new policy collected, the same surrogate says what going back would cost,
    b = mean[(1 − π_last/π) A]. The gain along the step is the mean of both ends' slopes times its length, exactly so
    where η is quadratic, so r = ½ (p + b)/p with p as the last batch promised. Its noise does not grow as the step
    shrinks, as that of a difference of returns would; b is from samples that did not choose the step; and pure noise
    gives r = ½, on which the radius holds. A standard error is left to either side before the radius moves.
    """
    control, last = old.control, old.control.last
    if last is None:
        return control, jnp.float32(jnp.nan)
    log_prob = policy_apply(old.policy_params, observation).log_prob(action)
    before = batch_apply(on_normalized(config, last.statistics, agent.policy))
    last_policy = before(last.policy_params, observation)
    backward = -jnp.expm1(last_policy.log_prob(action) - log_prob) * advantage
    measured = last.gain > 0
    gain = jnp.where(measured, last.gain, 1)
    ratio = 0.5 * (1 + jnp.mean(backward) / gain)
    error = 0.5 * jnp.std(backward) / (np.sqrt(backward.size) * gain)
    certain = 0.5 + jnp.sign(ratio - 0.5) * jnp.maximum(jnp.abs(ratio - 0.5) - error, 0)
    bounds = config.smallest_max_kl, config.largest_max_kl
    radius = adapt_radius_by_ratio(control.radius, certain, last.at_boundary, *bounds)
    radius = jnp.where(measured, radius, control.radius)
    return control._replace(radius=radius), jnp.where(measured, ratio, jnp.nan)


def adapt(config: Config, control: Control, old: Learned, update: UpdateInfo, *, radius: Array, gain: Array) -> Control:
    """What follows from an update for the next one. A refused step counts as one that went too far."""
    refused = ~update.accepted & (update.gradient_norm > 0)
    bounds = config.smallest_max_kl, config.largest_max_kl
    if config.radius_rule == "ratio":
        at_boundary = update.divergence > radius / 2
        shrunk = adapt_radius_by_ratio(control.radius, 0.0, at_boundary, *bounds)
        last = LastUpdate(old.policy_params, old.statistics, gain, at_boundary)
        return control._replace(radius=jnp.where(refused, shrunk, control.radius), last=last)
    divergence = jnp.where(refused, jnp.inf, jnp.where(update.accepted, update.divergence, config.target_kl))
    if config.radius_rule == "divergence":
        adapted = adapt_radius_by_divergence(control.radius, divergence, config.target_kl, *bounds)
        return control._replace(radius=adapted)
    if config.update == "kl-penalty":
        # A penalty is the inverse of a radius.
        adapted = adapt_radius_by_divergence(1 / control.penalty, divergence, config.target_kl, *_INVERSE_PENALTIES)
        return control._replace(penalty=1 / adapted)
    return control


def init_control(config: Config, policy_params: PyTree, statistics: RunningStatistics) -> Control:
    """What adapts, before the first update."""
    if config.radius_rule == "fixed":
        return Control(penalty=jnp.float32(config.initial_penalty) if config.update == "kl-penalty" else None)
    radius = jnp.clip(jnp.float32(config.max_kl), config.smallest_max_kl, config.largest_max_kl)
    if config.radius_rule == "divergence":
        return Control(radius)
    return Control(radius, last=LastUpdate(policy_params, statistics, jnp.float32(0), jnp.bool_(False)))


def init_policy_optimizer(config: Config, policy_params: PyTree) -> PyTree:
    """State of the policy's optimizer before the first step; () for trpo."""
    return () if config.update == "trpo" else _policy_optimizer(config, 0.0).init(ravel_pytree(policy_params)[0])


def normalize_weights(config: Config, weight: Array) -> tuple[Array, Array]:
    """The number that the weights of the actions are divided by, and what the update is given."""
    if not config.normalize_advantages:
        return jnp.ones_like(weight[0]), weight
    std = jnp.std(weight)
    scale = jnp.where(std > 0, std, 1)
    return scale, (weight - jnp.mean(weight)) / scale


def update_policy(
    config: Config,
    policy_apply: Any,
    old: Learned,
    observation: Array,
    action: Array,
    weight: Array,
    *,
    radius: Array,
    learning_rate: Scalar,
    behaviour_log_prob: Array | None = None,
    sample_ndim: int | None = None,
) -> tuple[PyTree, PyTree, UpdateInfo]:
    """The update that the settings name on a flat batch: new parameters, optimizer state, and what it did."""
    # One flat vector instead of a pytree halves the time to compile the solver.
    vector, unravel = ravel_pytree(old.policy_params)

    def apply(vector: Array, observation: Array) -> Any:
        return policy_apply(unravel(vector), observation)

    if config.update == "trpo":
        vector, info = trpo_update(
            apply,
            vector,
            observation,
            action,
            weight,
            max_kl=radius,
            cg_damping=config.cg_damping,
            cg_iterations=config.cg_iterations,
            cg_tolerance=config.cg_tolerance,
            line_search_shrink=config.line_search_shrink,
            line_search_steps=config.line_search_steps,
            fisher_fraction=config.fisher_fraction,
            line_search=line_search_of(config),
            constraint=config.constraint,
            entropy_coefficient=config.entropy_coefficient,
            behaviour_log_prob=behaviour_log_prob,
            sample_ndim=sample_ndim,
        )
        return unravel(vector), old.policy_optimizer, info
    objectives = {
        "policy-gradient": surrogate_objective,
        "ppo": clipped_objective(config.clip_ratio),
        "kl-penalty": penalized_objective(old.control.penalty),
    }
    one_step = config.update == "policy-gradient"  # on one batch, further steps would no longer follow the gradient
    vector, optimizer_state, info = first_order_update(
        apply,
        vector,
        old.policy_optimizer,
        observation,
        action,
        weight,
        optimizer=_policy_optimizer(config, learning_rate),
        objective=objectives[config.update],
        epochs=1 if one_step else config.policy_epochs,
        minibatches=1 if one_step else config.policy_minibatches,
        entropy_coefficient=config.entropy_coefficient,
        sample_ndim=sample_ndim,
    )
    return unravel(vector), optimizer_state, info


def line_search_of(config: Config) -> Callable[..., Any]:
    """The line search that the settings name on this backend."""
    if config.line_search == "none":
        return full_step
    parallel = jax.default_backend() != "cpu" if config.line_search == "auto" else config.line_search == "parallel"
    return parallel_line_search if parallel else backtracking_line_search


def fit_value(
    config: Config,
    value_apply: Any,
    old: Learned,
    observation: Array,
    target: Array,
    values: Array,
    learning_rate: Scalar,
    sample_ndim: int | None = None,
) -> tuple[PyTree, PyTree, Array]:
    """Fit the value function to a flat batch as the configuration says: new parameters, optimizer state, and loss."""
    if config.value_fit == "adam":
        import optax

        return fit_value_function(
            value_apply,
            old.value_params,
            old.value_optimizer,
            observation,
            target,
            old_values=values,
            clip=config.value_clip,
            optimizer=optax.adam(learning_rate),
            epochs=config.value_epochs,
            minibatches=config.value_minibatches,
            sample_ndim=sample_ndim,
        )
    vector, unravel = ravel_pytree(old.value_params)
    vector, loss = gauss_newton_fit(
        lambda v, observation: value_apply(unravel(v), observation),
        vector,
        observation,
        target,
        damping=config.value_damping,
        cg_iterations=config.value_cg_iterations,
        cg_tolerance=config.cg_tolerance,
        fisher_fraction=config.fisher_fraction,
        sample_ndim=sample_ndim,
    )
    return unravel(vector), old.value_optimizer, loss


def init_value_optimizer(config: Config, value_params: PyTree) -> PyTree:
    """State of the value function's optimizer before the first step; () for gauss-newton."""
    if config.value_fit != "adam":
        return ()
    import optax  # deferred: the default fit does not need it

    return optax.adam(0.0).init(value_params)


def _policy_optimizer(config: Config, learning_rate: Any) -> Any:
    import optax

    return {"adam": optax.adam, "sgd": optax.sgd}[config.policy_optimizer](learning_rate)
