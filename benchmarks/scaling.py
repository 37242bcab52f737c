"""Time and memory of orbcalc against the number of atoms: liquid water, energy and forces.

Each size is computed in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from common import WorkerError, machine, quartiles, start
from matplotlib.axes import Axes
from models import Model, parse_model
from rich.console import Console
from rich.table import Table
from structures import water

from orbcalc.files import write_json
from orbcalc.report.style import (
    BLUE,
    GREY,
    ORANGE,
    new_figure,
    png,
    set_legend,
    set_log,
    set_title,
    style_axes,
)

MODES = {"model": "network and derivatives", "new": "ASE calculator, new structure"}
#: Sizes below this are left out of the fit: there the cost of a call counts, not that of atoms.
FIT_FROM = 1000

console = Console(soft_wrap=True, highlight=False)


def main() -> None:
    """Read the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--model", default="orbcalc:medium", help="a preset or a .orbcalc file")
    default = [102, 300, 999, 3000, 9999, 30000, 99999]
    parser.add_argument("--atoms", type=int, nargs="+", default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--mace-python", type=Path, help="interpreter of MACE's environment")
    parser.add_argument(
        "--memory-gib", type=float, help="limit of a process; default: 80 %% of what is free"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = parse_model(options.model)
    scaling: dict[str, Any] = {
        "model": model.name,
        "settings": {k: getattr(options, k) for k in ("device", "dtype", "repeats")},
        "machine": machine(options.threads),
        "results": [],
        "failures": {},
    }
    for n_atoms in sorted(options.atoms):
        try:
            scaling["results"].append(_measure(model, n_atoms, options))
        except WorkerError as error:
            scaling["failures"][str(n_atoms)] = str(error)
            console.print(f"{n_atoms} atoms: {error}")
            break  # what is larger will not fit either
        console.print(f"{n_atoms} atoms: done")
        scaling["exponents"] = _exponents(scaling["results"])
        write_json(options.out / "scaling.json", scaling)
        (options.out / "scaling.png").write_bytes(_figure(scaling))
    write_json(options.out / "scaling.json", scaling)
    console.print(_table(scaling))


def _measure(model: Model, n_atoms: int, options: argparse.Namespace) -> dict[str, Any]:
    path = options.out / "structure.extxyz"
    atoms = water(n_atoms)
    ase.io.write(path, atoms)
    made_for = {"dtype": options.dtype, "device": options.device}
    with start(
        model, options.mace_python, threads=options.threads, log=options.out / "log.txt"
    ) as worker:
        if options.device == "cpu":
            worker.ask("limit_memory", n_bytes=_limit(options.memory_gib))
        if model.is_file:
            worker.ask("load", path=str(Path(model.spec).resolve()), **made_for)
        else:
            worker.ask("make", elements=[1, 8], architecture=model.architecture, **made_for)
        worker.ask("load_structures", path=str(path.resolve()))
        before = worker.ask("memory")
        result: dict[str, Any] = {"atoms": len(atoms)}
        for mode in MODES:
            worker.ask("time", structure=0, mode=mode, repeats=2)  # to warm up
            seconds = worker.ask("time", structure=0, mode=mode, repeats=options.repeats)
            result[mode] = quartiles(seconds)
        after = worker.ask("memory")
    path.unlink()
    key = "peak_device" if after["peak_device"] else "peak_rss"
    return {**result, "bytes": after[key], "bytes_before": before[key]}


def _limit(gib: float | None) -> int:
    """Return the bytes that a process may take."""
    if gib is not None:
        return int(gib * 2**30)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(0.8 * 1024 * int(line.split()[1]))
    raise SystemExit("the free memory is not known here: give --memory-gib")


def _exponents(results: list[dict[str, Any]]) -> dict[str, float]:
    """Fit time and memory by powers of the number of atoms."""
    large = [result for result in results if result["atoms"] >= FIT_FROM]
    if len(large) < 2:
        large = results
    if len(large) < 2:
        return {}
    sizes = np.log([result["atoms"] for result in large])
    values = {mode: [result[mode]["median"] for result in large] for mode in MODES}
    values["memory"] = [max(r["bytes"] - r["bytes_before"], 1) for r in large]
    return {name: float(np.polyfit(sizes, np.log(found), 1)[0]) for name, found in values.items()}


def _table(scaling: dict[str, Any]) -> Table:
    table = Table(title=f"{scaling['model']}, energy and forces of water")
    for column in ("atoms", *(f"{mode}, ms" for mode in MODES), "µs per atom", "peak memory, GiB"):
        table.add_column(column, justify="right")
    for result in scaling["results"]:
        times = [1e3 * result[mode]["median"] for mode in MODES]
        table.add_row(
            str(result["atoms"]),
            *(f"{value:.4g}" for value in times),
            f"{1e3 * times[0] / result['atoms']:.3g}",
            f"{result['bytes'] / 2**30:.2f}",
        )
    if exponents := scaling.get("exponents"):
        powers = [f"N^{exponents[mode]:.2f}" for mode in MODES]
        table.add_section()
        table.add_row("fit", *powers, "", f"N^{exponents['memory']:.2f}")
    return table


def _figure(scaling: dict[str, Any]) -> bytes:
    """Draw time and memory, with the fitted powers in the legend."""
    results, exponents = scaling["results"], scaling["exponents"]
    figure = new_figure(4.2)
    left, right = figure.subplots(1, 2)
    sizes = np.array([result["atoms"] for result in results], dtype=float)

    def powers(name: str) -> str:
        return f", N^{exponents[name]:.2f}" if name in exponents else ""

    for (mode, text), colour in zip(MODES.items(), (BLUE, ORANGE), strict=True):
        values = np.array([result[mode]["median"] for result in results])
        left.plot(sizes, values, "o-", color=colour, lw=1.3, ms=5, label=text + powers(mode))
    total = np.array([result["bytes"] for result in results]) / 2**30
    own = np.array([r["bytes"] - r["bytes_before"] for r in results]) / 2**30
    right.plot(sizes, total, "o-", color=GREY, lw=1.3, ms=5, label="whole process, peak")
    right.plot(sizes, own, "o-", color=BLUE, lw=1.3, ms=5, label="evaluation" + powers("memory"))
    times = [result[mode]["median"] for result in results for mode in MODES]
    _finish(left, "time", "s", sizes, np.array(times))
    _finish(right, "memory", "GiB", sizes, np.concatenate([total, own]))
    return png(figure)


def _finish(axes: Axes, title: str, unit: str, sizes: np.ndarray, values: np.ndarray) -> None:
    style_axes(axes)
    set_log(axes, "x", sizes)
    set_log(axes, "y", values)
    set_title(axes, title)
    axes.set_xlabel("atoms")
    axes.set_ylabel(unit)
    set_legend(axes, "upper left")


if __name__ == "__main__":
    main()
