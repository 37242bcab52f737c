"""Kill anything at any time: nothing is lost, and the outcome is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import structures
import torch
from distributed import Client
from small_runs import (
    COUNT_FILE,
    SlowGFN2,
    killed_at_the_end,
    label_children,
    label_rows,
    run_data,
    start_cli,
    wait_until,
    waters,
    write_pool,
    write_yaml,
)

from orbcalc.active.executor import Executor
from orbcalc.active.labelling import label_into_store
from orbcalc.config import LabelConfig, ReferenceConfig
from orbcalc.labels.label import Label, LabelStatus
from orbcalc.labels.store import LabelStore
from orbcalc.model.checkpoint import load_model

SLOW = {"calculator": f"small_runs:{SlowGFN2.__name__}", "arguments": {"pause": 0.1}}
INITIAL = 20


class Story(NamedTuple):
    """Two runs of one configuration: one killed twice, one left alone."""

    killed: Path
    undisturbed: Path
    rows_at_kill: dict[str, tuple[float, float]]
    metrics_at_kill: str
    states_at_kill: list[str]
    survivors: list[psutil.Process]
    counts: Counter[str]
    undisturbed_counts: Counter[str]
    codes: tuple[int, int]
    output: str


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Kill a run while it labels and again while it trains; let it end; run it undisturbed."""
    folder = tmp_path_factory.mktemp("kill")
    start = write_pool(folder / "start.xyz", [structures.water()])
    pool = write_pool(folder / "pool.xyz", waters(30))
    data = run_data(
        pool,
        folder / "unused",
        pool={
            "start": str(start),
            "md": {"walkers": 2, "steps": 20, "every": 4, "rounds": 2, "max_uncertainty": None},
        },
        labels={"reference": SLOW},
        optimizer={"steps": 60},
        selection={"initial": INITIAL, "batch": 6, "audit": 6},
        stop={"max_rounds": 2},
        dask={"label_workers": 2, "model_workers": 2},
    )
    config = write_yaml(folder / "config.yaml", data)
    killed, undisturbed = folder / "killed", folder / "undisturbed"
    log, other_log = folder / "computed", folder / "computed_undisturbed"

    def start_run() -> subprocess.Popen[str]:
        return start_cli("run", config, "-o", killed, **{COUNT_FILE: str(log)})

    other = start_cli("run", config, "-o", undisturbed, **{COUNT_FILE: str(other_log)})
    with killed_at_the_end(other):
        first = start_run()
        with killed_at_the_end(first):
            wait_until(lambda: len(label_rows(killed / "labels.db")) >= 4, first)
            survivors = _kill(first)
            rows = label_rows(killed / "labels.db")
        second = start_run()
        training = killed / "rounds" / "001" / "model.orbcalc.training"
        with killed_at_the_end(second):
            wait_until(lambda: list(training.glob("*.state")), second)
            survivors += _kill(second)
            states = [path.name for path in training.glob("*.state")]
            metrics = (killed / "metrics.jsonl").read_text()
        third = start_run()
        with killed_at_the_end(third):
            out, err = third.communicate(timeout=200)
        other.communicate(timeout=200)
        yield Story(
            killed=killed,
            undisturbed=undisturbed,
            rows_at_kill=rows,
            metrics_at_kill=metrics,
            states_at_kill=states,
            survivors=survivors,
            counts=Counter(log.read_text().split()),
            undisturbed_counts=Counter(other_log.read_text().split()),
            codes=(third.returncode, other.returncode),
            output=out + err,
        )


def _kill(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Kill a driver and return those of its descendants that are alive ten seconds later."""
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(label_children(psutil.Process(process.pid))) > 0
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return psutil.wait_procs(family, timeout=10)[1]


def test_the_kills_came_at_the_right_moments(story: Story) -> None:
    assert 4 <= len(story.rows_at_kill) < INITIAL
    assert story.states_at_kill
    records = [json.loads(line) for line in story.metrics_at_kill.splitlines()]
    steps = [record["step"] for record in records if record["round"] == 1]
    assert steps
    assert len(steps) < 2 * 6


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
    assert all(story.counts[key] == 1 for key in story.rows_at_kill)
    assert set(story.undisturbed_counts.values()) == {1}
    assert set(story.counts) == set(story.undisturbed_counts)
    # What was under way in the two label workers at the first kill is all that is lost.
    assert story.counts.total() - story.undisturbed_counts.total() <= 4


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
def _label(executor: Executor, path: Path, n: int, on_first: object) -> tuple[LabelStore, Counter]:
    """Label waters, and do something when the first label has arrived."""
    store = LabelStore(path)
    config = LabelConfig(reference=ReferenceConfig(**SLOW), chunk_s=0.05)
    calls = [on_first]

    def progress(done: int, total: int, labels: list[Label]) -> None:
        if calls:
            calls.pop()()  # type: ignore[operator]

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
