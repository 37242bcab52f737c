"""What a training begins with: a new potential, or one that was trained before."""

from __future__ import annotations

import logging

import torch

from orbcalc.config import TrainConfig
from orbcalc.model.checkpoint import load_model
from orbcalc.model.potential import Potential
from orbcalc.training.dataset import LabelDataset
from orbcalc.training.statistics import (
    fit_reference_energies,
    fit_statistics,
    given_energies,
)
from orbcalc.training.trainer import on_device

__all__ = ["initial_potential"]

logger = logging.getLogger(__name__)

#: RMS error per root of the number of atoms, in units of the energy scale, of another method.
_FAR_OFF = 3.0


def initial_potential(
    config: TrainConfig,
    member: int,
    seed: int,
    train_set: LabelDataset,
    method: str | None = None,
) -> Potential:
    """Return the potential that the training of a member begins with.

    Parameters
    ----------
    config
        With ``start_from`` that member of the model, if it fits the training set.
    member
        Of the committee.
    seed
        Of the weights of a new potential.
    train_set
        Decides the elements, the scales and the reference energies.
    method
        Of its reference labels, None if that is not known.

    Raises
    ------
    CheckpointError
        If the model to start from cannot be read.
    ConfigError
        If reference energies are given, but not for every element.
    """
    dtype = getattr(torch, config.dtype)
    if config.start_from is not None:
        committee, metadata = load_model(config.start_from, dtype=dtype)
        fits = (
            len(committee.members) == config.committee
            and committee.first.config == config.potential
            and list(committee.first.elements) == train_set.elements
            and committee.first.shells == train_set.shells
        )
        if fits:
            potential = committee.members[member]
            assert isinstance(potential, Potential)
            before = metadata.get("labels", {}).get("reference")
            _move_reference_energies(potential, config, train_set, before, method)
            return potential.requires_grad_(True).train()
        logger.warning("%s does not fit the training set: starting afresh", config.start_from)
    statistics = fit_statistics(train_set, config.potential, config.reference_energies)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Potential(config.potential, train_set.elements, train_set.shells, statistics, dtype)


def _move_reference_energies(
    potential: Potential,
    config: TrainConfig,
    train_set: LabelDataset,
    before: str | None,
    method: str | None,
) -> None:
    """Move reference energies to where they are given, or where labels of another method have them.

    Where the two methods are not both known, energies that are far off tell that they differ.
    Elements that had no energy label before are fitted in any case.
    """
    if config.reference_energies is not None:
        given = given_energies(config.reference_energies, train_set.elements)
        potential.reference_energies = given
        return
    untold = potential.fitted_reference_energies == 0
    are_known = None not in (before, method)
    if are_known and before == method and not untold.any():
        return
    errors, scaled = [], []
    for graph, targets in on_device(train_set, 32, potential):
        with torch.no_grad():
            error = targets.energy - potential(graph).energy
        n_untold = graph.sum_over_atoms(untold[potential.element_index[graph.numbers]].double())
        is_fair = error.isfinite() & (n_untold == 0)
        errors.append(error)
        scaled.append((error / graph.n_atoms_of_structure.double().sqrt())[is_fair])
    off = float(torch.cat(scaled).square().mean().sqrt())  # NaN without any
    is_other = before != method if are_known else off > _FAR_OFF * potential.energy_scale
    if is_other:
        logger.warning(
            "labels are not those that %s was trained on (%s): its reference energies are moved",
            config.start_from,
            f"{before}, now {method}" if are_known else f"off by {off:.3g} eV per root of atoms",
        )
    shift = fit_reference_energies(train_set, torch.cat(errors), untold | is_other)
    potential.reference_energies = potential.reference_energies + shift
