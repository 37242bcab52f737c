"""The run folder: files whole or not at all, and no two runs in one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ase.constraints import FixAtoms
from small_runs import write_pool
from structures import ethanol, water

from orbcalc.active.folder import RunFolder, write_structures
from orbcalc.active.inputs import read_inputs
from orbcalc.config import (
    DaskConfig,
    LabelConfig,
    MDConfig,
    PoolConfig,
    ReferenceConfig,
    RunConfig,
    StopConfig,
    TaskWeights,
    load_config,
)
from orbcalc.errors import ConfigError, LabelConflictError, MissingLabelError
from orbcalc.structures import read_structures, structure_key


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run of which only the folder is made here."""
    return RunConfig(
        output=tmp_path / "run", pool=PoolConfig(structures=(tmp_path / "pool.xyz",)), seed=4
    )


def begin(config: RunConfig) -> RunFolder:
    """Return the folder of a run whose first round has begun."""
    folder = RunFolder(config.output)
    folder.prepare(config)
    write_structures(folder.round(0).pool, [water()])
    return folder


def test_the_resolved_configuration_is_written_once(config: RunConfig) -> None:
    folder = begin(config)
    assert load_config(folder.config_file, RunConfig) == config
    before = folder.config_file.read_bytes()
    folder.prepare(config.model_copy(update={"stop": StopConfig(max_rounds=99)}))
    assert folder.config_file.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [{"stop": StopConfig(max_rounds=3)}, {"dask": DaskConfig(label_workers=9)}, {"device": "cpu"}],
)
def test_what_does_not_decide_the_outcome_may_change(
    config: RunConfig, change: dict[str, object]
) -> None:
    begin(config).prepare(config.model_copy(update=change))


@pytest.mark.parametrize("change", [{"seed": 5}, {"committee": 3}, {"warm_start": False}])
def test_another_run_is_refused(config: RunConfig, change: dict[str, object]) -> None:
    folder = begin(config)
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        folder.prepare(config.model_copy(update=change))


def test_a_text_that_looks_like_a_number_stays_a_text(config: RunConfig) -> None:
    reference = ReferenceConfig(version="12e4567", arguments={"Hamiltonian_SCCTolerance": "1e-8"})
    odd = config.model_copy(update={"labels": LabelConfig(reference=reference)})
    folder = begin(odd)
    assert load_config(folder.config_file, RunConfig) == odd
    folder.prepare(odd)


def test_one_process_at_a_time(config: RunConfig) -> None:
    folder = RunFolder(config.output)
    with (
        folder.locked(),
        pytest.raises(ConfigError, match="another process is at work in"),
        RunFolder(config.output).locked(),
    ):
        raise AssertionError
    with RunFolder(config.output).locked():
        pass


def test_what_has_not_begun_may_be_corrected(config: RunConfig) -> None:
    folder = RunFolder(config.output)
    folder.prepare(config)
    other = config.model_copy(update={"seed": 5})
    folder.prepare(other)
    assert load_config(folder.config_file, RunConfig) == other


@pytest.mark.parametrize("name", ["pool.xyz", "start.xyz"])
def test_a_run_does_not_go_on_with_a_changed_file(tmp_path: Path, name: str) -> None:
    paths = {name: write_pool(tmp_path / name, [water()]) for name in ("pool.xyz", "start.xyz")}
    pool = PoolConfig(structures=(paths["pool.xyz"],), start=(paths["start.xyz"],), md=MDConfig())
    config = RunConfig(output=tmp_path / "run", pool=pool)
    folder = RunFolder(config.output)
    folder.prepare(config)
    assert [len(part) for part in read_inputs(config, folder)] == [1, 1]
    write_structures(folder.round(0).pool, [water()])
    folder.prepare(config)
    write_pool(paths[name], [ethanol()])
    with pytest.raises(ConfigError, match=rf"{name} has changed since the run in .*run read it\."):
        folder.prepare(config)
    write_pool(paths[name], [water()])
    folder.prepare(config)
    paths[name].unlink()  # the run has its own copy
    folder.prepare(config)


def test_a_run_goes_on_where_it_and_its_files_were_moved(tmp_path: Path) -> None:
    def config(folder: Path, name: str = "pool.xyz") -> RunConfig:
        return RunConfig(output=folder / "run", pool=PoolConfig(structures=(folder / name,)))

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    write_pool(here / "pool.xyz", [water()])
    folder = RunFolder(config(here).output)
    folder.prepare(config(here))
    read_inputs(config(here), folder)
    write_structures(folder.round(0).pool, [water()])
    here.rename(there)
    moved = RunFolder(config(there).output)
    moved.prepare(config(there))
    write_pool(there / "other.xyz", [ethanol()])
    with pytest.raises(ConfigError, match=r"other\.xyz has changed since the run"):
        moved.prepare(config(there, "other.xyz"))
    more = PoolConfig(structures=(there / "pool.xyz", there / "other.xyz"))
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        moved.prepare(config(there).model_copy(update={"pool": more}))
    moved.inputs.unlink()  # then nothing tells whether the files are the same
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        moved.prepare(config(there))


