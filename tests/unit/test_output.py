"""The file with a whole pool: labels, predictions, and what has neither."""

from __future__ import annotations

import hashlib
from pathlib import Path

import ase.io
import numpy as np
import pytest
import structures
from ase import Atoms
from small_runs import HereExecutor

from orbcalc.active.certificate import Certificate, PoolCounts, audit_look
from orbcalc.active.folder import RunFolder, write_structures
from orbcalc.active.output import write_output
from orbcalc.config import PoolConfig, RunConfig
from orbcalc.labels.label import Label, LabelStatus, Provenance
from orbcalc.labels.store import LabelStore
from orbcalc.model.checkpoint import save_model
from orbcalc.model.committee import Committee
from orbcalc.prediction import predict
from orbcalc.properties import POOL_CERTIFIED, POOL_FAILURE, POOL_SOURCE, REF_STRESS
from orbcalc.results import results_of
from orbcalc.structures import structure_key

ORIGIN = Provenance("DFT", "program", "1")

CONFIG = RunConfig(pool=PoolConfig(structures=(Path("pool.xyz"),)), device="cpu")


@pytest.fixture
def folder(tmp_path: Path, committee: Committee) -> RunFolder:
    """A pool of two crystals and two molecules, and a released model."""
    folder = RunFolder(tmp_path)
    crystals = [structures.ice_cell(), structures.rock_salt()]
    molecules = [structures.water(), Atoms("Kr")]
    write_structures(folder.round(0).pool, [*crystals, *molecules])
    save_model(folder.model, committee)
    return folder


def certificate(folder: RunFolder, n_right: int = 4) -> Certificate:
    """Return a certificate for the pool, granted or not, as if that many had been looked at."""
    audited = [True] * n_right
    look = audit_look(PoolCounts(4, 0, 0), audited, look=1, gamma=0.9, delta=0.05)
    return Certificate(
        reason="certified" if look.certified else "max_rounds",
        looks=(look,),
        tolerance=0.1,
        quantity="total energy, eV",
        gamma=0.9,
        delta=0.05,
        seed=0,
        n_pool=4,
        pool_hash="pool",
        model_hash=hashlib.sha256(folder.model.read_bytes()).hexdigest()[:16],
        version="0",
    )


def written(folder: RunFolder, end: Certificate) -> list[Atoms]:
    """Write the output and read it."""
    counts = write_output(HereExecutor(), folder, LabelStore(folder.labels), end, CONFIG)
    found: list[Atoms] = ase.io.read(folder.results, ":")
    sources = [atoms.info[POOL_SOURCE] for atoms in found]
    assert counts == {name: sources.count(name) for name in counts}
    return found


@pytest.mark.parametrize("n_right", [4, 2])
def test_predictions_are_certified_only_by_a_certificate(folder: RunFolder, n_right: int) -> None:
    end = certificate(folder, n_right)
    found = written(folder, end)
    assert [atoms.info.get(POOL_CERTIFIED) for atoms in found] == 3 * [n_right == 4] + [None]
    assert found[3].info[POOL_SOURCE] == "failed"
    assert "it cannot be predicted: atom 0 is Kr" in found[3].info[POOL_FAILURE]
    assert found[3].calc is None


def test_predictions_hold_all_that_a_calculator_would(folder: RunFolder) -> None:
    found = written(folder, certificate(folder))
    assert ["stress" in results_of(atoms) for atoms in found] == [True, True, False, False]
    expected = predict(folder.model, found[:3], ["forces", "stress"])
    for atoms, results in zip(found, expected, strict=False):
        kept = results_of(atoms)
        assert set(kept) == set(results)
        for name, value in results.items():
            np.testing.assert_allclose(kept[name], value, rtol=1e-4, atol=1e-5)


def test_labels_stand_before_predictions(folder: RunFolder) -> None:
    ice, salt, water, _ = folder.arrivals(1)
    message = 'no "convergence"\n  in C:\\tmp\\log [3 cycles] = {5}\\'
    values = {
        "energy": -7.5,
        "forces": np.arange(3.0 * len(ice)).reshape(-1, 3),
        "stress": np.arange(6.0),
    }
    LabelStore(folder.labels).add_many(
        (atoms, [Label(structure_key(atoms), "reference", status, ORIGIN, data, 0.0, words)])
        for atoms, status, data, words in (
            (ice, LabelStatus.ok, values, ""),
            (salt, LabelStatus.scf_failed, {}, message),
            (water, LabelStatus.ok, {"energy": -1.0}, ""),
        )
    )
    found = written(folder, certificate(folder))
    sources = [atoms.info[POOL_SOURCE] for atoms in found]
    assert sources == ["reference", "failed", "reference", "failed"]
    for name, value in values.items():
        np.testing.assert_allclose(results_of(found[0])[name], value)
    np.testing.assert_allclose(found[0].info[REF_STRESS], values["stress"])
    reason = 'its label is scf_failed: no "convergence" in C:/tmp/log [3 cycles] = {5}/'
    assert found[1].info[POOL_FAILURE] == reason
    assert results_of(found[2]) == {"energy": -1.0}


def test_a_prediction_that_is_no_number_is_none(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"energy": -1.0, "forces": np.zeros((3, 3))}
    monkeypatch.setattr(
        "orbcalc.prediction.predict",
        lambda model, chunk, *_, **__: [{**good, "energy": np.nan}, *([good] * (len(chunk) - 1))],
    )
    write_structures(folder.round(0).pool, [structures.water(), structures.water()])
    write_structures(folder.round(1).pool, [Atoms("OH2", np.eye(3))])
    first, again, other = written(folder, certificate(folder))
    for atoms in (first, again):
        assert atoms.info[POOL_FAILURE] == "it cannot be predicted: not finite: energy"
        assert atoms.calc is None
    assert other.info[POOL_SOURCE] == "prediction"
