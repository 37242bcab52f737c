"""Numbers that commands print: errors, counts of labels, and what a model is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from orbcalc.cli.console import console, output

__all__ = ["print_census", "print_errors", "print_failures", "print_model"]

#: Reasons of failures that are printed.
_REASONS = 5

_UNITS = {
    "energy": ("meV/atom", 1e3),
    "forces": ("meV/Å", 1e3),
    "stress": ("meV/Å³", 1e3),
    "charges": ("me", 1e3),
    "xtb_energy": ("meV/atom", 1e3),
    "xtb_forces": ("meV/Å", 1e3),
}


def print_errors(errors: Mapping[str, float], title: str) -> None:
    """Print mean errors of each quantity as a table, and shares within uncertainties if known."""
    table = Table(title=title)
    for column in ("quantity", "MAE", "RMSE", "unit"):
        table.add_column(column, justify="left" if column in ("quantity", "unit") else "right")
    shares = [share for share in ("68", "95") if any(f"within_{share}" in name for name in errors)]
    for share in shares:
        table.add_column(f"within {share} % interval", justify="right")
    for name, (unit, factor) in _UNITS.items():
        if f"{name}_mae" in errors:
            mae, rmse = (f"{factor * errors[f'{name}_{kind}']:.3f}" for kind in ("mae", "rmse"))
            within = [errors.get(f"{name}_within_{share}") for share in shares]
            cells = ["" if share is None else f"{100 * share:.1f} %" for share in within]
            table.add_row(name, mae, rmse, unit, *cells)
    output.print(table)


def print_census(census: Mapping[Any, Mapping[str, float]]) -> None:
    """Print how the labels of each kind ended, and what they cost."""
    for kind, counts in census.items():
        words = ", ".join(
            f"{count:.1f} s" if status.endswith("_s") else f"{count:g} {status}"
            for status, count in counts.items()
        )
        output.print(f"{kind}: {words or 'none'}")


def print_failures(failures: Counter[str]) -> None:
    """Print how many labels failed, now or before, and the most frequent reasons."""
    if not failures:
        return
    console.print(Text(f"{failures.total()} labels failed, now or before:", "yellow"))
    for reason, count in failures.most_common(_REASONS):
        console.print(Text(f"  {count} x {reason}"))
    if len(failures) > _REASONS:
        console.print(f"  and {len(failures) - _REASONS} other reasons")


def print_model(path: Path) -> None:
    """Print what a model file holds."""
    from ase.data import chemical_symbols

    from orbcalc.files import file_sha256
    from orbcalc.model.checkpoint import load_model

    committee, metadata = load_model(path)
    first = committee.first
    n_weights = sum(p.numel() for p in first.parameters())
    energy = f"process of {first.n_inducing} atoms" if first.n_inducing else "network"
    if not first.has_energies:
        energy = "none learned but that of GFN1-xTB (features for a process)"
    elif first.config.xtb_head == "baseline":
        energy += " above a learned GFN1-xTB energy"
    elif first.config.baseline != "none":
        energy += f" above a computed {first.config.baseline} energy"
    lines = [
        f"{path}: {len(committee.members)} member(s) of {n_weights} weights",
        f"elements {' '.join(chemical_symbols[z] for z in first.elements)}, "
        f"cutoff {first.config.cutoff} Å, charges: {first.config.charge_head}, "
        f"energy: {energy}",
        f"labels: {metadata.get('labels') or 'methods not recorded'}",
        f"training set: {metadata.get('training_set')}",
        f"SHA-256 {file_sha256(path)}",
    ]
    output.print("\n".join(lines))
    if metadata.get("valid_errors"):
        print_errors(metadata["valid_errors"], "held-out structures")
