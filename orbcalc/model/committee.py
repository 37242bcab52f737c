"""Several potentials as one: their mean predicts.

How sure it is, their last layers say (rigidity, `training.calibration`) and their spread.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orbcalc.errors import ConfigError
from orbcalc.graph import AtomGraph
from orbcalc.model.potential import Potential, Prediction

__all__ = ["Calibration", "Committee", "CommitteePrediction", "joined_score"]


@dataclass(frozen=True)
class Calibration:
    """What turns rigidities and the spread of the members into the size of errors.

    The score is the root of ``rigidity² + (weight spread)²``, as far as there are both. All is
    measured on structures that no member was trained on, or that were left out in turn; these
    values mean: not calibrated.

    Raises
    ------
    ConfigError
        If a number is not finite, or negative.
    """

    energy: float = 1.0
    """Score to one standard deviation: 68 % of errors are smaller."""
    forces: float | None = 1.0
    """None if there were no forces to measure it by."""
    energy_95: float = 1.96
    """Score to what 95 % of errors are smaller than."""
    forces_95: float | None = 1.96
    energy_spread_weight: float = 1.0
    forces_spread_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers, which may come from a file."""
        for name, value in asdict(self).items():
            if value is None and name in ("forces", "forces_95"):
                continue
            if not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise ConfigError(f"calibration: {name} is {value!r}, expected a number >= 0")


@dataclass(frozen=True)
class CommitteePrediction(Prediction):
    """Mean of the members, and how sure they are; None for one that does not know."""

    energy_spread: Float[Tensor, " n_structures"] | None = None
    """Standard deviation of the members' energies, eV; None for a single one."""
    forces_spread: Float[Tensor, " n_atoms"] | None = None
    """The same for components of the force on an atom (root of their mean square), eV/Å."""
    energy_uncertainty: Float[Tensor, " n_structures"] | None = None
    """One standard deviation, eV."""
    forces_uncertainty: Float[Tensor, " n_atoms"] | None = None
    """One standard deviation of each component of the force on an atom, eV/Å."""
    energy_interval_95: Float[Tensor, " n_structures"] | None = None
    """What 95 % of errors are smaller than, eV."""
    forces_interval_95: Float[Tensor, " n_atoms"] | None = None
    """The same for components of the force on an atom, eV/Å."""


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
        If there are no members, or they differ in elements, cutoff, baseline or shells.
    """

    def __init__(
        self, members: Sequence[Potential], calibration: Calibration | None = None
    ) -> None:
        super().__init__()
        if not members:
            raise ConfigError("a committee needs at least one potential")
        shared = [(m.elements, m.config.cutoff, m.config.baseline, m.shells) for m in members]
        if any(terms != shared[0] for terms in shared):
            raise ConfigError(
                "members of a committee must share elements, cutoff, baseline and shells"
            )
        self.members = nn.ModuleList(members)
        self.calibration = calibration or Calibration()
        self._has_rigidity = all(member.knows_rigidity for member in members)
        #: Whether it can tell how sure it is: several members, or one that was calibrated before
        #: the committee was made.
        self.has_uncertainty = self._has_rigidity or len(members) > 1

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
        """Evaluate all members; see `Potential.forward` for the properties.

        A single member says how sure it is of forces even if they are not asked for.

        Raises
        ------
        ConfigError
            If the last layer of several members is asked for.
        """
        if "last_layer" in properties and len(self.members) > 1:
            raise ConfigError("a committee of several has no last layer: ask one of its members")
        if self._has_rigidity:
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
        result = replace(result, **_spreads(predictions))
        scale = self.calibration
        energy = _score(result.energy_rigidity, result.energy_spread, scale.energy_spread_weight)
        if energy is not None:
            unknown = result.reference_uncertainty
            unknown = torch.zeros_like(energy) if unknown is None else unknown
            result = replace(
                result,
                energy_uncertainty=torch.hypot(energy * scale.energy, unknown),
                energy_interval_95=torch.hypot(energy * scale.energy_95, 1.96 * unknown),
            )
        forces = _score(result.atom_rigidity, result.forces_spread, scale.forces_spread_weight)
        is_complete = len(self.members) == 1 or result.forces is not None
        if forces is None or not is_complete or scale.forces is None or scale.forces_95 is None:
            return result
        return replace(
            result,
            forces_uncertainty=forces * scale.forces,
            forces_interval_95=forces * scale.forces_95,
        )


def _spreads(predictions: Sequence[Prediction]) -> dict[str, Tensor]:
    if len(predictions) == 1:
        return {}
    energies = torch.stack([p.energy for p in predictions])
    forces = [p.forces for p in predictions if p.forces is not None]
    spreads = {"energy_spread": energies.std(0)}
    if forces:
        spreads["forces_spread"] = torch.stack(forces).var(0).mean(-1).sqrt()
    return spreads


def _score(rigidity: Tensor | None, spread: Tensor | None, weight: float) -> Tensor | None:
    """Return an uncertainty up to a factor; None if nothing is known."""
    if rigidity is None or spread is None:
        known = spread if rigidity is None else rigidity
        return None if known is None else known.double()
    return joined_score(rigidity.double(), spread.double(), weight)


def joined_score(rigidity: Tensor, spread: Tensor, weight: float) -> Tensor:
    """Return ``sqrt(rigidity² + (weight spread)²)``: what calibrations scale."""
    return (rigidity**2 + (weight * spread) ** 2).sqrt()


def _mean(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)
