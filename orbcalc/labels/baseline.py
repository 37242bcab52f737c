"""GFN1-xTB under a potential that has learned the difference from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from ase import Atoms

from orbcalc.config import LabelConfig
from orbcalc.errors import LabelConflictError, MissingLabelError, StructureError
from orbcalc.labels.compute import label_provenance
from orbcalc.labels.label import Values
from orbcalc.labels.process import WorkerProcess
from orbcalc.properties import XTB_ENERGY, XTB_FORCES, XTB_METHOD
from orbcalc.structures import geometry

__all__ = ["BaselineWorker", "Outcome", "labelled_baseline", "labelled_energies", "raised"]

#: Seconds after which a structure is given up.
_TIMEOUT_S = 600.0

Outcome = Values | StructureError | MissingLabelError
"""``energy`` (eV), ``forces`` (n_atoms, 3) (eV/Å) and, if known, ``stress`` (eV/Å³, Voigt); or
why there are none."""


class BaselineWorker:
    """Computes GFN1-xTB in a process of its own, apart from torch.

    Parameters
    ----------
    trained_with
        The method of the labels that were trained on, as a model file names it; None if that is
        not known.

    Raises
    ------
    LabelConflictError
        If that is not the GFN1-xTB that is installed here.
    """

    def __init__(self, trained_with: str | None = None) -> None:
        here = str(label_provenance("charges", LabelConfig()))
        if trained_with not in (None, here):
            raise LabelConflictError(
                f"the model is the difference from {trained_with}, but installed is {here}, "
                f"whose energies may be others. Install the version of tblite that it names."
            )
        self.method = here
        self._process = WorkerProcess()

    def compute(self, structures: Sequence[Atoms]) -> Iterator[Outcome]:
        """Compute structures one after the other.

        Raises
        ------
        LabelError
            If the process cannot be started, or tblite is not deterministic in it.
        """
        outcomes = self._process.map(
            "orbcalc.labels.compute:compute_baseline",
            # Calculators and constraints may be of classes that only the caller can import.
            [(geometry(atoms),) for atoms in structures],
            timeout_s=_TIMEOUT_S,
            setup=("orbcalc.labels.compute:prepare", (("charges",), LabelConfig())),
        )
        for atoms, outcome in zip(structures, outcomes, strict=True):
            yield _failure(atoms, outcome) if isinstance(outcome, Exception) else outcome

    def label(self, structures: Sequence[Atoms]) -> None:
        """Give ``GFN1_energy`` and ``GFN1_forces`` to those structures that lack them.

        Raises
        ------
        StructureError
            If one of them cannot be computed.
        LabelConflictError
            If one has labels of another version.
        LabelError
            As :meth:`compute`.
        """
        missing = [atoms for atoms in structures if not _is_labelled(atoms, self.method)]
        for atoms, values in zip(missing, raised(self.compute(missing)), strict=True):
            atoms.info[XTB_ENERGY] = values["energy"]
            atoms.arrays[XTB_FORCES] = np.asarray(values["forces"])

    def close(self) -> None:
        """End the process; another computation would start a new one."""
        self._process.close()


def labelled_baseline(
    structures: Sequence[Atoms], trained_with: str | None = None
) -> Iterator[Outcome]:
    """Read the labels that structures carry; no stress is among them.

    Raises
    ------
    LabelConflictError
        If they name another method than the one of the labels that were trained on.
    """
    for atoms in structures:
        if _is_labelled(atoms, trained_with):
            yield {"energy": float(atoms.info[XTB_ENERGY]), "forces": atoms.arrays[XTB_FORCES]}
        else:
            yield MissingLabelError(
                f"{atoms.get_chemical_formula()} carries no GFN1-xTB label ({XTB_ENERGY}, "
                f"{XTB_FORCES}), which the model is the difference from"
            )


def labelled_energies(
    structures: Sequence[Atoms], learned: Sequence[float], trained_with: str | None = None
) -> list[float]:
    """Return GFN1-xTB energies, eV: labels where there are some, else the learned ones.

    Raises
    ------
    LabelConflictError
        If labels name another method than that of the labels that were trained on.
    """
    return [
        float(atoms.info[XTB_ENERGY]) if _is_labelled(atoms, trained_with) else energy
        for atoms, energy in zip(structures, learned, strict=True)
    ]


def raised(outcomes: Iterable[Outcome]) -> Iterator[Values]:
    """Raise the first failure."""
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
        yield outcome


def _is_labelled(atoms: Atoms, method: str | None) -> bool:
    found = XTB_ENERGY in atoms.info and XTB_FORCES in atoms.arrays
    own = atoms.info.get(XTB_METHOD)  # not all files say it
    if found and own is not None and method not in (None, own):
        raise LabelConflictError(
            f"{atoms.get_chemical_formula()} has GFN1-xTB labels of {own}, but the model is the "
            f"difference from {method}, whose energies may be others. Label it again."
        )
    return found


def _failure(atoms: Atoms, error: Exception) -> StructureError:
    if isinstance(error, StructureError):
        return error
    return StructureError(
        f"GFN1-xTB, which the model is the difference from, failed for "
        f"{atoms.get_chemical_formula()}: {error}"
    )
