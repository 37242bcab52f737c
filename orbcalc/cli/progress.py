"""What is under way: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from orbcalc.cli.console import console
from orbcalc.rounding import at_least

if TYPE_CHECKING:
    from orbcalc.labels.label import Label

__all__ = ["event_in_words", "label_bar", "run_display", "training_bars"]


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def label_bar() -> Iterator[Callable[[int, int, Any], None]]:
    """Show labels as a bar on a terminal; nothing in a log but the census at the end."""
    with _bar() as bar:
        task = bar.add_task("labels", total=None, note="")

        def progress(done: int, total: int, labels: list[Label]) -> None:
            bar.update(task, completed=done, total=total)

        yield progress


@contextlib.contextmanager
def training_bars() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show the steps of each member as a bar on a terminal, as lines in a log."""
    with _bar() as bar:
        tasks: dict[Any, Any] = {}

        def show(record: Mapping[str, Any]) -> None:
            member = record["member"]
            if member not in tasks:
                tasks[member] = bar.add_task(f"member {member}", total=record["steps"], note="")
            note = _errors_in_words(record)
            bar.update(tasks[member], completed=record["step"], note=note)
            if not console.is_terminal:
                console.print(f"member {member} step {record['step']}/{record['steps']} {note}")

        yield show


@contextlib.contextmanager
def run_display() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show the events of a run as lines, and what is under way as bars on a terminal."""
    with _bar() as bar:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int, note: str = "") -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total, note=note)
            bar.update(tasks[name], completed=done, total=total, note=note)

        def notify(record: Mapping[str, Any]) -> None:
            if record["event"] == "labelling":
                show(f"labels ({record['purpose']})", record["done"], record["of"])
            elif record["event"] == "training":
                note = _errors_in_words(record)
                show(f"training, member {record['member']}", record["step"], record["steps"], note)
            else:
                for name in list(tasks):
                    bar.remove_task(tasks.pop(name))
                console.print(event_in_words(record))

        yield notify


def event_in_words(record: Mapping[str, Any]) -> str:
    """Say an event in one line."""
    event, where = record["event"], f"round {record.get('round', '-')}: "
    if event == "pool":
        return f"{where}{record['added']} structures added, the pool holds {record['pool']}"
    if event == "walk":
        return f"{where}a walker found {record['frames']} structures, ended: {record['ended']}"
    if event == "selection":
        most = "at most " if record["purpose"] == "audit" else ""
        return (
            f"{where}{most}{record['structures']} chosen for the {record['purpose']}, "
            f"of {record['unlabelled']} unlabelled"
        )
    if event == "labelled":
        statuses = ", ".join(f"{count} {status}" for status, count in record["statuses"].items())
        return f"{where}labelled {record['structures']} ({record['purpose']}): {statuses} labels"
    if event == "features":
        return (
            f"{where}features learned from the cheap labels of {record['n_cheap']}: "
            f"{_errors_in_words(record['errors'])} on {record['n_valid']} held out"
        )
    if event == "trained":
        cheap = f" (and {record['n_cheap']} with cheap labels)" if record["n_cheap"] else ""
        is_fit = record.get("n_left_out", 0) > 0
        judged = "on each left out in turn" if is_fit else f"on {record['n_valid']} held out"
        return (
            f"{where}trained on {record['n_train']}{cheap}: {_errors_in_words(record['errors'])} "
            f"{judged}"
        )
    if event == "look":
        mean, unit = record["mean_error"], record["unit"]
        error = "no prediction" if mean is None else f"MAE {1000 * mean:.2f} m{unit}"
        return (
            f"{where}audit of {record['audit']}: {record['misses']} misses, {error}, accuracy of "
            f"the pool at least {at_least(record['accuracy_bound'], 3)}"
        )
    if event == "round":
        return f"{where}done, {record['labelled']} of {record['pool']} labelled"
    if event == "finished" and "sources" in record:
        found = record["sources"]
        return (
            f"finished ({record['reason']}): in pool.extxyz, {found['reference']} structures have "
            f"a reference label, {found['prediction']} a prediction, {found['failed']} neither"
        )
    return f"{event}: " + ", ".join(
        f"{key} {value}" for key, value in record.items() if key not in ("event", "time")
    )


def _errors_in_words(errors: Mapping[str, Any]) -> str:
    parts = []
    if "energy_mae" in errors:
        parts.append(f"energy MAE {1000 * errors['energy_mae']:.2f} meV/atom")
    if "forces_mae" in errors:
        parts.append(f"force MAE {1000 * errors['forces_mae']:.1f} meV/Å")
    if "xtb_energy_mae" in errors and "energy_mae" not in errors:
        parts.append(f"GFN1-xTB energy MAE {1000 * errors['xtb_energy_mae']:.2f} meV/atom")
    if "charges_mae" in errors:
        parts.append(f"charge block MAE {1000 * errors['charges_mae']:.1f} me")
    return ", ".join(parts)
