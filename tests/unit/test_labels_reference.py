"""Reference labels: GFN2-xTB, DFT, files, and any ASE calculator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import structures
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import CalculationFailed, Calculator, all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import write

from orbcalc.config import LabelConfig, ReferenceConfig
from orbcalc.errors import ConfigError, LabelConflictError, LabelError, MissingLabelError
from orbcalc.labels import dft, label
from orbcalc.labels.compute import compute_label, label_kinds, label_provenance
from orbcalc.labels.label import LabelStatus, Provenance
from orbcalc.labels.reference import (
    ReferenceLabeler,
    check_file_labels,
    reference_provenance,
)
from orbcalc.labels.sources import (
    file_method,
    read_sources,
    warn_of_electrons,
    warn_of_initial_values,
    warn_of_small_cells,
)
from orbcalc.labels.xtb import XTBSettings, xtb_values
from orbcalc.properties import REF_ENERGY, REF_FORCES, REF_METHOD, REF_STRESS

HERE = __name__


class Broken(Calculator):
    """Fails in the way that the first atom's tag says, and counts how often it is made."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012  (as ASE declares it)
    made = 0

    def __init__(self):
        super().__init__()
        Broken.made += 1

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        failure = self.atoms.info.get("failure")
        if failure:
            raise failure
        charge = self.atoms.info.get("charge", 0)
        self.results = {"energy": float(charge), "forces": np.full((len(self.atoms), 3), np.nan)}


def config(calculator, *, version=None, forces=True, stress=False, **arguments):
    reference = ReferenceConfig(calculator=calculator, arguments=arguments, version=version)
    return LabelConfig(reference=reference, forces=forces, stress=stress)


def test_gfn2_is_tblites():
    found = ReferenceLabeler(config("GFN2-xTB", accuracy=0.1)).label(structures.ethanol())
    assert found.status == LabelStatus.ok
    expected = xtb_values(
        "GFN2-xTB", structures.ethanol(), XTBSettings(0.1), forces=True, stress=False
    )
    assert found.values["energy"] == pytest.approx(expected["energy"], abs=1e-10)
    np.testing.assert_allclose(found.values["forces"], expected["forces"], atol=1e-10)
    assert found.provenance.settings["accuracy"] == 0.1


def test_charge_and_multiplicity_reach_gfn2():
    energies = set()
    for info in ({}, {"charge": 1}, {"spin": 3}):
        atoms = structures.water()
        atoms.info = info
        energies.add(round(ReferenceLabeler(config("GFN2-xTB")).label(atoms).values["energy"], 3))
    assert len(energies) == 3


def test_gfn2_arguments_are_checked():
    with pytest.raises(ConfigError, match="known are accuracy, electronic_temperature"):
        ReferenceLabeler(config("GFN2-xTB", precision=1.0))


def test_an_unconverged_gfn2_is_a_status():
    found = ReferenceLabeler(config("GFN2-xTB", max_iterations=2)).label(structures.ethanol())
    assert found.status == LabelStatus.scf_failed


def test_stress_only_where_space_repeats():
    labeler = ReferenceLabeler(config("GFN2-xTB", stress=True))
    assert set(labeler.label(structures.water()).values) == {"energy", "forces"}
    assert labeler.label(structures.ice_cell()).values["stress"].shape == (6,)


def test_any_ase_calculator():
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.set_constraint(FixAtoms([0]))
    found = ReferenceLabeler(config("ase.calculators.emt:EMT", stress=True)).label(atoms)
    assert atoms.calc is None
    atoms.calc = EMT()
    assert found.values["energy"] == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
    forces = atoms.get_forces(apply_constraint=False)
    np.testing.assert_allclose(found.values["forces"], forces, atol=1e-12)
    np.testing.assert_allclose(found.values["stress"], atoms.get_stress(), atol=1e-12)
    assert found.provenance.method == "EMT"
    assert found.provenance.version.startswith("ase 3.")


@pytest.mark.parametrize("directory", [None, "scratch/dft"])
def test_each_worker_has_a_directory_of_its_own(directory):
    """Calculators of external programs write files, always of the same names."""
    arguments = {} if directory is None else {"directory": directory}
    labeler = ReferenceLabeler(config("ase.calculators.emt:EMT", **arguments))
    labeler.load()
    found = Path(labeler._calculator.directory)
    assert str(os.getpid()) in found.name
    assert found.parent == Path(directory or ".")


def test_a_calculator_that_writes_no_files_leaves_no_directory(tmp_path):
    labeler = ReferenceLabeler(config("ase.calculators.emt:EMT", directory=str(tmp_path)))
    for _ in range(2):
        assert labeler.label(bulk("Cu")).status == "ok"
        assert list(tmp_path.iterdir()) == []


