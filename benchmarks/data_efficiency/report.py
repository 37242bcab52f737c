"""From the results of the runs to a table, learning curves and the labels saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from arms import ARMS, FAMILIES, WEIGHT
from matplotlib.axes import Axes
from rich.console import Console

from orbcalc.files import read_json, replace_file
from orbcalc.report.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    RED,
    SKY,
    new_figure,
    png,
    set_legend,
    set_log,
    set_title,
    style_axes,
)

__all__ = ["FIGURES", "Point", "draw_panel", "labels_saved", "read_points", "write_report"]

console = Console(soft_wrap=True, highlight=False)

#: Errors that get a figure, where a set has them.
FIGURES = {"energy_meV": "energy MAE, meV", "barrier_meV": "barrier MAE, meV"}

_COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, "#CC79A7", "#8c6d31")


@dataclass(frozen=True)
class Point:
    """All seeds of an arm at one size."""

    arm: str
    size: int
    results: list[dict[str, Any]]

    def mean(self, *keys: str) -> float:
        """Return the mean of a number of the results; NaN where one has none."""
        return float(np.mean(self._values(keys)))

    def spread(self, *keys: str) -> float:
        """Return the standard deviation between seeds; NaN of a single one."""
        values = self._values(keys)
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    def _values(self, keys: Sequence[str]) -> list[float]:
        values = []
        for result in self.results:
            value: Any = result
            for key in keys:
                value = value.get(key, math.nan)
            values.append(float(value))
        return values


def write_report(out: Path) -> None:
    """Write ``report.md`` and, where there are two sizes, learning curves of what is there."""
    points = read_points(out)
    if not points:
        console.print(f"there is no result in {out} yet")
        return
    text = _table(points)
    replace_file(out / "report.md", text)
    several = len({point.size for point in points}) > 1
    for error, label in FIGURES.items():
        if several and math.isfinite(points[0].mean("test", f"{error}_mae")):
            replace_file(out / f"{error.removesuffix('_meV')}.png", _figure(points, error, label))
    console.print(text)


def labels_saved(
    size: int, error: float, sizes: Sequence[int], errors: Sequence[float]
) -> float | None:
    """Return how many times as many labels energies alone would need for this error.

    Parameters
    ----------
    size, error
        Labels that an arm used, and what came out.
    sizes, errors
        Learning curve of the energy alone, which is interpolated as a power law between its
        points.

    Returns
    -------
    float or None
        None if the curve does not fall everywhere, or the error is outside of it: nothing is
        extrapolated.

    Examples
    --------
    >>> labels_saved(100, 50.0, [100, 400], [100.0, 25.0])
    2.0
    """
    order = np.argsort(sizes)
    x, y = np.log(np.array(sizes, float)[order]), np.log(np.array(errors)[order])
    if len(x) < 2 or not (np.diff(y) < 0).all() or not y[-1] <= math.log(error) <= y[0]:
        return None
    needed = math.exp(np.interp(-math.log(error), -y, x))
    return round(needed / size, 6)


def read_points(out: Path) -> list[Point]:
    """Gather results; of an arm that was tried with several weights, only the chosen one."""
    chosen = {}
    if (out / "weights.json").exists():
        chosen = read_json(out / "weights.json")["weights"]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for path in sorted(out.glob("runs/*/result.json")):
        result = read_json(path)
        if result["weight"] == chosen.get(result["arm"], WEIGHT):
            found.setdefault((result["arm"], result["size"]), []).append(result)
    order = list(ARMS)
    keys = sorted(found, key=lambda key: (key[1], order.index(key[0])))
    return [Point(arm, size, found[arm, size]) for arm, size in keys]


# ------------------------------------------------------------------------------- table
def _table(points: Sequence[Point]) -> str:
    first = points[0].results[0]
    lines = [
        f"# {first['set']}: errors on the test set, {first['settings']['steps']} steps",
        "",
        "Means over seeds, with their standard deviation. Labels saved: how many times as many "
        "expensive labels the energy alone would need for the same MAE, interpolated on its "
        "learning curve; nothing is extrapolated.",
        "",
        "| labels | arm | seeds | weight | energy MAE, meV | RMSE, meV | barrier MAE, meV | "
        "GFN1 energy MAE, meV | labels saved | ms/step | GFN1 labels, s |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    lines += [f"| {' | '.join(_cells(point, points))} |" for point in points]
    charges = [point for point in points if math.isfinite(point.mean("test", "s_shell_e_mae"))]
    if charges:
        kinds = ("s", "p", "d")
        lines += [
            "",
            "Charges, MAE in e (arms 2 and 6: of atoms, under s). Floor: of perfect charges of "
            "shells that are divided equally among their orbitals, all that is invariant.",
            "",
            "| labels | arm |"
            + "".join(f" {k} shell |" for k in kinds)
            + "".join(f" {k} orbital |" for k in kinds)
            + " p floor | d floor |",
            "|---:|---|" + "---:|" * 8,
        ]
    for point in charges:
        numbers = [
            _number(point.mean("test", f"{kind}_{what}_e_mae"), 3)
            for what in ("shell", "orbital")
            for kind in kinds
        ]
        numbers += [
            _number(point.mean("test", f"{kind}_orbital_e_floor"), 3) for kind in ("p", "d")
        ]
        lines.append(f"| {' | '.join([str(point.size), _name(point.arm), *numbers])} |")
    return "\n".join(lines) + "\n"


def _cells(point: Point, points: Sequence[Point]) -> list[str]:
    mae = _number(point.mean("test", "energy_meV_mae"))
    spread = _number(point.spread("test", "energy_meV_mae"), 2)
    return [
        str(point.size),
        _name(point.arm),
        str(len(point.results)),
        f"{point.results[0]['weight']:g}" if ARMS[point.arm].tasks else "",
        f"{mae} ± {spread}" if spread else mae,
        _number(point.mean("test", "energy_meV_rmse")),
        _number(point.mean("test", "barrier_meV_mae")),
        _number(point.mean("test", "gfn1_meV_mae")),
        _saved(point, points),
        _number(point.mean("ms_per_step"), 3),
        _number(point.mean("seconds_of_labels"), 3),
    ]


def _saved(point: Point, points: Sequence[Point]) -> str:
    """Say how many labels are saved, or why that is not known."""
    if point.arm == "1":
        return ""
    curve = [(p.size, p.mean("test", "energy_meV_mae")) for p in points if p.arm == "1"]
    if not curve:
        return "no arm 1"
    sizes, errors = zip(*curve, strict=True)
    error = point.mean("test", "energy_meV_mae")
    factor = labels_saved(point.size, error, sizes, errors)
    if factor is not None:
        return f"{factor:.2f}"
    if error < min(errors):
        return f"> {max(sizes) / point.size:.3g} (below the curve of arm 1)"
    if error > max(errors):
        return "above the curve of arm 1"
    return "arm 1 does not fall everywhere"


def _name(arm: str) -> str:
    return f"{arm}: {ARMS[arm].text}"


def _number(value: float, digits: int = 4) -> str:
    """Write a number with some digits; nothing for NaN."""
    return f"{value:.{digits}g}" if math.isfinite(value) else ""


# ------------------------------------------------------------------------------ figure
def _figure(points: Sequence[Point], error: str, label: str) -> bytes:
    """Draw learning curves, a panel for each family of arms."""
    figure = new_figure(5.0)
    panels = figure.subplots(1, len(FAMILIES), sharey=True)
    for axes, (title, arms) in zip(panels, FAMILIES.items(), strict=True):
        curves = {_name(arm): [point for point in points if point.arm == arm] for arm in arms}
        draw_panel(axes, curves, points, error)
        set_title(axes, title)
        set_legend(axes, "upper center", below=True)
    panels[0].set_ylabel(label)
    return png(figure)


def draw_panel(
    axes: Axes, curves: Mapping[str, Sequence[Point]], points: Sequence[Point], error: str
) -> None:
    """Draw learning curves, means with their standard deviations.

    Parameters
    ----------
    axes
        Where.
    curves
        Points of each, by name; the first is the one to compare with. An empty one keeps its
        colour, and is not named.
    points
        All that the axes have room for.
    error
        One of `FIGURES`.
    """
    key = ("test", f"{error}_mae")
    style_axes(axes)
    for (name, own), colour in zip(curves.items(), (INK, *_COLOURS), strict=False):
        axes.errorbar(
            [point.size for point in own],
            [point.mean(*key) for point in own],
            yerr=np.nan_to_num([point.spread(*key) for point in own]),
            color=colour,
            marker="o",
            ms=4,
            lw=1.3,
            capsize=2,
            label=name if own else None,
        )
    axes.set_xlabel("expensive labels")
    set_log(axes, "x", [point.size for point in points])
    set_log(axes, "y", [point.mean(*key) for point in points])
