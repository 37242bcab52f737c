"""The ASE calculator and batched prediction."""

from __future__ import annotations

import os
import warnings

import ase.calculators.calculator as ase_calculators
import ase.io
import ase.outputs
import numpy as np
import pytest
import structures
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.filters import FrechetCellFilter
from ase.io.trajectory import Trajectory
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from ase.units import fs, kB

from orbcalc.calculator import OrbcalcCalculator
from orbcalc.config import PotentialConfig
from orbcalc.errors import (
    CheckpointError,
    ConfigError,
    StructureError,
    UnsupportedElementError,
)
from orbcalc.graph import PART_ATOMS
from orbcalc.model.checkpoint import save_model
from orbcalc.model.committee import Committee
from orbcalc.model.potential import Potential, Statistics
from orbcalc.neighbors import neighbor_list
from orbcalc.orbitals import shell_slots
from orbcalc.prediction import open_model, predict
from orbcalc.testing import in_dtype, predicted
from orbcalc.training.dataset import LabelDataset
from orbcalc.training.statistics import fit_statistics


@pytest.fixture(scope="module")
def single(make_potential):
    """One potential with a charge head, smooth enough for dynamics."""
    potential = make_potential("equivariant")
    potential.energy_scale = 0.3
    return Committee([potential])


@pytest.fixture(scope="module")
def without_charges(make_potential):
    return Committee([make_potential("none")])


