"""What is fixed before training: reference energies and the scales of all quantities."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from ase.data import atomic_numbers, chemical_symbols
from ase.symbols import Symbols
from e3nn.o3 import Irreps
from jaxtyping import Bool, Float
from torch import Tensor

from orbcalc.config import PotentialConfig
from orbcalc.errors import ConfigError
from orbcalc.graph import AtomGraph
from orbcalc.model.basis import polynomial_cutoff
from orbcalc.model.potential import Statistics
from orbcalc.orbitals import diagonal_basis
from orbcalc.properties import BLOCK_IRREPS
from orbcalc.training.dataset import LabelDataset

__all__ = [
    "charge_targets",
    "fit_reference_energies",
    "fit_statistics",
    "given_energies",
    "is_lone_atom",
    "is_wild",
    "wild_energies",
]

logger = logging.getLogger(__name__)

#: A spread below this share of the largest one is taken for noise (e).
_MIN_CHARGE_SCALE = 1e-3

#: A number this many times as large as usual is an error of the label, if only a few are.
_WILD, _FEW = 100.0, 0.01

#: eV per atom: what is off by less may be rounding, where energies are exactly those of atoms.
_MIN_WILD = 0.1

#: eV/Å: what is less may be that of atoms pushed together.
_MIN_WILD_FORCE = 50.0

#: Rounds of the fit that finds wild energies, and structures that it takes for each element.
_REWEIGHTED, _ENOUGH = 20, 3


def fit_statistics(
    dataset: LabelDataset,
    config: PotentialConfig,
    reference_energies: Mapping[str, float] | None = None,
) -> Statistics:
    """Measure the training set.

    Parameters
    ----------
    dataset
        Training structures; structures without a label simply do not count for it.
    config
        Of the potential.
    reference_energies
        Energy of each lone atom by symbol, eV; by default that of labelled lone atoms, and a
        least-squares fit of the energies for the other elements.

    Raises
    ------
    ConfigError
        If reference energies are given, but not for every element.
    """
    elements, counts = dataset.elements, dataset.element_counts
    energies = torch.cat([targets.energy for targets in dataset.targets])
    forces = torch.cat([targets.forces for targets in dataset.targets])
    xtb_energies = torch.cat([targets.xtb_energy for targets in dataset.targets])
    xtb_forces = torch.cat([targets.xtb_forces for targets in dataset.targets])
    n_atoms = counts.sum(1)
    _warn_of_wild_forces(dataset)
    xtb_reference = fit_reference_energies(dataset, xtb_energies)
    xtb_residuals = xtb_energies - counts @ xtb_reference
    # What is learned from the reference labels: the energy, or its difference from GFN1-xTB.
    on_top = config.xtb_head == "baseline" and bool(
        torch.isfinite(energies + xtb_energies).any() or torch.isfinite(forces + xtb_forces).any()
    )
    learned = energies - xtb_energies if on_top else energies
    told = counts[torch.isfinite(learned)].sum(0) > 0
    if reference_energies is not None:
        reference = given_energies(reference_energies, elements)
        told = torch.ones_like(told)
    else:
        _warn_of_unknown(elements, told)
        reference = fit_reference_energies(dataset, learned)
        if on_top:
            reference = reference + xtb_reference
    residuals = energies - counts @ reference
    if on_top:
        residuals, forces = residuals - xtb_residuals, forces - xtb_forces
    shift, scale = _charge_statistics(dataset, elements, config)
    return Statistics(
        reference_energies=reference,
        energy_scale=_energy_scale(forces, residuals, n_atoms),
        neighbor_scale=_neighbor_scale(dataset, config.cutoff),
        charge_shift=shift,
        charge_scale=scale,
        xtb_reference_energies=xtb_reference if config.learns_xtb_energy else None,
        xtb_energy_scale=_energy_scale(xtb_forces, xtb_residuals, n_atoms),
        told=told,
    )


def fit_reference_energies(
    dataset: LabelDataset,
    energies: Float[Tensor, " n_structures"],
    among: Bool[Tensor, " n_elements"] | None = None,
) -> Float[Tensor, " n_elements"]:
    """Fit energies of elements to energies of structures, eV, NaN for none.

    That of labelled lone atoms where there are some, since a potential can give them no other;
    by least squares for the other elements.

    Parameters
    ----------
    dataset
        The structures; its elements are sorted.
    energies
        What the elements should come to.
    among
        Elements to fit; the others have 0, as those without an energy have.
    """
    counts = dataset.element_counts
    is_lone = torch.tensor([is_lone_atom(graph) for graph in dataset.graphs])
    solution = counts.new_zeros(counts.shape[1])
    labelled = torch.isfinite(energies)
    chosen = torch.ones_like(solution, dtype=torch.bool) if among is None else among
    lone = counts[labelled & is_lone]
    n_lone = lone.sum(0)
    known = (n_lone > 0) & chosen
    solution[known] = (lone.T @ energies[labelled & is_lone])[known] / n_lone[known]
    left = chosen & ~known
    rows = labelled & (counts[:, left].sum(1) > 0)
    if rows.any():
        rest = (energies - counts @ solution)[rows]
        wild = wild_energies(counts[rows][:, left], rest)
        _warn_of_wild(dataset, rows.nonzero()[wild, 0].tolist())
        solution[left] = _least_squares(counts[rows][:, left][~wild], rest[~wild])
    return solution


def is_wild(values: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Tell which numbers are so large that they can only be wrong, as of an SCF gone astray.

    They are a hundred times as large as the median of those that are not zero, and at most one in
    a hundred is so (or a single one): a set of relaxed and of torn structures has none.
    """
    sizes = values.abs()
    known = sizes[torch.isfinite(sizes) & (sizes > 0)]
    if len(known) < 3:
        return torch.zeros_like(values, dtype=torch.bool)
    wild = sizes > _WILD * known.median()
    return wild if int(wild.sum()) <= max(1, _FEW * len(values)) else torch.zeros_like(wild)


