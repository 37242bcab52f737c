"""How often is a certificate false, and what does it cost? Simulated pools, real decisions.

Every run is an `orbcalc.active.design.InferenceSetDesign` with a simulated model whose truth is
known. A certificate is false if the share of right structures in the output, or the mean clipped
error where that was certified, is not what it says.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import machine
from matplotlib.axes import Axes
from pools import ACCURACY, MEAN_ERROR, N_POOL, SCENARIOS, Scenario, View
from rich.console import Console
from rich.table import Table
from scipy.stats import beta

from orbcalc.active.design import InferenceSetDesign
from orbcalc.config import CertificateConfig, StopConfig
from orbcalc.files import write_json
from orbcalc.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SKY,
    new_figure,
    png,
    set_legend,
    set_title,
    style_axes,
    text_style,
)

console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Rule:
    """A way to choose and to certify."""

    name: str
    certificate: dict[str, Any]
    acquisition: str = "uncertainty"
    is_proved: bool = True


RULES = (
    Rule("sequential", {}),
    Rule("hypergeometric", {"method": "hypergeometric"}),
    Rule("mean error", {"mean_error": MEAN_ERROR}),
    Rule("random", {}, acquisition="random"),
    Rule("kl_batch", {"method": "kl_batch"}, is_proved=False),
)


@dataclass(frozen=True)
class Outcome:
    """Of one run."""

    certified: bool
    false: bool
    labels: int
    """Spent until the certificate; the whole pool if there is none."""
    looks: int


# ------------------------------------------------------------------------------ one run
def run(scenario: Scenario, rule: Rule, delta: float, seed: int) -> Outcome:
    """Let a design work on one simulated pool; the same seed gives every rule the same pool."""
    rng = np.random.default_rng([seed, 1])
    model, cannot = scenario.make(rng)
    options = CertificateConfig(tolerance=1.0, accuracy=ACCURACY, delta=delta, **rule.certificate)
    sizes = scenario.selection
    if options.method == "sequential":  # which ends long before its limit where it can
        steps = {"audit": 4 * sizes.audit, "audit_step": max(sizes.audit // 5, 1)}
        sizes = sizes.model_copy(update=steps)
    # Without audits a batch takes their place, so that all rules label as many in a round.
    batch = sizes.batch + (sizes.audit if options.method == "kl_batch" else 0)
    design = InferenceSetDesign(
        N_POOL,
        selection=sizes.model_copy(update={"method": rule.acquisition, "batch": batch}),
        certificate=options,
        stop=StopConfig(max_rounds=scenario.max_rounds),
        seed=seed,
    )
    labels = np.where(cannot, np.nan, 0.0)
    view = View(np.zeros(N_POOL), np.zeros(N_POOL))
    while not design.is_done:
        if design.awaits_model:
            view = model(design.labelled, len(design.looks) + 1, delta)
        indices = design.ask(view.errors, view.scores)
        design.tell(indices, labels[indices])
    last = design.looks[-1]
    certified = last.certified
    spent = last.n_labelled + last.n_failed + last.n_audit
    return Outcome(
        certified=certified,
        false=certified and not _is_true(design, view, cannot, options),
        labels=spent if certified else N_POOL,
        looks=len(design.looks),
    )


def _is_true(
    design: InferenceSetDesign, view: View, cannot: np.ndarray, options: CertificateConfig
) -> bool:
    """Compare what was certified with the output."""
    losses = np.where(cannot, 1.0, np.minimum(view.errors, 1.0))
    right = ~cannot & (view.errors <= 1)
    losses[design.labelled], right[design.labelled] = 0.0, True
    mean = options.mean_error is None or losses.mean() <= options.mean_error
    return bool(right.mean() >= options.accuracy and mean)


def oracle(scenario: Scenario, delta: float, seed: int) -> int:
    """Count the labels of one who sees all errors, labels the worst, and stops when it is true."""
    model, cannot = scenario.make(np.random.default_rng([seed, 1]))
    sizes = scenario.selection
    is_open = np.ones(N_POOL, dtype=bool)
    is_open[np.random.default_rng([seed, 2]).permutation(N_POOL)[: sizes.initial]] = False
    for look in range(1, scenario.max_rounds + 1):
        view = model(np.flatnonzero(~is_open & ~cannot), look, delta)
        wrong = cannot | (is_open & (view.errors > 1))
        excess = int(wrong.sum() - np.floor((1 - ACCURACY) * N_POOL + 1e-9))
        chances = np.where(is_open & ~cannot, view.errors, -np.inf)
        needed = np.argsort(-chances)[: max(excess, 0)]
        if excess <= sizes.batch + sizes.audit and (is_open & ~cannot & wrong)[needed].all():
            return int((~is_open).sum()) + max(excess, 0)
        is_open[np.argsort(-chances)[: sizes.batch + sizes.audit]] = False
    return N_POOL


# --------------------------------------------------------------------------- statistics
def interval(events: int, n: int, risk: float = 0.05) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of a share."""
    low = float(beta.ppf(risk / 2, events, n - events + 1)) if events else 0.0
    high = float(beta.ppf(1 - risk / 2, events + 1, n - events)) if events < n else 1.0
    return low, high


