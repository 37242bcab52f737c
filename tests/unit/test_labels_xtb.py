"""GFN1 labels: symmetry, sum rules, tblite's own numbers as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import structures
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import CalculationFailed
from ase.units import Bohr, Hartree
from structures import e3nn_representation, random_rotation

from orbcalc.errors import LabelError, StructureError, UnsupportedElementError
from orbcalc.labels import xtb
from orbcalc.labels.label import LabelStatus
from orbcalc.labels.xtb import (
    OrbitalChargeLabeler,
    XTBSettings,
    check_determinism,
    element_shells,
    make_ase_calculator,
    reference_occupations,
    xtb_values,
)
from orbcalc.orbitals import atomic_charges, shell_charges, shell_slots, shells_from_table
from orbcalc.properties import BLOCK_IRREPS
from orbcalc.structures import charge_and_multiplicity

MOLECULES = [
    structures.water,
    structures.ethanol,
    structures.ferrocene,
    structures.iron_pentacarbonyl,
    structures.sulfur_hexafluoride,
    structures.oxygen,
    structures.nitric_oxide,
    structures.ammonium,
    structures.copper_tetraaqua,
]
CRYSTALS = [structures.rock_salt, structures.ice_cell]


@pytest.fixture(scope="module")
def labeler():
    return OrbitalChargeLabeler()


def ok_values(labeler, atoms):
    label = labeler.label(atoms)
    assert label.status == LabelStatus.ok, label.message
    return label.values


@pytest.mark.parametrize("improper", [False, True])
@pytest.mark.parametrize("make", MOLECULES + CRYSTALS)
def test_labels_rotate_as_e3nn_says(labeler, make, improper):
    atoms = make()
    if not atoms.pbc.any():
        atoms.rattle(0.05, seed=1)  # high symmetry would hide components, and mix degenerate ones
    rotation = random_rotation(5, improper=improper)
    rotated = atoms.copy()
    rotated.positions = atoms.positions @ rotation.T
    rotated.cell = atoms.cell.array @ rotation.T
    before, after = ok_values(labeler, atoms), ok_values(labeler, rotated)
    matrix = e3nn_representation(BLOCK_IRREPS, rotation)
    old, new = np.nan_to_num(before["orbital_blocks"]), np.nan_to_num(after["orbital_blocks"])
    np.testing.assert_allclose(new, old @ matrix.T, atol=1e-10)
    np.testing.assert_allclose(after["forces"], before["forces"] @ rotation.T, atol=1e-8)
    assert after["energy"] == pytest.approx(before["energy"], abs=1e-8)
    assert np.abs(new - old).max() > 1e-4  # the frame does matter


@pytest.mark.parametrize("make", MOLECULES + CRYSTALS)
def test_charges_are_tblites(labeler, make):
    atoms = make()
    values = ok_values(labeler, atoms)
    _, result = xtb._singlepoint("GFN1-xTB", atoms, labeler.settings)
    charges = atomic_charges(values["orbital_blocks"])
    np.testing.assert_allclose(charges, result["charges"], atol=1e-10)
    assert charges.sum() == pytest.approx(atoms.info.get("charge", 0), abs=1e-9)


def wavefunction(atoms, tmp_path):
    """Let tblite write its wavefunction: shell charges and reference occupations of its own."""
    _, result = xtb._singlepoint("GFN1-xTB", atoms, XTBSettings())
    path = tmp_path / "wavefunction.npz"
    result.save(str(path))
    with np.load(path) as data:
        return data["tblite0_n0sh"], data["tblite0_qsh"][..., :].ravel()


def test_every_element_fits_the_slots_and_has_tblites_occupations(tmp_path):
    for number in range(1, 87):
        shells = element_shells(number)
        assert len(set(shell_slots(shells))) == len(shells)
        occupations, _ = wavefunction(Atoms(numbers=[number]), tmp_path)
        np.testing.assert_array_equal(reference_occupations()[number], occupations)


@pytest.mark.parametrize("number", range(1, 87))
def test_shell_charges_of_every_hydride_are_tblites(labeler, number, tmp_path):
    atoms = Atoms(numbers=[number, 1], positions=[[0, 0, 0], [0.9, 0.8, 1.1]])
    label = labeler.label(atoms)
    assert label.status == LabelStatus.ok, label.message
    _, expected = wavefunction(atoms, tmp_path)
    found = np.concatenate(
        shell_charges(label.values["orbital_blocks"], shells_from_table(label.values["shells"]))
    )
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert shells_from_table(label.values["shells"])[0] == element_shells(number)


def test_forces_are_the_derivative_of_the_energy(labeler):
    atoms = structures.ethanol()
    atoms.rattle(0.05, seed=2)
    forces = ok_values(labeler, atoms)["forces"]
    step = 2e-4
    for atom, axis in [(0, 0), (2, 1), (5, 2)]:
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * step
            energies.append(ok_values(labeler, moved)["energy"])
        assert forces[atom, axis] == pytest.approx(
            -np.diff(energies[::-1])[0] / (2 * step), abs=1e-5
        )


@pytest.mark.parametrize("method", ["GFN1-xTB", "GFN2-xTB"])
def test_stress_is_the_derivative_of_the_energy(method):
    atoms = structures.ice_cell()
    settings = XTBSettings()
    stress = xtb_values(method, atoms, settings, forces=False, stress=True)["stress"]
    step = 2e-4
    for voigt, (i, j) in enumerate([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]):
        energies = []
        for sign in (1, -1):
            strain = np.zeros((3, 3))
            strain[i, j] += sign * step / 2
            strain[j, i] += sign * step / 2
            moved = atoms.copy()
            moved.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
            values = xtb_values(method, moved, settings, forces=False, stress=False)
            energies.append(values["energy"])
        slope = (energies[0] - energies[1]) / (2 * step) / atoms.get_volume()
        assert stress[voigt] == pytest.approx(slope, abs=2e-6)


def test_units_are_those_of_ase(labeler):
    """The values of an independent route through tblite's own ASE-free interface."""
    from tblite.interface import Calculator

    atoms = structures.water()
    calculator = Calculator("GFN1-xTB", atoms.numbers, atoms.positions / Bohr)
    calculator.set("verbosity", 0)
    result = calculator.singlepoint()
    values = ok_values(labeler, atoms)
    assert values["energy"] == pytest.approx(result["energy"] * Hartree, abs=1e-6)
    np.testing.assert_allclose(values["forces"], -result["gradient"] * Hartree / Bohr, atol=1e-4)


