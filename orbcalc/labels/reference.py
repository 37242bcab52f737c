"""Reference labels: energy, forces and stress from the method that the potential should match."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError

from orbcalc.config import LabelConfig, ReferenceConfig
from orbcalc.errors import ConfigError, LabelConflictError, LabelError, MissingLabelError
from orbcalc.labels.label import Label, Provenance, Values, attempt
from orbcalc.labels.xtb import XTBSettings, xtb_provenance, xtb_values
from orbcalc.properties import (
    OWN_LABELS,
    REF_ENERGY,
    REF_FORCES,
    REF_STRESS,
)
from orbcalc.structures import structure_key

__all__ = [
    "ReferenceLabeler",
    "carries",
    "check_file_labels",
    "contradiction",
    "file_value",
    "reference_provenance",
    "refuse_unlike_copies",
    "wanted_quantities",
]

logger = logging.getLogger(__name__)

FILE_KEYS = {"energy": REF_ENERGY, "forces": REF_FORCES, "stress": REF_STRESS}
GFN2 = "GFN2-xTB"

#: eV, eV/Å, eV/Å³; labels that differ by less are the same: files are rounded.
LABEL_RESOLUTION = 1e-5


class ReferenceLabeler:
    """Label structures with the calculator of a configuration.

    The calculator is made when the first structure comes, and made anew after a failure. The
    energy is ASE's ``get_potential_energy()``; forces and stress ignore constraints.

    Raises
    ------
    ConfigError
        If the calculator's name or arguments cannot be used.
    LabelError
        If the program behind it is not installed.
    """

    def __init__(self, config: LabelConfig) -> None:
        self.config = config
        self.provenance = reference_provenance(config.reference)
        self._calculator: Any = None

    def label(self, atoms: Atoms) -> Label:
        """Compute one structure; see :func:`orbcalc.labels.label.attempt` for failures.

        Raises
        ------
        LabelError
            If the method does not have a quantity that was asked for, or a file label is missing.
        """
        return attempt(atoms, "reference", self.provenance, self._values)

    def load(self) -> None:
        """Import the program and make the calculator now, not with the first structure.

        Raises
        ------
        ConfigError
            If the calculator cannot be made.
        """
        name = self.config.reference.calculator
        if name == GFN2:
            import tblite.interface  # noqa: F401
        elif name != "file" and self._calculator is None:
            self._calculator = _make_calculator(self.config.reference)

    def _values(self, atoms: Atoms) -> Values:
        wanted = wanted_quantities(atoms, self.config)
        if self.config.reference.calculator == "file":
            return {name: file_value(atoms, name) for name in wanted}
        if self.config.reference.calculator == GFN2:
            settings = _xtb_settings(self.config.reference)
            return xtb_values(
                GFN2, atoms, settings, forces="forces" in wanted, stress="stress" in wanted
            )
        self.load()
        calculator = self._calculator
        try:
            return _ase_values(calculator, atoms, wanted)
        except BaseException as error:
            self._calculator = None  # its state cannot be trusted
            if isinstance(error, PropertyNotImplementedError):
                raise LabelError(
                    f"{self.provenance.program} cannot compute all of {', '.join(wanted)} "
                    f"({error}). Switch forces or stress off in the labels configuration."
                ) from error
            raise
        finally:
            # ASE makes the directory of any calculator, also of one that writes nothing.
            if (directory := getattr(calculator, "directory", None)) is not None:
                with contextlib.suppress(OSError):  # if it is not empty
                    Path(directory).rmdir()


def wanted_quantities(atoms: Atoms, config: LabelConfig) -> tuple[str, ...]:
    """Return what a configuration asks of a structure.

    Stress only where all of space repeats; from a file, also where it has one anyway.
    """
    is_read = config.reference.calculator == "file" and carries(atoms, "stress")
    asked = {
        "energy": True,
        "forces": config.forces,
        "stress": is_read or (config.stress and bool(atoms.pbc.all())),
    }
    return tuple(name for name, is_asked in asked.items() if is_asked)


def reference_provenance(reference: ReferenceConfig) -> Provenance:
    """Name the reference method without loading its program.

    The version is that of the configuration, else of the installed package that holds the
    calculator; a wrapper of an external program cannot know that program's version.

    Raises
    ------
    ConfigError
        If the calculator is not a known name and no import path, or has wrong arguments.
    LabelError
        If a built-in method is not installed.
    """
    name, version = reference.calculator, reference.version
    if name == GFN2:
        own = xtb_provenance(name, _xtb_settings(reference))
        return Provenance(name, own.program, version or own.version, own.settings)
    if name == "file":
        return Provenance("file", "file", version or "unversioned", reference.arguments)
    if name == "pyscf":
        from orbcalc.labels.dft import pyscf_provenance

        own = pyscf_provenance(reference.arguments)
        return Provenance(own.method, own.program, version or own.version, own.settings)
    module = _split_path(name)[0]
    version = version or _package_version(module.partition(".")[0])
    return Provenance(name.rpartition(":")[2], name, version, reference.arguments)


def check_file_labels(structures: Sequence[Atoms], config: LabelConfig) -> None:
    """Check before any work that structures carry the labels that a configuration takes from them.

    Raises
    ------
    MissingLabelError
        If one is missing; the message counts how many structures carry each.
    """
    if config.reference.calculator != "file":
        return
    carried = dict.fromkeys(FILE_KEYS, 0)
    asked = dict.fromkeys(FILE_KEYS, 0)
    first: dict[str, int] = {}
    for number, atoms in enumerate(structures):
        for name in wanted_quantities(atoms, config):
            asked[name] += 1
            has = _raw_file_value(atoms, name) is not None
            carried[name] += has
            if not has:
                first.setdefault(name, number)
    if first:
        census = ", ".join(
            f"{FILE_KEYS[name]}: {carried[name]} of {count}"
            for name, count in asked.items()
            if count
        )
        name, number = next(iter(first.items()))
        raise MissingLabelError(
            f"the reference is 'file', but not all structures carry their labels ({census}; "
            f"structure {number}, {structures[number].get_chemical_formula()}, is the first "
            f"without {FILE_KEYS[name]}). Add them, or switch that quantity off under labels. "
            f"{OWN_LABELS}"
        )


def _ase_values(calculator: Any, atoms: Atoms, wanted: Sequence[str]) -> Values:
    """Ask an ASE calculator, in the units of ASE, which are ours."""
    if hasattr(calculator, "reset"):
        calculator.reset()  # ASE's cache does not see a charge in atoms.info
    structure = atoms.copy()
    structure.calc = calculator
    values: Values = {"energy": float(structure.get_potential_energy())}
    if "forces" in wanted:
        values["forces"] = np.array(structure.get_forces(apply_constraint=False), dtype=float)
    if "stress" in wanted:
        values["stress"] = np.array(structure.get_stress(apply_constraint=False), dtype=float)
    return values


def _raw_file_value(atoms: Atoms, name: str) -> Any:
    return (atoms.arrays if name == "forces" else atoms.info).get(FILE_KEYS[name])


def carries(atoms: Atoms, name: str) -> bool:
    """Tell whether a structure came with an energy, forces or stress; what is no number is none."""
    raw = _raw_file_value(atoms, name)
    try:
        return raw is not None and bool(np.isfinite(np.array(raw, dtype=float)).all())
    except (TypeError, ValueError):
        return False


def file_value(atoms: Atoms, name: str) -> float | np.ndarray:
    """Return the energy (eV), forces (eV/Å) or stress (eV/Å³, Voigt) that a structure came with.

    Raises
    ------
    MissingLabelError
        If it has none.
    LabelError
        If it has a wrong shape.
    """
    raw, key = _raw_file_value(atoms, name), FILE_KEYS[name]
    if raw is None:
        raise MissingLabelError(
            f"{atoms.get_chemical_formula()} carries no {key}, but the reference is 'file'. "
            f"Add it, or switch that quantity off under labels."
        )
    value = np.array(raw, dtype=float)
    if name == "stress" and value.size == 9:
        value = value.ravel()[[0, 4, 8, 5, 2, 1]]
    shape = {"energy": (), "forces": (len(atoms), 3), "stress": (6,)}[name]
    if value.shape != shape:
        raise LabelError(
            f"{key} of {atoms.get_chemical_formula()} must have shape {shape}, got {value.shape}"
        )
    return float(value) if name == "energy" else value


def contradiction(one: Atoms, other: Atoms, names: Iterable[str] = FILE_KEYS) -> str | None:
    """Return a quantity that two copies of a structure both came with, and not the same.

    Raises
    ------
    LabelError
        If one has a wrong shape.
    """
    for name in names:
        if carries(one, name) and carries(other, name):
            values = file_value(one, name), file_value(other, name)
            if not np.allclose(*values, rtol=0, atol=LABEL_RESOLUTION):
                return name
    return None


def refuse_unlike_copies(structures: Iterable[Atoms], config: LabelConfig) -> dict[str, Atoms]:
    """Return structures by key, and refuse copies of one that came with unlike labels.

    Raises
    ------
    LabelConflictError
        Naming the first pair.
    """
    unique: dict[str, Atoms] = {}
    for atoms in structures:
        known = unique.setdefault(structure_key(atoms), atoms)
        if known is not atoms:
            name = contradiction(known, atoms, wanted_quantities(atoms, config))
            if name is not None:
                raise LabelConflictError(
                    f"{atoms.get_chemical_formula()} is there twice, with unlike labels ({name}). "
                    f"Leave one of them out."
                )
    return unique


def _xtb_settings(reference: ReferenceConfig) -> XTBSettings:
    try:
        return XTBSettings(**reference.arguments)
    except TypeError:
        known = ", ".join(XTBSettings.__dataclass_fields__)
        raise ConfigError(
            f"reference.arguments of {GFN2}: known are {known}; got "
            f"{', '.join(reference.arguments)}"
        ) from None


def _make_calculator(reference: ReferenceConfig) -> Any:
    """Make the calculator; whatever goes wrong here would do so for every structure."""
    try:
        if reference.calculator == "pyscf":
            from orbcalc.labels.dft import PySCFCalculator

            return PySCFCalculator(**reference.arguments)
        module, name = _split_path(reference.calculator)
        calculator = getattr(importlib.import_module(module), name)(**reference.arguments)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"reference.calculator {reference.calculator!r} with arguments "
            f"{reference.arguments} cannot be made: {type(error).__name__}: {error}"
        ) from error
    if getattr(calculator, "directory", None) is not None:
        # Workers that share a directory would read each other's files.
        own = f"label-{socket.gethostname()}-{os.getpid()}"
        calculator.directory = str(Path(calculator.directory) / own)
    return calculator


def _split_path(path: str) -> tuple[str, str]:
    module, _, name = path.partition(":")
    if not module or not name.isidentifier():
        raise ConfigError(
            f"reference.calculator {path!r} is unknown: give '{GFN2}', 'pyscf', 'file' or the "
            f"import path of an ASE calculator, 'package.module:Name'"
        )
    return module, name


@cache
def _package_version(top_level: str) -> str:
    names = metadata.packages_distributions().get(top_level, ())
    return ", ".join(f"{name} {metadata.version(name)}" for name in sorted(set(names))) or (
        "unversioned"
    )
