"""The figures of a run, drawn with matplotlib's objects only: no pyplot, no rcParams.

Every function returns a figure, or None as long as there is nothing to draw. Meanings are carried
by shapes, line styles or labels as well as by colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.special import erf

from orbcalc.report.facts import ForceComparison, RoundFacts, RunFacts
from orbcalc.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MARKERS,
    ORANGE,
    RED,
    SKY,
    leave_empty,
    new_figure,
    round_colours,
    set_legend,
    set_log,
    set_title,
    span,
    style_axes,
    text_style,
)
from orbcalc.rounding import at_least

__all__ = ["audit_ratios", "certificate", "costs", "learning", "parity", "uncertainty"]

MILLI = 1000.0  # eV to meV


# ------------------------------------------------------------------------------- figures
def learning(run: RunFacts) -> Figure | None:
    """Draw the error before training against labels, and validation errors against steps."""
    if not run.metrics and run.latest_audit is None:
        return None
    figure = new_figure(3.9)
    quantities = [("energy_mae", "energy (meV/atom)")]
    if run.config.tasks.forces > 0:
        quantities.append(("forces_mae", "forces (meV/Å)"))
    grid = figure.add_gridspec(len(quantities), 2, width_ratios=[1.05, 1])
    _learning_curve(figure.add_subplot(grid[:, 0]), run)
    panels = [figure.add_subplot(grid[row, 1]) for row in range(len(quantities))]
    for axes, (name, label) in zip(panels, quantities, strict=True):
        _validation_curve(axes, run, name, label)
        axes.tick_params(labelbottom=axes is panels[-1])
    set_title(panels[0], "Validation MAE while training")
    panels[-1].set_xlabel("optimiser steps, all rounds", **text_style())
    return figure


def parity(run: RunFacts) -> Figure | None:
    """Draw predictions against labels, for structures that were not trained on."""
    audit, forces = run.latest_audit, run.forces
    if audit is None and forces is None:
        return None
    figure = new_figure(4.5)
    left, right = figure.subplots(1, 2)
    if audit is not None and audit.audited is not None and len(audit.audited.absolute):
        known = np.isfinite(audit.audited.error)
        x, y = audit.audited.reference[known] * MILLI, audit.audited.predicted[known] * MILLI
        band = (run.energy_tolerance or 0.0) * MILLI
        _parity(left, x, y, f"m{run.energy_unit}", size=16.0, alpha=0.75, band=band)
    else:
        leave_empty(left, "no audit yet")
    set_title(left, "Energy")
    left.set_xlabel(f"reference energy (m{run.energy_unit})", **text_style())
    left.set_ylabel(f"predicted energy (m{run.energy_unit})", **text_style())
    _force_parity(right, forces)
    return figure


def uncertainty(run: RunFacts) -> Figure | None:
    """Draw errors against predicted uncertainties, and the share of errors inside k of them."""
    rounds = [r for r in run.rounds if _has_pairs(r)]
    if not rounds:
        return None
    figure = new_figure(4.5)
    left, right = figure.subplots(1, 2)
    _scatter_of_errors(left, run, rounds)
    _shares(right, rounds)
    return figure


def certificate(run: RunFacts) -> Figure | None:
    """Draw the proved lower bound on the accuracy at each look, against the target."""
    looks = [r.look for r in run.rounds if r.look is not None]
    if not looks:
        return None
    target = 100 * run.config.certificate.accuracy
    figure = new_figure(3.2)
    axes = figure.subplots()
    axes.axhspan(target, 102, color=GREEN, alpha=0.12, lw=0)
    axes.axhline(target, color=GREEN, lw=1.6)
    axes.annotate(
        f"target {target:g} %",
        (1, target),
        (-4, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        **text_style(color="#006b4f"),
    )
    guessed = [look for look in looks if look.estimate is not None]
    axes.plot(
        [look.number for look in guessed],
        [100 * (look.estimate or 0.0) for look in guessed],
        color=ORANGE, ls=":", marker="o", mfc="white", label="estimate, no guarantee",
    )  # fmt: skip
    numbers, bounds = zip(*((k.number, 100 * k.accuracy_bound) for k in looks), strict=True)
    axes.plot(numbers, bounds, color=BLUE, marker="s", lw=1.8, label="proved lower bound")
    for look, bound in zip(looks, bounds, strict=True):
        axes.annotate(
            at_least(look.accuracy_bound, 1, percent=True),
            (look.number, bound), (0, -14), textcoords="offset points",
            ha="center", **text_style(color=BLUE),
        )  # fmt: skip
    style_axes(axes)
    axes.set(xlim=(0.5, max(numbers) + 0.5), ylim=(max(min(bounds) - 14, -12), 102))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("look (one in each round)", **text_style())
    axes.set_ylabel("pool that is right (%)", **text_style())
    set_legend(axes, "lower right")
    return figure


def costs(run: RunFacts) -> Figure | None:
    """Draw the time in cheap and expensive labels, and the labels of each round."""
    if not run.census:
        return None
    figure = new_figure(3.2)
    left, right = figure.subplots(1, 2)
    _cost_bars(left, run)
    _label_bars(right, run)
    return figure


# -------------------------------------------------------------------------------- panels
def _learning_curve(axes: Axes, run: RunFacts) -> None:
    found = [
        (r.n_known, r.audited.mae * MILLI, _standard_error(r.audited.absolute) * MILLI)
        for r in run.rounds
        if r.audited is not None and r.audited.mae
    ]
    set_title(axes, "Error on each audit, before training on it")
    axes.set_xlabel("reference labels known to the model", **text_style())
    axes.set_ylabel(f"energy MAE (m{run.energy_unit})", **text_style())
    if not found:
        leave_empty(axes, "no audit yet")
        return
    labels, errors, spread = (np.array(column) for column in zip(*found, strict=True))
    everything = []
    if run.energy_tolerance is not None:
        everything.append(tolerance := run.energy_tolerance * MILLI)
        name = f"tolerance {tolerance:g} m{run.energy_unit}"
        axes.axhline(tolerance, color=GREEN, ls="--", lw=1.3, label=name)
    spread = np.minimum(spread, 0.9 * errors)  # a bar that reaches 0 has no end on a log axis
    axes.errorbar(
        labels,
        errors,
        spread,
        color=BLUE,
        marker="o",
        lw=1.8,
        capsize=3,
        label="MAE ± 1 std. error",
    )
    style_axes(axes)
    everything += [*(errors - spread), *(errors + spread)]
    set_log(axes, "x", labels)
    set_log(axes, "y", everything)
    set_legend(axes, "best")


def _validation_curve(axes: Axes, run: RunFacts, name: str, label: str) -> None:
    # Features that are learned before any energy have errors of GFN1-xTB energies only.
    own, before = (
        {
            (m["round"], m["member"], m["step"]): m[key] * MILLI
            for m in run.metrics
            if key in m and (key == name or name not in m)
        }
        for key in (name, f"xtb_{name}")
    )
    axes.set_ylabel(label, **text_style())
    keys = {*own, *before}
    if not keys:
        leave_empty(axes, "no values yet")
        return
    start = 0
    for number in sorted({key[0] for key in keys}):
        for member in sorted({key[1] for key in keys}):
            style: dict[str, Any] = {
                "marker": ".", "lw": 1.2, "ms": 5, "ls": "-" if member == 0 else "--"
            }  # fmt: skip
            for values, colour, text in (
                (own, BLUE if member == 0 else SKY, None),
                (before, ORANGE, "GFN1-xTB energy, learned before"),
            ):
                points = sorted((k[2], v) for k, v in values.items() if k[:2] == (number, member))
                if points:
                    steps = [start + step for step, _ in points]
                    once = text if member == 0 else None
                    axes.plot(steps, [v for _, v in points], color=colour, label=once, **style)
        axes.axvline(start, color=GREY, lw=0.8, ls=":", zorder=0)
        axes.annotate(
            f"round {number}" if number == 0 else str(number), (start, 1), (3, -9),
            xycoords=("data", "axes fraction"), textcoords="offset points", **text_style(GREY, 8.0),
        )  # fmt: skip
        start += max(m.get("steps", m["step"]) for m in run.metrics if m["round"] == number)
    style_axes(axes)
    known = [value for value in (*own.values(), *before.values()) if np.isfinite(value)]
    set_log(axes, "y", [*known, 1.4 * max(known, default=0.0)])  # room for the names of rounds
    axes.set_xlim(0, 1.02 * start)
    if before:
        set_legend(axes, "best")


def _force_parity(axes: Axes, forces: ForceComparison | None) -> None:
    if forces is None:
        leave_empty(axes, "no forces to compare")
    else:
        _parity(axes, forces.reference, forces.predicted, "eV/Å", size=6.0, alpha=0.35, scale=MILLI)
    set_title(axes, "Force components")
    axes.set_xlabel("reference force (eV/Å)", **text_style())
    axes.set_ylabel("predicted force (eV/Å)", **text_style())


def _parity(
    axes: Axes,
    x: Float[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
    unit: str,
    *,
    size: float,
    alpha: float,
    scale: float = 1.0,
    band: float = 0.0,
) -> None:
    """Draw a square parity plot that states MAE and RMSE (in meV after ``scale``)."""
    both = np.concatenate([x, y])
    margin = 0.05 * float(np.ptp(both)) or 1.0
    low, high = float(both.min()) - margin, float(both.max()) + margin
    ends = np.array([low, high])
    if band:
        axes.fill_between(ends, ends - band, ends + band, color=GREEN, alpha=0.15, lw=0)
    axes.plot(ends, ends, color=GREY, lw=1, ls="--")
    axes.scatter(x, y, s=size, color=BLUE, alpha=alpha, lw=0, rasterized=len(x) > 1000)
    error = (y - x) * scale
    unit = unit if unit.startswith("m") else f"m{unit}"
    mae, rmse = float(np.abs(error).mean()), float(np.sqrt((error**2).mean()))
    axes.annotate(
        f"MAE {mae:.3g} {unit}\nRMSE {rmse:.3g} {unit}\nn = {len(x):,}",
        (0.04, 0.96), xycoords="axes fraction", va="top", linespacing=1.5, **text_style(),
    )  # fmt: skip
    style_axes(axes)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6))


def _scatter_of_errors(axes: Axes, run: RunFacts, rounds: Sequence[RoundFacts]) -> None:
    pairs = [_pairs(facts) * MILLI for facts in rounds]
    sigma, error = np.concatenate(pairs, axis=1)
    floor = float(error.max()) / 1000 or 1e-3  # of a log axis: an error may be 0 by chance
    x, y = span(sigma), span(np.maximum(error, floor))
    ends = np.array(x)
    axes.plot(ends, ends, color=INK, lw=1.2, label="error = σ")
    axes.plot(ends, 2 * ends, color=INK, lw=1.2, ls="--", label="error = 2 σ")
    if run.energy_tolerance is not None:
        tolerance = run.energy_tolerance * MILLI
        axes.axhline(tolerance, color=GREEN, lw=1.2, ls=":", label="tolerance")
    for facts, pair, shade in zip(rounds, pairs, round_colours(len(rounds)), strict=True):
        axes.scatter(
            pair[0], np.maximum(pair[1], floor), s=16, color=shade, alpha=0.8, lw=0,
            marker=MARKERS[facts.number % len(MARKERS)], label=f"round {facts.number}",
        )  # fmt: skip
    style_axes(axes)
    set_log(axes, "x", x)
    set_log(axes, "y", y)
    set_title(axes, "Energy error and its prediction")
    axes.set_xlabel(f"predicted standard deviation σ (m{run.energy_unit})", **text_style())
    axes.set_ylabel(f"actual error (m{run.energy_unit})", **text_style())
    set_legend(axes, "upper center", ncols=3, below=True)


def _shares(axes: Axes, rounds: Sequence[RoundFacts]) -> None:
    """Draw the share of errors inside k predicted standard deviations, against a normal one."""
    k = np.linspace(0, 4, 161)
    axes.plot(k, 100 * erf(k / np.sqrt(2)), color=INK, ls="--", lw=1.2, label="normal distribution")
    for facts, shade in zip(rounds, round_colours(len(rounds)), strict=True):
        sigma, error = _pairs(facts)
        inside = 100 * (error / sigma <= k[:, None]).mean(axis=1)
        last = facts is rounds[-1]
        axes.step(
            k, inside, where="post", color=shade, lw=2 if last else 1.2,
            label=f"audit of round {facts.number}",
        )  # fmt: skip
    style_axes(axes)
    set_title(axes, "Share of errors inside k σ")
    axes.set(xlim=(0, 4), ylim=(0, 102))
    axes.set_xlabel("k", **text_style())
    axes.set_ylabel("audited structures inside k σ (%)", **text_style())
    set_legend(axes, "lower right")


def _cost_bars(axes: Axes, run: RunFacts) -> None:
    rows = [
        (name, kind, colour)
        for name, kind, colour in (
            ("reference", "reference", BLUE),
            ("GFN1-xTB", "charges", ORANGE),
        )
        if run.count(kind)
    ]
    longest = max([run.seconds(kind) for _, kind, _ in rows] or [0.0])
    for place, (_, kind, colour) in enumerate(rows):
        seconds, labels = run.seconds(kind), sum(run.count(kind).values())
        axes.barh(place, seconds, height=0.5, color=colour)
        axes.annotate(
f"{seconds:,.1f} s: {labels:,} labels, {_each(seconds / labels)} each",
            (0, place + 0.3), (2, 2), textcoords="offset points", va="bottom", **text_style(),
        )  # fmt: skip
    style_axes(axes)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set(xlim=(0, 1.05 * longest or 1), ylim=(-0.6, len(rows) - 0.2))
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    set_title(axes, "Time spent in labels")
    axes.set_xlabel("seconds on one core", **text_style())


def _label_bars(axes: Axes, run: RunFacts) -> None:
    numbers = [facts.number for facts in run.rounds]
    base = np.zeros(len(numbers))
    parts: list[tuple[str, list[int], dict[str, Any]]] = [
        (f"{name}", [r.statuses[key]["ok"] for r in run.rounds], {"color": colour})
        for name, key, colour in (("audit (random)", "audit", SKY), ("batch", "batch", BLUE))
    ]
    failed = [sum(_failed(r, key) for key in ("audit", "batch")) for r in run.rounds]
    if any(failed):
        parts.append(("failed", failed, {"color": "white", "hatch": "////", "ec": RED}))
    for name, counts, look in parts:
        axes.bar(numbers, counts, 0.62, bottom=base, label=name, **look)
        base = base + np.array(counts)
    for number, total in zip(numbers, base, strict=True):
        axes.annotate(
            f"{total:.0f}", (number, total), (0, 3), textcoords="offset points", ha="center",
            **text_style(),
        )  # fmt: skip
    style_axes(axes)
    axes.grid(False, axis="x")
    axes.set(xlim=(-0.6, max(numbers, default=0) + 0.6), ylim=(0, 1.3 * max([*base, 1])))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    set_title(axes, "Reference labels of each round")
    axes.set_xlabel("round", **text_style())
    axes.set_ylabel("structures", **text_style())
    set_legend(axes, "upper right", ncols=len(parts))


# ------------------------------------------------------------------------------- numbers
def _failed(facts: RoundFacts, name: str) -> int:
    return sum(n for status, n in facts.statuses[name].items() if status not in ("ok", "waiting"))


def _each(seconds: float) -> str:
    return f"{MILLI * seconds:.3g} ms" if seconds < 1 else f"{seconds:,.1f} s"


def _standard_error(errors: Float[np.ndarray, " n"]) -> float:
    return float(errors.std(ddof=1) / np.sqrt(len(errors))) if len(errors) > 1 else 0.0


def _pairs(facts: RoundFacts) -> Float[np.ndarray, "2 n"]:
    """Return predicted uncertainties and absolute errors that are both known."""
    if facts.audited is None:
        return np.zeros((2, 0))
    pairs = np.stack([facts.audited.uncertainty, np.abs(facts.audited.error)])
    return np.asarray(pairs[:, np.isfinite(pairs).all(axis=0) & (pairs[0] > 0)])


def _has_pairs(facts: RoundFacts) -> bool:
    return bool(_pairs(facts).size)


def audit_ratios(rounds: Sequence[RoundFacts]) -> Float[np.ndarray, " n"]:
    """Return error divided by predicted uncertainty, of the audits of some rounds."""
    pairs = [_pairs(facts) for facts in rounds]
    sigma, error = np.concatenate([np.zeros((2, 0)), *pairs], axis=1)
    return np.asarray(error / sigma)
