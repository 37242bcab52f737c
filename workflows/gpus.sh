#!/usr/bin/env bash
# One machine with several GPUs: one model worker pinned to each, label workers on the CPU cores.
# `orbcalc run` alone would share the GPUs out as well; here you choose them, and the workers.
#
#   GPUS="0 1 2 3" LABEL_WORKERS=32 bash workflows/gpus.sh config.yaml
set -euo pipefail
config=${1:?give a configuration file}

port=${PORT:-8786}
gpus=${GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader)}
n_gpus=$(wc -w <<<"$gpus")
# Each model worker keeps one core busy as well.
label_workers=${LABEL_WORKERS:-$(($(nproc) > n_gpus ? $(nproc) - n_gpus : 1))}
address=tcp://127.0.0.1:$port

dask scheduler --host 127.0.0.1 --port "$port" --no-dashboard &
scheduler=$!
workers=()
stop() {
    kill "${workers[@]}" && wait "${workers[@]}"
    kill "$scheduler" && wait "$scheduler"
} 2>/dev/null
trap 'stop || true' EXIT

for gpu in $gpus; do
    CUDA_VISIBLE_DEVICES=$gpu dask worker "$address" --name "model-$gpu" \
        --resources MODEL=1 --nthreads 1 --memory-limit 0 --no-dashboard &
    workers+=($!)
done
CUDA_VISIBLE_DEVICES='' dask worker "$address" --nworkers "$label_workers" \
    --resources LABEL=1 --nthreads 1 --memory-limit 0 --no-dashboard &
workers+=($!)

orbcalc run "$config" --dask "$address"
