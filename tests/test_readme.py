"""What the README says is true: its code runs, its commands exist, its tables are complete."""

import dataclasses
import re
from pathlib import Path

import pytest
from readme_tables import metrics_rows, settings_rows

from trpo_jax import Metrics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line
]


@pytest.mark.parametrize("index", range(len(PYTHON_BLOCKS)))
def test_python_block_runs(index, python, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(PYTHON_BLOCKS[index])
    result = python("-W", "error", str(script), cwd=tmp_path, timeout=240)
    assert result.returncode == 0, result.stderr


def test_commands_run_in_order(python, tmp_path):
    commands = [line.split("#")[0].split()[1:] for line in COMMANDS if line.startswith("trpo-jax ")]
    assert len(commands) >= 4
    for arguments in commands:
        result = python("-m", "trpo_jax.cli", *arguments, cwd=tmp_path, timeout=240)
        assert result.returncode == 0, (arguments, result.stderr)
        assert result.stdout


def test_first_two_commands_install():
    first, second = (line for line in COMMANDS if "pip install" in line)
    assert first.endswith("trpo-jax train") and second.endswith("-m pytest")
    # CI runs the very test command of the README.
    install, test = second.split(" && ")[1:]
    ci = (ROOT / ".ci" / "run").read_text()
    assert test in ci
    assert install.split()[-1] in ci


def test_tables_are_those_of_the_code():
    assert [re.match(r"\| `(\w+)`", row).group(1) for row in metrics_rows()] == [
        f.name for f in dataclasses.fields(Metrics)
    ]
    missing = [row for row in (*settings_rows(), *metrics_rows()) if row not in README]
    assert not missing, "run scripts/readme_tables.py; missing:\n" + "\n".join(missing)