@pytest.fixture(scope="module")
def model_file(committee, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.orbcalc"
    save_model(path, committee, {"metrics": {"energy_mae": 0.01}})
    return path


def attached(atoms, model, **options):
    atoms.calc = OrbcalcCalculator(model, **options)
    return atoms


# ------------------------------------------------------------------------------ properties
def test_everything_that_ase_asks_for(committee):
    atoms = attached(structures.ice_cell(), committee)
    (expected,) = predicted(committee, [structures.ice_cell()])
    voigt = expected["stress"].ravel()[[0, 4, 8, 5, 2, 1]]
    np.testing.assert_allclose(atoms.get_potential_energy(), expected["energy"], rtol=1e-12)
    np.testing.assert_allclose(
        atoms.get_potential_energy(force_consistent=True), expected["energy"]
    )
    np.testing.assert_allclose(atoms.get_forces(), expected["forces"], atol=1e-10)
    np.testing.assert_allclose(atoms.get_stress(), voigt, atol=1e-10)
    np.testing.assert_allclose(atoms.get_charges(), expected["charges"], atol=1e-10)
    uncertainty = atoms.calc.results["energy_uncertainty"]
    np.testing.assert_allclose(uncertainty, expected["energy_uncertainty"])
    np.testing.assert_allclose(
        atoms.calc.results["forces_uncertainty"], expected["forces_uncertainty"], atol=1e-10
    )
    assert atoms.calc.results["forces_uncertainty"].shape == (6,)
    assert "orbital_charges" not in atoms.calc.results


def test_numbers_are_what_ase_expects(single):
    atoms = attached(structures.ice_cell(), single)
    assert type(atoms.get_potential_energy()) is float
    for name in ("forces", "stress", "charges"):
        value = atoms.calc.get_property(name, atoms)
        assert type(value) is np.ndarray
        assert value.dtype == np.float64


def test_orbital_charges_in_the_order_of_tblite(single):
    """Iron has its shells as d, s, p; the model holds them as s, p, d."""
    atoms = attached(structures.iron_pentacarbonyl(), single)
    charges = atoms.calc.get_property("orbital_charges", atoms)
    dense = predicted(single, [atoms])[0]["orbital_charges"]
    assert [len(row) for row in charges] == [9] + [4] * 10
    assert shell_slots(single.first.shells[26]) == (3, 0, 2)
    iron = dense[0]
    np.testing.assert_array_equal(charges[0], np.concatenate([iron[5:], iron[:1], iron[2:5]]))
    np.testing.assert_array_equal(charges[1], np.concatenate([dense[1, :1], dense[1, 2:5]]))
    np.testing.assert_allclose(
        [row.sum() for row in charges], atoms.get_charges(), rtol=1e-10, atol=1e-12
    )


def test_what_is_asked_for_later_is_added(single):
    atoms = attached(structures.water(), single)
    energy = atoms.get_potential_energy()
    assert set(atoms.calc.results) == {"energy", "free_energy"}
    forces = atoms.get_forces()
    atoms.get_charges()
    assert atoms.calc.results["forces"] is not None
    np.testing.assert_array_equal(atoms.get_forces(), forces)
    assert atoms.get_potential_energy() == energy


def test_the_caller_owns_its_results(single):
    """Writing into a result does not change what is given next."""
    atoms = attached(structures.water(), single)
    forces = atoms.get_forces()
    kept = forces.copy()
    forces[:] = 0.0
    np.testing.assert_array_equal(atoms.get_forces(), kept)


# ------------------------------------------------------------------------------------ cache
class Counter:
    """Counts how often a model is evaluated."""

    def __init__(self, model, monkeypatch):
        self.count = 0
        forward = type(model).forward

        def counted(*arguments, **options):
            self.count += 1
            return forward(*arguments, **options)

        monkeypatch.setattr(type(model), "forward", counted)


def test_a_precision_that_is_not_offered_is_an_error(model_file):
    with pytest.raises(ConfigError, match="dtype must be float32 or float64, not 'float16'"):
        open_model(model_file, dtype="float16")


def test_nothing_is_computed_twice(single, monkeypatch):
    counter = Counter(single, monkeypatch)
    atoms = attached(structures.water(), single)
    atoms.get_forces()
    atoms.get_forces()
    atoms.get_potential_energy()
    atoms.copy().calc = atoms.calc
    assert counter.count == 1


def set_charge(atoms):
    atoms.info["charge"] = 2


def set_spin(atoms):
    atoms.info["spin"] = 3


def set_position(atoms):
    atoms.positions[0, 0] += 1e-9


def set_cell(atoms):
    atoms.cell[0, 0] += 0.01


def set_pbc(atoms):
    atoms.pbc = (True, True, False)


def set_numbers(atoms):
    atoms.numbers[0] = 16


@pytest.mark.parametrize(
    "change", [set_charge, set_spin, set_position, set_cell, set_pbc, set_numbers]
)
def test_the_cache_notices(single, monkeypatch, change):
    atoms = attached(structures.ice_cell(), single)
    before = atoms.get_potential_energy()
    counter = Counter(single, monkeypatch)
    change(atoms)
    after = atoms.get_potential_energy()
    assert counter.count == 1
    assert after != before
    fresh = predicted(single, [atoms])[0]["energy"]
    np.testing.assert_allclose(after, fresh, rtol=1e-12)


def test_other_info_does_not_matter(single, monkeypatch):
    atoms = attached(structures.water(), single)
    atoms.get_potential_energy()
    counter = Counter(single, monkeypatch)
    atoms.info["name"] = "water"
    atoms.set_tags([1, 2, 3])
    atoms.get_potential_energy()
    assert counter.count == 0


def test_one_calculator_for_several_structures(single):
    calculator = OrbcalcCalculator(single)
    batch = [structures.water(), structures.ethanol(), structures.ice_cell(), structures.water()]
    expected = [found["energy"] for found in predicted(single, batch)]
    found = [calculator.get_potential_energy(atoms) for atoms in batch]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_an_impossible_structure_leaves_no_stale_results(single):
    atoms = attached(structures.water(), single)
    atoms.get_potential_energy()
    atoms.positions[1] = atoms.positions[0]
    for _ in range(2):
        with pytest.raises(StructureError, match="overlap"):
            atoms.get_potential_energy()
    atoms.positions = structures.water().positions
    fresh = predicted(single, [atoms])[0]["energy"]
    np.testing.assert_allclose(atoms.get_potential_energy(), fresh, rtol=1e-12)


# ------------------------------------------------------------------------------------ skin
def test_a_trajectory_with_a_skin_is_the_one_without(single):
    atoms = attached(structures.ice_cell(), single, skin=0.6)
    rng = np.random.default_rng(0)
    calculator, n_steps = atoms.calc, 40
    for _ in range(n_steps):
        atoms.positions += rng.normal(scale=0.015, size=(6, 3))
        (fresh,) = predicted(single, [atoms])
        np.testing.assert_allclose(atoms.get_potential_energy(), fresh["energy"], rtol=1e-12)
        np.testing.assert_allclose(atoms.get_forces(), fresh["forces"], atol=1e-10)
    assert 1 < calculator._skin_list.n_builds < n_steps / 3


def test_a_pair_that_comes_close_is_noticed(single):
    """Two atoms that fly towards each other within one skin."""
    atoms = attached(Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.74]]), single)
    atoms.get_potential_energy()
    noticed = 0.0
    while atoms.positions[1, 2] > 0.02 and not noticed:
        atoms.positions[1, 2] -= 0.01
        try:
            atoms.get_potential_energy()
        except StructureError:
            noticed = atoms.positions[1, 2]
    assert 0.2 < noticed <= 0.3


