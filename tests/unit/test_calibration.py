"""Uncertainties of a single potential and of a committee, on structures kept from training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import structures
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from conftest import MakePotential

from orbcalc.calculator import OrbcalcCalculator
from orbcalc.graph import AtomGraph
from orbcalc.model.checkpoint import load_model, save_model
from orbcalc.model.committee import Committee
from orbcalc.prediction import predict
from orbcalc.properties import REF_ENERGY, REF_FORCES, REF_STRESS
from orbcalc.training.calibration import _quantile, calibrate
from orbcalc.training.dataset import LabelDataset


def rattled(
    potential: Committee, count: int, size: float, error: float = 0.0, seed: int = 0
) -> list[Atoms]:
    """Return ethanols with the labels that a model predicts, off by a random error."""
    rng = np.random.default_rng(seed + 7)
    found = []
    for number in range(count):
        atoms = structures.ethanol()
        atoms.rattle(size, seed=seed + number)
        found.append(atoms)
    for atoms, result in zip(found, predict(potential, found), strict=True):
        atoms.info[REF_ENERGY] = result["energy"] + error * rng.normal()
        atoms.arrays[REF_FORCES] = result["forces"] + error * rng.normal(size=(len(atoms), 3))
    return found


@pytest.fixture(scope="module")
def calibrated(make_potential: MakePotential) -> Committee:
    """A single potential, calibrated on errors of 0.2 eV and 0.2 eV/Å."""
    raw = Committee([make_potential("none")])
    train, valid = rattled(raw, 12, 0.03), rattled(raw, 40, 0.05, error=0.2)
    return calibrate(raw, LabelDataset(train, 4.0), LabelDataset(valid, 4.0))


def test_intervals_hold_what_they_promise(calibrated: Committee) -> None:
    """Energies by 40 that were held out, forces by 360 atoms."""
    fresh = rattled(calibrated, 150, 0.05, error=0.2, seed=1000)
    results = predict(calibrated, fresh)
    for name, label, slack in (("energy", REF_ENERGY, 0.15), ("forces", REF_FORCES, 0.03)):
        columns = 3 if name == "forces" else 1
        errors = [
            np.abs(result[name] - (atoms.info | atoms.arrays)[label]).reshape(-1, columns)
            for atoms, result in zip(fresh, results, strict=True)
        ]
        for key, share in ((f"{name}_uncertainty", 0.68), (f"{name}_interval_95", 0.95)):
            limits = [np.reshape(result[key], (-1, 1)) for result in results]
            assert all((limit > 0).all() for limit in limits)
            inside = np.concatenate([(e <= u).ravel() for e, u in zip(errors, limits, strict=True)])
            assert inside.mean() == pytest.approx(share, abs=slack if share < 0.9 else slack / 2)


@pytest.mark.parametrize("n_members", [1, 2])
def test_what_an_uncertainty_is_made_of(make_potential: MakePotential, n_members: int) -> None:
    members = [make_potential("none", seed=seed) for seed in range(n_members)]
    raw = Committee(members)
    train, valid = rattled(raw, 12, 0.03), rattled(raw, 40, 0.05, error=0.2)
    found = calibrate(raw, LabelDataset(train, 4.0), LabelDataset(valid, 4.0))
    graph = AtomGraph.from_atoms(structures.ethanol(), 4.0)
    parts = [member(graph, ("energy", "forces", "rigidity")) for member in found.members]
    scale, prediction = found.calibration, found(graph, ("forces",))
    energy = torch.stack([part.energy_rigidity for part in parts]).mean(0) ** 2
    forces = torch.stack([part.atom_rigidity for part in parts]).mean(0) ** 2
    if n_members == 2:
        difference = [getattr(parts[0], k) - getattr(parts[1], k) for k in ("energy", "forces")]
        energy += scale.energy_spread_weight**2 * difference[0] ** 2 / 2
        forces += scale.forces_spread_weight**2 * (difference[1] ** 2).mean(1) / 2
    torch.testing.assert_close(prediction.energy_uncertainty, scale.energy * energy.sqrt())
    torch.testing.assert_close(prediction.forces_uncertainty, scale.forces * forces.sqrt())
    torch.testing.assert_close(prediction.forces_interval_95, scale.forces_95 * forces.sqrt())


def unlike_structures(potential: Committee, what: str) -> list[Atoms]:
    """Return ethanols, waters without an energy, and oxygens without forces."""
    found = rattled(potential, 6, 0.05)
    for number in range(6):
        for name in ("H2O", "O2"):
            atoms = molecule(name)
            atoms.rattle(0.05, seed=number)
            (result,) = predict(potential, [atoms])
            if name == "O2":
                atoms.info[REF_ENERGY] = result["energy"]
            elif what == "forces":
                atoms.arrays[REF_FORCES] = result["forces"]
            found.append(atoms)
    return found


@pytest.mark.parametrize("waters_have", ["forces", "nothing"])
def test_the_metrics_are_those_of_the_training_set(
    make_potential: MakePotential, waters_have: str
) -> None:
    """(W Wᵀ)⁻¹ is a mean product of last layers, and a multiple of the columns' scales."""
    potential = make_potential("none")
    raw = Committee([potential])
    train_set = unlike_structures(raw, waters_have)
    valid = rattled(raw, 20, 0.05, error=0.2)
    calibrate(raw, LabelDataset(train_set, 4.0), LabelDataset(valid, 4.0))
    means, rows = [], []
    for atoms in train_set:
        last = potential(AtomGraph.from_atoms(atoms, 4.0), ("last_layer",)).last_layer.detach()
        if REF_ENERGY in atoms.info:
            means.append(last.mean(0))
        if REF_ENERGY in atoms.info or REF_FORCES in atoms.arrays:
            rows.append(last)
    n_elements = len(potential.elements)
    for name, known in (("whitening", torch.stack(means)), ("atom_whitening", torch.cat(rows))):
        product = (known.T @ known / len(known)).double()
        whitening = potential.get_buffer(name).double()
        left = torch.linalg.inv(whitening @ whitening.T) - product
        diagonal = left.diagonal()
        scale = product.diagonal()[:-n_elements].sum()  # of the columns of elements, squared
        ridge = diagonal[:-n_elements].mean()
        expected = torch.full_like(diagonal, ridge)
        expected[-n_elements:] /= scale
        size = float(product.diagonal().max())
        torch.testing.assert_close(left, torch.diag(expected), atol=1e-5 * size, rtol=1e-3)


