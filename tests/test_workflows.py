"""The scripts of workflows/ are valid and start workers with the right resources."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKFLOWS = Path(__file__).parent.parent / "workflows"


@pytest.mark.parametrize("script", sorted(WORKFLOWS.glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("system", "directives"),
    [
        ("slurm", ["#SBATCH -p cpu", "#SBATCH -A chemistry", "#SBATCH -t 04:00:00"]),
        ("pbs", ["#PBS -q cpu", "#PBS -A chemistry", "#PBS -l walltime=04:00:00"]),
    ],
)
def test_label_jobs_end_before_their_walltime(system: str, directives: list[str]) -> None:
    command = [sys.executable, WORKFLOWS / "jobqueue.py", system, "config.yaml", "--print-job"]
    command += ["--cores", "16", "--queue", "cpu", "--account", "chemistry", "--minutes", "240"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in directives:
        assert line in done.stdout.splitlines()
    for option in (
        "--nthreads 1",
        "--nworkers 16",
        "--resources LABEL=1",
        "--lifetime 200m",
        "--lifetime-stagger 20m",
    ):
        assert option in done.stdout
