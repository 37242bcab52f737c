"""Structures at the edge of the package: read them, check them, name them by content."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.geometry import complete_cell, minkowski_reduce
from ase.utils import string2index
from jaxtyping import Float
from scipy.spatial import cKDTree

from orbcalc.errors import StructureError
from orbcalc.properties import CHARGE_KEY, SPIN_KEY

__all__ = [
    "as_atoms",
    "charge_and_multiplicity",
    "check_structure",
    "closed_cell",
    "geometry",
    "has_volume",
    "hold_out",
    "is_lone_atom",
    "multiplicity_is_possible",
    "read_structures",
    "refuse_overlap",
    "structure_key",
    "unique_structures",
    "warn_of_unseen_electrons",
]

#: Two nuclei closer than this (Å) are an error of the input; H2 is 0.74 Å.
MIN_DISTANCE = 0.3

#: Å, of a cell vector or along an open direction: what is longer was not meant.
MAX_EXTENT = 1e5

#: An atom whose images are farther apart than this (Å) is alone.
_LONE_BOX = 6.0

#: Positions and cells are hashed in units of this (Å): the last decimal of extxyz files, so that
#: a structure that was written to one and read back has the same key.
KEY_RESOLUTION = 1e-8

#: What a calculator may begin from, and so end in another state.
_INITIAL = ("initial_charges", "initial_magmoms")


def read_structures(paths: str | Path | Iterable[str | Path]) -> list[Atoms]:
    """Read every structure of one or more files that ASE can read.

    ``name.xyz@:100`` chooses structures of a file, as in ASE.

    Raises
    ------
    StructureError
        If a file is missing, unreadable or empty, or a structure in it cannot be computed.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    structures: list[Atoms] = []
    for path in files:
        name, _, choice = str(path).rpartition("@")
        is_choice = bool(name) and not Path(path).is_file()
        try:
            images = ase.io.read(
                name if is_choice else path,
                index=string2index(choice) if is_choice else ":",
                do_not_split_by_at_sign=True,
            )
        except Exception as error:  # ASE's readers raise anything, down to bare AssertionError
            raise StructureError(f"cannot read structures from {path}: {error!r}") from error
        images = [images] if isinstance(images, Atoms) else images
        if not images:
            raise StructureError(f"{path} holds no structures")
        for number, atoms in enumerate(images):
            check_structure(atoms, f"structure {number} of {path}")
        structures += images
    return structures


def as_atoms(structure: Any) -> Atoms:
    """Return ASE Atoms of a structure or molecule of pymatgen; Atoms are returned themselves.

    A total charge is taken where one was stated: the formal charges of pymatgen's species, which
    it adds up otherwise, are none of the structure.

    Raises
    ------
    StructureError
        If it is neither.
    """
    if isinstance(structure, Atoms):
        return structure
    if not hasattr(structure, "to_ase_atoms"):
        raise StructureError(
            f"cannot predict a {type(structure).__name__}: give ase.Atoms, or a pymatgen Structure "
            f"or Molecule"
        )
    atoms: Atoms = structure.to_ase_atoms()
    if CHARGE_KEY not in atoms.info:
        # pymatgen leaves these out, or makes them attributes, which nothing else reads.
        stated = {CHARGE_KEY: getattr(structure, "_charge", None) or 0}
        if hasattr(structure, "spin_multiplicity"):  # only molecules have one
            stated[SPIN_KEY] = structure.spin_multiplicity
        atoms.info = {**stated, **atoms.info}
    return atoms


def check_structure(atoms: Atoms, name: str | None = None) -> None:
    """Refuse a structure that no method can compute.

    Parameters
    ----------
    atoms
        Structure with positions in Å.
    name
        What to call it in messages, before its formula.

    Raises
    ------
    StructureError
        If it has no atoms, a NaN or infinite coordinate, an unknown element, a periodic
        direction without a cell vector, overlapping atoms, atoms too far apart, or an impossible
        charge or spin.
    """
    if len(atoms) == 0:
        raise StructureError(f"{name or 'structure'} has no atoms")
    unknown = np.flatnonzero((atoms.numbers < 1) | (atoms.numbers > 118))
    if len(unknown):
        raise StructureError(
            f"atom {unknown[0]} of {name or 'a structure'} has atomic number "
            f"{atoms.numbers[unknown[0]]}: it is no element. Give every atom a symbol."
        )
    formula = atoms.get_chemical_formula()
    name = f"{name} ({formula})" if name else formula
    bad = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
    if len(bad):
        raise StructureError(
            f"atom {bad[0]} of {name} has position {atoms.positions[bad[0]]}: "
            f"coordinates must be finite numbers in Å."
        )
    if not np.isfinite(atoms.cell.array).all():
        raise StructureError(f"{name} has a cell that is not finite: {atoms.cell.array.tolist()}")
    if atoms.pbc.any() and (
        (atoms.cell.lengths()[atoms.pbc] < 1e-6).any()
        or abs(np.linalg.det(complete_cell(atoms.cell.array))) < 1e-6
    ):
        raise StructureError(
            f"{name} is periodic along {atoms.pbc.tolist()}, but its cell spans no volume: "
            f"{atoms.cell.array.tolist()}. Set the cell, or pbc=False."
        )
    extent = _extent(atoms)
    if extent > MAX_EXTENT:
        raise StructureError(
            f"{name} is {extent:.3g} Å long (limit {MAX_EXTENT:g} Å): has an atom flown away, or "
            f"are positions or cell in another unit?"
        )
    charge_and_multiplicity(atoms)
    refuse_overlap(atoms, *_closest_overlap(atoms), name)


