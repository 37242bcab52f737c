"""Small pools, configurations and calculators for tests that start real processes.

Workers import this module by name, so what they run lives here and not in a test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from sqlite3 import OperationalError, connect
from typing import Any

import ase.io
import numpy as np
import psutil
import yaml
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import CalculationFailed, Calculator, all_changes
from tblite.ase import TBLite

from orbcalc.active.executor import Executor, TaskKind
from orbcalc.active.sampling import Walk, WalkTask
from orbcalc.config import RunConfig, TrainConfig, parse_config

TESTS = Path(__file__).parent
COUNT_FILE = "ORBCALC_TEST_COUNT_FILE"

POTENTIAL: dict[str, Any] = {
    "cutoff": 4.0,
    "channels": 8,
    "l_max": 2,
    "message_l_max": 1,
    "radial_functions": 4,
    "radial_hidden": 8,
}
OPTIMIZER: dict[str, Any] = {
    "steps": 20,
    "batch_size": 4,
    "warmup_steps": 5,
    "evaluate_every": 10,
    "learning_rate": 0.01,
}


# -------------------------------------------------------------------------- structures
def waters(n: int, seed: int = 0, size: float = 0.08) -> list[Atoms]:
    """Return distorted water molecules in random orientations."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        atoms = molecule("H2O")
        atoms.positions += rng.normal(scale=size, size=(3, 3))
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        atoms.positions = atoms.positions @ rotation.T
        found.append(atoms)
    return found


def write_pool(path: Path, structures: list[Atoms]) -> Path:
    """Write structures as extxyz."""
    ase.io.write(path, structures, format="extxyz")
    return path


# --------------------------------------------------------------------- configurations
def run_data(pool: Path, output: Path, /, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a small run; changes replace or extend its sections."""
    data: dict[str, Any] = {
        "output": str(output),
        "seed": 1,
        "committee": 2,
        "device": "cpu",
        "pool": {"structures": str(pool)},
        "labels": {"chunk_s": 0.05},
        "potential": POTENTIAL,
        "optimizer": OPTIMIZER,
        "selection": {"initial": 10, "batch": 6, "audit": 4},
        "certificate": {"tolerance": 1e-6, "accuracy": 0.9, "delta": 0.1},
        "stop": {"max_rounds": 1},
    }
    for name, value in changes.items():
        merged = isinstance(value, dict) and isinstance(data.get(name), dict)
        data[name] = {**data[name], **value} if merged else value
    return data


def run_config(pool: Path, output: Path, /, **changes: Any) -> RunConfig:
    """Return the same as an object."""
    return parse_config(run_data(pool, output, **changes), RunConfig)


def train_config(train: Path, output: Path, /, **changes: Any) -> TrainConfig:
    """Return the configuration of a small training."""
    options = {**OPTIMIZER, **changes.pop("optimizer", {})}
    potential = {**POTENTIAL, **changes.pop("potential", {})}
    data = {"train": str(train), "output": str(output), "device": "cpu", "valid": 0.2}
    return parse_config(
        {**data, "potential": potential, "optimizer": options, **changes}, TrainConfig
    )


def write_yaml(path: Path, data: dict[str, Any]) -> Path:
    """Write a configuration."""
    path.write_text(yaml.safe_dump(data))
    return path


# ------------------------------------------------------------------------ calculators
class SlowGFN2(TBLite):  # type: ignore[misc]
    """GFN2-xTB that takes its time, and notes down each structure that it computes."""

    def __init__(self, pause: float = 0.1) -> None:
        super().__init__(method="GFN2-xTB", verbosity=0)
        self.pause = pause

    def calculate(self, atoms: Any = None, properties: Any = None, changes: Any = None) -> None:
        """Compute, wait, and write one line if the environment names a file."""
        super().calculate(atoms, properties or ["energy"], changes or all_changes)
        time.sleep(self.pause)
        if COUNT_FILE in os.environ:
            from orbcalc.structures import structure_key

            with open(os.environ[COUNT_FILE], "a") as file:
                file.write(f"{structure_key(atoms)}\n")


#: Configuration of the slow reference method.
SLOW: dict[str, Any] = {"calculator": "small_runs:SlowGFN2", "arguments": {"pause": 0.1}}


class FussyCalculator(Calculator):
    """Springs between all atoms; fails above z = 100 Å, and gives NaN above z = 50 Å."""

    implemented_properties = ("energy", "forces")

    def calculate(self, atoms: Any = None, properties: Any = None, changes: Any = None) -> None:
        """Compute, or fail as some programs do."""
        super().calculate(atoms, properties or ["energy"], changes or all_changes)
        height = self.atoms.positions[:, 2].mean()
        if height > 100:
            raise CalculationFailed("no convergence [in 3 cycles] /tmp/log")
        vectors = self.atoms.positions[:, None] - self.atoms.positions
        energy = 0.5 * float((vectors**2).sum())
        self.results = {
            "energy": energy if height <= 50 else float("nan"),
            "forces": -2.0 * vectors.sum(1),
        }


class WhileThereIs(FussyCalculator):
    """Works while a file is there."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def calculate(self, atoms: Any = None, properties: Any = None, changes: Any = None) -> None:
        """Compute, or fail."""
        if not os.path.exists(self.path):
            raise CalculationFailed("no licence")
        super().calculate(atoms, properties, changes)


class NeverMade(Calculator):
    """A calculator whose arguments are wrong."""

    def __init__(self, path: str) -> None:
        with open(path, "a") as file:
            file.write("x")
        raise ValueError("wrong")


# -------------------------------------------------------------------------- processes
def start_cli(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", "from orbcalc.cli import main; main()", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
    )


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str] | None) -> None:
    """Wait for a moment in the life of a process; it is an error if the process ends before."""
    end = time.monotonic() + 120
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"the process ended too early: {process.communicate()}")
        assert time.monotonic() < end, "the moment never came"
        time.sleep(0.01)


