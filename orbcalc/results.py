"""Results of a calculation on a structure: into the files of ASE, and back.

ASE's files take results that ASE has a name for, and uncertainties have none. They go where each
format keeps what it does not know: ``info`` and ``arrays`` (extxyz), and the parameters of a
calculator (trajectories and databases).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator

from orbcalc.errors import StructureError
from orbcalc.properties import (
    ENERGY_INTERVAL_95,
    ENERGY_UNCERTAINTY,
    FORCES_INTERVAL_95,
    FORCES_UNCERTAINTY,
)

if TYPE_CHECKING:
    from ase.db.row import AtomsRow

__all__ = ["results_of", "with_results"]

_OF_STRUCTURE = (ENERGY_UNCERTAINTY, ENERGY_INTERVAL_95)
_OF_ATOMS = (FORCES_UNCERTAINTY, FORCES_INTERVAL_95)
_UNCERTAINTIES = (*_OF_STRUCTURE, *_OF_ATOMS)


def with_results(atoms: Atoms, results: Mapping[str, Any] | None = None) -> Atoms:
    """Return a copy of a structure that carries results into any file of ASE.

    ``energy``, ``forces`` and whatever else ASE knows are the results of a calculator of the
    copy. The uncertainties are ``info["energy_uncertainty"]`` (eV) and
    ``arrays["forces_uncertainty"]`` (n_atoms, eV/Å), which extxyz files keep, and parameters of
    that calculator, which trajectories and databases keep; :func:`results_of` finds them again.
    So are ``energy_interval_95`` and ``forces_interval_95``.

    Parameters
    ----------
    atoms
        Left as it is. Entries of ``info`` and ``arrays`` by the name of a result are replaced.
    results
        As :func:`orbcalc.predict` gives them for a structure; by default, those of ``atoms.calc``.
        What has neither a name in ASE nor is an uncertainty (``orbital_charges``, ``features``)
        is left out.

    Raises
    ------
    StructureError
        If there are no results, neither given nor of the calculator for this very geometry.

    Examples
    --------
    >>> done = with_results(Atoms("H"), {"energy": -13.6, "energy_uncertainty": 0.1})
    >>> done.get_potential_energy(), done.info["energy_uncertainty"]
    (-13.6, 0.1)
    """
    if results is None:
        results = _current(atoms)
        if not results:
            raise StructureError(
                f"{atoms.get_chemical_formula()} carries no results of its present geometry: ask "
                f"its calculator for forces first, or give the results"
            )
    named = {name: value for name, value in results.items() if name in all_properties}
    uncertain = {name: results[name] for name in _UNCERTAINTIES if name in results}
    copy: Atoms = atoms.copy()
    for name in (*named, *_UNCERTAINTIES):  # extxyz would refuse two of a name
        copy.info.pop(name, None)
        copy.arrays.pop(name, None)
    for name, value in uncertain.items():
        if name in _OF_STRUCTURE:
            copy.info[name] = value
        else:
            copy.set_array(name, np.asarray(value))
    if named:
        copy.calc = SinglePointCalculator(copy, **named)
        copy.calc.name = "orbcalc"
        copy.calc.parameters = uncertain
    return copy


def results_of(source: Atoms | AtomsRow) -> dict[str, Any]:
    """Return the results that a structure carries, uncertainties among them.

    Parameters
    ----------
    source
        Structure with a calculator or from a file that :func:`with_results` prepared, or a row
        of a database of ASE (``ase.io.read`` leaves out what makes the difference).

    Returns
    -------
    dict
        By name, in the units of :func:`orbcalc.predict`; empty if there are none, or none of the
        present geometry.
    """
    if not isinstance(source, Atoms):
        found = {name: source[name] for name in all_properties if name in source}
        return found | _uncertainties(source.get("calculator_parameters", {})) if found else {}
    found = _current(source)
    if not found or not isinstance(source.calc, SinglePointCalculator):
        return found  # info and arrays may hold what was calculated before, of another geometry
    kept = getattr(source.calc, "parameters", None) or {}
    return _uncertainties({**kept, **source.info, **source.arrays}) | found


def _current(atoms: Atoms) -> dict[str, Any]:
    """Return the results of a calculator, if they are those of its present structure."""
    if atoms.calc is None or atoms.calc.check_state(atoms):
        return {}
    return deepcopy(atoms.calc.results)  # or who changes an array changes the calculator's


def _uncertainties(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entries[name] for name in _UNCERTAINTIES if name in entries}
