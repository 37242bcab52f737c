"""The page of a run: right numbers, at any moment of a run, from files that the loop wrote."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import structures
import yaml
from small_runs import HereExecutor

import orbcalc
from orbcalc.active.folder import RunFolder, write_structures
from orbcalc.active.loop import ActiveLearning
from orbcalc.config import RunConfig, parse_config
from orbcalc.errors import ConfigError
from orbcalc.files import read_json
from orbcalc.labels.label import Label, LabelStatus
from orbcalc.labels.store import LabelStore
from orbcalc.prediction import predict
from orbcalc.report import write_report
from orbcalc.report.facts import Comparison
from orbcalc.report.page import render
from orbcalc.report.reading import read_run

PLOTS = {"certificate", "costs", "learning", "parity", "uncertainty"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small real run: two rounds after the first, then its limit."""
    folder = tmp_path_factory.mktemp("finished")
    pool = []
    for seed in range(14):
        for atoms in (structures.water(), structures.ethanol()):
            atoms.rattle(0.03, seed=seed)
            pool.append(atoms)
    write_structures(folder / "pool.extxyz", pool)
    settings = {
        "output": str(folder / "run <b>&"),
        "pool": {"structures": [str(folder / "pool.extxyz")]},
        "potential": {"channels": 4, "l_max": 2, "layers": 1, "radial_hidden": 8},
        "optimizer": {"steps": 4, "evaluate_every": 2, "batch_size": 4, "warmup_steps": 1},
        "selection": {"initial": 8, "batch": 3, "audit": 5},
        "stop": {"max_rounds": 2},
    }
    config = parse_config(settings, RunConfig)
    run = RunFolder(config.output)
    run.prepare(config)
    ActiveLearning(config, run, HereExecutor()).run()
    return run.path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    """Return a copy of the run, to be changed."""
    shutil.copytree(finished, tmp_path / "run")
    return RunFolder(tmp_path / "run")


