"""The public assertions notice what is wrong; that they accept what is right is in physics/."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import structures
import torch

from orbcalc.model.committee import Committee
from orbcalc.model.potential import Potential
from orbcalc.testing import (
    TOLERANCES,
    assert_consistent,
    assert_derivatives,
    assert_equivariant,
    in_dtype,
    predicted,
)
from orbcalc.training.calibration import calibrate
from orbcalc.training.dataset import LabelDataset


@pytest.fixture
def broken(make_potential):
    """Return a maker of potentials whose prediction is tampered with."""

    def make(tamper):
        class Broken(Potential):
            def forward(self, graph, properties=("energy",), *, create_graph=False):
                found = super().forward(graph, properties, create_graph=create_graph)
                changed = {
                    name: value
                    for name, value in tamper(found, graph).items()
                    if getattr(found, name) is not None
                }
                return replace(found, **changed)

        potential = make_potential("equivariant")
        potential.__class__ = Broken
        return potential

    return make


def pull(found, graph):
    return {"forces": found.forces + 1e-4} if found.forces is not None else {}


def slope_along_x(found, graph):
    return {"energy": found.energy + 1e-4 * graph.sum_over_atoms(graph.positions[:, 0])}


def swapped_components(found, graph):
    """The wrong order of l = 2 components, which trains without any error."""
    order = [*range(3), 7, 6, 5, 4, 3, *range(8, 23)]
    blocks = found.orbital_blocks
    return {} if blocks is None else {"orbital_blocks": blocks[:, order]}


def wrong_stress(found, graph):
    return {"stress": found.stress * (1 + 1e-5)} if found.stress is not None else {}


def wrong_shear(found, graph):
    return {"stress": found.stress.flip(1)} if found.stress is not None else {}


def first_atom(found, graph):
    bonus = torch.zeros_like(found.energy)
    bonus += 1e-4 * graph.numbers[0]
    return {"energy": found.energy + bonus}


def company(found, graph):
    return {"energy": found.energy + 1e-4 * graph.n_structures}


def not_a_number(found, graph):
    return {"energy": found.energy * torch.nan}


def absent_forces(found, graph):
    return {"forces": found.forces * torch.nan} if found.forces is not None else {}


@pytest.mark.parametrize(
    ("tamper", "check", "message"),
    [
        (pull, assert_equivariant, r"forces of H4O2, after a rotation: off by .* eV/Å, allowed"),
        (pull, assert_derivatives, "forces of H4O2, as finite differences"),
        (slope_along_x, assert_equivariant, "interaction of H4O2, after a rotation"),
        (slope_along_x, assert_derivatives, "forces of H4O2, as finite differences"),
        (swapped_components, assert_equivariant, "orbital_blocks of H4O2, after a rotation"),
        (wrong_stress, assert_derivatives, "virial of H4O2, as finite differences"),
        (wrong_shear, assert_equivariant, "stress of H4O2, after a rotation"),
        (not_a_number, assert_equivariant, "energy of H4O2 is not finite"),
        (absent_forces, assert_derivatives, "forces of H4O2 is not finite"),
    ],
)
def test_what_is_noticed(broken, tamper, check, message):
    with pytest.raises(AssertionError, match=message):
        check(broken(tamper), structures.ice_cell())


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (first_atom, r"H4N, with permuted atoms: off by .* eV, allowed"),
        (company, r"H4N, in a batch: off by .* eV, allowed"),
        (slope_along_x, "translated, unwrapped"),
        (pull, None),
    ],
)
def test_what_consistency_notices(broken, tamper, message):
    batch = [structures.ammonium(), structures.water(), structures.ethanol()]
    if message is None:  # equal in every way of writing it down
        assert_consistent(broken(tamper), batch)
        return
    with pytest.raises(AssertionError, match=message):
        assert_consistent(broken(tamper), batch)


def test_a_changed_input_is_noticed(make_potential, monkeypatch):
    potential = make_potential()
    atoms = structures.water()

    def moving(model, batch):
        atoms.positions += 1.0
        return predicted(model, batch)

    monkeypatch.setattr("orbcalc.testing.predicted", moving)
    with pytest.raises(AssertionError, match="the prediction changed H2O itself"):
        assert_consistent(potential, [atoms])


def test_the_tolerance_can_be_chosen(broken):
    with pytest.raises(AssertionError):
        assert_equivariant(broken(pull), structures.water())
    assert_equivariant(broken(pull), structures.water(), tolerance=1e-3)


def test_predictions_are_split_into_structures(make_potential):
    potential = make_potential()
    batch = [structures.water(), structures.ice_cell()]
    first, second = predicted(potential, batch)
    assert first["forces"].shape == (3, 3)
    assert second["orbital_blocks"].shape == (6, 23)
    assert np.isnan(first["stress"]).all()
    lone = potential.reference_energies[potential.element_index[batch[0].numbers]].sum()
    np.testing.assert_allclose(first["interaction"], first["energy"] - lone.item())


@pytest.mark.parametrize("n_members", [1, 2])
def test_a_trained_model_is_accepted(make_potential, labelled, n_members):
    """Its uncertainties, too, are the same in a batch, and turn with the structure."""
    raw = Committee([make_potential(seed=seed) for seed in range(n_members)])
    model = calibrate(raw, *(LabelDataset(labelled, raw.cutoff) for _ in range(2)))
    atoms = structures.water()
    assert {"energy_uncertainty", "forces_interval_95"} <= predicted(model, [atoms])[0].keys()
    assert_equivariant(model, atoms)
    assert_consistent(model, [atoms, structures.ice_cell()])
    assert_derivatives(model, atoms)


def test_another_precision(committee, make_potential):
    potential = make_potential()
    assert in_dtype(potential, torch.float64) is potential
    rounded = in_dtype(committee, torch.float32)
    assert rounded.first.dtype == torch.float32
    assert committee.first.dtype == torch.float64
    assert rounded.calibration == committee.calibration
    assert TOLERANCES[torch.float64] < TOLERANCES["finite differences"]