def refuse_overlap(atoms: Atoms, i: int, j: int, distance: float, name: str | None = None) -> None:
    """Raise `StructureError` if two atoms are nearer than any method is made for."""
    if distance < MIN_DISTANCE:
        name = name or atoms.get_chemical_formula()
        raise StructureError(
            f"atoms {i} and {j} of {name} are {distance:.3f} Å apart: "
            f"they overlap (limit {MIN_DISTANCE} Å). Correct the structure."
        )


def has_volume(atoms: Atoms) -> bool:
    """Tell whether a structure is periodic and its cell spans a volume, which a stress needs."""
    return bool(atoms.pbc.any()) and bool(atoms.cell.rank == 3)


def warn_of_unseen_electrons(atoms: Atoms, seen: set[tuple[int, int]]) -> None:
    """Warn of a charge and multiplicity that a potential has not seen; once, as they join `seen`.

    Parameters
    ----------
    atoms
        To be predicted.
    seen
        Charge and multiplicity of the training structures; empty if that is not known.
    """
    state = charge_and_multiplicity(atoms)
    if seen and state not in seen:
        seen.add(state)
        warnings.warn(
            f"{atoms.get_chemical_formula()} has charge {state[0]} and multiplicity {state[1]}, "
            f"which no training structure had: energies and uncertainties do not know what they do",
            stacklevel=4,
        )


def hold_out(structures: Sequence[Atoms], order: Iterable[int], size: int) -> list[int]:
    """Choose the first structures of an order that the others can do without.

    Every element that is held out stays in at least one structure that is not: a potential can
    be tested on what it has seen only. Lone atoms are not chosen, and are not such structures:
    they tell reference energies, and nothing else can.

    Parameters
    ----------
    structures
        All of them.
    order
        Indices of those that may be chosen.
    size
        How many to choose; fewer come back where that is impossible.
    """
    elements_of = [
        set() if is_lone_atom(atoms) else set(atoms.numbers.tolist()) for atoms in structures
    ]
    left = Counter(z for elements in elements_of for z in elements)
    chosen: list[int] = []
    for index in order:
        elements = elements_of[index]
        if elements and len(chosen) < size and all(left[z] > 1 for z in elements):
            chosen.append(index)
            left.subtract(elements)
    return chosen


def is_lone_atom(atoms: Atoms) -> bool:
    """Tell whether a structure is a single atom, far from its periodic images."""
    if len(atoms) != 1 or not atoms.pbc.any():
        return len(atoms) == 1
    cell, _ = minkowski_reduce(complete_cell(atoms.cell.array), atoms.pbc)
    return bool(np.linalg.norm(cell[atoms.pbc], axis=1).min() > _LONE_BOX)


def closed_cell(atoms: Atoms) -> Float[np.ndarray, "3 3"]:
    """Return the cell vectors of periodic directions, and unit vectors normal to all for others."""
    cell: np.ndarray = complete_cell(np.where(atoms.pbc[:, None], atoms.cell.array, 0.0))
    return cell


def _extent(atoms: Atoms) -> float:
    """Return the largest length of a structure: of a cell vector, or along an open direction."""
    cell = closed_cell(atoms)
    lengths = np.where(
        atoms.pbc, np.linalg.norm(cell, axis=1), np.ptp(atoms.positions @ cell.T, axis=0)
    )
    return float(lengths.max())


