"""Whatever is given, as settings, on the command line or in files: it trains, or one sentence says why it cannot.

Each case is drawn from a seed, so that a failure can be repeated: its message holds the case. What is valid is small.
"""

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trpo_jax import Config, UsageError, train
from trpo_jax.cli import main
from trpo_jax.cli.arguments import make_parser
from trpo_jax.sentences import shown
from trpo_jax.training.agents import make_agent

FIELDS = {field.name: field for field in dataclasses.fields(Config) if field.metadata["flag"]}
SIZES = {name for name, field in FIELDS.items() if field.metadata["kind"] == "int"}
TINY = {"num_envs": 2, "num_steps": 4, "num_iterations": 1, "cg_iterations": 1, "value_cg_iterations": 1}
TINY |= {"line_search_steps": 2, "policy_epochs": 1, "policy_minibatches": 2, "value_epochs": 1, "value_minibatches": 2}
# Beyond these the sentence may say what Python's or TOML's reader says of the text.
NUMBERS = [0, -1, 1, 2, 0.5, 1.5, 2**31, 2**32 + 7, 2**63, 10**400, 1e20, 1e39, -1e39, 1e-46, 1e300, 0.99999999999]
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]
OTHERS = [True, False, "x", "", "1", "nan", "ü\n\t", "[/b]", "a" * 300, [], [0.5], [[1]], {}, {"a": 1}]
OBJECTS = [None, b"x", 1j, object(), np.bool_(True), np.float64(0.5), np.int64(2), np.array([0.5, np.nan]), 10**5000]
OBJECTS += [np.array([]), np.array("x"), jnp.float32(0.5), jnp.array([0.1, 2.0]), jnp.bfloat16(0.5), lambda: 0]
PATHS = ["a" * 300, "x\0y", "canary", "canary/below", "/dev/null/x", "", ".", "/proc/nowhere", "[/b]", "ü", "missing"]
SECONDS = 280  # after which a case counts as hanging


class Draws(random.Random):
    """A seeded generator; half of the cases are mild."""

    def __init__(self, seed):
        super().__init__(seed)
        self.share = 0.02 if self.random() < 0.5 else 0.5

    def is_hell(self):
        return self.random() < self.share


def draw(rng, name, values):
    """A value for a setting, good or from hell."""
    field = FIELDS[name]
    if rng.is_hell():
        return rng.choice(values)
    if field.metadata["kind"] == "bool":
        return rng.random() < 0.5
    if field.metadata["kind"] == "str":
        return rng.choice(field.metadata.get("choices", ["auto", "camera", "stack_frames=2"]))
    if field.metadata["kind"] == "widths":
        return rng.choice([[8], [4, 4], [], "8,4"])
    return rng.choice([1, 2, 4]) if name in SIZES else rng.choice([field.default, 0.5, 0.01, 1])


def draw_settings(rng, values, most=3):
    names = rng.sample(sorted(FIELDS), rng.randint(0, most))
    return {name: draw(rng, name, values) for name in names}


