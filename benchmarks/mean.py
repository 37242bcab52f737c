"""Errors of the mean of several potentials that `accuracy.py` trained on one set."""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import ase.io
import numpy as np
from accuracy import test_errors
from ase import Atoms
from rich.console import Console
from rich.table import Table

_PREDICTED = ("predicted_energy", "predicted_forces")


def main() -> None:
    """Read the command line; print the errors of each potential and of the means of all sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of accuracy.py")
    options = parser.parse_args()
    labelled = _read(options.runs[0] / "test.extxyz")
    predicted = {run: _read(run / "predictions.extxyz") for run in options.runs}
    table = Table("mean of", "energy RMSE, meV", "forces RMSE, meV/Å")
    for size in range(1, len(options.runs) + 1):
        for chosen in combinations(options.runs, size):
            means = [_mean(same) for same in zip(*(predicted[run] for run in chosen), strict=True)]
            found = test_errors(labelled, means)
            errors = (found[f"{name}_rmse"] for name in ("energy_meV", "forces_meV_per_A"))
            table.add_row(", ".join(run.name for run in chosen), *(f"{e:.3f}" for e in errors))
    Console(soft_wrap=True).print(table)


def _read(path: Path) -> list[Atoms]:
    return list(ase.io.iread(path, ":"))


def _mean(predictions: tuple[Atoms, ...]) -> Atoms:
    """Return a structure with the mean of what is predicted for it."""
    mean = predictions[0].copy()
    if any(not np.allclose(mean.positions, atoms.positions) for atoms in predictions):
        raise SystemExit("the runs were not tested on the same structures")
    energy, forces = _PREDICTED
    mean.info[energy] = float(np.mean([atoms.info[energy] for atoms in predictions]))
    mean.arrays[forces] = np.mean([atoms.arrays[forces] for atoms in predictions], axis=0)
    return mean


if __name__ == "__main__":
    main()
