"""How sure a model is: sizes of its errors, measured on structures held out.

The rigidity of the last layer (LLPR, Bigi 2024, 2403.02251) says which errors are large: with
``f`` the sum over atoms of what the energy is a linear function of (the last layer, and the numbers
of atoms of each element, by which reference energies count), the variance of the energy is
``α² fᵀ (F + ζ)⁻¹ f`` where ``F = Σ f fᵀ / n²`` over the training set, whose loss is that of
energies per atom. It is stored as a matrix ``W`` with ``W Wᵀ = (F + ζ)⁻¹``, so that the standard
deviation is the norm of ``Wᵀ f``; for one atom, with its own part of ``f``, the same norm stands
for the uncertainty of its force. Members of a committee are averaged.

A committee also has the spread of its members: its square is added, with the weight that makes the
errors held out the likeliest. docs/uncertainty.md compares all of them.

Errors have heavier tails than a normal distribution, so there are two factors: one so that 68 % of
the errors held out are smaller than the uncertainty, one for 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from orbcalc.graph import AtomGraph
from orbcalc.model.committee import Calibration, Committee, joined_score
from orbcalc.model.potential import Potential, Prediction
from orbcalc.training.dataset import LabelDataset, Targets
from orbcalc.training.trainer import on_device

__all__ = ["calibrate"]

#: Share of a normal distribution within one standard deviation.
ONE_SIGMA = 0.6827

#: ζ, in units of the mean eigenvalue of F: the likeliest one is taken.
_REGULARISERS = tuple(10.0**power for power in range(-9, 2))

#: Weight of the spread, in units of what makes it as large as the rigidity: the likeliest, too.
_SPREAD_WEIGHTS = (0.0, *(10.0 ** (power / 4) for power in range(-4, 9)))


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
        The same members. Without energies in `train` and `valid` a single member has no
        uncertainties, and several have their spread; without forces there are none of forces.
    """
    for member in committee.members:
        assert isinstance(member, Potential)
        _measure_rigidity(member, train, valid, batch_size)
    raw = Committee([*committee.members])
    if not raw.has_uncertainty:
        return raw
    energies, forces = _held_out(raw, valid, batch_size)
    energy_weight, energy, energy_95 = _scales(energies)
    forces_weight, force, force_95 = _scales(forces)
    has_forces = len(forces.errors) > 0
    return Committee(
        [*committee.members],
        Calibration(
            energy,
            force if has_forces else None,
            energy_95,
            force_95 if has_forces else None,
            energy_weight,
            forces_weight,
        ),
    )


@dataclass(frozen=True)
class _HeldOut:
    """Errors of one quantity, and what is known of their size; zero for what is not."""

    errors: Float[Tensor, "n n_components"]
    rigidity: Float[Tensor, "n 1"]
    spread: Float[Tensor, "n 1"]

    def score(self, weight: float) -> Float[Tensor, "n 1"]:
        return joined_score(self.rigidity, self.spread, weight)


def _held_out(
    committee: Committee, valid: LabelDataset, batch_size: int
) -> tuple[_HeldOut, _HeldOut]:
    """Return those of energies, divided by the root of the number of atoms, and of forces."""
    energies: list[tuple[Tensor, ...]] = []
    forces: list[tuple[Tensor, ...]] = []
    for graph, targets in on_device(valid, batch_size, committee.first):
        prediction = committee(graph, ("energy", "forces"))
        assert prediction.forces is not None
        row = (
            _energy_errors(committee.first, prediction, targets, graph),
            prediction.energy_rigidity,
            prediction.energy_spread,
        )
        roots = graph.n_atoms_of_structure.double().sqrt()
        energies.append(tuple(_column(values, roots) / roots[:, None] for values in row))
        has_neighbors = graph.mask.any(1, keepdim=True)
        row = (
            torch.where(has_neighbors, prediction.forces - targets.forces, torch.nan),
            prediction.atom_rigidity,
            prediction.forces_spread,
        )
        forces.append(tuple(_column(values, graph.numbers) for values in row))
    return _joined(energies), _joined(forces)


