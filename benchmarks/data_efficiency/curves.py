"""Draw learning curves of chosen arms, which may lie in several folders of `run.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from report import Point, read_points

from orbcalc.files import replace_file
from orbcalc.report.style import (
    BLUE,
    GREEN,
    INK,
    MARKERS,
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

_COLOURS = (INK, SKY, BLUE, ORANGE, RED, GREEN)

#: Errors that get a panel each.
_PANELS = {"energy_meV_mae": "energy MAE, meV", "barrier_meV_mae": "barrier MAE, meV"}


def main() -> None:
    """Read the command line and the results; draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    parser.add_argument("--title", required=True)
    parser.add_argument("curves", nargs="+", help="FOLDER:ARM:NAME of each")
    options = parser.parse_args()
    curves = {}
    for curve in options.curves:
        folder, arm, name = curve.split(":", 2)
        found = [point for point in read_points(Path(folder)) if point.arm == arm]
        if not found:
            raise SystemExit(f"{folder} has no result of arm {arm}")
        curves[name] = found
    replace_file(options.out, _figure(curves, options.title))


def _figure(curves: dict[str, list[Point]], title: str) -> bytes:
    points = [point for own in curves.values() for point in own]
    kinds = {k: v for k, v in _PANELS.items() if np.isfinite(points[0].mean("test", k))}
    figure = new_figure(5.4)
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, (kind, label) in zip(panels, kinds.items(), strict=True):
        style_axes(axes)
        for number, (name, own) in enumerate(curves.items()):
            axes.errorbar(
                [point.size for point in own],
                [point.mean("test", kind) for point in own],
                yerr=np.nan_to_num([point.spread("test", kind) for point in own]),
                color=_COLOURS[number % len(_COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                ms=4,
                lw=1.3,
                capsize=2,
                label=name,
            )
        set_log(axes, "x", [point.size for point in points])
        set_log(axes, "y", [point.mean("test", kind) for point in points])
        axes.set_xlabel("expensive labels")
        axes.set_ylabel(label)
    set_title(panels[0], title)
    set_legend(panels[0], "upper center", below=True)
    return png(figure)


if __name__ == "__main__":
    main()
