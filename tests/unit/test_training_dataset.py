"""Labels as targets: absent is NaN, wrong is an error, and a task without labels is a census."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from structures import ice_cell, water

from orbcalc.config import TaskWeights
from orbcalc.errors import LabelError, MissingLabelError, StructureError
from orbcalc.properties import (
    REF_ENERGY,
    REF_FORCES,
    REF_STRESS,
    XTB_BLOCKS,
    XTB_SHELLS,
)
from orbcalc.training.dataset import LabelDataset, Targets, shells_of_elements


def with_energy(value: object) -> Atoms:
    """Return water with an energy."""
    atoms = water()
    atoms.info[REF_ENERGY] = value
    return atoms


def test_what_is_absent_is_nan() -> None:
    targets = Targets.from_atoms(water())
    for value in vars(targets).values():
        assert torch.isnan(value).all()
    assert not any(targets.has(task) for task in ("energy", "forces", "stress", "charges"))


def test_stress_is_read_in_voigt_order_from_six_or_nine_numbers() -> None:
    matrix = np.array([[1.0, 6, 5], [6, 2, 4], [5, 4, 3]])
    for value in (np.array([1.0, 2, 3, 4, 5, 6]), matrix, matrix.ravel()):
        atoms = ice_cell()
        atoms.info[REF_STRESS] = value
        torch.testing.assert_close(Targets.from_atoms(atoms).stress[0], torch.tensor(matrix))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.inf, "REF_energy of H2O is infinite"),
        ("low", "REF_energy of H2O is not numeric"),
        ([1.0, 2.0], r"REF_energy of H2O has shape \(2,\), expected \(\)"),
    ],
)
def test_wrong_labels_are_errors(value: object, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        Targets.from_atoms(with_energy(value))


def test_forces_of_the_wrong_shape_are_an_error() -> None:
    atoms = water()
    atoms.arrays[REF_FORCES] = np.zeros((3, 2))
    with pytest.raises(LabelError, match=r"REF_forces of H2O has shape \(3, 2\)"):
        Targets.from_atoms(atoms)


def test_blocks_without_shells_are_an_error() -> None:
    atoms = water()
    atoms.arrays[XTB_BLOCKS] = np.zeros((3, 23))
    with pytest.raises(LabelError, match=f"has {XTB_BLOCKS}, but not {XTB_SHELLS}"):
        shells_of_elements(atoms)
    assert shells_of_elements(water()) == {}


def test_a_nan_label_counts_as_absent() -> None:
    dataset = LabelDataset([with_energy(float("nan")), with_energy(-1.0)], 4.0)
    assert {task: count for task, count in dataset.census().items() if count} == {"energy": 1}


def test_a_missing_task_is_told_with_a_census() -> None:
    dataset = LabelDataset([with_energy(-1.0), water()], 4.0)
    dataset.require(TaskWeights(forces=0, charges=0).active)
    with pytest.raises(
        MissingLabelError,
        match=r"\(2 structures\) has labels for: energy 1, forces 0, stress 0, charges 0, "
        r"xtb_energy 0, xtb_forces 0. "
        r"task 'forces' needs REF_forces .*; task 'charges' needs GFN1_orbital_blocks",
    ):
        dataset.require(TaskWeights().active)


def test_bad_structures_are_named() -> None:
    atoms = water()
    atoms.positions[1, 0] = np.nan
    with pytest.raises(StructureError, match=r"atom 1 of structure 1 \(H2O\)"):
        LabelDataset([water(), atoms], 4.0)


def test_batches_keep_the_order_and_hold_everything() -> None:
    structures = [with_energy(float(i)) for i in range(5)] + [molecule("CH4")]
    dataset = LabelDataset(structures, 4.0)
    assert dataset.elements == [1, 6, 8]
    assert len(dataset) == 6
    energies = torch.cat([targets.energy for _, targets in dataset.batches(4)])
    assert energies[:5].tolist() == [0, 1, 2, 3, 4]
    assert [graph.n_structures for graph, _ in dataset.batches(4)] == [4, 2]


def test_a_structure_without_a_volume_has_no_stress() -> None:
    atoms = water()
    atoms.info[REF_STRESS] = np.zeros(6)
    assert not Targets.from_atoms(atoms).has("stress")
    atoms.set_cell([5.0, 5.0, 5.0])
    assert not Targets.from_atoms(atoms).has("stress")
    atoms.pbc = True
    assert Targets.from_atoms(atoms).has("stress")
