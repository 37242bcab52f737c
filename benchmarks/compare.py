"""Bring results of `speed.py` and `accuracy.py` together: error against cost."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rich.console import Console

from orbcalc.files import read_json, write_text
from orbcalc.report.style import (
    BLUE,
    GREY,
    ORANGE,
    SKY,
    leave_empty,
    new_figure,
    png,
    set_legend,
    set_log,
    set_title,
    style_axes,
    text_style,
)

ERRORS = {"energy_meV_per_atom_rmse": "energy, meV/atom", "forces_meV_per_A_rmse": "forces, meV/Å"}
SERIES = {"orbcalc": (BLUE, "o"), "orbcalc without charges": (SKY, "s"), "MACE": (ORANGE, "^")}

console = Console(soft_wrap=True, highlight=False)


def main() -> None:
    """Read the command line; write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="folders to search for result.json")
    parser.add_argument("--speed", type=Path, required=True, help="a speed.json")
    parser.add_argument("--structure", default="water-192", help="whose time is the cost")
    parser.add_argument("--mode", default="step", help="model, step or new")
    parser.add_argument("--out", type=Path, required=True, help="folder for table and figure")
    options = parser.parse_args()
    speed = read_json(options.speed)
    costs = _costs(speed, options.structure, options.mode)
    runs = [read_json(path) for path in _found(options.results)]
    if not runs:
        raise SystemExit("there is no result.json in these folders")
    options.out.mkdir(parents=True, exist_ok=True)
    text = _table(runs, costs, speed, options.structure, options.mode)
    write_text(options.out / "compare.md", text)
    (options.out / "compare.png").write_bytes(_figure(runs, costs, options.structure))
    console.print(text)


def _found(folders: Iterable[Path]) -> list[Path]:
    return sorted({path for folder in folders for path in folder.rglob("result.json")})


def _costs(speed: dict[str, Any], structure: str, mode: str) -> dict[str, float]:
    """Return the milliseconds per atom of an evaluation, by model."""
    return {
        result["model"]: 1e3 * result["median"] / result["atoms"]
        for result in speed["results"]
        if (result["structure"], result["mode"]) == (structure, mode)
    }


def _table(
    runs: list[dict[str, Any]],
    costs: dict[str, float],
    speed: dict[str, Any],
    structure: str,
    mode: str,
) -> str:
    lines = [
        "| set | model | charges | parameters | training, h | epochs | energy MAE, meV | "
        "energy RMSE, meV/atom | forces MAE, meV/Å | forces RMSE, meV/Å | ms per atom and step |",
        "|---|---|---|" + "---:|" * 8,
    ]
    for run in sorted(runs, key=lambda run: (run["set"], run["model"], run["seed"])):
        errors = run["errors"]
        cost = costs.get(run["model"])
        epochs = f"{run['epochs']:.0f}" + ("" if run["complete"] else " (unfinished)")
        cells = [
            run["set"],
            run["model"] + "".join(f" {option}" for option in run["options"]),
            "yes" if run["charges"] else "no",
            str(run["parameters"]),
            f"{run['seconds'] / 3600:.2f}",
            epochs,
            f"{errors['energy_meV_mae']:.3g}",
            f"{errors['energy_meV_per_atom_rmse']:.3g}",
            f"{errors['forces_meV_per_A_mae']:.3g}",
            f"{errors['forces_meV_per_A_rmse']:.3g}",
            "" if cost is None else f"{cost:.3g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    where = speed["machine"]
    lines += [
        "",
        f"Time: {structure}, {mode}, {speed['settings']['device']}, {where['cpu']}, "
        f"{where['threads']} threads, load {where['load_average'][0]:g} at the beginning.",
        "",
        *dict.fromkeys(f"{run['set']}: {run['split']}." for run in runs),
    ]
    return "\n".join(lines) + "\n"


def _figure(runs: list[dict[str, Any]], costs: dict[str, float], structure: str) -> bytes:
    """Draw error against cost: a row for each set, a column for each kind of error."""
    timed = [run for run in runs if run["model"] in costs]
    sets = sorted({run["set"] for run in timed}) or [""]
    figure = new_figure(0.6 + 3.6 * len(sets))
    panels = figure.subplots(len(sets), len(ERRORS), squeeze=False)
    for row, name in zip(panels, sets, strict=True):
        own = [run for run in timed if run["set"] == name]
        for axes, (key, text) in zip(row, ERRORS.items(), strict=True):
            if not own:
                leave_empty(axes, f"no model was timed on {structure}")
                continue
            _draw(axes, own, costs, key)
            quantity, unit = text.split(", ")
            set_title(axes, f"{name}: {quantity}")
            axes.set_xlabel(f"ms per atom and step ({structure})")
            axes.set_ylabel(f"RMSE, {unit}")
    set_legend(panels[0][0], "best")
    return png(figure)


def _draw(axes: Axes, runs: list[dict[str, Any]], costs: dict[str, float], key: str) -> None:
    for series, (colour, marker) in SERIES.items():
        own = [run for run in runs if _series(run) == series]
        x = [costs[run["model"]] for run in own]
        y = [run["errors"][key] for run in own]
        axes.plot(x, y, ls="", marker=marker, color=colour, ms=7, alpha=0.9)
        for run, right, up in zip(own, x, y, strict=True):
            text = run["model"].partition(":")[2]
            place: dict[str, Any] = {"xytext": (7, 4), "textcoords": "offset points"}
            axes.annotate(text, (right, up), **place, **text_style(GREY, 8.0))
    for series in sorted({_series(run) for run in runs}):
        colour, marker = SERIES[series]
        axes.plot([], [], ls="", marker=marker, color=colour, ms=7, label=series)
    style_axes(axes)
    set_log(axes, "x", np.array([costs[run["model"]] for run in runs]))
    set_log(axes, "y", np.array([run["errors"][key] for run in runs]))
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.3)  # room for names


def _series(run: dict[str, Any]) -> str:
    if run["model"].startswith("mace"):
        return "MACE"
    return "orbcalc" if run["charges"] else "orbcalc without charges"


if __name__ == "__main__":
    main()
