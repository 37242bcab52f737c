"""Structures that many tests share, as plain functions; each call returns a new object."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule


def water() -> Atoms:
    """Return one water molecule."""
    return molecule("H2O")


def ethanol() -> Atoms:
    """Return one ethanol molecule."""
    return molecule("CH3CH2OH")


def lone_atom(symbol: str = "He") -> Atoms:
    """Return a single atom."""
    return Atoms(symbol)


def oxygen() -> Atoms:
    """Return O2 in its triplet ground state."""
    atoms = Atoms("O2", positions=[[0, 0, 0], [0.1, 0.2, 1.19]])
    atoms.info["spin"] = 3
    return atoms


def nitric_oxide() -> Atoms:
    """Return the doublet NO."""
    atoms = molecule("NO")
    atoms.info["spin"] = 2
    return atoms


def ammonium() -> Atoms:
    """Return the cation NH4+."""
    atoms = Atoms(
        "NH4",
        positions=0.59 * np.array([[0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]),
    )
    atoms.info["charge"] = 1
    return atoms


def sulfur_hexafluoride() -> Atoms:
    """Return SF6, stretched along one axis."""
    corners = np.concatenate([np.eye(3), -np.eye(3)]) * [1.56, 1.56, 1.65]
    return Atoms("SF6", positions=np.concatenate([[[0, 0, 0]], corners]))


def ferrocene() -> Atoms:
    """Return eclipsed ferrocene."""
    angles = 2 * np.pi * np.arange(5) / 5
    ring = np.stack([np.cos(angles), np.sin(angles), np.zeros(5)], axis=1)
    carbon = np.concatenate([1.21 * ring + [0, 0, 1.66], 1.21 * ring - [0, 0, 1.66]])
    hydrogen = np.concatenate([2.30 * ring + [0, 0, 1.64], 2.30 * ring - [0, 0, 1.64]])
    return Atoms("FeC10H10", positions=np.concatenate([[[0, 0, 0]], carbon, hydrogen]))


def iron_pentacarbonyl() -> Atoms:
    """Return the trigonal bipyramid Fe(CO)5."""
    angles = 2 * np.pi * np.arange(3) / 3
    equatorial = np.stack([np.cos(angles), np.sin(angles), np.zeros(3)], axis=1)
    directions = np.concatenate([equatorial, [[0, 0, 1], [0, 0, -1]]])
    to_carbon = np.array([1.83, 1.83, 1.83, 1.81, 1.81])[:, None]
    carbon, oxygens = to_carbon * directions, (to_carbon + 1.15) * directions
    return Atoms("FeC5O5", positions=np.concatenate([[[0, 0, 0]], carbon, oxygens]))


def copper_tetraaqua() -> Atoms:
    """Return the square-planar doublet [Cu(H2O)4]2+."""
    corners = np.array([[1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0]])
    hydrogens = np.concatenate([2.52 * corners + [0, 0, 0.78], 2.52 * corners - [0, 0, 0.78]])
    atoms = Atoms("CuO4H8", positions=np.concatenate([[[0, 0, 0]], 1.95 * corners, hydrogens]))
    atoms.info.update(charge=2, spin=2)
    return atoms


def rock_salt() -> Atoms:
    """Return the primitive cell of NaCl with its atoms displaced."""
    atoms = bulk("NaCl", "rocksalt", a=5.64)
    atoms.positions += [[0.05, -0.02, 0.1], [0.0, 0.08, -0.04]]
    return atoms


def ice_cell() -> Atoms:
    """Return two water molecules in a skewed periodic cell."""
    first, second = water(), water()
    second.rotate(70, (1, 2, 3))
    second.translate([2.6, 0.9, 1.4])
    atoms = first + second
    atoms.set_cell([[5.2, 0.0, 0.0], [0.7, 4.9, 0.0], [0.3, -0.5, 5.0]])
    atoms.pbc = True
    return atoms


def salt_slab() -> Atoms:
    """Return water on NaCl, periodic in two directions, with an atom outside the cell."""
    atoms = rock_salt().repeat((2, 2, 1))
    atoms.pbc = (True, True, False)
    atoms.cell[2] = (0.0, 0.0, 20.0)
    molecule_above = water()
    molecule_above.translate([1.0, 1.0, 6.5])
    atoms += molecule_above
    atoms.positions[0] -= atoms.cell[1]
    return atoms


def chiral() -> Atoms:
    """Return chlorofluoromethanol, which has no symmetry."""
    return Atoms(
        "CHFClOH",
        positions=[
            [0.0, 0.0, 0.0],
            [0.63, 0.63, 0.62],
            [-0.78, -0.8, 0.76],
            [-1.0, 1.05, -1.0],
            [0.82, -0.8, -0.84],
            [1.3, -0.2, -1.5],
        ],
    )


def random_rotation(seed: int, *, improper: bool = False) -> np.ndarray:
    """Return a random rotation matrix (with an inversion, if improper)."""
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return matrix * np.linalg.det(matrix) * (-1 if improper else 1)


def e3nn_representation(irreps: str, rotation: np.ndarray) -> np.ndarray:
    """Return e3nn's ``D(R)`` in float64, from its spherical harmonics: Y(R r) = D(R) Y(r).

    ``Irreps.D_from_matrix`` itself has only float32 accuracy, unless the global dtype is changed.
    """
    import torch
    from e3nn import o3

    points = torch.as_tensor(np.random.default_rng(0).normal(size=(40, 3)))
    moved = points @ torch.as_tensor(rotation).T
    total = o3.Irreps(irreps)
    matrix = np.zeros((total.dim, total.dim))
    for (_, irrep), place in zip(total, total.slices(), strict=True):
        assert irrep.p == (-1) ** irrep.l, "only the parities of spherical harmonics"
        before, after = (
            o3.spherical_harmonics(irrep.l, xyz, normalize=True).numpy() for xyz in (points, moved)
        )
        matrix[place, place] = np.linalg.lstsq(before, after, rcond=None)[0].T
    return matrix
