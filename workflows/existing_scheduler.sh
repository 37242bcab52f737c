#!/usr/bin/env bash
# A Dask scheduler that runs already, anywhere.
#
#   bash workflows/existing_scheduler.sh config.yaml tcp://10.0.0.1:8786
#
# To start one, and to add workers from any machine that reaches it:
#
#   dask scheduler --port 8786
#   dask worker tcp://10.0.0.1:8786 --resources LABEL=1 --nthreads 1 --nworkers 16
#   CUDA_VISIBLE_DEVICES=0 dask worker tcp://10.0.0.1:8786 --resources MODEL=1 --nthreads 1
#
# Workers may come and go while the run goes on. The scheduler is left running at the end.
set -euo pipefail

orbcalc run "${1:?give a configuration file}" --dask "${2:?give the address of the scheduler}"