def test_spin_fills_orbitals(labeler):
    triplet, singlet = structures.water(), structures.water()
    triplet.info["spin"] = 3
    blocks = [ok_values(labeler, atoms)["orbital_blocks"] for atoms in (triplet, singlet)]
    assert np.nanmax(np.abs(blocks[0] - blocks[1])) > 0.1


def test_f_electrons_of_lanthanides_are_in_the_core(labeler):
    """Eu3+ has seven electrons in f, which no orbital of GFN1 holds."""
    atoms = Atoms("EuF3", [[0, 0, 0], [2.0, 0, 0], [-1, 1.7, 0], [-1, -1.7, 0]])
    assert ok_values(labeler, atoms)["energy"] < 0
    atoms.info["spin"] = 7
    assert ok_values(labeler, atoms)["energy"] < 0


def test_a_spin_resolved_density_is_summed():
    """tblite gives (spin, orbital, orbital) when a spin polarisation is switched on."""
    atoms = structures.oxygen()
    calculator = xtb._calculator("GFN1-xTB", atoms, 0, 2)
    calculator.add("spin-polarization", 1.0)
    calculator.set("save-integrals", 1)
    result = calculator.singlepoint()
    assert result["density-matrix"].ndim == 3
    shells = xtb._shells_of_atoms(calculator)
    blocks = xtb._charge_blocks(calculator, result, atoms.numbers, shells)
    assert sum(np.trace(block) for atom in blocks for block in atom) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("atoms", "status", "message"),
    [
        (Atoms("Fr"), LabelStatus.unsupported, "atomic number 87"),
        (Atoms("H2", [[0, 0, 0], [0, 0, 0.1]]), LabelStatus.failed, "overlap"),
        (
            Atoms("He", cell=[5, 5, 5], pbc=[True, True, False]),
            LabelStatus.unsupported,
            "three-dimensional crystals",
        ),
        (Atoms("He", info={"charge": -4}), LabelStatus.failed, "add up to"),
    ],
)
def test_failures_are_a_status(labeler, atoms, status, message):
    label = labeler.label(atoms)
    assert label.status == status
    assert message in label.message
    assert label.values == {}


def test_an_scf_that_does_not_converge_is_a_status():
    label = OrbitalChargeLabeler(XTBSettings(max_iterations=2)).label(structures.ethanol())
    assert label.status == LabelStatus.scf_failed
    assert "not converged in 2 cycles" in label.message


def test_structures_without_content_are_refused(labeler):
    with pytest.raises(StructureError, match="must be finite"):
        labeler.label(Atoms("He", [[np.nan, 0, 0]]))
    with pytest.raises(StructureError, match="multiplicity"):
        labeler.label(Atoms("He", info={"spin": 2}))