def test_a_warning_tells_that_calculators_may_not_read_charges(caplog):
    caplog.set_level("WARNING")
    charged = structures.water()
    charged.info["charge"] = 1
    for name, atoms in (("GFN2-xTB", charged), ("a:B", structures.water())):
        warn_of_electrons([atoms], ReferenceConfig(calculator=name))
    assert not caplog.text
    warn_of_electrons([structures.water(), charged], ReferenceConfig(calculator="a:B"))
    assert "H2O has a charge or a spin in atoms.info" in caplog.text


def test_a_warning_tells_of_forces_that_constraints_have_set_to_zero(tmp_path, caplog):
    caplog.set_level("WARNING")
    slab = bulk("Cu", cubic=True) * (2, 1, 1)
    slab.rattle(0.1, seed=0)
    slab.set_constraint(FixAtoms([0, 3]))
    slab.calc = EMT()
    for apply_constraint in (False, True):
        found = slab.copy()
        found.arrays[REF_FORCES] = slab.get_forces(apply_constraint=apply_constraint)
        write(tmp_path / "a.extxyz", [found, structures.water()])
        caplog.clear()
        read_sources([tmp_path / "a.extxyz"])
        assert ("1 structures, Cu8 the first, have REF_forces of exactly" in caplog.text) == (
            apply_constraint
        )


def test_a_warning_tells_of_initial_values_that_are_not_read(caplog):
    caplog.set_level("WARNING")
    oxygen, methane, iron = molecule("O2"), molecule("CH4"), bulk("Fe", cubic=True)
    told, anion = oxygen.copy(), molecule("OH")
    told.info["spin"] = 3
    iron.set_initial_magnetic_moments([2.2, 2.2])
    methane.set_initial_charges([-0.4, 0.1, 0.1, 0.1, 0.1])
    warn_of_initial_values([told, anion, iron, methane])  # OH has one electron too many anyway
    assert not caplog.text
    ion = methane.copy()
    ion.set_initial_charges([1.0, 0.0, 0.0, 0.0, 0.0])
    for atoms, state in ((oxygen, "charge 0, multiplicity 1"), (ion, "charge 0, multiplicity 1")):
        caplog.clear()
        warn_of_initial_values([methane, atoms, atoms])
        assert f"2 structures, {atoms.get_chemical_formula()} the first" in caplog.text
        assert state in caplog.text


def test_a_warning_tells_of_cells_that_need_k_points(caplog):
    caplog.set_level("WARNING")
    with_gfn = LabelConfig(reference=ReferenceConfig(calculator="a:B"))
    without = with_gfn.model_copy(update={"charges": False})
    small = bulk("NaCl", "rocksalt", 5.64)
    warn_of_small_cells([small * (3, 3, 3), structures.water()], with_gfn)
    warn_of_small_cells([small], without)
    assert not caplog.text
    warn_of_small_cells([structures.water(), small], with_gfn)
    assert "1 structures, ClNa the first, have cells that are shorter than 10 Å" in caplog.text


def test_labels_of_files_keep_the_name_of_their_method():
    file = LabelConfig(reference=ReferenceConfig(calculator="file"))
    first, second, third = structures.water(), structures.oxygen(), structures.ethanol()
    first.info[REF_METHOD] = second.info[REF_METHOD] = "PBE (VASP 6)"
    named = file_method([first, second], file)
    assert str(reference_provenance(named.reference)) == "file (file PBE (VASP 6))"
    assert file_method([first, third], file) == file  # of the third nothing is known
    own = LabelConfig(reference=ReferenceConfig(calculator="file", version="mine"))
    assert file_method([first, second], own) == own
    third.info[REF_METHOD] = "GFN2-xTB"
    with pytest.raises(LabelConflictError, match=r"different methods: GFN2-xTB; PBE \(VASP 6\)"):
        file_method([first, second, third], file)
    computed = LabelConfig(reference=ReferenceConfig(calculator="GFN2-xTB"))
    assert file_method([first, second, third], computed) == computed


def test_charge_in_info_is_not_hidden_by_ases_cache():
    labeler = ReferenceLabeler(config(f"{HERE}:Broken", forces=False))
    energies = []
    for charge in (0, 1):
        atoms = structures.oxygen()
        atoms.info = {"charge": charge, "spin": 1 + charge}
        energies.append(labeler.label(atoms).values["energy"])
    assert energies == [0.0, 1.0]


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (label.SCFError("no"), LabelStatus.scf_failed),
        (CalculationFailed("no"), LabelStatus.failed),
        (label.InputError("no"), LabelStatus.unsupported),
        (ZeroDivisionError("no"), LabelStatus.failed),
    ],
)
def test_failures_are_a_status_and_cost_the_calculator(failure, status):
    labeler = ReferenceLabeler(config(f"{HERE}:Broken", forces=False))
    made = Broken.made
    bad, good = structures.water(), structures.water()
    bad.info["failure"] = failure
    found = labeler.label(bad)
    assert found.status == status
    assert "no" in found.message
    assert found.values == {}
    assert labeler.label(good).status == LabelStatus.ok
    assert labeler.label(good).status == LabelStatus.ok
    assert Broken.made == made + 2


