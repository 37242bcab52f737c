"""The story of one configuration run twice: once killed again and again, once left alone."""

from __future__ import annotations

import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import structures
from small_runs import (
    COUNT_FILE,
    SLOW,
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

#: Structures of the first round.
INITIAL = 20


class Story(NamedTuple):
    """What was seen of both runs."""

    config: Path
    killed: Path
    undisturbed: Path
    rows_at_kill: dict[str, tuple[float, float]]
    metrics_at_kill: str
    states_at_kill: list[str]
    survivors: list[psutil.Process]
    computed: Counter[str]
    """How often each structure was computed."""
    computed_undisturbed: Counter[str]
    codes: tuple[int | None, int | None]
    output: tuple[str, str]
    """Of the undisturbed run: stdout and stderr."""


def live_through(folder: Path) -> Story:
    """Kill a run while it labels and again while it trains; let it end; run it undisturbed."""
    killed, undisturbed = folder / "killed", folder / "undisturbed"
    log, other_log = folder / "computed", folder / "computed_undisturbed"
    data = _data(folder)
    config = write_yaml(folder / "config.yaml", data)
    # Where tasks run must not matter: the other run has half as many workers.
    data["dask"] = {"label_workers": 1, "model_workers": 1}
    other_config = write_yaml(folder / "other.yaml", data)
    other = start_cli("run", other_config, "-o", undisturbed, **{COUNT_FILE: str(other_log)})
    with killed_at_the_end(other):
        first = start_cli("run", config, "-o", killed, **{COUNT_FILE: str(log)})
        with killed_at_the_end(first):
            wait_until(lambda: len(label_rows(killed / "labels.db")) >= 4, first)
            survivors = _kill(first)
            rows = label_rows(killed / "labels.db")
        second = start_cli("run", config, "-o", killed, **{COUNT_FILE: str(log)})
        training = killed / "rounds" / "001" / "model.orbcalc.training"
        with killed_at_the_end(second):
            wait_until(lambda: list(training.glob("*.state")), second)
            survivors += _kill(second)
            states = [path.name for path in training.glob("*.state")]
            metrics = (killed / "metrics.jsonl").read_text()
        third = start_cli("run", config, "-o", killed, **{COUNT_FILE: str(log)})
        with killed_at_the_end(third):
            third.communicate(timeout=200)
        output = other.communicate(timeout=200)
    return Story(
        config=config,
        killed=killed,
        undisturbed=undisturbed,
        rows_at_kill=rows,
        metrics_at_kill=metrics,
        states_at_kill=states,
        survivors=survivors,
        computed=Counter(log.read_text().split()),
        computed_undisturbed=Counter(other_log.read_text().split()),
        codes=(third.returncode, other.returncode),
        output=output,
    )


def _data(folder: Path) -> dict[str, Any]:
    start = write_pool(folder / "start.xyz", [structures.water()])
    md = {
        "walkers": 2,
        "steps": 20,
        "every": 4,
        "rounds": 2,
        "max_uncertainty": None,
        "max_force_uncertainty": None,
    }
    return run_data(
        write_pool(folder / "pool.xyz", waters(30)),
        folder / "unused",
        pool={"start": str(start), "md": md},
        labels={"reference": SLOW},
        optimizer={"steps": 50},
        selection={"initial": INITIAL, "batch": 6, "audit": 6},
        stop={"max_rounds": 2},
        dask={"label_workers": 2, "model_workers": 2},
    )


def _kill(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Kill a driver and return those of its descendants that are alive ten seconds later."""
    driver = psutil.Process(process.pid)
    family = driver.children(recursive=True)
    assert len(label_children(driver)) > 0
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    alive: list[psutil.Process] = psutil.wait_procs(family, timeout=10)[1]
    return alive