def summarise(
    scenario: Scenario, rule: Rule, delta: float, outcomes: list[Outcome]
) -> dict[str, Any]:
    """Count what happened over all pools of a scenario."""
    n, false = len(outcomes), sum(o.false for o in outcomes)
    low, high = interval(false, n)
    return {
        "scenario": scenario.name,
        "rule": rule.name,
        "delta": delta,
        "is_proved": rule.is_proved,
        "pools": n,
        "false": false,
        "false_share": false / n,
        "false_low": low,
        "false_high": high,
        "certified_share": sum(o.certified for o in outcomes) / n,
        "labels": float(np.mean([o.labels for o in outcomes])),
        "looks": float(np.mean([o.looks for o in outcomes])),
    }


def measure(scenario: Scenario, delta: float, n_pools: int, seed: int) -> list[dict[str, Any]]:
    """Run every rule on the pools of a scenario."""
    seeds = [seed + k for k in range(n_pools)]
    rows = [
        summarise(scenario, r, delta, [run(scenario, r, delta, s) for s in seeds]) for r in RULES
    ]
    best = float(np.mean([oracle(scenario, delta, s) for s in seeds]))
    base = next(row["labels"] for row in rows if row["rule"] == "random")
    for row in rows:
        row |= {"labels_random": base, "labels_oracle": best}
    return rows


# ------------------------------------------------------------------------------- output
def table(rows: list[dict[str, Any]]) -> Table:
    """Return the results for a terminal."""
    found = Table(title="False certificates (95 % interval) and labels spent")
    for heading in ("scenario", "δ", "rule"):
        found.add_column(heading)
    for heading in ("false %", "interval %", "certified %", "labels", "/ random", "/ oracle"):
        found.add_column(heading, justify="right")
    for row in rows:
        style = "red" if row["false_low"] > row["delta"] else None
        found.add_row(
            row["scenario"],
            f"{row['delta']:g}",
            row["rule"],
            f"{100 * row['false_share']:.1f}",
            f"{100 * row['false_low']:.1f} to {100 * row['false_high']:.1f}",
            f"{100 * row['certified_share']:.0f}",
            f"{row['labels']:.0f}",
            f"{row['labels'] / row['labels_random']:.2f}",
            f"{row['labels'] / row['labels_oracle']:.2f}",
            style=style,
        )
    return found


