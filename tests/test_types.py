"""What a type checker says of a user's code: `types_of_users.py`, whose marked lines are wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import trpo_jax

FILE = Path(__file__).with_name("types_of_users.py")


def test_the_package_says_that_it_is_typed():
    assert (Path(trpo_jax.__file__).parent / "py.typed").is_file()


@pytest.mark.long  # mypy reads the whole package and JAX, in a process of its own
def test_a_type_checker_finds_what_is_wrong_in_a_users_code_and_nothing_else(tmp_path):
    command = ["-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", f"--cache-dir={tmp_path}", FILE]
    package = Path(trpo_jax.__file__).parent.parent
    result = subprocess.run([sys.executable, *command], cwd=package, capture_output=True, text=True)
    assert not result.stderr
    found = {}
    for line, code in re.findall(rf"{FILE.name}:(\d+): error: .*\[([\w-]+)\]$", result.stdout, re.MULTILINE):
        found.setdefault(int(line), []).append(code)
    expected = {
        number: line.partition("# error: ")[2].split(", ")
        for number, line in enumerate(FILE.read_text().splitlines(), start=1)
        if "# error: " in line
    }
    assert found == expected, result.stdout
