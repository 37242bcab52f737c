"""One cluster, one set of labelled molecules and one finished run for all of these tests."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from ase import Atoms
from distributed import Client
from killed_run import Story, live_through
from small_runs import wait_until, waters, write_pool

from orbcalc.active.executor import Executor, _local_cluster
from orbcalc.config import DaskConfig, LabelConfig
from orbcalc.labels.process import WorkerProcess, label_structures
from orbcalc.labels.store import LabelStore


class Outcome(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """Two label workers and two model workers, as a run would start them."""
    config = DaskConfig(label_workers=2, model_workers=2)
    with (
        _local_cluster(config, members=2) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def executor(client: Client) -> Executor:
    """Executor on the shared cluster, all of its workers there.

    An earlier test may have killed some. A worker that comes back just when the cluster has given
    it up is known to the scheduler for a moment, and then replaced: the cluster must know it too.
    """
    wait_until(lambda: _addresses_of_cluster(client) == _addresses_of_scheduler(client), None)
    return Executor(client)


def _addresses_of_cluster(client: Client) -> list[str] | None:
    """Return those of all four workers; None if one is missing."""
    found = [str(nanny.worker_address) for nanny in client.cluster.workers.values()]
    return sorted(found) if len(found) == 4 else None


def _addresses_of_scheduler(client: Client) -> list[str]:
    return sorted(client.scheduler_info(n_workers=-1)["workers"])


@pytest.fixture(scope="session")
def label_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Label store with thirty waters."""
    path = tmp_path_factory.mktemp("waters") / "labels.db"
    molecules = waters(30, seed=5)
    with WorkerProcess() as process:
        labels = label_structures(process, molecules, LabelConfig())
        LabelStore(path).add_many(zip(molecules, labels, strict=True))
    return path


@pytest.fixture(scope="session")
def labelled_waters(label_store: Path) -> list[Atoms]:
    """The same as structures."""
    return LabelStore(label_store).labelled_atoms()


@pytest.fixture(scope="session")
def labelled_file(labelled_waters: list[Atoms], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a file."""
    return write_pool(tmp_path_factory.mktemp("file") / "waters.extxyz", labelled_waters)


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A run that was killed twice, and one that was not."""
    return live_through(tmp_path_factory.mktemp("kill"))


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """Return a function that calls the command in this process."""
    from orbcalc.cli import main

    logger = logging.getLogger("orbcalc")
    handlers = logger.handlers[:]

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["orbcalc", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        code = exit_.value.code
        captured = capsys.readouterr()
        return Outcome(code if isinstance(code, int) else 0, captured.out, captured.err)

    yield call
    logger.handlers[:] = handlers
