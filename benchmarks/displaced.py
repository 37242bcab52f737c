"""A set of unlike molecules out of equilibrium: those of QM9, with all atoms displaced.

Their labels are made by `orbcalc label`; ``accuracy.py --set FILE.extxyz`` trains on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from data_efficiency.sets import QM9


def main() -> None:
    """Read the command line, draw the molecules, displace their atoms and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with qm9_b3lyp.npz")
    parser.add_argument("--out", type=Path, required=True, help="extxyz file")
    parser.add_argument("--molecules", type=int, default=4_400)
    parser.add_argument(
        "--displacement", type=float, default=0.07, help="Å, standard deviation of each coordinate"
    )
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    molecules, displaced = QM9(options.data / "qm9_b3lyp.npz"), []
    for index in rng.permutation(len(molecules))[: options.molecules]:
        atoms = molecules[index]
        moves = rng.normal(scale=options.displacement, size=(len(atoms), 3))
        displaced.append(Atoms(atoms.numbers, atoms.positions + moves))
    ase.io.write(options.out, displaced, format="extxyz")


if __name__ == "__main__":
    main()
