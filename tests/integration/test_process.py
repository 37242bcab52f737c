"""Few energies and many cheap labels: a network learns the latter, a process the former."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from distributed import Client
from small_runs import run_config, train_config, waters, write_pool
from torch import Tensor

from orbcalc.active.loop import run
from orbcalc.calculator import OrbcalcCalculator
from orbcalc.cli.tables import print_model
from orbcalc.config import TrainConfig
from orbcalc.errors import MissingLabelError
from orbcalc.files import read_jsonl
from orbcalc.model.checkpoint import load_model
from orbcalc.model.committee import Committee
from orbcalc.properties import REF_ENERGY, REF_FORCES, REF_METHOD, XTB_ENERGY
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
    first = train(small_config(path, tmp_path / "a.orbcalc"))
    other = write_pool(tmp_path / "b.extxyz", few_energies(labelled_waters, -500.0, "b"))
    records: list[int] = []
    config = small_config(other, tmp_path / "b.orbcalc", start_from=str(tmp_path / "a.orbcalc"))
    second = train(config, lambda record: records.append(record["step"]))
    assert records == [20]  # nothing is trained
    for name, value in features(second).items():
        assert torch.equal(value, features(first)[name]), name
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


def _kill(*_: object) -> None:
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


def test_a_run_trains_once_and_then_fits(
    client: Client, labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    pool = [atoms.copy() for atoms in labelled_waters]
    for atoms in pool:
        del atoms.arrays[REF_FORCES]
    config = run_config(
        write_pool(tmp_path / "pool.extxyz", pool),
        tmp_path / "run",
        labels={"reference": {"calculator": "file"}, "forces": False},
        tasks={"forces": 0},
        pool={"charges": True},
        stop={"max_rounds": 2},
        committee=1,
    )
    run(config, client=client)
    rounds = [record["round"] for record in read_jsonl(config.output / "metrics.jsonl")]
    assert rounds == [0, 0, 0, 1]
    first, second = (
        load_model(config.output / "rounds" / number / "model.orbcalc")[0]
        for number in ("000", "001")
    )
    for name, value in features(second).items():
        assert torch.equal(value, features(first)[name]), name
    assert second.first.n_inducing > first.first.n_inducing
