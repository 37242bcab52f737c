#!/usr/bin/env bash
# PBS: this job is the driver and owns the GPUs, one model worker on each. Label workers are CPU
# jobs that it submits. Edit the queues, then
#
#   qsub -v CONFIG=config.yaml workflows/pbs.sh
#
# A driver that reached its time limit is submitted again, and resumes.
#PBS -N orbcalc
#PBS -q gpu
#PBS -l select=1:ncpus=4:ngpus=2:mem=32gb
#PBS -l walltime=24:00:00
set -euo pipefail
cd "${PBS_O_WORKDIR:-.}"

python workflows/jobqueue.py pbs "${CONFIG:?give a configuration file}" \
    --jobs 8 --cores 16 --memory 32GB --minutes 240 --queue cpu
