"""Potentials as an ASE calculator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from ase import Atoms
from ase.calculators.calculator import (
    Calculator,
    PropertyNotImplementedError,
    all_changes,
    compare_atoms,
)
from ase.outputs import Properties, all_outputs

from orbcalc.graph import AtomGraph
from orbcalc.labels.baseline import raised
from orbcalc.labels.label import Values
from orbcalc.model.checkpoint import electrons_seen, learned_charges
from orbcalc.model.committee import Committee
from orbcalc.model.compiled import compiled
from orbcalc.neighbors import SkinList
from orbcalc.prediction import (
    added,
    baseline_worker,
    open_model,
    outputs_for,
    refuse_unlearned,
    split_results,
)
from orbcalc.properties import CHARGE_KEY, SPIN_KEY
from orbcalc.structures import check_structure, refuse_overlap, warn_of_unseen_electrons

__all__ = ["OrbcalcCalculator"]


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
        Å. The neighbour list is kept until an atom has moved by half of it, beside what a strained
        cell takes all atoms along (which uses up some of the skin as well).
    compile
        Compile the network at the first calculation, which then takes a minute or so; where that
        is not possible there is a warning. It pays in long runs of small systems: see
        docs/architecture.md. Systems of more than 1,024 atoms (8,192 on a GPU) run as without it.

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
        self._skin_list = SkinList(self.model.cutoff, skin, self._device)
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
        graph = self._updated_graph(current)
        self._refuse_impossible(graph, properties)
        wanted = outputs_for(self.model, properties) & {"forces", "stress", "charges"}
        if self._compile:
            wanted.add("forces")  # energies alone would be compiled once more
        prediction = self._network(graph)(graph, sorted(wanted))
        (found,) = split_results(prediction, graph, self.model, properties)
        if self._baseline is not None:
            if not self._below:
                (self._below,) = raised(self._baseline.compute([current]))
            found = added(found, self._below)
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
        graph = AtomGraph.from_atoms(atoms, self.model.cutoff, neighbors).to(self._device)
        refuse_overlap(atoms, *graph.closest())
        return graph

    def _refuse_impossible(self, graph: AtomGraph, properties: Sequence[str]) -> None:
        if "stress" in properties and not bool(graph.is_periodic.all()):
            raise PropertyNotImplementedError("stress needs a periodic structure with a volume")
        refuse_unlearned(self.model, self._has_charges, properties)
