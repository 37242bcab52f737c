"""How sure a model is: sizes of its errors, measured on structures held out, or each left out.

The rigidity of the last layer (LLPR, Bigi 2024, 2403.02251) says which errors are large: with
``f`` the sum over atoms of what the energy is a linear function of (the last layer, and the numbers
of atoms of each element, by which reference energies count), the variance of the energy is
``α² fᵀ (F + ζ)⁻¹ f`` where ``F = Σ f fᵀ / n²`` over the training set, whose loss is that of
energies per atom. It is stored as a matrix ``W`` with ``W Wᵀ = (F + ζ)⁻¹``, so that the standard
deviation would be the norm of ``Wᵀ f``.

How new an atom is, the norm of ``Vᵀ g`` says, with its own part ``g`` of ``f``, and ``V`` made as
``W`` is of the mean of ``g gᵀ`` over the atoms of the training set. It stands for the uncertainty
of the force on the atom. The root of its RMS over the atoms is a factor of the energy's:
``|Wᵀ f| (mean |Vᵀ g|²)^¼``. Members of a committee are averaged.

A process that was fitted to all structures is judged by what it says of each without the energy of
that one, and ``F`` is taken without its term.

A committee also has the spread of its members: its square is added, with the weight that makes the
errors held out the likeliest. docs/uncertainty.md compares all of them.

Errors have heavier tails than a normal distribution, so there are two factors: one so that 68 % of
the errors held out are smaller than the uncertainty, one for 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.special import stdtrit
from torch import Tensor

from orbcalc.graph import AtomGraph
from orbcalc.model.committee import Calibration, Committee, joined_score
from orbcalc.model.potential import Potential, Prediction
from orbcalc.training.dataset import LabelDataset, Targets, on_device
from orbcalc.training.loss import tells_forces

__all__ = ["calibrate"]

#: Share of a normal distribution within one standard deviation.
ONE_SIGMA = 0.6827

#: ζ of structures, in units of the mean eigenvalue of F: the likeliest one is taken.
_REGULARISERS = tuple(10.0**power for power in range(-9, 2))

#: That of atoms, which are many: smaller ones and 1e-4 do as well.
_ATOM_REGULARISER = 1e-5

#: Share of a mean below which what is left without a structure is rounding.
_TINY = 1e-12

#: Weight of the spread, in units of what makes it as large as the rigidity: the likeliest, too.
_SPREAD_WEIGHTS = (0.0, *(10.0 ** (power / 4) for power in range(-4, 9)))


def calibrate(
    committee: Committee,
    train: LabelDataset,
    valid: LabelDataset,
    *,
    in_turn: bool = False,
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
    in_turn
        Of a single member with a process: `valid` is `train` with each structure left out in turn,
        see `orbcalc.training.process.left_out`.

    Returns
    -------
    Committee
        The same members. Without energies in `train` and `valid` a single member has no
        uncertainties, and several have their spread; without forces there are none of forces.
    """
    measured = []
    for member in committee.members:
        assert isinstance(member, Potential)
        measured.append(_measure_rigidity(member, train, valid, in_turn=in_turn))
    raw = Committee([*committee.members])
    if not raw.has_uncertainty:
        return raw
    if in_turn:
        (energies,), forces = measured, _HeldOut.nothing()
    else:
        energies, forces = _held_out(raw, valid)
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

    errors: Float[Tensor, "n 1"]
    rigidity: Float[Tensor, "n 1"]
    spread: Float[Tensor, "n 1"]

    @classmethod
    def nothing(cls) -> _HeldOut:
        return cls(*(torch.empty(0, 1, dtype=torch.float64) for _ in range(3)))

    def score(self, weight: float) -> Float[Tensor, "n 1"]:
        return joined_score(self.rigidity, self.spread, weight)


def _held_out(committee: Committee, valid: LabelDataset) -> tuple[_HeldOut, _HeldOut]:
    """Return those of energies, divided by the root of the number of atoms, and of forces.

    Components of forces that are zero by symmetry are left out, as all those of lone atoms are:
    every potential has them right.
    """
    energies: list[tuple[Tensor, ...]] = []
    forces: list[tuple[Tensor, ...]] = []
    for graph, targets in on_device(valid, committee.first):
        prediction = committee(graph, ("energy", "forces"))
        assert prediction.forces is not None
        row = (
            _energy_errors(committee.first, prediction, targets, graph),
            prediction.energy_rigidity,
            prediction.energy_spread,
        )
        roots = graph.n_atoms_of_structure.double().sqrt()
        energies.append(tuple(_column(values, roots) / roots[:, None] for values in row))
        is_told = tells_forces(graph, prediction.forces, targets.forces)
        errors = torch.where(is_told, prediction.forces - targets.forces, torch.nan)
        of_atoms = (prediction.atom_rigidity, prediction.forces_spread)
        scores = (_column(values, graph.numbers).repeat_interleave(3, 0) for values in of_atoms)
        forces.append((errors.double().reshape(-1, 1), *scores))
    return _joined(energies), _joined(forces)


def _column(values: Tensor | None, like: Tensor) -> Tensor:
    values = torch.zeros_like(like) if values is None else values
    return values.double().reshape(len(like), -1)


