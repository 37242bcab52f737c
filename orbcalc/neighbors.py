"""Neighbour lists in a padded layout, (atoms, slots), and their reuse while atoms move.

Every atom has the same number of slots; the unused ones are masked. Sums over neighbours are
then plain sums over an axis, and the transpose of "gather from my neighbours" is again a
gather, because every edge i -> j knows the slot of its reverse j -> i. Nothing is scattered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import vesin
from ase import Atoms
from jaxtyping import Bool, Float, Int

from orbcalc.errors import ConfigError
from orbcalc.structures import closed_cell

__all__ = ["NeighborList", "SkinList", "neighbor_list"]

#: vesin 0.6 divides a box into no more.
MAX_CELLS = 1e5


@dataclass(frozen=True)
class NeighborList:
    """Neighbours of every atom of one structure.

    Slot ``k`` of atom ``i`` is the vector ``positions[neighbors[i, k]] - positions[i] +
    shifts[i, k] @ cell``. An unused slot points at its own atom and is False in ``mask``.
    """

    neighbors: Int[np.ndarray, "n_atoms n_slots"]
    shifts: Float[np.ndarray, "n_atoms n_slots 3"]
    mask: Bool[np.ndarray, "n_atoms n_slots"]
    reverse: Int[np.ndarray, "n_atoms n_slots"]
    """Flat index ``j * n_slots + slot`` of the reverse edge; of itself where unused."""

    @property
    def n_slots(self) -> int:
        """Number of slots of each atom."""
        return int(self.neighbors.shape[1])

    def closest(self, atoms: Atoms) -> tuple[int, int, float]:
        """Return the closest two atoms that are neighbours (or images of one), and how far, Å.

        Parameters
        ----------
        atoms
            The structure of the list, where its atoms are now.
        """
        ends = atoms.positions[self.neighbors] + self.shifts @ atoms.cell.array
        squares = ((ends - atoms.positions[:, None]) ** 2).sum(axis=-1)
        squares[~self.mask] = np.inf
        i, slot = np.unravel_index(np.argmin(squares), squares.shape)
        return int(i), int(self.neighbors[i, slot]), float(np.sqrt(squares[i, slot]))


def neighbor_list(atoms: Atoms, cutoff: float) -> NeighborList:
    """Find all pairs closer than a cutoff, periodic images included.

    Parameters
    ----------
    atoms
        Any mixture of periodic and open directions; positions need not be wrapped.
    cutoff
        Å.
    """
    search, (positions, box) = cutoff, _in_a_box(atoms, cutoff)
    while _is_too_thin(box, search):
        search *= 2
        positions, box = _in_a_box(atoms, search)
    finder = vesin.NeighborList(cutoff=search, full_list=True, sorted=True)
    centers, neighbors, shifts, distances = finder.compute(
        points=positions, box=box, periodic=True, quantities="ijSd"
    )
    if search > cutoff:
        near = distances < cutoff
        centers, neighbors, shifts = centers[near], neighbors[near], shifts[near]
    return _pad(
        len(atoms), centers.astype(np.int64), neighbors.astype(np.int64), shifts.astype(np.int64)
    )


def _in_a_box(atoms: Atoms, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Close the open directions with a box that leaves room between images.

    In directions that are open for it, vesin takes time with the square of their length.
    """
    cell = closed_cell(atoms)
    along = atoms.positions @ cell.T
    first = np.where(atoms.pbc, 0.0, along.min(axis=0) - cutoff)
    lengths = np.where(atoms.pbc, 1.0, np.ptp(along, axis=0) + 2 * cutoff)
    return atoms.positions - first @ cell, cell * lengths[:, None]


def _is_too_thin(box: np.ndarray, cutoff: float) -> bool:
    """Tell whether vesin cannot divide a box.

    It makes cells as wide as the cutoff, and wider in all directions alike where there would be
    too many; where the box is thinner than a cell then, it divides by zero and ends the process.
    """
    if np.maximum(np.linalg.norm(box, axis=1) / cutoff, 1.0).prod() <= MAX_CELLS:
        return False
    heights = 1 / np.linalg.norm(np.linalg.inv(box), axis=0)
    n_cells = np.maximum(np.floor(heights / cutoff), 1.0)
    excess = n_cells.prod() / MAX_CELLS
    return bool(excess > 1 and n_cells.min() / np.cbrt(excess) < 1.01)


def _pad(
    n_atoms: int,
    centers: Int[np.ndarray, " n_edges"],
    neighbors: Int[np.ndarray, " n_edges"],
    shifts: Int[np.ndarray, "n_edges 3"],
) -> NeighborList:
    """Lay out edges, sorted by centre, in slots."""
    # The k-th edge by (i, j, S) is the reverse of the k-th edge by (j, i, -S).
    forward = np.lexsort((*shifts.T, neighbors, centers))
    centers, neighbors, shifts = centers[forward], neighbors[forward], shifts[forward]
    backward = np.lexsort((*(-shifts).T, centers, neighbors))

    counts = np.bincount(centers, minlength=n_atoms)
    n_slots = max(int(counts.max(initial=0)), 1)
    slots = np.arange(len(centers)) - np.repeat(np.cumsum(counts) - counts, counts)
    flat = centers * n_slots + slots

    everywhere = np.arange(n_atoms * n_slots)
    padded_neighbors, padded_reverse = everywhere // n_slots, everywhere.copy()
    padded_shifts = np.zeros((n_atoms * n_slots, 3))
    mask = np.zeros(n_atoms * n_slots, dtype=bool)
    padded_neighbors[flat] = neighbors
    padded_shifts[flat] = shifts
    mask[flat] = True
    padded_reverse[flat[backward]] = flat
    shape = (n_atoms, n_slots)
    return NeighborList(
        padded_neighbors.reshape(shape),
        padded_shifts.reshape(*shape, 3),
        mask.reshape(shape),
        padded_reverse.reshape(shape),
    )


class SkinList:
    """A neighbour list with a Verlet skin, rebuilt only when it could miss a pair.

    Parameters
    ----------
    cutoff
        Å.
    skin
        Å beyond the cutoff. The list stays valid until an atom has moved by half of it.

    Raises
    ------
    ConfigError
        If the skin is negative or not finite.
    """

    def __init__(self, cutoff: float, skin: float = 0.5) -> None:
        if not 0 <= skin < math.inf:
            raise ConfigError(f"skin must be a finite length in Å, at least 0, not {skin!r}")
        self.cutoff = cutoff
        self.skin = skin
        self.n_builds = 0
        self._built_for: Atoms | None = None
        self._list: NeighborList | None = None

    def update(self, atoms: Atoms, check: Callable[[Atoms], object] | None = None) -> NeighborList:
        """Return a list that holds every pair inside the cutoff (and some beyond).

        `check` sees the atoms before each search; between two they move less than the skin.
        """
        if self._list is None or not self._is_valid(atoms):
            if check is not None:
                check(atoms)
            self._list = neighbor_list(atoms, self.cutoff + self.skin)
            self._built_for = Atoms(
                numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc
            )
            self.n_builds += 1
        return self._list

    def _is_valid(self, atoms: Atoms) -> bool:
        built = self._built_for
        if (
            built is None
            or len(built) != len(atoms)
            or not np.array_equal(built.pbc, atoms.pbc)
            or (atoms.pbc.any() and not np.array_equal(built.cell.array, atoms.cell.array))
        ):
            return False
        moved = ((atoms.positions - built.positions) ** 2).sum(axis=1).max()
        return bool(moved <= (self.skin / 2) ** 2)  # False for NaN
