"""A peer measured in turn with us: the same environment, networks (64-64 tanh), envs x steps and batch."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from experiments.throughput.peers import PEERS, Ask, PeerError, running
from trpo_jax import Config, evaluate, init, interquartile_mean, make_environment, make_policy, train_step, trpo_update

EPISODES = 32  # that judge whether a return has been reached
SAMPLES = 65_536  # of the policy update that is timed alone


class Trainer:
    """Compiled training iterations of K agents in one program, warmed up; `run` trains on and returns its seconds."""

    def __init__(self, config: Config, num_agents: int = 1, iterations: int = 20, warm_up: int = 20):
        keys = jax.random.split(jax.random.key(0), num_agents)
        begin: Any = init
        step: Any = train_step
        if num_agents > 1:
            begin, step = (jax.vmap(function, in_axes=(None, 0)) for function in (init, train_step))
        self.config, self.state = config, jax.jit(begin)(config, keys if num_agents > 1 else keys[0])

        def run(config: Config, state: Any) -> Any:
            return jax.lax.scan(lambda state, _: step(config, state), state, None, length=iterations)[0]

        self.program = jax.jit(run, donate_argnums=1).lower(config, self.state).compile()
        for _ in range(-(-warm_up // iterations)):  # short first episodes reset more often than later ones
            self.run()

    def run(self) -> float:
        """Train all iterations of the program once."""
        start = time.perf_counter()
        self.state = jax.block_until_ready(self.program(self.config, self.state))
        return time.perf_counter() - start


def compare(
    name: str,
    config: Config,
    *,
    repetitions: int = 7,
    num_agents: int = 64,
    threshold: float | None = 475.0,
    seeds: range = range(16),
    max_steps: int = 500_000,
    environments: Path | None = None,
) -> dict[str, Any]:
    """Measure a peer in turn with us.

    Args:
      name: one of `PEERS`.
      config: our settings; γ, λ and (for TRPO) δ, damping and k are given to the peer.
      repetitions: how often each side runs, in turn.
      num_agents: with rejax, also this many agents side by side in one program.
      threshold: with rejax, also the time to this return: we at `Config`'s defaults, PPO at its published settings.
      seeds: seeds for that.
      max_steps: env steps after which a seed counts as never.
      environments: as in `running`.

    Returns:
      Both sides' figures and their ratios, or {"error": sentence} if the peer could not be run.
    """
    try:
        with running(PEERS[name], environments) as ask:
            about = ask("prepare", iterations=5, **_settings(config))
            result = {"about": about, **_compare_speed(ask, config, repetitions)}
            if name == "sb3-contrib":
                result["own_shape"] = _compare_own_shape(ask, config, repetitions)
                result["policy_update"] = _compare_policy_update(ask, config.env, repetitions)
            if name == "rejax":
                ask("prepare", iterations=1, num_agents=num_agents, **_settings(config))
                result["many_agents"] = _compare_speed(ask, config, repetitions, num_agents)
                if threshold is not None:
                    result["time_to_threshold"] = _compare_learning(ask, config.env, threshold, seeds, max_steps)
            return result
    except PeerError as error:
        return {"error": f"{error}"}


def _settings(config: Config) -> dict[str, Any]:
    """What both sides share."""
    names = "env", "num_envs", "num_steps", "gamma", "gae_lambda", "max_kl", "cg_iterations", "cg_damping"
    return {name: getattr(config, name) for name in names}


def summary(values: Any) -> dict[str, float]:
    """Median and range, as the JSON keeps them."""
    return {"median": float(np.median(values)), "low": float(np.min(values)), "high": float(np.max(values))}


def _compare_speed(ask: Ask, config: Config, repetitions: int, num_agents: int = 1) -> dict[str, Any]:
    """Iterations in turn; the peer has been prepared."""
    iterations = 20 if num_agents == 1 else 4
    trainer, ours, theirs = Trainer(config, num_agents, iterations), [], []
    for _ in range(repetitions):
        ours.append(trainer.run() / iterations)
        theirs.append(ask("run")["seconds"])
    steps = config.steps_per_iteration * num_agents
    return {
        "num_agents": num_agents,
        "ours_env_steps_per_second": summary(steps / np.array(ours)),
        "theirs_env_steps_per_second": summary(steps / np.array(theirs)),
        "speed_ratio": float(np.median(theirs) / np.median(ours)),
    }


def _compare_own_shape(ask: Ask, config: Config, repetitions: int) -> dict[str, Any]:
    """sb3-contrib's TRPO on the one environment it is published with, ours on the same batch in our default shape."""
    ours = dataclasses.replace(config, num_envs=Config.num_envs, num_steps=Config.num_steps)
    batch = ours.steps_per_iteration
    about = ask("prepare", **{**_settings(ours), "num_envs": 1, "num_steps": batch})
    shapes = {"shape": f"1 x {batch}", "our_shape": f"{ours.num_envs} x {ours.num_steps}"}
    return {**shapes, "about": about, **_compare_speed(ask, ours, repetitions)}


