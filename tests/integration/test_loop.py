"""The loop in every kind of pool, to every kind of end."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixAtoms
from distributed import Client
from killed_run import INITIAL, Story
from small_runs import HereExecutor, run_config, walk_nowhere, waters, write_pool

from orbcalc.active.certificate import Certificate
from orbcalc.active.decisions import stream
from orbcalc.active.executor import Executor
from orbcalc.active.folder import RunFolder, write_structures
from orbcalc.active.loop import ActiveLearning, run
from orbcalc.active.modelling import _held_out
from orbcalc.active.prediction import predict_pool, predict_results
from orbcalc.active.quantities import QUANTITIES
from orbcalc.active.round import Round
from orbcalc.active.selection import draw_audit
from orbcalc.config import RunConfig, StopConfig
from orbcalc.errors import (
    CheckpointError,
    ConfigError,
    LabelError,
    MissingLabelError,
    OrbcalcError,
)
from orbcalc.files import read_json, read_jsonl
from orbcalc.labels.label import LabelStatus
from orbcalc.labels.store import LabelStore
from orbcalc.model.checkpoint import load_model
from orbcalc.prediction import predict
from orbcalc.properties import (
    POOL_CERTIFIED,
    POOL_FAILURE,
    POOL_MODEL,
    POOL_SOURCE,
    REF_ENERGY,
    REF_FORCES,
    REF_METHOD,
    XTB_BLOCKS,
    XTB_FORCES,
)
from orbcalc.report import write_report
from orbcalc.report.reading import read_run
from orbcalc.results import results_of
from orbcalc.structures import read_structures, structure_key

FORGIVING = {"tolerance": 100.0, "accuracy": 0.5}


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Thirty waters."""
    return write_pool(tmp_path / "pool.extxyz", waters(30))


class StopHereError(Exception):
    """Stands for a kill."""


def stop_at(**wanted: Any) -> Any:
    """Return a listener that ends the run at an event."""

    def notify(record: Mapping[str, Any]) -> None:
        if all(record.get(key) == value for key, value in wanted.items()):
            raise StopHereError

    return notify


def killed(*_: object) -> None:
    """Stand for a kill in the middle of something."""
    raise StopHereError


def raised(config: RunConfig, **stop: int | None) -> RunConfig:
    """Return a configuration with other limits."""
    return config.model_copy(update={"stop": StopConfig.model_validate(stop)})


# --------------------------------------------------------------------- a whole run
def test_a_whole_run_leaves_a_complete_folder(story: Story) -> None:
    folder = RunFolder(story.undisturbed)
    for path in (folder.config_file, folder.labels, folder.model, folder.certificate):
        assert path.stat().st_size > 0
    for path in (folder.events, folder.metrics, folder.report, folder.results):
        assert path.stat().st_size > 0
    assert not list(story.undisturbed.rglob("*.tmp"))
    assert not list(story.undisturbed.rglob("*.training"))
    assert "<html" in folder.report.read_text()


def test_its_certificate_says_why_it_ended(story: Story) -> None:
    certificate = Certificate.from_json((story.undisturbed / "certificate.json").read_text())
    assert not certificate.certified
    assert certificate.reason == "max_rounds"
    assert [look.look for look in certificate.looks] == [1, 2]
    pool = RunFolder(story.undisturbed).pool(3)
    assert certificate.n_pool == len(pool)
    first, second = certificate.looks
    assert first.n_labelled == INITIAL
    assert second.n_labelled == INITIAL + 6 + 6
    assert first.n_pool == second.n_pool == len(pool) > 30  # MD has added to both rounds


def test_its_events_tell_the_story_in_order(story: Story) -> None:
    events = read_jsonl(story.undisturbed / "events.jsonl")
    one_round = ["walk", "walk", "pool", "selection", "labelled", "trained", "round"]
    look, batch = ["selection", "labelled", "look"], ["selection", "labelled", "trained"]
    later = ["walk", "walk", "pool", *look, *batch, "round"]
    assert [e["event"] for e in events] == [*one_round, *later, *look, "finished"]
    walks = [e for e in events if e["event"] == "walk"]
    assert [w["ended"] for w in walks] == ["finished"] * 4
    assert [w["frames"] for w in walks] == [5] * 4


def test_its_labels_are_an_ase_database(story: Story) -> None:
    with ase.db.connect(story.undisturbed / "labels.db") as database:
        rows = list(database.select())
    assert len(rows) == INITIAL + 6 + 6 + 6
    for row in rows:
        assert row.reference_status == "ok"
        assert row.energy < -100
        assert row.forces.shape == (3, 3)