@pytest.mark.parametrize("skin", [0.5, 2.0])
def test_whether_atoms_overlap_does_not_depend_on_where_they_were(single, skin):
    atoms = attached(Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.4]]), single, skin=skin)
    for distance in (0.4, 0.31, 0.29, 0.31, 0.1, 0.0):
        atoms.positions[1, 2] = distance
        if distance > 0.3:
            atoms.get_potential_energy()
            continue
        with pytest.raises(StructureError, match=f"{distance:.3f} Å apart: they overlap"):
            atoms.get_potential_energy()


def test_it_works_in_inference_mode(single):
    expected = predicted(single, [structures.water()])[0]["forces"]
    with torch.inference_mode():
        found = predict(single, [structures.water()])[0]["forces"]
        np.testing.assert_allclose(found, expected, atol=1e-10)
        np.testing.assert_allclose(
            attached(structures.water(), single).get_forces(), expected, atol=1e-10
        )


# ---------------------------------------------------------------------------------- errors
def test_errors_are_those_of_ase(single, without_charges):
    molecule = attached(structures.water(), single)
    with pytest.raises(PropertyNotImplementedError, match="periodic structure with a volume"):
        molecule.get_stress()
    with pytest.raises(PropertyNotImplementedError, match="this model has no uncertainty"):
        molecule.calc.get_property("energy_uncertainty", molecule)
    with pytest.raises(PropertyNotImplementedError, match="this model has no uncertainty"):
        molecule.calc.get_property("forces_uncertainty", molecule)
    with pytest.raises(PropertyNotImplementedError):
        molecule.get_dipole_moment()
    bare = attached(structures.water(), without_charges)
    for name in ("charges", "orbital_charges"):
        with pytest.raises(PropertyNotImplementedError, match="trained without charges"):
            bare.calc.get_property(name, bare)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Atoms("He"), UnsupportedElementError, r"atom 0 is He, .*trained on He"),
        (lambda: Atoms(), StructureError, "has no atoms"),
        (
            lambda: Atoms("H", positions=[[0, 0, np.nan]]),
            StructureError,
            "coordinates must be finite",
        ),
        (lambda: Atoms("H2"), StructureError, "overlap"),
        (lambda: Atoms("H", info={"spin": 1}), StructureError, "impossible for 1 electrons"),
        (lambda: Atoms("H", info={"charge": 0.2}), StructureError, "is not an integer"),
        (lambda: Atoms("H", pbc=True), StructureError, "spans no volume"),
        (
            lambda: Atoms("H", cell=[[5, 0, 0], [0, 5, 0], [5, 5, 0]], pbc=True),
            StructureError,
            "spans no volume",
        ),
        (lambda: Atoms("H", cell=[5, 5, np.nan], pbc=True), StructureError, "is not finite"),
    ],
)
def test_structures_that_cannot_be_computed(single, make, error, message):
    atoms = attached(make(), single)
    with pytest.raises(error, match=message):
        atoms.get_potential_energy()
    with pytest.raises(error, match=message):
        predict(single, [structures.water(), make()])