def _joined(rows: Sequence[tuple[Tensor, ...]]) -> _HeldOut:
    """Join batches, without what has no error."""
    errors, rigidity, spread = (torch.cat(column) for column in zip(*rows, strict=True))
    known = errors.isfinite().squeeze(1)
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
    potential: Potential,
    train: LabelDataset,
    valid: LabelDataset,
    *,
    in_turn: bool,
) -> _HeldOut:
    """Set the whitenings of the last layer, zero without energies; return what chose them."""
    buffers = [potential.get_buffer(name) for name in ("whitening", "atom_whitening")]
    for buffer in buffers:
        buffer.zero_()  # it may be that of an earlier training
    products, n_known = _mean_products(potential, train)
    if n_known == 0:
        return _HeldOut.nothing()
    n_elements = len(potential.elements)
    (of_atoms,) = _whitenings(products[1], n_elements, (_ATOM_REGULARISER,))
    is_process = potential.n_inducing > 0
    # Of how many terms F is the mean, if that of a structure is among them.
    n_means = n_known if in_turn else math.inf
    errors, means, factors = list[Tensor](), list[Tensor](), list[Tensor]()
    for graph, targets, prediction, last in _last_layers(potential, valid):
        n_atoms = graph.n_atoms_of_structure.double()
        found = _energy_errors(potential, prediction, targets, graph) / n_atoms.sqrt()
        for number in found.isfinite().nonzero()[:, 0].tolist():
            own = last[graph.structure_index == number]
            novelty = 1.0 if is_process else float((own @ of_atoms).square().sum(1).mean())
            errors.append(found[number])
            means.append(own.mean(0))
            factors.append(n_atoms[number].sqrt() * novelty**0.25)
    if not errors:
        return _HeldOut.nothing()
    column, rows, factor = torch.stack(errors)[:, None], torch.stack(means), torch.stack(factors)

    def scores(whitening: Tensor) -> Float[Tensor, "n 1"]:
        squares = (rows @ whitening).square().sum(1)
        without = squares / (1.0 - squares / n_means).clamp_min(_TINY)
        return (factor * without.sqrt())[:, None]

    of_structures = min(
        _whitenings(products[0], n_elements, _REGULARISERS),
        key=lambda whitening: _unlikelihood(column, scores(whitening)),
    )
    for buffer, whitening in zip(buffers, (of_structures, of_atoms), strict=True):
        buffer.copy_(whitening.to(buffer))
    return _HeldOut(column, scores(of_structures), torch.zeros_like(column))


def _mean_products(
    potential: Potential, train: LabelDataset
) -> tuple[Float[Tensor, "2 n_last n_last"], int]:
    """Return the mean of f fᵀ / n² over structures with an energy, and that of g gᵀ over atoms.

    These are the atoms of those structures, and all with a force. Also the number of structures.
    """
    n_last = len(potential.get_buffer("whitening"))
    device = potential.element_index.device
    products = torch.zeros(2, n_last, n_last, dtype=torch.float64, device=device)
    counts = products.new_zeros(2)
    told = train.labelled(["energy", "forces"])
    for graph, targets, _, last in _last_layers(potential, train, told):
        labelled = torch.isfinite(targets.energy)
        means = graph.sum_over_atoms(last) / graph.n_atoms_of_structure[:, None]
        forces_known = torch.isfinite(targets.forces).all(1)
        own = last[labelled[graph.structure_index] | forces_known]
        for index, rows in enumerate((means[labelled], own)):
            products[index] += rows.T @ rows
            counts[index] += len(rows)
    return products / counts.clamp_min(1.0)[:, None, None], int(counts[0])


def _last_layers(
    potential: Potential,
    dataset: LabelDataset,
    among: Sequence[int] | None = None,
) -> Iterator[tuple[AtomGraph, Targets, Prediction, Float[Tensor, "n_atoms n_last"]]]:
    """Go through a data set with the energies and last layers that a potential finds."""
    for graph, targets in on_device(dataset, potential, among):
        with torch.no_grad():
            prediction = potential(graph, ("energy", "last_layer"))
        assert prediction.last_layer is not None
        yield graph, targets, prediction, prediction.last_layer.double()


def _whitenings(
    products: Float[Tensor, "n_last n_last"], n_elements: int, regularisers: Sequence[float]
) -> list[Float[Tensor, "n_last n_last"]]:
    """Return W with ``W Wᵀ = (F + ζ)⁻¹`` for each ζ, which is in units of the mean eigenvalue of F.

    The columns of elements, the last ones, are made as large as all others are together.
    """
    scales = torch.ones_like(products[0])
    size = products.diagonal()[:-n_elements].sum().sqrt()
    if size > 0:  # not if all are lone atoms
        scales[-n_elements:] = size
    values, vectors = torch.linalg.eigh(products * scales * scales[:, None])
    values = values.clamp_min(0.0)
    rows = scales[:, None] * vectors
    return [rows / (values + factor * values.mean()).sqrt() for factor in regularisers]


def _energy_errors(
    potential: Potential, prediction: Prediction, targets: Targets, graph: AtomGraph
) -> Float[Tensor, " n_structures"]:
    """Return errors in eV; NaN without a label, for lone atoms, and with an unknown element."""
    errors = prediction.energy - targets.energy
    n_bound = graph.sum_over_atoms(graph.mask.any(1).to(errors))
    untold = ~potential.told[potential.element_index[graph.numbers]]
    n_untold = graph.sum_over_atoms(untold.to(errors))
    return torch.where((n_bound > 0) & (n_untold == 0), errors, torch.nan)


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
    1604.04173), which covers that share on average. Fewer than 19 have no rank for 95 %: then
    they are taken for normal, and Student's t times their RMS covers it; not less than the largest.
    """
    sizes = ratios[torch.isfinite(ratios)].abs().sort().values
    count = len(sizes)
    if count == 0:
        return unknown
    rank = math.ceil((count + 1) * share)
    if rank <= count:
        found = float(sizes[rank - 1])
    else:
        student = float(stdtrit(count, (1 + share) / 2))
        found = max(student * float(sizes.square().mean().sqrt()), float(sizes[-1]))
    return found if found > 0 else unknown