def _closest_overlap(atoms: Atoms) -> tuple[int, int, float]:
    """Return the closest two atoms (or an atom and its image) and their distance.

    The distance is infinite if nothing overlaps. A tree in fractional coordinates knows
    periodic images, and is far faster than a neighbour list, whose bins are made for cutoffs
    of several Å.
    """
    cell = np.eye(3)
    if atoms.pbc.any():  # reduced: its vectors are the shortest ways to images
        cell, _ = minkowski_reduce(complete_cell(atoms.cell.array), atoms.pbc)
        lengths = np.linalg.norm(cell[atoms.pbc], axis=1)
        if lengths.min() < MIN_DISTANCE:
            return 0, 0, float(lengths.min())
    to_fractional = np.linalg.inv(cell)
    fractional = atoms.positions @ to_fractional
    fractional[:, atoms.pbc] %= 1.0
    fractional[:, atoms.pbc] %= 1.0  # a tiny negative number gave 1.0, which is outside the box
    tree = cKDTree(fractional, boxsize=atoms.pbc.astype(float))
    radius = MIN_DISTANCE * np.linalg.norm(to_fractional, 2)
    pairs = tree.query_pairs(radius, output_type="ndarray")
    between = fractional[pairs[:, 0]] - fractional[pairs[:, 1]]
    between[:, atoms.pbc] -= np.round(between[:, atoms.pbc])
    distances = np.linalg.norm(between @ cell, axis=1)
    if len(distances) == 0:
        return 0, 0, np.inf
    closest = int(np.argmin(distances))
    return int(pairs[closest, 0]), int(pairs[closest, 1]), float(distances[closest])


def geometry(atoms: Atoms) -> Atoms:
    """Copy what energies depend on: elements, geometry, total charge and multiplicity."""
    info = {key: atoms.info[key] for key in (CHARGE_KEY, SPIN_KEY) if key in atoms.info}
    return Atoms(
        numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=info
    )


def structure_key(atoms: Atoms) -> str:
    """Return the content hash that names a structure in label stores.

    It covers elements, positions and cell (to 1e-8 Å), periodicity, charge and multiplicity,
    and initial charges and magnetic moments that are not all zero, by which a calculator may
    find another state, in the given order of atoms; labels and other info do not change it.
    """
    charge, multiplicity = charge_and_multiplicity(atoms)
    digest = hashlib.sha256()
    cell = atoms.cell.array if atoms.pbc.any() else np.zeros((3, 3))
    for array in (
        atoms.numbers,
        np.rint(atoms.positions / KEY_RESOLUTION),
        np.rint(cell / KEY_RESOLUTION),
        atoms.pbc,
        [charge, multiplicity],
    ):
        digest.update(np.asarray(array).astype("<i8").tobytes())
    for name in _INITIAL:
        values = np.rint(np.nan_to_num(atoms.arrays.get(name, 0.0)) / KEY_RESOLUTION)
        if values.any():
            digest.update(f"{name} {values.shape}".encode() + values.astype("<i8").tobytes())
    # ase.db refuses strings that read as numbers, as a few hexadecimal ones do: start with a letter
    return "s" + digest.hexdigest()[:31]


def unique_structures(structures: Iterable[Atoms]) -> dict[str, Atoms]:
    """Return the first of each structure by its key, in their order."""
    found: dict[str, Atoms] = {}
    for atoms in structures:
        found.setdefault(structure_key(atoms), atoms)
    return found


def charge_and_multiplicity(atoms: Atoms) -> tuple[int, int]:
    """Read the total charge and the spin multiplicity of a structure.

    Parameters
    ----------
    atoms
        ``info["charge"]`` (e) and ``info["spin"]`` (multiplicity 2S + 1) are read. A missing
        charge is 0. A missing multiplicity is the lowest that the electron count allows for a
        molecule, and 1 for a periodic structure, where the count depends on the cell chosen.

    Raises
    ------
    StructureError
        If a value is not an integer, or the multiplicity cannot be had with that many electrons.
    """
    charge = _integer(atoms, CHARGE_KEY, 0)
    n_electrons = int(atoms.numbers.sum()) - charge
    lowest = 1 if atoms.pbc.any() else 1 + n_electrons % 2
    multiplicity = _integer(atoms, SPIN_KEY, lowest)
    if not multiplicity_is_possible(atoms, charge, multiplicity):
        raise StructureError(
            f"{atoms.get_chemical_formula()}: info['{SPIN_KEY}'] = {multiplicity} is impossible "
            f"for {n_electrons} electrons (info['{CHARGE_KEY}'] = {charge}). "
            f"It is the multiplicity 2S + 1: correct it, or leave it out."
        )
    return charge, multiplicity


def multiplicity_is_possible(atoms: Atoms, charge: int, multiplicity: int) -> bool:
    """Tell whether a multiplicity agrees with the number of electrons (molecules only)."""
    if multiplicity < 1:
        return False
    n_electrons = int(atoms.numbers.sum()) - charge
    if n_electrons < 0 or multiplicity - 1 > n_electrons:
        return False
    return bool(atoms.pbc.any()) or (multiplicity - 1) % 2 == n_electrons % 2


def _integer(atoms: Atoms, key: str, default: int) -> int:
    value = atoms.info.get(key, default)
    try:
        integer = int(value)
        exact = float(value) == integer
    except (TypeError, ValueError, OverflowError):
        exact = False
    if not exact:
        raise StructureError(
            f"{atoms.get_chemical_formula()}: info['{key}'] = {value!r} is not an integer."
        )
    return integer