def test_a_cell_with_an_odd_number_of_electrons(labeler):
    values = ok_values(labeler, bulk("Al", cubic=True))
    np.testing.assert_allclose(atomic_charges(values["orbital_blocks"]), 0, atol=1e-6)


def test_elements_beyond_radon():
    with pytest.raises(UnsupportedElementError, match="cover 1 to 86"):
        element_shells(87)


def test_labels_are_deterministic(monkeypatch):
    check_determinism()
    energies = iter([1.0, 2.0])

    def unstable(self, atoms):
        return {"energy": next(energies)}

    monkeypatch.setattr(OrbitalChargeLabeler, "_values", unstable)
    with pytest.raises(LabelError, match="twice with different results"):
        check_determinism()


def test_charges_that_disagree_with_tblite_are_an_error():
    blocks = np.full((1, 23), np.nan)
    blocks[0, 0] = 1e-4
    with pytest.raises(LabelError, match="is not understood"):
        xtb._check_charges(blocks, np.zeros(1), Atoms("He"))


def test_missing_tblite_names_the_package(monkeypatch):
    def missing(name):
        raise xtb.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(xtb.metadata, "version", missing)
    with pytest.raises(LabelError, match="pip install tblite"):
        OrbitalChargeLabeler()


# ----------------------------------------------------------------------------- for MD
def charged(make, **info):
    atoms = make()
    atoms.info.update(info)
    return atoms


MOVING = {
    "molecule": charged(structures.ethanol),
    "radical cation": charged(structures.water, charge=1, spin=2),
    "triplet": charged(structures.oxygen),
    "crystal": charged(structures.ice_cell),
    "slab": charged(structures.salt_slab),
}


@pytest.mark.parametrize("name", MOVING)
def test_md_sees_the_surface_of_tblites_own_calculator(name):
    from tblite.ase import TBLite

    atoms = MOVING[name].copy()
    charge, multiplicity = charge_and_multiplicity(atoms)
    own, theirs = atoms.copy(), atoms.copy()
    own.calc = make_ase_calculator("GFN1-xTB", atoms)
    theirs.calc = TBLite(method="GFN1-xTB", charge=charge, multiplicity=multiplicity, verbosity=0)
    for seed in range(3):
        for moving in (own, theirs):
            moving.rattle(0.02, seed=seed)
            if atoms.pbc.any():
                moving.set_cell(moving.cell.array * 1.01, scale_atoms=True)
        assert own.get_potential_energy() == pytest.approx(theirs.get_potential_energy(), abs=1e-7)
        np.testing.assert_allclose(own.get_forces(), theirs.get_forces(), atol=1e-6)
        if atoms.pbc.all():
            np.testing.assert_allclose(own.get_stress(), theirs.get_stress(), atol=1e-8)


def test_md_and_labels_agree_about_f_electrons():
    """Without the rule there would be six electrons too many in the valence shell."""
    atoms = Atoms("EuF3", [[0, 0, 0], [2.0, 0, 0], [-1, 1.7, 0], [-1, -1.7, 0]], info={"spin": 7})
    expected = xtb_values("GFN1-xTB", atoms, XTBSettings(), forces=True, stress=False)
    atoms.calc = make_ase_calculator("GFN1-xTB", atoms)
    assert atoms.get_potential_energy() == pytest.approx(expected["energy"], abs=1e-4)
    np.testing.assert_allclose(atoms.get_forces(), expected["forces"], atol=1e-3)


def test_md_goes_on_from_the_last_density(monkeypatch):
    from tblite.interface import Calculator

    starts = []
    singlepoint = Calculator.singlepoint

    def watched(self, result=None, copy=False):
        starts.append(result is not None)
        return singlepoint(self, result, copy)

    monkeypatch.setattr(Calculator, "singlepoint", watched)
    atoms = structures.water()
    atoms.calc = make_ase_calculator("GFN1-xTB", atoms)
    for _ in range(2):
        atoms.get_forces()
        atoms.get_potential_energy()
        atoms.positions[0, 0] += 0.01
    atoms.numbers[0] = 16
    atoms.get_forces()
    assert starts == [False, True, False]


def test_md_recovers_from_a_structure_that_fails():
    atoms = structures.water()
    atoms.calc = make_ase_calculator("GFN1-xTB", atoms)
    before, positions = atoms.get_potential_energy(), atoms.positions.copy()
    for _ in range(2):
        atoms.positions[2] = atoms.positions[1]
        with pytest.raises(CalculationFailed, match="GFN1-xTB: "):
            atoms.get_forces()
    atoms.positions = positions
    assert atoms.get_potential_energy() == pytest.approx(before, abs=1e-9)
    atoms.symbols[0] = "Fr"
    with pytest.raises(UnsupportedElementError):
        atoms.get_forces()
