"""How sure a model is: sizes of its errors, measured on structures held out.

The rigidity of the last layer (LLPR, Bigi 2024, 2403.02251) says which errors are large: with
``f`` the sum over atoms of what the energy is a linear function of, the variance of the energy is
``α² fᵀ (F + ζ)⁻¹ f`` where ``F = Σ f fᵀ / n²`` over the training set, whose loss is that of
energies per atom. It is stored as a matrix ``W`` with ``W Wᵀ = (F + ζ)⁻¹``, so that the standard
deviation is the norm of ``Wᵀ f``; for one atom, with its own part of ``f``, the same norm stands
for the uncertainty of its force. Members of a committee are averaged. docs/uncertainty.md compares
this with the spread of members.

Errors have heavier tails than a normal distribution, so there are two factors: one so that 68 % of
the errors held out are smaller than the uncertainty, one for 95 %.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from orbcalc.model.committee import Calibration, Committee
from orbcalc.model.potential import Potential
from orbcalc.training.dataset import LabelDataset
from orbcalc.training.trainer import on_device

__all__ = ["calibrate"]

#: Share of a normal distribution within one standard deviation.
ONE_SIGMA = 0.6827

#: ζ, in units of the mean eigenvalue of F: the likeliest one is taken.
_REGULARISERS = tuple(10.0**power for power in range(-9, 2))


def calibrate(
    committee: Committee, train: LabelDataset, valid: LabelDataset, batch_size: int = 32
) -> Committee:
    """Measure the last layers of the members, and scale uncertainties to the size of errors.

    Parameters
    ----------
    committee
        Trained members.
    train
        What they were trained on.
    valid
        Labelled structures that no member was trained on.

    Returns
    -------
    Committee
        The same members. Quantities without labels keep their factors. Without energies in
        `train` and `valid` a single member has no uncertainties, and several have their spread.
    """
    for member in committee.members:
        assert isinstance(member, Potential)
        _measure_rigidity(member, train, valid, batch_size)
    raw = Committee([*committee.members])
    if not raw.has_uncertainty:
        return raw
    energy: list[Tensor] = []
    forces: list[Tensor] = []
    for graph, targets in on_device(valid, batch_size, committee.first):
        prediction = raw(graph, ("energy", "forces"))
        assert prediction.energy_uncertainty is not None
        assert prediction.forces_uncertainty is not None
        energy.append((prediction.energy - targets.energy) / prediction.energy_uncertainty)
        errors = prediction.forces - targets.forces
        forces.append((errors / prediction.forces_uncertainty[:, None]).flatten())
    energies, components = torch.cat(energy), torch.cat(forces)
    factors = Calibration(
        energy=_quantile(energies, ONE_SIGMA, unknown=1.0),
        forces=_quantile(components, ONE_SIGMA, unknown=1.0),
        energy_95=_quantile(energies, 0.95, unknown=1.96),
        forces_95=_quantile(components, 0.95, unknown=1.96),
    )
    return Committee([*committee.members], factors)


def _measure_rigidity(
    potential: Potential, train: LabelDataset, valid: LabelDataset, batch_size: int
) -> None:
    """Set the whitening of the last layer; it is zero without energies."""
    buffer = potential.get_buffer("whitening")
    buffer.zero_()  # it may be that of an earlier training
    known, _, n_known = _last_layers(potential, train, batch_size)
    new, errors, n_new = _last_layers(potential, valid, batch_size)
    if len(known) == 0 or len(new) == 0:
        return
    per_atom = known / n_known[:, None]
    values, vectors = torch.linalg.eigh(per_atom.T @ per_atom)
    values = values.clamp_min(0.0)
    projected = (new @ vectors) ** 2
    roots = n_new.sqrt()
    best, chosen = math.inf, _REGULARISERS[0]
    for factor in _REGULARISERS:
        spread = (projected / (values + factor * values.mean())).sum(1).sqrt()
        spread = spread * _rms_ratio(errors / roots, spread / roots)
        loss = float((spread.log() + 0.5 * (errors / spread) ** 2).mean())
        if loss < best:
            best, chosen = loss, factor
    whitening = vectors / (values + chosen * values.mean()).sqrt()
    buffer.copy_(whitening.to(buffer))


def _last_layers(
    potential: Potential, dataset: LabelDataset, batch_size: int
) -> tuple[Float[Tensor, "n n_last"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return last layers, errors and numbers of atoms of the structures with an energy."""
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for graph, targets in on_device(dataset, batch_size, potential):
        labelled = torch.isfinite(targets.energy)
        with torch.no_grad():
            prediction = potential(graph, ("energy", "last_layer"))
        assert prediction.last_layer is not None
        last, n_atoms = prediction.last_layer.double(), graph.n_atoms_of_structure.double()
        error = prediction.energy - targets.energy
        rows.append((last[labelled], error[labelled], n_atoms[labelled]))
    last, errors, n_atoms = (torch.cat(column) for column in zip(*rows, strict=True))
    return last, errors, n_atoms


def _rms_ratio(errors: Tensor, spreads: Tensor) -> float:
    size, spread = (float(values.pow(2).mean().sqrt()) for values in (errors, spreads))
    return size / spread if size > 0 and spread > 0 else 1.0


def _quantile(ratios: Tensor, share: float, *, unknown: float) -> float:
    """Return what a share of new ratios will not exceed, `unknown` without any.

    The rank has room for the number of ratios, as in split conformal prediction (Lei 2018,
    1604.04173): that share of structures like these is covered on average, however few they are.
    """
    sizes = ratios[torch.isfinite(ratios)].abs().sort().values
    rank = math.ceil((len(sizes) + 1) * share)
    found = float(sizes[min(rank, len(sizes)) - 1]) if len(sizes) else 0.0
    return found if found > 0 else unknown
