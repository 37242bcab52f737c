"""Draw learning curves of chosen arms, which may lie in several folders of `run.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from report import FIGURES, Point, draw_panel, read_points

from orbcalc.files import replace_file
from orbcalc.report.style import new_figure, png, set_legend, set_title


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
    """Draw a panel for each error that the set has."""
    points = [point for own in curves.values() for point in own]
    kinds = {k: v for k, v in FIGURES.items() if np.isfinite(points[0].mean("test", f"{k}_mae"))}
    figure = new_figure(5.4)
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, (error, label) in zip(panels, kinds.items(), strict=True):
        draw_panel(axes, curves, points, error)
        axes.set_ylabel(label)
    set_title(panels[0], title)
    set_legend(panels[0], "upper center", below=True)
    return png(figure)


if __name__ == "__main__":
    main()
