"""Few energies and many cheap labels: a network learns the latter, a process the former."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from distributed import Client
from small_runs import run_config, train_config, waters, write_pool
from torch import Tensor

from orbcalc.active.decisions import stream
from orbcalc.active.folder import RunFolder
from orbcalc.active.loop import run
from orbcalc.active.prior import process_columns
from orbcalc.active.selection import draw_audit
from orbcalc.calculator import OrbcalcCalculator
from orbcalc.cli.progress import event_in_words
from orbcalc.cli.tables import print_model
from orbcalc.config import RunConfig, TrainConfig
from orbcalc.errors import ConfigError, MissingLabelError
from orbcalc.files import read_json, read_jsonl
from orbcalc.labels.store import LabelStore
from orbcalc.model.checkpoint import load_model
from orbcalc.model.committee import Committee
from orbcalc.prediction import predict
from orbcalc.properties import POOL_SOURCE, REF_ENERGY, REF_FORCES, REF_METHOD, XTB_ENERGY
from orbcalc.report.reading import read_run
from orbcalc.structures import read_structures, structure_key
from orbcalc.training.run import train


class KillError(Exception):
    """Stands for a kill."""


def few_energies(labelled: list[Atoms], shift: float = 0.0, method: str = "a") -> list[Atoms]:
    """Return structures of which half have an energy, and all have cheap labels."""
    found = []
    for index, atoms in enumerate(labelled):
        atoms = atoms.copy()
        atoms.arrays.pop(REF_FORCES, None)
        if index % 2:
            atoms.info.pop(REF_ENERGY, None)
            atoms.info.pop(REF_METHOD, None)
        else:
            atoms.info[REF_ENERGY] += shift
            atoms.info[REF_METHOD] = method
        found.append(atoms)
    return found


def small_config(path: Path, output: Path, **changes: Any) -> TrainConfig:
    return train_config(path, output, tasks={"forces": 0}, **changes)


def features(model: Committee) -> dict[str, Tensor]:
    """Return all weights but those that the energies decide."""
    own = model.first.state_dict()
    decided = ("energy_head", "whitening", "atom_whitening", "told")
    return {name: value for name, value in own.items() if not name.startswith(decided)}


def test_it_is_the_default_where_energies_are_few(
    labelled_waters: list[Atoms], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_pool(tmp_path / "waters.extxyz", few_energies(labelled_waters))
    records: list[dict[str, Any]] = []
    config = small_config(path, tmp_path / "a.orbcalc")
    model = train(config, lambda record: records.append(dict(record)))
    assert model.first.config.energy_head == "process"
    assert model.first.n_inducing > 0
    assert [record["step"] for record in records] == [10, 20, 20]
    _, metadata = load_model(config.output)
    assert metadata["valid_errors"]["energy_mae"] == pytest.approx(records[-1]["energy_mae"], 1e-3)
    assert metadata["config"]["potential"]["energy_head"] == "process"
    print_model(config.output)
    above = "above a learned GFN1-xTB energy"
    assert f"energy: process of {model.first.n_inducing} atoms {above}" in capsys.readouterr().out
    water = waters(1)[0]
    water.calc = OrbcalcCalculator(config.output)
    assert water.get_potential_energy() == pytest.approx(
        labelled_waters[0].info[REF_ENERGY], abs=3.0
    )
    assert water.calc.results["energy_uncertainty"] > 0


@pytest.mark.parametrize(
    "changes",
    [{"tasks": {}}, {"tasks": {"forces": 0}, "potential": {"energy_head": "network"}}],
    ids=["forces", "network"],
)
def test_a_network_is_where_it_is_asked_for_or_forces_are_learned(
    labelled_waters: list[Atoms], tmp_path: Path, changes: dict[str, Any]
) -> None:
    bare = [atoms.copy() for atoms in labelled_waters]
    for atoms in bare[1::2]:
        del atoms.info[REF_ENERGY], atoms.arrays[REF_FORCES], atoms.info[REF_METHOD]
    path = write_pool(tmp_path / "waters.extxyz", bare)
    model = train(train_config(path, tmp_path / "a.orbcalc", **changes))
    assert model.first.config.energy_head == "network"
    assert model.first.config.xtb_head == "baseline"


def test_other_energies_are_fitted_on_the_same_features(
    labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    path = write_pool(tmp_path / "a.extxyz", few_energies(labelled_waters))
    first = train(small_config(path, tmp_path / "first.orbcalc"))
    write_pool(tmp_path / "b.extxyz", few_energies(labelled_waters, -500.0, "b"))
    for name in "ab":
        records: list[dict[str, Any]] = []
        config = small_config(
            tmp_path / f"{name}.extxyz",
            tmp_path / f"{name}.orbcalc",
            start_from=str(tmp_path / "first.orbcalc"),
        )
        second = train(config, lambda record, to=records: to.append(dict(record)))
        assert [record["step"] for record in records] == [20]  # nothing is trained
        for weights, value in features(second).items():
            assert torch.equal(value, features(first)[weights]), weights
        _, metadata = load_model(config.output)
        known = metadata["training_set"]
        assert known["n_train"] == known["n_left_out"] == len(few_energies(labelled_waters)[::2])
        assert known["n_valid"] == 0
        assert metadata["valid_errors"]["energy_mae"] == pytest.approx(
            records[0]["energy_mae"], 1e-3
        )
    ask = waters(5, seed=9)
    (before, after) = (
        [float(OrbcalcCalculator(tmp_path / f"{n}.orbcalc").get_potential_energy(a)) for a in ask]
        for n in "ab"
    )
    assert [b - a for a, b in zip(before, after, strict=True)] == pytest.approx([-500.0] * 5, 1e-4)


def test_energies_do_not_bend_the_features(labelled_waters: list[Atoms], tmp_path: Path) -> None:
    models = []
    for name, shift in (("a", 0.0), ("b", -500.0)):
        path = write_pool(tmp_path / f"{name}.extxyz", few_energies(labelled_waters, shift))
        models.append(train(small_config(path, tmp_path / f"{name}.orbcalc")))
    for name, value in features(models[0]).items():
        assert torch.equal(value, features(models[1])[name]), name


def test_a_killed_training_ends_with_the_same_bits(
    labelled_waters: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pool(tmp_path / "waters.extxyz", few_energies(labelled_waters))
    whole = train(small_config(path, tmp_path / "whole.orbcalc"))
    killed = small_config(path, tmp_path / "killed.orbcalc")
    with monkeypatch.context() as patch:
        patch.setattr("orbcalc.training.trainer.fit_process", _kill)
        with pytest.raises(KillError):
            train(killed)
    again = train(killed)
    for name, value in whole.first.state_dict().items():
        assert torch.equal(value, again.first.state_dict()[name]), name


def _kill(*_: object, **__: object) -> None:
    raise KillError


def test_held_out_structures_need_cheap_labels(
    labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    half = few_energies(labelled_waters)
    bare = [atoms.copy() for atoms in half[::2]]
    for atoms in bare:
        for key in [key for key in (*atoms.info, *atoms.arrays) if key.startswith("GFN1")]:
            atoms.info.pop(key, None)
            atoms.arrays.pop(key, None)
        assert XTB_ENERGY not in atoms.info
    path = write_pool(tmp_path / "train.extxyz", half[1::2] + bare[:10])
    valid = write_pool(tmp_path / "valid.extxyz", bare[10:])
    # Left to the structures it is a network, which can do without them.
    left = small_config(path, tmp_path / "a.orbcalc", valid=str(valid))
    assert train(left).first.config.energy_head == "network"
    asked = small_config(
        path, tmp_path / "b.orbcalc", valid=str(valid), potential={"energy_head": "process"}
    )
    with pytest.raises(MissingLabelError, match="the validation set"):
        train(asked)


def test_features_may_be_learned_before_any_energy(
    labelled_waters: list[Atoms], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cheap = few_energies(labelled_waters)
    ion = Atoms("F", info={"charge": -1})  # an element that no energy is of
    config = train_config(
        write_pool(tmp_path / "cheap.extxyz", [*cheap, ion]),
        tmp_path / "a.orbcalc",
        tasks={"forces": 0, "energy": 0},
        potential={"energy_head": "process"},
    )
    records: list[dict[str, Any]] = []
    first = train(config, lambda record: records.append(dict(record)))
    assert first.first.n_inducing > 0
    assert not first.has_uncertainty
    _, metadata = load_model(config.output)
    for errors in (*records, metadata["valid_errors"]):
        assert "xtb_energy_mae" in errors
        assert "energy_mae" not in errors
    print_model(config.output)
    printed = capsys.readouterr().out
    assert "energy: none learned but that of GFN1-xTB (features" in printed
    assert "xtb_energy" in printed.split("held-out structures")[1]
    [below] = predict(config.output, labelled_waters[:1])
    assert below["energy"] == pytest.approx(labelled_waters[0].info[XTB_ENERGY], abs=3.0)
    few = few_energies(labelled_waters)[::2]
    for atoms in few:  # without cheap labels
        for key in [key for key in (*atoms.info, *atoms.arrays) if key.startswith("GFN1")]:
            atoms.info.pop(key, None)
            atoms.arrays.pop(key, None)
    config = small_config(
        write_pool(tmp_path / "few.extxyz", few),
        tmp_path / "b.orbcalc",
        start_from=str(config.output),
    )
    second = train(config)
    assert second.first.elements == first.first.elements == (1, 8, 9)
    for name, value in features(second).items():
        assert torch.equal(value, features(first)[name]), name
    labels = np.array([atoms.info[REF_ENERGY] for atoms in few])
    found = np.array([result["energy"] for result in predict(config.output, few)])
    assert np.abs(found - labels).mean() < 0.5 * labels.std()


def test_features_of_other_structures_are_trained_on(
    labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    cheap = [atoms for atoms in few_energies(labelled_waters) if REF_ENERGY not in atoms.info]
    paths = [write_pool(tmp_path / f"{n}.extxyz", cheap[n::2]) for n in range(2)]
    alone = {"tasks": {"energy": 0, "forces": 0}, "potential": {"energy_head": "process"}}
    general = train_config(paths[0], tmp_path / "general.orbcalc", **alone)
    before = train(general)
    errors = {}
    for name, start in (("afresh", None), ("on", str(general.output))):
        records: list[dict[str, Any]] = []
        few_steps = {"steps": 4, "evaluate_every": 2, "learning_rate": 1e-3}
        config = train_config(
            paths[1], tmp_path / f"{name}.orbcalc", optimizer=few_steps, start_from=start, **alone
        )
        found = train(config, lambda record, to=records: to.append(dict(record)))
        assert [record["step"] for record in records] == [2, 4]
        errors[name] = records[-1]["charges_mae"]
    assert errors["on"] < 0.7 * errors["afresh"]
    moved = [
        name for name, w in features(found).items() if not torch.equal(w, features(before)[name])
    ]
    assert any("backbone" in name for name in moved)
    assert found.first.n_inducing > 0
    assert not found.first.has_energies
    few = few_energies(labelled_waters)[::2]
    fitted = train(
        small_config(
            write_pool(tmp_path / "few.extxyz", few),
            tmp_path / "fitted.orbcalc",
            start_from=str(tmp_path / "on.orbcalc"),
        )
    )
    for name, value in features(fitted).items():
        assert torch.equal(value, features(found)[name]), name
    again = train_config(
        paths[1], tmp_path / "again.orbcalc", start_from=str(tmp_path / "fitted.orbcalc"), **alone
    )
    assert not train(again).first.has_energies  # those of other features are gone


def test_a_process_does_not_start_from_a_network(
    labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    path = write_pool(tmp_path / "a.extxyz", few_energies(labelled_waters))
    network = small_config(path, tmp_path / "a.orbcalc", potential={"energy_head": "network"})
    train(network)
    config = small_config(
        path,
        tmp_path / "b.orbcalc",
        start_from=str(network.output),
        potential={"energy_head": "process"},
    )
    with pytest.raises(ConfigError, match="has no features for this training"):
        train(config)


def run_on(pool: Path, output: Path, /, **changes: Any) -> RunConfig:
    """Return the configuration of a run that learns energies above cheap labels of its pool."""
    options: dict[str, Any] = {
        "labels": {"reference": {"calculator": "file"}, "forces": False},
        "tasks": {"forces": 0},
        "pool": {"charges": True},
        "stop": {"max_rounds": 2},
        "committee": 1,
    }
    return run_config(pool, output, **{**options, **changes})


@pytest.fixture
def pool(labelled_waters: list[Atoms], tmp_path: Path) -> Path:
    """Structures with energies, and without forces."""
    bare = [atoms.copy() for atoms in labelled_waters]
    for atoms in bare:
        del atoms.arrays[REF_FORCES]
    return write_pool(tmp_path / "pool.extxyz", bare)


def first_batch(config: RunConfig) -> list[str]:
    found: list[str] = read_json(config.output / "rounds" / "000" / "selection.json")["batch"]
    return found


def test_a_run_trains_features_on_that_others_have_taught(
    client: Client, pool: Path, labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    alone = {"tasks": {"energy": 0, "forces": 0}, "potential": {"energy_head": "process"}}
    path = write_pool(tmp_path / "others.extxyz", labelled_waters)
    general = tmp_path / "general.orbcalc"
    train(train_config(path, general, **alone))
    few_steps = {"steps": 2, "evaluate_every": 2, "learning_rate": 1e-3}
    errors = {}
    for name, start in (("afresh", None), ("on", str(general))):
        config = run_on(
            pool,
            tmp_path / name,
            committee=2,
            optimizer=few_steps,
            pool={"charges": True, "features": start},
            potential={"energy_head": "process"},
            stop={"max_rounds": 1},
        )
        run(config, client=client)
        records = read_jsonl(config.output / "metrics.jsonl")
        errors[name] = [record["charges_mae"] for record in records if record["step"] == 2][:2]
    assert max(errors["on"]) < 0.7 * min(errors["afresh"])
    a, b = load_model(tmp_path / "on" / "features" / "model.orbcalc")[0].members
    weights = ("backbone.elements.weight",)
    assert all(not torch.equal(a.state_dict()[w], b.state_dict()[w]) for w in weights)
    general.write_bytes(b"another")
    with pytest.raises(ConfigError, match=r"general\.orbcalc has changed"):
        run(config, client=client)


def test_features_that_do_not_fit_are_refused_before_any_label(
    client: Client, pool: Path, labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    alone = {"tasks": {"energy": 0, "forces": 0}, "potential": {"energy_head": "process"}}
    path = write_pool(tmp_path / "others.extxyz", labelled_waters)
    general = tmp_path / "general.orbcalc"
    train(train_config(path, general, **alone))
    salty = write_pool(tmp_path / "salty.extxyz", [*read_structures(pool), molecule("NaCl")])
    for number, (file, head, reason) in enumerate(
        [
            (salty, {}, "it does not know Na, Cl"),
            (pool, {"channels": 4}, "its channels is 8, not 4"),
        ]
    ):
        config = run_on(
            file,
            tmp_path / f"run{number}",
            pool={"charges": True, "features": str(general)},
            potential={"energy_head": "process", **head},
            labels={"reference": {"calculator": "GFN2-xTB"}, "forces": False},
        )
        with pytest.raises(ConfigError, match=rf"general\.orbcalc does not fit .*{reason}"):
            run(config, client=client)
        assert not (config.output / "labels.db").exists()


def test_a_run_trains_once_and_then_fits(client: Client, pool: Path, tmp_path: Path) -> None:
    config = run_on(pool, tmp_path / "run", committee=2)
    run(config, client=client)
    rounds = [record["round"] for record in read_jsonl(config.output / "metrics.jsonl")]
    assert rounds == 2 * [0, 0, 0] + 2 * [1]
    [learned] = [e for e in read_jsonl(config.output / "events.jsonl") if e["event"] == "features"]
    n_pool = len(read_structures(pool))
    assert learned["n_cheap"] + learned["n_valid"] == n_pool
    assert "features learned from the cheap labels" in event_in_words(learned)
    assert f"cheap labels of {learned['n_cheap']} structures" in str(read_run(config.output).model)
    first, second = (
        load_model(config.output / "rounds" / number / "model.orbcalc")[0]
        for number in ("000", "001")
    )
    for name, value in features(second).items():
        assert torch.equal(value, features(first)[name]), name
    assert second.first.n_inducing > first.first.n_inducing
    assert len(second.members) == 2


def test_a_run_holds_nothing_out_and_predicts_above_the_labels(
    client: Client, pool: Path, tmp_path: Path
) -> None:
    config = run_on(pool, tmp_path / "run", stop={"max_rounds": 2})
    run(config, client=client)
    folder = RunFolder(config.output)
    trained = [e for e in read_jsonl(config.output / "events.jsonl") if e["event"] == "trained"]
    for number, event in enumerate(trained):
        files = folder.round(number)
        assert not (files.folder / "valid.extxyz").exists()
        n_known = len(read_structures(files.folder / "train.extxyz"))
        assert event["n_train"] == event["n_left_out"] == n_known
        assert event["n_valid"] == 0
        assert "each left out in turn" in event_in_words(event)
    assert "each left out in turn" in str(read_run(config.output).model)
    answered = [
        atoms
        for atoms in read_structures(folder.results)
        if atoms.info[POOL_SOURCE] == "prediction"
    ]
    store = LabelStore(folder.labels)
    with_labels = store.labelled_atoms([structure_key(atoms) for atoms in answered])
    expected = predict(folder.model, with_labels, baseline="labels")
    learned = predict(folder.model, answered)
    assert len(answered) > 0
    for atoms, own, other in zip(answered, expected, learned, strict=True):
        assert atoms.get_potential_energy() == pytest.approx(own["energy"], abs=1e-5)
        assert abs(own["energy"] - other["energy"]) > 1e-4


def test_a_run_begins_with_what_tells_most(client: Client, pool: Path, tmp_path: Path) -> None:
    config = run_on(pool, tmp_path / "run", stop={"max_rounds": 1})
    run(config, client=client)
    folder = RunFolder(config.output)
    committee, _ = load_model(folder.features.model)
    known = folder.pool(1)
    order = stream(config.seed, 0, "batch").permutation(len(known))
    structures = [[*known.values()][i] for i in order]
    last = [r["last_layer"].sum(0) for r in predict(committee, structures, ("last_layer",))]
    n_elements = len(committee.first.elements)
    columns = process_columns(np.array(last)[:, :-n_elements], np.array(last)[:, -n_elements:])
    size = config.selection.initial
    left = _left_unknown(columns)
    keys = [[*known][i] for i in order]
    chosen = [keys.index(key) for key in first_batch(config)]
    assert len(set(chosen)) == size
    draws = [np.random.default_rng(k).permutation(len(keys))[:size].tolist() for k in range(50)]
    assert left(chosen) < min(left(draw) for draw in draws)


def _left_unknown(columns: np.ndarray) -> Callable[[list[int]], float]:
    def left(chosen: list[int]) -> float:
        own = columns[chosen]
        gain = np.linalg.solve(own @ own.T + 1e-2 * np.eye(len(own)), own @ columns.T)
        return float((columns**2).sum() - ((own @ columns.T) * gain).sum())

    return left


@pytest.mark.parametrize(
    "changes",
    [
        {"selection": {"method": "random"}},
        {"potential": {"energy_head": "network"}},
        {"pool": {"charges": False}},
    ],
    ids=["random", "network", "no cheap labels"],
)
def test_otherwise_it_begins_at_random(
    client: Client, pool: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = run_on(pool, tmp_path / "run", **changes, stop={"max_rounds": 1})
    run(config, client=client)
    drawn = draw_audit(len(read_structures(pool)), 10, stream(config.seed, 0, "batch"))
    keys = [*RunFolder(config.output).pool(1)]
    assert first_batch(config) == [keys[i] for i in drawn]
    assert RunFolder(config.output).features.model.exists() == ("selection" in changes)


def test_a_pool_with_lone_atoms_has_a_network(
    client: Client, labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    lone = Atoms("O", info={REF_ENERGY: -400.0, REF_METHOD: labelled_waters[0].info[REF_METHOD]})
    pool = write_pool(tmp_path / "pool.extxyz", [*labelled_waters, lone])
    config = run_on(pool, tmp_path / "run", stop={"max_rounds": 1})
    run(config, client=client)
    model, _ = load_model(config.output / "rounds" / "000" / "model.orbcalc")
    assert model.first.config.energy_head == "network"


def test_lone_atoms_are_not_labelled_first(
    client: Client, labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    method = labelled_waters[0].info[REF_METHOD]
    lone = [Atoms(z, info={REF_ENERGY: -400.0, REF_METHOD: method}) for z in "OH"]
    pool = write_pool(tmp_path / "pool.extxyz", [*labelled_waters, *lone])
    config = run_on(
        pool,
        tmp_path / "run",
        stop={"max_rounds": 1},
        potential={"energy_head": "process"},
        labels={"reference": {"calculator": "file"}, "forces": False},
    )
    run(config, client=client)
    known = RunFolder(config.output).pool(1)
    assert all(len(known[key]) > 1 for key in first_batch(config))


def test_what_features_do_not_know_is_labelled_and_not_learned(
    client: Client, labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    """GFN1-xTB has no uranium: such structures are hardest, and leave the process as it is."""
    info = {REF_ENERGY: -900.0, REF_METHOD: labelled_waters[0].info[REF_METHOD]}
    odd = [Atoms("UO2", [[0, 0, 0], [0, 0, z], [0, 0, -z]], info=info) for z in (1.7, 1.8, 1.9)]
    pool = write_pool(tmp_path / "pool.extxyz", [*labelled_waters, *odd])
    config = run_on(pool, tmp_path / "run", stop={"max_rounds": 2})
    run(config, client=client)
    selections = [
        read_json(config.output / "rounds" / number / "selection.json") for number in ("000", "001")
    ]
    known = RunFolder(config.output).pool(1)
    drawn = [[known[key].get_chemical_formula() for key in own["batch"]] for own in selections]
    assert "O2U" not in drawn[0]
    assert "O2U" in drawn[1]
    files = RunFolder(config.output).round(1)
    model, _ = load_model(files.model)
    assert model.first.config.energy_head == "process"
    assert model.first.elements == (1, 8)
    learned = read_structures(files.folder / "train.extxyz")
    assert {atoms.get_chemical_formula() for atoms in learned} == {"H2O"}


def test_relative_paths_and_a_store_that_has_all_labels(
    client: Client, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the workers are not
    config = run_on(pool, Path("run"), stop={"max_rounds": 1}, selection={"initial": 30})
    run(config, client=client)
    assert (tmp_path / "run" / "model.orbcalc").exists()
    again = run_on(pool, Path("again"), stop={"max_rounds": 1}, selection={"initial": 30})
    again.output.mkdir()
    (again.output / "labels.db").write_bytes((config.output / "labels.db").read_bytes())
    assert run(again, client=client).certified
    assert first_batch(again) == []
    [learned] = [e for e in read_jsonl(again.output / "events.jsonl") if e["event"] == "features"]
    assert "energy_mae" not in learned["errors"]


@pytest.mark.parametrize(("most", "head"), [(12, "process"), (11, "network")])
def test_a_process_is_for_few_energies(
    client: Client,
    pool: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    head: str,
) -> None:
    monkeypatch.setattr("orbcalc.active.modelling.PROCESS_LABELS", most)
    config = run_on(
        pool,
        tmp_path / "run",
        selection={"initial": 29},
        stop={"max_rounds": 1, "max_labels": 13},
        tasks={"forces": 0},
    )
    run(config, client=client)
    model, _ = load_model(config.output / "rounds" / "000" / "model.orbcalc")
    assert model.first.config.energy_head == head


def test_more_energies_make_it_a_network(
    client: Client,
    pool: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("orbcalc.active.modelling.PROCESS_LABELS", 12)
    config = run_on(pool, tmp_path / "run", stop={"max_rounds": 2})
    run(config, client=client)
    models = [
        load_model(config.output / "rounds" / number / "model.orbcalc") for number in ("000", "001")
    ]
    assert [model.first.config.energy_head for model, _ in models] == ["process", "network"]
    assert models[1][1]["training_set"]["n_cheap"] > 0
    assert "starting afresh" not in caplog.text


@pytest.mark.parametrize(
    "moment",
    ["modelling.dump_config", "round.pool_functions", "round.Round.label"],
)
def test_a_killed_run_begins_with_the_same(
    client: Client, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    config = run_on(pool, tmp_path / "killed", stop={"max_rounds": 1})
    with monkeypatch.context() as patch:
        patch.setattr(f"orbcalc.active.{moment}", _kill)
        with pytest.raises(KillError):
            run(config, client=client)
    whole = run_on(pool, tmp_path / "whole", stop={"max_rounds": 1})
    for own in (config, whole):
        run(own, client=client)
    assert first_batch(config) == first_batch(whole)
    one, other = (load_model(own.output / "model.orbcalc")[0] for own in (config, whole))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