def _column(values: Tensor | None, like: Tensor) -> Tensor:
    values = torch.zeros_like(like) if values is None else values
    return values.double().reshape(len(like), -1)


def _joined(rows: Sequence[tuple[Tensor, ...]]) -> _HeldOut:
    """Join batches, without what has no error."""
    errors, rigidity, spread = (torch.cat(column) for column in zip(*rows, strict=True))
    known = errors.isfinite().all(1)
    return _HeldOut(errors[known], rigidity[known], spread[known])


def _scales(held_out: _HeldOut) -> tuple[float, float, float]:
    """Return the weight of the spread, and the factors for 68 and 95 % of the errors."""
    weight = 1.0
    if held_out.rigidity.any() and held_out.spread.any():
        unit = _rms_ratio(held_out.rigidity, held_out.spread)
        weights = [unit * weight for weight in _SPREAD_WEIGHTS]
        weight = min(weights, key=lambda w: _unlikelihood(held_out.errors, held_out.score(w)))
    ratios = held_out.errors / held_out.score(weight)
    return weight, _quantile(ratios, ONE_SIGMA, unknown=1.0), _quantile(ratios, 0.95, unknown=1.96)


def _measure_rigidity(
    potential: Potential, train: LabelDataset, valid: LabelDataset, batch_size: int
) -> None:
    """Set the whitening of the last layer; it is zero without energies."""
    buffer = potential.get_buffer("whitening")
    buffer.zero_()  # it may be that of an earlier training
    known, _, n_known = _last_layers(potential, train, batch_size)
    new, errors, n_new = _last_layers(potential, valid, batch_size)
    told = errors.isfinite()
    new, errors, n_new = new[told], errors[told], n_new[told]
    if len(known) == 0 or len(new) == 0:
        return
    per_atom = known / n_known[:, None]
    scales = _column_scales(per_atom, len(potential.elements))
    values, vectors = torch.linalg.eigh((per_atom * scales).T @ (per_atom * scales))
    values = values.clamp_min(0.0)
    projected = ((new * scales) @ vectors) ** 2
    roots = n_new.sqrt()

    def unlikelihood(factor: float) -> float:
        rigidity = (projected / (values + factor * values.mean())).sum(1).sqrt()
        return _unlikelihood(errors / roots, rigidity / roots)

    factor = min(_REGULARISERS, key=unlikelihood)
    whitening = vectors / (values + factor * values.mean()).sqrt()
    buffer.copy_((scales[:, None] * whitening).to(buffer))


def _column_scales(
    per_atom: Float[Tensor, "n n_last"], n_elements: int
) -> Float[Tensor, " n_last"]:
    """Return factors that make the shares of elements, the last columns, as large as the others."""
    scales = torch.ones_like(per_atom[0])
    size = per_atom[:, :-n_elements].square().sum(1).mean().sqrt()
    if size > 0:  # not if all are lone atoms
        scales[-n_elements:] = size
    return scales


def _energy_errors(
    potential: Potential, prediction: Prediction, targets: Targets, graph: AtomGraph
) -> Float[Tensor, " n_structures"]:
    """Return errors in eV; NaN without a label, for lone atoms, and with an unknown element."""
    errors = prediction.energy - targets.energy
    n_bound = graph.sum_over_atoms(graph.mask.any(1).to(errors))
    untold = ~potential.told[potential.element_index[graph.numbers]]
    n_untold = graph.sum_over_atoms(untold.to(errors))
    return torch.where((n_bound > 0) & (n_untold == 0), errors, torch.nan)


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
        errors = _energy_errors(potential, prediction, targets, graph)
        rows.append((last[labelled], errors[labelled], n_atoms[labelled]))
    last, errors, n_atoms = (torch.cat(column) for column in zip(*rows, strict=True))
    return last, errors, n_atoms


def _unlikelihood(errors: Tensor, scores: Tensor) -> float:
    """Return minus the mean logarithm of the likelihood, with scores scaled to the errors' RMS."""
    spreads = scores * _rms_ratio(errors, scores)
    return float((spreads.log() + 0.5 * (errors / spreads) ** 2).mean())


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
