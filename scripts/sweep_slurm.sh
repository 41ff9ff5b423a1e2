#!/usr/bin/env bash
# A sweep on several nodes of a SLURM cluster: one process per node, which finds its devices itself.
#
#   sbatch scripts/sweep_slurm.sh experiments/trust_region_plateau/trpo.toml sweeps/plateau
#
# All nodes must see the folder. Submit the job again after a time limit to continue.
#SBATCH --job-name=trpo-jax-sweep
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail

# The command reads SLURM_PROCID and SLURM_NTASKS; the address of process 0 comes from the node list.
exec srun trpo-jax sweep "$1" --output "$2"
