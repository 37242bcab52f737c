"""Networks compiled by `torch.compile`: fewer, larger operations for small systems.

A molecule of ten atoms is bound by the number of operations and not by their size. Compiling
takes a minute or so and pays in dynamics; batches and large systems gain little.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

from orbcalc.graph import AtomGraph
from orbcalc.model.backbone import Backbone, NodeFeatures
from orbcalc.model.committee import Committee
from orbcalc.model.potential import Potential

__all__ = ["compiled"]

#: Largest difference from the network as it was: energy per atom (eV), forces (eV/Å, or part).
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def compiled(committee: Committee, probe: AtomGraph) -> Committee:
    """Return a committee with the same weights and compiled networks.

    Sizes of systems may vary afterwards; a lone atom, a pair, and charges compile once more when
    they first come.

    Parameters
    ----------
    committee
        It stays as it is.
    probe
        On which both must agree.

    Returns
    -------
    Committee
        `committee` itself, with a warning, if it cannot be compiled here (PyTorch needs a C++
        compiler for that) or if the results differ.
    """
    members = [_compiled(member) for member in committee.members if isinstance(member, Potential)]
    made = Committee(members, committee.calibration)
    expected = committee(probe, ("forces",))
    try:
        found = made(probe, ("forces",))
    except Exception as error:  # whatever a compiler may raise
        reason = str(error).strip().partition("\n")[0]
        return _left_alone(committee, f"{type(error).__name__}: {reason}")
    assert found.forces is not None
    assert expected.forces is not None
    per_atom = probe.n_atoms_of_structure
    tolerance = _TOLERANCE[committee.first.dtype]
    if not (
        # Most of a total energy is that of lone atoms: a part of it would allow anything.
        torch.allclose(found.energy / per_atom, expected.energy / per_atom, 0.0, tolerance)
        and torch.allclose(found.forces, expected.forces, tolerance, tolerance)
    ):
        return _left_alone(committee, "compiled, it predicts something else")
    return made


def _compiled(potential: Potential) -> Potential:
    """Return a potential that shares weights with another one."""
    made = copy.copy(potential)
    made.compiled_backbone = _CompiledBackbone(potential.backbone)
    return made


class _CompiledBackbone:
    """What `torch.compile` returns cannot be pickled: where this is read, it is compiled anew."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._function = torch.compile(backbone.forward, dynamic=True)

    def __call__(self, *arguments: Any, **options: Any) -> NodeFeatures:
        return self._function(*arguments, **options)

    def __reduce__(self) -> tuple[type[_CompiledBackbone], tuple[Backbone]]:
        return _CompiledBackbone, (self.backbone,)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CompiledBackbone:
        return self  # in the same process there is no need to compile again


def _left_alone(committee: Committee, reason: str) -> Committee:
    warnings.warn(f"the potential is used without compiling it: {reason}", stacklevel=3)
    return committee
