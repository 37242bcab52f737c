"""Neighbour lists in a padded layout, (atoms, slots), and their reuse while atoms move.

Every atom has the same number of slots; the unused ones are masked. Sums over neighbours are
then plain sums over an axis, and the transpose of "gather from my neighbours" is again a
gather, because every edge i -> j knows the slot of its reverse j -> i. Nothing is scattered.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
import vesin
from ase import Atoms
from jaxtyping import Bool, Float, Int
from torch import Tensor

from orbcalc.errors import ConfigError
from orbcalc.structures import closed_cell

__all__ = ["NeighborList", "SkinList", "neighbor_list"]

logger = logging.getLogger(__name__)

#: vesin 0.6 divides a box into no more.
MAX_CELLS = 1e5

#: Stretch of a cell after which a list is made anew, though it misses nothing: its structure is
#: worth another check.
MAX_GROWTH = 1.2

#: Kinds of devices, beside the CPU, that vesin knows; it takes others for CPUs.
SEARCHERS = {"cuda"}

#: Centre, neighbour, shift of its cell, and distance of each pair.
Pairs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class NeighborList:
    """Neighbours of every atom of one structure.

    Slot ``k`` of atom ``i`` is the vector ``positions[neighbors[i, k]] - positions[i] +
    shifts[i, k] @ cell``. An unused slot points at its own atom and is False in ``mask``.
    """

    neighbors: Int[Tensor, "n_atoms n_slots"]
    shifts: Float[Tensor, "n_atoms n_slots 3"]
    mask: Bool[Tensor, "n_atoms n_slots"]
    reverse: Int[Tensor, "n_atoms n_slots"]
    """Flat index ``j * n_slots + slot`` of the reverse edge; of itself where unused."""


def neighbor_list(atoms: Atoms, cutoff: float, device: torch.device | str = "cpu") -> NeighborList:
    """Find all pairs closer than a cutoff, periodic images included.

    Parameters
    ----------
    atoms
        Any mixture of periodic and open directions; positions need not be wrapped.
    cutoff
        Å.
    device
        Where the list is needed, and made if vesin can do so there.
    """
    search, (positions, cells, box) = cutoff, _in_a_box(atoms, cutoff)
    while _is_too_thin(box, search):
        search *= 2
        positions, cells, box = _in_a_box(atoms, search)
    centers, neighbors, shifts, distances = _pairs(positions, box, search, torch.device(device))
    if search > cutoff:
        near = distances < cutoff
        centers, neighbors, shifts = centers[near], neighbors[near], shifts[near]
    found = _pad(len(atoms), centers, neighbors, shifts)
    if not cells.any():
        return found
    own = torch.from_numpy(cells).to(device)
    return replace(found, shifts=found.shifts + own[:, None] - own[found.neighbors])


def _pairs(positions: np.ndarray, box: np.ndarray, cutoff: float, device: torch.device) -> Pairs:
    """Search on a device, or on the CPU for it."""
    if device.type in SEARCHERS and _can_search(device):
        try:
            return _search(positions, box, cutoff, device)
        except RuntimeError as error:  # more neighbours than vesin makes room for
            logger.info("neighbours are searched on the CPU: %s", error)
    centers, neighbors, shifts, distances = _search(positions, box, cutoff, torch.device("cpu"))
    return centers.to(device), neighbors.to(device), shifts.to(device), distances.to(device)


def _search(positions: np.ndarray, box: np.ndarray, cutoff: float, device: torch.device) -> Pairs:
    # On a GPU vesin 0.6 takes the lengths of vectors along the axes, and not their signs.
    sign = np.where(np.diag(box) < 0, -1, 1)
    box = box * sign[:, None]
    positions = positions + box[sign < 0].sum(axis=0)  # inside the box again
    finder = vesin.NeighborList(cutoff=cutoff, full_list=True, n_threads=torch.get_num_threads())
    # It makes its device the current one, which is the caller's to choose.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        centers, neighbors, shifts, distances = finder.compute(
            points=torch.from_numpy(positions).to(device),
            box=torch.from_numpy(box).to(device),
            periodic=True,
            quantities="ijSd",
        )
    own = shifts.long() * torch.from_numpy(sign).to(device)
    return centers.long(), neighbors.long(), own, distances


@cache
def _can_search(device: torch.device) -> bool:
    """Tell, after a trial of several boxes, whether vesin finds on a device what it must.

    Its search on GPUs is young, and a pair that is missed is a wrong force without an error.
    """
    generator = np.random.default_rng(0)
    skewed = np.array([[1.0, 0.0, 0.0], [0.4, 0.9, 0.0], [-0.3, 0.2, 0.8]])
    boxes = [
        (2, 3.0 * skewed),
        (60, 9.0 * skewed),
        (200, np.diag([3.0, 8.0, 90.0])),
        (1000, 25.0 * skewed),
        (4000, np.diag([-35.0, 36.0, -37.0])),
        (6000, np.diag([40.0, 41.0, 42.0])),  # from 5,000 atoms on another algorithm
    ]
    try:
        for n_atoms, box in boxes:
            positions = generator.uniform(size=(n_atoms, 3)) @ box
            own, expected = (
                _pad(n_atoms, *(part.cpu() for part in _search(positions, box, 4.0, where)[:3]))
                for where in (device, torch.device("cpu"))
            )
            if not all(map(torch.equal, vars(own).values(), vars(expected).values())):
                raise RuntimeError(f"other pairs of {n_atoms} atoms than on the CPU")
    except (RuntimeError, IndexError) as error:
        logger.warning("vesin cannot search on %s; the CPU does it instead: %s", device, error)
        return False
    return True


def _in_a_box(atoms: Atoms, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Close the open directions with a box that leaves room between images, and put all into it.

    In directions that are open for it, vesin takes time with the square of their length.

    Returns
    -------
    positions, cells
        (n_atoms, 3) inside the box, Å, and the box that each atom was in before.
    box
        (3, 3), Å.
    """
    cell = closed_cell(atoms)
    along = atoms.positions @ cell.T
    first = np.where(atoms.pbc, 0.0, along.min(axis=0) - cutoff)
    lengths = np.where(atoms.pbc, 1.0, np.ptp(along, axis=0) + 2 * cutoff)
    positions, box = atoms.positions - first @ cell, cell * lengths[:, None]
    cells = np.floor(positions @ np.linalg.inv(box))
    return positions - cells @ box, cells, box


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
    centers: Int[Tensor, " n_edges"],
    neighbors: Int[Tensor, " n_edges"],
    shifts: Int[Tensor, "n_edges 3"],
) -> NeighborList:
    """Lay out edges in slots, sorted by neighbour and shift."""
    device = centers.device
    # One number for (i, j, S), in their order. The k-th edge by (i, j, S) is the reverse of the
    # k-th edge by (j, i, -S).
    reach = shifts.abs().amax(0) if len(shifts) else shifts.new_zeros(3)
    width = (2 * reach + 1).tolist()

    def rank(first: Tensor, second: Tensor, shift: Tensor) -> Tensor:
        number = first * n_atoms + second
        for own, n in zip((shift + reach).unbind(1), width, strict=True):
            number = number * n + own
        return number.argsort()

    forward = rank(centers, neighbors, shifts)
    centers, neighbors, shifts = centers[forward], neighbors[forward], shifts[forward]
    backward = rank(neighbors, centers, -shifts)

    counts = torch.bincount(centers, minlength=n_atoms)
    n_slots = max(int(counts.max()), 1)
    first = counts.cumsum(0) - counts
    flat = centers * n_slots + torch.arange(len(centers), device=device) - first[centers]

    everywhere = torch.arange(n_atoms * n_slots, device=device)
    padded_neighbors, padded_reverse = everywhere // n_slots, everywhere.clone()
    padded_shifts = torch.zeros(n_atoms * n_slots, 3, dtype=torch.float64, device=device)
    mask = torch.zeros(n_atoms * n_slots, dtype=torch.bool, device=device)
    padded_neighbors[flat] = neighbors
    padded_shifts[flat] = shifts.double()
    mask[flat] = True
    padded_reverse[flat[backward]] = flat
    shape = (n_atoms, n_slots)
    return NeighborList(
        padded_neighbors.view(shape),
        padded_shifts.view(*shape, 3),
        mask.view(shape),
        padded_reverse.view(shape),
    )


