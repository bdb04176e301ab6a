#!/bin/sh
#SBATCH --job-name=tokenflow
#SBATCH --nodes=2                  # one Ray cluster over these nodes, each for this job alone
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=4          # one job of the batch on each
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@120          # two minutes before that time is up the batch is interrupted,
#SBATCH --requeue                  # and put into the queue again: it resumes
#SBATCH --open-mode=append
#SBATCH --output=tokenflow-%j.log
#
# An example: sbatch scripts/slurm_davis.sh configs/davis.yaml
#
# Run it from the repository's root, with the environment active. All nodes must see the repository,
# latents_path and output_path at the same paths.
set -u
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$head:$((20000 + SLURM_JOB_ID % 10000))
RAY_AUTH_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n') # others on the network have no access
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
srun ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --disable-usage-stats -- env RAY_ADDRESS="$address" sh scripts/run_davis.sh "$@"
status=$?
if [ "$status" -eq 143 ]; then # 128 + SIGTERM
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
