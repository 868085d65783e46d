#!/bin/bash
# A sweep as a job of Slurm:  sbatch [options of sbatch] sweeps/clusters/slurm.sh [flags of init_sweep.py]
# Call it in the checkout, with its Python environment active. Options of sbatch count for more than these lines.
#SBATCH --job-name=gpt-sweeps
#SBATCH --nodes=1                # trials run on all nodes of the job
#SBATCH --cpus-per-task=4        # cores of each node; a trial takes one
#SBATCH --time=4:00:00
##SBATCH --gpus-per-node=1       # to use GPUs, remove one #
##SBATCH --mem=16G               # memory of each node; 2 GB of the first are for the sweep itself
#SBATCH --output=gpt-sweeps-%j.out
# Leave the others as they are.
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120      # two minutes before the time limit, the sweep saves and stops,
#SBATCH --requeue                # and the job waits for its next turn, in which it goes on
#SBATCH --open-mode=append       # in the same file of output
#SBATCH --no-kill                # if a node fails, its trials go on elsewhere

python -c 'from importlib.util import find_spec as f; exit(not (f("ray") and f("sweeps")))' 2>/dev/null || {
    echo "error: ${SLURMD_NODENAME:-this machine} has no python with this project: before sbatch, activate its" \
        "environment, which has to be in a folder that all nodes share" >&2
    exit 2
}
exec python -m sweeps.clusters.slurm "$@"