def test_what_is_released_is_the_model_that_was_looked_at(story: Story) -> None:
    rounds = [story.undisturbed / "rounds" / f"{n:03d}" for n in range(3)]
    assert (story.undisturbed / "model.orbcalc").read_bytes() == (
        rounds[1] / "model.orbcalc"
    ).read_bytes()
    assert not (rounds[2] / "model.orbcalc").exists()
    committee, metadata = load_model(rounds[1] / "model.orbcalc")
    assert len(committee.members) == 2
    assert metadata["labels"]["reference"].startswith("SlowGFN2")
    counts = metadata["training_set"]
    assert counts["n_train"] + counts["n_valid"] == INITIAL + 6 + 6


def test_the_hardest_are_selected_and_the_audit_is_apart(story: Story) -> None:
    selection = read_json(story.undisturbed / "rounds" / "001" / "selection.json")
    audit, batch = selection["audit"], selection["batch"]
    assert (len(audit), len(batch)) == (6, 6)
    assert not set(audit) & set(batch)
    assert set(selection["predictions"]) == {*audit, *batch}


# ------------------------------------------------------------------------------ ends
def test_a_certified_run_ends_and_stays_ended(
    client: Client, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(pool, tmp_path / "run", certificate=FORGIVING)
    seen: list[Mapping[str, Any]] = []
    certificate = run(config, client=client, notify=seen.append)
    assert certificate.certified
    assert certificate.reason == "certified"
    trained = [record for record in seen if record["event"] == "training"]
    assert len(trained) == len(read_jsonl(config.output / "metrics.jsonl")) == 2 * 2
    sources = Counter(
        (atoms.info[POOL_SOURCE], atoms.info.get(POOL_CERTIFIED), atoms.info.get(POOL_MODEL))
        for atoms in read_structures(config.output / "pool.extxyz")
    )
    model = f"sha256:{certificate.model_hash}"
    assert sources == {("reference", None, None): 14, ("prediction", True, model): 16}
    before = {p: p.stat().st_mtime_ns for p in config.output.rglob("*")}
    monkeypatch.setattr("orbcalc.active.loop.open_executor", pytest.fail)
    assert run(raised(config, max_rounds=9)) == certificate
    assert {p: p.stat().st_mtime_ns for p in config.output.rglob("*")} == before


def test_raised_rounds_go_on_with_the_looks_so_far(
    client: Client, pool: Path, tmp_path: Path
) -> None:
    config = run_config(pool, tmp_path / "run")
    first = run(config, client=client)
    assert (first.reason, len(first.looks)) == ("max_rounds", 1)
    assert run(config, client=client) == first
    second = run(raised(config, max_rounds=2), client=client)
    assert (second.reason, len(second.looks)) == ("max_rounds", 2)
    output = read_structures(config.output / "pool.extxyz")
    assert sum(atoms.info[POOL_SOURCE] == "reference" for atoms in output) == 10 + 4 + 6 + 4
    assert {atoms.info.get(POOL_CERTIFIED) for atoms in output} == {None, False}
    assert second.looks[0] == first.looks[0]
    assert len(LabelStore(config.output / "labels.db")) == 10 + 4 + 6 + 4


def test_the_label_budget_is_kept_even_across_a_kill(
    client: Client, pool: Path, tmp_path: Path
) -> None:
    """The decision at a look must not see labels that were made after it."""
    limits = {"max_rounds": 9, "max_labels": 20}
    undisturbed = run(run_config(pool, tmp_path / "a", stop=limits), client=client)
    config = run_config(pool, tmp_path / "b", stop=limits)
    with pytest.raises(StopHereError):
        run(config, client=client, notify=stop_at(event="labelled", round=1, purpose="batch"))
    resumed = run(config, client=client)
    for certificate in (undisturbed, resumed):
        assert certificate.reason == "max_labels"
        assert [look.n_audit for look in certificate.looks] == [4, 0]
    assert resumed.looks == undisturbed.looks
    assert len(LabelStore(config.output / "labels.db")) == 20
    more = run(raised(config, max_rounds=9, max_labels=24), client=client)
    assert more.reason == "max_labels"
    assert len(LabelStore(config.output / "labels.db")) == 24


def test_a_pool_that_is_used_up_is_labelled_completely(client: Client, tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool.extxyz", waters(16))
    config = run_config(
        pool,
        tmp_path / "run",
        selection={"initial": 10, "batch": 4, "audit": 2},
        stop={"max_rounds": 9},
    )
    certificate = run(config, client=client)
    assert certificate.certified  # every structure has a reference label
    assert certificate.looks[-1].accuracy_bound == 1.0
    assert len(LabelStore(config.output / "labels.db")) == 16


def test_a_pool_with_too_many_failures_is_not_certified(client: Client, tmp_path: Path) -> None:
    structures = waters(16)
    for atoms in structures[:6]:
        atoms.positions[:, 2] += 200 if atoms is structures[0] else 70
    config = run_config(
        write_pool(tmp_path / "pool.extxyz", structures),
        tmp_path / "run",
        labels={"reference": {"calculator": "small_runs:FussyCalculator"}},
        selection={"initial": 10, "batch": 4, "audit": 2},
        stop={"max_rounds": 9},
    )
    certificate = run(config, client=client)
    assert certificate.reason == "too many failed labels"
    store = LabelStore(config.output / "labels.db")
    assert 2 <= store.census()["reference"]["failed"] <= 6
    failed = set(store.keys("reference", LabelStatus.failed))
    for path in config.output.glob("rounds/*/*.extxyz"):
        if path.name in ("train.extxyz", "valid.extxyz"):
            assert not failed & {structure_key(atoms) for atoms in read_structures(path)}
    misses = sum(look.n_audit_misses for look in certificate.looks)
    assert misses >= sum(look.n_audit_failed for look in certificate.looks)
    messages = {label.message for key in failed if (label := store.get(key, "reference"))}
    assert any("not finite: energy" in message for message in messages)
    assert any("no convergence" in message for message in messages)


def test_the_rule_of_the_paper_is_a_choice(client: Client, pool: Path, tmp_path: Path) -> None:
    config = run_config(
        pool,
        tmp_path / "run",
        certificate={"method": "kl_batch", "tolerance": 100.0, "accuracy": 0.4},
        stop={"max_rounds": 4},
    )
    certificate = run(config, client=client)
    assert certificate.certified
    assert {look.method for look in certificate.looks} == {"kl_batch"}
    assert certificate.looks[0].n_audit == 6  # the batch itself
    assert "two assumptions that were not checked" in certificate.statement
    selection = read_json(config.output / "rounds" / "001" / "selection.json")
    assert selection["audit"] == []


# ------------------------------------------------------------------------------ output
def awkward_pool(seed: int, initial: int, audit: int) -> tuple[list[Atoms], int, int]:
    """Return a pool with two duplicates, and the places of two structures that will fail.

    The label of the first fails in the first round. The element of the second is never labelled.
    """
    structures = waters(20)
    drawn = draw_audit(20, initial, stream(seed, 0, "batch"))
    rest = np.setdiff1d(np.arange(20), drawn)
    audited = rest[draw_audit(len(rest), audit, stream(seed, 1, "audit"))]
    failing, unknown = int(drawn[0]), int(np.setdiff1d(rest, audited)[0])
    structures[failing].positions[:, 2] += 200
    structures[unknown] = molecule("NH3")
    structures += [structures[int(drawn[1])].copy(), structures[failing].copy()]
    for number, atoms in enumerate(structures):
        atoms.info |= {"name": f"number {number}", REF_ENERGY: 17.0, POOL_SOURCE: "reference"}
        atoms.arrays[REF_FORCES] = np.zeros((len(atoms), 3))
        atoms.set_array("site", np.arange(len(atoms)))
        atoms.set_momenta(np.full((len(atoms), 3), 0.5))
    structures[0].set_constraint(FixAtoms([1]))
    return structures, failing, unknown


def test_every_structure_of_the_pool_is_in_the_output(client: Client, tmp_path: Path) -> None:
    structures, failing, unknown = awkward_pool(seed=1, initial=10, audit=4)
    path = write_pool(tmp_path / "pool.extxyz", structures)
    pool = ase.io.read(path, ":")
    config = run_config(
        path,
        tmp_path / "run",
        labels={"reference": {"calculator": "small_runs:FussyCalculator"}},
    )
    certificate = run(config, client=client)
    assert certificate.n_pool == 20
    output = ase.io.read(config.output / "pool.extxyz", ":")
    assert [atoms.info["name"] for atoms in output] == [atoms.info["name"] for atoms in pool]
    (finished,) = (e for e in read_jsonl(config.output / "events.jsonl") if "sources" in e)
    assert finished["sources"] == {"reference": 14, "prediction": 5, "failed": 3}
    assert finished["sources"] == Counter(atoms.info[POOL_SOURCE] for atoms in output)
    store = LabelStore(config.output / "labels.db")
    model = RunFolder(config.output).model
    for before, atoms in zip(pool, output, strict=True):
        np.testing.assert_allclose(atoms.positions, before.positions, atol=1e-7)
        np.testing.assert_array_equal(atoms.arrays["site"], before.arrays["site"])
        np.testing.assert_allclose(atoms.get_momenta(), before.get_momenta())
        label = store.get(structure_key(before), "reference")
        if atoms.info[POOL_SOURCE] == "reference":
            assert label is not None
            assert atoms.info[REF_ENERGY] == pytest.approx(label.values["energy"], rel=1e-12)
            np.testing.assert_allclose(atoms.arrays[REF_FORCES], label.values["forces"], atol=1e-7)
            assert atoms.info[REF_METHOD].startswith("FussyCalculator")
            expected = {"energy": label.values["energy"], "forces": label.values["forces"]}
        else:  # labels that came with the file are of another method
            assert not {REF_ENERGY, REF_METHOD} & atoms.info.keys()
            assert REF_FORCES not in atoms.arrays
            expected = {}
        if atoms.info[POOL_SOURCE] == "prediction":
            assert label is None
            assert atoms.info[POOL_CERTIFIED] is False
            assert atoms.info[POOL_MODEL] == f"sha256:{certificate.model_hash}"
            (expected,) = predict(model, [before])
        found = results_of(atoms)
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4)
    assert output[0].constraints[0].index.tolist() == [1]
    for place in (failing, 21):
        reason = output[place].info[POOL_FAILURE]
        assert reason.startswith("its label is failed: ")
        assert "no convergence [in 3 cycles] /tmp/log" in reason
    assert output[unknown].info[POOL_FAILURE].startswith("it cannot be predicted: atom 0 is N")
    page = write_report(config.output).read_text()
    assert "pool.extxyz: 14 structures with a reference label, 5 with a prediction of" in page


def test_the_output_is_the_same_after_a_kill_at_the_end(
    client: Client, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(pool, tmp_path / "run")
    output, certificate = config.output / "pool.extxyz", config.output / "certificate.json"
    with monkeypatch.context() as patch:
        patch.setattr("orbcalc.active.output.write_structures", killed)
        with pytest.raises(StopHereError):
            run(config, client=client)
    assert not output.exists()
    before = certificate.read_bytes()
    first = run(config, client=client)
    text = output.read_text()
    output.unlink()
    assert run(config, client=client) == first
    assert output.read_text() == text
    assert certificate.read_bytes() == before
    assert len(read_jsonl(config.output / "events.jsonl")) == 8 + 2
    output.unlink()
    RunFolder(config.output).model.write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"model\.orbcalc is not the model of .*Restore it"):
        run(config, client=client)


def test_what_md_found_follows_the_structures_of_the_file(story: Story) -> None:
    outputs = [read_structures(f / "pool.extxyz") for f in (story.killed, story.undisturbed)]
    for output, folder in zip(outputs, (story.killed, story.undisturbed), strict=True):
        pool = RunFolder(folder).pool(3)
        assert [structure_key(atoms) for atoms in output] == list(pool)
        listed = read_structures(story.config.with_name("pool.xyz"))
        assert list(pool)[:30] == [structure_key(atoms) for atoms in listed]
        assert len(output) > 30
        assert {atoms.info[POOL_SOURCE] for atoms in output} == {"reference", "prediction"}
    for one, other in zip(*outputs, strict=True):
        assert one.info.pop(POOL_MODEL, "") or one.info[POOL_SOURCE] == "reference"
        other.info.pop(POOL_MODEL, None)
        assert one.info == other.info
        assert results_of(one)["energy"] == pytest.approx(results_of(other)["energy"], abs=1e-5)


# ---------------------------------------------------------------------------- refusals
def test_the_folder_of_another_run_is_refused(pool: Path, tmp_path: Path) -> None:
    config = run_config(pool, tmp_path / "run")
    folder = RunFolder(config.output)
    folder.prepare(config)
    write_structures(folder.round(0).pool, waters(2))
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        run(run_config(pool, tmp_path / "run", seed=2))


def test_a_run_that_another_process_is_at_work_in_is_refused(pool: Path, tmp_path: Path) -> None:
    config = run_config(pool, tmp_path / "run")
    with (
        RunFolder(config.output).locked(),
        pytest.raises(ConfigError, match="another process is at work in"),
    ):
        run(config)


def test_a_look_is_counted_over_what_it_was_drawn_from(pool: Path, tmp_path: Path) -> None:
    config = run_config(pool, tmp_path / "run", committee=1)
    folder = RunFolder(config.output)
    folder.prepare(config)
    learning = ActiveLearning(config, folder, HereExecutor())
    assert learning.step(0) is None
    this = Round(1, config, folder, learning.store, HereExecutor(), lambda record: None)
    structures = this.grow_pool()
    selection = this.select(structures)
    apart = {*selection["audit"], *learning.store.keys("reference")}
    this.label("batch", [atoms for key, atoms in structures.items() if key not in apart][:5])
    with pytest.raises(OrbcalcError, match="drawn from 20 unlabelled structures, but 15 are"):
        this.look(selection, structures)


def test_paths_in_python_start_where_the_run_does(
    client: Client, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = run_config(Path(pool.name), Path("run"), certificate=FORGIVING)
    with pytest.raises(StopHereError):
        run(config, client=client, notify=stop_at(event="round"))
    assert run(config, client=client).certified


def test_a_copied_run_trains_in_its_own_folder(pool: Path, tmp_path: Path) -> None:
    config = run_config(pool, tmp_path / "run", committee=1, device="nonsense")
    folder = RunFolder(config.output)
    folder.prepare(config)
    with pytest.raises(ConfigError, match="nonsense"):
        ActiveLearning(config, folder, HereExecutor()).step(0)
    assert folder.round(0).train.exists()
    copy = config.model_copy(update={"output": tmp_path / "copy", "device": "cpu"})
    shutil.copytree(folder.path, copy.output)
    there = RunFolder(copy.output)
    there.prepare(copy)
    assert ActiveLearning(copy, there, HereExecutor()).step(0) is None
    assert there.round(0).model.exists()
    assert not folder.round(0).model.exists()


@pytest.mark.parametrize("forces", [False, True])
def test_predictions_are_made_on_the_device_of_the_run(story: Story, forces: bool) -> None:
    model, structures = RunFolder(story.undisturbed).round(0).model, waters(1)
    with pytest.raises(ConfigError, match="nonsense"):
        predict_pool(HereExecutor(), model, structures, "nonsense", forces=forces)
    with pytest.raises(ConfigError, match="nonsense"):
        predict_results(HereExecutor(), model, structures, "nonsense")


@pytest.mark.parametrize("quantity", sorted(QUANTITIES))
def test_scores_are_expected_errors_of_what_is_certified(story: Story, quantity: str) -> None:
    model, structures = RunFolder(story.undisturbed).round(0).model, [molecule("H2O"), *waters(3)]
    found = predict_pool(HereExecutor(), model, structures, "cpu", quantity=quantity)
    results = predict(model, structures, ("energy", "forces"), device="cpu")
    expected = {
        "energy": [r["energy_uncertainty"] for r in results],
        "energy_per_atom": [r["energy_uncertainty"] / 3 for r in results],
        "forces": [r["forces_uncertainty"].max() for r in results],
    }
    assert [p["score"] for p in found] == pytest.approx(expected[quantity], rel=1e-5)
    assert all("forces" not in p for p in found)


def test_the_files_of_the_pool_are_read_once(
    client: Client, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = write_pool(tmp_path / "start.xyz", [molecule("H2O")])
    read, paths = ase.io.read, list[Path]()

    def watched(path: Any, *arguments: Any, **options: Any) -> Any:
        paths.append(path)
        return read(path, *arguments, **options)

    monkeypatch.setattr("ase.io.read", watched)
    md = {"walkers": 1, "steps": 2, "every": 1}
    for number, sources in enumerate(({}, {"md": md}, {"md": md, "start": str(start)})):
        paths.clear()
        config = run_config(pool, tmp_path / f"run{number}", pool=sources)
        with pytest.raises(StopHereError):
            run(config, client=client, notify=stop_at(event="selection"))
        assert paths.count(pool) == 1
        assert paths.count(start) == ("start" in sources)
        pool_of_run = RunFolder(config.output).pool(1)
        assert len(pool_of_run) == (32 if sources else 30)


def test_an_audit_is_labelled_until_it_decides(client: Client, pool: Path, tmp_path: Path) -> None:
    def config_of(name: str, tolerance: float, accuracy: float = 0.7) -> RunConfig:
        return run_config(
            pool,
            tmp_path / name,
            certificate={"tolerance": tolerance, "accuracy": accuracy, "delta": 0.2},
            selection={"audit": 15, "audit_step": 3},
            stop={"max_rounds": 2},
        )

    def story(config: RunConfig) -> tuple[dict[str, Any], list[str]]:
        selection = read_json(config.output / "rounds" / "001" / "selection.json")
        assert len(selection["audit"]) == 15
        assert {*selection["audit"]} <= selection["predictions"].keys()
        events = read_jsonl(config.output / "events.jsonl")
        return selection, [e["purpose"] for e in events if e["event"] == "labelled"]

    good, stopped, bad = (
        config_of("good", 100.0),
        config_of("stopped", 100.0),
        config_of("bad", 1e-9, 0.9),  # its whole audit would not leave so few
    )
    certificate = run(good, client=client)
    assert certificate.certified
    (look,) = certificate.looks
    assert look.n_audit in (3, 6, 9, 12)
    selection, labelled = story(good)
    assert labelled == ["batch", *["audit"] * (look.n_audit // 3)]
    assert "batch" not in selection
    store = LabelStore(good.output / "labels.db")
    known = [store.status(key, "reference") is not None for key in selection["audit"]]
    assert known == [True] * look.n_audit + [False] * (15 - look.n_audit)

    with pytest.raises(StopHereError):  # after the first part
        run(stopped, client=client, notify=stop_at(event="labelled", purpose="audit"))
    assert run(stopped, client=client).looks == certificate.looks
    assert story(stopped)[0] == selection

    certificate = run(bad, client=client)
    assert [look.n_audit for look in certificate.looks] == [3, 3]  # in vain, which is soon seen
    selection, labelled = story(bad)
    assert labelled == ["batch", "audit", "batch", "audit"]
    assert len(selection["batch"]) == 6
    assert not {*selection["audit"][:3]} & {*selection["batch"]}
    facts = read_run(bad.output)
    assert [len(r.audit) for r in facts.rounds] == [0, 3, 3]
    assert [r.statuses["audit"]["waiting"] for r in facts.rounds] == [0, 0, 0]


def test_a_run_with_a_changed_pool_is_refused(
    client: Client, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(pool, tmp_path / "run")
    with pytest.raises(StopHereError):
        run(config, client=client, notify=stop_at(event="selection"))
    before = pool.read_bytes()
    write_pool(pool, waters(30, seed=9))
    with monkeypatch.context() as patch:
        patch.setattr("orbcalc.active.loop.open_executor", pytest.fail)
        with pytest.raises(ConfigError, match=r"pool\.extxyz has changed since the run in"):
            run(config)
    pool.write_bytes(before)
    with pytest.raises(StopHereError):
        run(config, client=client, notify=stop_at(event="labelled"))
    pool.unlink()  # it is in the run folder
    assert run(config, client=client).reason == "max_rounds"


def test_file_labels_are_counted_before_anything_starts(
    labelled_waters: list[Atoms], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    structures = [atoms.copy() for atoms in labelled_waters]
    del structures[25].info["REF_energy"]
    config = run_config(
        write_pool(tmp_path / "pool.extxyz", structures),
        tmp_path / "run",
        labels={"reference": {"calculator": "file"}},
    )
    monkeypatch.setattr("orbcalc.active.loop.open_executor", pytest.fail)
    with pytest.raises(MissingLabelError, match=r"REF_energy: 29 of 30.*structure 25, H2O"):
        run(config)


def test_labels_that_all_fail_end_the_run_and_are_tried_again(
    client: Client, tmp_path: Path
) -> None:
    structures = waters(12)
    for atoms in structures:
        atoms.positions[:, 2] += 200
    config = run_config(
        write_pool(tmp_path / "pool.extxyz", structures),
        tmp_path / "run",
        labels={"reference": {"calculator": "small_runs:FussyCalculator"}},
    )
    for _ in range(2):
        with pytest.raises(LabelError, match=r"none of 10 reference labels .*Mend what is wrong"):
            run(config, client=client)
    events = [e for e in read_jsonl(config.output / "events.jsonl") if e["event"] == "labelled"]
    assert [event["statuses"]["failed"] for event in events] == [10, 10]


def test_a_pool_that_stays_empty_is_told(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orbcalc.active.round.bootstrap_walk", walk_nowhere)
    config = run_config(
        tmp_path / "none",
        tmp_path / "run",
        pool={
            "structures": [],
            "start": str(write_pool(tmp_path / "start.xyz", waters(1))),
            "md": {"walkers": 2, "steps": 4, "every": 2},
        },
    )
    with pytest.raises(OrbcalcError, match=r"the pool is empty: .*\(SCFError: no luck\)"):
        run(config, client=client)
    assert not RunFolder(config.output).round(0).pool.exists()


# --------------------------------------------------------------------------- pools
def test_labels_of_a_file_are_taken_from_it(
    client: Client, labelled_waters: list[Atoms], tmp_path: Path
) -> None:
    config = run_config(
        write_pool(tmp_path / "pool.extxyz", labelled_waters),
        tmp_path / "run",
        labels={"reference": {"calculator": "file"}},
    )
    run(config, client=client)
    store = LabelStore(config.output / "labels.db")
    assert len(store) == 14
    known = {structure_key(atoms): atoms.info["REF_energy"] for atoms in labelled_waters}
    for key in store.keys("reference", LabelStatus.ok):
        label = store.get(key, "reference")
        assert label is not None
        assert label.values["energy"] == pytest.approx(known[key], abs=1e-7)


def test_an_element_that_no_model_knows_yet_is_the_hardest_and_a_miss(
    client: Client, tmp_path: Path
) -> None:
    ammonia = molecule("NH3")
    n_pool, seed = 31, 1
    drawn = draw_audit(n_pool, 10, stream(seed, 0, "batch"))
    place = min(set(range(n_pool)) - set(drawn.tolist()))
    structures = waters(n_pool - 1)
    structures.insert(place, ammonia)
    config = run_config(
        write_pool(tmp_path / "pool.extxyz", structures),
        tmp_path / "run",
        seed=seed,
        certificate=FORGIVING | {"accuracy": 0.999},
        stop={"max_rounds": 2},
    )
    certificate = run(config, client=client)
    first = read_json(config.output / "rounds" / "001" / "selection.json")
    key = structure_key(ammonia)
    assert key in (first["audit"] + first["batch"][:1])
    assert key not in first["predictions"]
    assert certificate.looks[0].n_audit_misses == (key in first["audit"])
    before, _ = load_model(config.output / "rounds" / "000" / "model.orbcalc")
    after, _ = load_model(config.output / "rounds" / "001" / "model.orbcalc")
    assert (before.first.elements, after.first.elements) == ((1, 8), (1, 7, 8))


def second_round(config: RunConfig, pool: Path, executor: Executor) -> Round:
    """Begin the round after the first in a folder that holds nothing but the pool."""
    folder = RunFolder(config.output)
    folder.prepare(config)
    write_structures(folder.round(0).pool, read_structures(pool))
    return Round(1, config, folder, LabelStore(folder.labels), executor, lambda record: None)


def no_numbers_for_two(
    executor: Executor, model: Path, structures: Any, device: str, *, quantity: str
) -> list[dict[str, Any]]:
    """Predict NaN for the first structure, and nothing at all for the second."""
    good = {"energy": -1.0, "uncertainty": 0.1, "score": 0.1, "features": np.zeros(4)}
    bad = {**dict.fromkeys(good, np.nan), "features": np.full(4, np.nan)}
    return [bad, {}, *({**good} for _ in structures[2:])]


def test_nan_predictions_are_the_hardest_and_never_hits(
    executor: Executor, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(
        pool, tmp_path / "run", selection={"audit": 28, "batch": 2}, certificate=FORGIVING
    )
    monkeypatch.setattr("orbcalc.active.round.predict_pool", no_numbers_for_two)
    second = second_round(config, pool, executor)
    folder, structures = second.folder, second.folder.pool(1)
    selection = second.select(structures)
    unpredicted = list(structures)[:2]
    assert not set(unpredicted) & set(selection["predictions"])
    assert json.loads(folder.round(1).selection.read_text()) == selection
    others = [k for k in structures if k not in unpredicted][:3]
    rigged = {"open": 30, "audit": [*unpredicted, *others], "batch": [], "predictions": {}}
    second.label("audit", [structures[key] for key in rigged["audit"]])
    rigged["predictions"] = {
        key: {"energy": float(label.values["energy"]), "uncertainty": 0.1}
        for key in others
        if (label := second.store.get(key, "reference"))
    }
    look = second.look(rigged, structures)
    assert (look.n_audit, look.n_audit_misses, look.n_audit_failed) == (5, 2, 0)


def test_the_batch_follows_the_score_of_what_is_certified(
    executor: Executor, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the uncertainty of the energy per atom, which is for the records."""

    def opposed(
        executor: Executor, model: Path, structures: Any, device: str, *, quantity: str
    ) -> list[dict[str, Any]]:
        return [
            {"energy": 0.0, "uncertainty": -n, "score": float(n), "features": np.zeros(4)}
            for n in range(len(structures))
        ]

    selection = {"audit": 2, "batch": 3, "diversity": 1.0}
    config = run_config(pool, tmp_path / "run", selection=selection, certificate=FORGIVING)
    monkeypatch.setattr("orbcalc.active.round.predict_pool", opposed)
    second = second_round(config, pool, executor)
    structures = second.folder.pool(1)
    chosen = second.select(structures)
    second.select_batch(chosen, structures)
    assert chosen["batch"] == list(reversed(structures))[:3]


# ------------------------------------------------------------------------- held out
def test_the_held_out_follow_from_their_content() -> None:
    structures = waters(60)
    out = _held_out(structures, 0.2)
    assert 3 <= sum(out) <= 25
    assert _held_out(structures[::-1], 0.2) == out[::-1]


def test_something_is_always_held_out_and_something_left() -> None:
    for n in range(2, 12):
        for seed in range(5):
            assert 1 <= sum(_held_out(waters(n, seed), 0.1)) <= n // 2
    assert not any(_held_out(waters(1), 0.1))
    assert not any(_held_out([molecule("H2O"), molecule("CH4")], 0.1))


def test_the_only_structure_with_an_element_is_trained_on() -> None:
    for seed in range(20):
        structures = [molecule("NH3"), *waters(5, seed)]
        assert not _held_out(structures, 0.49)[0]


# --------------------------------------------------------------- other rules and quantities
def test_forces_and_their_mean_error_are_certified(
    client: Client, pool: Path, tmp_path: Path
) -> None:
    config = run_config(
        pool,
        tmp_path / "run",
        certificate={
            "quantity": "forces",
            "tolerance": 100.0,
            "mean_error": 90.0,
            "accuracy": 0.5,
        },
        selection={"method": "determinant", "cost_aware": True},
        stop={"max_rounds": 3},
    )
    certificate = run(config, client=client)
    assert certificate.certified
    assert certificate.quantity == "largest error of the force on an atom, eV/Å"
    look = certificate.looks[-1]
    selection = read_json(config.output / "rounds" / f"{look.look:03d}" / "selection.json")
    store = LabelStore(config.output / "labels.db")
    losses = []
    for key in selection["audit"]:
        label = store.get(key, "reference")
        assert label is not None
        difference = np.array(selection["predictions"][key]["forces"]) - label.values["forces"]
        losses.append(min(np.sqrt((difference**2).sum(axis=1)).max() / 100.0, 1.0))
    assert sorted(look.losses or ()) == pytest.approx(sorted(losses))
    assert "mean over the pool of the absolute error, clipped at 100" in certificate.statement
    report = write_report(config.output)
    text = report.read_text()
    assert "largest error of the force on an atom" in text
    assert "Mean error (clipped)" in text


def test_total_energies_have_a_tolerance_of_their_own(
    client: Client, pool: Path, tmp_path: Path
) -> None:
    errors = {}
    for quantity in ("energy", "energy_per_atom"):
        config = run_config(
            pool,
            tmp_path / quantity,
            certificate={"quantity": quantity},
            selection={"method": "random"},
        )
        assert run(config, client=client).reason == "max_rounds"
        (event,) = (e for e in read_jsonl(config.output / "events.jsonl") if e["event"] == "look")
        errors[quantity] = event["mean_error"]
        assert event["unit"] == ("eV" if quantity == "energy" else "eV/atom")
    assert errors["energy"] == pytest.approx(3 * errors["energy_per_atom"], rel=1e-3)


def test_the_cheap_labels_of_the_whole_pool_are_learned_from(
    client: Client, tmp_path: Path
) -> None:
    structures = waters(30)
    for atoms in structures:
        atoms.info[REF_ENERGY] = -100.0
        atoms.arrays[REF_FORCES] = np.zeros((3, 3))
    config = run_config(
        write_pool(tmp_path / "pool.extxyz", structures),
        tmp_path / "run",
        labels={"reference": {"calculator": "file"}},
        pool={"charges": True},
    )
    run(config, client=client)
    first = tmp_path / "run" / "rounds" / "000"
    trained, held_out = (read_structures([first / f"{n}.extxyz"]) for n in ("train", "valid"))
    assert len(trained) + len(held_out) == 30
    # Reference labels that the loop has not asked for must not reach the training.
    assert sum(REF_ENERGY in atoms.info for atoms in (*trained, *held_out)) == 10
    for atoms in trained:
        assert (REF_FORCES in atoms.arrays) == (REF_ENERGY in atoms.info)
        assert {XTB_BLOCKS, XTB_FORCES} <= atoms.arrays.keys()
    model, metadata = load_model(first / "model.orbcalc")
    assert metadata["training_set"]["n_cheap"] == 20
    assert model.first.config.xtb_head == "baseline"
    events = read_jsonl(tmp_path / "run" / "events.jsonl")
    labelled = [event for event in events if event["event"] == "labelled"]
    assert [(event["purpose"], event["structures"]) for event in labelled][:2] == [
        ("pool", 30),
        ("batch", 10),
    ]


def test_a_run_above_a_computed_baseline(client: Client, tmp_path: Path) -> None:
    """What GFN1-xTB cannot compute is not predicted, is hardest, and is not trained on."""
    slab = waters(1, seed=9)[0]
    slab.set_cell([9, 9, 20])
    slab.pbc = [True, True, False]
    start = write_pool(tmp_path / "start.xyz", waters(1, seed=8))
    config = run_config(
        write_pool(tmp_path / "pool.extxyz", [*waters(30), slab]),
        tmp_path / "run",
        labels={"reference": {"calculator": "small_runs:FussyCalculator"}},
        pool={
            "charges": True,
            "start": str(start),
            "md": {
                "walkers": 1,
                "steps": 8,
                "every": 4,
                "rounds": 2,
                "max_uncertainty": None,
                "max_force_uncertainty": None,
            },
        },
        potential={"baseline": "GFN1-xTB"},
        selection={"initial": 10, "batch": 6, "audit": 4},
        stop={"max_rounds": 2},
    )
    run(config, client=client)
    found = read_structures(config.output / "pool.extxyz")
    labels = LabelStore(config.output / "labels.db")
    # Also what MD has found has the labels of the baseline.
    assert len(found) > 31
    assert len(labels.keys("charges", LabelStatus.ok)) == len(found) - 1
    assert labels.status(structure_key(slab), "charges") is LabelStatus.unsupported
    assert labels.status(structure_key(slab), "reference") is LabelStatus.ok
    _, metadata = load_model(config.output / "rounds" / "001" / "model.orbcalc")
    counts = metadata["training_set"]
    n_labelled = read_json(config.output / "rounds" / "001" / "round.json")["labelled"]
    assert counts["n_train"] + counts["n_valid"] == n_labelled - 1
    predictions = [atoms for atoms in found if atoms.info[POOL_SOURCE] == "prediction"]
    computed = predict(config.output / "model.orbcalc", predictions)
    for atoms, result in zip(predictions, computed, strict=True):
        assert atoms.get_potential_energy() == pytest.approx(result["energy"], abs=1e-4)
        np.testing.assert_allclose(atoms.get_forces(), result["forces"], atol=1e-3)
    assert predictions
    assert write_report(config.output).is_file()
