"""How well the library learns, suite by suite: one set of settings per suite, many seeds, beside published numbers.

    python experiments/results/run.py classic          # or any other suite; see --help
    python experiments/results/run.py classic CartPole-v1 --workers 2
    python experiments/results/run.py classic --plot-only --output experiments/results

JSON and picture are written to the folder --output, and the table is printed. Tasks that its JSON already has are not
run again (`--fresh` runs them all); neither are seeds of an interrupted command that ran with the same settings. A
seed that was interrupted itself continues.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import trpo_jax
from trpo_jax import Config, Preset, interquartile_mean, load_preset, stratified_bootstrap

EPISODES = 32
GYMNAX = "gymnax's README: PPO or evolution strategies of gymnax-blines, at other numbers of steps"
TIANSHOU = "Tianshou's MuJoCo benchmark: TRPO, mean of 10 seeds, of v3"
CRAFTAX = "Craftax's README: PPO-RNN after 1M steps, 2.3 % of the largest return, 226"
ZOO = "RL Zoo (sb3-contrib TRPO, settings tuned for each task, one run)"


@dataclasses.dataclass(frozen=True)
class Task:
    """An environment, numbers to compare with, and what the preset does not name.

    Attributes:
      env: name of the environment.
      published: a published return.
      optimal: the best possible one.
      env_steps: env steps per agent.
      wrappers: of the environment.
      note: the rest of the task's name, after the environment.
    """

    env: str
    published: float | None = None
    optimal: float | None = None
    env_steps: int | None = None
    wrappers: str = "none"
    note: str = ""

    @property
    def name(self) -> str:
        return self.env + self.note


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks that share one set of settings.

    Attributes:
      presets: the presets whose settings are run on the tasks that each names, by the method's name.
      num_seeds: seeds 0, 1, …
      tasks: the environments.
      source: of the published numbers.
      packages: whose versions are recorded beside those of the core.
    """

    presets: dict[str, str]
    num_seeds: int
    tasks: list[Task]
    source: str = ""
    packages: tuple[str, ...] = ()


