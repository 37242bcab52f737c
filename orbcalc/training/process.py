"""Fit the process of `energy_head: process`: the difference from GFN1-xTB, in closed form.

With the features of atoms fixed, the difference is a Gaussian process plus a sum over elements
(Rasmussen & Williams 2006, Gaussian Processes for Machine Learning, section 2.7), observed with a
noise whose variance grows with the number of atoms. Its size is that of the highest marginal
likelihood. Before there is any energy the process can be placed: what is known then is how much
each energy would tell about the others. Once it is fitted, what it would say of each structure
without the energy of that structure is known as well: nothing needs to be held out.
"""

from __future__ import annotations

import logging
import math
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from orbcalc.errors import MissingLabelError
from orbcalc.graph import part_size
from orbcalc.model.potential import Potential
from orbcalc.model.process import ProcessHead, gaussian
from orbcalc.training.dataset import LabelDataset, on_device
from orbcalc.training.statistics import (
    fit_reference_energies,
    is_lone_atom,
    wild_energies,
)

__all__ = ["fit_process", "left_out", "place_process"]

logger = logging.getLogger(__name__)

#: Atoms that represent the process, and those that they are chosen from.
N_INDUCING, _CANDIDATES = 1_000, 10_000

#: Atoms, of whole structures, that the process is placed on, and structures of a rare element.
_PLACES, _OF_RARE = 50_000, 20

#: Inducing atoms stop where all others are known that well (a variance, of 1).
_KNOWN = 1e-4

#: Width of the kernel, in units of the RMS distance of an atom from the mean in one layer. The
#: likeliest one is no better: docs/data-efficiency-study.md has the measurements.
_WIDTH = 2.8

#: Variances of the noise, in units of that of the process.
_NOISES = tuple(10.0 ** (power / 2) for power in range(-16, 1))

#: Share of the mean square of a feature below which its variance is rounding.
_ROUNDING = 1e-10

#: Prior variance of energies of elements, in units of that of the process: wide.
_WIDE = 1e4


class _Atoms(NamedTuple):
    """Atoms of some structures."""

    features: Float[Tensor, "n_atoms n_features"]
    elements: Int[Tensor, " n_atoms"]
    owners: Int[Tensor, " n_atoms"]
    """Structure of each."""


def place_process(potential: Potential, dataset: LabelDataset) -> None:
    """Choose inducing atoms; the energy is that of GFN1-xTB, as no other one is known.

    Parameters
    ----------
    potential
        Trained on cheap labels, with a `ProcessHead` and a GFN1-xTB energy.
    dataset
        Structures, whose labels do not count.
    """
    counts = dataset.with_elements(potential.elements).element_counts
    atoms = _atoms(potential, dataset, _representatives(counts))
    potential.energy_head = _placed(potential, atoms).to(potential.element_index.device)
    potential.forget_rigidity()
    potential.reference_energies = potential.xtb_reference_energies
    potential.told = torch.zeros_like(potential.told)


def fit_process(potential: Potential, dataset: LabelDataset) -> None:
    """Fit the energy head and the reference energies of a potential to energies.

    Energies that can only be wrong are left out, and those of lone atoms: what lies between them
    and bound atoms is more than few labels and a smooth function can tell.

    Parameters
    ----------
    potential
        Trained on cheap labels, with a `ProcessHead` and a GFN1-xTB energy.
    dataset
        Structures; only those with an energy count.

    Raises
    ------
    MissingLabelError
        If no structure but lone atoms has an energy.
    """
    known = _known(potential, dataset)
    if known.n_lone > 0:
        logger.warning(
            "energies of %d lone atoms are not learned by energy_head: process; choose network to "
            "keep them",
            known.n_lone,
        )
    head = _placed(potential, known.atoms)
    fit = _Fit.of(head, known)
    logger.info("process: noise %.1e of its variance", fit.noise)
    weights, correction = fit.solution[: head.n_last], torch.zeros_like(known.shift)
    head.weights = head.factor @ weights / (fit.unit * potential.energy_scale)
    correction[known.told] = math.sqrt(_WIDE) * fit.solution[head.n_last :]
    device = potential.element_index.device
    potential.energy_head = head.to(device)
    potential.forget_rigidity()
    references = potential.xtb_reference_energies.cpu() + known.shift + correction
    potential.reference_energies = references
    potential.told = known.told.to(device)


