"""Training as a user meets it: it learns, it goes on exactly, and it never pretends."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from scipy.special import stdtrit
from small_runs import train_config, waters, write_pool

from orbcalc.config import PotentialConfig, TrainConfig
from orbcalc.errors import (
    CheckpointError,
    ConfigError,
    LabelConflictError,
    MissingLabelError,
)
from orbcalc.graph import AtomGraph
from orbcalc.labels.label import Kind
from orbcalc.labels.store import LabelStore
from orbcalc.model.checkpoint import load_model
from orbcalc.model.committee import Committee
from orbcalc.model.potential import Potential
from orbcalc.orbitals import SLOTS
from orbcalc.prediction import predict
from orbcalc.properties import REF_ENERGY, REF_FORCES, REF_METHOD, XTB_BLOCKS, XTB_SHELLS
from orbcalc.structures import structure_key
from orbcalc.training.dataset import LabelDataset
from orbcalc.training.initial import initial_potential
from orbcalc.training.run import (
    load_labelled,
    model_errors,
    prepared,
    split,
    train,
    train_member,
)
from orbcalc.training.state import TrainState
from orbcalc.training.statistics import fit_statistics
from orbcalc.training.trainer import Trainer, resolve_device

CHARGES_ONLY = {"energy": 0, "forces": 0, "charges": 1}


class KillError(Exception):
    """Stands for a kill."""


def interrupt_at(step: int, member: int = 0) -> Any:
    """Return a report that ends the training before the state of a validation is saved."""

    def report(record: Mapping[str, Any]) -> None:
        if (record["member"], record["step"]) == (member, step):
            raise KillError

    return report


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Tell whether two models have the same bits."""
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


# --------------------------------------------------------------------------------- resume
@pytest.mark.parametrize("tasks", [{}, CHARGES_ONLY], ids=["all", "charges"])
def test_going_on_gives_the_same_bits_as_never_stopping(
    labelled_file: Path, tmp_path: Path, tasks: dict[str, float]
) -> None:
    options = {"optimizer": {"steps": 30}, "committee": 2, "tasks": tasks}
    undisturbed = train(train_config(labelled_file, tmp_path / "a.orbcalc", **options))
    config = train_config(labelled_file, tmp_path / "b.orbcalc", **options)
    for stop in (interrupt_at(20), interrupt_at(30), interrupt_at(10, member=1)):
        with pytest.raises(KillError):
            train(config, stop)
    assert not config.output.exists()
    steps: list[tuple[int, int]] = []
    resumed = train(config, lambda record: steps.append((record["member"], record["step"])))
    assert steps == [(1, 10), (1, 20), (1, 30)]  # the first member was finished before
    assert equal(resumed, undisturbed)
    assert resumed.calibration == undisturbed.calibration
    assert not (tmp_path / "b.orbcalc.training").exists()


def test_a_state_in_the_middle_of_an_epoch_is_enough(labelled_file: Path, tmp_path: Path) -> None:
    options = {"optimizer": {"steps": 17, "evaluate_every": 3, "batch_size": 5}}
    undisturbed = train(train_config(labelled_file, tmp_path / "a.orbcalc", **options))
    config = train_config(labelled_file, tmp_path / "b.orbcalc", **options)
    for step in (3, 9, 12, 17):  # 24 structures: five steps an epoch
        with pytest.raises(KillError):
            train(config, interrupt_at(step))
    assert equal(train(config), undisturbed)


