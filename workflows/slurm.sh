#!/usr/bin/env bash
# SLURM: this job is the driver and owns the GPUs, one model worker on each. Label workers are CPU
# jobs that it submits. Edit the partitions and accounts, then
#
#   sbatch workflows/slurm.sh config.yaml
#
# A driver that reached its time limit is submitted again, and resumes.
#SBATCH --job-name=orbcalc
#SBATCH --partition=gpu
#SBATCH --gres=gpu:2
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=24:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

python workflows/jobqueue.py slurm "${1:?give a configuration file}" \
    --jobs 8 --cores 16 --memory 32GB --minutes 240 --queue cpu