def test_nan_is_a_failure():
    found = ReferenceLabeler(config(f"{HERE}:Broken")).label(structures.water())
    assert found.status == LabelStatus.failed
    assert found.message == "not finite: forces"
    assert found.values == {}


def test_a_quantity_that_the_calculator_does_not_have():
    with pytest.raises(LabelError, match="Switch forces or stress off"):
        ReferenceLabeler(config(f"{HERE}:Broken", forces=False, stress=True)).label(
            structures.rock_salt()
        )


@pytest.mark.parametrize(
    ("calculator", "arguments", "message"),
    [
        ("no_such_package:Name", {}, "No module named 'no_such_package'"),
        ("ase.calculators.emt:Emt", {}, "has no attribute 'Emt'"),
        (f"{HERE}:Broken", {"wrong": 1}, "unexpected keyword"),
    ],
)
def test_calculators_that_cannot_be_made(calculator, arguments, message):
    labeler = ReferenceLabeler(config(calculator, **arguments))
    with pytest.raises(ConfigError, match=message):
        labeler.label(structures.water())


@pytest.mark.parametrize("name", ["gfn2", "a:b c", ":EMT"])
def test_unknown_calculator_names(name):
    with pytest.raises(ConfigError, match=r"package\.module:Name"):
        ReferenceLabeler(config(name))


def test_versions():
    def version(name, given=None):
        return reference_provenance(ReferenceConfig(calculator=name, version=given)).version

    assert version("ase.calculators.vasp:Vasp", "VASP 6.4.2") == "VASP 6.4.2"
    assert version("no_such_package:Name") == "unversioned"
    assert version("file") == "unversioned"
    assert version("GFN2-xTB", "patched") == "patched"


def with_file_labels(atoms):
    atoms.info[REF_ENERGY] = -1.5
    atoms.arrays[REF_FORCES] = np.full((len(atoms), 3), 0.25)
    return atoms


@pytest.mark.parametrize("shape", [(6,), (3, 3), (9,)])
def test_file_labels(shape):
    atoms = with_file_labels(structures.rock_salt())
    voigt = np.arange(6.0)
    full = voigt[[0, 5, 4, 5, 1, 3, 4, 3, 2]]
    atoms.info[REF_STRESS] = voigt if shape == (6,) else full.reshape(shape)
    found = ReferenceLabeler(config("file", stress=True)).label(atoms)
    assert found.values["energy"] == -1.5
    np.testing.assert_array_equal(found.values["forces"], 0.25)
    np.testing.assert_array_equal(found.values["stress"], voigt)


def test_a_stress_of_a_file_is_kept_unasked():
    """Also that of a slab, which nobody computes; NaN is none."""
    crystal, slab = with_file_labels(structures.rock_salt()), structures.salt_slab()
    slab = with_file_labels(slab)
    unknown = crystal.copy()
    crystal.info[REF_STRESS] = slab.info[REF_STRESS] = np.arange(6.0)
    unknown.info[REF_STRESS] = np.full(6, np.nan)
    found = [ReferenceLabeler(config("file")).label(a).values for a in (crystal, slab, unknown)]
    assert ["stress" in values for values in found] == [True, True, False]
    check_file_labels([crystal, unknown], config("file"))


def test_missing_file_labels_are_counted():
    good, bad = with_file_labels(structures.rock_salt()), structures.water()
    good.info[REF_STRESS] = np.zeros(6)
    settings = config("file", stress=True)
    check_file_labels([good, good], settings)
    with pytest.raises(
        MissingLabelError,
        match=r"REF_energy: 2 of 3, REF_forces: 2 of 3, REF_stress: 2 of 2; structure 1, H2O",
    ):
        check_file_labels([good, bad, good], settings)
    with pytest.raises(MissingLabelError, match="H2O carries no REF_energy"):
        ReferenceLabeler(settings).label(bad)
    check_file_labels([bad], config("GFN2-xTB"))


def test_file_labels_of_a_wrong_shape_or_nan():
    atoms = with_file_labels(structures.water())
    atoms.info[REF_ENERGY] = [1.0, 2.0]
    with pytest.raises(LabelError, match=r"REF_energy of H2O must have shape \(\), got \(2,\)"):
        ReferenceLabeler(config("file")).label(atoms)
    atoms.info[REF_ENERGY] = np.nan
    assert ReferenceLabeler(config("file")).label(atoms).status == LabelStatus.failed