def left_out(potential: Potential, dataset: LabelDataset) -> LabelDataset:
    """Return the structures with energies that show the errors of leave-one-out.

    The error of a prediction of the potential, which was fitted to these structures, is then what
    it would be without the energy of that structure; features, inducing atoms and the size of the
    noise stay (Rasmussen & Williams 2006, section 5.4.2). A structure that alone tells of an
    element has no energy then, as it could not be predicted. Nothing changes for what it was not
    fitted to.

    Parameters
    ----------
    potential
        With a process that was fitted to `dataset`.
    dataset
        As it was fitted to.

    Raises
    ------
    MissingLabelError
        If no structure but lone atoms has an energy.
    """
    known = _known(potential, dataset)
    head = potential.energy_head
    assert isinstance(head, ProcessHead)
    is_sole = ((known.counts > 0) & ((known.counts > 0).sum(0) == 1)).any(1)
    own = _Fit.of(deepcopy(head).cpu(), known).moves * known.roots
    moves = torch.zeros(len(dataset), dtype=torch.float64)
    moves[known.chosen] = torch.where(is_sole, torch.nan, own)
    return dataset.with_energies(
        [t.energy + move for t, move in zip(dataset.targets, moves, strict=True)]
    )


class _Known(NamedTuple):
    """Energies that a process is fitted to."""

    chosen: Int[Tensor, " n"]
    """Their structures in the data set."""
    counts: Float[Tensor, "n n_elements"]
    left: Float[Tensor, " n"]
    """Differences from GFN1-xTB that reference energies leave, eV."""
    atoms: _Atoms
    shift: Float[Tensor, " n_elements"]
    """Reference energies less those of GFN1-xTB, eV."""
    told: Bool[Tensor, " n_elements"]
    """Elements that the energies tell of."""
    n_lone: int
    """Energies of lone atoms, which are left out."""

    @property
    def roots(self) -> Float[Tensor, " n"]:
        """Errors grow with the root of the number of atoms."""
        return self.counts.sum(1).sqrt()


def _known(potential: Potential, dataset: LabelDataset) -> _Known:
    dataset = dataset.with_elements(potential.elements)
    differences = _differences(potential, dataset)
    is_lone = torch.tensor([is_lone_atom(graph) for graph in dataset.graphs])
    n_lone = int(differences[is_lone].isfinite().sum())
    differences = torch.where(is_lone, torch.nan, differences)
    rows = differences.isfinite().nonzero()[:, 0]
    if len(rows) == 0:
        raise MissingLabelError(
            "no structure of the training set, lone atoms apart, has an energy: energy_head: "
            "process has nothing to be fitted to. Label some (`orbcalc label --reference METHOD`)."
        )
    counts = dataset.element_counts
    told = counts[rows].sum(0) > 0
    shift = fit_reference_energies(dataset, differences)
    wild = wild_energies(counts[rows][:, told], differences[rows])
    chosen = rows[~wild]
    atoms = _atoms(potential, dataset, chosen.tolist())
    left = (differences - counts @ shift)[chosen]
    return _Known(chosen, counts[chosen], left, atoms, shift, told, n_lone)


def _differences(potential: Potential, dataset: LabelDataset) -> Float[Tensor, " n_structures"]:
    """Return energies less those of GFN1-xTB, NaN for none.

    Without a label of the latter the learned one is taken.
    """
    found = torch.full((len(dataset),), torch.nan, dtype=torch.float64)
    labelled = dataset.labelled(["energy"])
    rows = []
    for graph, targets in on_device(dataset, potential, labelled):
        with torch.no_grad():
            learned = potential(graph, ("xtb_energy",)).xtb_energy
        known = targets.xtb_energy.isfinite()
        rows.append(targets.energy - torch.where(known, targets.xtb_energy, learned))
    if rows:
        found[labelled] = torch.cat(rows).cpu()
    return found


def _representatives(counts: Float[Tensor, "n n_elements"]) -> list[int]:
    """Choose structures at random, among them some of each element."""
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(0))
    of_elements = [order[own][:_OF_RARE] for own in (counts[order] > 0).T]
    first = order[counts[order].sum(1).cumsum(0) <= _PLACES]
    return [int(index) for index in torch.cat([first, *of_elements]).unique()]


def _atoms(potential: Potential, dataset: LabelDataset, chosen: list[int]) -> _Atoms:
    features, elements = [], []
    for graph, _ in on_device(dataset, potential, chosen):
        kinds = potential.element_index[graph.numbers]
        with torch.no_grad():
            vectors = graph.edge_vectors().to(potential.dtype)
            in_parts = part_size(graph.numbers) < graph.n_atoms
            nodes = potential.backbone(vectors, kinds, graph, 0, in_parts=in_parts)
        features.append(ProcessHead.features(nodes).cpu())
        elements.append(kinds.cpu())
    sizes = torch.tensor([dataset.graphs[index].n_atoms for index in chosen])
    owners = torch.arange(len(chosen)).repeat_interleave(sizes)
    return _Atoms(torch.cat(features), torch.cat(elements), owners)


