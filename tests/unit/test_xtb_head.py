"""The second energy head: GFN1-xTB energies beside the energy, or below it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import structures
import torch
from ase import Atoms
from conftest import MakePotential

from orbcalc.config import PotentialConfig, TaskWeights
from orbcalc.graph import AtomGraph
from orbcalc.model.checkpoint import load_model, save_model
from orbcalc.model.committee import Committee
from orbcalc.properties import REF_ENERGY, REF_FORCES, XTB_ENERGY
from orbcalc.testing import assert_derivatives
from orbcalc.training.dataset import LabelDataset
from orbcalc.training.loss import LossScales
from orbcalc.training.statistics import fit_statistics

BASELINE = PotentialConfig(cutoff=4.0, channels=8, xtb_head="baseline")


def with_linear_difference(labelled: list[Atoms]) -> list[Atoms]:
    """Return structures whose energy is that of GFN1-xTB and a sum over elements."""
    found = []
    for atoms in labelled:
        atoms = atoms.copy()
        del atoms.arrays[REF_FORCES]
        atoms.info[REF_ENERGY] = atoms.info[XTB_ENERGY] - 3.0 * len(atoms)
        found.append(atoms)
    return found


def test_the_baseline_leaves_only_the_difference_to_be_learned(labelled: list[Atoms]) -> None:
    dataset = LabelDataset(with_linear_difference(labelled), 4.0)
    # Without forces the scales are those of energies.
    for targets in dataset.targets:
        targets.xtb_forces.fill_(torch.nan)
    plain = fit_statistics(dataset, BASELINE.model_copy(update={"xtb_head": "task"}))
    found = fit_statistics(dataset, BASELINE)
    assert found.xtb_reference_energies is not None
    difference = found.reference_energies - found.xtb_reference_energies
    counts = torch.stack(
        [torch.bincount(g.numbers, minlength=119)[dataset.elements] for g in dataset.graphs]
    ).double()
    torch.testing.assert_close(counts @ difference, -3.0 * counts.sum(1))
    assert plain.energy_scale > 1e-3
    assert found.energy_scale == 1.0  # nothing is left, so there is no scale to be found
    assert found.xtb_energy_scale == pytest.approx(plain.energy_scale, rel=1e-6)


def test_without_reference_labels_the_energy_is_the_baseline(labelled: list[Atoms]) -> None:
    bare = []
    for atoms in labelled:
        atoms = atoms.copy()
        del atoms.info[REF_ENERGY], atoms.arrays[REF_FORCES]
        bare.append(atoms)
    found = fit_statistics(LabelDataset(bare, 4.0), BASELINE)
    assert found.xtb_reference_energies is not None
    assert found.reference_energies.abs().max() == 0
    assert found.xtb_reference_energies.abs().max() > 1


def test_a_lone_atom_has_its_reference_energies(make_potential: MakePotential) -> None:
    potential = make_potential(xtb_head="baseline")
    graph = AtomGraph.from_atoms(structures.lone_atom("O"), 4.0)
    found = potential(graph, ("xtb_energy",))
    row = potential.elements.index(8)
    assert found.energy.item() == pytest.approx(float(potential.reference_energies[row]))
    assert found.xtb_energy.item() == pytest.approx(float(potential.xtb_reference_energies[row]))


def test_the_energy_contains_the_baseline(make_potential: MakePotential) -> None:
    """The weights of the GFN1-xTB head move both energies; "task" keeps them apart."""
    graph = AtomGraph.from_atoms(structures.ethanol(), 4.0)
    for kind, share in (("baseline", 1.0), ("task", 0.0)):
        potential = make_potential(xtb_head=kind)
        before = potential(graph, ("xtb_energy",))
        with torch.no_grad():
            potential.xtb_head.readout.weight.add_(0.1)
        after = potential(graph, ("xtb_energy",))
        moved = float((after.xtb_energy - before.xtb_energy).detach())
        assert abs(moved) > 1e-3
        assert float((after.energy - before.energy).detach()) == pytest.approx(share * moved)


def test_derivatives(make_potential: MakePotential) -> None:
    assert_derivatives(make_potential(xtb_head="baseline"), structures.ice_cell())


def test_xtb_forces_are_those_of_the_xtb_energy(make_potential: MakePotential) -> None:
    potential = make_potential(xtb_head="task")
    atoms = structures.ethanol()
    found = potential(AtomGraph.from_atoms(atoms, 4.0), ("forces", "xtb_forces"))
    assert not found.xtb_forces.requires_grad
    step = 1e-4
    for atom, axis in ((0, 0), (3, 1), (8, 2)):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * step
            graph = AtomGraph.from_atoms(moved, 4.0)
            energies.append(float(potential(graph, ("xtb_energy",)).xtb_energy.detach()))
        slope = (energies[0] - energies[1]) / (2 * step)
        assert float(found.xtb_forces[atom, axis]) == pytest.approx(-slope, rel=1e-5, abs=1e-7)
    assert not np.allclose(found.xtb_forces, found.forces)


def test_scales_of_the_loss(labelled: list[Atoms], make_potential: MakePotential) -> None:
    dataset = LabelDataset(labelled, 4.0)
    tasks = TaskWeights(forces=1, xtb_forces=1)
    scales = LossScales(make_potential(xtb_head="task"), dataset.graphs, dataset.targets, tasks)
    forces = torch.cat([targets.xtb_forces.flatten() for targets in dataset.targets])
    assert scales.xtb_forces == pytest.approx(float(forces.pow(2).mean().sqrt()))
    assert scales.xtb_energy == pytest.approx(0.1 * scales.xtb_forces)


def test_a_model_file_keeps_both(make_potential: MakePotential, tmp_path: Path) -> None:
    potential = make_potential(xtb_head="baseline")
    save_model(tmp_path / "a.orbcalc", Committee([potential]))
    loaded, _ = load_model(tmp_path / "a.orbcalc", dtype=torch.float64)
    graph = AtomGraph.from_atoms(structures.ethanol(), 4.0)
    for name in ("energy", "xtb_energy"):
        torch.testing.assert_close(
            getattr(loaded(graph, ("xtb_energy",)), name),
            getattr(potential(graph, ("xtb_energy",)), name).detach(),
            rtol=1e-12,
            atol=0,
        )
