#!/usr/bin/env bash
# A sweep on several nodes of a SLURM cluster: one process a node, its devices found by itself.
#
#   sbatch scripts/sweep_slurm.sh experiments/trust_region_plateau/sweep.toml sweeps/plateau
#
# The folder must be one that all nodes see. Submit it again after a time limit: it continues.
#SBATCH --job-name=trpo-jax-sweep
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail

# SLURM_PROCID and SLURM_NTASKS are what the command looks for; process 0's address comes from the node list.
exec srun trpo-jax sweep "$1" --output "$2"