def label_rows(path: Path) -> dict[str, tuple[float, float]]:
    """Return creation and change time of each row of a label store, by structure key."""
    if not path.exists():
        return {}
    query = (
        "SELECT t.value, s.ctime, s.mtime FROM systems s JOIN text_key_values t ON s.id = t.id "
        "WHERE t.key = 'structure_key'"
    )
    try:
        with closing(connect(f"file:{path}?mode=rw", uri=True)) as database:
            return {key: (ctime, mtime) for key, ctime, mtime in database.execute(query)}
    except OperationalError:  # it is being made or written
        return {}


def label_children(process: psutil.Process | None = None) -> list[psutil.Process]:
    """Return the torch-free processes that compute labels under a process."""
    root = process or psutil.Process()
    found = []
    for child in root.children(recursive=True):
        try:
            if any("orbcalc.labels.worker" in part for part in child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


@contextmanager
def killed_at_the_end(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """Leave no process behind, whatever happens."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


# ---------------------------------------------------------------- executors and their tasks
class HereExecutor(Executor):
    """Runs every task at once in this process, for tests that need no cluster."""

    def __init__(self) -> None:
        pass

    def map(
        self,
        function: Callable[[Any], Any],
        items: Iterable[Any],
        kind: TaskKind,
        *,
        on_wait: Callable[[], None] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        for item in items:
            yield item, function(item)

    def n_workers(self, kind: TaskKind) -> int:
        return 1


def walk_nowhere(task: WalkTask) -> Walk:
    """End a walk before it has found anything."""
    return Walk([], "SCFError: no luck")


def square(number: int) -> int:
    """Square a number, or refuse a negative one."""
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number * number


def count_and_raise(task: tuple[str, type[Exception]]) -> None:
    """Leave one more byte in a file, and fail."""
    path, error = task
    with open(path, "a") as file:
        file.write("x")
    raise error("it cannot work")


def loaded_modules(_: object) -> tuple[int, list[str]]:
    """Return the process and what it has imported."""
    return os.getpid(), sorted(sys.modules)


def nap(seconds: float) -> float:
    """Sleep."""
    time.sleep(seconds)
    return seconds


def mark_and_nap(path: str) -> None:
    """Leave a mark, and sleep."""
    Path(path).touch()
    time.sleep(0.4)


def die_once(marker: str) -> str:
    """Kill the worker the first time, as the system does when memory runs out."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), 9)
    return "survived"


def die_always(_: object) -> None:
    """Kill the worker each time."""
    os.kill(os.getpid(), 9)