def test_a_training_goes_on_where_it_was_copied_to_and_on_another_device(
    labelled_file: Path, tmp_path: Path
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    shutil.copy(labelled_file, before / "train.xyz")
    undisturbed = train(train_config(before / "train.xyz", tmp_path / "a.orbcalc"))
    with pytest.raises(KillError):
        train(train_config(before / "train.xyz", before / "b.orbcalc"), interrupt_at(20))
    shutil.move(before, after)
    config = train_config(after / "train.xyz", after / "b.orbcalc", device="auto")
    assert equal(train(config), undisturbed) or torch.cuda.is_available()
    with pytest.raises(KillError):
        train(config, interrupt_at(20))
    other = train_config(labelled_file, after / "b.orbcalc")
    with pytest.raises(CheckpointError, match="unfinished training of another configuration"):
        train(other)


def test_another_configuration_does_not_go_on_with_these_members(
    labelled_file: Path, tmp_path: Path
) -> None:
    config = train_config(labelled_file, tmp_path / "a.orbcalc", committee=2)
    train_member(config, 0)
    other = train_config(labelled_file, tmp_path / "a.orbcalc", committee=2, seed=7)
    for member in (0, 1):  # finished and not begun
        with pytest.raises(CheckpointError, match="unfinished training of another configuration"):
            train_member(other, member)


def test_an_unfinished_training_does_not_go_on_with_changed_files(
    labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    paths = {
        name: write_pool(tmp_path / f"{name}.extxyz", part)
        for name, part in (("train", labelled_waters[:20]), ("valid", labelled_waters[20:]))
    }
    config = train_config(paths["train"], tmp_path / "a.orbcalc", valid=str(paths["valid"]))
    with pytest.raises(KillError):
        train(config, interrupt_at(20))
    for path in paths.values():
        before = path.read_bytes()
        write_pool(path, labelled_waters[1:5])
        for call in (train, lambda config: train_member(config, 0)):
            with pytest.raises(CheckpointError, match=rf"{path.name} has changed since the unfin"):
                call(config)
        path.write_bytes(before)
    assert train(config)


def test_a_model_to_start_from_is_one_of_the_files(labelled_file: Path, tmp_path: Path) -> None:
    first = train_config(labelled_file, tmp_path / "first.orbcalc")
    train(first)
    config = train_config(
        labelled_file, tmp_path / "a.orbcalc", start_from=str(first.output), committee=1
    )
    with pytest.raises(KillError):
        train(config, interrupt_at(20))
    train(train_config(labelled_file, first.output, seed=5))
    with pytest.raises(CheckpointError, match=r"first\.orbcalc has changed since"):
        train(config)


@pytest.mark.parametrize("suffix", [".db", ".aselmdb"])
def test_a_label_store_changes_only_if_labels_are_added(
    label_store: Path, labelled_waters: list[Atoms], tmp_path: Path, suffix: str
) -> None:
    source, path = LabelStore(label_store), tmp_path / f"labels{suffix}"
    store = LabelStore(path)

    def add(structures: list[Atoms]) -> None:
        kinds: tuple[Kind, ...] = ("charges", "reference")
        keys = [structure_key(atoms) for atoms in structures]
        labels = [[x for kind in kinds if (x := source.get(key, kind))] for key in keys]
        store.add_many(zip(structures, labels, strict=True))

    add(labelled_waters[:25])
    config = train_config(path, tmp_path / "a.orbcalc")
    with pytest.raises(KillError):
        train(config, interrupt_at(10))
    add(labelled_waters[:5])
    assert len(LabelStore(path).labelled_atoms()) == 25
    with pytest.raises(KillError):
        train(config, interrupt_at(20))
    add(labelled_waters[25:])
    with pytest.raises(CheckpointError, match=rf"labels\{suffix} has changed since"):
        train(config)


def test_labels_that_were_missing_may_be_added(
    labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    path = write_pool(tmp_path / "x.extxyz", stripped(labelled_waters, REF_FORCES))
    config = train_config(path, tmp_path / "a.orbcalc")
    with pytest.raises(MissingLabelError):
        train(config)
    write_pool(path, labelled_waters)
    assert train(config)


def test_a_damaged_state_is_refused(labelled_file: Path, tmp_path: Path) -> None:
    config = train_config(labelled_file, tmp_path / "a.orbcalc")
    with pytest.raises(KillError):
        train(config, interrupt_at(20))
    (state,) = (tmp_path / "a.orbcalc.training").glob("*.state")
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"member_0\.state"):
        train(config)


def test_the_state_holds_everything(labelled_waters: list[Atoms], tmp_path: Path) -> None:
    config = train_config(tmp_path / "unused", tmp_path / "unused")
    datasets = [LabelDataset(part, 4.0) for part in split(labelled_waters, 0.2, 0)]
    path = tmp_path / "x.state"
    trainer = Trainer(*datasets, config, seed=3, state_path=path)

    result = trainer.fit(lambda: initial_potential(config, 0, 3, datasets[0]))
    state = TrainState.load(path, config.optimizer, torch.device("cpu"))
    assert state.step == config.optimizer.steps
    assert [record["step"] for record in state.history] == [10, 20]
    assert state.best_loss == min(record["valid_loss"] for record in state.history)
    assert equal(state.result(), result)
    moments = state.optimizer.tensors()
    adam = [float(value) for name, value in moments.items() if name.endswith(".step")]
    muon = [value for name, value in moments.items() if name.startswith("muon.")]
    assert len(adam) + len(muon) == len(list(state.potential.parameters()))
    assert set(adam) == {20}
    assert any(bool((mean != 0).any()) for mean in muon)


# ------------------------------------------------------------------------------- the end
def test_training_stops_early_when_nothing_improves(labelled_file: Path, tmp_path: Path) -> None:
    steps: list[int] = []
    config = train_config(
        labelled_file,
        tmp_path / "a.orbcalc",
        optimizer={"steps": 1000, "patience": 2, "learning_rate": 1e-30},
    )
    train(config, lambda record: steps.append(record["step"]))
    assert steps == [10, 20, 30]  # the first is the best, two more do not improve


def test_the_best_weights_are_returned_not_the_last(labelled_file: Path, tmp_path: Path) -> None:
    losses: list[float] = []
    config = train_config(
        labelled_file,
        tmp_path / "a.orbcalc",
        optimizer={"steps": 60, "learning_rate": 0.05, "ema_decay": 0.0, "warmup_steps": 0},
    )
    train(config, lambda record: losses.append(record["energy_mae"]))
    _, metadata = load_model(config.output)
    assert metadata["valid_errors"]["energy_mae"] in [pytest.approx(x, rel=1e-4) for x in losses]


def test_a_loss_that_is_not_finite_is_an_error(labelled_file: Path, tmp_path: Path) -> None:
    config = train_config(
        labelled_file,
        tmp_path / "a.orbcalc",
        optimizer={"learning_rate": 1e25, "warmup_steps": 0},
    )
    for _ in range(2):  # nor does it succeed when it is started again
        with pytest.raises(CheckpointError, match=r"not finite|NaN or infinity"):
            train(config)
    assert not config.output.exists()


def test_a_validation_that_is_not_finite_is_an_error(
    labelled_waters: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(tmp_path / "unused", tmp_path / "unused")
    train_set, valid_set = (LabelDataset(p, 4.0) for p in split(labelled_waters, 0.2, 0))
    trainer = Trainer(train_set, valid_set, config, seed=0)
    monkeypatch.setattr(
        "orbcalc.training.trainer.evaluate", lambda *_: (math.nan, {"energy_mae": math.nan})
    )

    with pytest.raises(CheckpointError, match="validation loss is not finite at step 10"):
        trainer.fit(lambda: initial_potential(config, 0, 0, train_set))


# -------------------------------------------------------------------------------- labels
def stripped(structures: list[Atoms], *keys: str) -> list[Atoms]:
    """Return copies without some labels."""
    copies = [atoms.copy() for atoms in structures]
    for atoms in copies:
        for key in keys:
            atoms.info.pop(key, None)
            atoms.arrays.pop(key, None)
    return copies


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (REF_ENERGY, r"energy 0, forces 24, stress 0, charges 24.*'energy' needs REF_energy"),
        (REF_FORCES, r"energy 24, forces 0, stress 0, charges 24.*'forces' needs REF_forces"),
        (XTB_BLOCKS, r"energy 24, forces 24, stress 0, charges 0.*tasks: \{charges: 0\}"),
    ],
)
def test_missing_labels_give_a_census(
    labelled_waters: list[Atoms], tmp_path: Path, key: str, message: str
) -> None:
    path = write_pool(tmp_path / "x.extxyz", stripped(labelled_waters, key))
    with pytest.raises(MissingLabelError, match=message):
        train(train_config(path, tmp_path / "a.orbcalc"))


def test_labels_that_are_all_nan_count_as_missing(
    labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    structures = stripped(labelled_waters)
    for atoms in structures:
        atoms.info[REF_ENERGY] = float("nan")
    path = write_pool(tmp_path / "x.extxyz", structures)
    with pytest.raises(MissingLabelError, match="energy 0"):
        train(train_config(path, tmp_path / "a.orbcalc"))


def test_a_validation_set_without_labels_is_refused(
    labelled_waters: list[Atoms], labelled_file: Path, tmp_path: Path
) -> None:
    bare = stripped(labelled_waters[:3], REF_ENERGY, REF_FORCES, XTB_BLOCKS)
    valid = write_pool(tmp_path / "valid.extxyz", bare)
    with pytest.raises(MissingLabelError, match="no label of any task with weight"):
        train(train_config(labelled_file, tmp_path / "a.orbcalc", valid=str(valid)))


def test_what_is_validated_on_is_not_trained_on(
    labelled_waters: list[Atoms],
    labelled_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    valid = write_pool(tmp_path / "valid.extxyz", labelled_waters[20:])
    _, sets, train_set, _ = prepared(
        train_config(labelled_file, tmp_path / "a.orbcalc", valid=str(valid))
    )
    assert len(sets.train) == len(train_set) == 20
    assert len(sets.valid) == len(labelled_waters) - 20
    assert "10 structures of `train` are in `valid` too" in caplog.text
    with pytest.raises(ConfigError, match="nothing is left to train on"):
        train(train_config(labelled_file, tmp_path / "a.orbcalc", valid=str(labelled_file)))


def test_what_was_refused_before_its_first_step_can_be_corrected(
    labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    path = write_pool(tmp_path / "x.extxyz", stripped(labelled_waters, REF_FORCES))
    output = tmp_path / "a.orbcalc"
    with pytest.raises(MissingLabelError, match="forces"):
        train(train_config(path, output, tasks={"forces": 1}))
    write_pool(path, stripped(labelled_waters[1:], REF_FORCES))
    train(train_config(path, output, tasks={"forces": 0}, optimizer={"steps": 2}))
    assert output.is_file()


def test_different_methods_are_not_mixed(labelled_waters: list[Atoms], tmp_path: Path) -> None:
    structures = stripped(labelled_waters)
    structures[3].info[REF_METHOD] = "PBE (other 1.0)"
    path = write_pool(tmp_path / "x.extxyz", structures)
    with pytest.raises(LabelConflictError, match=r"reference labels .*GFN2-xTB.*; PBE \(other"):
        train(train_config(path, tmp_path / "a.orbcalc"))
    good, bad = (
        write_pool(tmp_path / name, part)
        for name, part in (("good.extxyz", structures[4:]), ("bad.extxyz", structures[3:4]))
    )
    with pytest.raises(LabelConflictError):
        train(train_config(good, tmp_path / "a.orbcalc", valid=str(bad)))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_too_few_structures_are_refused(
    labelled_waters: list[Atoms], tmp_path: Path, n: int
) -> None:
    path = write_pool(tmp_path / "x.extxyz", labelled_waters[:n])
    config = train_config(path, tmp_path / "a.orbcalc", optimizer={"steps": 2})
    if n == 1:
        with pytest.raises(ConfigError, match="1 labelled structures are too few to hold out 20%"):
            train(config)
    else:
        assert load_model(config.output)[1] if train(config) else False


def test_one_reference_label_among_cheap_ones_is_too_few(labelled_waters: list[Atoms]) -> None:
    cheap = stripped(labelled_waters[1:], REF_ENERGY, REF_FORCES)
    with pytest.raises(ConfigError, match="1 labelled structures are too few"):
        split([labelled_waters[0], *cheap], 0.2, 0)


@pytest.mark.parametrize("missing", ["no energies", "NaN energies"])
def test_validation_takes_any_reference_label(labelled_waters: list[Atoms], missing: str) -> None:
    """Among many cheap ones, those with forces alone are not overlooked; NaN is no label."""
    structures = [atoms.copy() for atoms in labelled_waters]
    for number, atoms in enumerate(structures):
        atoms.info.pop(REF_ENERGY)
        if number >= 6:
            atoms.arrays.pop(REF_FORCES)
        if missing == "NaN energies":
            atoms.info[REF_ENERGY] = np.nan
    for seed in range(10):
        train_set, valid_set = split(structures, 0.3, seed)
        assert [REF_FORCES in atoms.arrays for atoms in valid_set] == [True, True]
        assert len(train_set) == 28


def test_a_validation_set_with_a_new_element_is_told(
    labelled: list[Atoms], labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    config = train_config(tmp_path / "unused", tmp_path / "unused")
    sets = LabelDataset(labelled_waters, 4.0), LabelDataset(labelled, 4.0)
    with pytest.raises(ConfigError, match=r"the validation set has .*Fe.* no training structure"):
        Trainer(*sets, config, seed=0)


def test_charges_that_training_had_none_of_are_no_error(labelled: list[Atoms]) -> None:
    iron = next(atoms for atoms in labelled if 26 in atoms.numbers)
    without = stripped([iron], XTB_BLOCKS, XTB_SHELLS)
    config = PotentialConfig(cutoff=4.0, channels=8)
    train_set = LabelDataset([*labelled[:2], *without], 4.0)
    with torch.random.fork_rng(devices=[]):
        statistics = fit_statistics(train_set, config)
        potential = Potential(config, train_set.elements, train_set.shells, statistics)
    errors = model_errors(Committee([potential]), LabelDataset([iron], 4.0), ["energy", "charges"])
    assert math.isfinite(errors["charges_mae"])


def test_an_element_is_never_only_held_out(
    labelled: list[Atoms], labelled_waters: list[Atoms]
) -> None:
    iron = next(atoms for atoms in labelled if 26 in atoms.numbers)
    for seed in range(20):
        train_set, valid_set = split([*labelled_waters[:5], iron], 0.4, seed)
        assert iron in train_set
        assert len(valid_set) == 2


def test_lone_atoms_and_what_only_cheap_labels_share_are_never_held_out(
    labelled: list[Atoms], labelled_waters: list[Atoms]
) -> None:
    """They fix reference energies; an element without an energy would have none."""
    iron = next(atoms for atoms in labelled if 26 in atoms.numbers)
    (cheap_iron,) = stripped([iron], REF_ENERGY, REF_FORCES)
    lone = [Atoms("O"), Atoms("H", cell=[12.0] * 3, pbc=True)]
    for atoms in lone:
        atoms.info[REF_ENERGY] = -1.0
    for seed in range(20):
        train_set, valid_set = split([*labelled_waters[:5], iron, cheap_iron, *lone], 0.4, seed)
        assert all(atoms in train_set for atoms in (iron, *lone))
        assert len(valid_set) == 3
    crystal = [Atoms("Al", cell=[[0, a, a], [a, 0, a], [a, a, 0]], pbc=True) for a in (2.0, 2.1)]
    for atoms in crystal:
        atoms.info[REF_ENERGY] = -1.0
    assert [len(part) for part in split(crystal, 0.4, 0)] == [1, 1]


def test_a_label_store_trains_like_a_file(label_store: Path, labelled_file: Path) -> None:
    stored, filed = load_labelled((label_store,)), load_labelled((labelled_file,))
    assert [structure_key(a) for a in stored] == [structure_key(a) for a in filed]
    for one, other in zip(stored, filed, strict=True):
        assert one.info[REF_METHOD] == other.info[REF_METHOD]
        np.testing.assert_allclose(one.info[REF_ENERGY], other.info[REF_ENERGY], atol=1e-7)
        np.testing.assert_allclose(one.arrays[XTB_BLOCKS], other.arrays[XTB_BLOCKS], atol=1e-7)
    assert len(load_labelled((label_store, labelled_file))) == len(LabelStore(label_store))


@pytest.mark.parametrize("quantity", ["energy", "forces"])
def test_copies_with_other_labels_are_told(
    quantity: str, labelled_waters: list[Atoms], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    copies = [labelled_waters[0].copy() for _ in range(3)]
    copies[1].info[REF_ENERGY] += 1e-8
    path = write_pool(tmp_path / "a.extxyz", [*labelled_waters, *copies])
    assert len(load_labelled((path,))) == len(labelled_waters)
    assert not caplog.text
    if quantity == "energy":
        copies[2].info[REF_ENERGY] += 1.0
    else:
        copies[2].arrays[REF_FORCES] = copies[2].arrays[REF_FORCES] + 1.0
    path = write_pool(tmp_path / "b.extxyz", [*labelled_waters, *copies])
    kept = load_labelled((path,))[0]
    assert kept.info[REF_ENERGY] == labelled_waters[0].info[REF_ENERGY]
    np.testing.assert_allclose(
        kept.arrays[REF_FORCES], labelled_waters[0].arrays[REF_FORCES], atol=1e-6
    )
    assert f"1 structures, H2O (another {quantity}) the first, are there again" in caplog.text


def test_duplicates_add_the_labels_that_the_first_lacks(
    labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    """Cheap labels of all structures and reference labels of some, in any order of files."""
    files = {}
    for name, dropped in (("cheap", "REF_"), ("reference", "GFN1_")):
        kept = [atoms.copy() for atoms in labelled_waters[: 9 if name == "cheap" else 4]]
        for atoms in kept:
            for place in (atoms.info, atoms.arrays):
                for key in [key for key in place if key.startswith(dropped)]:
                    del place[key]
        files[name] = write_pool(tmp_path / f"{name}.extxyz", kept)
    for order in (("cheap", "reference"), ("reference", "cheap")):
        found = load_labelled(tuple(files[name] for name in order))
        assert LabelDataset(found, 4.0).census()["forces"] == 4
        assert LabelDataset(found, 4.0).census()["charges"] == 9
        assert sum(REF_METHOD in atoms.info for atoms in found) == 4


# ----------------------------------------------------------------------------- committees
def test_a_committee_is_calibrated_on_what_it_has_not_seen(
    labelled_file: Path, labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    config = train_config(labelled_file, tmp_path / "a.orbcalc", committee=2, valid=0.4)
    committee = train(config)
    factors = (committee.calibration.energy, committee.calibration.forces)
    assert all(math.isfinite(f) and f > 0 for f in factors)
    assert factors != (1.0, 1.0)
    _, valid = split(labelled_waters, 0.4, config.seed)
    graph = AtomGraph.batch([AtomGraph.from_atoms(atoms, committee.cutoff) for atoms in valid])
    prediction = committee(graph, ("energy", "forces"))
    assert prediction.energy_uncertainty is not None
    errors = prediction.energy - torch.tensor([a.info[REF_ENERGY] for a in valid])
    assert prediction.energy_interval_95 is not None
    ratios = errors / prediction.energy_interval_95
    student = float(stdtrit(len(valid), 0.975))  # few: they are taken for normal
    limits = (student * float(ratios.square().mean().sqrt()), float(ratios.abs().max()))
    assert max(limits) == pytest.approx(1.0, rel=1e-3)
    assert bool((prediction.energy_interval_95 >= prediction.energy_uncertainty).all())
    assert not equal(committee.members[0], committee.members[1])


def start_from(labelled_file: Path, start: Path, output: Path, **changes: Any) -> TrainConfig:
    """Return a training that cannot move its weights."""
    options = {"steps": 10, "learning_rate": 1e-30}
    return train_config(labelled_file, output, start_from=str(start), optimizer=options, **changes)


def test_training_begins_with_a_model_that_fits(
    labelled_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = train(train_config(labelled_file, tmp_path / "start.orbcalc"))
    with caplog.at_level(logging.WARNING):
        same = train(start_from(labelled_file, tmp_path / "start.orbcalc", tmp_path / "b.orbcalc"))
    assert not caplog.records
    for name, weights in start.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], weights)
    assert torch.equal(same.first.reference_energies, start.first.reference_energies)


def test_a_start_with_charges_serves_structures_without_them(
    labelled_waters: list[Atoms],
    labelled_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    start = train(train_config(labelled_file, tmp_path / "start.orbcalc"))
    bare = write_pool(tmp_path / "x.extxyz", stripped(labelled_waters, XTB_BLOCKS, XTB_SHELLS))
    tuned = train(
        start_from(bare, tmp_path / "start.orbcalc", tmp_path / "b.orbcalc", tasks={"charges": 0})
    )
    assert "starting afresh" not in caplog.text
    before, after = (predict(model, labelled_waters[:3]) for model in (start, tuned))
    for one, two in zip(before, after, strict=True):
        np.testing.assert_allclose(two["forces"], one["forces"], atol=1e-5)


@pytest.mark.parametrize(
    ("method", "moved"), [("another", True), (None, True), (None, False)], ids=str
)
def test_a_start_takes_over_the_energies_of_another_method(
    labelled_waters: list[Atoms],
    labelled_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    method: str | None,
    moved: bool,
) -> None:
    """Known by name or by energies that are far off; forces and the network stay as they are."""
    start = train(train_config(labelled_file, tmp_path / "start.orbcalc"))
    structures = [atoms.copy() for atoms in labelled_waters]
    for atoms in structures:
        atoms.info[REF_ENERGY] += 20.0 * len(atoms) if moved else 0.0
        atoms.info[REF_METHOD] = method
        if method is None:
            del atoms.info[REF_METHOD]
    other = write_pool(tmp_path / "other.extxyz", structures)
    with caplog.at_level(logging.WARNING):
        tuned = train(start_from(other, tmp_path / "start.orbcalc", tmp_path / "b.orbcalc"))
    assert ("its reference energies are moved" in caplog.text) == moved
    before, after = (predict(model, structures) for model in (start, tuned))
    for atoms, one, two in zip(structures, before, after, strict=True):
        np.testing.assert_allclose(two["forces"], one["forces"], atol=1e-5)
        shift = 20.0 * len(atoms) if moved else 0.0
        assert two["energy"] - one["energy"] == pytest.approx(shift, abs=0.5 if moved else 1e-6)


@pytest.mark.parametrize("method", ["GFN2-xTB", None])
def test_a_start_learns_of_an_element_that_had_no_energy(
    labelled_waters: list[Atoms], tmp_path: Path, method: str | None
) -> None:
    """As in a run whose pool has cheap labels of nitrogen before any reference label."""
    structures = [atoms.copy() for atoms in labelled_waters]
    for atoms in structures[:10]:
        atoms.numbers[atoms.numbers == 8] = 7
        atoms.info[REF_ENERGY] -= 100.0
    for atoms in structures:
        atoms.info.pop(REF_METHOD)
        if method is not None:
            atoms.info[REF_METHOD] = method
    later = write_pool(tmp_path / "later.extxyz", structures)
    first = write_pool(
        tmp_path / "first.extxyz", [*stripped(structures[:10], REF_ENERGY), *structures[10:]]
    )
    start = train(train_config(first, tmp_path / "start.orbcalc"))
    assert start.first.told.tolist() == [True, False, True]  # H, N, O
    (result,) = predict(start, structures[:1])
    assert result["energy_uncertainty"] > 10
    found = train(start_from(later, tmp_path / "start.orbcalc", tmp_path / "b.orbcalc"))
    before, after = start.first.reference_energies, found.first.reference_energies
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]])
    errors = [
        result["energy"] - atoms.info[REF_ENERGY]
        for atoms, result in zip(structures[:10], predict(found, structures[:10]), strict=True)
    ]
    assert abs(np.mean(errors)) < 2
    assert found.first.told.all()


@pytest.mark.parametrize("what", ["given", "lone atoms"])
@pytest.mark.parametrize("fits", [True, False])
def test_a_start_takes_over_reference_energies_that_are_told(
    labelled_waters: list[Atoms],
    labelled_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    what: str,
    fits: bool,
) -> None:
    """If they are like its own; else its network belongs to others, and training begins afresh."""
    start = train(train_config(labelled_file, tmp_path / "start.orbcalc"))
    offsets = [0.1, -0.2] if fits else [20.0, -10.0]
    told = [e + o for e, o in zip(start.first.reference_energies.tolist(), offsets, strict=True)]
    changes: dict[str, Any] = {}
    train_file = labelled_file
    if what == "given":
        changes = {"reference_energies": dict(zip("HO", told, strict=True))}
    else:
        lone = [Atoms("H"), Atoms("O")]
        for atoms, energy in zip(lone, told, strict=True):
            atoms.info[REF_ENERGY] = energy
        train_file = write_pool(tmp_path / "more.extxyz", [*labelled_waters, *lone])
    with caplog.at_level(logging.WARNING):
        found = train(start_from(train_file, tmp_path / "start.orbcalc", tmp_path / "b", **changes))
    assert ("starting afresh" in caplog.text) == (not fits)
    if what == "given" or not fits:
        assert found.first.reference_energies.tolist() == pytest.approx(told)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"committee": 2}, "it has 1 member(s), not 2"),
        ({"potential": {"channels": 4}}, "its channels is 8, not 4"),
    ],
)
def test_training_begins_afresh_where_it_does_not_fit(
    labelled_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    reason: str,
) -> None:
    train(train_config(labelled_file, tmp_path / "start.orbcalc"))
    with caplog.at_level(logging.WARNING):
        train(start_from(labelled_file, tmp_path / "start.orbcalc", tmp_path / "b", **change))
    assert f"does not fit the training set ({reason}): starting afresh" in caplog.text


def test_a_preset_is_only_a_name_for_sizes(
    labelled_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(train_config(labelled_file, tmp_path / "start.orbcalc"))
    named = {"preset": "small", "message_channels": 16}
    with caplog.at_level(logging.WARNING):
        train(
            start_from(labelled_file, tmp_path / "start.orbcalc", tmp_path / "b", potential=named)
        )
    assert "starting afresh" not in caplog.text


def test_charges_that_were_not_learned_are_not_predicted(
    labelled_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.orbcalc"
    train(train_config(labelled_file, path, tasks={"charges": 0}))
    with pytest.raises(PropertyNotImplementedError, match="trained without charges"):
        predict(path, waters(1), ("charges",))


def test_a_start_that_is_not_there_is_an_error(labelled_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        train(start_from(labelled_file, tmp_path / "none.orbcalc", tmp_path / "b.orbcalc"))


def test_an_unknown_device_is_an_error() -> None:
    with pytest.raises(ConfigError, match="device 'abacus' cannot be used here"):
        resolve_device("abacus")


# -------------------------------------------------------------------------------- charges
def quadrupole_errors(model: Committee, structures: list[Atoms]) -> tuple[float, float]:
    """Return MAE and mean size of the 2e part of oxygen's p blocks, e."""
    part = slice(SLOTS[2].columns.start + 1, SLOTS[2].columns.stop)
    errors, sizes = [], []
    for atoms in structures:
        graph = AtomGraph.from_atoms(atoms, model.cutoff)
        blocks = model(graph, ("charges",)).orbital_blocks
        assert blocks is not None
        oxygen = atoms.numbers == 8
        labels = atoms.arrays[XTB_BLOCKS][oxygen][:, part]
        errors.append(np.abs(blocks.detach().numpy()[oxygen][:, part] - labels).mean())
        sizes.append(np.abs(labels).mean())
    return float(np.mean(errors)), float(np.mean(sizes))


def test_the_equivariant_head_learns_p_blocks(labelled_waters: list[Atoms], tmp_path: Path) -> None:
    """Oxygen's p block turns with the molecule; the same labels in a wrong axis order do not."""
    train_set, test_set = labelled_waters[:22], labelled_waters[22:]
    shuffled = [atoms.copy() for atoms in train_set]
    start = SLOTS[2].columns.start + 1
    for atoms in shuffled:  # as if (y, z, x) had been taken for (x, y, z)
        columns = np.arange(start, start + 5)
        atoms.arrays[XTB_BLOCKS][:, columns] = atoms.arrays[XTB_BLOCKS][:, columns[[1, 0, 4, 3, 2]]]
    found = []
    for name, structures in (("right", train_set), ("wrong", shuffled)):
        path = write_pool(tmp_path / f"{name}.extxyz", structures)
        config = train_config(
            path, tmp_path / name, tasks=CHARGES_ONLY, optimizer={"steps": 120, "batch_size": 8}
        )
        model = train(config)
        reference = test_set if name == "right" else structures
        error, size = quadrupole_errors(model, reference)
        found.append(error / size)
    assert found[0] < 0.2
    assert found[1] > 0.5


def test_the_invariant_head_trains_but_cannot_learn_them(
    labelled_file: Path, tmp_path: Path
) -> None:
    errors: list[float] = []
    config = train_config(
        labelled_file,
        tmp_path / "a.orbcalc",
        potential={"charge_head": "invariant"},
        tasks=CHARGES_ONLY,
        optimizer={"steps": 60},
    )
    model = train(config, lambda record: errors.append(record["charges_mae"]))
    assert errors[-1] < errors[0]
    atoms = load_labelled((labelled_file,))[0]
    prediction = model(AtomGraph.from_atoms(atoms, model.cutoff), ("charges",))
    assert prediction.orbital_blocks is None
    assert prediction.orbital_charges is not None
    assert float(prediction.orbital_charges.nansum().detach()) == pytest.approx(0.0, abs=1e-5)


def test_training_learns_energies_and_forces(labelled_file: Path, tmp_path: Path) -> None:
    records: list[Mapping[str, Any]] = []
    config = train_config(labelled_file, tmp_path / "a.orbcalc", optimizer={"steps": 120})
    train(config, records.append)
    structures = load_labelled((labelled_file,))
    spread = float(np.std([a.info[REF_ENERGY] / len(a) for a in structures]))
    size = float(np.mean([np.abs(a.arrays[REF_FORCES]).mean() for a in structures]))
    assert records[-1]["energy_mae"] < 0.5 * spread
    assert records[-1]["forces_mae"] < 0.3 * size
    assert records[-1]["charges_mae"] < records[0]["charges_mae"]


# ----------------------------------------------------------------------- Δ-learning
def test_above_a_computed_baseline_total_energies_are_predicted(
    cli: Callable[..., Any], labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    """A file without GFN1-xTB labels is evaluated as well, with the errors of the training."""
    files = {
        name: write_pool(tmp_path / f"{name}.extxyz", part)
        for name, part in (("train", labelled_waters[:20]), ("valid", labelled_waters[20:]))
    }
    config = train_config(
        files["train"],
        tmp_path / "model.orbcalc",
        valid=str(files["valid"]),
        potential={"baseline": "GFN1-xTB"},
    )
    train(config)
    committee, metadata = load_model(config.output)
    assert committee.first.config.baseline == "GFN1-xTB"
    bare = [atoms.copy() for atoms in labelled_waters[20:]]
    for atoms in bare:
        for name in [key for key in (*atoms.info, *atoms.arrays) if key.startswith("GFN1")]:
            atoms.info.pop(name, None)
            atoms.arrays.pop(name, None)
    found = predict(config.output, bare)
    errors = [
        (result["energy"] - atoms.info[REF_ENERGY]) / 3
        for atoms, result in zip(bare, found, strict=True)
    ]
    assert np.abs(errors).mean() == pytest.approx(metadata["valid_errors"]["energy_mae"], rel=1e-2)
    forces = np.concatenate([result["forces"] for result in found])
    wanted = np.concatenate([atoms.arrays[REF_FORCES] for atoms in bare])
    assert np.sqrt(((forces - wanted) ** 2).mean()) == pytest.approx(
        metadata["valid_errors"]["forces_rmse"], rel=1e-2
    )
    said = cli("evaluate", config.output, write_pool(tmp_path / "bare.extxyz", bare), "--json")
    assert json.loads(said.out)["energy_mae"] == pytest.approx(
        metadata["valid_errors"]["energy_mae"], rel=1e-2
    )
