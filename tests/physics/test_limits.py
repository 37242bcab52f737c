"""Corner cases: lone atoms, no edges, odd cells, large coordinates, charges and spins."""

from __future__ import annotations

import numpy as np
import pytest
import structures
import torch
from ase import Atoms
from ase.build import bulk, molecule

from orbcalc.graph import AtomGraph
from orbcalc.orbitals import SLOTS, orbital_charges, shell_slots
from orbcalc.testing import TOLERANCES, assert_consistent, assert_derivatives, in_dtype, predicted

EVERYTHING = ("forces", "stress", "charges", "features")


def reference(potential, atoms):
    return potential.reference_energies[potential.element_index[atoms.numbers]].sum().item()


@pytest.mark.parametrize("symbol", ["H", "C", "Fe", "Cl"])
def test_a_lone_atom_has_exactly_its_reference_energy(potential_of_dtype, symbol):
    atoms = Atoms(symbol, info={"spin": 1 + Atoms(symbol).numbers[0] % 2})
    atoms.info["charge"] = 0
    cation = Atoms(symbol, info={"charge": atoms.info["spin"] - 1, "spin": 1})
    singlet = cation if atoms.info["spin"] == 1 else None
    found = predicted(potential_of_dtype, [atoms])[0]
    np.testing.assert_array_equal(found["forces"], 0.0)
    if singlet is not None:
        assert found["energy"] == reference(potential_of_dtype, atoms)
    else:  # a doublet: its spin is an input, and has an energy of its own
        assert found["energy"] != reference(potential_of_dtype, atoms)


def test_atoms_that_see_nothing_have_exactly_their_reference_energies(potential_of_dtype):
    atoms = Atoms("CFeO", positions=[[0, 0, 0], [0, 0, 9.0], [7.0, 0, 0]])
    (found,) = predicted(potential_of_dtype, [atoms])
    np.testing.assert_allclose(found["energy"], reference(potential_of_dtype, atoms), rtol=1e-15)
    np.testing.assert_array_equal(found["forces"], 0.0)


def test_atoms_that_see_nothing_can_be_trained_on(potential):
    """An empty list still has a graph of derivatives."""
    graph = AtomGraph.from_atoms(Atoms("C"), 4.0)
    found = potential(graph, EVERYTHING, create_graph=True)
    loss = found.energy.sum() + found.forces.pow(2).sum()
    gradients = torch.autograd.grad(loss, list(potential.parameters()), allow_unused=True)
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)


def test_a_periodic_cell_that_sees_no_image(potential):
    atoms = Atoms("Fe", cell=[9.0, 9.0, 9.0], pbc=True)
    (found,) = predicted(potential, [atoms])
    assert found["energy"] == reference(potential, atoms)
    np.testing.assert_array_equal(found["stress"], 0.0)


def test_one_atom_in_a_periodic_cell(potential):
    atoms = bulk("Fe", a=2.87)
    assert len(atoms) == 1
    (found,) = predicted(potential, [atoms])
    np.testing.assert_allclose(found["forces"], 0.0, atol=1e-10)
    assert np.abs(found["stress"]).max() > 1e-6
    cube = found["stress"][0, 0] * np.eye(3)
    np.testing.assert_allclose(found["stress"], cube, atol=1e-10)
    assert_derivatives(potential, atoms)


def test_a_cell_much_smaller_than_the_cutoff(potential):
    atoms = Atoms("H", cell=[1.1, 1.3, 1.2], pbc=True)
    assert_derivatives(potential, atoms)
    assert_consistent(potential, [atoms])


@pytest.mark.parametrize("pbc", [(1, 0, 0), (0, 1, 0), (1, 0, 1), (0, 1, 1)])
def test_open_directions_do_not_repeat(potential, pbc):
    """An open direction is as if its lattice vector were very long, or not there."""
    atoms = structures.ice_cell()
    atoms.pbc = pbc
    long, absent = atoms.copy(), atoms.copy()
    for axis in np.flatnonzero(~atoms.pbc):
        long.cell[axis] *= 10
        absent.cell[axis] = 0
    plain, far, without = predicted(potential, [atoms, long, absent])
    for other in (far, without):
        np.testing.assert_allclose(other["interaction"], plain["interaction"], atol=1e-10)
        np.testing.assert_allclose(other["forces"], plain["forces"], atol=1e-10)
    assert np.isfinite(plain["stress"]).all()
    assert np.isnan(without["stress"]).all()
    repeats = np.where(atoms.pbc, 2, 1)
    (twice,) = predicted(potential, [atoms.repeat(repeats)])
    np.testing.assert_allclose(
        twice["interaction"], repeats.prod() * plain["interaction"], atol=1e-9
    )


