"""Turn the spread of a committee into a standard deviation, on structures kept from training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orbcalc.model.committee import Calibration, Committee
from orbcalc.training.dataset import LabelDataset
from orbcalc.training.trainer import on_device

__all__ = ["calibrate"]


def calibrate(committee: Committee, dataset: LabelDataset, batch_size: int = 32) -> Committee:
    """Scale the uncertainties so that errors divided by them have a mean square of one.

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
    energy: list[Tensor] = []
    forces: list[Tensor] = []
    for graph, targets in on_device(dataset, batch_size, committee.first):
        prediction = raw(graph, ("energy", "forces"))
        if prediction.energy_uncertainty is None or prediction.forces_uncertainty is None:
            return committee
        energy.append((prediction.energy - targets.energy) / prediction.energy_uncertainty)
        errors = (prediction.forces - targets.forces) / prediction.forces_uncertainty[:, None]
        forces.append(errors.flatten())
    factors = Calibration(energy=_root_mean_square(energy), forces=_root_mean_square(forces))
    return Committee([*committee.members], factors)


def _root_mean_square(ratios: list[Tensor]) -> float:
    joined = torch.cat(ratios)
    joined = joined[torch.isfinite(joined)]
    if len(joined) == 0:
        return 1.0
    size = math.sqrt(float(joined.pow(2).mean()))
    return size if size > 0 else 1.0
