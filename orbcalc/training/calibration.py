"""Turn the spread of a committee into a standard deviation, on structures kept from training."""

from __future__ import annotations

import torch
from torch import Tensor

from orbcalc.model.committee import Calibration, Committee
from orbcalc.training.dataset import LabelDataset
from orbcalc.training.trainer import on_device

__all__ = ["calibrate"]


def calibrate(committee: Committee, dataset: LabelDataset, batch_size: int = 32) -> Committee:
    """Scale the uncertainties so that their mean square is the mean square of the errors.

    The mean of squared *ratios* would be the usual choice, but it is ruled by the few structures
    where a small committee happens to agree.

    Parameters
    ----------
    committee
        Trained members.
    dataset
        Labelled structures that no member was trained on.

    Returns
    -------
    Committee
        The same members. Quantities without labels, and a committee of one, keep a factor of 1.
    """
    raw = Committee([*committee.members])
    energy: list[tuple[Tensor, Tensor]] = []
    forces: list[tuple[Tensor, Tensor]] = []
    for graph, targets in on_device(dataset, batch_size, committee.first):
        prediction = raw(graph, ("energy", "forces"))
        if prediction.energy_uncertainty is None or prediction.forces_uncertainty is None:
            return committee
        n_atoms = graph.n_atoms_of_structure.sqrt()  # large structures must not rule
        error = prediction.energy - targets.energy
        energy.append((error / n_atoms, prediction.energy_uncertainty / n_atoms))
        errors = (prediction.forces - targets.forces).flatten()
        forces.append((errors, prediction.forces_uncertainty.repeat_interleave(3)))
    factors = Calibration(energy=_factor(energy), forces=_factor(forces))
    return Committee([*committee.members], factors)


def _factor(pairs: list[tuple[Tensor, Tensor]]) -> float:
    errors, spreads = (torch.cat(column) for column in zip(*pairs, strict=True))
    labelled = torch.isfinite(errors)
    if not labelled.any():
        return 1.0
    size = float(errors[labelled].pow(2).mean().sqrt())
    spread = float(spreads[labelled].pow(2).mean().sqrt())
    return size / spread if size > 0 and spread > 0 else 1.0
