"""Tables and figures of ``uncertainty.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from orbcalc.report.style import (
    BLUE,
    FONT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    SKY,
    new_figure,
    png,
    set_log,
    set_title,
    style_axes,
    text_style,
)

__all__ = ["figures", "table"]

Row = Mapping[str, Any]

#: Scores in the order of columns, with the colours of lines.
SCORES = {
    "spread": BLUE, "last layer": ORANGE, "combined": GREEN, "charges": RED,
    "layer × charges": "#CC79A7", "distance": SKY, "random": GREY,
}  # fmt: skip
MEMBERS = {1: ("o", ORANGE), 2: ("s", SKY), 4: ("D", BLUE)}
UNITS = {"energy": "meV", "forces": "meV/Å"}


# -------------------------------------------------------------------------------- tables
def table(result: Row) -> str:
    """Return all results as Markdown."""
    lines = []
    for name, problem in result["problems"].items():
        lines += [f"## {name}", "", f"{problem['says']}; seeds: {problem['seeds']}.", ""]
        for statistic, title in (
            ("spearman", "Spearman correlation of score and |error| (95 % interval)"),
            (
                "ideal",
                "The same, were errors Gaussian with the score as their width (95 % of draws)",
            ),
            ("ause", "Area between the sparsification curves of the score and of the oracle"),
            ("area", "Area under the sparsification curve"),
        ):
            lines += _rank_table(problem["ranks"], statistic, title)
        lines += _reliability_table(problem["reliability"])
        lines += _size_table(problem["sizes"])
    return "\n".join(lines)


def _rank_table(rows: Sequence[Row], statistic: str, title: str) -> list[str]:
    lines = [title + ":", "", "| part | quantity | members | RMSE | " + " | ".join(SCORES) + " |"]
    lines.append("|" + "---|" * (4 + len(SCORES)))
    for case in _cases(rows):
        own = {row["score"]: row for row in rows if _is(row, case)}
        rmse = 1e3 * next(iter(own.values()))["rmse"]
        cells = [_interval(own[s][statistic], 1.0, 2) if s in own else "" for s in SCORES]
        lines.append(
            f"| {case['part']} | {case['quantity']} | {case['members']} | "
            f"{rmse:.3g} {UNITS[case['quantity']]} | " + " | ".join(cells) + " |"
        )
    return [*lines, ""]


def _reliability_table(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(row["calibration"] for row in rows))
    lines = [
        "Share of errors within the limits of 68 and 95 %, in % (package: with 95 % interval):",
        "",
    ]
    lines.append("| part | quantity | members | " + " | ".join(names) + " |")
    lines.append("|" + "---|" * (3 + len(names)))
    for case in _cases(rows):
        cells = dict.fromkeys(names, "")
        for row in rows:
            if _is(row, case):
                cells[row["calibration"]] = " / ".join(
                    _interval(row[key], 100, 0)
                    if row["calibration"] == "package"
                    else f"{100 * row[key][0]:.0f}"
                    for key in ("within_1", "within_2")
                )
        lines.append(
            f"| {case['part']} | {case['quantity']} | {case['members']} | "
            + " | ".join(cells.values())
            + " |"
        )
    return [*lines, ""]


def _size_table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    title = (
        "Shares within the limits of 68 and 95 %, in %, mean ± standard deviation over random "
        "validation sets of so many structures:"
    )
    lines = [
        title,
        "",
        "| quantity | members | structures | RMS | two quantiles |",
        "|" + "---|" * 5,
    ]
    for case in _cases(rows):
        for size in dict.fromkeys(row["size"] for row in rows if _is(row, case)):
            own = [row for row in rows if _is(row, {**case, "size": size})]
            cells = [
                " / ".join(
                    f"{100 * mean:.0f} ± {100 * spread:.0f}"
                    for mean, spread in zip(row["mean"], row["spread"], strict=True)
                )
                for row in own
            ]
            lines.append(
                f"| {case['quantity']} | {case['members']} | {size} | " + " | ".join(cells) + " |"
            )
    return [*lines, ""]


def _cases(rows: Sequence[Row]) -> list[dict[str, Any]]:
    keys = [(row["part"], row["quantity"], row["members"]) for row in rows]
    return [dict(zip(("part", "quantity", "members"), k, strict=True)) for k in dict.fromkeys(keys)]


def _is(row: Row, case: Row) -> bool:
    return all(row[key] == value for key, value in case.items())


def _interval(values: Sequence[float], factor: float, digits: int) -> str:
    middle, low, high = (f"{factor * value:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


# ------------------------------------------------------------------------------- figures
def figures(result: Row) -> dict[str, bytes]:
    """Return the figures by name, as PNG."""
    panels = [
        (name, problem, quantity)
        for name, problem in result["problems"].items()
        for quantity in dict.fromkeys(row["quantity"] for row in problem["ranks"])
    ]
    drawn = {}
    for title, draw, height in (
        ("ranks", _draw_ranks, 3.0),
        ("sparsification", _draw_sparsification, 3.0),
        ("reliability", _draw_bins, 3.2),
    ):
        rows = -(-len(panels) // 3)
        figure = new_figure(height * rows + 0.4)
        axes = np.atleast_1d(figure.subplots(rows, min(3, len(panels)))).ravel()
        for place, (name, problem, quantity) in zip(axes, panels, strict=False):
            draw(place, problem, quantity)
            style_axes(place)
            set_title(place, f"{name}, {quantity}")
        for place in axes[len(panels) :]:
            place.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        style = {"family": FONT, "size": 8.5}
        figure.legend(
            handles, labels, loc="outside lower center", ncols=8, prop=style, frameon=False
        )
        drawn[title] = png(figure)
    figure = new_figure(0.32 * sum(len(_shares(p, q)) for _, p, q in panels) + 1.4)
    _draw_shares(figure.subplots(1, 2, sharey=True), panels)
    drawn["shares"] = png(figure)
    return drawn


def _draw_ranks(axes: Axes, problem: Row, quantity: str) -> None:
    for number, (members, (marker, colour)) in enumerate(MEMBERS.items()):
        case = {"part": "same", "quantity": quantity, "members": members}
        rows = [row for row in problem["ranks"] if _is(row, case)]
        places = np.array([list(SCORES).index(row["score"]) for row in rows]) + 0.2 * (number - 1)
        values, low, high = np.array([row["spearman"] for row in rows]).T
        axes.errorbar(
            places, values, yerr=[values - low, high - values], color=colour, marker=marker,
            ls="none", ms=5, lw=1.2, label=f"{members} member{'s' * (members > 1)}",
        )  # fmt: skip
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set_xticks(range(len(SCORES)), list(SCORES), rotation=35, ha="right")
    axes.set_ylabel("Spearman ρ with |error|", **text_style())


def _draw_sparsification(axes: Axes, problem: Row, quantity: str) -> None:
    case = {"part": "same", "quantity": quantity, "members": max(MEMBERS)}
    (curves,) = (row for row in problem["curves"] if _is(row, case))
    kept = 100 * np.array(curves["kept"])
    for name, colour in {**SCORES, "oracle": INK}.items():
        style = {"ls": ":"} if name == "oracle" else {}
        axes.plot(
            100 - kept, curves["sparsification"][name], color=colour, lw=1.5, label=name, **style
        )
    axes.set_ylim(0, 1.3)
    axes.set_xlabel("highest scores taken away, %", **text_style())
    axes.set_ylabel("mean error of the rest / of all", **text_style())


def _draw_bins(axes: Axes, problem: Row, quantity: str) -> None:
    parts = list(dict.fromkeys(row["part"] for row in problem["curves"]))
    everything = []
    for members, (marker, colour) in MEMBERS.items():
        for part in parts:
            case = {"part": part, "quantity": quantity, "members": members}
            (curves,) = (row for row in problem["curves"] if _is(row, case))
            points = 1e3 * np.array(curves["bins"])
            everything.append(points)
            same = part == "same"
            axes.plot(
                *points.T, color=colour, marker=marker, ms=4, lw=1.0, ls="-" if same else ":",
                mfc=colour if same else "white",
                label=f"{members} member{'s' * (members > 1)}" if same else None,
            )  # fmt: skip
    values = np.concatenate(everything).ravel()
    set_log(axes, "x", values)
    set_log(axes, "y", values)
    ends = axes.get_xlim()
    axes.plot(ends, ends, color=GREY, lw=1.0)
    axes.tick_params(axis="x", rotation=45)
    others = ", ".join(part for part in parts if part != "same")
    axes.set_xlabel(
        f"uncertainty, {UNITS[quantity]}" + (f"  (open: {others})" if others else ""),
        **text_style(),
    )
    axes.set_ylabel(f"RMS error, {UNITS[quantity]}", **text_style())


def _shares(problem: Row, quantity: str) -> list[Row]:
    return [
        row
        for row in problem["reliability"]
        if row["quantity"] == quantity and row["calibration"] in ("package", "last layer, RMS")
    ]


def _draw_shares(panels: Sequence[Axes], problems: Sequence[tuple[str, Row, str]]) -> None:
    """Draw shares within one and two standard deviations beside what was aimed at."""
    labels, place = [], 0
    for name, problem, quantity in problems:
        for row in _shares(problem, quantity):
            marker, colour = MEMBERS[row["members"]]
            filled = row["calibration"] == "package"
            for axes, key in zip(panels, ("within_1", "within_2"), strict=True):
                middle, low, high = 100 * np.array(row[key])
                axes.errorbar(
                    [middle], [place], xerr=[[middle - low], [high - middle]], color=colour,
                    marker=marker, ms=5, lw=1.2, mfc=colour if filled else "white",
                )  # fmt: skip
            labels.append(
                f"{name}, {quantity}, {row['part']}: {row['members']}, {row['calibration']}"
            )
            place += 1
    for axes, (low, high), title in zip(
        panels,
        ((65, 71), (93, 97)),
        ("within one σ, %", "within the 95 % interval, %"),
        strict=True,
    ):
        axes.axvspan(low, high, color=GREEN, alpha=0.15, lw=0)
        style_axes(axes)
        set_title(axes, title)
    panels[0].set_yticks(range(place), labels)
    panels[0].set_ylim(place - 0.5, -0.5)