def test_rigidities_are_norms_of_the_whitened_last_layer(calibrated: Committee) -> None:
    potential = calibrated.first
    atoms = rattled(calibrated, 1, 0.1)[0]
    found = potential(AtomGraph.from_atoms(atoms, 4.0), ("rigidity", "last_layer"))
    last = found.last_layer.detach()
    novelty = (last @ potential.get_buffer("atom_whitening")).norm(dim=1)
    energy = (last.sum(0) @ potential.get_buffer("whitening")).norm()
    torch.testing.assert_close(found.atom_rigidity, novelty)
    factor = novelty.square().mean() ** 0.25
    torch.testing.assert_close(found.energy_rigidity[0], energy * factor, rtol=1e-4, atol=0)


@pytest.mark.parametrize("telling", ["forces_spread", "atom_rigidity"])
def test_what_tells_errors_counts(make_potential: MakePotential, telling: str) -> None:
    """Errors are as large as the spread of the members, or as the rigidity."""
    raw = Committee([make_potential("none", seed=seed) for seed in range(2)])
    train, valid = rattled(raw, 12, 0.03), rattled(raw, 90, 0.05, error=0.02)
    sets = LabelDataset(train, 4.0), LabelDataset(valid, 4.0)
    graph = AtomGraph.batch([AtomGraph.from_atoms(atoms, 4.0) for atoms in valid])
    known = calibrate(raw, *sets)(graph, ("forces",))
    sizes = getattr(known, telling)
    normal = np.random.default_rng(5).normal(size=known.forces.shape)
    errors = sizes[:, None] * torch.as_tensor(normal)
    parts = (known.forces - errors).split([len(atoms) for atoms in valid])
    for atoms, labels in zip(valid, parts, strict=True):
        atoms.arrays[REF_FORCES] = labels.numpy()
    found = calibrate(raw, sets[0], LabelDataset(valid, 4.0))(graph, ("forces",))
    inside = errors.abs() <= found.forces_uncertainty[:, None]
    assert inside.double().mean() == pytest.approx(0.68, abs=0.01)
    correlation = np.corrcoef(found.forces_uncertainty.numpy(), sizes.numpy())[0, 1]
    assert correlation > 0.99


