"""Structures to time: liquid water of any size, and molecules in the gas phase."""

from __future__ import annotations

import ase.units
import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.neighborlist import neighbor_list
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

__all__ = ["gas_phase", "water"]

#: Liquid water at 298 K, g/cm³.
DENSITY = 0.997
#: Å. Closer than this oxygens, and any other atoms of two molecules, are not placed.
MIN_OXYGENS, MIN_ATOMS = 2.5, 1.5
#: Å. About what a proton moves within some femtoseconds at 300 K.
THERMAL = 0.03


def water(n_atoms: int, seed: int = 0) -> Atoms:
    """Place rigid water molecules at random in a cubic cell of liquid density.

    Parameters
    ----------
    n_atoms
        Rounded to whole molecules.
    seed
        Of places, orientations and the small displacements of all atoms in the end.
    """
    rng = np.random.default_rng(seed)
    n_molecules = max(round(n_atoms / 3), 1)
    single = molecule("H2O")
    grams = n_molecules * single.get_masses().sum() / (1e-3 * ase.units.kg)
    length = (grams / DENSITY) ** (1 / 3) * 1e8  # cm to Å
    oxygens = _centres(n_molecules, length, rng)
    shape = single.positions - single.positions[0]
    turned = _turned(shape, n_molecules, rng)
    while True:
        atoms = Atoms(
            np.tile(single.numbers, n_molecules),
            (oxygens[:, None] + turned).reshape(-1, 3),
            cell=[length] * 3,
            pbc=True,
        )
        i, j = neighbor_list("ij", atoms, MIN_ATOMS)
        clashing = np.unique(i[i // 3 != j // 3] // 3)
        if not len(clashing):
            break
        turned[clashing] = _turned(shape, len(clashing), rng)
    atoms.positions += rng.normal(0, THERMAL, (len(atoms), 3))
    return atoms


def gas_phase() -> dict[str, Atoms]:
    """Return some molecules of different size, by name."""
    names = {"ethanol": "CH3CH2OH", "butane": "trans-butane", "C60": "C60"}
    found = {name: molecule(key) for name, key in names.items()}
    for atoms in found.values():
        atoms.positions += np.random.default_rng(0).normal(0, THERMAL, (len(atoms), 3))
    return found


def _centres(n_molecules: int, length: float, rng: np.random.Generator) -> np.ndarray:
    """Add points at random, keeping their distance from all before, until there are enough."""
    placed = np.empty((0, 3))
    while len(placed) < n_molecules:
        tried = rng.uniform(0, length, (max(4 * (n_molecules - len(placed)), 64), 3))
        if len(placed):
            distances, _ = cKDTree(placed, boxsize=length).query(tried)
            tried = tried[distances > MIN_OXYGENS]
        if not len(tried):
            continue
        refused = np.zeros(len(tried), dtype=bool)
        for first, second in sorted(cKDTree(tried, boxsize=length).query_pairs(MIN_OXYGENS)):
            if not refused[first]:
                refused[second] = True
        placed = np.concatenate([placed, tried[~refused]])
    return placed[:n_molecules]


def _turned(shape: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return randomly turned copies of a molecule, (count, n_atoms, 3)."""
    matrices = Rotation.random(count, rng).as_matrix()
    turned: np.ndarray = np.einsum("nij,aj->nai", matrices, shape)
    return turned
