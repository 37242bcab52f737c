"""What the benchmarks share: workers, the machine's description, statistics."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from models import Model

__all__ = [
    "Worker",
    "WorkerError",
    "machine",
    "quartiles",
    "start",
]

_WORKERS = Path(__file__).parent / "workers"
_REPOSITORY = Path(__file__).parents[1]
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(RuntimeError):
    """A worker could not do what it was asked for, or died."""


class Worker:
    """A process that holds one model; see ``workers/protocol.py``.

    Parameters
    ----------
    python
        Interpreter of the environment that it runs in.
    script
        Name of the worker's file.
    threads
        For all that it computes.
    log
        Where its messages go; by default with those of this process.
    folder
        Where it works.
    """

    def __init__(
        self,
        python: str | Path,
        script: str,
        *,
        threads: int,
        log: Path | None = None,
        folder: Path | None = None,
    ) -> None:
        self.name = script
        paths = [str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]
        self._log = None if log is None else log.open("a")
        self._process = subprocess.Popen(
            [str(python), "-W", "ignore", str(_WORKERS / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=folder,
            env={
                **os.environ,
                **dict.fromkeys(_THREADS, str(threads)),
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
        )
        self.ask("threads", n=threads)

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send a request and return its answer.

        Raises
        ------
        WorkerError
            If the worker reports an error, or has died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise WorkerError(f"{self.name} ended amid {do!r} (exit code {code})")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}, {do}: {answer['error']}")
        return answer["ok"]

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):
            self._process.communicate()
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> Worker:
        """Return this worker."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process, at once after an error."""
        if error is not None:
            self._process.kill()
        self.close()


def start(
    model: Model,
    mace_python: str | Path | None,
    *,
    threads: int,
    log: Path | None = None,
    folder: Path | None = None,
) -> Worker:
    """Start the worker that a model needs.

    Raises
    ------
    ValueError
        If it is one of MACE and there is no environment for it.
    """
    if model.package == "orbcalc":
        python, script = sys.executable, "orbcalc_worker.py"
    elif mace_python is None:
        raise ValueError(f"{model.name} needs --mace-python: see benchmarks/README.md")
    else:
        python, script = str(mace_python), "mace_worker.py"
    return Worker(python, script, threads=threads, log=log, folder=folder)


def machine(threads: int) -> dict[str, Any]:
    """Describe this machine and how busy it is."""
    name = platform.processor()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(terse=True),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median and what lies a quarter from each end."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}
