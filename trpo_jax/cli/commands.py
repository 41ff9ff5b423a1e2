"""The commands that use the agents of a run or a sweep, and those that list environments and measure speed."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trpo_jax.cli.choices import check_flags_of_environment, config_of, settings_in_file, tell_idle
from trpo_jax.cli.startup import start_quickly
from trpo_jax.config import Config
from trpo_jax.files import check_replaceable, file_of_kind, plain_json, write_atomically
from trpo_jax.presets import available_presets, load_preset
from trpo_jax.sentences import UsageError, counted, say, shown

if TYPE_CHECKING:
    from trpo_jax.runs.folders import Run
    from trpo_jax.training.evaluation import Evaluation
    from trpo_jax.training.state import TrainState


def run_of(namespace: argparse.Namespace) -> Run:
    """The run in a command's folder."""
    from trpo_jax.runs.folders import open_run

    run = open_run(namespace.path)
    _check_env(namespace, str(run.config.env), run.path)
    return run


def _check_env(namespace: argparse.Namespace, env: str, path: Path) -> None:
    """Raise `UsageError` if --env names another environment than that of training; `play` has one to play in."""
    if namespace.env not in (None, env) and namespace.command != "play":
        raise UsageError(f"env={shown(namespace.env)} is not what {path} was trained on, {env}; leave out --env.")


def evaluate(namespace: argparse.Namespace) -> int:
    """Run whole episodes with the agents of a run, and print their returns."""
    file = file_of_kind(namespace.output, "--output", ".json") if namespace.output else None
    start_quickly()
    import functools

    import jax

    from trpo_jax.cli.displays import make_console, print_evaluation
    from trpo_jax.training import evaluation
    from trpo_jax.training.memory import check_episodes, free_memory

    run, state = _agents_of(namespace, namespace.agent)
    check_episodes(run.config, run.num_seeds, namespace.num_episodes, free_memory(jax.local_devices()[:1]))
    stochastic = run.config.eval_stochastic if namespace.stochastic is None else namespace.stochastic
    run_episodes = functools.partial(
        evaluation.evaluate,
        num_episodes=namespace.num_episodes,
        deterministic=not stochastic,
        randomize=namespace.randomize,
    )
    keys = jax.random.split(jax.random.key(namespace.seed), run.num_seeds)
    result = jax.jit(jax.vmap(run_episodes, in_axes=(None, 0, 0)))(run.config, state, keys)
    asked = {name: getattr(namespace, name) for name in ("checkpoint", "num_episodes", "seed")}
    figures = {
        "folder": str(run.path),
        "env": str(run.config.env),
        "stochastic": stochastic,
        **asked,
        **_figures(run, state, result),
    }
    print_evaluation(make_console(), figures)
    if file:
        write_atomically(file, json.dumps(plain_json(figures), indent=1) + "\n")
        print(f"Figures: {file}")
    return 0


def _figures(run: Run, state: TrainState, result: Evaluation) -> dict[str, Any]:
    """The figures of an evaluation [A, E]: of each agent, and over the agents if there are several."""
    import numpy as np

    from trpo_jax.runs.evaluations import half_width, summary
    from trpo_jax.sweeps.iqm import interquartile_mean, stratified_bootstrap

    returns, lengths = np.asarray(result.episode_return), np.asarray(result.episode_length)
    table = summary(result) | {"min": returns.min(axis=1), "max": returns.max(axis=1)}
    agents = [
        {"seed": run.seed + i, "env_steps": int(iteration) * run.config.steps_per_iteration}
        | {name: float(column[i]) for name, column in table.items()}
        | {"returns": returns[i], "lengths": lengths[i]}
        for i, iteration in enumerate(np.asarray(state.iteration))
    ]
    if len(agents) == 1:
        return {"agents": agents}
    means = returns.mean(axis=1, dtype=np.float64)
    mean, half = means.mean(), half_width(means)
    spread = {"mean": mean, "std": means.std(), "low": mean - half, "high": mean + half}
    spread |= {"min": returns.min(), "max": returns.max(), "length": lengths.mean()}
    robust = {"iqm": interquartile_mean(means), "iqm_interval": stratified_bootstrap([means])}
    return {"agents": agents, "all": spread | robust}


