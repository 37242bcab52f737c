"""One label of one structure: the function that label workers run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculationFailed

from orbcalc.config import LabelConfig
from orbcalc.labels.label import Kind, Label, Provenance, Values
from orbcalc.labels.reference import ReferenceLabeler, reference_provenance
from orbcalc.labels.xtb import (
    OrbitalChargeLabeler,
    XTBSettings,
    check_determinism,
    xtb_provenance,
    xtb_values,
)

__all__ = ["compute_baseline", "compute_label", "label_kinds", "label_provenance", "prepare"]


def label_kinds(config: LabelConfig) -> tuple[Kind, ...]:
    """Return the kinds of labels that a configuration asks for, cheap ones first."""
    return ("charges", "reference") if config.charges else ("reference",)


def label_provenance(kind: Kind, config: LabelConfig) -> Provenance:
    """Name the method behind a kind of label, without loading its program."""
    if kind == "charges":
        return xtb_provenance("GFN1-xTB", XTBSettings())
    return reference_provenance(config.reference)


def compute_label(atoms: Atoms, kind: Kind, config: LabelConfig) -> Label:
    """Compute one label in this process.

    Raises
    ------
    StructureError, ConfigError, LabelError
        For what is no failure of chemistry: an impossible structure, a calculator that cannot be
        made, a quantity that it does not have.
    """
    return _labeler(kind, config.model_dump_json()).label(atoms)


def compute_baseline(atoms: Atoms) -> Values:
    """Compute GFN1-xTB energy, forces and, in a crystal, stress, as accurate as its labels are.

    Raises
    ------
    UnsupportedElementError, ase.calculators.calculator.CalculatorError
        As :func:`orbcalc.labels.xtb.xtb_values`; also if a value is not finite.
    """
    crystal = bool(atoms.pbc.all())
    values = xtb_values("GFN1-xTB", atoms, XTBSettings(), forces=True, stress=crystal)
    if not all(np.isfinite(value).all() for value in values.values()):
        raise CalculationFailed("GFN1-xTB gave values that are not finite")
    return values


def prepare(kinds: Sequence[Kind], config: LabelConfig) -> None:
    """Load the programs behind labels, so that the first label takes no longer than others.

    Raises
    ------
    ConfigError, LabelError
        If a program is missing, a calculator cannot be made, or tblite is not deterministic.
    """
    for kind in kinds:
        labeler = _labeler(kind, config.model_dump_json())
        if isinstance(labeler, ReferenceLabeler):
            labeler.load()


@lru_cache(maxsize=8)
def _labeler(kind: Kind, config_json: str) -> OrbitalChargeLabeler | ReferenceLabeler:
    """Keep labelers between structures: calculators are dear to make."""
    if kind == "charges":
        check_determinism()
        return OrbitalChargeLabeler()
    return ReferenceLabeler(LabelConfig.model_validate_json(config_json))
