"""How figures look: fonts, colours, axes; explicit for each object, so no global state is touched.

Colours are those of Okabe and Ito, which the colour-blind can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

BLUE, ORANGE, GREEN, RED, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
INK, GREY, LIGHT = "#1f2933", "#6b7785", "#d9dee4"
FONT = "DejaVu Sans"  # comes with matplotlib, so figures look the same everywhere
MARKERS = "osD^vPX*"
DPI = 160  # of PNG files, and of crowded point clouds inside SVG


# --------------------------------------------------------------------------------- files
def svg(figure: Figure) -> bytes:
    """Return a figure as SVG, with its letters as outlines: it looks the same everywhere."""
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", dpi=DPI, metadata={"Date": None})
    figure.set_layout_engine("none")  # what was found stays: to find it again takes as long
    return buffer.getvalue()


def png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


# --------------------------------------------------------------------------------- style
def new_figure(height: float) -> Figure:
    """Return a figure as wide as the page's column, in inches of 96 pixels."""
    return Figure(figsize=(10, height), layout="constrained", facecolor="white")


def text_style(color: str = INK, size: float = 9.0) -> dict[str, Any]:
    """Return the keywords of a text."""
    return {"color": color, "fontsize": size, "family": FONT}


def set_title(axes: Axes, text: str) -> None:
    """Put a heading above the left end of a panel."""
    axes.set_title(text, loc="left", fontweight="bold", pad=8, **text_style(size=10.0))


def style_axes(axes: Axes) -> None:
    """Draw a pale grid and two spines."""
    axes.grid(True, color=LIGHT, lw=0.6, alpha=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=GREY, labelcolor=INK, labelsize=8.5, labelfontfamily=FONT)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)


def set_legend(axes: Axes, place: Any, ncols: int = 1, *, below: bool = False) -> None:
    """Add a legend if there is something to explain, ``below`` the axes if wished."""
    if not axes.get_legend_handles_labels()[0]:
        return
    style: dict[str, Any] = {"framealpha": 0.85, "edgecolor": "none", "labelcolor": INK}
    if below:
        style["bbox_to_anchor"] = (0.5, -0.17)
    axes.legend(loc=place, ncols=ncols, prop={"family": FONT, "size": 8.5}, **style)


def leave_empty(axes: Axes, text: str) -> None:
    """Say why a panel is empty."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color(LIGHT)
    axes.annotate(
        text,
        (0.5, 0.5),
        xycoords="axes fraction",
        ha="center",
        va="center",
        **text_style(GREY, 10.0),
    )


def set_log(axes: Axes, name: str, values: Sequence[float] | np.ndarray) -> None:
    """Make an axis logarithmic, with plain numbers on it also where it spans little."""
    positive = np.array([value for value in values if np.isfinite(value) and value > 0])
    if not len(positive):
        return
    low, high = float(positive.min()) / 1.25, float(positive.max()) * 1.25
    choices: list[tuple[float, tuple[float, ...]]] = [
        (6, (1, 1.5, 2, 3, 4, 5, 6, 8)),
        (20, (1, 2, 3, 5)),
        (300, (1, 2, 5)),
        (np.inf, (1,)),
    ]
    subs = next(subs for most, subs in choices if high / low < most)
    (axes.set_xscale if name == "x" else axes.set_yscale)("log")
    (axes.set_xlim if name == "x" else axes.set_ylim)(low, high)
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def span(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Return the lowest and the highest value."""
    return float(values.min()), float(values.max())


def round_colours(count: int) -> list[str]:
    """Return colours of rounds, in order: the Okabe-Ito colours, then grey for the oldest."""
    colours = [BLUE, ORANGE, GREEN, RED, SKY, "#CC79A7"]
    return [GREY] * (count - len(colours)) + colours[: min(count, len(colours))][::-1]