def _agents_of(namespace: argparse.Namespace, agent: int | None) -> tuple[Run, TrainState]:
    """A run with its trained agents, or with one of them; for a sweep, a run of one agent."""
    import jax

    from trpo_jax.runs.folders import Run, check_agent, chosen_state

    path = Path(namespace.path)
    if (path / "sweep.json").exists():
        if namespace.checkpoint != "last":
            raise UsageError(f"--checkpoint is for runs, but {path} is a sweep, which keeps last states; leave it out.")
        from trpo_jax.sweeps.agents import choose_agent, load_agent

        point, seed = choose_agent(path, namespace.point, namespace.agent)
        config, state = load_agent(path, point, seed)
        _check_env(namespace, str(config.env), path)
        print(f"Point {point}, seed {seed} of {path}.")
        return Run(path, config, seed, num_seeds=1), jax.tree.map(lambda leaf: leaf[None], state)
    if namespace.point is not None:
        raise UsageError(f"--point is for sweeps, but {path} is not one; leave it out.")
    run = run_of(namespace)
    state = chosen_state(run, namespace.checkpoint)
    if agent is None:
        return run, state
    check_agent(agent, run.num_seeds)
    one = dataclasses.replace(run, seed=run.seed + agent, num_seeds=1)
    return one, jax.tree.map(lambda leaf: leaf[agent][None], state)


def _agent_of(namespace: argparse.Namespace) -> tuple[Run, TrainState]:
    """A run, or a sweep, and one of its trained agents."""
    start_quickly()
    import jax

    run, state = _agents_of(namespace, namespace.agent or 0)
    return run, jax.tree.map(lambda leaf: leaf[0], state)


def play(namespace: argparse.Namespace) -> int:
    """Play a trained policy in Gymnasium's own environment, or in that of training."""
    start_quickly()
    from trpo_jax import playing
    from trpo_jax.videos import check_video

    default = Path(namespace.path) / "episode.gif" if namespace.render else None
    video = Path(namespace.output) if namespace.output else default
    if video:
        check_video(video)
        playing.draw_without_a_screen()
    run, state = _agent_of(namespace)
    options: dict[str, Any] = {"num_episodes": namespace.num_episodes, "seed": namespace.seed, "video": video}
    env = str(run.config.env)
    if namespace.render:
        if namespace.env not in (None, env):
            raise UsageError(f"--render draws the environment of training, {env}; leave out --env.")
        returns, where = playing.play_here(run.config, state, **options), env
    else:
        env = (namespace.env or env).removeprefix("gymnasium/")
        returns, where = playing.play(run.config, state, env, **options), f"{env} of Gymnasium"
    print(
        f"{where}, {counted(len(returns), 'episode')}: return {returns.mean():.1f} on average, "
        f"{returns.min():.1f} to {returns.max():.1f}."
    )
    if video:
        print(f"First episode: {video}")
    return 0


def export(namespace: argparse.Namespace) -> int:
    """Write a trained policy as portable StableHLO."""
    run, state = _agent_of(namespace)
    from trpo_jax.deployment import export_policy

    file = export_policy(run.config, state, Path(namespace.output or run.path / "policy"))
    print(f"Policy: {file} ({file.stat().st_size:,} bytes)")
    print(f"`python {file.parent / 'load_policy.py'}` loads it and acts; it needs jax and numpy only.")
    return 0