def wild_energies(
    counts: Float[Tensor, "n n_elements"], energies: Float[Tensor, " n"]
) -> Bool[Tensor, " n"]:
    """Tell which energies are far from what all others say of such a composition."""
    if len(energies) < _ENOUGH * int(torch.linalg.matrix_rank(counts)):
        return torch.zeros_like(energies, dtype=torch.bool)  # a fit of few goes through most
    weights = torch.ones_like(energies)
    left = energies
    for _ in range(_REWEIGHTED):  # least absolute deviations, which a wild one does not bend
        roots = weights.sqrt()
        left = energies - counts @ _least_squares(counts * roots[:, None], energies * roots)
        weights = 1 / left.abs().clamp_min(1e-3 * float(left.abs().median()) + 1e-9)
    left = left / counts.sum(1)
    return is_wild(left) & (left.abs() > _MIN_WILD)


def _least_squares(counts: Tensor, energies: Tensor) -> Float[Tensor, " n_elements"]:
    solution: Tensor = torch.linalg.lstsq(counts, energies[:, None], driver="gelsd").solution
    return solution[:, 0]


def _warn_of_wild(dataset: LabelDataset, indices: list[int]) -> None:
    if indices:
        logger.warning(
            "energies of %d structures are a hundred times as far from what their elements come "
            "to as is usual (the first: structure %d, %s). Reference energies are fitted without "
            "them; correct the labels, or leave them out.",
            len(indices),
            indices[0],
            _formula(dataset, indices[0]),
        )


def _warn_of_wild_forces(dataset: LabelDataset) -> None:
    largest = torch.stack([t.forces.nan_to_num().abs().max() for t in dataset.targets])
    wild = (is_wild(largest) & (largest > _MIN_WILD_FORCE)).nonzero()[:, 0].tolist()
    if wild:
        logger.warning(
            "%d structures (the first: structure %d, %s) have forces a hundred times as large as "
            "is usual. They are learned nevertheless; correct the labels, or leave them out.",
            len(wild),
            wild[0],
            _formula(dataset, wild[0]),
        )


def _formula(dataset: LabelDataset, index: int) -> str:
    numbers = dataset.graphs[index].numbers.tolist()
    formula: str = Symbols(numbers).get_chemical_formula()
    return formula


