"""What the tolerance of a certificate may apply to: names, units, errors against labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["QUANTITIES", "Quantity", "expected_error", "prediction_error"]


class Quantity(NamedTuple):
    """A quantity that a structure is judged by."""

    name: str
    unit: str

    def tolerance(self, value: float) -> str:
        """Write a tolerance with its unit, in thousandths.

        Examples
        --------
        >>> QUANTITIES["forces"].tolerance(0.05)
        '50 meV/Å'
        """
        return f"{value * 1000:g} m{self.unit}"


#: By the key ``certificate.quantity`` of a configuration.
QUANTITIES = {
    "energy_per_atom": Quantity("energy per atom", "eV/atom"),
    "energy": Quantity("total energy", "eV"),
    "forces": Quantity("largest error of the force on an atom", "eV/Å"),
}


def prediction_error(
    quantity: str, predicted: Mapping[str, Any], reference: Mapping[str, Any], n_atoms: int
) -> float:
    """Return how far a prediction is from its label, in the unit of the quantity.

    Parameters
    ----------
    quantity
        Key of `QUANTITIES`.
    predicted, reference
        ``energy`` in eV and, for forces, ``forces`` of shape (n_atoms, 3) in eV/Å.
    n_atoms
        Of the structure.

    Returns
    -------
    error
        Signed for energies; for forces ``max_i |F_i - F_i(ref)|``. NaN if something is missing.

    Examples
    --------
    >>> prediction_error("energy_per_atom", {"energy": -9.0}, {"energy": -10.0}, 2)
    0.5
    """
    name = "forces" if quantity == "forces" else "energy"
    if name not in predicted or name not in reference:
        return float("nan")
    difference = np.asarray(predicted[name], dtype=float) - np.asarray(reference[name], dtype=float)
    if quantity == "forces":
        return float(np.linalg.norm(difference, axis=1).max())
    return float(difference) / (n_atoms if quantity == "energy_per_atom" else 1)


def expected_error(quantity: str, results: Mapping[str, Any], n_atoms: int) -> float:
    """Return how large the error of a prediction may be, in the unit of the quantity.

    Parameters
    ----------
    quantity
        Key of `QUANTITIES`.
    results
        ``energy_uncertainty`` in eV and, for forces, ``forces_uncertainty`` of shape (n_atoms,) in
        eV/Å.
    n_atoms
        Of the structure.

    Returns
    -------
    error
        One standard deviation of an energy, or of a force component on the worst atom; NaN if that
        is not known.

    Examples
    --------
    >>> expected_error("energy_per_atom", {"energy_uncertainty": 0.1}, 2)
    0.05
    """
    if quantity == "forces":
        return float(np.max(results.get("forces_uncertainty", np.nan)))
    energy = float(results.get("energy_uncertainty", np.nan))
    return energy / (n_atoms if quantity == "energy_per_atom" else 1)
