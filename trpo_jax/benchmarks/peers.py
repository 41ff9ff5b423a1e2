"""Other trainers, each in a virtual environment of its own, measured in turn with ours."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from trpo_jax.benchmarks.measure import (
    Agents,
    TimeToThreshold,
    Trainer,
    measure_policy_update,
    summary,
    threshold_summary,
)
from trpo_jax.config import UsageError
from trpo_jax.settings import settings_of
from trpo_jax.types import Config


@dataclasses.dataclass(frozen=True)
class Peer:
    """What to install, in steps of pip's arguments, and the program that answers inside."""

    name: str
    worker: str
    requirements: tuple[tuple[str, ...], ...]


PEERS = {
    "sb3-contrib": Peer(
        "sb3-contrib",
        "sb3_contrib_trpo.py",
        # Torch by itself first: its exact version may lie at hand, where a range would fetch the newest.
        (("torch==2.13.0",), ("sb3-contrib==2.9.2",)),
    ),
    # The last gymnax whose `step` rejax can unpack, and the JAX that we run on ourselves.
    "rejax": Peer("rejax", "rejax_ppo.py", (("rejax==0.1.3", "gymnax==0.0.9", f"jax=={version('jax')}"),)),
}


class PeerError(Exception):
    """A peer could not be installed or stopped; the message says which and how."""


Ask = Callable[..., dict[str, Any]]


@contextlib.contextmanager
def running(peer: Peer, environments: Path | None = None) -> Iterator[Ask]:
    """Install a peer, start its worker, and give a function that puts a request to it and returns the answer.

    Args:
      peer: one of `PEERS`.
      environments: folder that keeps virtual environments for the next time; by default they are thrown away.

    Raises:
      PeerError: if it cannot be installed, or stops before it has answered.
    """
    with contextlib.ExitStack() as stack:
        home = environments or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trpo_jax_peer_")))
        python = _install(peer, home / peer.name)
        log = stack.enter_context(tempfile.TemporaryFile("w+"))
        # Its own packages alone: nothing of ours may leak into its path.
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        worker = stack.enter_context(
            subprocess.Popen(
                [python, str(Path(__file__).parent / "workers" / peer.worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=variables,
            )
        )
        stack.callback(worker.kill)

        def ask(do: str, **request: Any) -> dict[str, Any]:
            assert worker.stdin and worker.stdout
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps({"do": do, **request}), file=worker.stdin, flush=True)
            for line in worker.stdout:
                if line.startswith("{"):
                    return json.loads(line)
            log.seek(0)
            raise PeerError(f"{peer.name} stopped: {_last_line(log.read())}")

        yield ask


def _install(peer: Peer, folder: Path) -> str:
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done = folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        for arguments in peer.requirements:
            command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise PeerError(f"{peer.name} could not be installed: {_last_line(result.stderr)}")
        done.touch()
    return str(python)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it left no message"


def compare(
    name: str,
    config: Config,
    repetitions: int,
    *,
    num_agents: int = 1,
    threshold: float | None = None,
    seeds: range = range(16),
    max_steps: int = 500_000,
    environments: Path | None = None,
) -> dict[str, Any]:
    """Measure a peer in turn with us: the same environment, networks (64-64 tanh), envs x steps and batch.

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
    if name not in PEERS:
        raise UsageError(f"there is no peer {name!r}; choose among {', '.join(PEERS)}.")
    try:
        with running(PEERS[name], environments) as ask:
            result = _compare_speed(ask, config, repetitions, about=ask("prepare", iterations=5, **settings_of(config)))
            if name == "sb3-contrib":
                result["own_shape"] = _compare_own_shape(ask, config, repetitions)
                result["policy_update"] = _compare_policy_update(ask, config, repetitions)
            if name == "rejax" and num_agents > 1:
                result["many_agents"] = _compare_many(ask, config, num_agents, repetitions)
            if name == "rejax" and threshold is not None:
                result["time_to_threshold"] = _compare_learning(ask, config.env, threshold, seeds, max_steps)
            return result
    except PeerError as error:
        return {"error": f"{error}"}


def _compare_speed(ask: Ask, config: Config, repetitions: int, about: dict[str, Any]) -> dict[str, Any]:
    """Iterations in turn; the peer has been prepared."""
    trainer = Trainer(config)
    ours, theirs = [], []
    for _ in range(repetitions):
        ours.append(trainer.run())
        theirs.append(ask("run")["seconds"])
    return {"about": about, **_speeds(config.steps_per_iteration, ours, theirs)}


def _speeds(env_steps: int, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    return {
        "ours_env_steps_per_second": summary(env_steps / np.array(ours)),
        "theirs_env_steps_per_second": summary(env_steps / np.array(theirs)),
        "speed_ratio": float(np.median(theirs) / np.median(ours)),
    }


def _compare_own_shape(ask: Ask, config: Config, repetitions: int) -> dict[str, Any]:
    """sb3-contrib's TRPO on the one environment it is published with, ours on the same batch in our default shape."""
    default = Config(env=config.env)
    ours = config.replace(num_envs=default.num_envs, num_steps=default.num_steps)
    batch = ours.steps_per_iteration
    about = ask("prepare", **{**settings_of(ours), "num_envs": 1, "num_steps": batch})
    shapes = {"shape": f"1 x {batch}", "our_shape": f"{ours.num_envs} x {ours.num_steps}"}
    return {**shapes, **_compare_speed(ask, ours, repetitions, about)}


def _compare_policy_update(ask: Ask, config: Config, repetitions: int) -> dict[str, Any]:
    """A policy update alone on 65,536 samples, each side at its own settings."""
    samples = 65_536
    theirs = ask("policy update", env=config.env, samples=samples, repetitions=repetitions)
    ours = measure_policy_update(config, samples, repetitions)["configured_ms"]
    theirs_ms = summary(1e3 * np.array(theirs.pop("seconds")))
    ratio = theirs_ms["median"] / ours["median"]
    return {"samples": samples, "ours_ms": ours, "theirs_ms": theirs_ms, "ratio": ratio, "their_settings": theirs}


def _compare_many(ask: Ask, config: Config, num_agents: int, repetitions: int) -> dict[str, Any]:
    """K agents in one program on either side."""
    ask("prepare", iterations=1, num_agents=num_agents, **settings_of(config))
    agents = Agents(config, num_agents)
    ours, theirs = [], []
    for _ in range(repetitions):
        ours.append(agents.run())
        theirs.append(ask("run")["seconds"] / num_agents)
    return {"num_agents": num_agents, **_speeds(config.steps_per_iteration, ours, theirs)}


def _compare_learning(ask: Ask, env: str, threshold: float, seeds: range, max_steps: int) -> dict[str, Any]:
    """Training to a return, seed by seed in turn: we at `Config`'s defaults, the peer at its published settings."""
    default = Config(env=env)
    about = ask(
        "prepare threshold",
        env=env,
        threshold=threshold,
        max_steps=max_steps,
        judge_every=default.steps_per_iteration,
    )
    learner = TimeToThreshold(default, threshold, max_steps)
    ours, theirs = [], []
    for seed in seeds:
        ours.append(learner.run(seed))
        theirs.append(ask("train to threshold", seed=seed))
    both = {"ours": threshold_summary(ours), "theirs": threshold_summary(theirs)}
    ratios = {f"{key}_ratio": both["ours"][key] / both["theirs"][key] for key in ("seconds", "env_steps")}
    return {"threshold": threshold, "about": about, **both, **ratios}
