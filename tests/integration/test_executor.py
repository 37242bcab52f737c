"""Tasks on real workers: where they run, what comes back, and what a death costs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster
from small_runs import (
    count_and_raise,
    die_always,
    die_once,
    loaded_modules,
    mark_and_nap,
    nap,
    square,
    waters,
)

from orbcalc.active import executor as executor_module
from orbcalc.active.executor import Executor, open_executor
from orbcalc.active.labelling import _Chunks, label_into_store
from orbcalc.config import DaskConfig, LabelConfig, ReferenceConfig
from orbcalc.errors import ConfigError, LabelError, StructureError, WorkersLostError
from orbcalc.labels.label import Label, LabelStatus, Provenance
from orbcalc.labels.store import LabelStore
from orbcalc.structures import structure_key


def test_results_come_with_their_items(executor: Executor) -> None:
    assert sorted(executor.map(square, range(10), "label")) == [(n, n * n) for n in range(10)]


def test_a_lost_scheduler_is_told() -> None:
    cluster = LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    )
    client = Client(cluster.scheduler_address, set_as_default=False)
    try:
        outcomes = Executor(client).map(nap, [0.05] * 1000, "label")
        next(outcomes)
        cluster.close()
        with pytest.raises(WorkersLostError, match="connection to the Dask scheduler was lost"):
            list(outcomes)
    finally:
        client.close(timeout=1)
        cluster.close()


def test_a_failure_does_not_make_tasks_long() -> None:
    chunks = _Chunks(waters(1) * 1000, 60.0, 8)
    source, provenance = iter(chunks), Provenance("a", "b", "c", {})

    def took(status: LabelStatus, seconds: float) -> list[list[Label]]:
        return [[Label("k", "reference", status, provenance, wall_time_s=seconds)]]

    chunks.learn(took(LabelStatus.crashed, 0.0))
    assert len(next(source)) == 1
    chunks.learn(took(LabelStatus.ok, 300.0))
    chunks.learn(took(LabelStatus.failed, 0.002))
    assert len(next(source)) == 1
    for _ in range(50):
        chunks.learn(took(LabelStatus.ok, 2.0))
    assert len(next(source)) == 29  # in about a minute


def test_what_a_task_raises_is_its_outcome(executor: Executor) -> None:
    outcomes = dict(executor.map(square, [2, -3], "model"))
    assert outcomes[2] == 4
    assert isinstance(outcomes[-3], ValueError)
    assert str(outcomes[-3]) == "-3 is negative"


@pytest.mark.parametrize(
    ("error", "n_times"),
    [(ConfigError, 1), (StructureError, 1), (LabelError, 3), (OSError, 3)],
)
def test_what_would_fail_again_is_not_tried_again(
    executor: Executor, tmp_path: Path, error: type[Exception], n_times: int
) -> None:
    path = tmp_path / "calls"
    ((_, outcome),) = executor.map(count_and_raise, [(str(path), error)], "label")
    assert type(outcome) is error
    assert str(outcome) == "it cannot work"
    assert len(path.read_text()) == n_times


def test_a_calculator_that_cannot_be_made_is_tried_once(executor: Executor, tmp_path: Path) -> None:
    path = tmp_path / "calls"
    reference = ReferenceConfig(calculator="small_runs:NeverMade", arguments={"path": str(path)})
    store = LabelStore(tmp_path / "labels.db")
    with pytest.raises(ConfigError, match=r"NeverMade.* cannot be made: ValueError: wrong"):
        label_into_store(
            executor, waters(1), LabelConfig(reference=reference, charges=False), store
        )
    assert len(path.read_text()) == 1


def test_items_are_drawn_as_workers_become_free(executor: Executor) -> None:
    drawn: list[int] = []

    def source() -> Iterator[int]:
        for number in range(20):
            drawn.append(number)
            yield number

    results = executor.map(square, source(), "label")
    next(results)
    assert len(drawn) == 2 * executor.n_workers("label")  # no more until the first is kept
    next(results)
    assert len(drawn) == 2 * executor.n_workers("label") + 1
    assert len(list(results)) == 18


def test_whoever_stops_early_cancels_the_rest(executor: Executor, tmp_path: Path) -> None:
    marks = [str(tmp_path / str(number)) for number in range(9)]
    results = executor.map(mark_and_nap, marks, "label")
    first, _ = next(results)
    results.close()  # type: ignore[attr-defined]
    assert dict(executor.map(square, [5], "label")) == {5: 25}
    time.sleep(0.5)
    begun = list(tmp_path.iterdir())
    assert Path(first) in begun
    assert len(begun) <= 5  # one done, two after it, and at worst one more for each worker


def test_nothing_to_do_is_done_at_once(executor: Executor) -> None:
    assert list(executor.map(square, [], "label")) == []


def test_waiting_is_not_idle(executor: Executor) -> None:
    calls: list[None] = []
    list(executor.map(nap, [1.5], "model", on_wait=lambda: calls.append(None)))
    assert 1 <= len(calls) <= 40


def test_each_kind_has_its_own_workers(executor: Executor) -> None:
    assert (executor.n_workers("label"), executor.n_workers("model")) == (2, 2)
    seen = {
        kind: {pid for _, (pid, _) in executor.map(loaded_modules, range(8), kind)}
        for kind in ("label", "model")
    }
    assert not seen["label"] & seen["model"]
    assert os.getpid() not in seen["label"] | seen["model"]
    for _, (_, modules) in executor.map(loaded_modules, range(4), "label"):
        assert not {"torch", "e3nn"} & set(modules)


def test_one_thread_each(client: Client) -> None:
    for threads in client.run(os.environ.get, "OMP_NUM_THREADS").values():
        assert threads == "1"


def test_a_task_outlives_its_worker(executor: Executor, tmp_path: Path) -> None:
    assert dict(executor.map(die_once, [str(tmp_path / "x")], "label")).popitem()[1] == "survived"


def test_a_worker_that_does_not_come_back_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(executor_module, "REPLACE_AFTER_S", 0.5)
    with open_executor(DaskConfig(label_workers=1, model_workers=1)) as own:
        cluster = own.client.cluster
        (before,) = {pid for _, (pid, _) in own.map(loaded_modules, [0], "label")}
        nanny = cluster.workers.pop("label-0")  # as SpecCluster does after 15 s
        cluster.sync(nanny.close)
        (after,) = {pid for _, (pid, _) in own.map(loaded_modules, [0], "label")}
    assert after != before


def test_a_task_that_kills_every_worker_is_given_up(executor: Executor) -> None:
    (_, outcome), *rest = executor.map(die_always, [None], "label")
    assert rest == []
    assert type(outcome).__name__ == "KilledWorker"


def test_a_run_without_workers_says_so(executor: Executor) -> None:
    impatient = Executor(executor.client, worker_timeout_s=1.0)
    impatient._resources = lambda kind: {"ABACUS": 1.0}  # type: ignore[method-assign]
    with pytest.raises(WorkersLostError, match="no Dask worker that offers ABACUS for 1 s"):
        list(impatient.map(square, [1], "label"))


@contextmanager
def plain_client(n_workers: int, threads: int = 1) -> Iterator[Client]:
    """Open a cluster in this process whose workers offer no resources."""
    with (
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=threads,
            processes=False,
            dashboard_address=None,
        ) as cluster,
        Client(cluster, set_as_default=False) as plain,
    ):
        yield plain


def test_workers_that_come_later_are_used() -> None:
    with plain_client(1) as plain:
        at_once: list[int] = []
        drawn = 0

        def source() -> Iterator[float]:
            nonlocal drawn
            for _ in range(30):
                drawn += 1
                yield 0.1

        for number, _ in enumerate(Executor(plain).map(nap, source(), "label")):
            at_once.append(drawn - number)
            if number == 3:
                plain.cluster.scale(4)
                plain.wait_for_workers(4)
        assert max(at_once[:3]) <= 3
        assert max(at_once) >= 8


def test_no_worker_at_all_is_told() -> None:
    with (
        plain_client(0) as plain,
        pytest.raises(WorkersLostError, match="no Dask worker that offers LABEL for 0 s"),
    ):
        list(Executor(plain, worker_timeout_s=0.3).map(square, [1], "label"))


def test_labels_whose_worker_dies_again_and_again_are_failures(
    executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from structures import water

    monkeypatch.setattr("orbcalc.active.labelling.label_chunk", die_always)
    store = LabelStore(tmp_path / "labels.db")
    assert label_into_store(executor, [water()], LabelConfig(), store) == {"crashed": 2}
    label = store.get(structure_key(water()), "reference")
    assert label is not None
    assert label.status is LabelStatus.crashed
    assert label.message.startswith("the worker died")


def test_a_cluster_without_resources_is_used_as_it_is() -> None:
    with plain_client(1, threads=3) as plain:
        executor = Executor(plain)
        assert (executor.n_workers("label"), executor.n_workers("model")) == (3, 3)
        assert dict(executor.map(square, [3], "model")) == {3: 9}


def test_a_given_client_is_left_open(client: Client) -> None:
    with open_executor(DaskConfig(retries=7), client=client) as opened:
        assert opened.client is client
        assert opened.retries == 7
    assert client.status == "running"


def test_an_address_opens_the_scheduler_there(client: Client) -> None:
    with open_executor(DaskConfig(address=client.scheduler.address)) as opened:
        assert opened.client is not client
        assert dict(opened.map(square, [4], "label")) == {4: 16}
    assert opened.client.status == "closed"
    assert client.status == "running"


@pytest.mark.parametrize("n_failures", [2, 3])
def test_a_handshake_that_fails_is_tried_again(
    client: Client, monkeypatch: pytest.MonkeyPatch, n_failures: int
) -> None:
    attempts = 0

    def shake_hands(*arguments: object, **options: object) -> Client:
        nonlocal attempts
        attempts += 1
        if attempts <= n_failures:
            raise AssertionError
        return Client(*arguments, **options)

    monkeypatch.setattr(executor_module, "Client", shake_hands)
    address = DaskConfig(address=client.scheduler.address)
    if n_failures < executor_module.CONNECT_ATTEMPTS:
        with open_executor(address) as opened:
            assert dict(opened.map(square, [4], "label")) == {4: 16}
    else:
        with pytest.raises(ConfigError, match="no Dask scheduler answers"), open_executor(address):
            pass


@pytest.mark.parametrize("visible", ["", "0,1"])
def test_gpus_are_those_that_cuda_may_see(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert executor_module._gpu_names() == [n for n in visible.split(",") if n]


@pytest.mark.parametrize(
    ("gpus", "asked", "device", "members", "expected"),
    [
        ([], None, "auto", 1, [None]),
        (["0", "1", "2"], None, "auto", 1, ["0", "1", "2"]),
        (["0", "1"], 1, "cuda", 1, ["0"]),
        (["0", "1"], None, "cuda:1", 4, [None]),  # the worker sees both, as "cuda:1" needs
        (["0"], None, "cpu", 2, [None, None]),
    ],
)
def test_each_gpu_has_a_model_worker(
    monkeypatch: pytest.MonkeyPatch,
    gpus: list[str],
    asked: int | None,
    device: str,
    members: int,
    expected: list[str | None],
) -> None:
    started: dict[str, Any] = {}

    class NotStartedError(Exception):
        pass

    def cluster(workers: dict[str, Any], **_: Any) -> None:
        started.update(workers)
        raise NotStartedError

    monkeypatch.setattr(executor_module, "_gpu_names", lambda: gpus)
    monkeypatch.setattr(executor_module, "_LocalWorkers", cluster)
    monkeypatch.setattr(executor_module.os, "sched_getaffinity", lambda _: set(range(8)))
    config = DaskConfig(label_workers=1, model_workers=asked)
    with pytest.raises(NotStartedError):
        executor_module._local_cluster(config, members, device)
    names = [name for name in started if name.startswith("model-")]
    seen = [started[name]["options"]["env"].get("CUDA_VISIBLE_DEVICES") for name in names]
    assert seen == expected