class Page(HTMLParser):
    """A page as its reader meets it."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.tags, self.addresses = "", Counter[str](), list[str]()
        self.open: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def written(run: RunFolder) -> Page:
    return Page(write_report(run.path).read_text(encoding="utf-8"))


def words(run: RunFolder) -> str:
    """Return the words of a page, which costs less than its figures."""
    return " ".join(Page(render(read_run(run.path), {})).text.split())


def audit_errors(folder: RunFolder, number: int) -> np.ndarray:
    """Return the errors of an audit per atom, eV, in the slow way: one label at a time."""
    selection = read_json(folder.round(number).selection)
    pool, store = folder.pool(number + 1), LabelStore(folder.labels)
    errors = []
    for key in selection["audit"]:
        label = store.get(key, "reference")
        assert label is not None
        difference = selection["predictions"][key]["energy"] - label.values["energy"]
        errors.append(difference / len(pool[key]))
    return np.array(errors)


# -------------------------------------------------------------------------------- facts
def test_errors_are_those_of_predictions_made_before_labelling(run: RunFolder) -> None:
    facts = read_run(run.path)
    for number in (1, 2):
        compared = facts.rounds[number].audited
        assert compared is not None
        np.testing.assert_allclose(compared.error, audit_errors(run, number), atol=1e-10)
        (event,) = (e for e in facts.events if e["event"] == "look" and e["round"] == number)
        assert compared.mae == pytest.approx(event["mean_error"])
    assert facts.rounds[0].audited is None


def test_energies_are_compared_in_the_unit_of_the_certificate(run: RunFolder) -> None:
    per_atom = read_run(run.path)
    config = yaml.safe_load(run.config_file.read_text())
    config["certificate"]["quantity"] = "energy"
    run.config_file.write_text(yaml.safe_dump(config))
    facts = read_run(run.path)
    assert (per_atom.energy_unit, facts.energy_unit) == ("eV/atom", "eV")
    assert facts.energy_tolerance == per_atom.energy_tolerance
    (before, after) = (found.rounds[2].audited for found in (per_atom, facts))
    assert before is not None
    assert after is not None
    pool = run.pool(3)
    sizes = [len(pool[key]) for key in facts.rounds[2].audit]
    for name in ("error", "uncertainty", "predicted"):
        np.testing.assert_allclose(getattr(after, name), sizes * getattr(before, name))
    text = words(run)
    assert re.search(r"MAE of the last audit [\d.]+ meV, round 2, before", text)
    assert "meV/atom" in text  # validation errors are of energies per atom


@pytest.mark.parametrize("quantity", ["energy_per_atom", "energy", "forces"])
def test_the_error_of_what_is_certified_is_shown(run: RunFolder, quantity: str) -> None:
    """Beside that of energies if these are not certified."""
    facts = read_run(run.path)
    certificate = facts.config.certificate.model_copy(update={"quantity": quantity})
    event = {"event": "look", "round": 2, "mean_error": 0.4816, "unit": "?"}
    facts = replace(
        facts,
        config=facts.config.model_copy(update={"certificate": certificate}),
        events=(*facts.events, event),
    )
    text = " ".join(Page(render(facts, {})).text.split())
    found = re.search("error of what is certified, last look 482 meV", text)
    assert (found is not None) == (quantity == "forces")
    if quantity == "forces":
        assert "meV/Å, round 2: mean largest error of the force on an atom" in text


def test_zero_of_energies_removes_the_composition(run: RunFolder) -> None:
    # Water and ethanol differ by several eV per atom; what is left must be that of their geometry.
    compared = read_run(run.path).rounds[2].audited
    assert compared is not None
    assert np.ptp(compared.reference) < 0.5


def test_counts_agree_with_the_certificate(run: RunFolder) -> None:
    facts = read_run(run.path)
    assert facts.certificate is not None
    assert [r.n_pool for r in facts.rounds] == [28, 28, 28]
    for look in facts.certificate.looks:
        seen = facts.rounds[look.look]
        assert seen.n_known == look.n_labelled
        assert seen.look is not None
        assert seen.look.accuracy_bound == look.accuracy_bound
        assert seen.look.estimate is not None
        assert look.accuracy_bound <= seen.look.estimate <= 1
    assert facts.rounds[2].batch == ()  # the run ended before
    assert sum(facts.count("reference").values()) == 8 + 5 + 3 + 5


def test_forces_are_those_of_the_audit_by_the_model_before_it(run: RunFolder) -> None:
    forces = read_run(run.path).forces
    assert forces is not None
    assert forces.source == "the audit of round 2, not yet trained on"
    keys = read_json(run.round(2).selection)["audit"]
    store = LabelStore(run.labels)
    labels = [store.get(key, "reference") for key in keys]
    pool = run.pool(3)
    expected = predict(run.round(1).model, [pool[key] for key in keys], device="cpu")
    np.testing.assert_allclose(
        forces.predicted, np.concatenate([e["forces"].ravel() for e in expected]), atol=1e-4
    )
    np.testing.assert_allclose(
        forces.reference, np.concatenate([np.ravel(x.values["forces"]) for x in labels if x])
    )


def test_an_unknown_error_is_outside_every_tolerance() -> None:
    nan = np.nan
    compared = Comparison(np.array([1.0, nan, 3.0]), np.array([1.0, 2.0, 2.5]), np.full(3, 0.1))
    assert compared.mae == 0.25
    assert compared.share_within(0.1) == pytest.approx(1 / 3)
    assert compared.share_within(10.0) == pytest.approx(2 / 3)


# --------------------------------------------------------------------------------- page
def test_a_finished_run(run: RunFolder) -> None:
    page = written(run)
    statement = json.loads(run.certificate.read_text())["statement"]
    assert "Not certified (max_rounds)" in statement
    assert statement in page.text
    text = " ".join(page.text.split())
    assert "structures in the pool 28 rounds begun: 3" in text
    assert "GFN2-xTB (tblite" in text
    assert f"orbcalc {orbcalc.__version__}" in text
    assert page.tags["tbody"] == 1
    assert {p.name for p in (run.path / "plots").iterdir()} == {f"{name}.png" for name in PLOTS}
    for plot in (run.path / "plots").iterdir():
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_page_stands_alone(run: RunFolder) -> None:
    page = written(run)
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    assert len(page.addresses) == len(PLOTS)
    start = "data:image/svg+xml;base64,"
    for address in page.addresses:
        assert address.startswith(start)
        ElementTree.fromstring(base64.b64decode(address.removeprefix(start)))
    assert not re.findall(r"https?://|@import|url\(", run.report.read_text(encoding="utf-8"))


def test_text_from_files_is_escaped(finished: Path) -> None:
    facts = read_run(finished)
    evil = "<script>alert('&')</script>"
    facts = replace(
        facts,
        folder=RunFolder(finished.parent / evil.replace("/", "")),
        provenance={"reference": evil},
        events=(*facts.events, {"event": evil, "time": facts.events[-1]["time"]}),
        certificate=None,
        config=facts.config.model_copy(update={"device": evil}),
    )
    text = render(facts, {})
    assert "<script>" not in text
    assert text.count("&lt;script&gt;") >= 4


def test_state_before_anything_happened(run: RunFolder) -> None:
    for path in run.path.iterdir():
        if path != run.config_file:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = written(run)
    assert "nothing has happened" in page.text
    assert page.addresses == []
    assert list((run.path / "plots").iterdir()) == []


@pytest.mark.parametrize("kept", ["pool", "selection", "training", "round 0"])
def test_states_of_the_first_round(run: RunFolder, kept: str) -> None:
    cut_after(run, 0)
    files = run.round(0)
    if kept != "round 0":
        files.summary.unlink()
        files.model.unlink()
    if kept in ("pool", "selection"):
        run.labels.unlink()
        run.metrics.unlink()
    if kept == "pool":
        files.selection.unlink()
    page = written(run)
    assert "Unfinished" in page.text
    assert "There is no certificate yet" in page.text
    drawn: dict[str, set[str]] = {"training": {"costs", "learning"}}
    drawn["round 0"] = drawn["training"] | {"parity"}
    plots = {path.stem for path in (run.path / "plots").iterdir()}
    assert plots == drawn.get(kept, set())
    assert len(page.addresses) == len(plots)
    forces = read_run(run.path).forces
    assert (forces is not None) == (kept == "round 0")
    if forces is not None:
        assert forces.source == "the validation set of round 0"


def test_an_audit_that_is_half_labelled_is_not_judged(run: RunFolder) -> None:
    cut_after(run, 1)
    run.round(1).summary.unlink()
    selection = read_json(run.round(1).selection)
    # A run that is killed while it labels the audit: the store lacks some of its labels.
    old, kept = LabelStore(run.labels), read_json(run.round(0).selection)["batch"]
    atoms = {key: run.pool(1)[key] for key in [*kept, *selection["audit"][:2]]}
    labels = {key: [x for k in ("charges", "reference") if (x := old.get(key, k))] for key in atoms}
    run.labels.unlink()
    LabelStore(run.labels).add_many((atoms[key], labels[key]) for key in atoms)
    facts = read_run(run.path)
    assert facts.rounds[1].statuses["audit"] == {"ok": 2, "waiting": 3}
    assert facts.rounds[1].audited is None
    page = words(run)
    assert "2 of 5" in page
    assert "6 selected structures wait for their reference label" in page


def test_failed_labels_are_counted_by_status(run: RunFolder) -> None:
    store = LabelStore(run.labels)
    key = next(k for k in run.pool(1) if store.status(k, "reference") is None)
    origin = store.provenance("reference")
    assert origin is not None
    failed = Label(key, "reference", LabelStatus.scf_failed, origin, message="no convergence")
    store.add(run.pool(1)[key], [failed])
    text = words(run)
    assert "failed labels 1 1 scf_failed" in text
    assert "of the pool never labelled 21.4 %" in text  # 28 - 21 - 1 of 28


def test_a_run_that_went_on_says_so(run: RunFolder) -> None:
    write_structures(run.round(3).pool, [])
    page = words(run)
    assert json.loads(run.certificate.read_text())["statement"] in page
    assert "The run has gone on since" in page


def test_a_look_without_a_summary_is_read_from_its_event(run: RunFolder) -> None:
    expected = read_run(run.path).rounds[2].look
    run.certificate.unlink()
    found = read_run(run.path).rounds[2].look
    assert expected is not None
    assert found == replace(expected, estimate=None)


def test_lines_that_were_cut_off_are_left_out(run: RunFolder) -> None:
    for path in (run.events, run.metrics):
        path.write_text(path.read_text()[:-20])
    run.certificate.unlink()
    assert "Unfinished" in words(run)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run folder: it has no config\.yaml"):
        write_report(tmp_path)


def test_a_certificate_that_contradicts_itself_is_refused(run: RunFolder) -> None:
    data = json.loads(run.certificate.read_text())
    data["looks"][0]["accuracy_bound"] = 1.0
    run.certificate.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"certificate\.json: look 1 .* does not follow"):
        write_report(run.path)


def test_a_damaged_model_leaves_the_rest_of_the_page(run: RunFolder) -> None:
    run.round(1).model.write_bytes(b"no model")
    page = words(run)
    assert "Forces could not be predicted" in page
    assert len(read_run(run.path).rounds) == 3


def test_the_process_is_left_alone(run: RunFolder) -> None:
    def state() -> tuple[dict[Any, Any], bool]:
        # Past RcParams.__getitem__, which would choose a backend.
        return dict(dict.items(matplotlib.rcParams)), "matplotlib.pyplot" in sys.modules

    before = state()
    write_report(run.path)
    assert state() == before


def cut_after(run: RunFolder, number: int) -> None:
    """Remove what came after a round, as if the run had been killed there."""
    run.certificate.unlink()
    run.model.unlink()
    for later in range(number + 1, 3):
        shutil.rmtree(run.round(later).folder)
    for path in (run.events, run.metrics):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [line for line in lines if line.get("round", 99) <= number]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
