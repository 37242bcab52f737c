"""A sequential audit at each look, one of fixed size, or one standing set? All are valid.

*Sequential* and *fixed*: the audit of a look is drawn from the unlabelled, and trains the model
afterwards (`orbcalc run`); its size is given, or it goes on in steps of a given size until it
decides. *Standing*: one audit set is drawn from the whole pool and labelled before
anything else; it is never trained on or acquired, and every look uses it again. Acquisition is
then by a threshold on the scores, and an audited structure speaks for the unlabelled as long as
its own score has stayed below every threshold so far: to swap it with an unlabelled one then
changes nothing that was trained or acquired, so that those left of the audit are a uniform sample
of themselves and the unlabelled together. Both pay delta / (t (t + 1)) at look t.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import machine
from coverage import RULES, Outcome, interval, run
from pools import ACCURACY, N_POOL, SCENARIOS, Scenario
from rich.console import Console
from rich.table import Table

from orbcalc.active.certificate import PoolCounts, audit_look
from orbcalc.active.selection import draw_audit
from orbcalc.files import write_json

console = Console(soft_wrap=True, highlight=False)

#: Sizes of audits, by rule; sequential ones go on in a fifth of it and end at four times as many.
SIZES = {
    "sequential": (25, 50, 100),
    "hypergeometric": (20, 40, 80, 160),
    "standing": (50, 100, 200, 300),
}


def standing(scenario: Scenario, delta: float, seed: int) -> Outcome:
    """Let a design with a standing audit set work on one simulated pool."""
    model, cannot = scenario.make(np.random.default_rng([seed, 1]))
    rng, sizes = np.random.default_rng([seed, 3]), scenario.selection
    speaks = np.zeros(N_POOL, dtype=bool)  # of the audit set
    speaks[draw_audit(N_POOL, sizes.audit, rng)] = True
    trained = np.zeros(N_POOL, dtype=bool)
    others = np.flatnonzero(~speaks)
    trained[others[draw_audit(len(others), sizes.initial, rng)]] = True
    silent = np.zeros(N_POOL, dtype=bool)  # audited, but above a threshold once
    for number in range(1, scenario.max_rounds + 1):
        view = model(np.flatnonzero(trained & ~cannot), number, delta)
        seen = trained | silent
        counts = PoolCounts(N_POOL, int((seen & ~cannot).sum()), int((seen & cannot).sum()))
        hit = (view.errors <= 1) & ~cannot
        look = audit_look(
            counts,
            hit[speaks],
            failed=cannot[speaks],
            look=number,
            gamma=ACCURACY,
            delta=delta,
        )
        spent = int((seen | speaks).sum())
        if look.certified:
            right = hit | ((seen | speaks) & ~cannot)
            return Outcome(True, bool(right.mean() < ACCURACY), spent, number)
        scores = np.where(np.isnan(view.scores), np.inf, view.scores)
        unlabelled = np.flatnonzero(~seen & ~speaks)
        batch = unlabelled[np.argsort(-scores[unlabelled])[: sizes.batch]]
        if len(batch) == 0:
            break
        trained[batch] = True
        left_out = speaks & (scores >= scores[batch].min())
        silent |= left_out
        speaks &= ~left_out
    return Outcome(False, False, N_POOL, number)


# ------------------------------------------------------------------------------- output
def compare(scenario: Scenario, delta: float, n_pools: int, seed: int) -> list[dict[str, Any]]:
    """Run both ways with audits of several sizes; batches are those of the scenario."""
    rows = []
    rules = {rule.name: rule for rule in RULES}
    for name, sizes in SIZES.items():
        for size in sizes:
            options = scenario.selection.model_copy(update={"audit": size})
            these = replace(scenario, selection=options, max_rounds=40)
            outcomes = [
                run(these, rules[name], delta, k) if name in rules else standing(these, delta, k)
                for k in range(seed, seed + n_pools)
            ]
            false = sum(o.false for o in outcomes)
            rows.append(
                {
                    "scenario": scenario.name,
                    "audit": name,
                    "size": size,
                    "delta": delta,
                    "pools": n_pools,
                    "false_share": false / n_pools,
                    "false_interval": interval(false, n_pools),
                    "certified_share": float(np.mean([o.certified for o in outcomes])),
                    "labels": float(np.mean([o.labels for o in outcomes])),
                    "looks": float(np.mean([o.looks for o in outcomes])),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the results for a terminal; the fewest labels of a scenario and way are bold."""
    found = Table(title="Labels until a certificate")
    for heading in ("scenario", "audit"):
        found.add_column(heading)
    for heading in ("size", "labels", "looks", "certified %", "false %"):
        found.add_column(heading, justify="right")
    for row in rows:
        rivals = [r for r in rows if all(r[k] == row[k] for k in ("scenario", "audit"))]
        found.add_row(
            row["scenario"],
            row["audit"],
            str(row["size"]),
            f"{row['labels']:.0f}",
            f"{row['looks']:.1f}",
            f"{100 * row['certified_share']:.0f}",
            f"{100 * row['false_share']:.1f}",
            style="bold" if row["labels"] == min(r["labels"] for r in rivals) else None,
        )
    return found


def main() -> None:
    """Read the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--pools", type=int, default=300, help="for each scenario and size")
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    names = [s.name for s in SCENARIOS]
    parser.add_argument("--scenarios", nargs="+", choices=names, default=names[:8])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start, rows = time.perf_counter(), []
    for scenario in SCENARIOS:
        if scenario.name in options.scenarios:
            rows += compare(scenario, options.delta, options.pools, options.seed)
            console.print(f"{scenario.name}: done after {time.perf_counter() - start:.0f} s")
    write_json(options.out / "audits.json", {"machine": machine(1), "results": rows})
    console.print(table(rows))


if __name__ == "__main__":
    main()