def charge_targets(
    blocks: Float[Tensor, "n_atoms 23"], config: PotentialConfig
) -> Float[Tensor, "n_atoms n_components"]:
    """Turn charge blocks into what the charge head of a potential predicts."""
    if config.charge_head != "invariant":
        return blocks
    basis = torch.as_tensor(diagonal_basis(), dtype=blocks.dtype, device=blocks.device)
    absent = torch.isnan(blocks).to(blocks.dtype) @ basis.abs() > 0
    return torch.where(absent, torch.nan, torch.nan_to_num(blocks) @ basis)


def is_lone_atom(graph: AtomGraph) -> bool:
    """Tell whether a structure is a neutral atom without neighbours."""
    return graph.n_atoms == 1 and not bool(graph.mask.any()) and not bool(graph.charge.any())


def _warn_of_unknown(elements: list[int], told: Tensor) -> None:
    """Tell of elements that are in no structure with an energy, if there are such structures."""
    unknown = [
        chemical_symbols[z] for z, is_told in zip(elements, told, strict=True) if not is_told
    ]
    if told.any() and unknown:
        logger.warning(
            "no structure with an energy label has %s: energies of structures with it are off by "
            "an unknown amount for each such atom, and as uncertain. Give reference_energies, or "
            "an energy label.",
            ", ".join(unknown),
        )


def given_energies(given: Mapping[str, float], elements: list[int]) -> Float[Tensor, " n_elements"]:
    """Return the energies of elements, eV, that a configuration gives.

    Raises
    ------
    ConfigError
        If one is missing, or no element.
    """
    unknown = [symbol for symbol in given if symbol not in atomic_numbers]
    missing = [chemical_symbols[z] for z in elements if chemical_symbols[z] not in given]
    if unknown or missing:
        raise ConfigError(
            f"reference_energies: unknown symbols {unknown}, missing elements {missing}. "
            f"Give one energy in eV for each element of the training set, or leave it out."
        )
    return torch.tensor([given[chemical_symbols[z]] for z in elements], dtype=torch.float64)


def _energy_scale(forces: Tensor, residuals: Tensor, n_atoms: Tensor) -> float:
    """Return the RMS of the force components (eV/Å x 1 Å), or of the energy left per sqrt(atom)."""
    forces = forces[torch.isfinite(forces)]
    left = (residuals / n_atoms.sqrt())[torch.isfinite(residuals)]
    for values in (forces, left):
        values = values[~is_wild(values)]
        if len(values) and (size := float(values.pow(2).mean().sqrt())) > 1e-6:
            return size
    return 1.0


def _neighbor_scale(dataset: LabelDataset, cutoff: float) -> float:
    total, n_atoms = 0.0, 0
    for graph in dataset.graphs:
        envelope = polynomial_cutoff(graph.edge_vectors().norm(dim=-1), cutoff)
        total += float(torch.where(graph.mask, envelope, 0.0).pow(2).sum())
        n_atoms += graph.n_atoms
    return math.sqrt(max(total / n_atoms, 1.0))


def _charge_statistics(
    dataset: LabelDataset, elements: list[int], config: PotentialConfig
) -> tuple[Tensor, Tensor]:
    """Return mean and spread of the charge labels by element and component.

    Components of one irrep share their spread, and only scalars have a mean: anything else
    would break the symmetry.
    """
    targets = charge_targets(torch.cat([t.charges for t in dataset.targets]), config)
    numbers = torch.cat([graph.numbers for graph in dataset.graphs])
    n_components = targets.shape[1]
    shift = torch.zeros(len(elements), n_components, dtype=torch.float64)
    scale = torch.ones(len(elements), n_components, dtype=torch.float64)
    if config.charge_head == "invariant":
        spans = [(slice(k, k + 1), 0) for k in (0, 1)] + [(slice(2, 5), 0), (slice(5, 10), 0)]
    else:
        irreps = Irreps(BLOCK_IRREPS)
        spans = [(s, ir.l) for s, (_, ir) in zip(irreps.slices(), irreps, strict=True)]
    for row, number in enumerate(elements):
        own = targets[numbers == number]
        for span, degree in spans:
            values = own[:, span][torch.isfinite(own[:, span])]
            if len(values) == 0:
                continue
            mean = values.mean() if degree == 0 else values.new_zeros(())
            shift[row, span] = mean
            scale[row, span] = (values - mean).pow(2).mean().sqrt()
    floor = _MIN_CHARGE_SCALE * max(1.0, float(scale.max()))
    return shift, scale.clamp_min(floor)
