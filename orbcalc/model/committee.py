"""Several potentials as one: their mean predicts, their spread says how sure it is.

A single potential says it by the rigidity of its last layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orbcalc.errors import ConfigError
from orbcalc.graph import AtomGraph
from orbcalc.model.potential import Potential, Prediction

__all__ = ["Calibration", "Committee", "CommitteePrediction"]


@dataclass(frozen=True)
class Calibration:
    """Factors that turn the spread of the members into one standard deviation of the error.

    For a single member it is not their spread, but the rigidity of its last layer. They are
    measured on structures that no member was trained on; 1 means not calibrated.
    """

    energy: float = 1.0
    forces: float = 1.0


@dataclass(frozen=True)
class CommitteePrediction(Prediction):
    """Mean of the members, and how sure they are; None for one that does not know."""

    energy_uncertainty: Float[Tensor, " n_structures"] | None = None
    """One standard deviation, eV."""
    forces_uncertainty: Float[Tensor, " n_atoms"] | None = None
    """One standard deviation of each component of the force on an atom, eV/Å."""


class Committee(nn.Module):
    """Potentials with the same elements, trained independently.

    Parameters
    ----------
    members
        One or more potentials.
    calibration
        Of the uncertainties.

    Raises
    ------
    ConfigError
        If there are no members, or they differ in elements, cutoff or shells.
    """

    def __init__(
        self, members: Sequence[Potential], calibration: Calibration | None = None
    ) -> None:
        super().__init__()
        if not members:
            raise ConfigError("a committee needs at least one potential")
        first = members[0]
        for member in members:
            if (member.elements, member.config.cutoff, member.shells) != (
                first.elements,
                first.config.cutoff,
                first.shells,
            ):
                raise ConfigError("members of a committee must share elements, cutoff and shells")
        self.members = nn.ModuleList(members)
        self.calibration = calibration or Calibration()
        #: Whether it can tell how sure it is: several members, or one that was calibrated before
        #: the committee was made.
        self.has_uncertainty = len(members) > 1 or first.knows_rigidity

    @property
    def first(self) -> Potential:
        """The first member, for what all share."""
        member = self.members[0]
        assert isinstance(member, Potential)
        return member

    @property
    def cutoff(self) -> float:
        """Cutoff of all members, Å."""
        return self.first.config.cutoff

    def forward(
        self, graph: AtomGraph, properties: Collection[str] = ("energy",)
    ) -> CommitteePrediction:
        """Evaluate all members; see `Potential.forward` for the properties."""
        alone = len(self.members) == 1
        if alone and self.has_uncertainty:
            properties = [*properties, "rigidity"]
        predictions: list[Prediction] = [member(graph, properties) for member in self.members]
        result = CommitteePrediction(
            _mean(p.energy for p in predictions),
            **{
                field.name: _mean(getattr(p, field.name) for p in predictions)
                for field in fields(Prediction)
                if field.name != "energy" and getattr(predictions[0], field.name) is not None
            },
        )
        if alone:
            return self._with_rigidity(result)
        energies = torch.stack([p.energy for p in predictions])
        result = replace(result, energy_uncertainty=energies.std(0) * self.calibration.energy)
        if result.forces is not None:
            forces = torch.stack([p.forces for p in predictions if p.forces is not None])
            spread = forces.var(0).sum(-1).sqrt() / math.sqrt(3)
            result = replace(result, forces_uncertainty=spread * self.calibration.forces)
        return result

    def _with_rigidity(self, result: CommitteePrediction) -> CommitteePrediction:
        energy, forces = result.energy_rigidity, result.atom_rigidity
        if energy is None or forces is None:
            return result
        result = replace(result, energy_uncertainty=energy.double() * self.calibration.energy)
        if result.forces is not None:
            forces = forces.double() * self.calibration.forces
            result = replace(result, forces_uncertainty=forces)
        return result


def _mean(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)
