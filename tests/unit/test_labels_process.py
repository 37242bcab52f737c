"""The worker process: results, failures, timeouts, deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import structures

from orbcalc.config import LabelConfig, ReferenceConfig
from orbcalc.errors import ConfigError, LabelError
from orbcalc.labels.label import LabelStatus
from orbcalc.labels.process import (
    WorkerCrashed,
    WorkerProcess,
    WorkerTimeout,
    label_structure,
    label_structures,
)
from orbcalc.structures import structure_key

HELPERS = '''
import os, subprocess, sys, time
import numpy as np
from ase.calculators.calculator import Calculator, all_changes

class Unreadable(Exception):
    def __init__(self, first, second):
        super().__init__(first)

def fail():
    raise ValueError("on purpose")

def fail_unreadably():
    raise Unreadable(1, 2)

def chatter():
    os.write(1, b"raw " * 1000); print("text"); return "quiet"

def threads():
    return os.environ["OMP_NUM_THREADS"], "torch" in sys.modules

def grandchild(path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(path, "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    time.sleep(60)

def note(path):
    time.sleep(0.5)
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\\n")

def leave_a_child():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    os._exit(3)

class Moody(Calculator):
    """Sleeps on oxygen, dies on sulfur, prints always."""
    implemented_properties = ["energy", "forces"]
    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        os.write(1, b"calculating\\n")
        if "O" in self.atoms.symbols:
            time.sleep(60)
        if "S" in self.atoms.symbols:
            os.abort()
        self.results = {"energy": 1.0, "forces": np.zeros((len(self.atoms), 3))}
'''


@pytest.fixture(scope="module")
def helpers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("helpers")
    (folder / "worker_helpers.py").write_text(HELPERS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def worker(helpers):
    with WorkerProcess() as process:
        yield process


def is_alive(pid):
    """Tell whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_results_and_environment(worker):
    before = dict(os.environ)
    assert worker.call("math:hypot", 3.0, 4.0, timeout_s=30.0) == 5.0
    assert worker.call("worker_helpers:threads", timeout_s=30.0) == ("1", False)
    assert dict(os.environ) == before
    array = np.arange(1_000_000.0)
    np.testing.assert_array_equal(worker.call("numpy:negative", array, timeout_s=30.0), -array)


def test_printing_does_not_disturb(worker):
    assert worker.call("worker_helpers:chatter", timeout_s=30.0) == "quiet"


def test_exceptions_come_back(worker):
    worker.call("math:sqrt", 4.0, timeout_s=30.0)
    pid = worker.pid
    with pytest.raises(ValueError, match="on purpose") as caught:
        worker.call("worker_helpers:fail", timeout_s=30.0)
    assert "worker_helpers.py" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="Unreadable"):
        worker.call("worker_helpers:fail_unreadably", timeout_s=30.0)
    with pytest.raises(AttributeError):
        worker.call("worker_helpers:no_such_name", timeout_s=30.0)
    assert worker.pid == pid


def test_timeout_kills_and_restarts(worker):
    worker.call("math:sqrt", 4.0, timeout_s=30.0)
    pid = worker.pid
    with pytest.raises(WorkerTimeout, match=r"no result after 0\.2 s"):
        worker.call("time:sleep", 60, timeout_s=0.2)
    assert not is_alive(pid)
    assert worker.call("math:sqrt", 4.0, timeout_s=30.0) == 2.0


def test_crash_tells_how(worker):
    with pytest.raises(WorkerCrashed, match="signal SIGABRT"):
        worker.call("os:abort", timeout_s=30.0)
    with pytest.raises(WorkerCrashed, match="exit code 7"):
        worker.call("os:_exit", 7, timeout_s=30.0)
    assert worker.call("math:sqrt", 4.0, timeout_s=30.0) == 2.0


def test_a_crash_is_seen_although_its_child_lives(worker):
    start = time.monotonic()
    with pytest.raises(WorkerCrashed, match="exit code 3"):
        worker.call("worker_helpers:leave_a_child", timeout_s=20.0)
    assert time.monotonic() - start < 10


def test_a_worker_killed_while_idle_is_replaced(worker):
    worker.call("math:sqrt", 4.0, timeout_s=30.0)
    os.kill(worker.pid, signal.SIGKILL)
    worker._process.wait(timeout=10)
    assert worker.call("math:sqrt", 9.0, timeout_s=30.0) == 3.0


def test_map_loses_only_the_bad_call(worker):
    naps = [(0,), (60,), (0,), ("text",), (0,)]
    outcomes = list(worker.map("time:sleep", naps, timeout_s=0.4))
    assert [type(outcome) for outcome in outcomes] == [
        type(None),
        WorkerTimeout,
        type(None),
        TypeError,
        type(None),
    ]


