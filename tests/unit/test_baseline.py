"""A potential that is the difference from GFN1-xTB, which tblite computes at every prediction."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structures
import torch
from ase import Atoms
from conftest import MakePotential

from orbcalc.calculator import OrbcalcCalculator
from orbcalc.config import PotentialConfig, RunConfig, TrainConfig, parse_config
from orbcalc.errors import ConfigError, LabelConflictError, MissingLabelError, StructureError
from orbcalc.graph import AtomGraph
from orbcalc.labels.baseline import BaselineWorker
from orbcalc.labels.process import WorkerProcess
from orbcalc.model.checkpoint import load_model, save_model
from orbcalc.model.committee import Committee
from orbcalc.prediction import predict
from orbcalc.properties import (
    REF_ENERGY,
    REF_FORCES,
    REF_STRESS,
    XTB_ENERGY,
    XTB_FORCES,
    XTB_METHOD,
)
from orbcalc.testing import STENCIL
from orbcalc.training.dataset import LabelDataset

ABOVE = {"baseline": "GFN1-xTB"}


@pytest.fixture(scope="module")
def above(make_potential: MakePotential) -> Committee:
    """Return an untrained difference from GFN1-xTB, in float64."""
    return Committee([make_potential(**ABOVE)])


@pytest.fixture(scope="module")
def alone(above: Committee) -> Committee:
    """Return the same network without what is below it."""
    twin = copy.deepcopy(above)
    twin.first.config = above.first.config.model_copy(update={"baseline": "none"})
    return twin


def gfn1(atoms: Atoms) -> dict[str, Any]:
    """Compute GFN1-xTB as labels do."""
    with WorkerProcess() as process:
        found: dict[str, Any] = process.call(
            "orbcalc.labels.compute:compute_baseline", atoms.copy(), timeout_s=60.0
        )
    return found


def as_slab(atoms: Atoms) -> Atoms:
    """Return a copy that is a slab, which tblite does not compute."""
    slab: Atoms = atoms.copy()
    slab.cell, slab.pbc = [9, 9, 20], [True, True, False]
    return slab


# -------------------------------------------------------------------------- predictions
@pytest.mark.parametrize("make", [structures.ethanol, structures.ammonium, structures.ice_cell])
def test_predictions_are_the_sum_of_both(above: Committee, alone: Committee, make: Any) -> None:
    atoms = make()
    calculator, network, below = OrbcalcCalculator(above), OrbcalcCalculator(alone), gfn1(atoms)
    names = ["energy", "forces", *(["stress"] if atoms.pbc.all() else [])]
    for name in names:  # one by one, as ASE asks
        expected = network.get_property(name, atoms) + below[name]
        np.testing.assert_allclose(calculator.get_property(name, atoms), expected, atol=1e-7)
    (found,) = predict(above, [atoms], names)
    for name in names:
        np.testing.assert_allclose(found[name], calculator.results[name], atol=1e-7)
    assert found["free_energy"] == found["energy"]


@pytest.mark.parametrize("make", [structures.ethanol, structures.ice_cell])
def test_forces_and_stress_are_derivatives_of_the_sum(above: Committee, make: Any) -> None:
    atoms = make()
    atoms.rattle(0.05, seed=1)
    atoms.calc = OrbcalcCalculator(above)
    forces = atoms.get_forces()

    def slope(change: Callable[[Atoms, float], None], step: float = 5e-3) -> float:
        # tblite's energies of crystals jump by 1e-8 eV, which smaller steps would enlarge.
        total = 0.0
        for point, weight in STENCIL.items():
            moved = atoms.copy()
            change(moved, point * step)
            moved.calc = atoms.calc
            total += weight * float(moved.get_potential_energy())
        return total / step

    def displace(moved: Atoms, by: float) -> None:
        moved.positions[1, 2] += by

    def shear(moved: Atoms, by: float) -> None:
        deformation = np.eye(3)
        deformation[0, 1] = deformation[1, 0] = by / 2
        moved.set_cell(moved.cell.array @ deformation, scale_atoms=True)

    assert forces[1, 2] == pytest.approx(-slope(displace), abs=1e-5)
    if atoms.pbc.all():
        assert atoms.get_stress()[5] == pytest.approx(slope(shear) / atoms.get_volume(), abs=1e-6)


def test_labels_of_the_baseline_save_its_computation(
    above: Committee, labelled: list[Atoms], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = predict(above, labelled, ("energy", "forces", "stress"))
    monkeypatch.setattr(BaselineWorker, "compute", pytest.fail)
    read = predict(above, labelled, ("energy", "forces", "stress"), baseline="labels")
    for one, other in zip(computed, read, strict=True):
        assert one["energy"] == pytest.approx(other["energy"], abs=1e-6)
        np.testing.assert_allclose(one["forces"], other["forces"], atol=1e-5)
        assert "stress" not in other
    bare = structures.water()
    with pytest.raises(MissingLabelError, match="H2O carries no GFN1-xTB label"):
        predict(above, [bare], baseline="labels")
    found = predict(above, [labelled[0], bare], baseline="labels", on_error="skip")
    assert found[0]
    assert found[1] == {}


def test_labels_take_the_place_of_a_learned_baseline(
    make_potential: MakePotential, labelled: list[Atoms]
) -> None:
    model = Committee([make_potential(xtb_head="baseline") for _ in range(2)])
    bare = structures.water()
    learned = predict(model, [*labelled, bare])
    found = predict(model, [*labelled, bare], baseline="labels")
    for atoms, one, other in zip(labelled, learned, found, strict=False):
        graph = AtomGraph.from_atoms(atoms, model.cutoff)
        below = model(graph, ("energy", "xtb_energy")).xtb_energy
        assert below is not None
        moved = atoms.info[XTB_ENERGY] - below.item()
        assert abs(moved) > 1e-3
        assert other["energy"] == pytest.approx(one["energy"] + moved, abs=1e-9)
        assert other["free_energy"] == other["energy"]
        np.testing.assert_allclose(other["forces"], one["forces"])
        assert other["energy_uncertainty"] == pytest.approx(one["energy_uncertainty"])
    assert found[-1]["energy"] == learned[-1]["energy"]


def test_what_the_baseline_refuses_cannot_be_predicted(above: Committee) -> None:
    good, bad = structures.water(), as_slab(structures.water())
    with pytest.raises(StructureError, match=r"failed for H2O: tblite computes molecules and"):
        predict(above, [good, bad])
    found = predict(above, [bad, good], on_error="skip")
    assert found[0] == {}
    assert found[1]["energy"] < -100
    bad.calc = OrbcalcCalculator(above)
    for _ in range(2):  # not even with the result of an earlier call
        with pytest.raises(StructureError, match="GFN1-xTB"):
            bad.get_potential_energy()
        assert bad.calc.results == {}
    good.calc = bad.calc
    assert good.get_potential_energy() == pytest.approx(found[1]["energy"], abs=1e-9)
    with pytest.raises(StructureError, match="GFN1-xTB"):
        bad.get_forces()


def test_copies_of_a_calculator_compute_on_their_own(above: Committee) -> None:
    atoms = structures.water()
    atoms.calc = OrbcalcCalculator(above)
    energy = atoms.get_potential_energy()
    twin = copy.deepcopy(atoms.calc)
    atoms.positions[0, 2] += 0.1
    assert twin.get_property("energy", structures.water()) == pytest.approx(energy, abs=1e-9)
    assert twin.get_property("energy", atoms) == pytest.approx(
        atoms.get_potential_energy(), abs=1e-9
    )


# -------------------------------------------------------------------------- model files
def test_a_model_file_knows_its_baseline(above: Committee, tmp_path: Path) -> None:
    path = tmp_path / "model.orbcalc"
    save_model(path, above)
    committee, _ = load_model(path, dtype=torch.float64)
    assert committee.first.config.baseline == "GFN1-xTB"
    water = structures.water()
    expected = predict(above, [water])[0]["energy"]
    assert predict(path, [water], dtype="float64")[0]["energy"] == pytest.approx(expected)


def test_another_version_of_tblite_is_refused(above: Committee, tmp_path: Path) -> None:
    path = tmp_path / "model.orbcalc"
    save_model(path, above, {"labels": {"charges": "GFN1-xTB (tblite 0.1.0)"}})
    for use in (OrbcalcCalculator, lambda model: predict(model, [structures.water()])):
        with pytest.raises(LabelConflictError, match=r"difference from GFN1-xTB \(tblite 0.1.0\)"):
            use(path)


def test_labels_of_another_version_are_refused(
    above: Committee, labelled: list[Atoms], tmp_path: Path
) -> None:
    path, own = tmp_path / "model.orbcalc", labelled[0].copy()
    worker = BaselineWorker()
    save_model(path, above, {"labels": {"charges": worker.method}})
    own.info[XTB_METHOD] = worker.method
    assert predict(path, [own], baseline="labels")[0]["energy"] < -100
    worker.label([own])
    own.info[XTB_METHOD] = "GFN1-xTB (tblite 0.1.0)"
    for use in (worker.label, lambda some: predict(path, some, baseline="labels")):
        with pytest.raises(LabelConflictError, match=r"H2O has .* labels of .*tblite 0\.1\.0"):
            use([own])
    worker.close()


# ----------------------------------------------------------------------------- training
def test_differences_are_learned(labelled: list[Atoms]) -> None:
    total, above = LabelDataset(labelled, 4.0), LabelDataset(labelled, 4.0, "GFN1-xTB")
    for atoms, whole, rest in zip(labelled, total.targets, above.targets, strict=True):
        assert float(rest.energy) == pytest.approx(atoms.info[REF_ENERGY] - atoms.info[XTB_ENERGY])
        difference = atoms.arrays[REF_FORCES] - atoms.arrays[XTB_FORCES]
        np.testing.assert_allclose(rest.forces, difference)
        assert not rest.has("stress")
        torch.testing.assert_close(rest.charges, whole.charges, equal_nan=True)
    assert any(REF_STRESS in atoms.info for atoms in labelled)


def test_a_reference_label_without_one_of_the_baseline_is_an_error(labelled: list[Atoms]) -> None:
    without, cheap = labelled[0].copy(), labelled[1].copy()
    del without.info[XTB_ENERGY]
    with pytest.raises(MissingLabelError, match="H2O has REF_energy, but no GFN1_energy"):
        LabelDataset([without], 4.0, "GFN1-xTB")
    del cheap.info[REF_ENERGY], cheap.arrays[REF_FORCES]
    assert not LabelDataset([cheap], 4.0, "GFN1-xTB").labelled(["energy", "forces"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"potential": {**ABOVE, "xtb_head": "baseline"}}, "one energy cannot have both"),
        ({"potential": ABOVE, "tasks": {"stress": 1}}, "hold no stress"),
        ({"potential": ABOVE, "reference_energies": {"H": -13.6}}, "they are fitted"),
    ],
)
def test_what_a_computed_baseline_excludes(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"train": "a.extxyz", **data}, TrainConfig)


def test_the_pool_of_a_run_needs_the_labels_of_the_baseline() -> None:
    data = {"pool": {"structures": "a.extxyz"}, "potential": ABOVE}
    with pytest.raises(ConfigError, match=r"set pool\.charges: true"):
        parse_config(data, RunConfig)
    data["pool"]["charges"] = True
    assert parse_config(data, RunConfig).potential.baseline == "GFN1-xTB"


@pytest.mark.parametrize(("cheap_only", "head"), [(False, "none"), (True, "task")])
def test_cheap_structures_make_its_energy_a_task(cheap_only: bool, head: str) -> None:
    config = parse_config({"train": "a.extxyz", "potential": ABOVE}, TrainConfig)
    assert config.resolved(cheap_only=cheap_only).potential.xtb_head == head


def test_labels_are_added_where_they_are_missing(labelled: list[Atoms]) -> None:
    some = [labelled[0].copy(), labelled[1].copy()]
    expected, kept = some[0].info.pop(XTB_ENERGY), some[1].info[XTB_ENERGY]
    del some[0].arrays[XTB_FORCES]
    worker = BaselineWorker()
    worker.label(some)
    worker.close()
    assert some[0].info[XTB_ENERGY] == pytest.approx(expected, abs=1e-6)
    assert some[1].info[XTB_ENERGY] == kept
    with pytest.raises(StructureError, match="GFN1-xTB"):
        BaselineWorker().label([as_slab(structures.water())])


def test_the_default_is_none() -> None:
    assert PotentialConfig().baseline == "none"
