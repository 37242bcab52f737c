"""Structures as users bring them, and what their labels would not mean."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from ase.geometry import minkowski_reduce

from orbcalc.config import LabelConfig, ReferenceConfig
from orbcalc.errors import LabelConflictError, LabelError
from orbcalc.labels.database import reading
from orbcalc.labels.reference import GFN2
from orbcalc.labels.store import METADATA, SUFFIXES, LabelStore
from orbcalc.properties import CHARGE_KEY, REF_FORCES, REF_METHOD, SPIN_KEY
from orbcalc.structures import charge_and_multiplicity, read_structures

__all__ = [
    "file_method",
    "is_label_store",
    "look_over",
    "read_sources",
    "warn_of_electrons",
    "warn_of_held_atoms",
    "warn_of_initial_values",
    "warn_of_small_cells",
]

logger = logging.getLogger(__name__)

#: Å; crystals of a shorter period need more k-points than the one that tblite has.
SMALL_CELL = 10.0


def is_label_store(path: str | Path) -> bool:
    """Tell whether a path is an existing label store, rather than another file of structures."""
    path = Path(path)
    if path.suffix not in SUFFIXES or not path.is_file():
        return False
    try:
        with reading(path) as database:
            return METADATA in database.metadata
    except LabelError:
        return False


def read_sources(paths: Iterable[str | Path]) -> list[Atoms]:
    """Read the structures of files and label stores, with the labels, charge and spin they have.

    Forces that constraints have set to zero are warned of.

    Raises
    ------
    StructureError
        If a file cannot be read, or a structure cannot be computed.
    LabelError
        If a label store cannot be read.
    """
    found = [
        atoms
        for path in paths
        for atoms in (
            LabelStore(path, create=False).labelled_atoms()
            if is_label_store(path)
            else read_structures(path)
        )
    ]
    warn_of_held_atoms(found)
    return found


def look_over(structures: Sequence[Atoms], config: LabelConfig) -> LabelConfig:
    """Warn of what labels would not mean; returns the configuration with the method of files.

    Raises
    ------
    LabelConflictError
        See `file_method`.
    """
    warn_of_electrons(structures, config.reference)
    warn_of_initial_values(structures)
    warn_of_small_cells(structures, config)
    return file_method(structures, config)


def warn_of_electrons(structures: Iterable[Atoms], reference: ReferenceConfig) -> None:
    """Tell that a calculator of the user's may not read a charge or a spin of ``atoms.info``."""
    if ":" not in reference.calculator:
        return
    for atoms in structures:
        if charge_and_multiplicity(atoms)[0] != 0 or SPIN_KEY in atoms.info:
            logger.warning(
                "%s has a charge or a spin in atoms.info: GFN1-xTB and the potential read it, "
                "and %s must, too, or its labels are those of another state",
                atoms.get_chemical_formula(),
                reference.calculator,
            )
            return


def warn_of_held_atoms(structures: Iterable[Atoms]) -> None:
    """Tell of forces that are zero because ASE held the atoms: a potential would learn that."""

    def is_held(atoms: Atoms) -> bool:
        fixed = [c.get_indices() for c in atoms.constraints if isinstance(c, FixAtoms)]
        forces = atoms.arrays.get(REF_FORCES)
        if forces is None or not fixed or forces.shape != (len(atoms), 3):
            return False
        return bool(forces.any() and not forces[np.concatenate(fixed)].any())

    held = [atoms for atoms in structures if is_held(atoms)]
    if held:
        logger.warning(
            "%d structures, %s the first, have %s of exactly zero on all atoms that a constraint "
            "holds. Take labels without constraints: atoms.get_forces(apply_constraint=False)",
            len(held),
            held[0].get_chemical_formula(),
            REF_FORCES,
        )


def warn_of_initial_values(structures: Iterable[Atoms]) -> None:
    """Tell that charge and spin are not read from ASE's initial charges and magnetic moments."""

    def is_other(atoms: Atoms) -> bool:
        charge, multiplicity = charge_and_multiplicity(atoms)
        charges, moments = atoms.get_initial_charges(), atoms.get_initial_magnetic_moments()
        is_charge = CHARGE_KEY not in atoms.info and abs(charges.sum() - charge) > 0.5
        # Of a crystal no multiplicity is assumed, and moments of three components have none.
        is_told = SPIN_KEY in atoms.info or moments.ndim > 1 or atoms.pbc.any()
        is_spin = not is_told and abs(abs(moments.sum()) - (multiplicity - 1)) > 0.5
        return bool(is_charge or (is_spin and moments.any()))

    others = [atoms for atoms in structures if is_other(atoms)]
    if others:
        charge, multiplicity = charge_and_multiplicity(others[0])
        logger.warning(
            "%d structures, %s the first, have initial charges or magnetic moments of another "
            "state than is computed (of the first: charge %d, multiplicity %d). They are not read: "
            "set atoms.info['%s'] and atoms.info['%s']",
            len(others),
            others[0].get_chemical_formula(),
            charge,
            multiplicity,
            CHARGE_KEY,
            SPIN_KEY,
        )


def warn_of_small_cells(structures: Iterable[Atoms], config: LabelConfig) -> None:
    """Tell that the GFN methods, if used, see a crystal at the Gamma point alone."""
    if not config.charges and config.reference.calculator != GFN2:
        return

    def period(atoms: Atoms) -> float:
        return float(np.linalg.norm(minkowski_reduce(atoms.cell.array)[0], axis=1).min())

    small = [atoms for atoms in structures if atoms.pbc.all() and period(atoms) < SMALL_CELL]
    if small:
        logger.warning(
            "%d structures, %s the first, have cells that are shorter than %g Å: GFN1-xTB and "
            "GFN2-xTB are computed at the Gamma point alone, and are wrong there. Give supercells",
            len(small),
            small[0].get_chemical_formula(),
            SMALL_CELL,
        )


def file_method(structures: Iterable[Atoms], config: LabelConfig) -> LabelConfig:
    """Let labels that are taken from files keep the name of their method, if all have one.

    Raises
    ------
    LabelConflictError
        If they are of different methods.
    """
    if config.reference.calculator != "file":
        return config
    methods = {str(atoms.info.get(REF_METHOD, "")) for atoms in structures}
    if len(methods - {""}) > 1:
        raise LabelConflictError(
            f"the reference is 'file', but its labels are of different methods: "
            f"{'; '.join(sorted(methods - {''}))}. Take those of one of them."
        )
    method = methods.pop() if len(methods) == 1 else ""
    if not method or config.reference.version is not None:
        return config
    reference = config.reference.model_copy(update={"version": method})
    return config.model_copy(update={"reference": reference})
