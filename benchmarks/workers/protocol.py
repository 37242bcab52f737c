"""What both workers do alike: answer requests, one JSON object a line, and time a model.

It runs in MACE's environment as well as in orbcalc's, so it imports neither.

A request is ``{"do": VERB, **arguments}``, its answer ``{"ok": ...}`` or ``{"error": ...}``.
Standard output carries nothing else: what libraries print goes to standard error, from the moment
that this module is imported.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator

__all__ = ["ModelWorker", "serve"]

# At once, since some packages print while they are imported.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

#: Å that each atom moves from one call of a calculator to the next, about a step of 0.5 fs.
STEP = 0.01
#: Å that all atoms move when a neighbour list is to be made anew, more than any skin.
JUMP = 1.0


class ModelWorker:
    """One model in one process. A public method is a verb; a subclass knows its package."""

    package = ""

    def __init__(self) -> None:
        self.device = "cpu"
        self.structures: list[Atoms] = []
        self._prepared: tuple[int, str, Callable[[], object]] | None = None

    # ------------------------------------------------------------- what a subclass gives
    def make(
        self, elements: list[int], architecture: dict[str, Any], dtype: str, device: str
    ) -> dict[str, Any]:
        """Build a model with random weights."""
        raise NotImplementedError

    def load(self, path: str, dtype: str, device: str) -> dict[str, Any]:
        """Load a trained model."""
        raise NotImplementedError

    def _model(self) -> torch.nn.Module:
        raise NotImplementedError

    def _evaluation(self, atoms: Atoms) -> Callable[[], object]:
        """Return one evaluation of energy and forces, neighbours found already."""
        raise NotImplementedError

    def _calculator(self) -> Calculator:
        raise NotImplementedError

    def _predictions(self) -> Iterable[tuple[float, np.ndarray]]:
        """Compute energy and forces of all structures, in batches."""
        raise NotImplementedError

    # ------------------------------------------------------------------------- verbs
    def describe(self) -> dict[str, str]:
        """Name the versions at work."""
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "ase": ase.__version__,
            "numpy": np.__version__,
        }
        if torch.cuda.is_available():
            versions["gpu"] = torch.cuda.get_device_name()
        return versions

    def threads(self, n: int) -> int:
        """Compute with so many threads."""
        torch.set_num_threads(n)
        return torch.get_num_threads()

    def load_structures(self, path: str) -> list[int]:
        """Read structures; returns their numbers of atoms."""
        self.structures = list(ase.io.iread(path, ":"))
        self._prepared = None
        return [len(atoms) for atoms in self.structures]

    def time(self, structure: int, repeats: int = 1, mode: str = "model") -> list[float]:
        """Time energy and forces of a structure.

        Parameters
        ----------
        structure
            Which one.
        repeats
            Number of evaluations.
        mode
            "model": the network and its derivatives alone, with neighbours found before.
            "step": the ASE calculator, called after each atom has moved by a hundredth of an
            ångström, as in dynamics. "new": the same after all atoms have moved far, so that
            nothing kept from the last call can be used.

        Returns
        -------
        list of float
            Seconds of each evaluation.
        """
        if self._prepared is None or self._prepared[:2] != (structure, mode):
            self._prepared = None  # frees its memory before more is taken
            run = self._timed(self.structures[structure].copy(), mode)
            self._prepared = (structure, mode, run)
        return [self._prepared[2]() for _ in range(repeats)]  # type: ignore[misc]

    def predict(self, path: str) -> None:
        """Write all structures with what the model says of them."""
        predicted = []
        for atoms, (energy, forces) in zip(self.structures, self._predictions(), strict=True):
            bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
            bare.info["predicted_energy"] = energy
            bare.arrays["predicted_forces"] = forces
            predicted.append(bare)
        ase.io.write(path, predicted, format="extxyz")

    def memory(self) -> dict[str, int | None]:
        """Return the highest use of memory so far, bytes."""
        on_gpu = self.device.startswith("cuda")
        return {
            "peak_rss": _peak_rss(),
            "peak_device": torch.cuda.max_memory_allocated() if on_gpu else None,
        }

    def limit_memory(self, n_bytes: int) -> None:
        """Let allocations beyond a limit fail, rather than the machine."""
        resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))

    # ------------------------------------------------------------------------ timing
    def _timed(self, atoms: Atoms, mode: str) -> Callable[[], float]:
        if mode == "model":
            evaluate = self._evaluation(atoms)
            return lambda: self._clock(evaluate)
        if mode not in ("step", "new"):
            raise ValueError(f"no such mode: {mode!r}")
        atoms.calc = self._calculator()
        rng = np.random.default_rng(0)
        start, jump = atoms.positions.copy(), 0.0

        def call() -> None:
            atoms.get_forces()
            atoms.get_potential_energy()

        def move_and_call() -> float:
            nonlocal jump
            if mode == "new":
                jump = JUMP - jump
            # Always from the same place: a structure that drifted apart would become cheaper.
            atoms.positions = start + jump + rng.normal(0, STEP, start.shape)
            return self._clock(call)

        return move_and_call

    def _clock(self, function: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        function()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def serve(worker: ModelWorker) -> None:
    """Answer requests until standard input ends."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    verbs = {
        name: method
        for name, method in inspect.getmembers(worker, inspect.ismethod)
        if not name.startswith("_")
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": verbs[request.pop("do")](**request)}
        except Exception as error:  # whatever went wrong, the benchmark must hear of it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        _answers.write(json.dumps(answer) + "\n")
        _answers.flush()


def _end_with_parent(parent: int) -> None:
    """End this process when the benchmark was killed, even amid a training."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def _peak_rss() -> int:
    # ru_maxrss begins with what the parent had used, so Linux's own count is better.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
