"""How sure a model is: standard deviations of its errors, measured on structures held out.

A committee has the spread of its members. A single potential has the rigidity of its last layer
(LLPR, Bigi 2024, 2403.02251): with ``f`` the sum over atoms of what its energy is a linear function
of, the variance of the energy is ``α² fᵀ (F + ζ)⁻¹ f`` where ``F = Σ f fᵀ / n²`` over the training
set, whose loss is that of energies per atom. It is stored as a matrix ``W`` with
``W Wᵀ = (F + ζ)⁻¹``, so that the standard deviation is the norm of ``Wᵀ f``; for one atom, with its
own part of ``f``, the same norm stands for the uncertainty of its force.
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

#: ζ, in units of the mean eigenvalue of F: the likeliest one is taken.
_REGULARISERS = tuple(10.0**power for power in range(-9, 2))


def calibrate(
    committee: Committee, train: LabelDataset, valid: LabelDataset, batch_size: int = 32
) -> Committee:
    """Scale the uncertainties so that their mean square is the mean square of the errors.

    The mean of squared *ratios* would be the usual choice, but it is ruled by the few structures
    where a small committee happens to agree.

    Parameters
    ----------
    committee
        Trained members.
    train
        What they were trained on; used for a single member.
    valid
        Labelled structures that no member was trained on.

    Returns
    -------
    Committee
        The same members. Quantities without labels keep a factor of 1; a single member without
        energies in `train` and `valid` has no uncertainties.
    """
    if len(committee.members) == 1:
        _measure_rigidity(committee.first, train, valid, batch_size)
    raw = Committee([*committee.members])
    if not raw.has_uncertainty:
        return raw
    energy: list[tuple[Tensor, Tensor]] = []
    forces: list[tuple[Tensor, Tensor]] = []
    for graph, targets in on_device(valid, batch_size, committee.first):
        prediction = raw(graph, ("energy", "forces"))
        assert prediction.energy_uncertainty is not None
        assert prediction.forces_uncertainty is not None
        n_atoms = graph.n_atoms_of_structure.sqrt()  # large structures must not rule
        error = prediction.energy - targets.energy
        energy.append((error / n_atoms, prediction.energy_uncertainty / n_atoms))
        errors = (prediction.forces - targets.forces).flatten()
        forces.append((errors, prediction.forces_uncertainty.repeat_interleave(3)))
    factors = Calibration(energy=_factor(*_joined(energy)), forces=_factor(*_joined(forces)))
    return Committee([*committee.members], factors)


def _measure_rigidity(
    potential: Potential, train: LabelDataset, valid: LabelDataset, batch_size: int
) -> None:
    """Set the whitening of the last layer; it stays zero without energies."""
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
        spread = spread * _factor(errors / roots, spread / roots)
        loss = float((spread.log() + 0.5 * (errors / spread) ** 2).mean())
        if loss < best:
            best, chosen = loss, factor
    whitening = vectors / (values + chosen * values.mean()).sqrt()
    buffer = potential.get_buffer("whitening")
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


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    errors, spreads = (torch.cat(column) for column in zip(*pairs, strict=True))
    return errors, spreads


def _factor(errors: Tensor, spreads: Tensor) -> float:
    labelled = torch.isfinite(errors)
    if not labelled.any():
        return 1.0
    size = float(errors[labelled].pow(2).mean().sqrt())
    spread = float(spreads[labelled].pow(2).mean().sqrt())
    return size / spread if size > 0 and spread > 0 else 1.0
