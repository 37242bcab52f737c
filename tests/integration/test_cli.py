"""The command as it is used: its exit codes, its words, and what it leaves on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from distributed import Client
from killed_run import Story
from small_runs import run_data, start_cli, train_config, waters, write_pool, write_yaml
from structures import ammonium

from orbcalc.config import dump_config
from orbcalc.labels.label import LabelStatus
from orbcalc.labels.store import LabelStore
from orbcalc.model.checkpoint import load_model, save_model
from orbcalc.prediction import predict
from orbcalc.properties import REF_ENERGY, REF_FORCES, XTB_BLOCKS, XTB_ENERGY
from orbcalc.results import results_of
from orbcalc.structures import read_structures, structure_key
from orbcalc.training.run import train

Cli = Callable[..., Any]

COMMANDS = ("label", "train", "evaluate", "run", "check", "info", "report", "schema")
ANSI = re.compile("\x1b\\[")


@pytest.fixture(scope="module")
def model(labelled_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committee of two that was trained on water."""
    path = tmp_path_factory.mktemp("model") / "model.orbcalc"
    train(train_config(labelled_file, path, committee=2))
    return path


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Thirty waters."""
    return write_pool(tmp_path / "pool.extxyz", waters(30))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a folder of our own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ----------------------------------------------------------------------------- usage
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(cli: Cli, command: str) -> None:
    found = cli(command, "--help")
    assert found.code == 0
    assert f"Usage: orbcalc {command}" in found.out


def test_the_help_lists_all_commands(cli: Cli) -> None:
    found = cli("--help")
    assert found.code == 0
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", found.out)


@pytest.mark.parametrize("arguments", [("fly",), ("run",), ("run", "a.yaml", "--fast"), ()])
def test_a_wrong_command_line_is_exit_code_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    assert cli(*arguments).code == 2


# -------------------------------------------------------------------- configurations
@pytest.mark.parametrize("command", ["run", "train", "check"])
def test_a_missing_configuration_is_named(cli: Cli, here: Path, command: str) -> None:
    found = cli(command, "none.yaml")
    assert found.code == 2
    assert "error: cannot read the configuration none.yaml" in found.err


def test_bad_yaml_is_told_with_its_place(cli: Cli, here: Path) -> None:
    Path("bad.yaml").write_text("pool: {structures: [a.xyz\n")
    found = cli("run", "bad.yaml")
    assert found.code == 2
    assert "error: bad.yaml is not valid YAML" in found.err
    assert "line 2" in found.err


def test_an_unknown_key_names_the_nearest(cli: Cli, here: Path, pool: Path) -> None:
    data = run_data(pool, here / "run", optimizer={"learning_rat": 0.1})
    data["certificat"] = {}
    found = cli("run", write_yaml(Path("run.yaml"), data))
    assert found.code == 2
    assert "unknown key 'learning_rat' in [optimizer]; did you mean 'learning_rate'?\n" in found.err
    assert "unknown key 'certificat'; did you mean 'certificate'?" in found.err
    assert not (here / "run").exists()


def test_a_pool_file_that_is_missing_is_named(cli: Cli, here: Path) -> None:
    data = run_data(here / "none.xyz", here / "run")
    found = cli("run", write_yaml(Path("run.yaml"), data))
    assert found.code == 1
    assert f"cannot read structures from {here / 'none.xyz'}" in found.err


def test_check_finds_no_fault_and_times_one_label(cli: Cli, here: Path, pool: Path) -> None:
    structures = ase.io.read(pool, ":")
    copies = write_pool(here / "copies.extxyz", [*structures, structures[0]])
    data = run_data(copies, here / "run", stop={"max_labels": 20})
    found = cli("check", write_yaml(Path("run.yaml"), data))
    assert found.code == 0, found.err
    assert "pool: 30 structures from files, 0 to start MD from" in found.out  # 31 with a copy
    assert "with 10 of 30 structures labelled, 11 in an audit without a miss prove" in found.out
    assert "that 90 % are right; selection.audit is 4: raise it to certify" in found.out
    assert "stop.max_labels, 20, ends the run before that" in found.out
    assert re.search(r"charges label of H2O: ok in \d+\.\d\d s by GFN1-xTB \(tblite", found.out)
    assert re.search(r"reference label of H2O: ok in \d+\.\d\d s by GFN2-xTB \(tblite", found.out)
    assert not (here / "run").exists()


def test_check_refuses_what_a_training_would(
    cli: Cli, here: Path, labelled_file: Path, labelled_waters: list[Atoms]
) -> None:
    other = labelled_waters[0].copy()
    other.numbers[0] = 16
    valid = write_pool(here / "valid.extxyz", [other])
    config = train_config(labelled_file, here / "m.orbcalc", valid=str(valid))
    Path("train.yaml").write_text(dump_config(config))
    found = cli("check", "train.yaml")
    assert found.code == 2
    assert "the validation set has S" in found.err


def test_check_knows_the_labels_of_a_training(cli: Cli, here: Path, labelled_file: Path) -> None:
    config = train_config(labelled_file, here / "m.orbcalc", tasks={"stress": 1})
    Path("train.yaml").write_text(dump_config(config))
    found = cli("check", "train.yaml")
    assert found.code == 1
    assert "30 structures, labels: {'energy': 30, 'forces': 30, 'stress': 0," in found.out
    assert "task 'stress' needs REF_stress" in found.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid": ["none.extxyz"]}, "none.extxyz"),
        ({"start_from": "none.orbcalc"}, "none.orbcalc"),
        ({"reference_energies": {"O": -100.0}}, r"missing elements \['H'\]"),
    ],
)
def test_check_reads_all_that_a_training_needs(
    cli: Cli, here: Path, labelled_file: Path, change: dict[str, Any], message: str
) -> None:
    config = train_config(labelled_file, here / "m.orbcalc", **change)
    Path("train.yaml").write_text(dump_config(config))
    found = cli("check", "train.yaml")
    assert found.code in (1, 2)  # of the data, or of the configuration
    assert re.search(message, found.err.replace("\n", " "))


@pytest.mark.parametrize("name", ["run", "train"])
def test_the_schema_is_json(cli: Cli, name: str) -> None:
    found = cli("schema", name)
    assert found.code == 0
    assert "optimizer" in json.loads(found.out)["properties"]
    assert not ANSI.search(found.out)


def test_an_unknown_schema_is_refused(cli: Cli) -> None:
    found = cli("schema", "life")
    assert found.code == 2
    assert "there is no schema 'life'; give one of run, train" in found.err


# --------------------------------------------------------------------------- labels
def label(cli: Cli, client: Client, *arguments: str | Path) -> Any:
    """Label on the shared cluster."""
    return cli("label", *arguments, "--dask", client.scheduler.address)


def test_label_writes_what_training_reads(cli: Cli, client: Client, here: Path) -> None:
    path = write_pool(here / "x.xyz", waters(5))
    found = label(cli, client, path, path, "-o", here / "out.extxyz")
    assert found.code == 0, found.err
    assert f"10 structures -> {here / 'out.extxyz'} (labels kept in {here / 'out.db'})" in found.out
    assert re.search(r"^reference: \d+\.\d s, 5 ok|^reference: 5 ok", found.out, re.MULTILINE)
    labelled = ase.io.read(here / "out.extxyz", ":")
    assert all(REF_ENERGY in a.info and XTB_BLOCKS in a.arrays for a in labelled)
    given = [*read_structures(path), *read_structures(path)]  # copies stay, in their order
    assert [structure_key(a) for a in labelled] == [structure_key(a) for a in given]


def test_label_keeps_what_files_say_of_structures(cli: Cli, client: Client, here: Path) -> None:
    """Also where the label comes from a store that has seen the structure before."""
    for name in ("first", "corrected"):
        structures = waters(2)
        for atoms in structures:
            atoms.info["name"] = name
            atoms.set_array("atomtypes", np.array(["OW", "HW", "HW"]))
            atoms.set_array("site", np.arange(3))
        path = write_pool(here / "x.extxyz", structures)
        found = label(cli, client, path, "-o", here / "out.extxyz", "--reference", "none")
        assert found.code == 0, found.err
        for atoms in ase.io.read(here / "out.extxyz", ":"):
            assert atoms.info["name"] == name
            assert list(atoms.arrays["atomtypes"]) == ["OW", "HW", "HW"]
            assert list(atoms.arrays["site"]) == [0, 1, 2]
            assert XTB_BLOCKS in atoms.arrays


def test_label_computes_only_what_its_store_lacks(cli: Cli, client: Client, here: Path) -> None:
    path = write_pool(here / "x.xyz", waters(4))
    store = here / "s.db"
    label(cli, client, path, "--store", store, "--reference", "none")
    cheap = LabelStore(store)
    before = {key: cheap.get(key, "charges") for key in cheap.keys("charges")}
    assert len(before) == 4
    assert cheap.keys("reference") == []
    found = label(cli, client, path, "--store", store)
    assert found.code == 0, found.err
    after = LabelStore(store)
    assert len(after.keys("reference", LabelStatus.ok)) == 4
    for key, charges in before.items():
        again = after.get(key, "charges")
        assert charges is not None
        assert again is not None
        assert again.wall_time_s == charges.wall_time_s


def test_label_computes_what_a_stored_label_lacks(cli: Cli, client: Client, here: Path) -> None:
    path, out = write_pool(here / "x.xyz", waters(2)), "new/folder/f.extxyz"
    label(cli, client, path, "-o", out, "--no-charges", "--no-forces")
    assert "REF_forces" not in ase.io.read(out).arrays
    found = label(cli, client, path, "-o", out, "--no-charges")
    assert found.code == 0, found.err
    assert all("REF_forces" in atoms.arrays for atoms in ase.io.read(out, ":"))


@pytest.mark.parametrize("more", [0, 1])
def test_label_refuses_a_store_of_another_method(
    cli: Cli, client: Client, here: Path, more: int
) -> None:
    """Before anything is computed, and also where nothing is missing."""
    structures = waters(3)
    path = write_pool(here / "x.extxyz", structures[: 3 - more])
    label(cli, client, path, "-o", "f.extxyz", "--no-charges")
    before = Path("f.extxyz").read_bytes()
    path = write_pool(here / "x.extxyz", structures)
    options = ("--no-charges", "--reference", "ase.calculators.emt:EMT")
    found = label(cli, client, path, "-o", "f.extxyz", *options)
    assert found.code == 1
    assert "holds reference labels of GFN2-xTB" in found.err
    assert len(LabelStore("f.db").keys()) == 3 - more
    assert Path("f.extxyz").read_bytes() == before


def test_label_refuses_another_label_of_a_file(cli: Cli, client: Client, here: Path) -> None:
    structures = waters(2)
    for energy, is_refused in ((-10.0, False), (-10.0 + 1e-8, False), (-11.0, True)):
        structures[1].info[REF_ENERGY] = energy
        structures[0].info[REF_ENERGY] = -10.0
        path = write_pool(here / "x.xyz", structures)
        options = ("--reference", "file", "--no-charges", "--no-forces")
        found = label(cli, client, path, "-o", "f.extxyz", *options)
        assert found.code == is_refused, found.err
    assert "has another label (energy) than in f.db" in found.err
    assert ase.io.read("f.extxyz", -1).info[REF_ENERGY] == -10.0


def test_label_refuses_copies_with_unlike_labels(cli: Cli, client: Client, here: Path) -> None:
    structures = [*waters(1), *waters(1)]
    for energy, is_refused in ((-10.0, False), (-11.0, True)):
        for atoms, own in zip(structures, (-10.0, energy), strict=True):
            atoms.info[REF_ENERGY] = own
        path = write_pool(here / "x.xyz", structures)
        options = ("--reference", "file", "--no-charges", "--no-forces")
        found = label(cli, client, path, "-o", "g.extxyz", *options)
        assert found.code == is_refused, found.err
    assert "H2O is there twice, with unlike labels (energy)" in found.err


def test_label_writes_no_labels_that_were_not_asked_for(
    cli: Cli, client: Client, here: Path
) -> None:
    path = write_pool(here / "x.xyz", waters(2))
    assert label(cli, client, path, "-o", "all.extxyz").code == 0
    for name, option in (("cheap", ("--reference", "none")), ("dear", ("--no-charges",))):
        out = here / f"{name}.extxyz"
        assert label(cli, client, path, "-o", out, "--store", here / "all.db", *option).code == 0
        atoms = ase.io.read(out)
        assert ((REF_ENERGY in atoms.info), (XTB_ENERGY in atoms.info)) == (
            name == "dear",
            name == "cheap",
        )
        assert (XTB_BLOCKS in atoms.arrays) == (name == "cheap")


def test_no_output_takes_the_place_of_a_label_store(
    cli: Cli, here: Path, model: Path, label_store: Path, labelled_file: Path
) -> None:
    before = label_store.read_bytes()
    for arguments in (("label", labelled_file), ("evaluate", model, labelled_file)):
        found = cli(*arguments, "-o", label_store)
        assert found.code == 2
        assert "Name it .extxyz or .xyz." in found.err
    assert label_store.read_bytes() == before


def test_a_label_store_is_labelled_with_its_charges(cli: Cli, client: Client, here: Path) -> None:
    path = write_pool(here / "x.extxyz", [ammonium()])
    label(cli, client, path, "-o", "first.extxyz", "--no-charges")
    found = label(cli, client, here / "first.db", "-o", "second.extxyz", "--no-charges")
    assert found.code == 0, found.err
    first, second = ase.io.read("first.extxyz"), ase.io.read("second.extxyz")
    assert second.info["charge"] == 1
    assert second.info[REF_ENERGY] == first.info[REF_ENERGY]


def test_what_a_calculator_cannot_do_is_recorded_and_told(
    cli: Cli, client: Client, here: Path
) -> None:
    structures = waters(4)
    structures[0].positions[:, 2] += 200
    structures[1].positions[:, 2] += 70
    path = write_pool(here / "x.xyz", structures)
    calculator = "small_runs:FussyCalculator"
    found = label(cli, client, path, "--reference", calculator, "--no-charges", "-o", "o.extxyz")
    assert found.code == 0
    assert "2 labels failed, now or before:" in found.err
    assert "tried again with --retry-failed" in found.err
    assert "no convergence [in 3 cycles] /tmp/log" in found.err
    told = cli("info", "o.db")
    assert "  1 x reference, failed: not finite: energy" in told.err
    labelled = ase.io.read("o.extxyz", ":")
    assert [REF_ENERGY in atoms.info for atoms in labelled] == [False, False, True, True]
    store = LabelStore("o.db")
    failure = store.get(structure_key(structures[0]), "reference")
    assert failure is not None
    assert failure.status is LabelStatus.failed
    assert "no convergence [in 3 cycles] /tmp/log" in failure.message


def test_failed_labels_are_tried_again_when_asked(cli: Cli, client: Client, here: Path) -> None:
    path, licence = write_pool(here / "x.extxyz", waters(2)), here / "licence"
    options = (
        *(path, "-o", "o.extxyz", "--no-charges", "--reference", "small_runs:WhileThereIs"),
        *("--arguments", json.dumps({"path": str(licence)})),
    )
    assert "2 labels failed" in label(cli, client, *options).err
    licence.touch()
    assert "2 labels failed" in label(cli, client, *options).err
    found = label(cli, client, *options, "--retry-failed")
    assert found.code == 0
    assert "failed" not in found.err
    assert all(REF_ENERGY in atoms.info for atoms in ase.io.iread("o.extxyz"))


@pytest.mark.parametrize(
    ("calculator", "message"),
    [
        ("no.such:Thing", "'no.such:Thing' with arguments {} cannot be made: ModuleNotFoundError"),
        ("Thing", "'Thing' is unknown: give 'GFN2-xTB', 'pyscf', 'file' or the import path"),
    ],
)
def test_an_unknown_calculator_is_exit_code_2(
    cli: Cli, client: Client, here: Path, calculator: str, message: str
) -> None:
    path = write_pool(here / "x.xyz", waters(2))
    found = label(cli, client, path, "--reference", calculator, "--no-charges")
    assert found.code == 2
    assert message in found.err
    assert len(LabelStore("labelled.db")) == 0


def test_arguments_must_be_json(cli: Cli, here: Path) -> None:
    path = write_pool(here / "x.xyz", waters(1))
    for text, message in (("{", "--arguments is not JSON"), ("3", "must be a JSON object, got 3")):
        found = cli("label", path, "--arguments", text)
        assert found.code == 2
        assert message in found.err
    found = cli("label", path, "--reference", "none", "--no-charges")
    assert found.code == 2
    assert "nothing to label" in found.err


def test_file_labels_that_are_missing_are_counted_and_nothing_is_started(
    cli: Cli, here: Path, labelled_waters: list[Atoms], monkeypatch: pytest.MonkeyPatch
) -> None:
    structures = [atoms.copy() for atoms in labelled_waters]
    for atoms in structures[10:]:
        del atoms.info[REF_ENERGY]
    pool = write_pool(here / "pool.extxyz", structures)
    data = run_data(pool, here / "run", labels={"reference": {"calculator": "file"}})
    config = write_yaml(here / "run.yaml", data)
    monkeypatch.setattr("orbcalc.active.loop.open_executor", pytest.fail)
    for command in ("run", "check"):
        found = cli(command, config)
        assert found.code == 1
        assert "REF_energy: 10 of 30, REF_forces: 30 of 30; structure 10, H2O" in found.err
    assert not (here / "run" / "labels.db").exists()


# ----------------------------------------------------------------- train and evaluate
def test_train_and_evaluate(cli: Cli, here: Path, labelled_file: Path) -> None:
    config = train_config(labelled_file, Path("m.orbcalc"))
    Path("train.yaml").write_text(dump_config(config))
    found = cli("train", "train.yaml")
    assert found.code == 0, found.err
    assert "model written to m.orbcalc, metrics to m.metrics.jsonl" in found.out
    assert re.search(r"^member 0 step 20/20 energy MAE \d+\.\d\d meV/atom", found.err, re.MULTILINE)
    assert len(Path("m.metrics.jsonl").read_text().splitlines()) == 2
    found = cli("evaluate", "m.orbcalc", labelled_file, "--json")
    assert found.code == 0, found.err
    errors = json.loads(found.out)
    assert errors["structures"] == 30
    assert {"energy_mae", "forces_rmse", "charges_mae"} <= set(errors)
    table = cli("evaluate", "m.orbcalc", labelled_file).out
    assert "30 structures" in table
    assert f"{1000 * errors['energy_mae']:.3f}" in table
    labelled = read_structures(labelled_file)
    pairs = list(zip(predict("m.orbcalc", labelled), labelled, strict=True))
    hits = [abs(p["energy"] - a.info[REF_ENERGY]) <= p["energy_uncertainty"] for p, a in pairs]
    # The limits are errors of held-out structures, which are among these: rounding decides.
    assert errors["energy_within_68"] == pytest.approx(np.mean(hits), abs=1.5 / 30)
    hits = [
        abs(p["forces"] - a.arrays[REF_FORCES]) <= p["forces_interval_95"][:, None]
        for p, a in pairs
    ]
    assert errors["forces_within_95"] == pytest.approx(np.mean(hits), abs=0.01)
    assert f"{100 * errors['forces_within_95']:.1f} %" in table
    assert "stress" not in table


def test_evaluate_writes_its_predictions(
    cli: Cli, here: Path, model: Path, labelled_file: Path
) -> None:
    found = cli("evaluate", model, labelled_file, "--json", "-o", "out/predicted.extxyz")
    assert found.code == 0, found.err
    frames = ase.io.read("out/predicted.extxyz", ":")
    errors = [abs(a.get_potential_energy() - a.info[REF_ENERGY]) / len(a) for a in frames]
    mae = json.loads(found.out)["energy_mae"]
    assert sum(errors) / len(errors) == pytest.approx(mae, rel=1e-3)
    for atoms in frames:
        assert results_of(atoms)["forces_uncertainty"].shape == (3,)


def test_evaluate_writes_predictions_of_a_model_without_charges(
    cli: Cli, here: Path, labelled_file: Path
) -> None:
    options = {"potential": {"charge_head": "none"}, "tasks": {"charges": 0}}
    train(train_config(labelled_file, Path("m.orbcalc"), **options))
    found = cli("evaluate", "m.orbcalc", labelled_file, "-o", "predicted.extxyz")
    assert found.code == 0, found.err
    assert "charges" not in results_of(ase.io.read("predicted.extxyz"))


def test_evaluate_writes_forces_without_labels_of_them(
    cli: Cli, here: Path, model: Path, labelled_waters: list[Atoms]
) -> None:
    structures = [atoms.copy() for atoms in labelled_waters[:3]]
    for atoms in structures:
        del atoms.arrays[REF_FORCES]
    path = write_pool(here / "x.extxyz", structures)
    assert cli("evaluate", model, path, "-o", "predicted.extxyz").code == 0
    for atoms in ase.io.read("predicted.extxyz", ":"):
        assert results_of(atoms)["forces"].shape == (3, 3)


def test_evaluate_keeps_every_structure(
    cli: Cli, here: Path, model: Path, labelled_waters: list[Atoms]
) -> None:
    twice = [labelled_waters[i] for i in (0, 1, 0, 2)]
    path = write_pool(here / "x.extxyz", twice)
    found = cli("evaluate", model, path, "--json", "-o", "predicted.extxyz")
    assert json.loads(found.out)["structures"] == 4
    for atoms, predicted in zip(twice, ase.io.read("predicted.extxyz", ":"), strict=True):
        assert structure_key(predicted) == structure_key(atoms)


def test_evaluate_refuses_an_element_it_does_not_know(cli: Cli, here: Path, model: Path) -> None:
    found = cli("evaluate", model, write_pool(here / "x.extxyz", [molecule("CH3SH")]))
    assert found.code == 1
    assert "atom 0 is C, but this potential covers H O" in found.err


def test_evaluate_without_labels_says_so(cli: Cli, here: Path, model: Path) -> None:
    found = cli("evaluate", model, write_pool(here / "x.extxyz", waters(2)))
    assert found.code == 1
    assert "no labels to compare with in 2 structures" in found.err


def test_a_model_that_predicts_nan_fails(
    cli: Cli, here: Path, model: Path, labelled_file: Path
) -> None:
    committee, _ = load_model(model)
    with torch.no_grad():
        for parameter in committee.parameters():
            parameter *= 1e30
    save_model("broken.orbcalc", committee)
    found = cli("evaluate", "broken.orbcalc", labelled_file)
    assert found.code == 1
    assert "the model predicts NaN for some of these structures" in found.err


@pytest.mark.parametrize("command", ["evaluate", "info"])
def test_a_file_that_is_no_model_is_refused(
    cli: Cli, here: Path, labelled_file: Path, command: str
) -> None:
    Path("m.orbcalc").write_text("hello")
    arguments = ("m.orbcalc", labelled_file)[: 2 if command == "evaluate" else 1]
    found = cli(command, *arguments)
    assert found.code == 1
    assert "m.orbcalc is no orbcalc model, or it is damaged" in found.err
    found = cli(command, "none.orbcalc", *arguments[1:])
    assert found.code == 1
    assert "cannot read none.orbcalc" in found.err


# ------------------------------------------------------------------------------- info
def test_info_of_a_model(cli: Cli, model: Path) -> None:
    found = cli("info", model)
    assert found.code == 0
    assert f"{model}: 2 member(s) of " in found.out
    assert "elements H O, cutoff 4.0 Å, charges: equivariant, energy: network" in found.out
    assert "GFN2-xTB (tblite" in found.out


def test_info_of_a_label_store(cli: Cli, label_store: Path) -> None:
    found = cli("info", label_store)
    assert found.code == 0
    assert found.out.startswith("30 structures\ncharges: GFN1-xTB (tblite")
    assert re.search(r"^reference: .*30 ok", found.out, re.MULTILINE)


def test_info_of_nothing(cli: Cli, here: Path) -> None:
    assert cli("info", "none.db").code == 1
    assert not Path("none.db").exists()
    found = cli("info", here)
    assert found.code == 2
    assert f"{here} is no run folder: it has no config.yaml" in found.err


def test_info_and_report_of_a_run(cli: Cli, story: Story) -> None:
    found = cli("info", story.undisturbed)
    assert found.code == 0
    assert "round 1: audit of 6: " in found.out
    assert found.out.rstrip().endswith("as in MD run with the model.")
    page = story.undisturbed / "report.html"
    page.unlink()
    found = cli("report", story.undisturbed)
    assert found.code == 0
    assert found.out == f"{page}\n"
    assert page.stat().st_size > 0


def test_info_of_a_killed_run_tells_how_to_go_on(cli: Cli, story: Story, here: Path) -> None:
    folder = here / "half"
    folder.mkdir()
    for name in ("config.yaml", "events.jsonl"):
        (folder / name).write_bytes((story.killed / name).read_bytes())
    found = cli("info", folder)
    assert found.code == 0
    assert found.out.rstrip().endswith("`orbcalc run` with its configuration goes on")


def test_report_of_nothing(cli: Cli, here: Path) -> None:
    assert cli("report", here / "none").code in (1, 2)


# -------------------------------------------------------------------------------- run
def test_a_log_has_one_plain_line_for_each_event(story: Story) -> None:
    out, err = story.output
    assert not ANSI.search(out + err)
    lines = err.splitlines()
    assert "round 0: 20 of" not in err
    assert any(re.match(r"round 1: audit of 6: \d misses, MAE ", line) for line in lines)
    assert any(re.match(r"round 1: trained on \d+: .* on \d+ held out$", line) for line in lines)
    assert sum(line.startswith("round 0: trained on") for line in lines) == 1
    assert f"model: {story.undisturbed / 'model.orbcalc'}\n" in out
    assert f"report: {story.undisturbed / 'report.html'}\n" in out
    assert out.startswith("Not certified (max_rounds): with 90 % confidence")
    assert "Traceback" not in err


def test_a_run_without_a_certificate_is_exit_code_1(story: Story) -> None:
    assert story.codes == (1, 1)


def test_a_certified_run_on_an_existing_scheduler(
    cli: Cli, client: Client, here: Path, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgiving = {"tolerance": 100.0, "accuracy": 0.5}
    data = run_data(pool, here / "unused", certificate=forgiving)
    config = write_yaml(here / "run.yaml", data)
    found = cli("run", config, "--dask", client.scheduler.address, "-o", here / "run")
    assert found.code == 0, found.err
    assert found.out.startswith("Certified: with 90 % confidence")
    assert not (here / "unused").exists()
    assert client.status == "running"
    monkeypatch.setattr("orbcalc.active.loop.open_executor", pytest.fail)
    again = cli("run", config, "-o", here / "run")
    assert (again.code, again.out) == (0, found.out)
    changed = write_yaml(here / "run.yaml", {**data, "seed": 99})
    refused = cli("run", changed, "-o", here / "run")
    assert refused.code == 2
    assert "holds a run of another configuration" in refused.err


def test_failures_in_a_run_are_told_and_counted(cli: Cli, client: Client, here: Path) -> None:
    structures = waters(20)
    for atoms in structures[::4]:
        atoms.positions[:, 2] += 200
    data = run_data(
        write_pool(here / "pool.extxyz", structures),
        here / "run",
        labels={"reference": {"calculator": "small_runs:FussyCalculator"}},
    )
    config = write_yaml(here / "run.yaml", data)
    found = cli("run", config, "--dask", client.scheduler.address)
    assert found.code == 1
    assert re.search(r"labelled 10 \(batch\): .*\d failed", found.err)
    certificate = json.loads((here / "run" / "certificate.json").read_text())
    (look,) = certificate["looks"]
    census = LabelStore(here / "run" / "labels.db").census()["reference"]
    assert look["n_failed"] + look["n_audit_failed"] == census["failed"] > 0
    assert look["n_audit_misses"] >= look["n_audit_failed"]


def test_an_address_where_nobody_answers_is_exit_code_2(
    cli: Cli, here: Path, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orbcalc.active.executor.CONNECT_TIMEOUT_S", 1.0)
    config = write_yaml(here / "run.yaml", run_data(pool, here / "run"))
    for address in ("tcp://127.0.0.1:1", "nonsense://x"):
        found = cli("run", config, "--dask", address)
        assert found.code == 2
        assert f"no Dask scheduler answers at {address}" in found.err
        assert "Traceback" not in found.err


def test_the_executable_starts_without_heavy_imports() -> None:
    process = start_cli("--help")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "OPTIONS] COMMAND" in out
    assert err == ""
