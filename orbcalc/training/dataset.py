"""Labelled structures as graphs and targets; what is absent is NaN, never zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from jaxtyping import Float
from torch import Tensor

from orbcalc.errors import LabelError, MissingLabelError
from orbcalc.graph import AtomGraph
from orbcalc.model.potential import Potential
from orbcalc.orbitals import BLOCK_DIM
from orbcalc.properties import (
    OWN_LABELS,
    REF_ENERGY,
    REF_FORCES,
    REF_STRESS,
    XTB_BLOCKS,
    XTB_ENERGY,
    XTB_FORCES,
    XTB_SHELLS,
)
from orbcalc.structures import check_structure, has_volume

__all__ = ["LabelDataset", "Targets", "on_device", "shells_of_elements"]

#: File key and remedy of the labels of each task.
_SOURCES = {
    "energy": (REF_ENERGY, "orbcalc label --reference METHOD"),
    "forces": (REF_FORCES, "orbcalc label --reference METHOD"),
    "stress": (REF_STRESS, "orbcalc label --reference METHOD"),
    "charges": (XTB_BLOCKS, "orbcalc label"),
    "xtb_energy": (XTB_ENERGY, "orbcalc label"),
    "xtb_forces": (XTB_FORCES, "orbcalc label"),
}


@dataclass(frozen=True)
class Targets:
    """Labels of a batch; NaN where a structure or atom has none."""

    energy: Float[Tensor, " n_structures"]
    """eV."""
    forces: Float[Tensor, "n_atoms 3"]
    """eV/Å."""
    stress: Float[Tensor, "n_structures 3 3"]
    """eV/Å³; NaN without a volume."""
    charges: Float[Tensor, "n_atoms 23"]
    """Charge blocks as irreps, e."""
    xtb_energy: Float[Tensor, " n_structures"]
    """GFN1-xTB, eV."""
    xtb_forces: Float[Tensor, "n_atoms 3"]
    """GFN1-xTB, eV/Å."""

    @classmethod
    def from_atoms(cls, atoms: Atoms) -> Targets:
        """Read the labels of one structure.

        Raises
        ------
        LabelError
            If a label has the wrong shape or is infinite.
        """
        n_atoms = len(atoms)
        stress = _read(atoms, REF_STRESS, atoms.info, (6,), (3, 3))
        full = voigt_6_to_full_3x3_stress(stress) if stress.shape == (6,) else stress
        if not has_volume(atoms):  # a molecule may well come with zeros
            full = np.full((3, 3), np.nan)
        return cls(
            energy=torch.from_numpy(_read(atoms, REF_ENERGY, atoms.info, ())).reshape(1),
            forces=torch.from_numpy(_read(atoms, REF_FORCES, atoms.arrays, (n_atoms, 3))),
            stress=torch.from_numpy(np.ascontiguousarray(full))[None],
            charges=torch.from_numpy(_read(atoms, XTB_BLOCKS, atoms.arrays, (n_atoms, BLOCK_DIM))),
            xtb_energy=torch.from_numpy(_read(atoms, XTB_ENERGY, atoms.info, ())).reshape(1),
            xtb_forces=torch.from_numpy(_read(atoms, XTB_FORCES, atoms.arrays, (n_atoms, 3))),
        )

    @classmethod
    def batch(cls, targets: Sequence[Targets]) -> Targets:
        """Join the targets of several structures."""
        joined = {f.name: torch.cat([getattr(t, f.name) for t in targets]) for f in fields(cls)}
        return cls(**joined)

    def to(self, device: torch.device | str) -> Targets:
        """Move every tensor to a device."""
        return Targets(**{name: value.to(device) for name, value in vars(self).items()})

    def above_xtb(self) -> Targets:
        """Return energy and forces as differences from GFN1-xTB, which has no labels of stress."""
        return replace(
            self,
            energy=self.energy - self.xtb_energy,
            forces=self.forces - self.xtb_forces,
            stress=torch.full_like(self.stress, torch.nan),
        )

    def has(self, task: str) -> bool:
        """Tell whether any label of a task is there."""
        return bool(torch.isfinite(getattr(self, task)).any())


class LabelDataset:
    """Graphs and targets of labelled structures, made once and kept.

    Parameters
    ----------
    structures
        Labels under the keys of `orbcalc.properties`.
    cutoff
        Of the neighbour lists, Å.
    baseline
        Of the potential: what energies and forces are differences from.

    Raises
    ------
    StructureError
        If a structure cannot be computed.
    LabelError
        If a label has the wrong shape or is infinite.
    MissingLabelError
        If a structure has a reference label, but none of the baseline.
    """

    def __init__(
        self,
        structures: Iterable[Atoms],
        cutoff: float,
        baseline: Literal["none", "GFN1-xTB"] = "none",
    ) -> None:
        self.graphs: list[AtomGraph] = []
        self.targets: list[Targets] = []
        self.shells: dict[int, tuple[int, ...]] = {}
        for number, atoms in enumerate(structures):
            check_structure(atoms, f"structure {number}")
            self.graphs.append(AtomGraph.from_atoms(atoms, cutoff))
            targets = Targets.from_atoms(atoms)
            if baseline != "none":
                _require_baseline(atoms, targets)
                targets = targets.above_xtb()
            self.targets.append(targets)
            self.shells |= shells_of_elements(atoms)

    def __len__(self) -> int:
        """Return the number of structures."""
        return len(self.graphs)

    @cached_property
    def elements(self) -> list[int]:
        """Atomic numbers that occur, sorted."""
        return sorted({int(z) for graph in self.graphs for z in graph.numbers.unique()})

    @cached_property
    def element_counts(self) -> Float[Tensor, "n_structures n_elements"]:
        """How many atoms of each element every structure has."""
        rows = [torch.bincount(g.numbers, minlength=119)[self.elements] for g in self.graphs]
        return torch.stack(rows).double()

    def is_varied(self, among: Sequence[int]) -> bool:
        """Tell whether some of the structures, lone atoms aside, differ in composition."""
        counts = self.element_counts[list(among)]
        return len(counts[counts.sum(1) > 1].unique(dim=0)) > 1

    def mean_n_atoms(self, among: Sequence[int]) -> float:
        """Return the atoms of a structure, on average."""
        return float(self.element_counts[list(among)].sum(1).mean())

    def with_elements(self, elements: Sequence[int]) -> LabelDataset:
        """Return the same structures as those of a potential that covers these elements."""
        found = copy(self)
        found.__dict__.pop("element_counts", None)
        found.elements = sorted(elements)
        return found

    def with_energies(self, energies: Iterable[Float[Tensor, " 1"]]) -> LabelDataset:
        """Return the same structures with other energies, eV; NaN for none."""
        found = copy(self)
        pairs = zip(self.targets, energies, strict=True)
        found.targets = [replace(targets, energy=energy) for targets, energy in pairs]
        return found

    def labelled(self, tasks: Iterable[str]) -> list[int]:
        """Return the structures that have a label of any of these tasks."""
        wanted = list(tasks)
        return [i for i, t in enumerate(self.targets) if any(t.has(task) for task in wanted)]

    def batch(self, indices: Iterable[int]) -> tuple[AtomGraph, Targets]:
        """Join some structures into one batch."""
        chosen = list(indices)
        graph = AtomGraph.batch([self.graphs[i] for i in chosen])
        return graph, Targets.batch([self.targets[i] for i in chosen])

    def batches(
        self, size: int, among: Sequence[int] | None = None
    ) -> Iterable[tuple[AtomGraph, Targets]]:
        """Go through all structures, or some of them, in order."""
        chosen = range(len(self)) if among is None else among
        for start in range(0, len(chosen), size):
            yield self.batch(chosen[start : start + size])

    def census(self) -> dict[str, int]:
        """Count the structures that carry each label."""
        return {task: sum(t.has(task) for t in self.targets) for task in _SOURCES}

    def require(self, tasks: Iterable[str]) -> None:
        """Check that every one of these tasks has labels.

        Raises
        ------
        MissingLabelError
            With a census of what is there.
        """
        census = self.census()
        missing = [task for task in tasks if census[task] == 0]
        if not missing:
            return
        found = ", ".join(f"{task} {count}" for task, count in census.items())
        remedy = "; ".join(
            f"task '{task}' needs {_SOURCES[task][0]} (make it with `{_SOURCES[task][1]}`)"
            for task in missing
        )
        raise MissingLabelError(
            f"the training set ({len(self)} structures) has labels for: {found}. {remedy}; "
            f"or set `tasks: {{{missing[0]}: 0}}`. {OWN_LABELS}"
        )


def on_device(
    dataset: LabelDataset,
    potential: Potential,
    among: Sequence[int] | None = None,
    *,
    size: int = 32,
) -> Iterator[tuple[AtomGraph, Targets]]:
    """Go through a data set, or some of it, in batches, on the device of a potential."""
    device = potential.element_index.device
    for graph, targets in dataset.batches(size, among):
        yield graph.to(device), targets.to(device)


def shells_of_elements(atoms: Atoms) -> dict[int, tuple[int, ...]]:
    """Read the angular momenta of each element's GFN1 shells, written beside the blocks.

    Returns
    -------
    dict
        Empty for a structure without blocks.

    Raises
    ------
    LabelError
        If blocks are there without shells.
    """
    if XTB_BLOCKS not in atoms.arrays:
        return {}
    if XTB_SHELLS not in atoms.arrays:
        raise LabelError(
            f"{atoms.get_chemical_formula()} has {XTB_BLOCKS}, but not {XTB_SHELLS}. "
            f"Label it again with `orbcalc label`."
        )
    table = atoms.arrays[XTB_SHELLS].astype(int).reshape(len(atoms), -1)
    return {
        int(number): tuple(int(momentum) for momentum in row if momentum >= 0)
        for number, row in zip(atoms.numbers, table, strict=True)
    }


def _require_baseline(atoms: Atoms, targets: Targets) -> None:
    for task in ("energy", "forces"):
        if targets.has(task) and not targets.has(f"xtb_{task}"):
            key, remedy = _SOURCES[f"xtb_{task}"]
            raise MissingLabelError(
                f"{atoms.get_chemical_formula()} has {_SOURCES[task][0]}, but no {key}, above "
                f"which `baseline: GFN1-xTB` learns. Make it with `{remedy}`."
            )


def _read(
    atoms: Atoms, key: str, source: Mapping[str, Any], *shapes: tuple[int, ...]
) -> np.ndarray:
    """Return a label as float64, NaN if it is absent."""
    if source.get(key) is None:
        return np.full(shapes[0], np.nan)
    try:
        value = np.array(source[key], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise LabelError(f"{key} of {atoms.get_chemical_formula()} is not numeric") from error
    if len(shapes) > 1 and value.shape == (9,):  # extxyz writes 3 x 3 flat
        value = value.reshape(3, 3)
    if value.shape not in shapes:
        raise LabelError(
            f"{key} of {atoms.get_chemical_formula()} has shape {value.shape}, expected {shapes[0]}"
        )
    if np.isinf(value).any():
        raise LabelError(f"{key} of {atoms.get_chemical_formula()} is infinite")
    return value