def _placed(potential: Potential, atoms: _Atoms) -> ProcessHead:
    """Return a head whose inducing atoms are some of these; its weights are zero."""
    channels = potential.config.channels
    head = ProcessHead(channels, potential.config.layers)
    centre = atoms.features.mean(0)
    spread, whole = (
        values.unflatten(1, (-1, channels)).square().sum(2).mean(0)
        for values in (atoms.features - centre, atoms.features)
    )
    # What does not vary but by rounding, as charge and spin in most sets, must not be blown up.
    spread = torch.where(spread > _ROUNDING * whole, spread, 1.0)
    size = _WIDTH * spread.sqrt().repeat_interleave(channels)
    chosen = _inducing((atoms.features - centre) / size, atoms.elements)
    head.place(centre, size, atoms.features[chosen], atoms.elements[chosen])
    return head


@dataclass(frozen=True)
class _Fit:
    """Mean of weights of unit variance a priori, with the likeliest noise.

    The variance of all, of which that of the noise is a share, is the likeliest one as well.
    """

    unit: float
    """Mean size of the process."""
    noise: float
    """Variance, as a share of that of the process."""
    solution: Float[Tensor, " n_columns"]
    moves: Float[Tensor, " n"]
    """What an energy adds to its own prediction, eV over the root of the number of atoms."""

    @classmethod
    def of(cls, head: ProcessHead, known: _Known) -> _Fit:
        """Fit the weights of functions of atoms, then of told elements."""
        functions = torch.zeros(len(known.left), head.n_last, dtype=torch.float64)
        atoms = known.atoms
        for part in torch.arange(len(atoms.owners)).split(_CANDIDATES):
            own = head.functions(atoms.features[part], atoms.elements[part])
            functions.index_add_(0, atoms.owners[part], own)
        functions /= known.roots[:, None]
        unit = float(functions.square().sum(1).mean().sqrt()) or 1.0  # zero if all atoms are alone
        of_elements = math.sqrt(_WIDE) * known.counts[:, known.told] / known.roots[:, None]
        columns = torch.cat([functions / unit, of_elements], dim=1)
        values = known.left / known.roots
        u, s, vh = torch.linalg.svd(columns, full_matrices=False)
        projected = u.T @ values
        noise = _likeliest_noise(s, projected, values)
        solution: Tensor = vh.T @ (s / (s.square() + noise) * projected)
        shares = s.square() / (s.square() + noise)
        leverages = u.square() @ shares
        left = values - u @ (shares * projected)
        return cls(unit, noise, solution, left * leverages / (1.0 - leverages))


def _likeliest_noise(
    s: Float[Tensor, " m"], projected: Float[Tensor, " m"], values: Float[Tensor, " n"]
) -> float:
    n = len(values)
    beside = (values.square().sum() - projected.square().sum()).clamp_min(0.0)
    evidence = []
    for noise in _NOISES:
        variances = s.square() + noise
        square = (projected.square() / variances).sum() + beside / noise
        logarithms = variances.log().sum() + (n - len(s)) * math.log(noise)
        evidence.append(float(-0.5 * (n * square.log() + logarithms)))
    found: float = _NOISES[evidence.index(max(evidence))]
    return found


def _inducing(
    features: Float[Tensor, "n_atoms n_features"], elements: Int[Tensor, " n_atoms"]
) -> Int[Tensor, " n_inducing"]:
    """Choose atoms one by one, each time the one that those chosen say the least about.

    This is a pivoted Cholesky decomposition of the kernel, element by element.

    Parameters
    ----------
    features
        In units of the width.
    elements
        By index.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    kinds = elements.unique()
    owned = [order[elements[order] == kind] for kind in kinds]
    # Rare elements have all their atoms among the candidates, others fill up what that leaves.
    groups = [group[: _CANDIDATES // len(kinds)] for group in owned]
    for number, group in enumerate(owned):
        more = _CANDIDATES - sum(map(len, groups))
        groups[number] = group[: len(groups[number]) + more]
    unknown = [features.new_ones(len(group)) for group in groups]
    lower = [features.new_empty(min(N_INDUCING, len(group)), len(group)) for group in groups]
    ranks, tops, chosen = [0] * len(groups), [1.0] * len(groups), list[Tensor]()
    while len(chosen) < N_INDUCING and max(tops, default=0.0) > _KNOWN:
        number = max(range(len(groups)), key=tops.__getitem__)
        own, left, known = features[groups[number]], unknown[number], lower[number][: ranks[number]]
        pivot = int(left.argmax())
        kernel = gaussian(own, own[pivot][None])[:, 0]
        column = (kernel - known[:, pivot] @ known) / left[pivot].sqrt()
        lower[number][ranks[number]] = column
        unknown[number] = (left - column.square()).clamp_min(0.0)
        unknown[number][pivot] = 0.0
        ranks[number] += 1
        tops[number] = float(unknown[number].max())
        chosen.append(groups[number][pivot])
    return torch.stack(chosen)
