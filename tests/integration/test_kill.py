"""Kill anything at any time: nothing is lost, and the outcome is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from distributed import Client
from killed_run import INITIAL, Story
from small_runs import SLOW, label_children, label_rows, wait_until, waters

from orbcalc.active.executor import Executor
from orbcalc.active.labelling import label_into_store
from orbcalc.config import LabelConfig, ReferenceConfig
from orbcalc.labels.label import Label, LabelStatus
from orbcalc.labels.store import LabelStore
from orbcalc.model.checkpoint import load_model


def test_the_kills_came_at_the_right_moments(story: Story) -> None:
    assert 4 <= len(story.rows_at_kill) < INITIAL
    assert story.states_at_kill
    records = [json.loads(line) for line in story.metrics_at_kill.splitlines()]
    steps = [record["step"] for record in records if record["round"] == 1]
    assert steps
    assert len(steps) < 2 * 5


def test_no_worker_outlives_the_driver(story: Story) -> None:
    assert story.survivors == []


def test_both_end_alike(story: Story) -> None:
    assert story.codes == (1, 1), story.output
    certificates = [
        json.loads((folder / "certificate.json").read_text())
        for folder in (story.killed, story.undisturbed)
    ]
    for certificate in certificates:
        assert certificate.pop("model_hash") in certificate.pop("statement")
        assert certificate["reason"] == "max_rounds"
        assert len(certificate["looks"]) == 2
    assert certificates[0] == certificates[1]


def test_no_stored_label_is_computed_or_written_twice(story: Story) -> None:
    rows = label_rows(story.killed / "labels.db")
    assert all(rows[key] == times for key, times in story.rows_at_kill.items())
    assert all(story.computed[key] == 1 for key in story.rows_at_kill)
    assert set(story.computed_undisturbed.values()) == {1}
    assert set(story.computed) == set(story.computed_undisturbed)
    # What was under way in the two label workers at the first kill is all that is lost.
    assert story.computed.total() - story.computed_undisturbed.total() <= 4


def test_the_same_structures_are_labelled_with_the_same_values(story: Story) -> None:
    killed, undisturbed = (LabelStore(f / "labels.db") for f in (story.killed, story.undisturbed))
    assert set(killed.keys()) == set(undisturbed.keys())
    assert len(killed) == INITIAL + 6 + 6 + 6
    for key in killed.keys():  # noqa: SIM118  (it is no mapping)
        one, other = killed.get(key, "reference"), undisturbed.get(key, "reference")
        assert one is not None
        assert other is not None
        assert one.values["energy"] == other.values["energy"]


@pytest.mark.parametrize("name", ["model.orbcalc", "rounds/000/model.orbcalc"])
def test_the_models_are_bitwise_the_same(story: Story, name: str) -> None:
    (one, data), (other, other_data) = (
        load_model(folder / name) for folder in (story.killed, story.undisturbed)
    )
    assert one.calibration == other.calibration
    assert data["training_set"] == other_data["training_set"]
    weights, other_weights = one.state_dict(), other.state_dict()
    assert list(weights) == list(other_weights)
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_the_selections_are_the_same(story: Story) -> None:
    for number in range(3):
        name = Path("rounds") / f"{number:03d}" / "selection.json"
        assert (story.killed / name).read_text() == (story.undisturbed / name).read_text()


# ------------------------------------------------------------------- parts of a cluster
def _label(
    executor: Executor, path: Path, n: int, on_first: Callable[[], None]
) -> tuple[LabelStore, Counter[str]]:
    """Label waters, and do something when the first label has arrived."""
    store = LabelStore(path)
    config = LabelConfig(reference=ReferenceConfig(**SLOW), chunk_s=0.05)
    calls = [on_first]

    def progress(done: int, total: int, labels: list[Label]) -> None:
        if calls:
            calls.pop()()

    return store, label_into_store(executor, waters(n, seed=3), config, store, progress=progress)


def test_a_killed_label_process_costs_one_structure(executor: Executor, tmp_path: Path) -> None:
    def kill() -> None:
        victim = label_children()[0]
        victim.kill()

    store, statuses = _label(executor, tmp_path / "labels.db", 12, kill)
    crashed = store.keys("reference", LabelStatus.crashed)
    assert len(store) == 12
    assert len({*crashed, *store.keys("charges", LabelStatus.crashed)}) <= 1
    assert statuses["ok"] >= 23
    for key in crashed:
        label = store.get(key, "reference")
        assert label is not None
        assert "SIGKILL" in label.message


def test_a_killed_dask_worker_costs_nothing(
    executor: Executor, client: Client, tmp_path: Path
) -> None:
    pids = client.run(os.getpid)
    workers = client.scheduler_info(n_workers=-1)["workers"]
    victim = next(pids[a] for a, worker in workers.items() if "LABEL" in worker["resources"])
    store, statuses = _label(
        executor, tmp_path / "labels.db", 12, lambda: os.kill(victim, signal.SIGKILL)
    )
    assert statuses == {"ok": 24}
    assert len(store.keys("reference", LabelStatus.ok)) == 12
    assert not psutil.pid_exists(victim)
    wait_until(lambda: executor.n_workers("label") == 2, None)  # others count on both
