#!/usr/bin/env bash
# One machine: orbcalc starts label workers (one for each core) and model workers by itself.
# Their numbers are `dask.label_workers` and `dask.model_workers` of the configuration.
#
#   bash workflows/local.sh examples/quickstart/config.yaml
set -euo pipefail

orbcalc run "${1:?give a configuration file}"
