"""Run orbcalc with label workers in jobs of a batch system and model workers beside this script.

python workflows/jobqueue.py slurm config.yaml --jobs 8 --cores 16 --print-job
python workflows/jobqueue.py local config.yaml --jobs 1 --cores 2     # a trial without batch system

Label workers leave by themselves before their job's walltime, each at another minute, so that no
label is cut off and not all of them are gone at once; the cluster submits new jobs in their place.
Needs `pip install orbcalc[cluster]`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import dask_jobqueue
from dask_jobqueue.local import LocalCluster

SYSTEMS = {
    "slurm": dask_jobqueue.SLURMCluster,
    "pbs": dask_jobqueue.PBSCluster,
    "local": LocalCluster,
}


def main() -> int:
    """Start the workers, run the loop, stop the workers."""
    args = parse_arguments()
    with label_cluster(args) as cluster:
        if args.print_job:
            print(cluster.job_script())
            return 0
        cluster.adapt(minimum_jobs=args.jobs, maximum_jobs=args.jobs)  # replaces ended jobs
        workers = model_workers(cluster.scheduler_address)
        try:
            command = ["orbcalc", "run", args.config, "--dask", cluster.scheduler_address]
            return subprocess.run(command).returncode
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("config", help="configuration of orbcalc run")
    parser.add_argument("--jobs", type=int, default=4, help="label jobs kept running")
    parser.add_argument("--cores", type=int, default=16, help="label workers in each job")
    parser.add_argument("--memory", default="32GB", help="of each job")
    parser.add_argument("--minutes", type=int, default=240, help="walltime of each job")
    parser.add_argument("--queue", help="queue or partition of the label jobs")
    parser.add_argument("--account", help="account or project of the label jobs")
    parser.add_argument("--interface", help="network interface that the nodes share, such as ib0")
    parser.add_argument("--print-job", action="store_true", help="show a label job and stop")
    return parser.parse_args()


def label_cluster(args: argparse.Namespace) -> dask_jobqueue.core.JobQueueCluster:
    """Describe the label jobs: one worker with one thread for each core."""
    stagger = max(args.minutes // 12, 1)
    lifetime = args.minutes - 2 * stagger  # the last worker leaves one stagger before the end
    if lifetime < 1:
        sys.exit(f"--minutes {args.minutes} is too short for a label job: give at least 4")
    options = {
        "queue": args.queue,
        "walltime": f"{args.minutes // 60:02}:{args.minutes % 60:02}:00",
    }
    options["account" if args.system in ("slurm", "pbs") else "project"] = args.account
    return SYSTEMS[args.system](
        cores=args.cores,
        processes=args.cores,
        memory=args.memory,
        interface=args.interface,
        log_directory=None if args.system == "local" else "jobqueue-logs",
        worker_extra_args=[
            *("--resources", "LABEL=1"),
            *("--lifetime", f"{lifetime}m"),
            *("--lifetime-stagger", f"{stagger}m"),
        ],
        **{key: value for key, value in options.items() if value is not None},
    )


def model_workers(address: str) -> list[subprocess.Popen[bytes]]:
    """Start one model worker for each GPU of this job, or one on the CPU."""
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    command = ["dask", "worker", address, "--resources", "MODEL=1", "--nthreads", "1"]
    command += ["--memory-limit", "0", "--no-dashboard"]
    return [
        subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu})
        for gpu in gpus or [""]
    ]


if __name__ == "__main__":
    sys.exit(main())
