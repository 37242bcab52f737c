"""Potentials as an ASE calculator, and batched prediction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import (
    Calculator,
    PropertyNotImplementedError,
    all_changes,
    compare_atoms,
)
from ase.outputs import Properties, all_outputs
from ase.stress import full_3x3_to_voigt_6_stress

from orbcalc.errors import ConfigError, StructureError
from orbcalc.graph import AtomGraph
from orbcalc.labels.baseline import BaselineWorker, Outcome, labelled_baseline, raised
from orbcalc.labels.label import Values
from orbcalc.model.checkpoint import electrons_seen, learned_charges, load_model
from orbcalc.model.committee import Committee, CommitteePrediction
from orbcalc.model.compiled import compiled
from orbcalc.neighbors import SkinList
from orbcalc.orbitals import SLOTS, shell_slots
from orbcalc.properties import CHARGE_KEY, SPIN_KEY
from orbcalc.structures import (
    as_atoms,
    check_structure,
    refuse_overlap,
    warn_of_unseen_electrons,
)
from orbcalc.training.trainer import resolve_device

__all__ = ["OrbcalcCalculator", "predict"]

Results = dict[str, Any]

#: Atoms in one batch of `predict`: few enough for caches.
BATCH_ATOMS = 512

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


class OrbcalcCalculator(Calculator):
    """ASE calculator around a model file.

    Where the model is a difference from GFN1-xTB (``potential: {baseline: GFN1-xTB}``), tblite
    computes that in a process of its own.

    Parameters
    ----------
    model
        Path of a ``.orbcalc`` file, or a committee that is loaded already, which stays where and
        as precise as it is.
    device
        "auto" is the GPU where there is one.
    dtype
        Of the network; geometry and sums are always float64.
    skin
        Å. The neighbour list is kept until an atom has moved by half of it.
    compile
        Compile the network at the first calculation, which then takes a minute or so; where that
        is not possible there is a warning. It pays in long runs of small systems: see
        docs/architecture.md. Systems of more than 1,024 atoms run as without it.

    Raises
    ------
    CheckpointError
        If the file cannot be trusted.
    LabelConflictError
        If another version of tblite is installed than the model's baseline was computed with.

    Notes
    -----
    Energy (eV, total energy of the reference method), forces (eV/Å), stress (eV/Å³, Voigt xx yy
    zz yz xz xy), atomic charges (e), ``orbital_charges`` on demand (list of one array for each
    atom, tblite's AO order). ``energy_uncertainty`` (eV) and ``forces_uncertainty`` (n_atoms,
    eV/Å) are one calibrated standard deviation each: 68 % of the errors on structures like those
    of the training are smaller. 95 % of them are smaller than ``energy_interval_95`` and
    ``forces_interval_95``, which may be more than twice as large: errors have heavy tails. They do
    not hold where bonds break that no training structure shows broken (docs/uncertainty.md).
    Uncertainties of forces need force labels in the training.
    :func:`orbcalc.with_results` brings all of them into files. Total charge and multiplicity are
    read from ``atoms.info``; a warning tells of those that no training structure had.

    Examples
    --------
    >>> calc = OrbcalcCalculator("model.orbcalc")  # doctest: +SKIP
    >>> atoms.calc = calc  # doctest: +SKIP
    >>> atoms.get_forces()  # doctest: +SKIP
    """

    implemented_properties = [  # noqa: RUF012  (ASE's own interface)
        "energy",
        "free_energy",
        "forces",
        "stress",
        "charges",
        "orbital_charges",
        "energy_uncertainty",
        "forces_uncertainty",
        "energy_interval_95",
        "forces_interval_95",
    ]

    def __init__(
        self,
        model: str | Path | Committee,
        device: str = "auto",
        dtype: Literal["float32", "float64"] = "float32",
        *,
        skin: float = 0.5,
        compile: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.metadata = open_model(model, device=device, dtype=dtype)
        self._compile = compile
        self._compiled: Committee | None = None
        self._skin_list = SkinList(self.model.cutoff, skin)
        self._baseline = baseline_worker(self.model, self.metadata)
        self._below: Values = {}
        self._electrons = electrons_seen(self.metadata)
        self._has_charges = learned_charges(self.model, self.metadata)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Return what has changed since the last calculation, charge and spin included."""
        changes: list[str] = compare_atoms(self.atoms, atoms, tol=tol)
        if self.atoms is not None and any(
            self.atoms.info.get(key) != atoms.info.get(key) for key in (CHARGE_KEY, SPIN_KEY)
        ):
            changes.append("info")
        return changes

    @torch.inference_mode(False)  # forces are derivatives, wherever this is called from
    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Compute properties; ASE calls this.

        Raises
        ------
        StructureError, UnsupportedElementError
            If the structure cannot be computed with this model, or with its baseline.
        PropertyNotImplementedError
            If the model has no such property, or the structure no volume for a stress.
        """
        super().calculate(atoms, properties, system_changes)  # type: ignore[no-untyped-call]
        if system_changes:
            self._below = {}
        current = self.atoms
        assert current is not None
        graph = self._updated_graph(current).to(self._device)
        self._refuse_impossible(graph, properties)
        wanted = _wanted(self.model, properties) & {"forces", "stress", "charges"}
        if self._compile:
            wanted.add("forces")  # energies alone would be compiled once more
        prediction = self._network(graph)(graph, sorted(wanted))
        (found,) = _results(prediction, graph, self.model, properties)
        if self._baseline is not None:
            if not self._below:
                (self._below,) = raised(self._baseline.compute([current]))
            found = _added(found, self._below)
        self.results = found if system_changes else {**self.results, **found}

    def export_properties(self) -> Properties:
        """Return the results that ASE has a name for; ASE's files take no others.

        :func:`orbcalc.with_results` brings the uncertainties into files.
        """
        return Properties({k: v for k, v in self.results.items() if k in all_outputs})

    def _network(self, graph: AtomGraph) -> Committee:
        if not self._compile:
            return self.model
        if self._compiled is None:
            self._compiled = compiled(self.model, graph)
        return self._compiled

    @property
    def _device(self) -> torch.device:
        return self.model.first.element_index.device

    def _updated_graph(self, atoms: Atoms) -> AtomGraph:
        """Return the graph; while its neighbour list is valid only positions are new."""
        warn_of_unseen_electrons(atoms, self._electrons)
        # Checked before each search, which a cell that is not finite would end the process in.
        neighbors = self._skin_list.update(atoms, check_structure)
        refuse_overlap(atoms, *neighbors.closest(atoms))
        return AtomGraph.from_atoms(atoms, self.model.cutoff, neighbors)

    def _refuse_impossible(self, graph: AtomGraph, properties: Sequence[str]) -> None:
        if "stress" in properties and not bool(graph.is_periodic.all()):
            raise PropertyNotImplementedError("stress needs a periodic structure with a volume")
        _refuse_unlearned(self.model, self._has_charges, properties)


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
        labelled; there is no stress then.

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
    unknown = sorted(set(properties) - PREDICTED)
    if unknown:
        raise PropertyNotImplementedError(
            f"there is no property {unknown[0]!r}; known are {', '.join(sorted(PREDICTED))}"
        )
    committee, metadata = open_model(model, device=device, dtype=dtype)
    _refuse_unlearned(committee, learned_charges(committee, metadata), properties)
    atoms_list = [as_atoms(structure) for structure in structures]
    results: list[Results] = [{} for _ in atoms_list]
    wanted = _wanted(committee, properties)
    seen = electrons_seen(metadata)
    for batch in _batches(atoms_list, committee, on_error):
        joined = AtomGraph.batch([item.graph for item in batch])
        prediction = committee(joined.to(committee.first.element_index.device), sorted(wanted))
        found = _results(prediction, joined, committee, properties)
        for item, result in zip(batch, found, strict=True):
            results[item.index] = result
            warn_of_unseen_electrons(atoms_list[item.index], seen)
    if committee.first.config.baseline == "none":
        return results
    known = [index for index, result in enumerate(results) if result]
    below = _below(committee, metadata, [atoms_list[index] for index in known], baseline)
    for index, values in zip(known, below if on_error == "skip" else raised(below), strict=True):
        results[index] = {} if isinstance(values, Exception) else _added(results[index], values)
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


def _added(results: Results, below: Values) -> Results:
    """Return results above a baseline as total ones, as far as the baseline is known."""
    found = dict(results)
    for name, source in _ADDED.items():
        if name in found and source in below:
            found[name] = found[name] + below[source]
        elif name in found:
            del found[name]
    return found


def _wanted(model: Committee, properties: Sequence[str]) -> set[str]:
    needed = _NEEDED if len(model.members) == 1 else _NEEDED_OF_SEVERAL
    return {needed.get(name, name) for name in properties}


def _refuse_unlearned(model: Committee, has_charges: bool, properties: Sequence[str]) -> None:
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
    batch: list[_Item] = []
    n_atoms = 0
    for index in sorted(range(len(structures)), key=lambda i: len(structures[i])):
        atoms = structures[index]
        try:
            check_structure(atoms, f"structure {index}")
            committee.first.check_elements(atoms.numbers.tolist())
        except StructureError:
            if on_error == "raise":
                raise
            continue
        if batch and n_atoms + len(atoms) > BATCH_ATOMS:
            yield batch
            batch, n_atoms = [], 0
        batch.append(_Item(index, AtomGraph.from_atoms(atoms, committee.cutoff)))
        n_atoms += len(atoms)
    if batch:
        yield batch


def _results(
    prediction: CommitteePrediction,
    graph: AtomGraph,
    committee: Committee,
    properties: Sequence[str],
) -> list[Results]:
    """Split a batch into the results of each structure, as ASE names them."""
    energies = prediction.energy.detach().cpu().numpy()
    results: list[Results] = [{"energy": float(e), "free_energy": float(e)} for e in energies]
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
    for index, result in enumerate(results):
        for name in ("energy_uncertainty", "energy_interval_95"):
            if (values := getattr(prediction, name)) is not None:
                result[name] = float(values[index].detach())
        if prediction.stress is not None and bool(graph.is_periodic[index]):
            stress = prediction.stress[index].detach().cpu().numpy()
            result["stress"] = full_3x3_to_voigt_6_stress(stress)
        if prediction.features is not None:
            result["features"] = prediction.features[index].detach().cpu().double().numpy()
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