@pytest.mark.parametrize("n_held_out", [1, 2, 3, 5, 10, 18, 19, 40])
def test_few_held_out_cover_what_is_said(n_held_out: int) -> None:
    """Of normal errors, on average over what is held out."""
    draws = torch.as_tensor(np.random.default_rng(n_held_out).normal(size=(4000, n_held_out + 1)))
    for share in (0.6827, 0.95):
        limits = [_quantile(row[:-1], share, unknown=1.0) for row in draws]
        covered = (draws[:, -1].abs() <= torch.tensor(limits)).double().mean()
        assert share - 0.02 < covered < max(share, 1 - 1 / (n_held_out + 1)) + 0.05


def test_forces_that_symmetry_forbids_tell_nothing(make_potential: MakePotential) -> None:
    """Strained perfect crystals held out beside rattled ones do not make it sure of forces."""
    raw = Committee([make_potential("none", seed=0)])
    train, valid = rattled(raw, 12, 0.03), rattled(raw, 20, 0.05, error=0.2)
    perfect = [bulk("C", "diamond", a) for a in np.linspace(3.4, 3.8, 60)]
    for atoms in perfect:
        atoms.info[REF_ENERGY] = predict(raw, [atoms])[0]["energy"]
        atoms.arrays[REF_FORCES] = np.zeros((2, 3))
    expected, found = (
        calibrate(raw, LabelDataset(train, 4.0), LabelDataset(held_out, 4.0)).calibration
        for held_out in (valid, [*valid, *perfect])
    )
    assert found.forces == pytest.approx(expected.forces, rel=1e-6)
    assert found.forces_95 == pytest.approx(expected.forces_95, rel=1e-6)


def test_a_supercell_is_as_uncertain_as_its_cells(calibrated: Committee) -> None:
    cell = structures.ethanol()
    cell.set_cell([6.0, 6.5, 7.0])
    cell.pbc = True
    one, three = predict(calibrated, [cell, cell.repeat((3, 1, 1))], dtype="float64")
    assert three["energy_uncertainty"] == pytest.approx(3 * one["energy_uncertainty"], rel=1e-4)
    tiled = np.tile(one["forces_uncertainty"], 3)
    np.testing.assert_allclose(three["forces_uncertainty"], tiled, rtol=1e-4)


def test_atoms_unlike_those_of_the_training_are_uncertain(calibrated: Committee) -> None:
    """Near the training set no more than usual, and the more the farther away."""
    sizes = (0.03, 0.1, 0.3)
    found = [predict(calibrated, rattled(calibrated, 20, size, seed=500)) for size in sizes]
    for name in ("energy_uncertainty", "forces_uncertainty"):
        near, far, farther = (np.mean([np.mean(r[name]) for r in results]) for results in found)
        assert far > 1.5 * near
        assert farther > 1.5 * far


def far_apart(atoms: Atoms) -> Atoms:
    """Return the same atoms, each without neighbours."""
    apart = Atoms(atoms.numbers, 50.0 * np.arange(len(atoms))[:, None] * [1.0, 0.0, 0.0])
    apart.info[REF_ENERGY] = 0.0
    apart.arrays[REF_FORCES] = np.zeros((len(atoms), 3))
    return apart


@pytest.mark.parametrize("n_members", [1, 2])
def test_it_is_not_sure_of_lone_atoms(make_potential: MakePotential, n_members: int) -> None:
    """They are beyond the reach of the last layer; what reference energies come to is not."""
    raw = Committee([make_potential("none", seed=seed) for seed in range(n_members)])
    train, valid = rattled(raw, 12, 0.03), rattled(raw, 20, 0.05, error=0.2)
    found = calibrate(raw, LabelDataset(train, 4.0), LabelDataset(valid, 4.0))
    usual, apart, lone = predict(found, [valid[0], far_apart(valid[0]), Atoms("O")])
    assert apart["energy_uncertainty"] > 0.5 * usual["energy_uncertainty"]
    assert lone["energy_uncertainty"] > 0.5 * usual["energy_uncertainty"] / len(valid[0])


