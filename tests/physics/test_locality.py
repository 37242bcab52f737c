"""What may not be felt: atoms beyond the cutoff, other structures of the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import structures
import torch
from ase import Atoms

from orbcalc.graph import AtomGraph
from orbcalc.testing import predicted

CUTOFF = 4.0


def approaching(distance: float) -> Atoms:
    """A chlorine atom at a distance from both the carbon and the oxygen of CO, aside of others."""
    atoms = Atoms("COH", positions=[[0.56, 0, 0], [-0.56, 0, 0], [1.2, 0.8, 0.1]])
    return atoms + Atoms("Cl", positions=[[0, 0, -np.sqrt(distance**2 - 0.56**2)]])


def test_energy_and_forces_are_smooth_at_the_cutoff(potential):
    """The envelope starts with the third power, so energies differ by δ³ and forces by δ²."""
    beyond = predicted(potential, [approaching(CUTOFF + 1e-9)])[0]
    energies, forces = [], []
    for delta in (1e-2, 1e-3):
        inside = predicted(potential, [approaching(CUTOFF - delta)])[0]
        energies.append(abs(inside["interaction"] - beyond["interaction"]))
        forces.append(np.abs(inside["forces"] - beyond["forces"]).max())
        # Just outside it does not matter where the atom is.
        outside = predicted(potential, [approaching(CUTOFF + delta)])[0]
        np.testing.assert_allclose(outside["interaction"], beyond["interaction"], atol=1e-12)
        np.testing.assert_array_equal(outside["forces"][3], 0.0)
    assert 0 < energies[0] < 1e-3
    assert 0 < forces[0] < 1e-2
    assert energies[1] < 2e-3 * energies[0]
    assert forces[1] < 2e-2 * forces[0]


def test_the_energy_has_no_jump_along_a_path_through_the_cutoff(potential):
    """Energy differences along the path are the integral of the force, step by step."""
    distances = np.linspace(CUTOFF - 0.2, CUTOFF + 0.2, 81)
    path = [approaching(distance) for distance in distances]
    found = predicted(potential, path)
    energies = np.array([result["interaction"] for result in found])
    slopes = -np.array([result["forces"][3, 2] for result in found])
    heights = np.array([atoms.positions[3, 2] for atoms in path])
    trapezoids = (slopes[1:] + slopes[:-1]) / 2 * np.diff(heights)
    curvature = np.abs(np.diff(slopes)).max() * np.abs(np.diff(heights)).max()
    assert np.abs(np.diff(energies)).max() > 0
    np.testing.assert_allclose(np.diff(energies), trapezoids, atol=0.1 * curvature)


@pytest.mark.parametrize("distance", [CUTOFF - 1e-12, CUTOFF, CUTOFF + 1e-12])
def test_an_atom_exactly_at_the_cutoff(potential, distance):
    pair = Atoms("CO", positions=[[0, 0, 0], [0, 0, distance]])
    (found,) = predicted(potential, [pair])
    assert abs(found["interaction"]) < 1e-10
    assert np.abs(found["forces"]).max() < 1e-10


def test_pairs_beyond_the_cutoff_have_no_weight(potential):
    """A list with a skin holds more pairs: it must not change a bit of the energy's value."""
    from orbcalc.neighbors import neighbor_list

    atoms = structures.ice_cell()
    plain = potential(AtomGraph.from_atoms(atoms, CUTOFF), ("forces", "stress", "charges"))
    longer = neighbor_list(atoms, CUTOFF + 1.5)
    assert longer.mask.sum() > neighbor_list(atoms, CUTOFF).mask.sum()
    skin = potential(AtomGraph.from_atoms(atoms, CUTOFF, longer), ("forces", "stress", "charges"))
    for name, value in vars(plain).items():
        if value is not None:
            torch.testing.assert_close(
                getattr(skin, name), value, atol=1e-10, rtol=1e-10, equal_nan=True
            )


def test_far_molecules_add_up(potential):
    first, second = structures.ethanol(), structures.water()
    second.translate([0, 0, 50])
    apart = predicted(potential, [first, second])
    (together,) = predicted(potential, [first + second])
    np.testing.assert_allclose(
        together["interaction"], sum(found["interaction"] for found in apart), atol=1e-10
    )
    forces = np.concatenate([found["forces"] for found in apart])
    np.testing.assert_allclose(together["forces"], forces, atol=1e-10)


def test_gradients_across_structures_are_exactly_zero(potential):
    batch = [structures.ethanol(), structures.ice_cell(), structures.lone_atom("H")]
    graph = AtomGraph.batch([AtomGraph.from_atoms(atoms, CUTOFF) for atoms in batch])
    positions = graph.positions.clone().requires_grad_(True)
    found = potential(replace(graph, positions=positions), ("charges",))
    outputs = [found.energy]
    if found.charges is not None:
        outputs.append(graph.sum_over_atoms(found.orbital_charges.nan_to_num().pow(2).sum(1)))
    for output in outputs:
        for number in range(2):
            (gradient,) = torch.autograd.grad(output[number], positions, retain_graph=True)
            own = graph.structure_index == number
            assert gradient[own].abs().max() > 0
            assert (gradient[~own] == 0).all()


def test_forces_reach_no_farther_than_the_layers(potential):
    """Two layers: an energy sees 2 cutoffs, so a force sees 4 at most."""
    chain = Atoms("C12", positions=[[3.0 * k, 0, 0.1 * (k % 2)] for k in range(12)])
    moved = chain.copy()
    moved.positions[11] += [0.2, 0.3, -0.1]
    before, after = (predicted(potential, [atoms])[0]["forces"] for atoms in (chain, moved))
    # Each bond is one hop, as the next atom but one is beyond the cutoff.
    np.testing.assert_array_equal(after[:7], before[:7])
    assert np.abs(after[8:] - before[8:]).max() > 1e-6
