"""A batch of structures as tensors: what a potential reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from orbcalc.neighbors import NeighborList, neighbor_list
from orbcalc.structures import charge_and_multiplicity, has_volume

__all__ = [
    "AtomGraph",
    "Neighborhood",
    "atoms_at_once",
    "gather_neighbors",
    "part_size",
    "sum_reverse",
]

#: Atoms in one batch, or one part of many: few enough for the caches of a CPU (measured: half the
#: time of 4,000). A GPU needs more to be busy; twice as many, the most that are evaluated at once,
#: take 2.5 GiB (`medium`, 59 neighbours).
PART_ATOMS = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True)
class Neighborhood:
    """The neighbours of some of the atoms of a graph, counted in the whole of it."""

    neighbors: Int[Tensor, "n_some n_slots"]
    mask: Bool[Tensor, "n_some n_slots"]


@dataclass(frozen=True)
class AtomGraph:
    """One or more structures with their neighbours, in the padded layout of `neighbors`.

    Geometry is float64 always, so that neither large coordinates nor sums lose digits; a
    potential casts edge vectors to its own dtype.
    """

    numbers: Int[Tensor, " n_atoms"]
    positions: Float[Tensor, "n_atoms 3"]
    neighbors: Int[Tensor, "n_atoms n_slots"]
    shifts: Float[Tensor, "n_atoms n_slots 3"]
    mask: Bool[Tensor, "n_atoms n_slots"]
    reverse: Int[Tensor, "n_atoms n_slots"]
    structure_index: Int[Tensor, " n_atoms"]
    cell: Float[Tensor, "n_structures 3 3"]
    is_periodic: Bool[Tensor, " n_structures"]
    """Periodic in some direction, in a cell with a volume: stress is defined (as ASE does)."""
    charge: Float[Tensor, " n_structures"]
    unpaired: Float[Tensor, " n_structures"]
    """Number of unpaired electrons, multiplicity - 1."""

    @classmethod
    def from_atoms(
        cls, atoms: Atoms, cutoff: float, neighbors: NeighborList | None = None
    ) -> AtomGraph:
        """Build the graph of one structure.

        Parameters
        ----------
        atoms
            Checked structure (see `structures.check_structure`).
        cutoff
            Å; pairs beyond it may be present, the potential gives them no weight.
        neighbors
            A list that is valid for these atoms; made anew by default.
        """
        neighbors = neighbors or neighbor_list(atoms, cutoff)
        charge, multiplicity = charge_and_multiplicity(atoms)
        return cls(
            numbers=torch.as_tensor(atoms.numbers, dtype=torch.int64),
            positions=torch.tensor(atoms.positions, dtype=torch.float64),
            neighbors=neighbors.neighbors,
            shifts=neighbors.shifts,
            mask=neighbors.mask,
            reverse=neighbors.reverse,
            structure_index=torch.zeros(len(atoms), dtype=torch.int64),
            cell=torch.tensor(np.array(atoms.cell.array), dtype=torch.float64)[None],
            is_periodic=torch.tensor([has_volume(atoms)]),
            charge=torch.tensor([charge], dtype=torch.float64),
            unpaired=torch.tensor([multiplicity - 1], dtype=torch.float64),
        )

    @classmethod
    def batch(cls, graphs: Sequence[AtomGraph]) -> AtomGraph:
        """Join graphs into one; structures keep their order and never see each other."""
        if len(graphs) == 1:
            return graphs[0]
        n_slots = max(graph.n_slots for graph in graphs)
        joined: dict[str, list[Tensor]] = {field.name: [] for field in fields(cls)}
        first_atom = first_structure = 0
        for graph in graphs:
            moved = graph._with_slots(n_slots)
            for name, value in vars(moved).items():
                joined[name].append(value)
            joined["neighbors"][-1] = moved.neighbors + first_atom
            joined["reverse"][-1] = moved.reverse + first_atom * n_slots
            joined["structure_index"][-1] = moved.structure_index + first_structure
            first_atom += graph.n_atoms
            first_structure += graph.n_structures
        return cls(**{name: torch.cat(values) for name, values in joined.items()})

    @property
    def n_atoms(self) -> int:
        """Number of atoms of all structures."""
        return self.numbers.shape[0]

    @property
    def n_slots(self) -> int:
        """Number of neighbour slots of each atom."""
        return self.neighbors.shape[1]

    @property
    def n_structures(self) -> int:
        """Number of structures."""
        return self.cell.shape[0]

    @property
    def n_atoms_of_structure(self) -> Int[Tensor, " n_structures"]:
        """Number of atoms of each structure."""
        return self.sum_over_atoms(torch.ones_like(self.structure_index))

    def edge_vectors(self) -> Float[Tensor, "n_atoms n_slots 3"]:
        """Return the vector from each atom to each of its neighbours, Å; arbitrary if unused."""
        vectors = self.positions[self.neighbors] - self.positions[:, None]
        return vectors + self.shifts @ self.cell[self.structure_index]

    def closest(self) -> tuple[int, int, float]:
        """Return the closest two atoms that are neighbours (or images of one), and how far, Å."""
        squares = self.edge_vectors().square().sum(-1).masked_fill(~self.mask, torch.inf)
        least, place = squares.flatten().min(0)
        i, slot = divmod(int(place), self.n_slots)
        return i, int(self.neighbors[i, slot]), float(least.sqrt())

    def sum_over_atoms(self, values: Shaped[Tensor, " n_atoms *rest"]) -> Tensor:
        """Sum a quantity of the atoms of each structure, (n_structures, *rest)."""
        total = values.new_zeros(self.n_structures, *values.shape[1:])
        return total.index_add(0, self.structure_index, values)

    def parts(self, size: int) -> list[Neighborhood]:
        """Cut the atoms into parts of a size."""
        pairs = zip(self.neighbors.split(size), self.mask.split(size), strict=True)
        return [Neighborhood(neighbors, mask) for neighbors, mask in pairs]

    def to(self, device: torch.device | str) -> AtomGraph:
        """Move every tensor to a device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items()}
        return replace(self, **moved)

    def _with_slots(self, n_slots: int) -> AtomGraph:
        """Return the same graph with more (unused) slots."""
        if n_slots == self.n_slots:
            return self
        n_more = n_slots - self.n_slots
        device = self.neighbors.device
        own = torch.arange(self.n_atoms, device=device)[:, None]
        unused = own * n_slots + torch.arange(self.n_slots, n_slots, device=device)
        # A flat index j * old + slot becomes j * new + slot.
        reverse = self.reverse + self.reverse // self.n_slots * n_more
        return replace(
            self,
            neighbors=torch.cat([self.neighbors, own.expand(-1, n_more)], 1),
            shifts=torch.cat([self.shifts, self.shifts.new_zeros(self.n_atoms, n_more, 3)], 1),
            mask=torch.cat([self.mask, self.mask.new_zeros(self.n_atoms, n_more)], 1),
            reverse=torch.cat([reverse, unused], 1),
        )


