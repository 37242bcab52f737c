"""What a label is: values, where they come from, and how it went.

A calculation that fails is data: it comes back as a :class:`Label` with another status than
``ok``. What no other structure could do better (a missing program, a quantity that the method
does not have) is raised.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.calculators.calculator import InputError, SCFError

from orbcalc.errors import ConfigError, LabelError, StructureError, UnsupportedElementError
from orbcalc.structures import check_structure, structure_key

__all__ = ["KINDS", "Kind", "Label", "LabelStatus", "Provenance", "Values", "attempt"]

#: "charges": GFN1-xTB energy, forces, orbital_blocks, shells. "reference": the expensive energy,
#: forces, stress. The names of the values are those of :data:`orbcalc.properties.PROPERTIES`.
Kind = Literal["charges", "reference"]
KINDS: tuple[Kind, ...] = ("charges", "reference")

Values = dict[str, float | np.ndarray]


class LabelStatus(str, Enum):
    """How a calculation ended; only ``ok`` labels carry values and are trained on."""

    ok = "ok"
    scf_failed = "scf_failed"
    timeout = "timeout"
    crashed = "crashed"
    unsupported = "unsupported"
    failed = "failed"

    def __str__(self) -> str:
        """Return the plain word, on every version of Python."""
        return self.value


@dataclass(frozen=True)
class Provenance:
    """The method behind a label; labels of two provenances are not mixed.

    ``settings`` hold what changes the numbers, as plain JSON.
    """

    method: str
    program: str
    version: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the settings what a file would give back (lists for tuples), to compare equal."""
        object.__setattr__(self, "settings", json.loads(json.dumps(self.settings, sort_keys=True)))

    def __str__(self) -> str:
        """Return what to call it in messages."""
        settings = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        program = f"{self.program} {self.version}"
        return f"{self.method} ({program}{'; ' if settings else ''}{settings})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "method": self.method,
            "program": self.program,
            "version": self.version,
            "settings": self.settings,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Provenance:
        """Read what :meth:`to_dict` wrote."""
        return cls(**data)


@dataclass(frozen=True)
class Label:
    """One calculation of one structure.

    ``key`` is :func:`~orbcalc.structures.structure_key` of the structure, ``wall_time_s`` what the
    calculation took, and ``message`` says why it failed.
    """

    key: str
    kind: Kind
    status: LabelStatus
    provenance: Provenance
    values: Values = field(default_factory=dict)
    wall_time_s: float = 0.0
    message: str = ""


def attempt(
    atoms: Atoms, kind: Kind, provenance: Provenance, compute: Callable[[Atoms], Values]
) -> Label:
    """Label one structure, turning failures of chemistry into a status.

    Raises
    ------
    StructureError
        If the structure has no content to name it by: positions that are not finite, a charge
        or multiplicity that is impossible.
    LabelError, ConfigError
        From ``compute``, for what would fail for any structure.
    """
    if not np.isfinite(atoms.positions).all():
        check_structure(atoms)  # raises, and names the atom
    key = structure_key(atoms)
    values: Values = {}
    message = ""
    start = time.perf_counter()
    try:
        check_structure(atoms)
        values = compute(atoms)
        status = LabelStatus.ok
    except (LabelError, ConfigError):
        raise
    except (UnsupportedElementError, InputError) as error:
        status, message = LabelStatus.unsupported, str(error)
    except SCFError as error:
        status, message = LabelStatus.scf_failed, str(error)
    except StructureError as error:
        status, message = LabelStatus.failed, str(error)
    except Exception as error:  # a calculator may raise anything
        status, message = LabelStatus.failed, f"{type(error).__name__}: {error}"
    wall_time_s = time.perf_counter() - start
    # Blocks hold NaN for absent shells; whoever makes them checks them before that.
    bad = [n for n, v in values.items() if n != "orbital_blocks" and not np.isfinite(v).all()]
    if bad:
        status, message = LabelStatus.failed, f"not finite: {', '.join(bad)}"
        values = {}
    return Label(key, kind, status, provenance, values, wall_time_s, message)
