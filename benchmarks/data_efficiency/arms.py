"""The arms: what each learns besides the energies of the labelled structures.

All have the same size of model, steps and optimiser. An arm is a few changes of the
configuration and a function that prepares the charge labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms
from sets import DFT_CHARGES

from orbcalc.config import TaskWeights
from orbcalc.orbitals import BLOCK_DIM, SLOTS, atomic_charges
from orbcalc.properties import XTB_BLOCKS, XTB_SHELLS

__all__ = ["ARMS", "FAMILIES", "WEIGHT", "Arm", "shuffle_blocks"]

#: Of the cheap tasks: the package's own, where no forces are learned.
WEIGHT = TaskWeights(forces=0).charges

EQUIVARIANT = {"charge_head": "equivariant"}
INVARIANT = {"charge_head": "invariant"}
COMPUTED = {"baseline": "GFN1-xTB"}


def atoms_only(atoms: Atoms) -> None:
    """Replace blocks by GFN1 atomic charges."""
    if XTB_BLOCKS in atoms.arrays:
        _store_atomic(atoms, atomic_charges(atoms.arrays[XTB_BLOCKS]))


def dft_atoms_only(atoms: Atoms) -> None:
    """Replace blocks by atomic charges of the expensive method."""
    _store_atomic(atoms, atoms.arrays[DFT_CHARGES])


def shells_only(atoms: Atoms) -> None:
    """Make blocks spherical: each orbital of a shell has the same share of its charge."""
    if XTB_BLOCKS in atoms.arrays:
        blocks = atoms.arrays[XTB_BLOCKS]
        for slot in SLOTS:
            anisotropic = blocks[:, slot.columns][:, 1:]
            anisotropic[np.isfinite(anisotropic)] = 0.0


def _store_atomic(atoms: Atoms, charges: np.ndarray) -> None:
    """Write atomic charges as the blocks of atoms that have a single s shell."""
    blocks = np.full((len(atoms), BLOCK_DIM), np.nan)
    blocks[:, 0] = charges
    atoms.arrays[XTB_BLOCKS] = blocks
    atoms.arrays[XTB_SHELLS] = np.tile([0, -1, -1], (len(atoms), 1))


def shuffle_blocks(structures: Sequence[Atoms], seed: int) -> None:
    """Permute blocks among the atoms of the same element of all structures."""
    labelled = [atoms for atoms in structures if XTB_BLOCKS in atoms.arrays]
    numbers = np.concatenate([atoms.numbers for atoms in labelled])
    blocks = np.concatenate([atoms.arrays[XTB_BLOCKS] for atoms in labelled])
    rng = np.random.default_rng(seed)
    for number in np.unique(numbers):
        own = np.flatnonzero(numbers == number)
        blocks[own] = blocks[rng.permutation(own)]
    ends = np.cumsum([len(atoms) for atoms in labelled])[:-1]
    for atoms, part in zip(labelled, np.split(blocks, ends), strict=True):
        atoms.arrays[XTB_BLOCKS] = part


@dataclass(frozen=True)
class Arm:
    """What one arm learns, and from what."""

    text: str
    potential: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the architecture; without any there is a head for the energy alone."""
    tasks: tuple[str, ...] = ()
    """Cheap tasks, all with the weight of the arm."""
    charges: Callable[[Atoms], None] | None = None
    """Changes the charge labels of a structure."""
    pool: bool = False
    """Learn the cheap tasks from the whole pool, not from the labelled structures alone."""
    dft: bool = False
    """Its charges are expensive labels, too."""
    shuffled: bool = False
    reads_charges: bool = False
    """The energy head reads the predicted charges."""

    @property
    def needs_xtb(self) -> bool:
        """Whether GFN1-xTB is computed at inference."""
        return "baseline" in self.potential

    @property
    def is_process(self) -> bool:
        """Whether cheap labels are learned before all others."""
        return self.potential.get("energy_head") == "process"