class SkinList:
    """A neighbour list with a Verlet skin, rebuilt only when it could miss a pair.

    Parameters
    ----------
    cutoff
        Å.
    skin
        Å beyond the cutoff. The list stays valid until an atom has moved by half of it. What
        strains atoms and cell alike takes some of it: `skin / (cutoff + skin)` is the compression
        at which nothing is left.
    device
        Where the list is needed.

    Raises
    ------
    ConfigError
        If the skin is negative or not finite.
    """

    def __init__(
        self, cutoff: float, skin: float = 0.5, device: torch.device | str = "cpu"
    ) -> None:
        if not 0 <= skin < math.inf:
            raise ConfigError(f"skin must be a finite length in Å, at least 0, not {skin!r}")
        self.cutoff = cutoff
        self.skin = skin
        self.device = device
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
            self._list = neighbor_list(atoms, self.cutoff + self.skin, self.device)
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
            or not np.isfinite(atoms.cell.array).all()
        ):
            return False
        expected, shrunk = built.positions, 1.0
        if atoms.pbc.any() and not np.array_equal(built.cell.array, atoms.cell.array):
            try:
                with np.errstate(all="ignore"):
                    strain = np.linalg.solve(closed_cell(built), closed_cell(atoms))
                    grown, _, shrunk = np.linalg.svd(strain, compute_uv=False).tolist()
            except np.linalg.LinAlgError:  # vectors that have become parallel
                return False
            if not grown < MAX_GROWTH:
                return False
            expected = expected @ strain
        moved = np.sqrt(((atoms.positions - expected) ** 2).sum(axis=1).max())
        # Two atoms that were beyond the list's reach are no nearer than this now.
        nearest = shrunk * (self.cutoff + self.skin) - 2 * moved
        return bool(nearest >= self.cutoff)  # False for NaN
