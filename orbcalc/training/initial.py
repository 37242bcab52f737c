"""What a training begins with: a new potential, or one that was trained before."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from ase.data import chemical_symbols
from jaxtyping import Float
from torch import Tensor

from orbcalc.config import PotentialConfig, TrainConfig
from orbcalc.errors import ConfigError
from orbcalc.model.checkpoint import load_model
from orbcalc.model.potential import Potential
from orbcalc.training.dataset import LabelDataset, on_device
from orbcalc.training.statistics import (
    fit_reference_energies,
    fit_statistics,
    given_energies,
    is_lone_atom,
)
from orbcalc.training.trainer import resolve_device

__all__ = ["initial_potential", "misfits"]

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

    One with a process has learned its features, which stay unless they alone are learned.

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
        If reference energies are given, but not for every element, or a process cannot start from
        that model.
    """
    dtype = getattr(torch, config.dtype)
    if config.start_from is not None:
        committee, metadata = load_model(
            config.start_from, device=resolve_device(config.device), dtype=dtype
        )
        is_process = config.potential.energy_head == "process"
        trains_on = is_process and not config.keeps_features
        reasons = misfits(committee.first, config.potential, train_set.elements)
        if not trains_on and (n_members := len(committee.members)) != config.committee:
            reasons.append(f"it has {n_members} member(s), not {config.committee}")
        if not is_process and (more := {*committee.first.elements} - {*train_set.elements}):
            reasons.append(f"it was trained on {_symbols(more)}, too")
        if not train_set.shells.items() <= committee.first.shells.items():
            reasons.append("the charges of its elements belong to other shells")
        if not reasons:
            # Fewer members than are trained: each goes its own way from there.
            potential = committee.members[member % len(committee.members)]
            assert isinstance(potential, Potential)
            if config.keeps_features:  # its energies will be fitted again
                return potential
            if trains_on:
                potential.forget_process()
                return potential.requires_grad_(True).train()
            before = metadata.get("labels", {}).get("reference")
            if _takes_over(potential, config, train_set, before, method):
                return potential.requires_grad_(True).train()
            reasons.append("labelled energies are far from those of its reference energies")
        if is_process:
            raise ConfigError(
                f"{config.start_from} has no features for this training: {'; '.join(reasons)}. "
                f"Leave it out to learn features first."
            )
        logger.warning(
            "%s does not fit the training set (%s): starting afresh",
            config.start_from,
            "; ".join(reasons),
        )
    statistics = fit_statistics(train_set, config.potential, config.reference_energies)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of GPUs none is touched
        return Potential(config.potential, train_set.elements, train_set.shells, statistics, dtype)


def misfits(potential: Potential, config: PotentialConfig, elements: Iterable[int]) -> list[str]:
    """Say what keeps a trained potential from being trained on; nothing if it can be.

    Parameters
    ----------
    potential
        As it was trained.
    config
        What is to be trained, with nothing left open.
    elements
        That are to be learned, by atomic number.
    """
    before, now = _sizes(potential.config), _sizes(config)
    reasons = [
        f"its {name} is {before[name]}, not {value}"
        for name, value in now.items()
        if before[name] != value
    ]
    if unknown := {*elements} - {*potential.elements}:
        reasons.append(f"it does not know {_symbols(unknown)}")
    return reasons


def _symbols(elements: Iterable[int]) -> str:
    return ", ".join(chemical_symbols[z] for z in sorted(elements))


def _sizes(config: PotentialConfig) -> dict[str, Any]:
    """Return an architecture without the name that it may have."""
    head = config.energy_head or "network"
    return config.model_dump(exclude={"preset"}) | {"energy_head": head}


def _takes_over(
    potential: Potential,
    config: TrainConfig,
    train_set: LabelDataset,
    before: str | None,
    method: str | None,
) -> bool:
    """Move reference energies to where they are given, or where labels of another method have them.

    Where the two methods are not both known, energies that are far off tell that they differ, and
    so do lone atoms. Elements that had no energy label before are fitted in any case. False if
    energies are far off even then: what the network adds belongs to other reference energies.
    """
    counts = train_set.element_counts
    energies = torch.cat([targets.energy for targets in train_set.targets])
    old, untold = potential.reference_energies.cpu(), ~potential.told.cpu()
    far = _FAR_OFF * potential.energy_scale
    lone = torch.tensor([is_lone_atom(graph) for graph in train_set.graphs]) & energies.isfinite()
    is_other = bool(
        ((energies - counts @ old)[lone & (counts @ untold.double() == 0)].abs() > far).any()
    )
    are_known = None not in (before, method)
    given = config.reference_energies
    if given is None and are_known and before == method and not (is_other or untold.any()):
        return True
    errors = _energy_errors(potential, train_set)
    if given is not None:
        shift = given_energies(given, train_set.elements) - old
    else:
        differs = before != method if are_known else _rms(errors, counts, untold) > far
        is_other = is_other or differs
        shift = fit_reference_energies(train_set, errors, untold | is_other)
    if _rms(errors - counts @ shift, counts, untold) > far:
        return False
    if is_other and errors.isfinite().any():
        logger.warning(
            "labels are not those that %s was trained on (%s, now %s): its reference energies are "
            "moved by %s eV",
            config.start_from,
            before or "unknown",
            method or "unknown",
            [round(move, 3) for move in shift.tolist()],
        )
    potential.reference_energies = old + shift
    has_energy = counts[energies.isfinite()].sum(0) > 0
    told = ~untold | has_energy | (given is not None)
    potential.told = told.to(potential.told.device)
    return True


def _energy_errors(potential: Potential, dataset: LabelDataset) -> Float[Tensor, " n_structures"]:
    """Return labels less predictions, eV; NaN without a label."""
    errors = torch.full((len(dataset),), torch.nan, dtype=torch.float64)
    labelled = dataset.labelled(["energy"])
    rows = []
    for graph, targets in on_device(dataset, potential, labelled):
        with torch.no_grad():
            rows.append(targets.energy - potential(graph).energy)
    if rows:
        errors[labelled] = torch.cat(rows).cpu()
    return errors


def _rms(errors: Tensor, counts: Tensor, untold: Tensor) -> float:
    """Return the RMS error per root of the number of atoms of known elements; NaN without any."""
    is_fair = errors.isfinite() & (counts[:, untold].sum(1) == 0)
    return float((errors / counts.sum(1).sqrt())[is_fair].square().mean().sqrt())
