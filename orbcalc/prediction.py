"""Predict many structures with a model file, in batches; what a calculator needs of that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.stress import full_3x3_to_voigt_6_stress

from orbcalc.errors import ConfigError, StructureError
from orbcalc.graph import AtomGraph, atoms_at_once
from orbcalc.labels.baseline import (
    BaselineWorker,
    Outcome,
    labelled_baseline,
    labelled_energies,
    raised,
)
from orbcalc.labels.label import Values
from orbcalc.model.checkpoint import electrons_seen, learned_charges, load_model
from orbcalc.model.committee import Committee, CommitteePrediction
from orbcalc.orbitals import SLOTS, shell_slots
from orbcalc.structures import as_atoms, check_structure, warn_of_unseen_electrons
from orbcalc.training.trainer import resolve_device

__all__ = [
    "added",
    "baseline_worker",
    "open_model",
    "outputs_for",
    "predict",
    "refuse_unlearned",
    "split_results",
]

Results = dict[str, Any]

#: What `predict` can be asked for.
PREDICTED = {
    *("energy", "forces", "stress", "charges", "orbital_charges", "features", "last_layer"),
    *("energy_uncertainty", "forces_uncertainty", "energy_interval_95", "forces_interval_95"),
}

#: What a property is read off, where the model computes it under another name.
_NEEDED = {"orbital_charges": "charges"}
#: The same for several members, whose spread counts as well.
_NEEDED_OF_SEVERAL = {**_NEEDED, "forces_uncertainty": "forces", "forces_interval_95": "forces"}

#: Results that a baseline adds to, and which of its values that is.
_ADDED = {"energy": "energy", "free_energy": "energy", "forces": "forces", "stress": "stress"}


@torch.inference_mode(False)
def predict(
    model: str | Path | Committee,
    structures: Iterable[Any],
    properties: Sequence[str] = ("energy", "forces"),
    *,
    device: str = "auto",
    dtype: Literal["float32", "float64"] = "float32",
    on_error: Literal["raise", "skip"] = "raise",
    baseline: Literal["compute", "labels"] = "compute",
) -> list[Results]:
    """Predict many structures in batches.

    Parameters
    ----------
    model
        Path of a ``.orbcalc`` file, or a loaded committee.
    structures
        ASE Atoms, or pymatgen structures and molecules.
    properties
        Any of energy, forces, stress, charges, orbital_charges, features, last_layer (of each
        atom, what its energy is a linear function of, and 1 for its element); energy and its
        uncertainty are always there, and of a single potential that of forces.
    on_error
        "raise", or "skip": a structure that cannot be computed has an empty result.
    baseline
        Where GFN1-xTB comes from if the model is a difference from it. "labels": from
        ``GFN1_energy`` and ``GFN1_forces`` of structures that have not moved since they were
        labelled; there is no stress then. Of a model that has learned GFN1-xTB, energies (not
        forces) are above that label where there is one, which is more accurate.

    Returns
    -------
    list of dict
        For each structure in the given order, what `OrbcalcCalculator.results` would hold.
        Stress is left out for structures without a volume, charges for those with an element
        that had no charge labels in the training.

    Raises
    ------
    StructureError, UnsupportedElementError
        If a structure cannot be computed and `on_error` is "raise".
    MissingLabelError
        If it lacks the labels of the baseline, and `on_error` is "raise".
    LabelConflictError
        If another version of tblite is installed than the model's baseline was computed with, or
        labels that are taken for it are of another.
    PropertyNotImplementedError
        If there is no such property, or the model was not trained for it.
    """
    for name, given in (("structures", structures), ("properties", properties)):
        if isinstance(given, Atoms | str):
            raise TypeError(f"predict takes a list of {name}, not a single one: give [...]")
    unknown = sorted(set(properties) - PREDICTED)
    if unknown:
        raise PropertyNotImplementedError(
            f"there is no property {unknown[0]!r}; known are {', '.join(sorted(PREDICTED))}"
        )
    committee, metadata = open_model(model, device=device, dtype=dtype)
    refuse_unlearned(committee, learned_charges(committee, metadata), properties)
    atoms_list = [as_atoms(structure) for structure in structures]
    results: list[Results] = [{} for _ in atoms_list]
    wanted = outputs_for(committee, properties)
    if baseline == "labels" and committee.first.config.xtb_head == "baseline":
        wanted |= {"xtb_energy"}  # which labels take the place of
    seen = electrons_seen(metadata)
    for batch in _batches(atoms_list, committee, on_error):
        joined = AtomGraph.batch([item.graph for item in batch])
        prediction = committee(joined.to(committee.first.element_index.device), sorted(wanted))
        if (learned := prediction.xtb_energy) is not None:
            batch_atoms = [atoms_list[item.index] for item in batch]
            own = labelled_energies(batch_atoms, learned.tolist(), _trained_with(metadata))
            above = prediction.energy - learned
            prediction = replace(prediction, energy=above + learned.new_tensor(own))
        found = split_results(prediction, joined, committee, properties)
        for item, result in zip(batch, found, strict=True):
            results[item.index] = result
            warn_of_unseen_electrons(atoms_list[item.index], seen)
    if committee.first.config.baseline == "none":
        return results
    known = [index for index, result in enumerate(results) if result]
    below = _below(committee, metadata, [atoms_list[index] for index in known], baseline)
    for index, values in zip(known, below if on_error == "skip" else raised(below), strict=True):
        results[index] = {} if isinstance(values, Exception) else added(results[index], values)
    return results


def open_model(
    model: str | Path | Committee, *, device: str = "auto", dtype: str = "float32"
) -> tuple[Committee, dict[str, Any]]:
    """Return a committee and its metadata, from a file unless it is loaded already."""
    if isinstance(model, Committee):
        return model, {}
    if dtype not in ("float32", "float64"):
        raise ConfigError(f"dtype must be float32 or float64, not {dtype!r}")
    return load_model(model, device=resolve_device(device), dtype=getattr(torch, dtype))


def baseline_worker(model: Committee, metadata: Mapping[str, Any]) -> BaselineWorker | None:
    """Return what computes the baseline of a model, if it has one; see `open_model`.

    Raises
    ------
    LabelConflictError
        If the program behind it is not the one that the model was trained with.
    """
    if model.first.config.baseline == "none":
        return None
    return BaselineWorker(_trained_with(metadata))


def _trained_with(metadata: Mapping[str, Any]) -> str | None:
    """Return the method of the GFN1-xTB labels that a model has seen, if its file says it."""
    found: str | None = (metadata.get("labels") or {}).get("charges")
    return found


def _below(
    model: Committee, metadata: Mapping[str, Any], structures: Sequence[Atoms], source: str
) -> Iterator[Outcome]:
    if source == "labels":
        yield from labelled_baseline(structures, _trained_with(metadata))
    elif (worker := baseline_worker(model, metadata)) is not None:
        with closing(worker):
            yield from worker.compute(structures)


def added(results: Results, below: Values) -> Results:
    """Return results above a baseline as total ones, as far as the baseline is known."""
    found = dict(results)
    for name, source in _ADDED.items():
        if name in found and source in below:
            found[name] = found[name] + below[source]
        elif name in found:
            del found[name]
    return found


def outputs_for(model: Committee, properties: Sequence[str]) -> set[str]:
    """Return what a model is asked for, so that these properties can be told."""
    needed = _NEEDED if len(model.members) == 1 else _NEEDED_OF_SEVERAL
    return {needed.get(name, name) for name in properties}


def refuse_unlearned(model: Committee, has_charges: bool, properties: Sequence[str]) -> None:
    """Refuse what a model was not trained for.

    Raises
    ------
    PropertyNotImplementedError
        Naming the first one.
    """
    if not has_charges and not {"charges", "orbital_charges"}.isdisjoint(properties):
        raise PropertyNotImplementedError(
            "this model was trained without charges; train it with `tasks: {charges: 1}`"
        )
    for name in properties:
        if not name.endswith(("_uncertainty", "_interval_95")):
            continue
        if not model.has_uncertainty:
            raise PropertyNotImplementedError(
                "this model has no uncertainty: its training had no energies to measure it by"
            )
        if name.startswith("forces") and model.calibration.forces is None:
            raise PropertyNotImplementedError(
                f"this model has no {name}: its training had no forces to measure it by"
            )


@dataclass(frozen=True)
class _Item:
    index: int
    graph: AtomGraph


def _batches(
    structures: Sequence[Atoms], committee: Committee, on_error: str
) -> Iterator[list[_Item]]:
    """Group structures of similar size, so that little is padded."""
    limit = atoms_at_once(committee.first.element_index.device)
    batch: list[_Item] = []
    n_atoms = 0
    for index in sorted(range(len(structures)), key=lambda i: len(structures[i])):
        atoms = structures[index]
        try:
            name = f"structure {index}"
            check_structure(atoms, name)
            own = name if len(structures) > 1 else ""
            committee.first.check_elements(atoms.numbers.tolist(), own)
        except StructureError:
            if on_error == "raise":
                raise
            continue
        if batch and n_atoms + len(atoms) > limit:
            yield batch
            batch, n_atoms = [], 0
        batch.append(_Item(index, AtomGraph.from_atoms(atoms, committee.cutoff)))
        n_atoms += len(atoms)
    if batch:
        yield batch


def split_results(
    prediction: CommitteePrediction,
    graph: AtomGraph,
    committee: Committee,
    properties: Sequence[str],
) -> list[Results]:
    """Split a batch into the results of each structure, as ASE names them."""
    energies = prediction.energy.tolist()
    results: list[Results] = [{"energy": e, "free_energy": e} for e in energies]
    ends = np.cumsum(graph.n_atoms_of_structure.cpu().numpy())[:-1]

    def per_atom(name: str, values: torch.Tensor | None) -> None:
        if values is not None:
            parts = np.split(values.detach().cpu().double().numpy(), ends)
            for result, part in zip(results, parts, strict=True):
                result[name] = part

    per_atom("forces", prediction.forces)
    per_atom("charges", prediction.charges)
    per_atom("last_layer", prediction.last_layer)
    per_atom("forces_uncertainty", prediction.forces_uncertainty)
    per_atom("forces_interval_95", prediction.forces_interval_95)
    if prediction.orbital_charges is not None:
        per_atom("orbital_charges", prediction.orbital_charges)
        numbers = np.split(graph.numbers.cpu().numpy(), ends)
        for result, z in zip(results, numbers, strict=True):
            slots = result.pop("orbital_charges")
            if not set(z.tolist()) <= committee.first.shells.keys():
                del result["charges"]  # an element of it had no charge labels
            elif "orbital_charges" in properties:
                result["orbital_charges"] = _in_ao_order(slots, z, committee)
    for name in ("energy_uncertainty", "energy_interval_95"):
        if (uncertainties := getattr(prediction, name)) is not None:
            for result, value in zip(results, uncertainties.tolist(), strict=True):
                result[name] = value
    if prediction.stress is not None:
        stresses = prediction.stress.detach().cpu().numpy()
        for result, stress, is_there in zip(
            results, stresses, graph.is_periodic.tolist(), strict=True
        ):
            if is_there:
                result["stress"] = full_3x3_to_voigt_6_stress(stress)
    if prediction.features is not None:
        features = prediction.features.detach().cpu().double().numpy()
        for result, own in zip(results, features, strict=True):
            result["features"] = own
    return results


def _in_ao_order(
    charges: np.ndarray, numbers: np.ndarray, committee: Committee
) -> list[np.ndarray]:
    """Bring AO charges from the fixed layout of slots into tblite's order."""
    shells = committee.first.shells
    return [
        np.concatenate([row[SLOTS[slot].orbitals] for slot in shell_slots(shells[int(number)])])
        for row, number in zip(charges, numbers, strict=True)
    ]