def test_kinds_and_provenance_without_computing():
    assert label_kinds(LabelConfig()) == ("charges", "reference")
    assert label_kinds(LabelConfig(charges=False)) == ("reference",)
    for kind in label_kinds(LabelConfig()):
        computed = compute_label(structures.water(), kind, LabelConfig())
        assert computed.provenance == label_provenance(kind, LabelConfig())
        assert computed.kind == kind


def test_provenance_survives_json():
    provenance = Provenance("m", "p", "1", {"b": (1, 2), "a": {"x": None}})
    assert Provenance.from_dict(provenance.to_dict()) == provenance
    assert provenance != Provenance("m", "p", "1", {"b": [1, 3], "a": {"x": None}})
    assert str(provenance) == "m (p 1; a={'x': None}, b=[1, 2])"


def test_labels_are_made_without_torch_and_leave_ase_alone():
    script = (
        "import sys; from ase.calculators import calculator as c\n"
        "n = len(c.external_calculators)\n"
        "import orbcalc.labels.process, orbcalc.labels.store\n"
        "heavy = {'torch', 'e3nn', 'distributed', 'dask', 'tblite', 'pyscf'}\n"
        "assert not heavy & set(sys.modules)\n"
        "assert len(c.external_calculators) == n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# ------------------------------------------------------------------------------- DFT
DFT = {"xc": "lda,vwn", "basis": "sto-3g", "grid_level": 1, "conv_tol": 1e-10}


@pytest.mark.parametrize(("charge", "density_fit"), [(0, True), (1, False)])
def test_dft_forces_are_the_derivative_of_the_energy(charge, density_fit):
    pytest.importorskip("pyscf")
    labeler = ReferenceLabeler(config("pyscf", density_fit=density_fit, **DFT))
    atoms = structures.water()
    atoms.info["charge"] = charge
    atoms.rattle(0.02, seed=0)
    forces = labeler.label(atoms).values["forces"]
    step, energies = 2e-3, []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[0, 2] += sign * step
        energies.append(labeler.label(moved).values["energy"])
    slope = (energies[0] - energies[1]) / (2 * step)
    assert forces[0, 2] == pytest.approx(-slope, abs=2e-4)


def test_dft_reads_charge_and_multiplicity():
    pytest.importorskip("pyscf")
    calculator = dft.PySCFCalculator(**DFT)
    atoms = Atoms("Li", info={"charge": 1})
    assert calculator._mean_field(atoms).mol.nelectron == 2
    assert type(calculator._mean_field(atoms)).__name__.endswith("RKS")
    field = calculator._mean_field(structures.oxygen())
    assert field.mol.spin == 2
    assert "UKS" in type(field).__name__


def test_bases_bring_their_core_potential():
    pytest.importorskip("pyscf")
    iodine = Atoms("HI", [[0, 0, 0], [0, 0, 1.6]])
    assert dft.PySCFCalculator()._mean_field(iodine).mol.nelectron == 26
    assert dft.PySCFCalculator(basis="sto-3g")._mean_field(iodine).mol.nelectron == 54
    assert dft.PySCFCalculator(basis="lanl2dz")._mean_field(iodine).mol.nelectron == 8
    assert dft.PySCFCalculator(basis="ma-def2-svp")._mean_field(iodine).mol.nelectron == 26


@pytest.mark.parametrize("basis", ["def2-svp", "lanl2dz"])
def test_density_fitting_hardly_changes_the_energy(basis):
    pytest.importorskip("pyscf")
    fitted, exact = (
        dft.PySCFCalculator(basis=basis, grid_level=0, density_fit=fit)._mean_field(
            structures.water()
        )
        for fit in (True, False)
    )
    assert fitted.kernel() == pytest.approx(exact.kernel(), abs=2e-4)  # hartree


def test_dft_failures():
    pytest.importorskip("pyscf")
    labeler = ReferenceLabeler(config("pyscf", max_cycle=1, **DFT))
    assert labeler.label(structures.water()).status == LabelStatus.scf_failed
    assert labeler.label(structures.rock_salt()).status == LabelStatus.unsupported
    with pytest.raises(ConfigError, match="'grid'"):
        ReferenceLabeler(config("pyscf", grid=3))


def test_dft_records_all_settings():
    pytest.importorskip("pyscf")
    provenance = reference_provenance(
        ReferenceConfig(calculator="pyscf", arguments={"xc": "b3lyp"})
    )
    assert provenance.method == "b3lyp/def2-svp"
    assert provenance.settings["conv_tol"] == 1e-9


def test_missing_pyscf_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyscf", None)
    with pytest.raises(ConfigError, match=r"pip install 'orbcalc\[pyscf\]'"):
        dft.PySCFCalculator()

    def missing(name):
        raise dft.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(dft.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"pip install 'orbcalc\[pyscf\]'"):
        dft.pyscf_provenance({})
