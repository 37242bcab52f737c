"""Time energy and forces of orbcalc and MACE, side by side, on the same structures.

The models take turns, so that whatever else this machine does disturbs all of them alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from common import Worker, WorkerError, machine, quartiles, start
from models import Model, parse_model
from rich.console import Console
from rich.table import Table
from structures import gas_phase, water

from orbcalc.files import write_json
from orbcalc.report.style import (
    MARKERS,
    new_figure,
    png,
    round_colours,
    set_legend,
    set_log,
    set_title,
    style_axes,
)

#: What is timed, see `workers/protocol.py`.
MODES = {
    "model": "network and derivatives",
    "step": "ASE calculator, next step",
    "new": "ASE calculator, new structure",
}
#: Evaluations before any is timed: both packages optimise themselves in the first ones.
WARM_UP = 3
#: Seconds that one turn of a model should last; the first of many evaluations is left out.
TURN = 0.2
MAX_IN_TURN = 20

console = Console(soft_wrap=True, highlight=False)


def main() -> None:
    """Read the command line and run the benchmark."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    structures = _structures(options.atoms, options.molecules)
    path = options.out / "structures.extxyz"
    ase.io.write(path, list(structures.values()))
    models = [parse_model(name) for name in options.models]
    speed: dict[str, Any] = {
        "machine": machine(options.threads),
        "settings": {"device": options.device, "dtype": options.dtype, "repeats": options.repeats},
        "models": {},
        "results": [],
        "failures": [],
    }
    elements = sorted({int(z) for atoms in structures.values() for z in atoms.numbers})
    with ExitStack() as stack:
        workers = {}
        for model in models:
            worker = start(
                model, options.mace_python, threads=options.threads, log=options.out / "log.txt"
            )
            workers[model.label] = stack.enter_context(worker)
            speed["models"][model.label] = _set_up(worker, model, elements, path, options)
        for number, (name, atoms) in enumerate(structures.items()):
            for mode in options.modes:
                found = _measure(workers, number, mode, options.repeats, speed["failures"])
                place = {"structure": name, "atoms": len(atoms), "mode": mode}
                speed["results"] += [
                    {**place, "model": label, "seconds": seconds, **quartiles(seconds)}
                    for label, seconds in found.items()
                ]
            _finish(speed, workers, options.out)
            console.print(f"{name}, {len(atoms)} atoms: done")
    speed["machine"]["load_average_after"] = machine(options.threads)["load_average"]
    write_json(options.out / "speed.json", speed)
    console.print(_table(speed))
    console.print(f"load of this machine: {speed['machine']['load_average']} when it began")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mace-python", type=Path, help="interpreter of MACE's environment")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="turns of each model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--atoms", type=int, nargs="*", default=[192, 648, 1536], help="of water")
    parser.add_argument("--molecules", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    default = "orbcalc:small orbcalc:medium orbcalc:large mace:128x0e mace:128x0e+128x1o"
    parser.add_argument("--models", nargs="+", default=default.split())
    return parser.parse_args()


def _structures(atoms: Sequence[int], molecules: bool) -> dict[str, Atoms]:
    found = gas_phase() if molecules else {}
    return found | {f"water-{len(cell)}": cell for cell in map(water, atoms)}


def _set_up(
    worker: Worker, model: Model, elements: list[int], path: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Give a worker its model and the structures; returns what it is."""
    made_for = {"dtype": options.dtype, "device": options.device}
    if model.is_file:
        facts = worker.ask("load", path=str(Path(model.spec).resolve()), **made_for)
    else:
        facts = worker.ask("make", elements=elements, architecture=model.architecture, **made_for)
    if model.compiled:
        worker.ask("compile")
    worker.ask("load_structures", path=str(path.resolve()))
    return {**facts, "versions": worker.ask("describe")}


def _measure(
    workers: dict[str, Worker], structure: int, mode: str, repeats: int, failures: list[str]
) -> dict[str, list[float]]:
    """Return the seconds of each turn of each model; one that fails is left out."""
    request: dict[str, Any] = {"do": "time", "structure": structure, "mode": mode}
    in_turn: dict[str, int] = {}
    for label, worker in workers.items():
        try:
            last = worker.ask(**request, repeats=WARM_UP)[-1]
        except WorkerError as error:
            failures.append(f"{label}: {error}")
            continue
        in_turn[label] = int(np.clip(round(TURN / last), 1, MAX_IN_TURN))
    seconds: dict[str, list[float]] = {label: [] for label in in_turn}
    for _ in range(repeats):
        for label, count in in_turn.items():
            turn = workers[label].ask(**request, repeats=count)
            seconds[label].append(float(np.median(turn[1:] or turn)))
    return seconds


def _finish(speed: dict[str, Any], workers: dict[str, Worker], folder: Path) -> None:
    """Write down all that is known by now, and draw it."""
    for label, worker in workers.items():
        speed["models"][label]["memory"] = worker.ask("memory")
    speed["ratios"] = _ratios(speed["results"])
    write_json(folder / "speed.json", speed)
    (folder / "speed.png").write_bytes(_figure(speed))


def _ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each orbcalc with each MACE, turn by turn: how many times faster it is."""
    ratios = []
    for ours in results:
        for other in results:
            same = all(ours[key] == other[key] for key in ("structure", "mode"))
            if same and ours["model"].startswith("orbcalc") and other["model"].startswith("mace"):
                turns = np.array(other["seconds"]) / np.array(ours["seconds"])
                place = {key: ours[key] for key in ("structure", "atoms", "mode", "model")}
                ratios.append({**place, "against": other["model"], **quartiles(turns.tolist())})
    return ratios


def _table(speed: dict[str, Any]) -> Table:
    rivals = [label for label in speed["models"] if label.startswith("mace")]
    modes = list(dict.fromkeys(result["mode"] for result in speed["results"]))
    table = Table(title="Median milliseconds of energy and forces (quartiles: speed.json)")
    for column in ("structure", "model"):
        table.add_column(column, no_wrap=True)
    for column in (*modes, *(f"faster than {rival}" for rival in rivals)):
        table.add_column(column, justify="right", overflow="fold")
    found = {(r["structure"], r["model"], r["mode"]): r for r in speed["results"]}
    ratios = {(r["structure"], r["model"], r["against"], r["mode"]): r for r in speed["ratios"]}
    for structure in dict.fromkeys(result["structure"] for result in speed["results"]):
        for label in speed["models"]:
            times = [_cell(found.get((structure, label, mode)), 1e3) for mode in modes]
            compared = [ratios.get((structure, label, rival, modes[0])) for rival in rivals]
            table.add_row(structure, label, *times, *(_cell(ratio, 1.0) for ratio in compared))
        table.add_section()
    return table


def _cell(values: dict[str, Any] | None, unit: float) -> str:
    if values is None:
        return ""
    value = unit * values["median"]
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _figure(speed: dict[str, Any]) -> bytes:
    """Draw the time against the number of atoms, one panel for each mode."""
    modes = list(dict.fromkeys(result["mode"] for result in speed["results"]))
    labels = list(speed["models"])
    colours = round_colours(len(labels))
    figure = new_figure(4.2)
    for panel, (axes, mode) in enumerate(
        zip(figure.subplots(1, len(modes), sharey=True, squeeze=False)[0], modes, strict=True)
    ):
        shown = [result for result in speed["results"] if result["mode"] == mode]
        for label, colour, marker in zip(labels, colours, MARKERS, strict=False):
            own = sorted(
                (result for result in shown if result["model"] == label), key=lambda r: r["atoms"]
            )
            low, middle, high = (
                1e3 * np.array([result[key] for result in own]) for key in ("low", "median", "high")
            )
            axes.errorbar(
                [result["atoms"] for result in own],
                middle,
                yerr=[middle - low, high - middle],
                label=label,
                color=colour,
                marker=marker,
                ls="--" if label.startswith("mace") else "-",
                ms=4.5,
                lw=1.3,
                capsize=2,
            )
        style_axes(axes)
        set_log(axes, "x", [result["atoms"] for result in speed["results"]])
        set_log(axes, "y", [1e3 * result["median"] for result in speed["results"]])
        set_title(axes, MODES[mode])
        axes.set_xlabel("atoms")
        if panel == 0:
            axes.set_ylabel("energy and forces, ms")
            set_legend(axes, "upper left")
    return png(figure)


if __name__ == "__main__":
    main()
