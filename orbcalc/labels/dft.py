"""Density functional theory of molecules by PySCF, as an ASE calculator."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from importlib import metadata
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, InputError, SCFError, all_changes
from ase.data import atomic_numbers
from ase.units import Bohr, Hartree

from orbcalc.errors import ConfigError
from orbcalc.labels.label import Provenance
from orbcalc.structures import charge_and_multiplicity

__all__ = ["PySCFCalculator", "pyscf_provenance"]

MISSING = "DFT labels need PySCF, which is not installed: pip install 'orbcalc[pyscf]'"


class PySCFCalculator(Calculator):
    """Kohn-Sham DFT: energy and analytic forces of a molecule.

    Restricted for singlets, unrestricted otherwise; charge and multiplicity are read from
    ``atoms.info`` (see :func:`~orbcalc.structures.charge_and_multiplicity`).

    Parameters
    ----------
    xc
        Functional, in PySCF's names.
    basis
        Orbital basis.
    ecp
        Effective core potential; None: that which the basis was made for, as PySCF knows it (def2,
        LANL2, ...-PP). Of other bases of heavy elements it must be named.
    density_fit
        Fit the Coulomb part (and exchange), in the basis made for that, else in
        def2-universal-jkfit: what PySCF makes by itself is wrong by up to eV beside core
        potentials.
    conv_tol
        Convergence of the SCF energy, hartree.
    max_cycle
        SCF iterations.
    grid_level
        Integration grid, 0 to 9. Its response is part of the forces, which therefore are the
        derivative of this energy on any grid.

    Raises
    ------
    ConfigError
        If PySCF is not installed.
    """

    implemented_properties = ["energy", "forces"]  # noqa: RUF012  (as ASE declares it)

    def __init__(
        self,
        xc: str = "pbe",
        basis: str = "def2-svp",
        *,
        ecp: str | None = None,
        density_fit: bool = True,
        conv_tol: float = 1e-9,
        max_cycle: int = 100,
        grid_level: int = 3,
    ) -> None:
        try:
            import pyscf.dft  # type: ignore[import-untyped]  # noqa: F401
        except ImportError as error:
            raise ConfigError(MISSING) from error
        super().__init__(  # type: ignore[no-untyped-call]
            xc=xc,
            basis=basis,
            ecp=ecp,
            density_fit=density_fit,
            conv_tol=conv_tol,
            max_cycle=max_cycle,
            grid_level=grid_level,
        )

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Run the SCF, and the gradient if forces are asked for.

        Raises
        ------
        ase.calculators.calculator.InputError
            If the structure is periodic.
        ase.calculators.calculator.SCFError
            If the SCF does not converge.
        """
        super().calculate(atoms, properties, system_changes)  # type: ignore[no-untyped-call]
        molecule: Any = self.atoms
        if molecule.pbc.any():
            raise InputError("PySCFCalculator computes molecules only: set pbc=False")
        mean_field = self._mean_field(molecule)
        energy = mean_field.kernel()
        if not mean_field.converged:
            raise SCFError(f"PySCF: SCF not converged in {mean_field.max_cycle} cycles")
        self.results = {"energy": float(energy) * Hartree}
        if "forces" in (properties or ()):
            gradient = mean_field.nuc_grad_method()
            gradient.grid_response = True
            self.results["forces"] = -np.asarray(gradient.kernel()) * (Hartree / Bohr)

    def _mean_field(self, atoms: Atoms) -> Any:
        from pyscf import dft, gto
        from pyscf.df.addons import make_auxbasis  # type: ignore[import-untyped]

        charge, multiplicity = charge_and_multiplicity(atoms)
        options: Any = self.parameters
        molecule = gto.Mole()
        molecule.build(
            dump_input=False,
            parse_arg=False,  # it would read our command line
            verbose=0,
            atom=list(zip(atoms.symbols, atoms.positions / Bohr, strict=True)),
            unit="Bohr",
            basis=options.basis,
            ecp=options.ecp or _core_potentials(options.basis, {*atoms.symbols}),
            charge=charge,
            spin=multiplicity - 1,
        )
        mean_field = (dft.RKS if multiplicity == 1 else dft.UKS)(molecule, xc=options.xc)
        if options.density_fit:
            fitted = make_auxbasis(molecule)
            is_made = all(isinstance(basis, str) for basis in fitted.values())
            mean_field = mean_field.density_fit(fitted if is_made else "def2-universal-jkfit")
        mean_field.grids.level = options.grid_level
        mean_field.conv_tol = options.conv_tol
        mean_field.max_cycle = options.max_cycle
        return mean_field


def _core_potentials(basis: str, symbols: Collection[str]) -> dict[str, str]:
    """Return the effective core potentials that a basis was made for, by symbol."""
    from pyscf.gto.mole import bse_predefined_ecp  # type: ignore[import-untyped]

    # PySCF knows the plain names only; all bases of this family share their potentials
    name, numbers = bse_predefined_ecp("def2-svp" if "def2" in basis.lower() else basis, symbols)
    return {symbol: name for symbol in symbols if atomic_numbers[symbol] in (numbers or ())}


def pyscf_provenance(arguments: dict[str, Any]) -> Provenance:
    """Name a DFT calculation with all its settings, without importing PySCF.

    Raises
    ------
    ConfigError
        If PySCF is not installed, or the calculator has no such argument.
    """
    try:
        version = metadata.version("pyscf")
    except metadata.PackageNotFoundError:
        raise ConfigError(MISSING) from None
    try:
        bound = inspect.signature(PySCFCalculator).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"reference.arguments of 'pyscf': {error}") from None
    bound.apply_defaults()
    settings = dict(bound.arguments)
    return Provenance(f"{settings['xc']}/{settings['basis']}", "pyscf", version, settings)