@contextlib.contextmanager
def time_limit():
    def stop(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_a_sentence(text):
    return "\n" not in text and text[-1:] in (".", "?") and "Traceback" not in text and len(text) < 1000


def snapshot(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def run(case, arguments, folder, *, keeps):
    """Run the command line in a folder: status 0, or 2 and one sentence (or 1: not all that was computed is finite).

    `keeps` are files that must be as they were if the command refuses; `canary` must be so in any case.
    """
    (folder / "canary").write_text("precious")
    before = {file: data for file, data in snapshot(folder).items() if file in keeps}
    out, errors, environment = io.StringIO(), io.StringIO(), dict(os.environ)
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
            time_limit(),
        ):
            status = main([str(argument) for argument in arguments])
    except BaseException as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    finally:
        os.environ.clear()
        os.environ.update(environment)
    said = [line for line in errors.getvalue().splitlines() if not line.startswith("trpo-jax: note: ")]
    assert (folder / "canary").read_text() == "precious", case
    assert status in (0, 2) or (status == 1 and "not finite" in said[-1]), (case, status, said)
    if status == 2:
        assert said and said[-1].startswith("trpo-jax: ") and all(map(is_a_sentence, said)), (case, said)
        assert {file: data for file, data in snapshot(folder).items() if file in keeps} == before, case
    return status != 2


# Settings


def check_configuration(rng, at):
    settings = {**TINY, **draw_settings(rng, NUMBERS + NOT_FINITE + OTHERS + OBJECTS)}
    if rng.is_hell() and rng.random() < 0.2:
        settings[rng.choice(["policy", "value", "env"])] = rng.choice(OTHERS + OBJECTS[1:])
    if rng.random() < 0.3:
        settings["env_args"] = {"gravity": rng.choice([*NUMBERS, *OTHERS, *OBJECTS]) if rng.is_hell() else 20.0}
    try:
        with time_limit():
            config = Config(**settings)
            make_agent(config)
            if any(getattr(value, "ndim", 0) for value in settings.values()):
                return True  # for `vmap`
            jax.eval_shape(train, config, jax.random.key(0))
            return True
    except UsageError as error:
        named = any(name in str(error) for name in (*settings, "gravity"))
        assert is_a_sentence(str(error)) and named, (settings, str(error))
        return False
    except BaseException as error:
        given = {name: shown(value) for name, value in settings.items()}
        raise AssertionError(f"{given}: {type(error).__name__}: {error}") from error


# The command line


def flags(settings):
    given = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if FIELDS[name].metadata["kind"] == "bool":
            given.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            given.append(f"{flag}={value}")
    return given


def check_command_line(rng, at):
    values = [*NUMBERS, *NOT_FINITE, *OTHERS, "9" * 5000, "1_0", "0x10", "1e", "٣", "\ud800"]
    on_folders = ["evaluate", "resume", "play", "export", "report", "compare"]
    command = rng.choice(["train", "train", "train", *on_folders, "sweep", "tune"])
    command = rng.choice([command] * 9 + ["benchmark"])
    arguments = [command]
    if command in ("train", "benchmark"):
        effective = {
            name: value for name, value in TINY.items() if not name.startswith(("policy", "value_e", "value_m"))
        }
        chosen = draw_settings(rng, values)
        arguments += flags({name: value for name, value in effective.items() if name not in chosen} | chosen)
        arguments += rng.choice(
            [[], [], ["CartPole-v1"], [rng.choice(["CartPol-v1", "x/y", "", ":", "gymnasium/a:b"])]]
        )
    else:
        own = {"sweep": "sweep.toml", "tune": "sweep.toml", "report": "sweeps"}.get(command, "run")
        arguments.append(rng.choice([*PATHS, "run", "sweep.toml"]) if rng.is_hell() else own)
        arguments += ["sweeps"] * (command == "compare")
    known = vars(make_parser().parse_args([command] if command in ("train", "benchmark") else [command, "x"]))
    others = sorted(
        known.keys() - FIELDS.keys() - {"env", "path", "paths", "file", "command", "log", "compare", "coordinator"}
    )
    for name in rng.sample(others, min(len(others), rng.choice([0, 0, 1, 2]))):
        text = rng.choice([*PATHS, *map(str, values)]) if rng.is_hell() else rng.choice(["1", "2"])
        plain = name in ("stochastic", "dry_run", "extend")
        text = f"gravity={text}" if name == "env_arg" else text
        arguments.append(f"--{name.replace('_', '-')}" + ("" if plain else f"={text}"))
    if command == "benchmark":
        arguments.append(f"--repetitions={rng.choice([0, -1, 'x', 10**400])}")  # a good one takes long
    if rng.is_hell() and rng.random() < 0.1:
        arguments.append(rng.choice(["--", "--gama", "-x", "--num-env=3", "x y"]))
    if rng.random() < 0.5 and command in ("evaluate", "play"):
        arguments.append("--num-episodes=1")
    return run(arguments, arguments, at, keeps={at / "sweep.toml"})


# TOML


def to_toml(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {to_toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return json.dumps(value)


def check_toml(rng, at):
    values = NUMBERS + NOT_FINITE + OTHERS
    lines = []

    def settings(wrap=lambda name, value: value, base=()):
        drawn = {**dict(base), **draw_settings(rng, values, 2)}
        if rng.is_hell() and rng.random() < 0.2:
            drawn[rng.choice(["env", "total_steps", "policy", "x", "max_kll"])] = rng.choice(
                [*values, "gymnasium/a:b", 8]
            )
        if rng.random() < 0.2:
            drawn["env.gravity"] = rng.choice(values) if rng.is_hell() else rng.choice([1, 2.5, 20.0])
        drawn = {f'"{name}"' if "." in name else name: value for name, value in drawn.items()}
        lines.extend(f"{name} = {to_toml(wrap(name, value))}" for name, value in drawn.items())

    command = rng.choice(["train"] * 4 + ["sweep"] * 4 + ["tune"])
    if command == "train":
        settings(base=TINY.items())
        arguments = ["train", "--config", "file.toml"]
    else:
        lines += [f"{name} = {to_toml(rng.choice(values))}" for name in rng.sample(NAMES, 2 * rng.is_hell())]
        lines.append("[base]")
        settings(base=TINY.items())
        for section in rng.sample(["grid", "zip"], rng.choice([0, 0, 1])):
            lines.append(f"[{section}]")
            settings(
                lambda name, value: [value, draw(rng, name, values) if name in FIELDS else value][: rng.randint(1, 2)]
            )
        if command == "tune" or rng.random() < 0.3:
            lines += ["[random]", f"count = {to_toml(rng.choice(values if rng.is_hell() else [1, 2]))}"]
            kinds = ["uniform", "log_uniform", "normal"] if rng.is_hell() else ["choice"]
            settings(lambda name, value: {rng.choice(kinds): [value, rng.choice([value, 1, 0.7])]})
        arguments = [
            command,
            "file.toml",
            "--output",
            "out",
            *(["--dry-run"] if rng.random() < 0.2 and command == "sweep" else []),
        ]
    text = "\n".join(lines).encode("utf8", "replace")
    if rng.is_hell() and rng.random() < 0.2:
        text = rng.choice(
            [text[: len(text) // 2], b"\xff" + text, b"a = " + b"[" * 3000, b"a" * 5000, b"", b"x = " + b"9" * 5000]
        )
    (at / "file.toml").write_bytes(text)
    return run((arguments, text.decode("utf8", "replace")), arguments, at, keeps={at / "file.toml"})


NAMES = ["num_seeds", "seed", "num_episodes", "num_seed", "max_kl", "grid"]

# What a run and a sweep left behind


def garble(rng, text):
    """A JSON file with one to three values from hell, or damaged as a whole."""
    values = [*NUMBERS, *NOT_FINITE, *OTHERS, None, "gymnasium/a:b", "Acrobot-v1", 3]
    if rng.random() < 0.15:
        return rng.choice(
            [text[: len(text) // 2], "", "[" * 100_000, "[]", "3", "null", '{"a":' * 50_000, "9" * 5000, "\0" * 9]
        )
    table = json.loads(text)
    if rng.random() < 0.8:
        table.pop("checksum")  # as older versions wrote it: any value may be meant
    for _ in range(rng.randint(1, 3)):
        inner = rng.choice([table, *(value for value in table.values() if isinstance(value, dict))])
        name = rng.choice([*inner, "x", "policy", "made_by"]) if inner else "x"
        if rng.random() < 0.2:
            inner.pop(name, None)
        elif not (name in SIZES and isinstance(inner.get(name), int) and rng.random() < 0.2):
            inner[name] = rng.choice(values)
    return json.dumps(table)


def check_left_behind(rng, at):
    name, commands = rng.choice(
        [
            (
                "run/config.json",
                [["evaluate", "run", "--num-episodes=1"], ["resume", "run"], ["export", "run"], ["play", "run"]],
            ),
            ("sweeps/sweep.json", [["report", "sweeps"], ["sweep", "sweep.toml", "--output", "sweeps"]]),
        ]
    )
    file = at / name
    text = garble(rng, file.read_text())
    file.write_text(text)
    arguments = rng.choice(commands)
    kept = {path for path in snapshot(file.parent) if path.suffix != ".png"}
    return run((arguments, text), arguments, at, keeps=kept)


SWEEP = (
    "num_episodes = 0\n[base]\n"
    + "\n".join(f"{name} = {value}" for name, value in TINY.items())
    + "\n[grid]\ngamma = [0.9, 1]"
)


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory):
    """A folder with a run, a sweep, and the file of the latter."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "sweep.toml").write_text(SWEEP)
    tiny = flags({name: value for name, value in TINY.items() if not name.startswith(("policy", "value_e", "value_m"))})
    assert run("train", ["train", *tiny, "--output", "run"], folder, keeps=())
    assert run("sweep", ["sweep", "sweep.toml", "--output", "sweeps"], folder, keeps=())
    return folder


def check_many(check, first, number, left_behind, tmp_path):
    outcomes = []
    for seed in range(first, first + number):
        at = tmp_path / str(seed)
        shutil.copytree(left_behind, at)
        try:
            outcomes.append(check(Draws(seed), at))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        shutil.rmtree(at)
        if seed % 100 == 99:
            jax.clear_caches()  # a process can hold some fifty programs
    assert True in outcomes and False in outcomes  # both ends are reached


KINDS = [check_configuration, check_command_line, check_toml, check_left_behind]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("check", KINDS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_it_trains_or_one_sentence_says_why_not(check, left_behind, tmp_path):
    number = 24 if check is check_left_behind else 8  # few of what is left behind are of use, and all are quick
    check_many(check, 0, number, left_behind, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("check", KINDS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_it_trains_or_one_sentence_says_why_not_in_2400_cases(check, left_behind, tmp_path):
    check_many(check, 1000, 300 if check is check_toml else 700, left_behind, tmp_path)