def figure(rows: list[dict[str, Any]]) -> bytes:
    """Draw shares of false certificates, one panel for each delta, and the labels spent."""
    deltas = sorted({row["delta"] for row in rows}, reverse=True)
    drawing = new_figure(5.0)
    panels = drawing.subplots(1, len(deltas) + 1, sharey=True)
    for axes, delta in zip(panels, deltas, strict=False):
        _draw_false(axes, [row for row in rows if row["delta"] == delta], delta)
    _draw_labels(panels[-1], [row for row in rows if row["delta"] == deltas[0]])
    names = list(dict.fromkeys(row["scenario"] for row in rows))
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    set_legend(panels[0], "upper center", ncols=2, below=True)
    return png(drawing)


STYLES = {
    "sequential": (BLUE, "s"),
    "hypergeometric": (SKY, "v"),
    "mean error": (GREEN, "D"),
    "random": (GREY, "^"),
    "kl_batch": (RED, "o"),
}


def _places(rows: list[dict[str, Any]], rule: str) -> tuple[list[dict[str, Any]], np.ndarray]:
    chosen = [row for row in rows if row["rule"] == rule]
    shift = 0.15 * (list(STYLES).index(rule) - 2)
    return chosen, np.arange(len(chosen)) + shift


def _draw_false(axes: Axes, rows: list[dict[str, Any]], delta: float) -> None:
    for rule, (colour, marker) in STYLES.items():
        chosen, places = _places(rows, rule)
        share, low, high = (
            100 * np.array([row[key] for row in chosen])
            for key in ("false_share", "false_low", "false_high")
        )
        axes.errorbar(
            share, places, xerr=[share - low, high - share], color=colour, marker=marker,
            ls="none", ms=4, lw=1.2, label=rule,
        )  # fmt: skip
    axes.axvline(100 * delta, color=ORANGE, lw=1.4)
    axes.set_xscale("symlog", linthresh=1, linscale=0.6)
    axes.set_xlim(-0.1, 110)
    axes.set_xticks([0, 1, 5, 10, 100], ["0", "1", "5", "10", "100"])
    style_axes(axes)
    set_title(axes, f"False certificates, δ = {delta:g}")
    axes.set_xlabel("% of all runs, 95 % interval; line: δ", **text_style())


def _draw_labels(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for rule, (colour, marker) in STYLES.items():
        chosen, places = _places(rows, rule)
        axes.plot(
            [row["labels"] for row in chosen], places, color=colour, marker=marker, ls="none", ms=4
        )
    chosen, _ = _places(rows, "random")
    axes.plot(
        [row["labels_oracle"] for row in chosen], np.arange(len(chosen)), color=ORANGE, marker="|",
        ls="none", ms=13, mew=1.6, label="oracle",
    )  # fmt: skip
    style_axes(axes)
    axes.set_xlim(0, N_POOL * 1.03)
    set_title(axes, f"Labels of a pool of {N_POOL}")
    axes.set_xlabel("labels spent; uncertified: all", **text_style())
    set_legend(axes, "upper center", below=True)


def main() -> None:
    """Read the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--pools", type=int, default=1000, help="for each scenario")
    parser.add_argument("--deltas", type=float, nargs="+", default=[0.05, 0.01])
    parser.add_argument("--scenarios", nargs="+", default=[s.name for s in SCENARIOS])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start, rows = time.perf_counter(), []
    for scenario in SCENARIOS:
        if scenario.name in options.scenarios:
            for delta in options.deltas:
                rows += measure(scenario, delta, options.pools, options.seed)
            console.print(f"{scenario.name}: done after {time.perf_counter() - start:.0f} s")
    result = {
        "n_pool": N_POOL,
        "accuracy": ACCURACY,
        "mean_error": MEAN_ERROR,
        "scenarios": {s.name: s.says for s in SCENARIOS},
        "rules": [asdict(rule) for rule in RULES],
        "machine": machine(1),
        "results": rows,
    }
    write_json(options.out / "coverage.json", result)
    (options.out / "coverage.png").write_bytes(figure(rows))
    console.print(table(rows))


if __name__ == "__main__":
    main()
