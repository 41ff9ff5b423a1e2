"""The commands that train a run: train, resume."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from trpo_jax.cli.choices import check_flags_of_environment, config_of, opener_of, settings_in_file, tell_idle
from trpo_jax.cli.commands import run_of
from trpo_jax.cli.startup import start_quickly, use_devices
from trpo_jax.config import Config
from trpo_jax.sentences import UsageError, command, counted, say
from trpo_jax.validation import validate, without_effect

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from trpo_jax.runs.continuing import Progress
    from trpo_jax.runs.folders import Run
    from trpo_jax.training.state import TrainState


def train(namespace: argparse.Namespace) -> int:
    """Train agents in a new folder, or continue an equal run in its folder."""
    file = settings_in_file(namespace)
    config = config_of(namespace, file)
    validate(config)
    start_quickly()
    use_devices(namespace.num_devices)
    from trpo_jax.environments.make import mark_traced
    from trpo_jax.runs.folders import create_run
    from trpo_jax.training.devices import devices_of

    config = mark_traced(config)
    devices_of(namespace.num_devices, config.num_envs, namespace.num_seeds)  # refused before a folder is made
    check_flags_of_environment(namespace, config)
    tell_idle(file, [config], namespace.config)
    output = namespace.output or f"runs/{config.env}"
    start = _start_from(namespace, config) if namespace.init_from else None
    asked = namespace.seed, namespace.num_seeds, namespace.keep_every
    return _continue(create_run(output, config, *asked, init_from=start), namespace)


def _start_from(namespace: argparse.Namespace, config: Config) -> TrainState:
    """The trained agents of --init-from."""
    from trpo_jax.runs.folders import load_run
    from trpo_jax.training.warm_start import what_shapes_hide

    trained_with, state = load_run(namespace.init_from)
    then, now = what_shapes_hide(trained_with), what_shapes_hide(config)
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            raise UsageError(
                f"{namespace.init_from} was trained with {name}={getattr(trained_with, name)}; its networks need that, "
                f"not {getattr(config, name)}: give the same."
            )
    return state


def resume(namespace: argparse.Namespace) -> int:
    """Continue a run that was interrupted."""
    start_quickly()
    use_devices(namespace.num_devices)
    from trpo_jax.runs.folders import extend_run

    run = run_of(namespace)
    if namespace.total_steps is not None:
        run = extend_run(run, namespace.total_steps)
        annealed = [name for name in ("anneal_max_kl", "anneal_learning_rates") if getattr(run.config, name)]
        if run.begun_as and annealed:
            say(f"{' and '.join(annealed)} follow the schedule of the new length from here on.")
    return _continue(run, namespace)


def _continue(run: Run, namespace: argparse.Namespace) -> int:
    from trpo_jax.cli.displays import LiveLine, make_console, print_best, run_status
    from trpo_jax.runs.continuing import continue_run
    from trpo_jax.runs.descriptions import num_threads
    from trpo_jax.runs.evaluations import best_file, evaluate_best
    from trpo_jax.runs.learning_curve import plot_learning_curve
    from trpo_jax.runs.metrics import read_metrics
    from trpo_jax.runs.sinks import is_fed
    from trpo_jax.runs.workers import useful_workers

    late = [name for name in namespace.log if not is_fed(name, run.path)]  # these get the existing rows, too
    opened = opener_of(namespace, run.path)("", run.description)
    console, config = make_console(expendable=True), run.config
    num_workers = useful_workers(config, run.num_seeds, num_threads())
    where = f", {num_workers} worker processes" if num_workers > 1 else ""
    steps = counted(config.num_iterations * config.steps_per_iteration, "step")
    radius = "" if without_effect(config, "max_kl") else f", δ = {config.max_kl:g}"
    console.print(
        f"{config.env}: {counted(run.num_seeds, 'agent')}, {counted(config.num_iterations, 'iteration')} of "
        f"{config.num_envs} x {config.num_steps} steps ({steps} per agent), "
        f"{config.update}{radius}{where}. Compiling …",
        soft_wrap=True,
    )
    last: Progress | None = None
    with LiveLine(console, config.num_iterations, seconds=1) as line:

        def show(progress: Progress) -> None:
            nonlocal last
            last = progress
            line.show(progress.iteration, run_status(progress, config))

        try:
            sinks = [sink for name, (sink, _) in zip(namespace.log, opened, strict=True) if name not in late]
            others = [sink for name, (sink, _) in zip(namespace.log, opened, strict=True) if name in late]
            sizes = {"num_devices": namespace.num_devices, "num_workers": num_workers}
            complete = continue_run(run, show, sinks, late_sinks=others, **sizes)
        finally:
            for _, close in opened:
                close()
    plot = plot_learning_curve(run)
    if last is not None:
        of = counted(config.num_iterations, "iteration")
        console.print(f"{last.iteration} of {of} done; trained for {last.clock.seconds:.1f} s.")
    elif complete:
        console.print(_why_nothing_is_left(run))
    console.print(f"Learning curve: {plot}", soft_wrap=True)
    if config.eval_every and complete and best_file(run).exists():
        print_best(console, evaluate_best(run), config.eval_episodes)
    if last is not None and math.isnan(last.metrics["episode_return"]):
        if last.metrics["num_episodes"]:
            console.print("Returns are not finite, so the learning curve is empty: a reward of the environment is not.")
        else:
            console.print("No episode has ended, so the learning curve is empty; more steps may show one.")
    failed = _tell_faults(config, read_metrics(run.path))
    if not complete:
        console.print(f"Stopped; {command('resume', run.path, env=config.env)} continues.", soft_wrap=True)
        return 130
    console.print(f"Next: {command('evaluate', run.path, env=config.env)}", soft_wrap=True)
    return 1 if failed else 0


def _tell_faults(config: Config, metrics: Mapping[str, np.ndarray]) -> bool:
    """Tell whose numbers were not finite, and whose updates are all rejected; return whether any were not finite."""
    from trpo_jax.runs.metrics import failures, stalled

    if failed := failures(metrics):
        met = _seeds(failed, "at iteration")
        say(f"numbers that were not finite: {met}; such an update is rejected, and the policy stays unchanged.")
    if config.update == "trpo" and (standing := stalled(metrics)):
        since = _seeds(standing, "after iteration")
        say(f"no update was accepted any more: {since}; raise cg_damping or fisher_fraction, or use larger batches.")
    return bool(failed)


def _seeds(iterations: dict[int, int], at: str) -> str:
    """The seeds with their iterations; of more than eight, the first eight and a number."""
    named = ", ".join(f"seed {seed} {at} {iteration}" for seed, iteration in list(iterations.items())[:8])
    return f"{named}, and {len(iterations) - 8} more" if len(iterations) > 8 else named


def _why_nothing_is_left(run: Run) -> str:
    """Why a run that is continued trains nothing: its iterations are done, or all agents have reached their return."""
    import numpy as np

    from trpo_jax.runs.folders import newest_state

    state = newest_state(run)
    done = 0 if state is None else int(np.max(state.iteration))
    if done >= run.config.num_iterations:
        return "All iterations are done already."
    reached = "The agent has" if run.num_seeds == 1 else "All agents have"
    goal = f"stop_at_return={run.config.stop_at_return:g}"
    return f"{reached} reached {goal} after {counted(done, 'iteration')}; nothing is left to train."
