"""The cost of a run: seconds, memory, and where they go.

Every figure is taken in the same way: compiled ahead, run once to warm up, `block_until_ready`, programs in turn within
one process so that a drift of the machine affects all of them, the median of several repetitions with their range.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from trpo_jax.algorithms.trpo import line_search_of
from trpo_jax.config_pytree import Config
from trpo_jax.steps.curvature import curvature_sample
from trpo_jax.steps.line_searches import backtracking_line_search
from trpo_jax.steps.objectives import mean_kl, surrogate
from trpo_jax.steps.policy_updates import Batch, make_evaluate, surrogate_gradient
from trpo_jax.steps.solvers import Solver, conjugate_gradient
from trpo_jax.steps.trust_region import natural_gradient, trpo_update
from trpo_jax.sweeps.iqm import interquartile_mean
from trpo_jax.training.agents import make_agent, with_normalization
from trpo_jax.training.estimates import normalize_weights
from trpo_jax.training.evaluation import evaluate
from trpo_jax.training.learner import Estimates, Prepared, estimate, fit_value, prepare, value_and_input
from trpo_jax.training.loop import init, train_step
from trpo_jax.training.memory import predict_memory, program_memory
from trpo_jax.training.recurrence import outputs_of
from trpo_jax.training.rollouts import rollout
from trpo_jax.training.state import LearnerState, Metrics, TrainState, Transition

WARM_UP_ITERATIONS = 20  # trained before anything is timed: short first episodes reset more often than later ones
_ITERATIONS = 20  # of one agent per run of its program
_ITERATIONS_TOGETHER = 4  # the same of many agents
_MOST_SAMPLES = 2**16
_WORK = _MOST_SAMPLES * 2**14  # samples x parameters of a policy update
_EVALUATION_EPISODES = 32


def time_in_turn(programs: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, np.ndarray]:
    """Measure the seconds [repetitions] of each program, run in turn after a warm-up of each."""
    for program in programs.values():
        jax.block_until_ready(program())
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repetitions):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def summary(values: Any) -> dict[str, float]:
    """Median and range, in the form of the JSON file."""
    return {"median": float(np.median(values)), "low": float(np.min(values)), "high": float(np.max(values))}


class Trainer:
    """Compiled iterations of one agent, or of K in one program, warmed up; `run` trains on and returns the seconds."""

    def __init__(self, config: Config, num_agents: int | None = None, iterations: int = _ITERATIONS):
        self.config, self.per_run = config, iterations * (num_agents or 1)
        begin: Any = init
        step: Any = train_step
        if num_agents:
            begin, step = (jax.vmap(function, in_axes=(None, 0)) for function in (init, train_step))
        key = jax.random.key(0)
        self.state = jax.jit(begin)(config, jax.random.split(key, num_agents) if num_agents else key)

        def run(config: Config, state: TrainState) -> tuple[TrainState, Metrics]:
            return jax.lax.scan(lambda state, _: step(config, state), state, None, length=iterations)

        start = time.perf_counter()
        self.program = jax.jit(run, donate_argnums=1).lower(config, self.state).compile()
        self.compile_seconds = time.perf_counter() - start
        for _ in range(-(-WARM_UP_ITERATIONS // iterations)):
            self.run()

    def run(self) -> float:
        """Train all iterations of the program once; return the seconds per iteration and agent."""
        start = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.program(self.config, self.state))
        return (time.perf_counter() - start) / self.per_run


def measure_parts(config: Config, state: TrainState, repetitions: int) -> dict[str, np.ndarray]:
    """Measure the seconds [repetitions] of each stage of an iteration as a separate program, and of the two gradients.

    The stages do not add up to the iteration, which shares the value function's forward pass between the advantages and
    the fit. In addition there are "policy gradient" and "value gradient" over the same batch: with the rollout they are
    the least that any method of policy optimisation does, the *limit*.
    """
    agent = make_agent(config)
    learner, carry, iteration = state.learner, state.actor.carry, state.iteration
    key = jax.random.fold_in(state.key, iteration)
    apply = outputs_of(with_normalization(config, learner.statistics, agent.policy))
    theta, unravel = ravel_pytree(learner.policy_params)

    def policy(vector: Any, observation: Any) -> Any:
        return apply(unravel(vector), observation)

    @jax.jit
    def look_at(learner: LearnerState, batch: Transition) -> tuple[Prepared, Estimates]:
        prepared = prepare(agent, learner, batch, carry, iteration)
        return prepared, estimate(agent, learner, prepared)

    collect = jax.jit(lambda learner, actor, key: rollout(agent, learner, actor, key))
    batch = collect(learner, state.actor, key)[1]
    prepared, estimates = look_at(learner, batch)
    _, weight = normalize_weights(config, estimates.advantage)
    flat = Batch(prepared.policy_input, prepared.action, weight, sample_ndim=agent.sample_ndim)
    gradient = jax.jit(lambda theta, batch: surrogate_gradient(policy, theta, batch))
    solver = Solver(config.cg_damping, config.cg_iterations, config.cg_tolerance)

    @jax.jit
    def curvature(theta: Any, gradient: Any, batch: Batch) -> Any:
        sample = curvature_sample(batch.observation, batch.sample_shape, config.fisher_fraction)
        options: dict[str, Any] = {"max_kl": config.max_kl, "solver": solver}
        return natural_gradient(lambda p: policy(p, sample), theta, gradient, **options)[0]

    @jax.jit
    def search(theta: Any, step: Any, old_distribution: Any, batch: Batch) -> Any:
        evaluate = make_evaluate(policy, old_distribution, batch)
        return line_search_of(config)(evaluate, theta, step, max_kl=config.max_kl)

    @jax.jit
    def fit(learner: LearnerState, prepared: Prepared, estimates: Estimates) -> Any:
        return fit_value(agent, learner, learner.policy_params, prepared, estimates, iteration, key)

    @jax.jit
    def value_gradient(params: Any, prepared: Prepared, target: Any) -> Any:
        value, inputs = value_and_input(agent, learner, prepared)
        return jax.value_and_grad(lambda p: jnp.mean((outputs_of(value)(p, inputs) - target) ** 2))(params)

    direction, old_distribution = gradient(theta, flat)
    step = curvature(theta, direction, flat)
    return time_in_turn(
        {
            "rollout": lambda: collect(learner, state.actor, key),
            "advantages": lambda: look_at(learner, batch),
            "gradient": lambda: gradient(theta, flat),
            "curvature": lambda: curvature(theta, direction, flat),
            "line search": lambda: search(theta, step, old_distribution, flat),
            "value fit": lambda: fit(learner, prepared, estimates),
            "value gradient": lambda: value_gradient(learner.value_params, prepared, estimates.targets),
        },
        repetitions,
    )


PARTS = "rollout", "advantages", "gradient", "curvature", "line search", "value fit"


def measure_one(config: Config, repetitions: int) -> dict[str, Any]:
    """Measure the throughput of one agent, its parts, and the limit."""
    trainer = Trainer(config)
    parts = measure_parts(config, trainer.state, 3 * repetitions)
    iteration = [trainer.run() for _ in range(repetitions)]
    limit = sum(np.median(parts[name]) for name in ("rollout", "gradient", "value gradient"))
    return {
        "compile_seconds": trainer.compile_seconds,
        "iteration_ms": summary(1e3 * np.array(iteration)),
        "env_steps_per_second": summary(config.steps_per_iteration / np.array(iteration)),
        "updates_per_second": summary(1 / np.array(iteration)),
        "parts_ms": {name: summary(1e3 * seconds) for name, seconds in parts.items()},
        "limit_ms": float(1e3 * limit),
        "iteration_over_limit": float(np.median(iteration) / limit),
    }


def iterations_of_many(num_agents: int, repetitions: int) -> int:
    """Iterations that `measure_many` takes: those of all agents, and those of the agent alone."""
    warm_up = -(-WARM_UP_ITERATIONS // _ITERATIONS_TOGETHER)
    alone = iterations_of_one(repetitions * max(1, _ITERATIONS_TOGETHER * num_agents // _ITERATIONS))
    return _ITERATIONS_TOGETHER * num_agents * (warm_up + repetitions) + alone


def iterations_of_one(repetitions: int) -> int:
    """Iterations that `measure_environments` takes."""
    return WARM_UP_ITERATIONS + _ITERATIONS * repetitions


def update_samples(config: Config) -> int:
    """Samples of the measured policy update: 65,536; above 16,384 parameters a lower power of two, at least 256."""
    agent = make_agent(config)
    observation = jax.ShapeDtypeStruct(agent.environment.observation_shape, jnp.float32)
    params = jax.eval_shape(agent.policy.init, jax.random.key(0), observation)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return min(_MOST_SAMPLES, max(256, 2 ** int(math.log2(_WORK / size))))


def measure_policy_update(config: Config, samples: int, repetitions: int) -> dict[str, Any]:
    """Measure a policy update on a batch of random observations: as configured, and on all samples against a plain one.

    The plain update differentiates the mean KL twice for each Fisher product, as most implementations do. Both take all
    k products on all samples, and both end at the same parameters.
    """
    agent = make_agent(config)
    keys = jax.random.split(jax.random.key(2), 4)
    observation = jax.random.normal(keys[0], (samples, *agent.environment.observation_shape))
    theta, unravel = ravel_pytree(agent.policy.init(keys[1], observation[0]))

    def policy(vector: Any, observation: Any) -> Any:
        return agent.policy.step(unravel(vector), (), observation)[1]

    action = policy(theta, observation).sample(keys[2])
    batch = observation, action, jax.random.normal(keys[3], (samples,))
    exact = Solver(config.cg_damping, config.cg_iterations, 0.0)

    def update(theta: Any, *batch: Any, fisher_fraction: Any = 1.0, solver: Solver = exact) -> Any:
        options: dict[str, Any] = {"fisher_fraction": fisher_fraction, "solver": solver}
        return trpo_update(policy, theta, *batch, max_kl=config.max_kl, **options)[0]

    def plain(theta: Any, observation: Any, action: Any, advantage: Any) -> Any:
        old = jax.lax.stop_gradient(policy(theta, observation))
        log_prob = old.log_prob(action)
        gradient = jax.grad(lambda v: surrogate(policy(v, observation), log_prob, action, advantage))(theta)

        def product(vector: Any) -> Any:
            slope = jax.grad(lambda v: mean_kl(old, policy(v, observation)))
            return jax.grad(lambda v: jnp.vdot(slope(v), vector))(theta) + config.cg_damping * vector

        x, _ = conjugate_gradient(product, gradient, num_iterations=config.cg_iterations)
        curvature = jnp.vdot(x, product(x) - config.cg_damping * x)
        evaluate = make_evaluate(policy, old, Batch(observation, action, advantage))
        step = jnp.sqrt(2 * config.max_kl / curvature) * x
        return backtracking_line_search(evaluate, theta, step, max_kl=config.max_kl)[0]

    programs: dict[str, Callable[..., Any]] = {
        "configured": functools.partial(
            update, fisher_fraction=config.fisher_fraction, solver=exact._replace(tolerance=config.cg_tolerance)
        ),
        "all_samples": update,
        "double_backward": plain,
    }
    compiled = {name: jax.jit(program) for name, program in programs.items()}
    ends = [np.asarray(compiled[name](theta, *batch)) for name in ("all_samples", "double_backward")]
    seconds = time_in_turn({name: functools.partial(p, theta, *batch) for name, p in compiled.items()}, repetitions)
    return {
        "samples": samples,
        **{f"{name}_ms": summary(1e3 * values) for name, values in seconds.items()},
        "double_backward_over_all_samples": float(
            np.median(seconds["double_backward"]) / np.median(seconds["all_samples"])
        ),
        "largest_difference": float(np.max(np.abs(ends[0] - ends[1]))),
        "largest_change": float(np.max(np.abs(ends[0] - np.asarray(theta)))),
    }


def measure_many(config: Config, num_agents: int, repetitions: int) -> dict[str, Any]:
    """Measure the throughput and memory of K agents in one program, in turn with a single agent."""
    alone, agents = Trainer(config), Trainer(config, num_agents, _ITERATIONS_TOGETHER)
    # The single agent runs for as long as the others, so that a disturbance of the machine affects both alike.
    runs = max(1, agents.per_run // alone.per_run)
    pairs = [(np.mean([alone.run() for _ in range(runs)]), agents.run()) for _ in range(repetitions)]
    one, together = np.array(pairs).T
    memory, predicted = program_memory(agents.program), predict_memory(config, num_agents, _ITERATIONS_TOGETHER)
    return {
        "num_agents": num_agents,
        "compile_seconds": agents.compile_seconds,
        "iteration_of_an_agent_ms": summary(1e3 * together),
        "iteration_alone_ms": summary(1e3 * one),
        "env_steps_per_second": summary(config.steps_per_iteration / together),
        "updates_per_second": summary(1 / together),
        "time_of_an_agent_over_one_alone": float(np.median(together) / np.median(one)),
        "memory_bytes": memory,
        "predicted_memory_bytes": predicted,
        "predicted_over_measured_memory": predicted / memory,
    }


def measure_environments(config: Config, num_envs: int, repetitions: int) -> dict[str, Any]:
    """Measure the throughput and memory of one agent with N environments."""
    config = config.replace(num_envs=num_envs)
    trainer = Trainer(config)
    iteration = np.array([trainer.run() for _ in range(repetitions)])
    memory, predicted = program_memory(trainer.program), predict_memory(config, 1, trainer.per_run)
    return {
        "num_envs": num_envs,
        "compile_seconds": trainer.compile_seconds,
        "iteration_ms": summary(1e3 * iteration),
        "env_steps_per_second": summary(config.steps_per_iteration / iteration),
        "memory_bytes": memory,
        "predicted_memory_bytes": predicted,
    }


def measure_time_to(threshold: float, config: Config, num_seeds: int, max_steps: int) -> dict[str, Any]:
    """Measure seconds and env steps of training until the mean return of 32 sampled episodes reaches a threshold.

    One agent at a time is evaluated after every iteration, with the policy as it acts in training. Only training is
    timed, compiled ahead. A seed that does not reach it within `max_steps` env steps counts as infinite.

    Returns:
      The interquartile mean over seeds of seconds and env steps, and the values of every seed.
    """
    begin = jax.jit(init)
    step = jax.jit(train_step).lower(config, begin(config, jax.random.key(0))).compile()
    sampled = functools.partial(evaluate, num_episodes=_EVALUATION_EPISODES, deterministic=False)
    mean_return = jax.jit(lambda config, state, key: sampled(config, state, key).episode_return.mean())
    jax.block_until_ready(step(config, begin(config, jax.random.key(0))))

    def train_seed(seed: int) -> dict[str, float]:
        state, seconds, steps = begin(config, jax.random.key(seed)), 0.0, 0
        while steps < max_steps:
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(config, state))
            seconds, steps = seconds + time.perf_counter() - start, steps + config.steps_per_iteration
            if mean_return(config, state, jax.random.key(steps)) >= threshold:
                return {"seed": seed, "seconds": seconds, "env_steps": steps}
        return {"seed": seed, "seconds": math.inf, "env_steps": math.inf}

    seeds = [train_seed(seed) for seed in range(num_seeds)]
    means = {name: float(interquartile_mean([seed[name] for seed in seeds])) for name in ("seconds", "env_steps")}
    return {"threshold": threshold, **means, "seeds": seeds}