def test_a_structure_that_becomes_nan(single):
    atoms = attached(structures.water(), single)
    atoms.get_forces()
    atoms.positions[1, 1] = np.nan
    with pytest.raises(StructureError, match="coordinates must be finite"):
        atoms.get_forces()


# ------------------------------------------------------------------------------------- ASE
def test_energy_is_conserved(single):
    atoms = attached(structures.ethanol(), single)
    rng = np.random.default_rng(0)
    atoms.set_momenta(rng.normal(size=(9, 3)) * np.sqrt(300 * kB * atoms.get_masses()[:, None]))
    dynamics = VelocityVerlet(atoms, timestep=0.1 * fs)
    energies, kinetic = [], []
    for _ in range(50):
        dynamics.run(1)
        energies.append(atoms.get_total_energy())
        kinetic.append(atoms.get_kinetic_energy())
    assert np.ptp(kinetic) > 0.05
    assert np.ptp(energies) < 0.05 * np.ptp(kinetic)


def test_a_relaxation_lowers_the_energy(single):
    """Small steps: an untrained surface has no minimum to promise."""
    atoms = attached(structures.ethanol(), single)
    energy = atoms.get_potential_energy()
    BFGS(atoms, logfile=None, maxstep=0.01).run(fmax=1e-6, steps=6)
    assert atoms.get_potential_energy() < energy
    assert np.abs(atoms.positions - structures.ethanol().positions).max() > 1e-3


def test_a_cell_relaxes(single):
    atoms = attached(structures.rock_salt(), single)
    cell, energy = atoms.cell.array.copy(), atoms.get_potential_energy()
    BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-4, steps=8)
    assert atoms.get_potential_energy() < energy
    assert np.abs(atoms.cell.array - cell).max() > 1e-4


def test_files_hold_the_results(committee, tmp_path):
    atoms = attached(structures.ice_cell(), committee)
    atoms.get_forces()
    atoms.get_stress()
    atoms.calc.get_property("orbital_charges", atoms)
    expected = dict(atoms.calc.results)
    ase.io.write(tmp_path / "a.extxyz", atoms)
    with Trajectory(tmp_path / "a.traj", "w") as trajectory:
        trajectory.write(atoms)
    for name in ("a.extxyz", "a.traj"):
        found = ase.io.read(tmp_path / name)
        np.testing.assert_allclose(found.get_potential_energy(), expected["energy"], rtol=1e-12)
        np.testing.assert_allclose(found.get_forces(), expected["forces"], atol=1e-7)
        np.testing.assert_allclose(found.get_stress(), expected["stress"], atol=1e-7)


def test_a_trajectory_of_dynamics(committee, tmp_path):
    atoms = attached(structures.ethanol(), committee)
    dynamics = VelocityVerlet(atoms, timestep=0.1 * fs, trajectory=str(tmp_path / "md.traj"))
    dynamics.run(3)
    frames = ase.io.read(tmp_path / "md.traj", ":")
    assert len(frames) == 4
    np.testing.assert_allclose(frames[-1].get_forces(), atoms.get_forces(), atol=1e-12)


# ------------------------------------------------------------------------------------ files
def test_a_model_file(model_file, committee):
    calculator = OrbcalcCalculator(model_file, device="cpu", dtype="float64")
    atoms = structures.water()
    atoms.calc = calculator
    expected = predicted(committee, [atoms])[0]["energy"]
    assert atoms.get_potential_energy() == pytest.approx(float(expected), rel=1e-14)
    assert calculator.metadata == {"metrics": {"energy_mae": 0.01}}
    assert calculator.model.first.dtype == torch.float64


