"""Neighbour lists against ASE's, their padded layout, and the skin."""

from __future__ import annotations

import ase.neighborlist
import numpy as np
import pytest
import structures
from ase import Atoms
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st

from orbcalc.errors import ConfigError
from orbcalc.neighbors import SkinList, neighbor_list

CUTOFF = 4.0


def edges(found, atoms):
    """All edges as sorted rows (i, j, shift)."""
    centers = np.repeat(np.arange(len(atoms)), found.n_slots).reshape(found.mask.shape)
    rows = np.concatenate(
        [
            centers[found.mask][:, None],
            found.neighbors[found.mask][:, None],
            found.shifts[found.mask],
        ],
        axis=1,
    ).astype(int)
    return rows[np.lexsort(rows.T[::-1])]


def edges_of_ase(atoms, cutoff):
    i, j, shifts = ase.neighborlist.neighbor_list("ijS", atoms, cutoff)
    rows = np.concatenate([i[:, None], j[:, None], shifts], axis=1)
    return rows[np.lexsort(rows.T[::-1])]


@st.composite
def random_atoms(draw):
    """Atoms in a skewed box, any mixture of periodic directions, some outside of the box."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_atoms = draw(st.integers(1, 12))
    cell = np.diag(rng.uniform(2.0, 8.0, 3)) + np.tril(rng.uniform(-1.5, 1.5, (3, 3)), -1)
    positions = rng.uniform(-1, 2, (n_atoms, 3)) @ cell
    pbc = draw(st.tuples(*[st.booleans()] * 3))
    return Atoms(f"H{n_atoms}", positions=positions, cell=cell, pbc=pbc)


@settings(max_examples=60)
@given(random_atoms(), st.floats(0.5, 6.0))
def test_all_pairs_of_random_structures(atoms, cutoff):
    found = neighbor_list(atoms, cutoff)
    np.testing.assert_array_equal(edges(found, atoms), edges_of_ase(atoms, cutoff))
    check_layout(found)


def check_layout(found):
    """Unused slots point home, and each edge knows its reverse."""
    n_atoms, n_slots = found.neighbors.shape
    home = np.arange(n_atoms)[:, None]
    assert n_slots == max(1, found.mask.sum(1).max())
    assert (found.neighbors == home)[~found.mask].all()
    assert (found.shifts[~found.mask] == 0).all()
    everywhere = np.arange(n_atoms * n_slots).reshape(n_atoms, n_slots)
    np.testing.assert_array_equal(found.reverse[~found.mask], everywhere[~found.mask])
    np.testing.assert_array_equal(found.reverse.ravel()[found.reverse], everywhere)
    assert (found.reverse != everywhere)[found.mask].all()
    np.testing.assert_array_equal(found.reverse[found.mask] // n_slots, found.neighbors[found.mask])
    backward = found.shifts.reshape(-1, 3)[found.reverse]
    np.testing.assert_array_equal(backward[found.mask], -found.shifts[found.mask])


@pytest.mark.parametrize(
    "atoms",
    [
        structures.ferrocene(),
        structures.ice_cell(),
        structures.salt_slab(),
        bulk("Fe", a=2.87),
        Atoms("H", cell=[1.0, 1.0, 1.0], pbc=True),
        Atoms("H2", positions=[[0, 0, 0], [0, 0, 1]], cell=[0, 0, 2.0], pbc=(False, False, True)),
    ],
    ids=str,
)
def test_all_pairs_of_known_structures(atoms):
    found = neighbor_list(atoms, CUTOFF)
    np.testing.assert_array_equal(edges(found, atoms), edges_of_ase(atoms, CUTOFF))
    check_layout(found)


def test_a_lone_atom_has_one_unused_slot():
    found = neighbor_list(structures.lone_atom(), CUTOFF)
    assert found.n_slots == 1
    assert not found.mask.any()
    check_layout(found)


def test_atoms_far_from_the_origin_and_from_each_other():
    atoms = structures.water() + Atoms("H", positions=[[0.0, 0.0, 1e5]])
    atoms.positions += 1e5
    assert neighbor_list(atoms, CUTOFF).mask.sum() == 6


@pytest.mark.parametrize("pbc", [(True, True, False), (False, True, False)])
def test_what_is_far_from_the_box_is_no_nearer_to_others(pbc):
    rng = np.random.default_rng(0)
    atoms = Atoms("H60", cell=[4, 4, 20], pbc=pbc)
    atoms.positions = rng.uniform(0, 4, (60, 3)) + np.repeat([[0, 0, 0], [900, 0, 3e3]], 30, axis=0)
    near = atoms.copy()  # only as far as it must be
    near.positions[30:] -= [0 if pbc[0] else 880, 0, 2.98e3]
    if pbc[0]:
        near.positions[30:, 0] -= 900  # a whole number of cells
    found, expected = neighbor_list(atoms, CUTOFF), neighbor_list(near, CUTOFF)
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.neighbors, expected.neighbors)


@pytest.mark.parametrize("far", [[9e4, 9e4, 0], [9e4, 0, 0], [9e4, 9e4, 9e4]])
@pytest.mark.parametrize("pbc", [(False, False, False), (False, False, True), (False, True, True)])
def test_an_atom_far_away_has_its_images_for_neighbours(pbc, far):
    molecule = structures.water()
    molecule.set_cell([5.0, 5.0, 5.0])
    molecule.pbc = pbc
    atoms = molecule + Atoms("H", positions=[far])
    found = neighbor_list(atoms, CUTOFF + 1.5)
    assert found.mask[3].sum() == {0: 0, 1: 2, 2: 4}[sum(pbc)]
    assert found.mask[:3].sum() == neighbor_list(molecule, CUTOFF + 1.5).mask.sum()


def test_a_thin_and_wide_cell():
    atoms = Atoms("H", cell=[4e3, 4e3, 3.0], pbc=True)
    found = neighbor_list(atoms, CUTOFF)
    assert found.mask.sum() == 2
    np.testing.assert_array_equal(np.abs(found.shifts[found.mask]), [[0, 0, 1], [0, 0, 1]])
    check_layout(found)


@settings(max_examples=40)
@given(random_atoms())
def test_the_closest_pair(atoms):
    i, j, distance = neighbor_list(atoms, CUTOFF).closest(atoms)
    distances = ase.neighborlist.neighbor_list("d", atoms, CUTOFF)
    if len(distances) == 0:
        assert distance == np.inf
    else:
        assert distance == pytest.approx(distances.min())
        assert (i == j) or distance <= np.linalg.norm(
            atoms.positions[i] - atoms.positions[j]
        ) + 1e-9


def test_nothing_moves_nothing_is_built():
    skin_list = SkinList(CUTOFF)
    atoms = structures.ice_cell()
    first = skin_list.update(atoms)
    atoms.set_velocities(np.ones((6, 3)))
    atoms.positions[0, 0] += 0.24
    assert skin_list.update(atoms) is first
    assert skin_list.n_builds == 1


def change_pbc(atoms):
    atoms.pbc = (True, True, False)


def change_cell(atoms):
    atoms.cell[0, 0] += 1e-9


def add_atom(atoms):
    atoms.append("H")
    atoms.positions[-1] = atoms.positions[0] + 1.5


def move_one_far(atoms):
    atoms.positions[3, 1] += 0.2501


def swap_atoms(atoms):
    atoms.positions[[0, 1]] = atoms.positions[[1, 0]]


@pytest.mark.parametrize("change", [change_pbc, change_cell, add_atom, move_one_far, swap_atoms])
def test_what_makes_a_list_invalid(change):
    skin_list = SkinList(CUTOFF, skin=0.5)
    atoms = structures.ice_cell()
    skin_list.update(atoms)
    change(atoms)
    found = skin_list.update(atoms)
    assert skin_list.n_builds == 2
    np.testing.assert_array_equal(edges(found, atoms), edges_of_ase(atoms, CUTOFF + 0.5))


def test_the_caller_may_change_its_atoms_in_place():
    """The list remembers a copy: moving back and forth in place does not fool it."""
    skin_list = SkinList(CUTOFF, skin=0.5)
    atoms = structures.ice_cell()
    skin_list.update(atoms)
    for _ in range(4):
        atoms.positions[0, 0] += 0.1
        skin_list.update(atoms)
    assert skin_list.n_builds == 2


@settings(max_examples=20)
@given(random_atoms(), st.integers(0, 2**32 - 1))
def test_no_pair_is_missed_while_atoms_move(atoms, seed):
    rng = np.random.default_rng(seed)
    skin_list = SkinList(3.0, skin=0.6)
    for _ in range(15):
        atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
        listed = {tuple(row) for row in edges(skin_list.update(atoms), atoms)}
        assert {tuple(row) for row in edges_of_ase(atoms, 3.0)} <= listed
    assert skin_list.n_builds < 15


@pytest.mark.parametrize("skin", [-0.1, np.nan, np.inf])
def test_a_skin_that_is_no_length_is_an_error(skin):
    with pytest.raises(ConfigError, match="skin must be a finite length"):
        SkinList(CUTOFF, skin)


def test_a_skin_of_zero_builds_whenever_something_moves():
    skin_list = SkinList(CUTOFF, skin=0.0)
    atoms = structures.water()
    skin_list.update(atoms)
    skin_list.update(atoms)
    assert skin_list.n_builds == 1
    atoms.positions[0, 0] += 1e-6
    skin_list.update(atoms)
    assert skin_list.n_builds == 2