@pytest.mark.parametrize("n_members", [1, 2, 3])
def test_lone_atoms_held_out_change_nothing(make_potential: MakePotential, n_members: int) -> None:
    """Their energies are reference energies, right or wrong, and their forces are zero."""
    raw = Committee([make_potential("none", seed=seed) for seed in range(n_members)])
    train, valid = rattled(raw, 12, 0.03), rattled(raw, 20, 0.05, error=0.2)
    lone = Atoms("O", cell=[15.0] * 3, pbc=True)
    lone.info[REF_ENERGY] = predict(raw, [lone])[0]["energy"] + 0.5
    lone.arrays[REF_FORCES] = np.zeros((1, 3))
    expected, found = (
        calibrate(raw, LabelDataset(train, 4.0), LabelDataset(held_out, 4.0))
        for held_out in (valid, [*valid, lone])
    )
    for name, value in vars(expected.calibration).items():
        assert getattr(found.calibration, name) == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("n_members", [1, 2])
def test_it_is_not_sure_of_an_element_without_energies(
    make_potential: MakePotential, n_members: int
) -> None:
    """Nothing has told its reference energy, which may be as large as those of the others."""
    members = [make_potential("none", seed=seed) for seed in range(n_members)]
    raw = Committee(members)
    train, valid = rattled(raw, 12, 0.03), rattled(raw, 20, 0.05, error=0.2)
    parts = LabelDataset(train, 4.0), LabelDataset(valid, 4.0)
    strange = [Atoms("NH", [[0, 0, 0], [0, 0, 1.0]]), Atoms("N2", [[0, 0, 0], [0, 0, 1.1]])]
    known = predict(calibrate(raw, *parts), [valid[0], *strange])
    for member in members:
        member.told[member.element_index[7]] = False
    found = predict(calibrate(raw, *parts), [valid[0], *strange])
    references = raw.first.reference_energies[raw.first.told]
    size = float(references.square().mean().sqrt())
    assert size > 10
    for one, other, n_unknown in zip(known, found, (0, 1, 2), strict=True):
        for name, factor in (("energy_uncertainty", 1.0), ("energy_interval_95", 1.96)):
            expected = np.hypot(one[name], factor * n_unknown * size)
            assert other[name] == pytest.approx(expected, rel=1e-9)
        np.testing.assert_allclose(other["forces_uncertainty"], one["forces_uncertainty"])


def test_lone_atoms_alone_tell_little(make_potential: MakePotential) -> None:
    """As the training set they can be calibrated; as the validation set they say nothing."""
    raw = Committee([make_potential("none")])
    atoms = [far_apart(Atoms(formula)) for formula in ("H", "O", "H2", "HO")]
    valid = rattled(raw, 5, 0.05, error=0.2)
    found = calibrate(raw, LabelDataset(atoms, 4.0), LabelDataset(valid, 4.0))
    for result in predict(found, [*atoms, *valid]):
        assert 0 < result["energy_uncertainty"] < np.inf
    unknown = calibrate(raw, LabelDataset(valid, 4.0), LabelDataset(atoms, 4.0))
    assert not unknown.has_uncertainty


def test_it_is_less_sure_of_what_it_has_not_seen(calibrated: Committee) -> None:
    usual, hot = rattled(calibrated, 10, 0.03), rattled(calibrated, 10, 0.3)
    strange = [structures.water()]
    means = [
        np.mean([result["energy_uncertainty"] / len(a) for a, result in zip(s, found, strict=True)])
        for s in (usual, hot, strange)
        for found in (predict(calibrated, s),)
    ]
    assert means[1] > 1.5 * means[0]
    assert means[2] > 1.5 * means[0]


