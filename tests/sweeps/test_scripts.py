"""The example scripts for several hosts, tried on loopback and with SLURM's part played."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_several_hosts_on_loopback(spec_file, tmp_path):
    file = spec_file()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = tmp_path / "trpo-jax"
    command.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m trpo_jax.cli "$@" --agents-per-device 3 --num-devices 1\n'
    )
    command.chmod(0o755)
    result = subprocess.run(
        [SCRIPTS / "sweep_hosts.sh", file, tmp_path / "out", "localhost", "localhost"],
        env={**os.environ, "PORT": str(port), "TRPO_JAX": str(command)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr
    assert "process 0 of 2" in result.stdout and "process 1 of 2" in result.stdout
    assert parquet.ParquetDataset(tmp_path / "out" / "results").read().num_rows == 12


def test_slurm_job_runs_one_process_a_task(tmp_path):
    # `srun` is played: it shows what would run on each node.
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    script = SCRIPTS / "sweep_slurm.sh"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", script, "s.toml", "out"], env=environment, capture_output=True, text=True, timeout=20
    )
    assert result.stdout == "trpo-jax sweep s.toml --output out\n", result.stderr
    assert "#SBATCH --ntasks-per-node=1" in script.read_text()