def atoms_at_once(device: torch.device) -> int:
    """Return how many atoms a device works on best."""
    return PART_ATOMS.get(device.type, PART_ATOMS["cpu"])


def part_size(atoms: Tensor) -> int:
    """Return how many atoms (the first axis) to work on at a time: all, unless they are many."""
    few = atoms_at_once(atoms.device)
    return few if len(atoms) > 2 * few else max(len(atoms), 1)


def gather_neighbors(
    values: Float[Tensor, " n_atoms *rest"], graph: AtomGraph | Neighborhood
) -> Float[Tensor, "n_some n_slots *rest"]:
    """Fetch a quantity of the atoms to every slot where they are the neighbour.

    In a part of a graph, where the reverse of an edge may be elsewhere, the derivative is a
    scatter.
    """
    gathered: Tensor
    if isinstance(graph, AtomGraph):
        gathered = _apply(_Gather, values, graph.neighbors, graph.reverse, graph.mask)
    else:
        rows = values.index_select(0, graph.neighbors.flatten())
        gathered = rows.view(*graph.neighbors.shape, *values.shape[1:])
    return gathered


def sum_reverse(
    values: Float[Tensor, "n_atoms n_slots *rest"], graph: AtomGraph
) -> Float[Tensor, " n_atoms *rest"]:
    """Sum, for every atom, what the slots that point at it hold: the transpose of a gather."""
    total: Tensor = _apply(_SumReverse, values, graph.neighbors, graph.reverse, graph.mask)
    return total


# Autograd's own transpose of an index is a scatter: slow on CPU, not deterministic on GPU.
# Each of these two is the derivative of the other, to any order. Values in unused slots must
# not matter, which the mask in _SumReverse enforces.
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, *edges: Tensor) -> Tensor:
        ctx.save_for_backward(*edges)
        return values[edges[0]]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _apply(_SumReverse, gradients[0], *ctx.saved_tensors), None, None, None


class _SumReverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, *edges: Tensor) -> Tensor:
        ctx.save_for_backward(*edges)
        _, reverse, mask = edges
        incoming = values.flatten(0, 1)[reverse]
        return (incoming * mask.reshape(*mask.shape, *[1] * (values.dim() - 2))).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _, _, mask = ctx.saved_tensors
        spread = _apply(_Gather, gradients[0], *ctx.saved_tensors)
        mask = mask.reshape(*mask.shape, *[1] * (spread.dim() - 2))
        return spread * mask, None, None, None


def _apply(function: type[torch.autograd.Function], *tensors: Tensor) -> Any:
    return function.apply(*tensors)
