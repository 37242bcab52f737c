"""Table and figure of ``screens.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from coverage import interval
from matplotlib.axes import Axes

from orbcalc.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    new_figure,
    png,
    set_legend,
    set_title,
    style_axes,
    text_style,
)

__all__ = ["ACCURACY", "DELTA", "figure", "summarise", "table"]

Row = Mapping[str, Any]

#: Share of the pool that is to be right, and the risk, of every screen.
ACCURACY, DELTA = 0.95, 0.05

METHODS = {"uncertainty": BLUE, "random": ORANGE}


def summarise(screens: Sequence[Row]) -> list[dict[str, Any]]:
    """Count labels and false certificates for each model, tolerance and method.

    Labels are compared, screen by screen, with those of random acquisition and of the oracle.
    """
    by_terms: dict[tuple[str, float, str], dict[int, Row]] = {}
    for screen in screens:
        key = screen["model"], screen["kcal_mol"], screen["method"]
        by_terms.setdefault(key, {})[screen["seed"]] = screen
    rows = []
    for (model, tolerance, method), own in sorted(by_terms.items()):
        shares = np.array([screen["labels"] / screen["pool"] for screen in own.values()])
        row = {
            "model": model,
            "kcal_mol": tolerance,
            "method": method,
            "screens": len(own),
            "labelled": float(shares.mean()),
            "spread": float(shares.std(ddof=1)) if len(shares) > 1 else None,
        }
        if method != "oracle":
            false = sum(screen["false"] for screen in own.values())
            certified = sum(screen["certified"] for screen in own.values())
            row |= {"certified": certified, "false": false}
            row["met"] = float(np.mean([_met(screen) for screen in own.values()]))
            row["false_interval"] = interval(false, len(own))
        for other in ("random", "oracle"):
            known = by_terms.get((model, tolerance, other), {})
            both = sorted({*own} & {*known})
            if both and method not in (other, "oracle"):
                pairs = np.array([[own[s]["labels"], known[s]["labels"]] for s in both])
                row[f"of_{other}"] = float(pairs[:, 0].sum() / pairs[:, 1].sum())
                row[f"more_than_{other}"] = int((pairs[:, 0] > pairs[:, 1]).sum())
                row[f"with_{other}"] = len(both)
        rows.append(row)
    return rows


def _met(screen: Row) -> float:
    """Return the share labelled at the first look at which the target was met, proved or not."""
    target = [look["labels"] for look in screen["looks"] if look["accuracy"] >= ACCURACY]
    return float((target or [screen["pool"]])[0] / screen["pool"])


def table(result: Row) -> str:
    """Return all results as Markdown."""
    lines = []
    for name, found in result["sets"].items():
        pilot = found["pilot"]
        lines += [
            f"## {name}",
            "",
            f"Pools of {pilot['pool']}; tolerance {pilot['kcal_mol']} kcal/mol{_rule(pilot)}.",
            "",
            "| model | kcal/mol | acquisition | screens | certified | false (95 % interval) "
            "| target met at, % | labelled, % | / random | more than random | / oracle |",
            "|" + "---|" * 11,
        ]
        lines += [_line(row) for row in summarise(found["screens"])] + [""]
    return "\n".join(lines)


def _rule(pilot: Row) -> str:
    if "mae_kcal_mol" not in pilot:
        return ""
    return (
        f" by the rule; on the pilot: MAE {pilot['mae_kcal_mol']:.2f} kcal/mol, "
        f"{100 * pilot['within_1_kcal_mol']:.0f} % within 1 kcal/mol; rank correlation of score "
        f"and |error| {pilot['spearman']:.2f}, of a perfect score of the same spread "
        f"{pilot['ideal_spearman']:.2f}"
    )


def _line(row: Row) -> str:
    spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
    false = ""
    if "false" in row:
        low, high = (100 * value for value in row["false_interval"])
        false = f"{row['false']} ({low:.1f} to {high:.1f} %)"
    more = f"{row['more_than_random']} of {row['with_random']}" if "of_random" in row else ""
    cells = [
        row["model"],
        f"{row['kcal_mol']:g}",
        row["method"],
        row["screens"],
        row.get("certified", ""),
        false,
        f"{100 * row['met']:.1f}" if "met" in row else "",
        f"{100 * row['labelled']:.1f}{spread}",
        f"{row['of_random']:.2f}" if "of_random" in row else "",
        more,
        f"{row['of_oracle']:.2f}" if "of_oracle" in row else "",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def figure(result: Row) -> bytes:
    """Draw accuracy against labels, a panel for each set and model, with the rule's tolerance."""
    panels = [
        (name, model, found)
        for name, found in result["sets"].items()
        for model in dict.fromkeys(screen["model"] for screen in found["screens"])
    ]
    drawing = new_figure(3.6 * max(-(-len(panels) // 2), 1))
    places = np.atleast_1d(drawing.subplots(max(-(-len(panels) // 2), 1), 2)).ravel()
    for axes, (name, model, found) in zip(places, panels, strict=False):
        tolerance = found["pilot"]["kcal_mol"]
        own = [s for s in found["screens"] if s["model"] == model and s["kcal_mol"] == tolerance]
        _draw(axes, own)
        set_title(axes, f"{name}, {model}, {tolerance} kcal/mol")
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    set_legend(places[0], "lower right")
    return png(drawing)


def _draw(axes: Axes, screens: Sequence[Row]) -> None:
    for method, colour in METHODS.items():
        own = [screen for screen in screens if screen["method"] == method]
        axes.plot([], [], color=colour, lw=1.5, marker="*", label=f"{method}; star: certified")
        faint = min(1.0, 8 / max(len(own), 1))
        for screen in own:
            share = 100 * np.array([look["labels"] for look in screen["looks"]]) / screen["pool"]
            accuracy = 100 * np.array([look["accuracy"] for look in screen["looks"]])
            axes.plot(share, accuracy, color=colour, lw=0.8, alpha=faint)
            if screen["certified"]:
                axes.plot(share[-1], accuracy[-1], color=colour, marker="*", ms=6, alpha=faint)
    ends = [s["labels"] / s["pool"] for s in screens if s["method"] == "oracle"]
    if ends:
        axes.axvline(100 * float(np.mean(ends)), color=GREY, ls=":", lw=1.4, label="oracle, mean")
    axes.axhline(95, color=GREEN, lw=1.2, label="asked for")
    axes.set(xlim=(0, 100), ylim=(50, 100.5))
    style_axes(axes)
    axes.set_xlabel("labelled share of the pool, audits included, %", **text_style())
    axes.set_ylabel("labelled or within tolerance, %", **text_style())
