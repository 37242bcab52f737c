"""Reference energies, scales and charge statistics, also where labels are missing."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from orbcalc.config import PotentialConfig
from orbcalc.errors import ConfigError
from orbcalc.orbitals import BLOCK_DIM, SLOTS
from orbcalc.properties import REF_ENERGY, REF_FORCES, XTB_BLOCKS, XTB_SHELLS
from orbcalc.training.dataset import LabelDataset
from orbcalc.training.statistics import charge_targets, fit_statistics, is_wild

CONFIG = PotentialConfig(cutoff=4.0, channels=8, l_max=2)
LONE = {1: -13.0, 6: -1030.0, 8: -2040.0}


def additive(name: str, **extra: float) -> Atoms:
    """Return a molecule whose energy is the sum of lone atoms, plus something."""
    atoms = molecule(name)
    atoms.info[REF_ENERGY] = sum(LONE[z] for z in atoms.numbers) + extra.get("more", 0.0)
    return atoms


def test_reference_energies_are_recovered_without_the_unlabelled() -> None:
    unlabelled = molecule("CH3OH")
    everything = [additive(name) for name in ("H2O", "CH4", "H2")] + [unlabelled]
    found = fit_statistics(LabelDataset(everything, 4.0), CONFIG)
    torch.testing.assert_close(
        found.reference_energies, torch.tensor(list(LONE.values()), dtype=torch.float64)
    )


def test_labelled_lone_atoms_are_reference_energies() -> None:
    """No fit may put them elsewhere: a potential can give them no other energy."""
    molecules = [additive(name, more=more) for name, more in (("H2O", -9.0), ("H2", -4.0))]
    oxygen, proton = Atoms("O"), Atoms("H")
    oxygen.info[REF_ENERGY], proton.info[REF_ENERGY] = LONE[8], 5.0
    proton.info["charge"] = 1
    chain = Atoms("O", cell=[1.2, 9, 9], pbc=[True, False, False])  # its images are neighbours
    chain.info[REF_ENERGY] = -7.0
    dataset = LabelDataset([*molecules, oxygen, proton, chain], 4.0)
    found = fit_statistics(dataset, CONFIG).reference_energies
    assert float(found[1]) == LONE[8]
    without = fit_statistics(LabelDataset([*molecules, proton, chain], 4.0), CONFIG)
    assert abs(float(without.reference_energies[1]) - LONE[8]) > 1


def test_an_element_without_energies_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    dataset = LabelDataset([additive("H2O"), additive("H2"), molecule("NH3")], 4.0)
    assert fit_statistics(dataset, CONFIG).told.tolist() == [True, False, True]
    assert "no structure with an energy label has N:" in caplog.text
    caplog.clear()
    given = {"H": -13.0, "N": -1480.0, "O": -2040.0}
    assert fit_statistics(dataset, CONFIG, given).told.all()
    fit_statistics(LabelDataset([molecule("NH3")], 4.0), CONFIG)  # nothing has an energy
    assert not caplog.text


def test_lone_atoms_alone_are_enough() -> None:
    atoms = [Atoms("H"), Atoms("O"), Atoms("O")]
    for own, energy in zip(atoms, (-13.0, -2040.0, -2042.0), strict=True):
        own.info[REF_ENERGY] = energy
    found = fit_statistics(LabelDataset(atoms, 4.0), CONFIG).reference_energies
    assert found.tolist() == [-13.0, -2041.0]


def test_without_any_energy_they_are_zero() -> None:
    found = fit_statistics(LabelDataset([molecule("H2O")], 4.0), CONFIG)
    assert found.reference_energies.tolist() == [0.0, 0.0]
    assert found.energy_scale == 1.0


def test_a_wild_energy_bends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    rng = np.random.default_rng(0)
    names = ("H2O", "CH4", "CH3OH", "C2H6", "H2CO", "CO2") * 4
    usual = [additive(name, more=rng.normal()) for name in names]
    expected = fit_statistics(LabelDataset(usual[:-1], 4.0), CONFIG)
    assert not caplog.text
    usual[-1].info[REF_ENERGY] += 1000.0
    found = fit_statistics(LabelDataset(usual, 4.0), CONFIG)
    torch.testing.assert_close(found.reference_energies, expected.reference_energies)
    assert found.energy_scale == pytest.approx(expected.energy_scale, rel=0.1)
    assert "(the first: structure 23, CO2)" in caplog.text


def test_wild_forces_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    rng = np.random.default_rng(0)
    known = [additive(name) for name in ("H2O", "CH4", "CO2") * 4]
    for atoms in known:
        atoms.arrays[REF_FORCES] = rng.normal(size=atoms.positions.shape)
    known[3].arrays[REF_FORCES] *= 20  # pushed together
    del known[5].arrays[REF_FORCES]
    fit_statistics(LabelDataset(known, 4.0), CONFIG)
    assert not caplog.text
    known[7].arrays[REF_FORCES] *= 500
    fit_statistics(LabelDataset(known, 4.0), CONFIG)
    assert "1 structures (the first: structure 7, CH4) have forces" in caplog.text


def test_a_torn_structure_among_relaxed_ones_is_not_wild() -> None:
    sizes = torch.tensor([0.01] * 30 + [5.0] * 20)
    assert not is_wild(sizes).any()
    assert not is_wild(torch.tensor([0.0] * 97 + [1.0, 2.0, 3.0])).any()
    one = torch.tensor([0.0] * 60 + [1.0, -2.0, 3.0, -1000.0])
    assert is_wild(one).nonzero().tolist() == [[63]]


def test_one_composition_alone_has_a_finite_fit() -> None:
    waters = [additive("H2O", more=0.1 * i) for i in range(4)]
    found = fit_statistics(LabelDataset(waters, 4.0), CONFIG)
    assert torch.isfinite(found.reference_energies).all()
    mean = float(np.mean([atoms.info[REF_ENERGY] for atoms in waters]))
    assert float(2 * found.reference_energies[0] + found.reference_energies[1]) == pytest.approx(
        mean
    )


def test_given_reference_energies_are_taken_as_they_are() -> None:
    found = fit_statistics(LabelDataset([additive("H2O")], 4.0), CONFIG, {"H": -1.0, "O": -2.0})
    assert found.reference_energies.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"H": -1.0}, r"missing elements \['O'\]"),
        ({"H": 0.0, "O": 0.0, "Xx": 0.0}, r"symbols \['Xx'\]"),
    ],
)
def test_incomplete_reference_energies_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_statistics(LabelDataset([additive("H2O")], 4.0), CONFIG, given)


def test_the_energy_scale_is_the_rms_of_the_forces_that_are_there() -> None:
    with_forces = additive("H2O")
    with_forces.arrays[REF_FORCES] = np.full((3, 3), 2.0)
    found = fit_statistics(LabelDataset([with_forces, additive("CH4")], 4.0), CONFIG)
    assert found.energy_scale == pytest.approx(2.0)


def test_without_forces_it_is_what_the_lone_atoms_leave() -> None:
    waters = [additive("H2O", more=x) for x in (-0.3, 0.3)]
    found = fit_statistics(LabelDataset(waters, 4.0), CONFIG)
    assert found.energy_scale == pytest.approx(0.3 / np.sqrt(3))


def _with_blocks(blocks: np.ndarray) -> Atoms:
    atoms = molecule("H2O")
    full = np.full((3, BLOCK_DIM), np.nan)
    full[0, SLOTS[0].columns] = blocks[0]
    full[0, SLOTS[2].columns] = blocks[1:]
    full[1:, SLOTS[0].columns] = 0.1
    full[1:, SLOTS[1].columns] = -0.2
    atoms.arrays[XTB_BLOCKS] = full
    atoms.arrays[XTB_SHELLS] = np.array([[0, 1, -1], [0, 0, -1], [0, 0, -1]])
    return atoms


def test_only_scalars_are_shifted_and_an_irrep_has_one_scale() -> None:
    rng = np.random.default_rng(0)
    structures = [_with_blocks(rng.normal(loc=3.0, size=7)) for _ in range(50)]
    found = fit_statistics(LabelDataset(structures, 4.0), CONFIG)
    oxygen = 1
    shift, scale = found.charge_shift[oxygen], found.charge_scale[oxygen]
    scalar, tensor = (
        SLOTS[2].columns.start,
        slice(SLOTS[2].columns.start + 1, SLOTS[2].columns.stop),
    )
    assert float(shift[scalar]) == pytest.approx(3.0, abs=0.5)
    assert shift[tensor].tolist() == [0.0] * 5
    assert len(set(scale[tensor].tolist())) == 1
    assert float(scale[tensor][0]) == pytest.approx(np.sqrt(10), rel=0.1)
    assert torch.isfinite(found.charge_shift).all()
    assert (found.charge_scale > 0).all()


def test_labels_that_never_change_do_not_divide_by_zero() -> None:
    found = fit_statistics(LabelDataset([_with_blocks(np.ones(7))] * 3, 4.0), CONFIG)
    assert float(found.charge_scale.min()) >= 1e-3


def test_invariant_targets_are_the_diagonal_and_keep_what_is_absent() -> None:
    config = PotentialConfig(charge_head="invariant", l_max=2)
    rng = np.random.default_rng(1)
    atoms = _with_blocks(rng.normal(size=7))
    blocks = torch.from_numpy(atoms.arrays[XTB_BLOCKS])
    targets = charge_targets(blocks, config)
    assert targets.shape == (3, 10)
    assert torch.isfinite(targets[0]).tolist() == [True, False] + 3 * [True] + 5 * [False]
    # The trace of the p block is sqrt(3) times its scalar.
    trace = float(targets[0, 2:5].sum())
    assert trace == pytest.approx(np.sqrt(3) * float(blocks[0, SLOTS[2].columns.start]))
    assert charge_targets(blocks, CONFIG) is blocks