def test_float32_is_the_default_and_close(model_file):
    exact = attached(structures.ethanol(), model_file, dtype="float64")
    fast = attached(structures.ethanol(), str(model_file))
    assert fast.calc.model.first.dtype == torch.float32
    assert fast.get_potential_energy() == pytest.approx(exact.get_potential_energy(), abs=1e-3)
    np.testing.assert_allclose(
        fast.get_forces(), exact.get_forces(), atol=1e-4 * np.abs(exact.get_forces()).max()
    )


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing\.orbcalc"):
        OrbcalcCalculator(tmp_path / "missing.orbcalc")


def test_nothing_global_changes(model_file):
    """All but `random`, which the type checker of the tests draws from."""

    def state():
        return {
            "dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(),
            "grad": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "torch": torch.get_rng_state().tolist(),
            "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
            "environment": dict(os.environ),
            "filters": list(warnings.filters),
            "numpy errors": np.geterr(),
            "print options": np.get_printoptions(),
            "properties": list(ase_calculators.all_properties),
            "changes": list(ase_calculators.all_changes),
            "calculators": sorted(ase_calculators.external_calculators),
            "names": list(ase_calculators.names),
            "outputs": list(ase.outputs.all_outputs),
            "implemented": list(OrbcalcCalculator.implemented_properties),
            "folder": os.getcwd(),
        }

    before = state()
    atoms = attached(structures.ice_cell(), model_file)
    atoms.get_forces()
    atoms.get_stress()
    atoms.calc.get_property("orbital_charges", atoms)
    predict(model_file, [structures.water(), structures.ethanol()], ["forces", "charges"])
    after = state()
    assert [name for name in before if before[name] != after[name]] == []


# ---------------------------------------------------------------------------------- predict
def test_results_come_in_the_given_order(single):
    batch = [
        structures.ethanol(),
        structures.lone_atom("O"),
        structures.ice_cell(),
        structures.water(),
        structures.ferrocene(),
        structures.ammonium(),
    ]
    wanted = ["energy", "forces", "stress", "charges", "orbital_charges", "features"]
    found = predict(single, batch, wanted)
    for atoms, result, expected in zip(batch, found, predicted(single, batch), strict=True):
        np.testing.assert_allclose(result["energy"], expected["energy"], rtol=1e-12)
        np.testing.assert_allclose(result["forces"], expected["forces"], atol=1e-10)
        np.testing.assert_allclose(result["features"], expected["features"], atol=1e-10)
        assert ("stress" in result) is bool(atoms.pbc.any())
        assert len(result["orbital_charges"]) == len(result["charges"]) == len(atoms)
        calculator = OrbcalcCalculator(single)
        assert calculator.get_potential_energy(atoms) == pytest.approx(result["energy"], rel=1e-12)
        np.testing.assert_allclose(calculator.get_forces(atoms), result["forces"], atol=1e-10)


def test_many_batches_are_one(single, monkeypatch):
    batch = [structures.water(), structures.ethanol(), structures.ferrocene()] * 3
    at_once = predict(single, batch)
    monkeypatch.setitem(PART_ATOMS, "cpu", 12)
    for one, other in zip(at_once, predict(single, batch), strict=True):
        np.testing.assert_allclose(other["energy"], one["energy"], rtol=1e-12)
        np.testing.assert_allclose(other["forces"], one["forces"], atol=1e-10)


def test_skipped_structures_have_empty_results(single):
    bad = [Atoms("He"), Atoms("H2"), Atoms("H", positions=[[np.nan, 0, 0]]), Atoms()]
    batch = [structures.water(), *bad, structures.ethanol()]
    found = predict(single, batch, on_error="skip")
    assert found[1:5] == [{}, {}, {}, {}]
    assert len(found[0]["forces"]) == 3
    assert len(found[5]["forces"]) == 9
    assert predict(single, bad, on_error="skip") == [{}] * 4
    with pytest.raises(StructureError, match=r"of structure 1 \(H2\) are 0\.000 Å apart"):
        predict(single, [structures.water(), Atoms("H2")])


def test_no_structures_no_results(single):
    assert predict(single, []) == []