def test_an_abandoned_map_leaves_no_answers_behind(worker):
    results = worker.map("math:sqrt", [(1.0,), (4.0,), (9.0,)], timeout_s=30.0)
    assert next(results) == 1.0
    results.close()
    assert worker.call("math:sqrt", 16.0, timeout_s=30.0) == 4.0


def test_close_and_timeouts_end_grandchildren(helpers, tmp_path):
    with WorkerProcess() as process:
        with pytest.raises(WorkerTimeout):
            process.call("worker_helpers:grandchild", str(tmp_path / "pids"), timeout_s=3.0)
        child, grandchild = (tmp_path / "pids").read_text().split()
        assert wait_until(lambda: not is_alive(child) and not is_alive(grandchild))
        process.call("math:sqrt", 1.0, timeout_s=30.0)
        pid = process.pid
    assert not is_alive(pid)
    assert process.pid is None


@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_with_a_killed_parent(helpers, tmp_path, busy):
    path = tmp_path / "pids"
    script = f"""
import sys, time; sys.path.insert(0, {str(helpers)!r})
from orbcalc.labels.process import WorkerProcess
worker = WorkerProcess()
worker.call("math:sqrt", 1.0, timeout_s=30.0)
if {busy}:
    worker.call("worker_helpers:grandchild", {str(path)!r}, timeout_s=60.0)
else:
    open({str(path)!r}, "w").write(str(worker.pid))
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        assert wait_until(lambda: path.exists() and path.read_text())
        pids = path.read_text().split()
        assert all(map(is_alive, pids))
    finally:
        parent.kill()
        parent.wait()
    assert wait_until(lambda: not any(map(is_alive, pids)), seconds=5)


def test_a_worker_that_cannot_start(monkeypatch):
    monkeypatch.setattr("orbcalc.labels.process.BOOTSTRAP", "import no_such_module")
    with pytest.raises(LabelError, match=r"(?s)does not start.*no_such_module"):
        WorkerProcess().call("math:sqrt", 1.0, timeout_s=30.0)


def test_setup_runs_first_and_after_each_restart(worker, tmp_path):
    log = tmp_path / "log"
    setup = ("worker_helpers:note", (str(log),))
    outcomes = list(worker.map("time:sleep", [(0,), (60,), (0,)], timeout_s=0.3, setup=setup))
    assert isinstance(outcomes[1], WorkerTimeout)
    assert outcomes[::2] == [None, None]
    first, second = log.read_text().split()
    assert first != second
    with pytest.raises(ValueError, match="on purpose"):
        list(worker.map("time:sleep", [(0,)], timeout_s=0.3, setup=("worker_helpers:fail", ())))
    with pytest.raises(LabelError, match="fails in os:abort"):
        list(worker.map("time:sleep", [(0,)], timeout_s=0.3, setup=("os:abort", ())))


def test_labels_of_one_structure(worker):
    atoms = structures.water()
    charges, reference = label_structure(worker, atoms, LabelConfig())
    assert charges.key == reference.key == structure_key(atoms)
    assert (charges.kind, reference.kind) == ("charges", "reference")
    assert charges.values["orbital_blocks"].shape == (3, 23)
    assert reference.values["forces"].shape == (3, 3)
    assert reference.provenance.method == "GFN2-xTB"
    assert charges.wall_time_s > 0
    assert worker.call("worker_helpers:threads", timeout_s=30.0) == ("1", False)


def test_timeouts_and_crashes_are_a_status(worker):
    reference = ReferenceConfig(calculator="worker_helpers:Moody", version="1")
    config = LabelConfig(reference=reference, timeout_s=1.0)
    pool = [structures.lone_atom("N"), structures.water(), structures.sulfur_hexafluoride()]
    labels = [
        labels for (labels,) in label_structures(worker, [*pool, pool[0]], config, ["reference"])
    ]
    assert [str(label.status) for label in labels] == ["ok", "timeout", "crashed", "ok"]
    assert [label.key for label in labels[:3]] == [structure_key(atoms) for atoms in pool]
    assert labels[1].wall_time_s == 1.0
    assert "SIGABRT" in labels[2].message
    assert len({str(label.provenance) for label in labels}) == 1


def test_mistakes_in_the_configuration_are_raised(worker):
    config = LabelConfig(reference=ReferenceConfig(calculator="worker_helpers:NoSuch"))
    with pytest.raises(ConfigError, match="cannot be made"):
        label_structure(worker, structures.water(), config, ["reference"])


def test_chunks_are_nearly_as_fast_as_the_labels_themselves(worker):
    pool = []
    for seed in range(40):
        pool.append(structures.ethanol())
        pool[-1].rattle(0.02, seed=seed)
    list(label_structures(worker, pool[:1], LabelConfig()))
    start = time.perf_counter()
    labels = [label for labels in label_structures(worker, pool, LabelConfig()) for label in labels]
    elapsed = time.perf_counter() - start
    assert all(label.status == LabelStatus.ok for label in labels)
    assert elapsed < 3 * sum(label.wall_time_s for label in labels) + 0.2