def test_uncertainties_are_invariant_and_the_same_in_a_batch(calibrated: Committee) -> None:
    atoms, other = structures.ethanol(), structures.water()
    turned = atoms.copy()
    turned.rotate(40, (1, 2, 3))
    turned.translate((5, 6, 7))
    (alone,), (moved,) = predict(calibrated, [atoms]), predict(calibrated, [turned])
    batched = predict(calibrated, [other, atoms])[1]
    for name in ("energy_uncertainty", "forces_uncertainty"):
        np.testing.assert_allclose(moved[name], alone[name], rtol=1e-8)
        np.testing.assert_allclose(batched[name], alone[name], rtol=1e-8)


def test_it_survives_a_model_file(calibrated: Committee, tmp_path: Path) -> None:
    save_model(tmp_path / "a.orbcalc", calibrated)
    loaded, _ = load_model(tmp_path / "a.orbcalc", dtype=torch.float64)
    assert loaded.has_uncertainty
    graph = AtomGraph.from_atoms(structures.ethanol(), 4.0)
    old, new = calibrated(graph, ("forces",)), loaded(graph, ("forces",))
    torch.testing.assert_close(new.energy_uncertainty, old.energy_uncertainty)
    torch.testing.assert_close(new.forces_uncertainty, old.forces_uncertainty)


def test_forces_are_not_touched(calibrated: Committee) -> None:
    graph = AtomGraph.from_atoms(structures.ethanol(), 4.0)
    plain = calibrated.first(graph, ("forces",))
    torch.testing.assert_close(calibrated(graph, ("forces",)).forces, plain.forces)
    assert plain.energy_rigidity is None


@pytest.mark.parametrize("missing", ["train", "valid"])
def test_without_energies_there_is_no_uncertainty(
    make_potential: MakePotential, labelled: list[Atoms], missing: str
) -> None:
    bare = [atoms.copy() for atoms in labelled]
    for atoms in bare:
        del atoms.info[REF_ENERGY], atoms.arrays[REF_FORCES]
        atoms.info.pop(REF_STRESS, None)
    sets = {"train": labelled, "valid": labelled, missing: bare}
    committee = Committee([make_potential("none")])
    found = calibrate(committee, *(LabelDataset(sets[name], 4.0) for name in ("train", "valid")))
    assert not found.has_uncertainty
    assert "energy_uncertainty" not in predict(found, [structures.water()])[0]


def test_without_forces_there_is_none_of_forces(
    make_potential: MakePotential, labelled: list[Atoms], tmp_path: Path
) -> None:
    bare = [atoms.copy() for atoms in labelled]
    for atoms in bare:
        del atoms.arrays[REF_FORCES]
    sets = (LabelDataset(atoms, 4.0) for atoms in (labelled, bare))
    found = calibrate(Committee([make_potential("none"), make_potential("none")]), *sets)
    save_model(tmp_path / "model.orbcalc", found)
    for committee in (found, load_model(tmp_path / "model.orbcalc")[0]):
        (result,) = predict(committee, [structures.water()], ["forces"])
        assert "energy_uncertainty" in result
        assert not {"forces_uncertainty", "forces_interval_95"} & result.keys()
        with pytest.raises(PropertyNotImplementedError, match="no forces_interval_95: its train"):
            OrbcalcCalculator(committee).get_property("forces_interval_95", structures.water())


def test_fewer_structures_than_features(make_potential: MakePotential) -> None:
    """One structure fixes one direction only; the others must stay finite."""
    raw = Committee([make_potential("none")])
    few, valid = rattled(raw, 1, 0.05), rattled(raw, 3, 0.1, error=0.1)
    found = calibrate(raw, LabelDataset(few, 4.0), LabelDataset(valid, 4.0))
    (result,) = predict(found, [structures.ammonium()])
    assert np.isfinite(result["energy_uncertainty"])
    assert np.isfinite(result["forces_uncertainty"]).all()


def test_whether_there_is_one_is_decided_once(
    calibrated: Committee, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(calibrated.first), "knows_rigidity", property(pytest.fail))
    assert calibrated.has_uncertainty
    assert "energy_uncertainty" in predict(calibrated, [structures.water()])[0]
