"""The sets with expensive labels, and how each is divided.

Every set is cut once, whatever the seed of a run: a test set, structures for validation, and
the pool. The seed of a run chooses which structures of the pool are labelled.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.units import Hartree

from orbcalc.properties import REF_ENERGY

__all__ = [
    "DFT_CHARGES",
    "DRAWS",
    "QM9",
    "SETS",
    "WITH_DFT_CHARGES",
    "DataSet",
    "Limits",
    "barrier_pairs",
    "load_set",
    "read_tmqm",
]

#: Per-atom array with the charges of the expensive method, e.
DFT_CHARGES = "DFT_charges"

SETS = ("qm9", "hydroform22", "vaska")

#: Ways to choose the labelled structures of the pool.
DRAWS = ("group", "structure", "informative")

#: Those with `DFT_CHARGES`.
WITH_DFT_CHARGES = ("qm9", "vaska")

#: Of the permutation that cuts a set.
_SPLIT_SEED = 1


@dataclass(frozen=True)
class Limits:
    """What of a set is used."""

    pool: int
    """Structures of the pool at most."""
    test: int
    """Test structures at most."""
    max_atoms: int | None = None
    """Larger structures are left out."""
    catalysts: int | None = None
    """Catalysts of hydroform22 that are used in all."""
    larger: int = 0
    """Structures above `max_atoms` that join the pool with cheap labels only, at most."""


@dataclass(frozen=True)
class DataSet:
    """Structures with ``REF_energy`` (eV); a group is never divided."""

    name: str
    pool: list[Atoms]
    valid: list[Atoms]
    test: list[Atoms]
    split: str
    """How it was divided, in words."""
    larger: list[Atoms] = field(default_factory=list)
    """Structures for cheap labels only, at random, of groups that are in no other part."""

    def labelled(
        self, size: int, seed: int, draw: str = "group", order: Sequence[int] = ()
    ) -> list[int]:
        """Return which structures of the pool a run gets expensive labels of.

        Those of a smaller size are among those of a larger one with the same seed. The first
        ones bring every element of the pool, so that all test structures can be predicted.

        Parameters
        ----------
        size
            How many.
        seed
            Of the draw.
        draw
            One of `DRAWS`: all structures of a group before those of the next, structures at
            random from all groups, or the most informative ones.
        order
            The most informative ones; others follow at random.

        Raises
        ------
        ValueError
            If the pool is too small.
        """
        if size > len(self.pool):
            raise ValueError(f"the pool of {self.name} has {len(self.pool)} structures, not {size}")
        rng = np.random.default_rng([_SPLIT_SEED, seed])
        if draw == "group":
            order = _grouped_order(self.pool, rng)
        else:
            order = [*dict.fromkeys([*order, *rng.permutation(len(self.pool)).tolist()])]
        first, seen = [], set[int]()
        for index in order:
            if not _elements(self.pool[index]) <= seen:
                first.append(index)
                seen |= _elements(self.pool[index])
        return list(dict.fromkeys([*first, *order]))[:size]

    def validation(self, size: int) -> list[Atoms]:
        """Return the structures that a run of this size is validated with: 10 %, at least 50."""
        return self.valid[: max(50, round(0.1 * size))]


def load_set(folder: Path, name: str, limits: Limits) -> DataSet:
    """Read and divide a set.

    Parameters
    ----------
    folder
        With ``qm9_b3lyp.npz``, ``hydroform22.extxyz.gz`` and ``vaska.extxyz.gz``.
    name
        One of `SETS`.
    limits
        What of it is used.
    """
    if name == "qm9":
        return _load_qm9(folder / "qm9_b3lyp.npz", limits)
    structures, larger = _read(folder / f"{name}.extxyz.gz"), []
    if limits.max_atoms is not None:
        larger = [atoms for atoms in structures if len(atoms) > limits.max_atoms]
        structures = [atoms for atoms in structures if len(atoms) <= limits.max_atoms]
    rng = np.random.default_rng(_SPLIT_SEED)
    order = _grouped_order(structures, rng, limits.catalysts)
    # A fifth of the groups for the test, a tenth for validation.
    groups = list(dict.fromkeys(_group(structures[i]) for i in order))
    part = {group: rank / len(groups) for rank, group in enumerate(groups)}
    ranked = [(part[_group(structures[i])], structures[i]) for i in order]
    kind = "catalyst" if name == "hydroform22" else "complex"
    pool = [atoms for rank, atoms in ranked if rank >= 0.3][: limits.pool]
    known = {z for atoms in pool for z in _elements(atoms)}
    judging = [(rank, atoms) for rank, atoms in ranked if rank < 0.3 and _elements(atoms) <= known]
    larger = [atoms for atoms in larger if _group(atoms) not in part and _elements(atoms) <= known]
    chosen = np.random.default_rng(_SPLIT_SEED).permutation(len(larger))[: limits.larger]
    return DataSet(
        name,
        pool,
        [atoms for rank, atoms in judging if rank >= 0.2],
        [atoms for rank, atoms in judging if rank < 0.2][: limits.test],
        f"at random by {kind}: 20 % test, 10 % validation, the others are the pool",
        [larger[i] for i in chosen],
    )


def read_tmqm(folder: Path) -> list[Atoms]:
    """Read the complexes of tmQM, which have geometries and charges but no labels.

    Parameters
    ----------
    folder
        With ``tmqm_geometries_le40.extxyz.gz``.
    """
    return _read(folder / "tmqm_geometries_le40.extxyz.gz")


def barrier_pairs(structures: Sequence[Atoms]) -> list[tuple[int, int]]:
    """Find the reactant and the transition state of each reaction, where both are there."""
    states: dict[tuple[str, str], dict[str, int]] = {}
    for number, atoms in enumerate(structures):
        if "state" in atoms.info:
            reaction = (atoms.info["metal"], atoms.info["catalyst"])
            states.setdefault(reaction, {})[atoms.info["state"]] = number
    return [(s["reactant"], s["ts"]) for s in states.values() if {"reactant", "ts"} <= s.keys()]


class QM9:
    """All molecules of QM9, in the order of the file, each made when it is asked for.

    Parameters
    ----------
    path
        ``qm9_b3lyp.npz``.
    """

    def __init__(self, path: Path) -> None:
        names = ("n_atoms", "Z", "R", "q_mulliken", "E_elec_hartree")
        with np.load(path) as file:
            self.n_atoms, self._numbers, self._positions, self._charges, self._energies = (
                file[name] for name in names
            )
        self._starts = np.concatenate([[0], np.cumsum(self.n_atoms)])

    def __len__(self) -> int:
        """Return the number of molecules."""
        return len(self.n_atoms)

    def __getitem__(self, index: int) -> Atoms:
        """Return a molecule with its B3LYP energy and Mulliken charges."""
        own = slice(self._starts[index], self._starts[index + 1])
        atoms = Atoms(self._numbers[own].astype(int), self._positions[own].astype(float))
        atoms.info[REF_ENERGY] = float(self._energies[index] * Hartree)
        atoms.arrays[DFT_CHARGES] = self._charges[own].astype(float)
        return atoms


def _load_qm9(path: Path, limits: Limits) -> DataSet:
    molecules = QM9(path)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(molecules))
    if limits.max_atoms is not None:
        order = order[molecules.n_atoms[order] <= limits.max_atoms]
    n_valid = max(50, limits.pool // 10)
    ends = np.cumsum([limits.test, n_valid, limits.pool])
    test, valid, pool = ([molecules[i] for i in part] for part in np.split(order, ends)[:3])
    return DataSet("qm9", pool, valid, test, "at random by molecule")


def _read(path: Path) -> list[Atoms]:
    with gzip.open(path, "rt") as file:
        text = StringIO(file.read())  # the reader jumps about, which is slow in a gzip file
    structures = list(ase.io.iread(text, ":", format="extxyz"))
    for atoms in structures:
        atoms.calc = None
        if "npa_charges" in atoms.arrays:
            atoms.arrays[DFT_CHARGES] = atoms.arrays.pop("npa_charges")
    return structures


def _elements(atoms: Atoms) -> set[int]:
    return set(atoms.numbers.tolist())


def _group(atoms: Atoms) -> str:
    """Name what belongs together: all structures with the ligands of one catalyst."""
    return str(atoms.info.get("catalyst", atoms.info.get("name")))


def _grouped_order(
    structures: Sequence[Atoms], rng: np.random.Generator, n_groups: int | None = None
) -> list[int]:
    """Return the structures in a random order of their groups, each group in one piece."""
    groups: dict[str, list[int]] = {}
    for number, atoms in enumerate(structures):
        group = _group(atoms) if "name" in atoms.info else str(number)
        groups.setdefault(group, []).append(number)
    names = list(groups)
    chosen = [names[i] for i in rng.permutation(len(names))[:n_groups]]
    return [number for name in chosen for number in groups[name]]