def benchmark(namespace: argparse.Namespace) -> int:
    """Measure throughput, memory and where the time goes."""
    settings = settings_in_file(namespace)
    config = config_of(namespace, settings)
    output = Path(namespace.output) if namespace.output else None
    picture = file_of_kind(namespace.picture, "--picture", ".png") if namespace.picture else None
    for flag, file in (("--output", output), ("--picture", picture)):
        if file and file.is_dir():
            raise UsageError(f"{flag} must name a file, but {file} is a folder; add a name to it.")
        if file:
            check_replaceable(file, flag)
        if file and not file.parent.is_dir():
            raise UsageError(f"there is no folder {file.parent} for {file}; make it, or choose another {flag}.")
    if picture and len(namespace.num_agents) < 2 and len(namespace.env_counts) < 2:
        raise UsageError("--picture needs a curve: give --num-agents or --env-counts two numbers or more, as 1,8,64.")

    from trpo_jax.benchmarks.curves import draw_curves
    from trpo_jax.benchmarks.report import THRESHOLDS, notes, run_benchmark, tables, warning_of
    from trpo_jax.cli.displays import make_console, print_table
    from trpo_jax.environments.make import mark_traced
    from trpo_jax.training.agents import make_agent

    config = mark_traced(config)
    if make_agent(config).is_recurrent or config.update != "trpo":
        raise UsageError("benchmark measures the parts of update=trpo, with networks that are not recurrent.")
    if config.eval_every:
        raise UsageError("benchmark measures training without evaluation; leave out eval_every.")
    for number in namespace.env_counts:
        config.replace(num_envs=number)  # one out of range is refused before anything is measured
    check_flags_of_environment(namespace, config)
    tell_idle(settings, [config], namespace.config)
    console = make_console()
    tell = say if namespace.json else lambda text: console.print(text, soft_wrap=True)
    result = run_benchmark(
        config,
        num_agents=namespace.num_agents,
        env_counts=namespace.env_counts,
        repetitions=namespace.repetitions,
        threshold=THRESHOLDS.get(config.env) if namespace.threshold is None else namespace.threshold,
        num_seeds=namespace.num_seeds,
        max_steps=namespace.threshold_steps,
        report=lambda what: tell(f"Measuring {what} …"),
    )
    text = json.dumps(plain_json(result), indent=2) + "\n"
    if output:
        write_atomically(output, text)
    if picture:
        draw_curves(result, picture)
    if namespace.json:
        print(text, end="")
    else:
        for title, columns, rows in tables(result):
            print_table(console, title, columns, rows)
            console.print()
        for line in notes():
            tell(line)
    where = result["setting"]
    if warning := warning_of(max((where[name] or 0) for name in ("busy", "busy_after"))):
        say(warning)
    return 0


def check(namespace: argparse.Namespace) -> int:
    """Check an environment against the contract, and print every problem."""
    start_quickly()
    from trpo_jax.environments.contract import check_environment
    from trpo_jax.environments.make import environment_of, mark_traced

    config = mark_traced(config_of(namespace))
    environment = environment_of(config)  # one that cannot be made is bad input
    wrong = check_environment(environment if config != Config(env=namespace.env) else namespace.env)
    for sentence in wrong:
        print(f"{environment.name}: {sentence}")
    if not wrong:
        print(f"{environment.name}: nothing is wrong.")
    return 1 if wrong else 0


def envs(_: argparse.Namespace) -> int:
    """List the environments, with their spaces and time limits."""
    from rich.table import Table

    from trpo_jax.cli.displays import make_console
    from trpo_jax.environments.make import available_environments

    table = Table(box=None)
    for column in ("environment", "observation", "actions", "time limit"):
        table.add_column(column, no_wrap=True)
    missing = []
    for name, environment in available_environments().items():
        if isinstance(environment, str):
            missing.append(environment)
            continue
        shape = " x ".join(map(str, environment.observation_shape))
        table.add_row(name, shape, str(environment.action_space), str(environment.max_steps or "none"))
    console = make_console()
    console.print(table)
    for sentence in missing:
        console.print(sentence, soft_wrap=True)
    return 0


def presets(_: argparse.Namespace) -> int:
    """List the presets, with their settings and tasks."""
    for preset in map(load_preset, available_presets()):
        settings = ", ".join(f"{name}={value}" for name, value in preset.settings.items())
        tasks = ", ".join(preset.tasks)
        print(f"{preset.name}: {preset.about}\n  settings: {settings}\n  tasks: {tasks}\n")
    print("`trpo-jax train ENV --preset NAME` uses one; without NAME, the first one with this environment.")
    return 0
