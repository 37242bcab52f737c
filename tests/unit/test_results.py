"""Results come back from the files of ASE, uncertainties included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
import pytest
import structures
from ase import Atoms, units
from ase.calculators import calculator as ase_calculators
from ase.calculators.lj import LennardJones
from ase.io.trajectory import Trajectory
from ase.md.verlet import VelocityVerlet

from orbcalc import OrbcalcCalculator, predict, results_of, with_results
from orbcalc.errors import StructureError
from orbcalc.model.committee import Committee

OF_STRUCTURE = {"energy_uncertainty", "energy_interval_95"}
UNCERTAINTIES = OF_STRUCTURE | {"forces_uncertainty", "forces_interval_95"}


@pytest.fixture
def calculated(committee: Committee) -> Atoms:
    """Ice with forces, stress and charges."""
    atoms: Atoms = structures.ice_cell()
    atoms.calc = OrbcalcCalculator(committee)
    for name in ("forces", "stress", "charges", "orbital_charges"):
        atoms.calc.get_property(name, atoms)
    return atoms


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Files have eight decimals, and no orbital charges."""
    assert set(found) == set(expected) - {"orbital_charges"} >= UNCERTAINTIES
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-12, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("name", ["a.extxyz", "a.traj"])
def test_files_give_back_what_was_calculated(calculated: Atoms, tmp_path: Path, name: str) -> None:
    other = structures.ice_cell()
    other.rattle(0.01, seed=1)
    (result,) = predict(calculated.calc.model, [other], ["forces", "stress", "charges"])
    ase.io.write(tmp_path / name, [with_results(calculated), with_results(other, result)])
    frames = ase.io.read(tmp_path / name, ":")
    assert_same(results_of(frames[0]), calculated.calc.results)
    assert_same(results_of(frames[1]), result)
    expected = calculated.calc.results
    assert frames[0].info["energy_uncertainty"] == pytest.approx(expected["energy_uncertainty"])
    np.testing.assert_allclose(frames[0].get_forces(), expected["forces"], atol=1e-8)


def test_so_does_a_database(calculated: Atoms, tmp_path: Path) -> None:
    with ase.db.connect(tmp_path / "a.db") as database:
        database.write(with_results(calculated), name="ice")
        (row,) = database.select(name="ice")
        assert_same(results_of(row), calculated.calc.results)
        assert row.calculator_parameters.keys() == UNCERTAINTIES
        database.write(structures.water())
        assert results_of(database.get(natoms=3)) == {}


def test_columns_of_extxyz_hold_the_uncertainties_of_atoms(
    calculated: Atoms, tmp_path: Path
) -> None:
    ase.io.write(tmp_path / "a.extxyz", with_results(calculated))
    found = ase.io.read(tmp_path / "a.extxyz").arrays["forces_uncertainty"]
    expected = calculated.calc.results["forces_uncertainty"]
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_a_trajectory_of_dynamics_holds_them(committee: Committee, tmp_path: Path) -> None:
    atoms = structures.ethanol()
    atoms.calc = OrbcalcCalculator(committee)
    dynamics = VelocityVerlet(atoms, timestep=0.1 * units.fs)
    with Trajectory(tmp_path / "md.traj", "w") as trajectory:
        dynamics.attach(lambda: trajectory.write(with_results(atoms)))
        dynamics.run(3)
    frames = ase.io.read(tmp_path / "md.traj", ":")
    assert len({results_of(frame)["energy_uncertainty"] for frame in frames}) == 4
    assert_same(results_of(frames[-1]), atoms.calc.results)
    np.testing.assert_allclose(frames[-1].get_momenta(), atoms.get_momenta())


def test_a_single_atom(tmp_path: Path) -> None:
    results = {
        "energy": -13.6,
        "forces": np.zeros((1, 3)),
        "energy_uncertainty": 0.1,
        "energy_interval_95": 0.3,
        "forces_uncertainty": np.array([0.2]),
        "forces_interval_95": np.array([0.5]),
    }
    for name in ("a.extxyz", "a.traj"):
        ase.io.write(tmp_path / name, with_results(Atoms("H"), results))
        found = results_of(ase.io.read(tmp_path / name))
        assert found["forces_uncertainty"].shape == (1,)
        assert_same(found, results)


def test_the_structure_is_left_as_it_is(calculated: Atoms) -> None:
    calculated.info["energy"] = 5.0  # a file may hold it, and extxyz refuses two of a name
    calculated.info["name"] = "ice"
    before = calculated.copy()
    lists = list(ase_calculators.all_properties)
    done = with_results(calculated)
    assert calculated == before
    assert calculated.info == before.info
    assert set(calculated.arrays) == set(before.arrays)
    assert ase_calculators.all_properties == lists
    assert {k: v for k, v in done.info.items() if k not in OF_STRUCTURE} == {"name": "ice"}
    assert done.get_potential_energy() == calculated.get_potential_energy()


def test_who_changes_results_does_not_change_the_calculator(calculated: Atoms) -> None:
    before = calculated.get_forces()
    results_of(calculated)["forces"][:] = 0.0
    np.testing.assert_array_equal(calculated.get_forces(), before)


def test_results_of_another_geometry_are_no_results(calculated: Atoms) -> None:
    done = with_results(calculated)
    for atoms in (calculated, done):
        assert results_of(atoms)
        atoms.positions[0, 0] += 0.01
        assert results_of(atoms) == {}
        with pytest.raises(StructureError, match=r"carries no results of its present geometry"):
            with_results(atoms)


def test_what_a_file_held_is_not_of_a_later_calculation(
    calculated: Atoms, committee: Committee, tmp_path: Path
) -> None:
    ase.io.write(tmp_path / "a.extxyz", with_results(calculated))
    atoms = ase.io.read(tmp_path / "a.extxyz")
    atoms.rattle(0.1, seed=1)
    atoms.calc = OrbcalcCalculator(committee)
    atoms.get_potential_energy()  # without forces, nor their uncertainty
    assert results_of(atoms) == atoms.calc.results
    atoms.calc = LennardJones()
    atoms.get_potential_energy()
    assert not UNCERTAINTIES & results_of(atoms).keys()


def test_without_an_uncertainty_there_is_none(calculated: Atoms) -> None:
    """Neither is one of an earlier calculation kept."""
    done = with_results(with_results(calculated), {"energy": -1.0})
    assert results_of(done) == {"energy": -1.0}
    assert not UNCERTAINTIES & {*done.info, *done.arrays}


def test_a_structure_that_could_not_be_predicted_carries_nothing(committee: Committee) -> None:
    helium = Atoms("He")
    (result,) = predict(committee, [helium], on_error="skip")
    done = with_results(helium, result)
    assert done.calc is None
    assert results_of(done) == {}
