"""GFN1-xTB orbital charges, and energies of the GFN methods, from tblite.

Shells come from the maps of tblite's calculator and reference occupations from the
parametrisation that tblite exports: nothing is tabulated here. Atomic units end in this module.

tblite is imported when it is needed: processes that only handle labels may hold torch, and both
in one process have disturbed each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import (
    CalculationFailed,
    Calculator,
    InputError,
    SCFError,
    all_changes,
)
from ase.data import atomic_numbers
from ase.units import Bohr, Hartree, kB
from jaxtyping import Float, Int

from orbcalc.errors import LabelError, UnsupportedElementError
from orbcalc.labels.label import Label, Provenance, Values, attempt
from orbcalc.orbitals import Block, atomic_charges, encode_blocks, shell_table
from orbcalc.properties import CHARGE_KEY, SPIN_KEY
from orbcalc.structures import charge_and_multiplicity

__all__ = [
    "OrbitalChargeLabeler",
    "XTBSettings",
    "check_determinism",
    "element_shells",
    "make_ase_calculator",
    "reference_occupations",
    "xtb_provenance",
    "xtb_values",
]

#: The GFN methods are parametrised up to radon.
MAX_ATOMIC_NUMBER = 86

#: Elements with an open f shell in the core: multiplicities are not those of valence electrons.
OPEN_F_CORE = range(58, 71)


@dataclass(frozen=True)
class XTBSettings:
    """Numerical settings of a GFN calculation; the names are those of ``tblite.ase.TBLite``.

    tblite's own accuracy of 1 left charges of iron complexes with an error of 4e-5 e, 0.01 with
    3e-7 e, in about a tenth more time.
    """

    accuracy: float = 0.01
    electronic_temperature: float = 300.0
    max_iterations: int = 250


class OrbitalChargeLabeler:
    """Label structures with GFN1-xTB: energy, forces, and the charge block of every shell.

    Values: ``energy`` (eV), ``forces`` (n_atoms, 3) (eV/Å), ``orbital_blocks`` (n_atoms, 23) (e,
    see :mod:`orbcalc.orbitals`) and ``shells`` (n_atoms, 3), their angular
    momenta in tblite's order, filled up with -1. Molecules and three-dimensional crystals (at the
    Gamma point), with any charge and multiplicity.

    GFN1-xTB knows no spin: a multiplicity only fills the orbitals, and where a lanthanide has f
    electrons, which are in its core, the lowest one is taken.
    """

    def __init__(self, settings: XTBSettings | None = None) -> None:
        self.settings = settings or XTBSettings()
        self.provenance = xtb_provenance("GFN1-xTB", self.settings)

    def label(self, atoms: Atoms) -> Label:
        """Compute one structure; see :func:`orbcalc.labels.label.attempt` for failures."""
        return attempt(atoms, "charges", self.provenance, self._values)

    def _values(self, atoms: Atoms) -> Values:
        calculator, result = _singlepoint("GFN1-xTB", atoms, self.settings)
        shells = _shells_of_atoms(calculator)
        blocks = encode_blocks(_charge_blocks(calculator, result, atoms.numbers, shells), shells)
        _check_charges(blocks, np.atleast_1d(result["charges"]), atoms)
        values = _energy_and_derivatives(result, atoms, forces=True, stress=False)
        return values | {"orbital_blocks": blocks, "shells": shell_table(shells)}


def xtb_provenance(method: str, settings: XTBSettings) -> Provenance:
    """Name a GFN method as computed by the installed tblite, without importing it.

    Raises
    ------
    LabelError
        If tblite is not installed.
    """
    try:
        version = metadata.version("tblite")
    except metadata.PackageNotFoundError:
        raise LabelError(
            f"{method} labels need tblite, which is not installed: pip install tblite"
        ) from None
    return Provenance(method, "tblite", version, asdict(settings))


def xtb_values(
    method: str, atoms: Atoms, settings: XTBSettings, *, forces: bool, stress: bool
) -> Values:
    """Compute energy (eV), forces (eV/Å) and stress (eV/Å³, Voigt, ASE's sign) of a structure.

    Raises
    ------
    UnsupportedElementError, ase.calculators.calculator.InputError
        If the method cannot treat the elements or the periodicity.
    ase.calculators.calculator.SCFError, ase.calculators.calculator.CalculationFailed
        If the calculation fails.
    """
    _, result = _singlepoint(method, atoms, settings)
    return _energy_and_derivatives(result, atoms, forces=forces, stress=stress)


def make_ase_calculator(method: str, atoms: Atoms) -> Calculator:
    """Return an ASE calculator for MD of one structure, with its charge and spin.

    Charge and spin count as in labels; energies and forces are as accurate as MD needs them, and
    a slab moves as a crystal of its cell.
    """
    return _TrajectoryCalculator(method, XTBSettings(accuracy=1.0), atoms)


class _TrajectoryCalculator(Calculator):
    """Energy, forces and stress along a trajectory: an SCF starts from the last one's density.

    ``tblite.ase``, which does the same, adds itself to ASE's list of calculators when it is
    imported.
    """

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012  (as ASE declares it)

    def __init__(self, method: str, settings: XTBSettings, atoms: Atoms) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._method, self._settings = method, settings
        self._info = {key: atoms.info[key] for key in (CHARGE_KEY, SPIN_KEY) if key in atoms.info}
        self._tblite: Any = None
        self._last: Any = None

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Run the SCF.

        Raises
        ------
        UnsupportedElementError, ase.calculators.calculator.CalculatorError
            As :func:`xtb_values`.
        """
        super().calculate(atoms, properties, system_changes)  # type: ignore[no-untyped-call]
        structure: Any = self.atoms
        calculator, self._tblite = self._tblite, None  # after a failure the next call starts afresh
        with _ase_errors(self._method):
            if calculator is None or {*system_changes} - {"positions", "cell"}:
                structure.info = dict(self._info)
                calculator, self._last = _prepare(self._method, structure, self._settings), None
            else:
                lattice = structure.cell.array / Bohr if structure.pbc.any() else None
                calculator.update(structure.positions / Bohr, lattice)
            self._last = calculator.singlepoint(self._last)
        self._tblite = calculator
        self.results = _energy_and_derivatives(
            self._last, structure, forces=True, stress=bool(structure.pbc.all())
        )


@cache
def element_shells(atomic_number: int) -> tuple[int, ...]:
    """Return the angular momenta of an element's GFN1 shells, in tblite's order (no SCF is run).

    Raises
    ------
    UnsupportedElementError
        If GFN1-xTB does not cover the element.
    """
    _check_elements(np.array([atomic_number]))
    calculator = _calculator("GFN1-xTB", Atoms(numbers=[atomic_number]), 0, 0)
    return _shells_of_atoms(calculator)[0]


@cache
def reference_occupations() -> dict[int, tuple[float, ...]]:
    """Return the reference occupation of every GFN1 shell, by atomic number, in tblite's order.

    They are read from the GFN1-xTB parametrisation that tblite exports (field ``refocc``).
    """
    from tblite import library

    parameters, table = library.new_param(), library.new_table()
    library.export_gfn1_param(parameters)
    library.dump_param(parameters, table)
    elements = library.table_to_dict(table)["element"]
    return {
        atomic_numbers[symbol]: tuple(map(float, element["refocc"]))
        for symbol, element in elements.items()
    }


def check_determinism() -> None:
    """Compute one molecule twice and compare; once at the start of each labelling process.

    Raises
    ------
    LabelError
        If the two differ, as has happened when tblite and torch shared a process and its OpenMP.
    """
    angles = np.arange(6) * np.pi / 3
    ring = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    benzene = Atoms("C6H6", positions=np.concatenate([1.39 * ring, 2.48 * ring]))
    labeler = OrbitalChargeLabeler()
    first, second = labeler.label(benzene), labeler.label(benzene)
    if first.status != "ok" or any(
        not np.allclose(first.values[name], second.values.get(name, np.inf), 0, 1e-10, True)
        for name in first.values
    ):
        raise LabelError(
            "tblite computed the same molecule twice with different results "
            f"({first.status} and {second.status}). Label in a process of its own, without torch, "
            "and with OMP_NUM_THREADS=1."
        )


def _singlepoint(method: str, atoms: Atoms, settings: XTBSettings) -> tuple[Any, Any]:
    """Run tblite; return its calculator (for the maps) and its result (atomic units)."""
    if atoms.pbc.any() and not atoms.pbc.all():
        # tblite takes such a cell for a three-dimensional crystal, without a word
        raise InputError(
            f"tblite computes molecules and three-dimensional crystals, got pbc = "
            f"{atoms.pbc.tolist()}. Set pbc=True in a cell with enough vacuum."
        )
    with _ase_errors(method):
        calculator = _prepare(method, atoms, settings)
        calculator.set("save-integrals", 1)
        return calculator, calculator.singlepoint()


def _prepare(method: str, atoms: Atoms, settings: XTBSettings) -> Any:
    """Make tblite's calculator of a structure with its charge and spin."""
    _check_elements(atoms.numbers)
    charge, multiplicity = charge_and_multiplicity(atoms)
    # for tblite, 0 is the lowest number that the valence electrons allow
    n_unpaired = 0 if np.isin(atoms.numbers, OPEN_F_CORE).any() else multiplicity - 1
    calculator = _calculator(method, atoms, charge, n_unpaired)
    calculator.set("accuracy", settings.accuracy)
    calculator.set("temperature", settings.electronic_temperature * kB / Hartree)
    calculator.set("max-iter", settings.max_iterations)
    return calculator


@contextmanager
def _ase_errors(method: str) -> Iterator[None]:
    """Raise tblite's failures as those that ASE has for them."""
    from tblite.exceptions import TBLiteRuntimeError

    try:
        yield
    except TBLiteRuntimeError as error:
        failure = SCFError if "not converged" in str(error) else CalculationFailed
        raise failure(f"{method}: {error}") from error


def _calculator(method: str, atoms: Atoms, charge: int, n_unpaired: int) -> Any:
    from tblite.interface import Calculator

    periodic = atoms.pbc.any()
    calculator = Calculator(
        method,
        atoms.numbers,
        atoms.positions / Bohr,
        charge,
        n_unpaired,
        lattice=atoms.cell.array / Bohr if periodic else None,
        periodic=atoms.pbc if periodic else None,
        color=False,
    )
    calculator.set("verbosity", 0)
    return calculator


def _check_elements(numbers: Int[np.ndarray, " n_atoms"]) -> None:
    unknown = np.flatnonzero((numbers < 1) | (numbers > MAX_ATOMIC_NUMBER))
    if len(unknown):
        raise UnsupportedElementError(
            f"atom {unknown[0]} has atomic number {numbers[unknown[0]]}, but the GFN methods "
            f"cover 1 to {MAX_ATOMIC_NUMBER}."
        )


def _energy_and_derivatives(result: Any, atoms: Atoms, *, forces: bool, stress: bool) -> Values:
    values: Values = {"energy": float(result["energy"]) * Hartree}
    if forces:
        values["forces"] = -result["gradient"] * (Hartree / Bohr)
    if stress:
        virial = result["virial"] * Hartree / atoms.get_volume()
        values["stress"] = virial.ravel()[[0, 4, 8, 5, 2, 1]]
    return values


def _shells_of_atoms(calculator: Any) -> list[tuple[int, ...]]:
    """Return the angular momenta of each atom's shells, in tblite's order."""
    atom_of_shell = calculator.get("shell-map")
    shells: list[list[int]] = [[] for _ in range(len(calculator))]
    for atom, momentum in zip(atom_of_shell, calculator.get("angular-momenta"), strict=True):
        shells[atom].append(int(momentum))
    return [tuple(momenta) for momenta in shells]


def _charge_blocks(
    calculator: Any,
    result: Any,
    numbers: Int[np.ndarray, " n_atoms"],
    shells: list[tuple[int, ...]],
) -> list[list[Block]]:
    """Return ``n0 / (2l + 1) I - (P S + (P S)^T) / 2`` of each atom's shells."""
    density = result["density-matrix"]
    if density.ndim == 3:  # (spin, AO, AO): charges need the sum
        density = density.sum(axis=0)
    population = density @ result["overlap-matrix"]  # (n_orbitals, n_orbitals)
    if not np.isfinite(population).all():
        raise CalculationFailed("GFN1-xTB: the density matrix is not finite")
    shell_of_orbital = calculator.get("orbital-map")
    first_orbital = np.searchsorted(shell_of_orbital, np.arange(len(calculator.get("shell-map"))))
    starts = iter(first_orbital)
    blocks: list[list[Block]] = []
    for number, momenta in zip(numbers, shells, strict=True):
        blocks.append([])
        occupations = reference_occupations()[int(number)]
        for momentum, occupation in zip(momenta, occupations, strict=True):
            start, size = next(starts), 2 * momentum + 1
            onsite = population[start : start + size, start : start + size]
            neutral = np.eye(size) * (occupation / size)
            blocks[-1].append(neutral - (onsite + onsite.T) / 2)
    return blocks


def _check_charges(
    blocks: Float[np.ndarray, "n_atoms 23"], expected: Float[np.ndarray, " n_atoms"], atoms: Atoms
) -> None:
    """Compare with tblite's own atomic charges, and these with the total charge."""
    charge, _ = charge_and_multiplicity(atoms)
    if abs(expected.sum() - charge) > 1e-6:
        # seen when there are more electrons, or fewer, than the orbitals can hold
        raise CalculationFailed(
            f"GFN1-xTB: the atomic charges add up to {expected.sum():.4f}, not to {charge}"
        )
    worst = np.abs(atomic_charges(blocks) - expected).max()
    if worst > 1e-6:
        raise LabelError(
            f"orbital charges of {atoms.get_chemical_formula()} differ from tblite's atomic "
            f"charges by {worst:.1e} e: tblite {metadata.version('tblite')} is not understood. "
            f"Please report this."
        )
