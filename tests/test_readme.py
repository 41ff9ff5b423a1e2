"""What the README says is true: its code runs, and so do its commands."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

from trpo_jax.cli import main
from trpo_jax.sweeps.grids import make_points, make_spec

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TOML_BLOCKS = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line
]


@pytest.mark.long
@pytest.mark.parametrize("index", range(len(PYTHON_BLOCKS)))
def test_python_block_runs(index, tmp_path, capsys):
    script = tmp_path / "block.py"
    script.write_text(PYTHON_BLOCKS[index])
    runpy.run_path(str(script))
    assert capsys.readouterr().out


def test_sweep_file_means_what_it_says():
    (text,) = TOML_BLOCKS
    points = make_points(make_spec(tomllib.loads(text)))
    assert len(points) == 3 * 2 and {point.config.env for point in points} == {"CartPole-v1"}


def smaller_sweep():
    """The README's sweep with the first value of each list and short runs."""
    table = tomllib.loads(TOML_BLOCKS[0])
    lines = ["num_seeds = 2", "num_episodes = 1", "[base]", "num_envs = 2", "num_steps = 64", "num_iterations = 2"]
    for section in ("grid",):
        lines += [f"[{section}]", *(f"{n} = {v[:1]}" for n, v in table[section].items() if n != "total_steps")]
    return "\n".join(lines)


SPACE = """
num_episodes = 1
[base]
num_envs = 2
num_steps = 32
num_iterations = 4
[random]
count = 3
max_kl = { log_uniform = [0.001, 0.1] }
"""


# Given after README's own flags, these count: nothing is trained for long.
SHORTER = {"--total-steps": "4096", "--eval-every": "1", "--num-trials": "4", "--num-iterations": "5"}


@pytest.mark.long
def test_commands_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.toml").write_text(smaller_sweep())
    (tmp_path / "space.toml").write_text(SPACE)
    commands = [line.split("#")[0].split()[1:] for line in COMMANDS if line.startswith("trpo-jax ")]
    assert len(commands) >= 4
    for arguments in commands:
        shorter = [text for flag, value in SHORTER.items() if flag in arguments for text in (flag, value)]
        status, printed = main([*arguments, *shorter]), capsys.readouterr()
        assert status == 0, (arguments, printed.err)
        assert printed.out


def test_first_two_commands_install():
    first, second = (line for line in COMMANDS if "pip install" in line)
    assert first.endswith("trpo-jax train") and second.endswith("-m pytest")
    # CI runs the very test command of the README.
    install, test = second.split(" && ")[1:]
    ci = (ROOT / ".ci" / "run").read_text()
    assert test in ci
    assert install.split()[-1] in ci