def test_files_that_no_run_could_begin_with_may_be_corrected(tmp_path: Path) -> None:
    path = write_pool(tmp_path / "pool.xyz", [water()])
    labels = LabelConfig(reference=ReferenceConfig(calculator="file"), forces=False)
    pool, tasks = PoolConfig(structures=(path,)), TaskWeights(forces=0)
    config = RunConfig(output=tmp_path / "run", pool=pool, labels=labels, tasks=tasks)
    folder = RunFolder(config.output)
    folder.prepare(config)
    with pytest.raises(MissingLabelError):
        read_inputs(config, folder)
    labelled = water()
    labelled.info["REF_energy"] = -1.0
    write_pool(path, [labelled])
    folder.prepare(config)
    assert len(read_inputs(config, folder).pool) == 1


def test_copies_with_unlike_labels_begin_no_run(tmp_path: Path) -> None:
    copies = [water(), water()]
    for atoms, energy in zip(copies, (-1.0, -6.0), strict=True):
        atoms.info["REF_energy"] = energy
    path = write_pool(tmp_path / "pool.xyz", copies)
    labels = LabelConfig(reference=ReferenceConfig(calculator="file"), forces=False)
    pool, tasks = PoolConfig(structures=(path,)), TaskWeights(forces=0)
    config = RunConfig(output=tmp_path / "run", pool=pool, labels=labels, tasks=tasks)
    folder = RunFolder(config.output)
    folder.prepare(config)
    with pytest.raises(LabelConflictError, match=r"H2O is there twice.*\(energy\)"):
        read_inputs(config, folder)


def test_stresses_of_molecules_begin_no_run(tmp_path: Path) -> None:
    path = write_pool(tmp_path / "pool.xyz", [water()])
    config = RunConfig(
        output=tmp_path / "run",
        pool=PoolConfig(structures=(path,)),
        labels=LabelConfig(stress=True),
        tasks=TaskWeights(stress=1),
    )
    folder = RunFolder(config.output)
    folder.prepare(config)
    with pytest.raises(ConfigError, match="no structure of the pool has a volume"):
        read_inputs(config, folder)


def test_the_pool_keeps_moments_and_constraints(config: RunConfig) -> None:
    atoms = water()
    atoms.set_initial_magnetic_moments([2.0, 0.0, 0.0])
    atoms.set_initial_charges([-1.0, 0.0, 0.0])
    atoms.set_constraint(FixAtoms([1]))
    atoms.set_momenta(np.ones((3, 3)))
    folder = begin(config)
    write_structures(folder.round(0).pool, [atoms])
    (found,) = folder.pool(1).values()
    np.testing.assert_array_equal(found.get_initial_magnetic_moments(), [2.0, 0.0, 0.0])
    np.testing.assert_array_equal(found.get_initial_charges(), [-1.0, 0.0, 0.0])
    assert found.constraints[0].index.tolist() == [1]
    assert "momenta" not in found.arrays


def test_a_folder_from_before_files_were_remembered_goes_on(config: RunConfig) -> None:
    folder = begin(config)
    write_pool(config.pool.structures[0], [water()])
    assert not folder.inputs.exists()
    folder.prepare(config)


def test_the_pool_grows_in_order_and_without_duplicates(config: RunConfig) -> None:
    folder = RunFolder(config.output)
    write_structures(folder.round(0).pool, [water(), ethanol()])
    write_structures(folder.round(1).pool, [])
    write_structures(folder.round(2).pool, [ethanol()])
    assert folder.round(1).pool.read_text() == ""
    expected = [structure_key(water()), structure_key(ethanol())]
    assert list(folder.pool(1)) == list(folder.pool(3)) == expected
    assert folder.pool(0) == {}


@pytest.mark.parametrize(
    "value",
    [
        *("", "a\nb", "a\r\nb", 'say "hi"\n{x}', "F/C=C\\F", "plain", "two words", "_JSON 3"),
        *("000123", "1e3", "T", "1 2 3", "[1, 2]", "tab\tx", "ü = 3", " padded ", None),
    ],
)
def test_information_is_read_as_it_was_written(tmp_path: Path, value: str | None) -> None:
    atoms = water()
    atoms.set_cell([5.0, 5.0, 5.0])
    atoms.info |= {"comment": value, 7: "seven"}
    path = tmp_path / "a.extxyz"
    write_structures(path, [atoms, atoms])
    for found in read_structures(path):
        assert found.info["comment"] == value
        assert type(found.info["comment"]) is type(value)
        assert not found.pbc.any()
        assert structure_key(found) == structure_key(atoms)
    assert atoms.info["comment"] == value


def test_events_have_a_time_and_a_name(config: RunConfig) -> None:
    folder = RunFolder(config.output)
    folder.prepare(config)
    folder.event("look", round=1)
    (line,) = folder.events.read_text().splitlines()
    record = json.loads(line)
    assert record.pop("time")
    assert record == {"event": "look", "round": 1}