def test_a_batch_of_very_different_sizes(potential_of_dtype):
    batch = [
        structures.lone_atom("O"),
        structures.rock_salt().repeat((3, 3, 3)),
        structures.water(),
        bulk("Fe", a=2.87),
        Atoms("H2", positions=[[0, 0, 0], [0, 0, 30.0]]),
        structures.ferrocene(),
    ]
    alone = [predicted(potential_of_dtype, [atoms])[0] for atoms in batch]
    tolerance = TOLERANCES[potential_of_dtype.dtype]
    for together, single in zip(predicted(potential_of_dtype, batch), alone, strict=True):
        assert together.keys() == single.keys()
        for name, value in single.items():
            np.testing.assert_allclose(
                together[name], value, rtol=tolerance, atol=tolerance, err_msg=name
            )


@pytest.mark.parametrize("make", [structures.ethanol, structures.ice_cell])
def test_far_from_the_origin(potential_of_dtype, make):
    """The shift is exact in binary, so the structure is the same one; float32 loses nothing."""
    atoms = make()
    atoms.positions = np.rint(atoms.positions * 2.0**30) / 2.0**30
    far = atoms.copy()
    far.positions += [2.0**17, -(2.0**17), 2.0**16]
    near, away = (predicted(potential_of_dtype, [item])[0] for item in (atoms, far))
    for name in near:
        np.testing.assert_allclose(away[name], near[name], rtol=1e-10, atol=1e-10, err_msg=name)


CHARGED = [
    structures.water,
    structures.ammonium,
    structures.nitric_oxide,
    structures.iron_pentacarbonyl,
    structures.rock_salt,
]


@pytest.mark.parametrize("kind", ["equivariant", "invariant"])
def test_charges_add_up_to_the_total_charge(make_potential, kind, dtype):
    potential = make_potential(kind, dtype)
    batch = [make() for make in CHARGED]
    batch += [molecule("OH", info={"charge": -1}), Atoms("Fe", info={"charge": 2})]
    for atoms, found in zip(batch, predicted(potential, batch), strict=True):
        total = atoms.info.get("charge", 0)
        tolerance = 10 * TOLERANCES[dtype] if dtype == torch.float32 else 1e-10
        assert abs(found["charges"].sum() - total) < tolerance
        shells = [potential.shells[z] for z in atoms.numbers]
        assert np.isfinite(found["orbital_charges"]).sum() == sum(
            2 * momentum + 1 for momenta in shells for momentum in momenta
        )
        np.testing.assert_allclose(
            np.nansum(found["orbital_charges"], axis=1), found["charges"], atol=tolerance
        )


@pytest.mark.parametrize("make", CHARGED)
def test_orbital_charges_are_the_diagonal_of_the_blocks(make_potential, make):
    potential = make_potential("equivariant")
    atoms = make()
    (found,) = predicted(potential, [atoms])
    shells = [potential.shells[z] for z in atoms.numbers]
    expected = orbital_charges(found["orbital_blocks"], shells)
    for row, values, momenta in zip(found["orbital_charges"], expected, shells, strict=True):
        in_order = [row[SLOTS[slot].orbitals] for slot in shell_slots(momenta)]
        np.testing.assert_allclose(np.concatenate(in_order), values, atol=1e-12)


@pytest.mark.parametrize("change", [{"charge": 2}, {"spin": 3}, {"charge": -1, "spin": 2}])
def test_charge_and_spin_change_the_prediction(potential, change):
    neutral = structures.iron_pentacarbonyl()
    other = neutral.copy()
    other.info.update(change)
    before, after = predicted(potential, [neutral, other])
    assert abs(after["interaction"] - before["interaction"]) > 1e-3
    assert np.abs(after["forces"] - before["forces"]).max() > 1e-4


def test_the_embedding_of_a_neutral_singlet_is_what_a_missing_charge_means(potential):
    explicit = structures.water()
    explicit.info.update(charge=0, spin=1)
    before, after = predicted(potential, [structures.water(), explicit])
    assert after["energy"] == before["energy"]


def test_float32_is_close_to_float64(potential):
    batch = [structures.ethanol(), structures.ammonium(), structures.ferrocene()]
    batch += [structures.ice_cell(), structures.rock_salt()]
    rounded = in_dtype(potential, torch.float32)
    for exact, found in zip(predicted(potential, batch), predicted(rounded, batch), strict=True):
        for name, value in exact.items():
            size = max(1.0, np.nanmax(np.abs(value))) if np.isfinite(value).any() else 1.0
            allowed = TOLERANCES[torch.float32] * size
            np.testing.assert_allclose(found[name], value, atol=allowed, rtol=0, err_msg=name)


def test_total_energies_keep_their_digits_in_float32(make_potential):
    """A reference energy of -34,000 eV in float32 would be off by 2 meV."""
    potential = make_potential("none", torch.float32)
    assert potential.reference_energies.dtype == torch.float64
    (found,) = predicted(potential, [structures.ferrocene()])
    graph = AtomGraph.from_atoms(structures.ferrocene(), 4.0)
    assert potential(graph).energy.dtype == torch.float64
    assert found["energy"] != np.float32(found["energy"])