def _compare_policy_update(ask: Ask, env: str, repetitions: int) -> dict[str, Any]:
    """One policy update on a large batch, each side at its own settings: we at the defaults of `trpo_update`.

    One side after the other: a call of the peer's takes seconds, which says enough.
    """
    theirs = ask("policy update", env=env, samples=SAMPLES, repetitions=repetitions)
    environment = make_environment(env)
    policy, keys = make_policy(environment), jax.random.split(jax.random.key(2), 4)
    observation = jax.random.normal(keys[0], (SAMPLES, *environment.observation_shape))
    theta, unravel = ravel_pytree(policy.init(keys[1], observation[0]))

    def apply(vector: Any, observation: Any) -> Any:
        return policy.apply(unravel(vector), observation)

    action = apply(theta, observation).sample(keys[2])
    batch = observation, action, jax.random.normal(keys[3], (SAMPLES,))
    update = jax.jit(lambda *arguments: trpo_update(apply, *arguments)[0])
    seconds = []
    for _ in range(1 + repetitions):
        start = time.perf_counter()
        jax.block_until_ready(update(theta, *batch))
        seconds.append(time.perf_counter() - start)
    ours_ms, theirs_ms = summary(1e3 * np.array(seconds[1:])), summary(1e3 * np.array(theirs.pop("seconds")))
    ratio = theirs_ms["median"] / ours_ms["median"]
    return {"samples": SAMPLES, "ours_ms": ours_ms, "theirs_ms": theirs_ms, "ratio": ratio, "their_settings": theirs}


def _compare_learning(ask: Ask, env: str, threshold: float, seeds: range, max_steps: int) -> dict[str, Any]:
    """Training to a return, seed by seed in turn: we at `Config`'s defaults, the peer at its published settings."""
    config = Config(env=env)
    request = {"threshold": threshold, "max_steps": max_steps, "judge_every": config.steps_per_iteration}
    about = ask("prepare threshold", env=env, **request)
    train_to_threshold, ours, theirs = make_learner(config, threshold, max_steps), [], []
    for seed in seeds:
        ours.append(train_to_threshold(seed))
        theirs.append(ask("train to threshold", seed=seed))
    both: dict[str, Any] = {"ours": {"seeds": ours}, "theirs": {"seeds": theirs}}
    for name in ("seconds", "env_steps"):
        for side in (both["ours"], both["theirs"]):
            side[name] = float(interquartile_mean([result[name] for result in side["seeds"]]))
        both[f"{name}_ratio"] = both["ours"][name] / both["theirs"][name]
    return {"threshold": threshold, "about": about, **both}


def make_learner(config: Config, threshold: float, max_steps: int) -> Any:
    """Return the function that trains one seed until 32 sampled episodes reach a threshold; only training is timed."""
    # What `trpo-jax benchmark` does with all seeds in a row; here the peer's seeds come in between.
    begin = jax.jit(init)
    step = jax.jit(train_step).lower(config, begin(config, jax.random.key(0))).compile()
    judge = jax.jit(
        lambda state, key: evaluate(
            config, state, key, num_episodes=EPISODES, deterministic=False
        ).episode_return.mean()
    )
    jax.block_until_ready(step(config, begin(config, jax.random.key(0))))

    def train_to_threshold(seed: int) -> dict[str, float]:
        state, seconds, steps = begin(config, jax.random.key(seed)), 0.0, 0
        while steps < max_steps:
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(config, state))
            seconds, steps = seconds + time.perf_counter() - start, steps + config.steps_per_iteration
            if judge(state, jax.random.key(steps)) >= threshold:
                return {"seed": seed, "seconds": seconds, "env_steps": steps}
        return {"seed": seed, "seconds": float("inf"), "env_steps": float("inf")}

    return train_to_threshold


def rows(name: str, peer: dict[str, Any]) -> list[tuple[str, str]]:
    """What was found of a peer: rows of a quantity and its value."""
    if "error" in peer:
        return [(name, peer["error"])]
    found = [(f"{name}: env steps/s, ours ÷ theirs", _speeds(peer))]
    if own := peer.get("own_shape"):
        found.append((f"{name} at {own['shape']}, ours at {own['our_shape']}", _speeds(own)))
    if both := peer.get("policy_update"):
        text = f"{both['theirs_ms']['median']:,.0f} ms ÷ {both['ours_ms']['median']:.0f} ms = {both['ratio']:.1f}"
        found.append((f"{name}: policy update of {both['samples']:,} samples, theirs ÷ ours", text))
    if both := peer.get("many_agents"):
        found.append((f"{name}: env steps/s of {both['num_agents']} agents side by side", _speeds(both)))
    if both := peer.get("time_to_threshold"):
        for key, digits, words in (("seconds", 3, "seconds"), ("env_steps", 0, "env steps")):
            ours, theirs = (f"{both[side][key]:,.{digits}f}" for side in ("ours", "theirs"))
            text = f"{ours} ÷ {theirs} = {both[f'{key}_ratio']:.3f}"
            found.append((f"{name}: {words} to a return of {both['threshold']:g}, each at its defaults", text))
    return found


def _speeds(both: dict[str, Any]) -> str:
    ours, theirs = (both[f"{side}_env_steps_per_second"] for side in ("ours", "theirs"))
    low_high = (f"{side['median']:,.0f} ({side['low']:,.0f} – {side['high']:,.0f})" for side in (ours, theirs))
    return f"{' ÷ '.join(low_high)} = {both['speed_ratio']:.2f}"
