"""Neighbour lists against ASE's, their padded layout, and the skin."""

from __future__ import annotations

import logging

import ase.neighborlist
import numpy as np
import pytest
import structures
import torch
import vesin
from ase import Atoms
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st

from orbcalc import neighbors as neighbors_module
from orbcalc.errors import ConfigError, StructureError
from orbcalc.graph import AtomGraph
from orbcalc.neighbors import SkinList, _can_search, neighbor_list
from orbcalc.structures import check_structure

CUTOFF = 4.0


def edges(found, atoms):
    """All edges as sorted rows (i, j, shift)."""
    mask = found.mask.numpy()
    centers = np.broadcast_to(np.arange(len(atoms))[:, None], mask.shape)
    ends = found.neighbors.numpy()[mask][:, None]
    rows = np.concatenate([centers[mask][:, None], ends, found.shifts.numpy()[mask]], axis=1)
    rows = rows.astype(int)
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
    cell *= rng.choice([-1, 1], 3)[:, None]
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
    neighbors, shifts, mask, reverse = (value.numpy() for value in vars(found).values())
    n_atoms, n_slots = neighbors.shape
    home = np.arange(n_atoms)[:, None]
    assert n_slots == max(1, mask.sum(1).max())
    assert (neighbors == home)[~mask].all()
    assert (shifts[~mask] == 0).all()
    everywhere = np.arange(n_atoms * n_slots).reshape(n_atoms, n_slots)
    np.testing.assert_array_equal(reverse[~mask], everywhere[~mask])
    np.testing.assert_array_equal(reverse.ravel()[reverse], everywhere)
    assert (reverse != everywhere)[mask].all()
    np.testing.assert_array_equal(reverse[mask] // n_slots, neighbors[mask])
    backward = shifts.reshape(-1, 3)[reverse]
    np.testing.assert_array_equal(backward[mask], -shifts[mask])


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
    assert found.mask.shape == (1, 1)
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
    assert found.shifts[found.mask].abs().tolist() == [[0, 0, 1], [0, 0, 1]]
    check_layout(found)


@settings(max_examples=40)
@given(random_atoms(), st.integers(1, 10**6))
def test_atoms_that_have_drifted_for_long(atoms, far):
    expected = edges_of_ase(atoms, CUTOFF)
    cells = np.random.default_rng(far).integers(-far, far, (len(atoms), 3)) * atoms.pbc
    atoms.positions += cells @ atoms.cell.array
    found = neighbor_list(atoms, CUTOFF)
    check_layout(found)
    rows = edges(found, atoms)
    rows[:, 2:] += cells[rows[:, 1]] - cells[rows[:, 0]]
    np.testing.assert_array_equal(rows[np.lexsort(rows.T[::-1])], expected)


@settings(max_examples=40)
@given(random_atoms())
def test_the_closest_pair(atoms):
    i, j, distance = AtomGraph.from_atoms(atoms, CUTOFF).closest()
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
    """Only the cell: what was whole across its faces is 0.6 Å apart now."""
    atoms.cell[0, 0] += 0.6


def strain(atoms):
    """More than the skin leaves room for."""
    atoms.set_cell(atoms.cell.array * 0.88, scale_atoms=True)


def add_atom(atoms):
    atoms.append("H")
    atoms.positions[-1] = atoms.positions[0] + 1.5


def move_one_far(atoms):
    atoms.positions[3, 1] += 0.2501


def swap_atoms(atoms):
    atoms.positions[[0, 1]] = atoms.positions[[1, 0]]


@pytest.mark.parametrize(
    "change", [change_pbc, change_cell, strain, add_atom, move_one_far, swap_atoms]
)
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


def assert_no_pair_is_missed(atoms, skin, move):
    """While a function moves atoms, and perhaps their cell."""
    skin_list = SkinList(3.0, skin)
    for _ in range(15):
        move()
        listed = {tuple(row) for row in edges(skin_list.update(atoms), atoms)}
        assert {tuple(row) for row in edges_of_ase(atoms, 3.0)} <= listed
    assert skin_list.n_builds < 15


@settings(max_examples=20)
@given(random_atoms(), st.integers(0, 2**32 - 1))
def test_no_pair_is_missed_while_atoms_move(atoms, seed):
    rng = np.random.default_rng(seed)

    def move():
        atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)

    assert_no_pair_is_missed(atoms, 0.6, move)