def suites() -> dict[str, Suite]:
    minatar_tasks = [
        Task("Breakout-MinAtar", 28.0),
        Task("Asterix-MinAtar", 15.0),
        Task("SpaceInvaders-MinAtar", 131.0),
        Task("Freeway-MinAtar", 58.0),
        Task("Seaquest-MinAtar"),
    ]
    return {
        "classic": Suite(
            {"TRPO": "classic", "PPO": "classic-ppo"},
            64,
            [
                Task("CartPole-v1", 500.0, 500.0),
                Task("Acrobot-v1", -83.1),
                Task("MountainCar-v0", -107.3),
                Task("MountainCarContinuous-v0", 92.5),
                Task("Pendulum-v1", -174.6),
            ],
            ZOO,
        ),
        "memory": Suite(
            {"TRPO": "memory"},
            16,
            [
                Task("MemoryChain-bsuite", optimal=1.0),
                # Without its two velocities: what moves where must be remembered.
                Task(
                    "CartPole-v1",
                    optimal=500.0,
                    env_steps=200_000,
                    wrappers="hide_entries=1,3",
                    note=", positions only",
                ),
            ],
        ),
        "gymnax": Suite(
            {"TRPO": "gymnax"},
            8,
            [
                Task("CartPole-v1", 500.0, 500.0),
                Task("Acrobot-v1", -80.0),
                Task("Pendulum-v1", -130.0),
                Task("MountainCar-v0", -118.0),
                Task("MountainCarContinuous-v0", 92.0),
                Task("Catch-bsuite", optimal=1.0),
                Task("DeepSea-bsuite", optimal=0.99),
                Task("DiscountingChain-bsuite", optimal=1.1),
                Task("UmbrellaChain-bsuite", optimal=1.0),
                Task("MemoryChain-bsuite", optimal=1.0),
                Task("SimpleBandit-bsuite", optimal=0.5),
                Task("FourRooms-misc", optimal=1.0),
                Task("MetaMaze-misc", 32.0),
                Task("PointRobot-misc", 10.0),
                Task("BernoulliBandit-misc", 90.0),
                Task("GaussianBandit-misc", 0.0),
                Task("Reacher-misc"),
                Task("Swimmer-misc"),
                Task("FrozenLake-misc", optimal=0.74),
                Task("Pong-misc"),
                Task("Asterix-MinAtar"),
                Task("Breakout-MinAtar"),
                Task("Freeway-MinAtar"),
                Task("SpaceInvaders-MinAtar"),
                Task("Seaquest-MinAtar"),
            ],
            GYMNAX,
        ),
        "minatar": Suite(
            {"TRPO": "minatar", "PPO": "minatar-ppo"},
            3,
            minatar_tasks,
            GYMNAX,
        ),
        "minatar-cnn": Suite(
            {"TRPO": "minatar-cnn", "PPO": "minatar-cnn-ppo"},
            3,
            minatar_tasks,
            GYMNAX,
        ),
        "gridworlds": Suite(
            {"TRPO": "gridworlds", "PPO": "gridworlds-ppo"},
            5,
            [
                Task("navix/Navix-Empty-Random-8x8-v0"),
                Task("navix/Navix-DoorKey-8x8-v0"),
                Task("navix/Navix-LavaGapS7-v0"),
                Task("navix/Navix-SimpleCrossingS9N1-v0"),
                Task("navix/Navix-Dynamic-Obstacles-8x8-v0"),
                Task("xminigrid/MiniGrid-EmptyRandom-16x16"),
                Task("xminigrid/MiniGrid-DoorKey-8x8"),
                Task("xminigrid/MiniGrid-FourRooms"),
                Task("xminigrid/MiniGrid-Unlock"),
                Task("xminigrid/MiniGrid-UnlockPickUp"),
                Task("craftax/Craftax-Symbolic-v1", 5.2),
            ],
            CRAFTAX,
            packages=("navix", "xminigrid", "craftax"),
        ),
        "brax": Suite(
            {"TRPO": "brax", "PPO": "brax-ppo"},
            5,
            [Task("brax/hopper"), Task("brax/halfcheetah/spring")],
            packages=("brax",),
        ),
        "box2d": Suite(
            {"TRPO": "box2d", "PPO": "box2d-ppo"},
            10,
            [
                Task("gymnasium/LunarLander-v3", 133.2),
                Task("gymnasium/LunarLanderContinuous-v3", 262.4),
                Task("gymnasium/BipedalWalker-v3", 182.0),
            ],
            ZOO,
            packages=("gymnasium", "Box2D"),
        ),
        "mujoco": Suite(
            {
                "TRPO": "mujoco",
                "PPO": "mujoco-ppo",
                "TRPO, γ = 0.9999": "mujoco-swimmer",
                "PPO, γ = 0.9999": "mujoco-swimmer-ppo",
            },
            5,
            [
                Task("gymnasium/HalfCheetah-v5", 4471.2),
                Task("gymnasium/Hopper-v5", 2046.0),
                Task("gymnasium/Walker2d-v5", 3826.7),
                Task("gymnasium/InvertedPendulum-v5", 1000.0, 1000.0),
                Task("gymnasium/InvertedDoublePendulum-v5", 8435.0),
                Task("gymnasium/Reacher-v5", -5.1),
                Task("gymnasium/Swimmer-v5", 40.9),
            ],
            TIANSHOU,
            packages=("gymnasium", "mujoco"),
        ),
        "mujoco-large": Suite(
            {"TRPO": "mujoco-large", "PPO": "mujoco-large-ppo"},
            5,
            [Task("gymnasium/Ant-v5", 2867.0), Task("gymnasium/Humanoid-v5", 810.0)],
            TIANSHOU,
            packages=("gymnasium", "mujoco"),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=sorted(suites()))
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="tasks of the suite; all, if none is named")
    parser.add_argument("--output", type=Path, default=Path("runs/results"))
    parser.add_argument("--workers", type=int, default=1, help="processes that share the seeds, on a core each (CPU)")
    parser.add_argument("--fresh", action="store_true", help="run the tasks anew")
    parser.add_argument("--plot-only", action="store_true", help="draw anew from the JSON")
    arguments = parser.parse_args()
    suite, file = suites()[arguments.suite], arguments.output / f"{arguments.suite}.json"
    names = [task.name for task in suite.tasks]
    for name in arguments.tasks:
        if name not in names:
            parser.error(f"{name} is not a task of {arguments.suite}, which has {', '.join(names)}")
    if arguments.workers < 1:
        parser.error(f"--workers must be 1 or more, got {arguments.workers}")
    if arguments.plot_only and not file.exists():
        parser.error(f"--plot-only needs {file}; name the folder that has it with --output")
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = json.loads(file.read_text()) if file.exists() else {"tasks": []}
    rows = {(row["name"], row["method"]): row for row in record["tasks"]}
    lengths = {method: load_preset(name).tasks for method, name in suite.presets.items()}
    order = [
        (task.name, method)
        for task, method in itertools.product(suite.tasks, suite.presets)
        if task.env_steps or task.name in lengths[method]
    ]
    chosen = [] if arguments.plot_only else [row for row in order if row[0] in (arguments.tasks or names)]
    folder = arguments.output / "seeds"
    jobs = [Job(arguments.suite, *row, folder) for row in chosen if arguments.fresh or row not in rows]
    for old in [job.file(seed) for job in jobs for seed in range(suite.num_seeds) if arguments.fresh]:
        old.unlink(missing_ok=True)
        shutil.rmtree(old.with_suffix(""), ignore_errors=True)
    for job, results in run_jobs(jobs, arguments.workers):
        rows[job.task, job.method] = summarize(job, results)
        record = {
            "tasks": [rows[row] for row in order if row in rows],
            "device": jax.devices()[0].device_kind,
            **{name: version(name) for name in ("jax", "gymnax", "trpo_jax", *suite.packages)},
            "settings": {method: load_preset(name).settings for method, name in suite.presets.items()},
            "source": suite.source,
        }
        file.write_text(json.dumps(record, indent=1) + "\n")
        print(table({"tasks": [rows[job.task, job.method]]}).splitlines()[-1], flush=True)
    plot(record, file.with_suffix(".png"))
    sys.stdout.write(table(record))


