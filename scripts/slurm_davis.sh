#!/bin/sh
#SBATCH --job-name=tokenflow
#SBATCH --array=0-3                # four tasks, which share the batch out among themselves
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=48G
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@120          # two minutes before that time is up: what is at work is saved,
#SBATCH --requeue                  # and the task is put into the queue again
#SBATCH --open-mode=append
#SBATCH --output=tokenflow-%A_%a.log
#
# An example: sbatch scripts/slurm_davis.sh configs/davis.yaml
#
# Run it from the repository's root, with the environment active. Every task runs the same command.
# They take jobs by locks on files below latents_path and output_path, which all nodes must see and
# whose file system must have flock(2) across nodes (NFS 4, GPFS; Lustre mounted with -o flock).
set -u
srun sh scripts/run_davis.sh "$@" --run "slurm-$SLURM_ARRAY_JOB_ID"
status=$?
if [ "$status" -eq 143 ]; then # 128 + SIGTERM
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$status"