@settings(max_examples=30)
@given(random_atoms(), st.integers(0, 2**32 - 1))
def test_no_pair_is_missed_while_cells_are_strained(atoms, seed):
    """As in dynamics at constant pressure: cell and atoms move, each in its own way."""
    rng = np.random.default_rng(seed)

    def move():
        strained = atoms.cell.array @ (np.eye(3) + rng.normal(scale=0.01, size=(3, 3)))
        atoms.set_cell(strained, scale_atoms=True)
        atoms.positions += rng.normal(scale=0.02, size=atoms.positions.shape)

    assert_no_pair_is_missed(atoms, 0.8, move)


def test_a_cell_that_turns_with_its_atoms_needs_no_new_list():
    skin_list = SkinList(CUTOFF, skin=0.5)
    atoms = structures.ice_cell()
    first = skin_list.update(atoms)
    atoms.rotate(40, (1, 2, 3), rotate_cell=True)
    assert skin_list.update(atoms) is first
    found = AtomGraph.from_atoms(atoms, CUTOFF, first)
    assert found.closest()[2] == pytest.approx(
        ase.neighborlist.neighbor_list("d", atoms, CUTOFF).min()
    )


@pytest.mark.parametrize(
    "cell",
    [
        [[np.nan, 0, 0], [0, 5, 0], [0, 0, 5]],
        [[5, 0, 0], [10, 0, 0], [0, 0, 5]],
        [[5e8, 0, 0], [0, 5e8, 0], [0, 0, 5e8]],
        np.zeros((3, 3)),
    ],
)
@pytest.mark.parametrize("pbc", [True, (True, True, False)])
def test_a_cell_that_is_none_is_seen_by_the_check(cell, pbc):
    skin_list = SkinList(CUTOFF)
    atoms = structures.ice_cell()
    atoms.pbc = pbc
    skin_list.update(atoms)
    atoms.set_cell(cell, scale_atoms=np.max(cell) > 1e6)
    with pytest.raises(StructureError):
        skin_list.update(atoms, check_structure)


@pytest.fixture
def young_search(monkeypatch):
    """Stand in for a search on another device: that of the CPU, changed by a function."""
    own = neighbors_module._search

    def put_in(change):
        def search(positions, box, cutoff, device):
            found = own(positions, box, cutoff, torch.device("cpu"))
            return found if device.type == "cpu" else change(found)

        monkeypatch.setattr(neighbors_module, "_search", search)

    _can_search.cache_clear()
    yield put_in
    _can_search.cache_clear()


def fails(_):
    raise RuntimeError("too many pairs")


@pytest.mark.parametrize(
    ("change", "is_right"),
    [
        (lambda found: found, True),
        (lambda found: tuple(part.flip(0) for part in found), True),  # in another order
        (lambda found: tuple(part[1:] for part in found), False),
        (lambda found: (found[0], found[1], torch.zeros_like(found[2]), found[3]), False),
        (fails, False),
    ],
)
def test_a_search_on_a_device_is_tried_before_it_is_trusted(young_search, change, is_right, caplog):
    caplog.set_level(logging.WARNING)
    young_search(change)
    assert _can_search(torch.device("cuda")) is is_right
    assert ("the CPU does it instead" in caplog.text) is not is_right


def test_what_a_device_has_no_room_for_the_cpu_does(young_search, monkeypatch):
    monkeypatch.setattr(neighbors_module, "SEARCHERS", {"meta"})
    ice = structures.ice_cell()
    box = ice.positions, ice.cell.array, CUTOFF
    expected = neighbors_module._search(*box, torch.device("cpu"))
    young_search(lambda found: fails(found) if len(found[0]) == len(expected[0]) else found)
    found = neighbors_module._pairs(*box, torch.device("meta"))
    assert _can_search(torch.device("meta"))
    for own, there in zip(expected, found, strict=True):
        assert there.device.type == "meta"
        assert own.shape == there.shape


def test_vectors_may_point_against_the_axes(monkeypatch):
    """Of a box along the axes a GPU counts images in lengths of its vectors, without signs."""

    class Lengths(vesin.NeighborList):
        def compute(self, points, box, **options):
            i, j, shifts, distances = super().compute(points=points, box=box, **options)
            return i, j, shifts * torch.sign(torch.diag(box)).int(), distances

    monkeypatch.setattr(neighbors_module.vesin, "NeighborList", Lengths)
    cell = np.diag([-9.0, 10.0, -11.0])
    positions = np.random.default_rng(0).uniform(size=(60, 3)) @ cell
    atoms = Atoms("H60", positions=positions, cell=cell, pbc=True)
    found = neighbor_list(atoms, CUTOFF)
    np.testing.assert_array_equal(edges(found, atoms), edges_of_ase(atoms, CUTOFF))


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
