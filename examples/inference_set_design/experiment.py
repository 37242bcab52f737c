"""What both examples share: a design on a pool whose labels are all known, and its picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from orbcalc.active.certificate import Certificate
from orbcalc.active.design import InferenceSetDesign
from orbcalc.config import CertificateConfig, SelectionConfig, StopConfig

#: From the indices that are labelled to predicted classes and scores (higher: harder) of all.
FitPredict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

COLOURS = {"uncertainty": "#0072B2", "random": "#E69F00"}
NAMES = {"uncertainty": "active (least certain first)", "random": "random"}


@dataclass(frozen=True)
class Run:
    """One design, from the first labels to its end."""

    method: str
    share: np.ndarray
    """(looks,) share of the pool that is labelled, audits included."""
    accuracy: np.ndarray
    """(looks,) true share of the pool that is labelled or predicted right."""
    bound: np.ndarray
    """(looks,) what the look proves of it."""
    certificate: Certificate


def run_design(
    truth: np.ndarray,
    fit_predict: FitPredict,
    *,
    selection: SelectionConfig,
    certificate: CertificateConfig,
    seed: int,
    name: str,
    objects: str,
) -> Run:
    """Let a design label a pool, and note the truth at each look."""
    design = InferenceSetDesign(
        len(truth),
        selection=selection,
        certificate=certificate,
        stop=StopConfig(max_rounds=30),
        seed=seed,
        quantity="number of the class",
        name=name,
        objects=objects,
    )
    predictions, scores = truth * 0, truth * 0.0
    share, accuracy = [], []
    while not design.is_done:
        if design.awaits_model:
            predictions, scores = fit_predict(design.labelled)
        indices = design.ask(predictions, scores)
        look = design.tell(indices, truth[indices])
        if look is not None:
            right = predictions == truth
            right[design.labelled] = True
            share.append(len(design.labelled) / len(truth))
            accuracy.append(right.mean())
    bounds = np.array([look.accuracy_bound for look in design.looks])
    return Run(selection.method, np.array(share), np.array(accuracy), bounds, design.certificate)


def report(runs: Sequence[Run], title: str, path: Path) -> None:
    """Print what was certified, and draw system accuracy against the share labelled."""
    for run in runs:
        print(
            f"{NAMES[run.method]}: {100 * run.share[-1]:.1f} % labelled, "
            f"true accuracy {100 * run.accuracy[-1]:.2f} %, {run.certificate.reason}"
        )
    print(f"The first of them: {runs[0].certificate.statement}")
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    drawn = set()
    for run in runs:
        colour, is_first = COLOURS[run.method], run.method not in drawn
        drawn.add(run.method)
        labels = [NAMES[run.method], "  what its looks prove", "  certified: stop"]
        labels = labels if is_first else [None] * 3
        x, y = 100 * run.share, 100 * run.accuracy
        axes.plot(x, y, color=colour, lw=1.6, label=labels[0])
        axes.plot(x, 100 * run.bound, color=colour, lw=1, ls=":", label=labels[1])
        if run.certificate.certified:
            style = {"color": colour, "marker": "*", "ms": 13, "mec": "white", "ls": "none"}
            axes.plot(x[-1:], y[-1:], label=labels[2], zorder=3, **style)
    target = 100 * runs[0].certificate.gamma
    axes.axhline(target, color="#009E73", lw=1.2, label=f"asked for: {target:g} %")
    lowest = 100 * min(run.accuracy.min() for run in runs)
    axes.set(
        ylim=(max(lowest - 12, 0), 101),
        xlabel="labelled share of the pool, audits included (%)",
        ylabel="labelled or predicted right (%)",
    )
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"written: {path}")