def _xtb(head: str, blocks: bool) -> dict[str, Any]:
    return {"xtb_head": head, **(EQUIVARIANT if blocks else {})}


_ENERGY, _FORCES = ("xtb_energy",), ("xtb_energy", "xtb_forces")

ARMS: dict[str, Arm] = {
    "1": Arm("energy only"),
    "2": Arm("+ GFN1 atomic charges", INVARIANT, ("charges",), atoms_only),
    "3": Arm("+ GFN1 shell charges", INVARIANT, ("charges",), shells_only),
    "4": Arm("+ GFN1 AO charges, invariant head", INVARIANT, ("charges",)),
    "5": Arm("+ GFN1 blocks, equivariant head", EQUIVARIANT, ("charges",)),
    "6": Arm("+ DFT atomic charges", INVARIANT, ("charges",), dft_atoms_only, dft=True),
    "7": Arm("+ GFN1 blocks of the pool", EQUIVARIANT, ("charges",), pool=True),
    "8": Arm("+ GFN1 energies of the pool", _xtb("task", False), _ENERGY, pool=True),
    "8b": Arm(
        "+ GFN1 energies and blocks of the pool",
        _xtb("task", True),
        ("charges", *_ENERGY),
        pool=True,
    ),
    "8f": Arm("+ GFN1 energies and forces of the pool", _xtb("task", False), _FORCES, pool=True),
    "8bf": Arm(
        "+ GFN1 energies, forces and blocks of the pool",
        _xtb("task", True),
        ("charges", *_FORCES),
        pool=True,
    ),
    "9": Arm("as 5, the energy reads the charges", EQUIVARIANT, ("charges",), reads_charges=True),
    "9p": Arm(
        "as 7, the energy reads the charges",
        EQUIVARIANT,
        ("charges",),
        pool=True,
        reads_charges=True,
    ),
    "10": Arm("as 5, blocks shuffled (control)", EQUIVARIANT, ("charges",), shuffled=True),
    "11": Arm("Δ on GFN1, xTB at inference", COMPUTED),
    "11b": Arm("as 11, + GFN1 blocks", {**COMPUTED, **EQUIVARIANT}, ("charges",)),
    "11p": Arm(
        "as 11, + GFN1 blocks of the pool", {**COMPUTED, **EQUIVARIANT}, ("charges",), pool=True
    ),
    "12": Arm("surrogate Δ", _xtb("baseline", False), _ENERGY, pool=True),
    "12b": Arm(
        "surrogate Δ + blocks of the pool",
        _xtb("baseline", True),
        ("charges", *_ENERGY),
        pool=True,
    ),
    "12br": Arm(
        "as 12b, the difference reads the charges",
        _xtb("baseline", True),
        ("charges", *_ENERGY),
        pool=True,
        reads_charges=True,
    ),
    "12f": Arm("surrogate Δ + forces of the pool", _xtb("baseline", False), _FORCES, pool=True),
    "12bf": Arm(
        "surrogate Δ + blocks and forces of the pool",
        _xtb("baseline", True),
        ("charges", *_FORCES),
        pool=True,
    ),
    "13": Arm(
        "surrogate Δ + blocks of the pool, difference by a process",
        {**_xtb("baseline", True), "energy_head": "process"},
        ("charges", *_ENERGY),
        pool=True,
    ),
    "13e": Arm(
        "as 13, without blocks",
        {**_xtb("baseline", False), "energy_head": "process"},
        _ENERGY,
        pool=True,
    ),
}

#: Panels of the figure.
FAMILIES = {
    "charges of the labelled structures": ("1", "2", "3", "4", "5", "6", "9", "10"),
    "cheap labels of the pool": ("1", "7", "9p", "8", "8b", "8f", "8bf"),
    "on top of GFN1-xTB": (
        "1",
        "11",
        "11b",
        "11p",
        "12",
        "12b",
        "12br",
        "12f",
        "12bf",
        "13",
        "13e",
    ),
}
