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

from trpo_jax.benchmarks.measure import TimeToThreshold, Trainer, settings_of, summary, threshold_summary
from trpo_jax.config import UsageError
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
            return _compare(name, ask, config, repetitions, threshold, seeds, max_steps)
    except PeerError as error:
        return {"error": f"{error}"}


def _own_shape(ask: Ask, config: Config, repetitions: int) -> dict[str, Any]:
    """sb3-contrib's TRPO on the one environment it is published with, and ours on the same batch in our default shape."""
    default = Config(env=config.env)
    ours_config = config.replace(num_envs=default.num_envs, num_steps=default.num_steps)
    batch = ours_config.steps_per_iteration
    ask("prepare", **{**settings_of(ours_config), "num_envs": 1, "num_steps": batch})
    trainer = Trainer(ours_config)
    ours, theirs = [], []
    for _ in range(repetitions):
        ours.append(trainer.run())
        theirs.append(ask("run")["seconds"])
    return {
        "shape": f"1 x {batch}",
        "our_shape": f"{ours_config.num_envs} x {ours_config.num_steps}",
        "ours_env_steps_per_second": summary(batch / np.array(ours)),
        "theirs_env_steps_per_second": summary(batch / np.array(theirs)),
        "speed_ratio": float(np.median(theirs) / np.median(ours)),
    }


def _compare(
    name: str, ask: Ask, config: Config, repetitions: int, threshold: float | None, seeds: range, max_steps: int
) -> dict[str, Any]:
    about = ask("prepare", iterations=5, **settings_of(config))
    trainer = Trainer(config)
    ours, theirs = [], []
    for _ in range(repetitions):
        ours.append(trainer.run())
        theirs.append(ask("run")["seconds"])
    steps = config.steps_per_iteration
    result: dict[str, Any] = {
        "about": about,
        "ours_env_steps_per_second": summary(steps / np.array(ours)),
        "theirs_env_steps_per_second": summary(steps / np.array(theirs)),
        "speed_ratio": float(np.median(theirs) / np.median(ours)),
    }
    if name == "sb3-contrib":
        result["own_shape"] = _own_shape(ask, config, repetitions)
    if threshold is not None and name == "rejax":
        default = Config(env=config.env)
        request = {"env": config.env, "threshold": threshold, "max_steps": max_steps}
        ask("prepare threshold", judge_every=default.steps_per_iteration, **request)
        learner = TimeToThreshold(default, threshold, max_steps)
        sides: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        for seed in seeds:
            sides["ours"].append(learner.run(seed))
            sides["theirs"].append(ask("train to threshold", seed=seed))
        ours_summary, theirs_summary = (threshold_summary(side) for side in sides.values())
        result["time_to_threshold"] = {
            "threshold": threshold,
            "ours": ours_summary,
            "theirs": theirs_summary,
            "seconds_ratio": ours_summary["seconds"] / theirs_summary["seconds"],
            "env_steps_ratio": ours_summary["env_steps"] / theirs_summary["env_steps"],
        }
    return result
