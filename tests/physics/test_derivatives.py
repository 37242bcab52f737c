"""First and second derivatives against finite differences and torch's own checks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import structures
import torch
from ase.build import bulk

from orbcalc.graph import AtomGraph
from orbcalc.testing import STENCIL, TOLERANCES, assert_derivatives

STRUCTURES = [
    structures.ethanol,
    structures.ammonium,
    structures.nitric_oxide,
    structures.rock_salt,
    structures.ice_cell,
    structures.salt_slab,
    structures.chiral,
]


@pytest.mark.parametrize("make", STRUCTURES)
def test_forces_and_stress(potential, make):
    assert_derivatives(potential, make(), n_coordinates=24)


@pytest.mark.parametrize(
    "options", [{"l_max": 0, "message_l_max": 0}, {"layers": 1}, {"layers": 3}]
)
def test_forces_and_stress_of_other_architectures(make_potential, options):
    potential = make_potential("none", **options)
    assert_derivatives(potential, structures.ice_cell(), n_coordinates=12)


def test_a_float32_model_is_checked_in_float64(make_potential):
    assert_derivatives(make_potential("equivariant", torch.float32), structures.ice_cell())


def test_a_committee(committee):
    assert_derivatives(committee, structures.ice_cell(), n_coordinates=12)


@pytest.fixture(scope="module")
def small(make_potential):
    """As few weights as the configuration allows: the checks are dense."""
    return make_potential("equivariant", channels=4, radial_functions=2, radial_hidden=4)


@pytest.fixture(scope="module")
def padded(small):
    """A batch with unused slots, an atom without neighbours, a charge, and a periodic cell."""
    batch = [structures.nitric_oxide(), structures.lone_atom("H"), bulk("Fe", cubic=False)]
    batch[1].info["charge"] = 1
    return AtomGraph.batch([AtomGraph.from_atoms(atoms, 3.0) for atoms in batch])


def at(graph, positions):
    return replace(graph, positions=positions)


def test_second_derivatives_of_the_energy(small, padded):
    def energy(positions):
        return small(at(padded, positions)).energy

    positions = padded.positions.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(energy, positions, atol=1e-6, rtol=1e-6)
    assert torch.autograd.gradgradcheck(energy, positions, atol=1e-6, rtol=1e-6)


def test_derivatives_of_forces_stress_and_charges(small, padded):
    def outputs(positions):
        found = small(at(padded, positions), ("forces", "stress", "charges"), create_graph=True)
        return found.forces, found.stress[2], torch.nan_to_num(found.orbital_blocks)

    positions = padded.positions.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(outputs, positions, atol=1e-6, rtol=1e-6)


def test_second_derivatives_agree_with_force_differences(small):
    """A Hessian by autograd, against central differences of the forces."""
    atoms = structures.water()
    graph = AtomGraph.from_atoms(atoms, small.config.cutoff)
    hessian = torch.autograd.functional.hessian(
        lambda positions: small(at(graph, positions)).energy.sum(), graph.positions
    )
    step, numeric = 1e-3, np.zeros((9, 9))
    for row in range(9):
        for k, weight in STENCIL.items():
            moved = graph.positions.clone()
            moved.view(-1)[row] += k * step
            forces = small(at(graph, moved), ("forces",)).forces
            numeric[row] -= weight * forces.detach().numpy().ravel() / step
    analytic = hessian.reshape(9, 9).numpy()
    np.testing.assert_allclose(analytic, analytic.T, atol=1e-13 * np.abs(analytic).max())
    np.testing.assert_allclose(
        analytic, numeric, atol=TOLERANCES["finite differences"] * np.abs(analytic).max()
    )


def training_loss(potential, graph):
    """A loss on everything that training looks at, smooth and not at its minimum."""
    found = potential(graph, ("forces", "stress", "charges"), create_graph=True)
    stress = found.stress[graph.is_periodic]
    charges = found.orbital_blocks if found.orbital_blocks is not None else found.orbital_charges
    loss = (found.energy - potential.reference_energies.mean()).pow(2).mean() * 1e-3
    loss = loss + (found.forces - 0.3).pow(2).mean() + (100 * stress - 0.1).pow(2).mean()
    if charges is not None:
        loss = loss + (torch.nan_to_num(charges) - 0.1).pow(2).mean()
    return loss


def test_gradient_of_the_loss_with_respect_to_the_weights(make_potential, head, padded):
    """For each weight tensor, the slope along a random direction in it."""
    potential = make_potential(head, channels=4, radial_functions=2, radial_hidden=4)
    names, weights = zip(*potential.named_parameters(), strict=True)
    gradients = torch.autograd.grad(
        training_loss(potential, padded), weights, allow_unused=True, materialize_grads=True
    )
    largest = max(float(gradient.norm()) for gradient in gradients)
    rng, step = torch.Generator().manual_seed(0), 1e-4
    for name, weight, gradient in zip(names, weights, gradients, strict=True):
        direction = torch.randn(weight.shape, generator=rng, dtype=weight.dtype)
        slope = 0.0
        for k, factor in STENCIL.items():
            with torch.no_grad():
                weight += k * step * direction
            slope += factor * float(training_loss(potential, padded).detach()) / step
            with torch.no_grad():
                weight -= k * step * direction
        expected = float((gradient * direction).sum())
        assert abs(slope - expected) < TOLERANCES["finite differences"] * largest, name


def test_every_weight_is_trained(make_potential, head):
    """No weight has a gradient of zero."""
    potential = make_potential(head)
    batch = [structures.ammonium(), structures.nitric_oxide(), structures.ice_cell()]
    batch += [structures.iron_pentacarbonyl()]
    for seed, atoms in enumerate(batch):
        atoms.rattle(0.05, seed=seed)
    loss = training_loss(potential, AtomGraph.batch([AtomGraph.from_atoms(a, 4.0) for a in batch]))
    names, weights = zip(*potential.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    dead = {name for name, g in zip(names, gradients, strict=True) if not g.abs().max() > 0}
    assert not dead


def test_derivatives_are_finite_for_padding_and_lone_atoms(potential, padded):
    loss = training_loss(potential, padded)
    gradients = torch.autograd.grad(loss, list(potential.parameters()), allow_unused=True)
    assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)
