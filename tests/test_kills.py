"""Kills without number, at any time and in the middle of a write: the final files are those of a process left alone."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

# Imports everything once; each job is forked from here, before anything touches a device, and may be told to die.
SERVER = r'''
import json, os, signal, sys
import matplotlib.backends.backend_agg, matplotlib.figure, optuna, pyarrow.parquet
import trpo_jax.cli.displays, trpo_jax.runs.learning_curve, trpo_jax.runs.sinks
import trpo_jax.sweeps.in_folder, trpo_jax.sweeps.pages, trpo_jax.sweeps.search, trpo_jax.sweeps.studies
from trpo_jax import cli, files

def arm(kill):
    """Die at the n-th moment around a call that changes a file, in its middle if it writes, or some time after."""
    seen = 0

    def moment():
        nonlocal seen
        seen += 1
        if seen == 1 and "seconds" in kill:
            signal.setitimer(signal.ITIMER_REAL, kill["seconds"])  # nobody handles it
        return seen == kill.get("moment")

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(real):
        def call(*arguments, **options):
            if moment():
                die()
            result = real(*arguments, **options)
            if moment():
                die()
            return result
        return call

    for name in ("fsync", "replace", "link", "unlink", "ftruncate"):
        setattr(os, name, watch(getattr(os, name)))

    class Watched:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if moment():
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                die()
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    files.open = lambda *arguments, **options: Watched(open(*arguments, **options))

for line in sys.stdin:
    children = []
    for arguments, kill in json.loads(line):
        child = os.fork()
        if not child:
            log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            if kill:
                arm(kill)
            status = cli.main(arguments)
            sys.stdout.flush()
            os._exit(status)
        children.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
'''

SWEEP = """
keep = "best"
num_seeds = 2
num_episodes = 2
[base]
num_envs = 2
num_steps = 8
num_iterations = 60
cg_iterations = 2
[grid]
max_kl = [0.003, 0.01]
"""
SPACE = """
num_seeds = 1
[base]
num_envs = 2
num_steps = 8
num_iterations = 8
cg_iterations = 2
[random]
count = 4
max_kl = { log_uniform = [0.003, 0.1] }
"""
SIZE = ["--num-envs", "2", "--num-steps", "8", "--cg-iterations", "2"]
TRAIN = ["train", *SIZE, "--num-iterations", "400", "--num-seeds", "2", "--output"]
BLOCKS = ["--agents-per-device", "1", "--num-devices", "1", "--checkpoint-seconds", "0"]
TUNE = ["tune", "space.toml", "--batch", "2", "--output"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Run jobs, each a command line and how it dies or None, at the same time; their exit statuses."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "sweep.toml").write_text(SWEEP)
    (folder / "space.toml").write_text(SPACE)
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
    )

    def run(*jobs):
        print(json.dumps(jobs), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    run.folder = folder
    yield run
    server.stdin.close()
    server.wait(60)
    server.stdout.close()


def sweep(out, *more):
    return ["sweep", "sweep.toml", "--output", out, *BLOCKS, *more]


def shared(out):
    return [sweep(out, "--num-processes", "2", "--process-id", i) for i in "01"]


SCENARIOS = {  # kills; the commands that run at once; the one that is run at the end
    "train": (70, lambda out: [[*TRAIN, out]], None),
    "sweep": (60, lambda out: [sweep(out)], None),
    "shared": (40, shared, lambda out: ["report", out]),
    "tune": (20, lambda out: [[*TUNE, out]], None),
    "report": (30, lambda out: [["report", out]], None),
}


def contents(folder, skip=()):
    """Every file below a folder, hidden ones too, by its path."""
    files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if not name.endswith(tuple(skip))}


@pytest.fixture(scope="module")
def references(work):
    """What commands leave that nobody kills."""
    commands = {"train": [*TRAIN, "ref/train"], "sweep": sweep("ref/sweep"), "tune": [*TUNE, "ref/tune"]}
    for command in commands.values():
        assert work((command, None)) == [0], (work.folder / "log").read_text()
    return {name: work.folder / "ref" / name for name in commands}


def final(name, folder):
    """What must not depend on kills: everything, but the state before the last one and a database's own bytes."""
    found = contents(folder, skip=[".db"])
    states = sorted(file for file in found if file.startswith("checkpoints/"))
    if name == "train":
        assert len(states) == 2
        del found[states[0]]
    page = found.pop("report.html", b"").decode()
    return {**found, "page": page.replace(f"<title>{folder.name}<", "<title><").replace(f"<h1>{folder.name}<", "<h1><")}


@pytest.mark.parametrize("name", SCENARIOS)
def test_kills_leave_no_mark(work, references, name):
    number, commands, last = SCENARIOS[name]
    reference = final(name, references[{"shared": "sweep", "report": "sweep"}.get(name, name)])
    rng, killed, folders, most = random.Random(name), 0, 0, {"report": 30}.get(name, 400)
    while killed < number:
        folders += 1
        out = f"{name}{folders}"
        if name == "report":
            shutil.copytree(references["sweep"], work.folder / out)
            for file in contents(work.folder / out):
                if "/" not in file and file != "sweep.json":
                    (work.folder / out / file).unlink()
        for _ in range(8):
            deaths = [
                {"moment": rng.randint(1, most)} if rng.random() < 0.6 else {"seconds": rng.uniform(0.01, 0.8)}
                for _ in commands(out)
            ]
            statuses = work(*zip(commands(out), deaths, strict=True))
            assert set(statuses) <= {0, -9, -14}, (work.folder / "log").read_text()[-3000:]
            killed += sum(status < 0 for status in statuses)
            if not any(statuses):
                break
        for command in [*commands(out), *([last(out)] if last else [])]:
            assert work((command, None)) == [0], (work.folder / "log").read_text()[-3000:]
        found = final(name, work.folder / out)
        assert found.keys() == reference.keys()
        for file in found:
            assert found[file] == reference[file], file
        shutil.rmtree(work.folder / out)
    print(f"{name}: {killed} kills in {folders} folders")
