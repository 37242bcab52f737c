"""What must not matter: the frame, the origin, the order of atoms, the choice of the cell."""

from __future__ import annotations

import numpy as np
import pytest
import structures
import torch
from structures import random_rotation

from orbcalc.orbitals import decode_blocks
from orbcalc.testing import TOLERANCES, assert_consistent, assert_equivariant, predicted

STRUCTURES = [
    structures.ethanol,
    structures.ammonium,
    structures.nitric_oxide,
    structures.sulfur_hexafluoride,
    structures.iron_pentacarbonyl,
    structures.rock_salt,
    structures.ice_cell,
    structures.salt_slab,
    structures.chiral,
]


@pytest.mark.parametrize("make", STRUCTURES)
def test_rotations_and_reflections(potential_of_dtype, make):
    assert_equivariant(potential_of_dtype, make())


def test_symmetric_structures_have_no_other_symmetry_problem(potential):
    """Vectors along the axes, where polar angles are degenerate."""
    for make in (structures.water, structures.ferrocene):
        assert_equivariant(potential, make())


def test_permutations_translations_and_batches(potential_of_dtype):
    assert_consistent(potential_of_dtype, [make() for make in STRUCTURES])


def test_a_committee_is_as_symmetric_as_its_members(committee):
    assert_equivariant(committee, structures.ice_cell())
    assert_consistent(committee, [structures.ethanol(), structures.ice_cell()])


@pytest.mark.parametrize("improper", [False, True])
def test_p_blocks_turn_like_matrices(make_potential, improper):
    """D B Dᵀ without irreps: orbitals (y, z, x) of a p shell turn as the axes do."""
    potential = make_potential("equivariant")
    rotation = random_rotation(3, improper=improper)
    atoms = structures.ethanol()
    turned = atoms.copy()
    turned.positions = atoms.positions @ rotation.T
    shells = [potential.shells[z] for z in atoms.numbers]
    before, after = (
        decode_blocks(predicted(potential, [item])[0]["orbital_blocks"], shells)
        for item in (atoms, turned)
    )
    d_matrix = rotation[np.ix_([1, 2, 0], [1, 2, 0])]
    carbon_p, turned_p = before[0][1], after[0][1]
    np.testing.assert_allclose(turned_p, d_matrix @ carbon_p @ d_matrix.T, atol=1e-10)
    assert np.abs(turned_p - carbon_p).max() > 1e-3


def test_an_invariant_head_gives_the_same_charges_in_every_frame(make_potential):
    """Which is why it cannot be exact for single p and d orbitals."""
    potential = make_potential("invariant")
    atoms = structures.ethanol()
    turned = atoms.copy()
    turned.positions = atoms.positions @ random_rotation(3).T
    before, after = (predicted(potential, [item])[0]["orbital_charges"] for item in (atoms, turned))
    np.testing.assert_allclose(after, before, atol=TOLERANCES[torch.float64])


@pytest.mark.parametrize("make", [structures.rock_salt, structures.ice_cell])
@pytest.mark.parametrize("repeat", [(2, 1, 1), (1, 2, 3)])
def test_a_supercell_is_the_cell_repeated(potential, make, repeat):
    atoms = make()
    n_cells = int(np.prod(repeat))
    cell, supercell = (predicted(potential, [item])[0] for item in (atoms, atoms.repeat(repeat)))
    close = {"rtol": 1e-10, "atol": 1e-10}
    np.testing.assert_allclose(supercell["interaction"], n_cells * cell["interaction"], **close)
    np.testing.assert_allclose(supercell["forces"], np.tile(cell["forces"], (n_cells, 1)), **close)
    np.testing.assert_allclose(supercell["stress"], cell["stress"], **close)
    if "charges" in cell:
        np.testing.assert_allclose(supercell["charges"], np.tile(cell["charges"], n_cells), **close)


def test_another_choice_of_the_lattice_vectors(potential):
    atoms = structures.ice_cell()
    skewed = atoms.copy()
    skewed.set_cell(np.array([[1, 0, 0], [2, 1, 0], [-1, 1, 1]]) @ atoms.cell.array)
    before, after = (predicted(potential, [item])[0] for item in (atoms, skewed))
    for name in ("interaction", "forces", "stress"):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-10, atol=1e-10)


def test_a_left_handed_cell(potential):
    atoms = structures.ice_cell()
    swapped = atoms.copy()
    swapped.set_cell(atoms.cell.array[[1, 0, 2]])
    before, after = (predicted(potential, [item])[0] for item in (atoms, swapped))
    np.testing.assert_allclose(after["stress"], before["stress"], rtol=1e-10, atol=1e-10)


def test_forces_add_up_to_zero_and_make_no_torque(potential):
    atoms = structures.chiral()
    (found,) = predicted(potential, [atoms])
    assert np.abs(found["forces"]).max() > 0.1
    np.testing.assert_allclose(found["forces"].sum(0), 0.0, atol=1e-10)
    np.testing.assert_allclose(np.cross(atoms.positions, found["forces"]).sum(0), 0.0, atol=1e-10)