def test_any_iterable_and_a_path(model_file):
    found = predict(str(model_file), (structures.water() for _ in range(2)), dtype="float64")
    assert found[0]["energy"] == found[1]["energy"]
    assert found[0]["energy_uncertainty"] > 0
    assert found[0]["forces_uncertainty"].shape == (3,)


def test_only_energies(single):
    (found,) = predict(single, [structures.water()], ["energy"])
    assert set(found) == {"energy", "free_energy"}


def test_structures_of_pymatgen(single):
    adaptor = pytest.importorskip("pymatgen.io.ase").AseAtomsAdaptor
    crystal, molecule = structures.rock_salt(), structures.ethanol()
    batch = [adaptor.get_structure(crystal), adaptor.get_molecule(molecule)]
    found = predict(single, batch, ["forces", "stress"])
    expected = predict(single, [crystal, molecule], ["forces", "stress"])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one["energy"], other["energy"], rtol=1e-12)
        np.testing.assert_allclose(one["forces"], other["forces"], atol=1e-9)
    assert "stress" in found[0]
    assert "stress" not in found[1]


def test_a_charged_molecule_of_pymatgen(single):
    molecule = pytest.importorskip("pymatgen.core").Molecule
    cation, oxygen = structures.ammonium(), structures.oxygen()
    made = [
        molecule(cation.symbols, cation.positions, charge=1),
        molecule(oxygen.symbols, oxygen.positions, spin_multiplicity=3),
    ]
    found = predict(single, made, ["charges"])
    expected = predict(single, [cation, oxygen])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one["energy"], other["energy"], rtol=1e-12)
    np.testing.assert_allclose(found[0]["charges"].sum(), 1.0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Structure charge:UserWarning")
def test_a_charged_crystal_of_pymatgen(single):
    structure = pytest.importorskip("pymatgen.core").Structure
    crystal = structures.rock_salt()
    made = structure(crystal.cell[:], crystal.symbols, crystal.get_scaled_positions(), charge=1)
    crystal.info["charge"] = 1
    (found,), (expected,) = predict(single, [made]), predict(single, [crystal])
    np.testing.assert_allclose(found["energy"], expected["energy"], rtol=1e-12)
    crystal.info["charge"] = 0
    assert found["energy"] != predict(single, [crystal])[0]["energy"]


def test_formal_charges_of_pymatgen_are_no_charge_of_the_structure(single):
    structure = pytest.importorskip("pymatgen.core").Structure
    salt = structures.rock_salt()
    species = [{"Na": "Na+", "Cl": "Cl2-"}[symbol] for symbol in salt.symbols]
    made = structure(salt.cell[:], species, salt.get_scaled_positions())
    (found,), (expected,) = predict(single, [made]), predict(single, [salt])
    np.testing.assert_allclose(found["energy"], expected["energy"], rtol=1e-12)


def test_what_is_no_structure(single):
    with pytest.raises(StructureError, match=r"cannot predict a dict: give ase\.Atoms"):
        predict(single, [{"positions": []}])


def test_predictions_change_nothing(single):
    atoms = structures.ice_cell()
    atoms.positions[0] += atoms.cell[0]
    before = atoms.copy()
    before.info = dict(atoms.info)
    predict(single, [atoms], ["forces", "stress", "charges"])
    attached(atoms, single).get_forces()
    assert atoms == before
    assert atoms.info == before.info
    assert set(atoms.arrays) == set(before.arrays)


def test_a_loaded_committee_is_used_as_it_is(single):
    assert open_model(single) == (single, {})


def test_properties_that_cannot_be_predicted(single, without_charges):
    batch = [structures.water()]
    with pytest.raises(PropertyNotImplementedError, match="trained without charges"):
        predict(without_charges, batch, ["charges"])
    with pytest.raises(PropertyNotImplementedError, match="this model has no uncertainty"):
        predict(single, batch, ["energy_uncertainty"])
    with pytest.raises(PropertyNotImplementedError, match="no property 'force'; known are charges"):
        predict(single, batch, ["force"])


def test_the_uncertainty_of_forces_needs_forces(committee):
    (found,) = predict(committee, [structures.water()], ["forces_uncertainty"])
    assert found["forces_uncertainty"].shape == (3,)


def test_float32_committee_of_a_float64_one(single):
    fast = in_dtype(single, torch.float32)
    (exact,), (found,) = (predict(model, [structures.ethanol()]) for model in (single, fast))
    assert found["energy"] != exact["energy"]
    assert found["energy"] == pytest.approx(exact["energy"], abs=1e-3)


def test_the_skin_list_holds_what_a_fresh_list_holds(single):
    calculator = OrbcalcCalculator(single, skin=0.4)
    atoms = structures.ice_cell()
    calculator.get_potential_energy(atoms)
    kept = calculator._skin_list.update(atoms)
    assert kept.mask.sum() == neighbor_list(atoms, single.cutoff + 0.4).mask.sum()


def test_an_element_without_charge_labels_has_no_charges(make_potential, labelled):
    """Neither zeros nor an error of Python's: its structures lack them, and others do not."""
    potential = make_potential()
    shells = {z: own for z, own in potential.shells.items() if z != 16}
    bare = Potential(
        potential.config,
        potential.elements,
        shells,
        fit_statistics(LabelDataset(labelled, potential.config.cutoff), potential.config),
    )
    names = ("energy", "charges", "orbital_charges")
    model = Committee([bare])
    water, strange = predict(model, [structures.water(), structures.sulfur_hexafluoride()], names)
    assert np.isfinite(water["charges"]).all()
    assert len(water["orbital_charges"][0]) == 4
    assert np.isfinite(strange["energy"])
    assert not {"charges", "orbital_charges"} & strange.keys()
    atoms = structures.sulfur_hexafluoride()
    atoms.calc = OrbcalcCalculator(model)
    with pytest.raises(PropertyNotImplementedError, match="charges"):
        atoms.get_charges()
    assert np.isfinite(atoms.get_forces()).all()


def test_charge_and_spin_do_nothing_before_they_are_trained(make_potential):
    potential = make_potential("none")
    torch.nn.init.zeros_(potential.backbone.electrons.get_parameter("2.weight"))
    neutral, charged, hydrogen = structures.water(), structures.water(), structures.lone_atom("H")
    charged.info["charge"] = 1
    found = predict(Committee([potential]), [neutral, charged, hydrogen])
    assert found[0]["energy"] == found[1]["energy"]
    np.testing.assert_allclose(found[0]["forces"], found[1]["forces"], atol=1e-12)
    row = potential.elements.index(1)
    assert found[2]["energy"] == float(potential.reference_energies[row])


def test_an_untrained_potential_ignores_charge_and_spin():
    config = PotentialConfig(cutoff=4.0, channels=8, charge_head="none")
    statistics = Statistics(torch.zeros(2), 1.0, 1.0, torch.zeros(2, 0), torch.ones(2, 0))
    with torch.random.fork_rng(devices=[]):
        potential = Potential(config, [1, 8], {}, statistics, torch.float64)
    assert not potential.backbone.electrons.get_parameter("2.weight").any()


def test_a_charge_that_no_training_structure_had_is_told_once(single, tmp_path):
    path = tmp_path / "model.orbcalc"
    save_model(path, single, {"training_set": {"electrons": [[0, 1]]}})
    charged = structures.water()
    charged.info["charge"] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(path, [structures.water()])
        predict(single, [charged])  # what it was trained on is not known
        calculator = OrbcalcCalculator(path)
        calculator.get_potential_energy(structures.water())
    with pytest.warns(UserWarning, match="H2O has charge 1 and multiplicity 2, which no") as caught:
        predict(path, [charged, structures.water(), charged])
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="which no training structure had") as caught:
        calculator.get_potential_energy(charged)
    assert len(caught) == 1
    charged.rattle(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calculator.get_potential_energy(charged)