class Job(NamedTuple):
    """A row of the table: a task of a suite, trained by a method; what its seeds gave is kept in `folder`."""

    suite: str
    task: str
    method: str
    folder: Path

    @property
    def row(self) -> tuple[Suite, Task, Preset]:
        suite = suites()[self.suite]
        task = next(task for task in suite.tasks if task.name == self.task)
        return suite, task, load_preset(suite.presets[self.method])

    @property
    def config(self) -> Config:
        _, task, preset = self.row
        config = Config(env=task.env, wrappers=task.wrappers, **preset.settings)
        env_steps = task.env_steps or preset.tasks[task.name]
        return config.replace(num_iterations=env_steps // config.steps_per_iteration)

    def file(self, seed: int) -> Path:
        return self.folder / f"{self.suite} {self.method} {self.task.replace('/', ' ')} {seed}.npz"


class Result(NamedTuple):
    """What a seed gave: training returns, the returns before and after training, and the seconds that it took."""

    curve: np.ndarray
    first: np.ndarray
    last: np.ndarray
    seconds: np.ndarray


def run_jobs(jobs: list[Job], workers: int) -> Iterator[tuple[Job, list[Result]]]:
    """Yield the results of each job's seeds: one after the other on CPU, side by side on an accelerator."""
    if jax.default_backend() != "cpu":
        yield from ((job, run_seeds(job, range(suites()[job.suite].num_seeds))) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    cores = spawn.SimpleQueue()
    for worker in range(workers):
        cores.put(worker)
    with ProcessPoolExecutor(workers, spawn, initializer=start_worker, initargs=(cores, workers)) as pool:
        started = [
            (job, [pool.submit(run_seeds, job, [seed]) for seed in range(suites()[job.suite].num_seeds)])
            for job in jobs
        ]
        yield from ((job, [result for future in futures for result in future.result()]) for job, futures in started)


def start_worker(cores: Any, workers: int) -> None:
    """Keep each of several processes on a core of its own, where the system can: else their threads share all cores.

    A worker ends with the command, even if that was killed: it would train on beside the next one.
    """
    if workers > 1 and sys.platform == "linux":
        available = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {available[cores.get() % len(available)]})
    threading.Thread(target=end_with_command, daemon=True).start()


def end_with_command() -> None:
    """Wait until the process that started this one has ended, and end this one."""
    command = multiprocessing.parent_process()
    assert command is not None
    command.join()
    os._exit(1)


def run_seeds(job: Job, seeds: Sequence[int]) -> list[Result]:
    """Train some seeds, and evaluate each as it ended and as it began.

    Seeds that ran before are not run again, and those that were interrupted continue.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    files = [job.file(seed) for seed in seeds]
    settings = json.dumps([job.row[2].settings, job.config.num_iterations])
    kept = [result for file in files if (result := load(file, settings)) is not None]
    if len(kept) == len(files):
        return kept
    folder = files[0].with_suffix("")
    if (folder / "config.json").exists() and trpo_jax.open_run(folder).config != job.config:
        shutil.rmtree(folder)  # it was begun with other settings
    seconds = train(trpo_jax.create_run(folder, job.config, seeds[0], len(seeds)))
    rows = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)
    curves = rows["episode_return"].reshape(-1, len(seeds)).T
    first, last = evaluate(job.config, seeds, trpo_jax.load_run(folder)[1])
    results = [Result(*of_seed, np.asarray(seconds / len(seeds))) for of_seed in zip(curves, first, last, strict=True)]
    for file, result in zip(files, results, strict=True):
        np.savez(file, settings=settings, **result._asdict())
    shutil.rmtree(folder)
    return results


def train(run: Any) -> float:
    """Train a run from where it stands; return the seconds of all its training."""
    file = run.path / "seconds"
    before = float(file.read_text()) if file.exists() else 0.0

    def report(progress: Any) -> None:
        file.write_text(str(before + progress.clock.seconds))

    if not trpo_jax.continue_run(run, report):
        raise KeyboardInterrupt
    return float(file.read_text())


def evaluate(config: Config, seeds: Sequence[int], states: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mean returns of untrained agents, whose actions are sampled, and of the trained ones, one per seed."""
    play = functools.partial(trpo_jax.evaluate, num_episodes=EPISODES, max_steps=5000)

    def both(arguments: tuple[Any, Any]) -> Any:
        seed, state = arguments
        key = jax.random.key(seed)
        of_play = jax.random.fold_in(key, 2**31)
        first = play(config, trpo_jax.init(config, key), of_play, deterministic=False)
        return first.episode_return.mean(), play(config, state, of_play).episode_return.mean()

    of_all = jnp.asarray(seeds), states
    across = jax.vmap(both) if len(seeds) > 1 else functools.partial(jax.lax.map, both)
    first, last = jax.jit(across)(of_all)
    return np.asarray(first), np.asarray(last)


def load(file: Path, settings: str) -> Result | None:
    """A seed that ran before, if it ran with these settings."""
    if not file.exists():
        return None
    with np.load(file) as kept:
        return Result(*(kept[name] for name in Result._fields)) if kept["settings"] == settings else None


def summarize(job: Job, results: list[Result]) -> dict[str, Any]:
    """Make the row that is recorded of a job."""
    suite, task, _ = job.row
    curves, random, returns, seconds = map(np.array, zip(*results, strict=True))
    # The curve begins when an episode of every seed has ended.
    curves = curves.T
    seen = np.flatnonzero(~np.isnan(curves).any(axis=1))
    every, steps = max(1, len(seen) // 100), job.config.steps_per_iteration
    return {
        "name": job.task,
        "method": job.method,
        "preset": suite.presets[job.method],
        "env_steps": len(curves) * steps,
        "num_seeds": len(returns),
        "iqm": float(interquartile_mean(returns)),
        "interval": stratified_bootstrap([returns]),
        "random": float(random.mean()),
        "published": task.published,
        "optimal": task.optimal,
        "seconds": round(float(seconds.sum()), 1),
        "returns": [round(float(value), 3) for value in returns],
        "curve_steps": [(int(i) + 1) * steps for i in seen[::every]],
        "curve_iqm": [round(float(interquartile_mean(curves[i])), 3) for i in seen[::every]],
    }


def table(record: dict[str, Any]) -> str:
    lines = [
        "| task | method | steps | seeds | untrained | IQM | 95 % interval | published or best possible | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in record["tasks"]:
        low, high = task["interval"]
        published = "" if task["published"] is None else f"{task['published']:g}"
        best = "" if task["optimal"] is None else f"best: {task['optimal']:g}"
        compared = ", ".join(filter(None, (published, best)))
        lines.append(
            f"| {task['name']} | {task['method']} | {task['env_steps']:,} | {task['num_seeds']} | {task['random']:.4g} "
            f"| {task['iqm']:.4g} | {low:.4g} … {high:.4g} | {compared} | {task['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


LINES = {"published": "tab:green", "optimal": "black", "random": "gray"}
LABELS = {"published": "published", "optimal": "best possible", "random": "untrained"}


def plot(record: dict[str, Any], file: Path) -> None:
    names = list(dict.fromkeys(task["name"] for task in record["tasks"]))
    methods = list(dict.fromkeys(task["method"] for task in record["tasks"]))
    columns = min(3 if len(names) <= 6 else 5, len(names))
    rows = -(-len(names) // columns)
    size = max(3.0 * columns, 5.0), 2.5 * rows + 0.3  # the legend needs this width
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for task in record["tasks"]:
        axes, colour = grid[names.index(task["name"])], f"C{methods.index(task['method'])}"
        axes.plot(np.array(task["curve_steps"]) / 1000, task["curve_iqm"], color=colour, label=task["method"])
        for name, colour in LINES.items():
            if task[name] is not None:
                axes.axhline(task[name], color=colour, linestyle=":", linewidth=1, label=LABELS[name])
        axes.set_title(task["name"].removeprefix("gymnasium/"), fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("env steps, thousands", fontsize=9)
    figure.supylabel("training return, IQM", fontsize=9)
    found = [axes.get_legend_handles_labels() for axes in grid]
    legend = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    order = [label for label in (*methods, *LABELS.values()) if label in legend]
    handles = [legend[label] for label in order]
    figure.legend(handles, order, fontsize=8, ncols=len(order), loc="outside upper center")
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()
