"""The parts of the network against e3nn or plain formulas, and the contracts of the whole."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import structures
import torch
from ase import Atoms
from e3nn import o3
from structures import e3nn_representation, random_rotation

from orbcalc.config import PotentialConfig
from orbcalc.errors import ConfigError, UnsupportedElementError
from orbcalc.graph import PART_ATOMS, AtomGraph
from orbcalc.model.basis import SphericalHarmonics, bessel_basis, polynomial_cutoff
from orbcalc.model.committee import Calibration, Committee
from orbcalc.model.potential import Potential, Prediction
from orbcalc.model.products import DegreeLinear, SphereProduct, degree_of_component

ROTATION = random_rotation(7)


def irreps_of(l_max):
    """Features of parity (-1)^l, as products hold them."""
    return str(o3.Irreps.spherical_harmonics(l_max))


def features(l_max, n_atoms=3, channels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((l_max + 1) ** 2, n_atoms, channels, generator=generator).double()


def turned(values, l_max, rotation=ROTATION):
    d_matrix = torch.from_numpy(e3nn_representation(irreps_of(l_max), rotation))
    return torch.einsum("ab,bnc->anc", d_matrix, values)


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


# ------------------------------------------------------------------------------- basis
def test_bessel_functions_are_a_formula_and_vanish_at_the_cutoff():
    distances = torch.tensor([0.5, 1.7, 4.0], dtype=torch.float64)
    found = bessel_basis(distances, 4.0, 3)
    for n in (1, 2, 3):
        expected = torch.sin(n * math.pi * distances / 4.0) / (math.sqrt(2) * distances / 4.0)
        torch.testing.assert_close(found[n - 1], expected)
    assert found[:, 2].abs().max() < 1e-14


def test_the_cutoff_function_and_two_derivatives_vanish_at_the_cutoff():
    x = torch.tensor([1e-6, 2.0, 4.0 - 1e-9, 4.0, 5.0, 40.0], dtype=torch.float64)
    x.requires_grad_(True)
    value = polynomial_cutoff(x, 4.0)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    np.testing.assert_allclose(value[0].item(), 1.0)
    assert 0 < value[1] < 1
    for derivative in (value, first, second):
        assert derivative[2].abs() < 1e-6
        assert (derivative[3:].abs() < 1e-12).all()


@pytest.mark.parametrize("l_max", range(5))
def test_spherical_harmonics_are_those_of_e3nn(l_max):
    vectors = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    vectors = torch.cat([vectors, torch.eye(3).double(), -torch.eye(3).double()])
    found = SphericalHarmonics(l_max).double()(vectors.T)
    assert len(found) == l_max + 1
    for degree, values in enumerate(found):
        expected = o3.spherical_harmonics(degree, vectors, True, normalization="component")
        torch.testing.assert_close(values.T, expected, atol=1e-7, rtol=1e-7)


# ---------------------------------------------------------------------------- products
def test_degrees_of_components():
    assert degree_of_component(2).tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 2]


def test_degree_linear_mixes_each_degree_alone():
    layer = seeded(lambda: DegreeLinear(2, 2, 3))
    values = features(2)
    found = layer(values)
    for m, degree in enumerate(degree_of_component(2)):
        torch.testing.assert_close(found[m], values[m] @ layer.weight[degree])
    torch.testing.assert_close(layer(values[:4]), found[:4])
    torch.testing.assert_close(layer(turned(values, 2)), turned(found, 2), atol=1e-7, rtol=1e-7)


def test_degree_linear_that_begins_above_scalars():
    layer = seeded(lambda: DegreeLinear(2, 2, 3, l_min=1))
    values = features(2)[1:]
    for degree, block in enumerate(layer(values).split([3, 5]), start=1):
        own = values[degree**2 - 1 : (degree + 1) ** 2 - 1]
        torch.testing.assert_close(block, own @ layer.weight[degree - 1])
    torch.testing.assert_close(layer(values[:3]), layer(values)[:3])


@pytest.mark.parametrize(("l_max", "l_out", "order"), [(3, 2, 3), (2, 3, 2), (1, 2, 4), (0, 0, 3)])
@pytest.mark.parametrize("improper", [False, True])
def test_products_are_equivariant(l_max, l_out, order, improper):
    rotation = random_rotation(2, improper=improper)
    product = SphereProduct(l_max, l_out, order)
    factors = [features(l_max, seed=k) for k in range(order)]
    found = product(factors, l_out)
    assert len(found) == order - 1
    both = product([turned(factor, l_max, rotation) for factor in factors], l_out)
    for power, other in zip(found, both, strict=True):
        assert power.shape == ((l_out + 1) ** 2, 3, 2)
        torch.testing.assert_close(other, turned(power, l_out, rotation), atol=1e-7, rtol=1e-7)


def test_products_are_gaunt_coefficients():
    """The slow and obvious way: Wigner 3j symbols, coupling by coupling.

    ∫ Y_l1 Y_l2 Y_l3 / 4π = sqrt((2l1+1)(2l2+1)(2l3+1)) (l1 l2 l3; 0 0 0) (l1 l2 l3; m1 m2 m3),
    up to the phase of the basis, which a point on the polar axis gives.
    """
    left, right = features(2, seed=1), features(2, seed=2)
    pole = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    at_pole = [
        o3.spherical_harmonics(k, pole, normalize=True, normalization="component") for k in range(5)
    ]
    expected = torch.zeros(9, 3, 2, dtype=torch.float64)
    for l1 in range(3):
        for l2 in range(3):
            for l3 in range(abs(l1 - l2), min(l1 + l2, 2) + 1):
                symbol = o3.wigner_3j(l1, l2, l3, dtype=torch.float64)
                # Y_l1 Y_l2 is Σ_l3 gaunt (Y_l1 ⊗ Y_l2)_l3: its value at the pole gives `gaunt`.
                coupled = torch.einsum("abm,a,b->m", symbol, at_pole[l1], at_pole[l2])
                gaunt = coupled @ at_pole[l3]
                block = torch.einsum(
                    "abm,anc,bnc->mnc",
                    symbol,
                    left[l1**2 : (l1 + 1) ** 2],
                    right[l2**2 : (l2 + 1) ** 2],
                )
                expected[l3**2 : (l3 + 1) ** 2] += gaunt * block
    (found,) = SphereProduct(2, 2, 2)([left, right], 2)
    size = math.sqrt(9)  # both factors are divided by it, the product is multiplied
    torch.testing.assert_close(found * size, expected, atol=1e-7, rtol=1e-7)


def test_the_grid_is_fine_enough():
    """A finer rule gives the same products."""
    factors = [features(3, seed=k) for k in range(3)]
    fine = SphereProduct(3, 2, 5)
    for found, expected in zip(SphereProduct(3, 2, 3)(factors, 2), fine(factors, 2), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_lower_degrees_alone():
    product = SphereProduct(2, 2, 3)
    factors = [features(2, seed=k) for k in range(3)]
    whole = product(factors, 2)
    for l_out in range(2):
        for power, expected in zip(product(factors, l_out), whole, strict=True):
            torch.testing.assert_close(power, expected[: (l_out + 1) ** 2])


# --------------------------------------------------------------------------- potential
def graph_of(*batch, cutoff=4.0):
    return AtomGraph.batch([AtomGraph.from_atoms(atoms, cutoff) for atoms in batch])


@pytest.mark.parametrize("atoms", [structures.ice_cell(), structures.ethanol()])
def test_in_parts_a_structure_is_the_same(potential, monkeypatch, atoms):
    graph = graph_of(atoms, structures.water())
    properties = ("energy", "forces", "stress", "charges")
    whole = potential(graph, properties)
    monkeypatch.setitem(PART_ATOMS, "cpu", 2)
    parts = potential(graph, properties)
    for field in fields(whole):
        expected, found = getattr(whole, field.name), getattr(parts, field.name)
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(
                found.detach(), expected.detach(), rtol=1e-9, atol=1e-9, equal_nan=True
            )


def test_only_what_is_asked_for_is_computed(potential, monkeypatch):
    def refuse(*_):
        raise AssertionError("the charge head was used")

    if potential.charge_head is not None:
        monkeypatch.setattr(type(potential.charge_head), "forward", refuse)
    graph = graph_of(structures.water())
    for wanted, given in (
        ((), {"energy"}),
        (("forces",), {"energy", "forces", "stress"}),
        (("stress", "features"), {"energy", "forces", "stress", "features"}),
    ):
        found = potential(graph, wanted)
        assert {name for name, value in vars(found).items() if value is not None} == given


def test_shapes_and_types(potential_of_dtype):
    graph = graph_of(structures.water(), structures.ice_cell())
    found = potential_of_dtype(graph, ("forces", "stress", "charges", "features"))
    shapes = {
        "energy": (2,),
        "forces": (9, 3),
        "stress": (2, 3, 3),
        "features": (2, potential_of_dtype.config.channels),
        "charges": (9,),
        "orbital_charges": (9, 10),
        "orbital_blocks": (9, 23),
    }
    not_asked = {"xtb_energy", "xtb_forces", "last_layer"}
    not_asked |= {"energy_rigidity", "atom_rigidity", "reference_uncertainty"}
    absent = (
        not_asked
        | {
            "equivariant": set(),
            "invariant": {"orbital_blocks"},
            "none": {"charges", "orbital_charges", "orbital_blocks"},
        }[potential_of_dtype.config.charge_head]
    )
    for field in fields(Prediction):
        value = getattr(found, field.name)
        assert (value is None) is (field.name in absent), field.name
        if value is not None:
            assert tuple(value.shape) == shapes[field.name]
            assert not (value.requires_grad and field.name in ("energy", "forces", "stress"))
    assert found.energy.dtype == torch.float64
    assert potential_of_dtype.dtype == next(potential_of_dtype.parameters()).dtype


def test_the_graph_is_not_changed(potential):
    graph = graph_of(structures.ice_cell())
    before = {name: value.clone() for name, value in vars(graph).items()}
    potential(graph, ("forces", "stress", "charges"))
    for name, value in vars(graph).items():
        assert torch.equal(value, before[name]), name
        assert not value.requires_grad


def test_it_works_without_gradients(potential):
    graph = graph_of(structures.water())
    expected = potential(graph, ("forces",))
    with torch.no_grad():
        found = potential(graph, ("forces",))
    assert torch.equal(found.forces, expected.forces)
    assert torch.equal(found.energy, expected.energy)


def test_equal_seeds_give_equal_potentials(make_potential):
    first, second, other = (make_potential(seed=seed) for seed in (3, 3, 4))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.backbone.elements.weight, other.backbone.elements.weight)


def test_an_element_that_is_not_covered(potential):
    atoms = Atoms("HHe", positions=[[0, 0, 0], [0, 0, 1]])
    with pytest.raises(
        UnsupportedElementError,
        match=r"atom 1 is He, but this potential covers H C N O F Na S Cl Fe\. Use a potential",
    ):
        potential(graph_of(atoms))


def test_elements_in_any_order_are_the_same_potential(potential):
    assert potential.elements == (1, 6, 7, 8, 9, 11, 16, 17, 26)
    index = potential.element_index
    assert index[list(potential.elements)].tolist() == list(range(9))
    assert (index >= 0).sum() == 9


@pytest.mark.parametrize("kind", ["equivariant", "invariant"])
def test_absent_shells_are_nan(make_potential, kind):
    found = make_potential(kind)(graph_of(structures.ferrocene()), ("charges",))
    iron, carbon, hydrogen = found.orbital_charges[[0, 1, 11]].isfinite().tolist()
    assert iron == [True, False] + [True] * 8
    assert carbon == [True, False] + [True] * 3 + [False] * 5
    assert hydrogen == [True] * 2 + [False] * 8
    assert found.charges.isfinite().all()


@pytest.mark.parametrize("make", [structures.water, structures.ice_cell])
def test_charge_and_spin_are_extensive(potential, make):
    """Copies far apart, and of a cell, with as much charge and unpaired electrons each."""
    one = make()
    one.info.update(charge=1, spin=2)
    two = one.repeat((2, 1, 1)) if one.pbc.any() else one + one
    two.info.update(charge=2, spin=3)
    if not one.pbc.any():
        two.positions[len(one) :] += 100.0
    neutral = make()
    first, both, bare = (
        potential(graph_of(atoms), ("forces", "charges")) for atoms in (one, two, neutral)
    )
    assert abs(float(first.energy - bare.energy)) > 1e-3
    torch.testing.assert_close(both.energy, 2 * first.energy, rtol=1e-12, atol=0)
    for name in ("forces", "charges"):
        found, expected = getattr(both, name), getattr(first, name)
        if expected is not None:
            torch.testing.assert_close(found, expected.repeat(2, *[1] * (expected.ndim - 1)))


def test_a_potential_without_charge_labels_has_no_charge_head(make_potential):
    made = make_potential("equivariant")
    from orbcalc.model.potential import Statistics

    statistics = Statistics(
        made.reference_energies, 1.0, 1.0, torch.zeros(9, 23), torch.ones(9, 23)
    )
    bare = Potential(made.config, made.elements, {}, statistics, torch.float64)
    assert bare.charge_head is None
    assert bare.n_charge_components == 0
    assert bare(graph_of(structures.water()), ("charges",)).charges is None


# --------------------------------------------------------------------------- committee
def test_the_mean_and_spread_of_members(committee):
    graph = graph_of(structures.ethanol(), structures.ice_cell())
    wanted = ("forces", "stress", "charges")
    first, second = (member(graph, wanted) for member in committee.members)
    found = committee(graph, wanted)
    torch.testing.assert_close(found.energy, (first.energy + second.energy) / 2)
    torch.testing.assert_close(found.forces, (first.forces + second.forces) / 2)
    torch.testing.assert_close(
        found.orbital_blocks, (first.orbital_blocks + second.orbital_blocks) / 2, equal_nan=True
    )
    spread = (first.energy - second.energy).abs() / math.sqrt(2)
    torch.testing.assert_close(found.energy_uncertainty, spread)
    # One standard deviation of a component: the RMS over the three.
    components = (first.forces - second.forces) / math.sqrt(2)
    torch.testing.assert_close(
        found.forces_uncertainty, components.pow(2).mean(1).sqrt().to(found.forces.dtype)
    )


def test_calibration_scales_the_spread(committee):
    graph = graph_of(structures.ethanol())
    plain = committee(graph, ("forces",))
    scaled = Committee(list(committee.members), Calibration(energy=3.0, forces=0.5))
    found = scaled(graph, ("forces",))
    torch.testing.assert_close(found.energy_uncertainty, 3.0 * plain.energy_uncertainty)
    torch.testing.assert_close(found.forces_uncertainty, 0.5 * plain.forces_uncertainty)
    assert torch.equal(found.energy, plain.energy)


def test_a_committee_of_one_is_its_member(potential):
    graph = graph_of(structures.water())
    found = Committee([potential])(graph, ("forces",))
    alone = potential(graph, ("forces",))
    assert torch.equal(found.forces, alone.forces)
    assert torch.equal(found.energy, alone.energy)
    assert found.energy_uncertainty is None
    assert found.forces_uncertainty is None


def test_committees_that_cannot_be(make_potential):
    with pytest.raises(ConfigError, match="at least one potential"):
        Committee([])
    for other in ({"cutoff": 3.5}, {"baseline": "GFN1-xTB"}):
        with pytest.raises(ConfigError, match="must share elements, cutoff, baseline and shells"):
            Committee([make_potential(), make_potential(**other)])


def test_members_may_differ_in_size(make_potential):
    mixed = Committee([make_potential(), make_potential(channels=4, layers=1)])
    graph = graph_of(structures.water())
    assert mixed(graph, ("forces", "charges")).energy_uncertainty > 0
    assert mixed.cutoff == 4.0


def test_a_graph_moves_through_a_potential_with_gradients_of_its_own(potential):
    """Positions may be part of a larger computation."""
    graph = graph_of(structures.water())
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    energy = potential(replace(graph, positions=graph.positions * scale)).energy
    (slope,) = torch.autograd.grad(energy.sum(), scale)
    forces = potential(graph, ("forces",)).forces
    torch.testing.assert_close(slope, -(forces * graph.positions).sum())


def test_the_configuration_decides_the_size():
    config = PotentialConfig()
    assert (config.channels, config.layers, config.charge_head) == (64, 2, "equivariant")
