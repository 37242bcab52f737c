"""The page of a run: what was learnt, how surely, and what it cost, in one HTML file.

It can be written at any moment of a run. The page needs no network and no JavaScript; its
figures are also written as PNG files. Everything on it is read from the run folder, nothing is
kept from one call to the next.
"""

from __future__ import annotations

from pathlib import Path

from orbcalc.files import write_text
from orbcalc.report.page import draw_figures, render
from orbcalc.report.reading import read_run

__all__ = ["write_report"]


def write_report(run: str | Path) -> Path:
    """Write ``report.html`` and ``plots/*.png`` of a run, finished or not.

    Parameters
    ----------
    run
        The folder that `orbcalc run` writes into.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ConfigError
        If the folder holds no run, or its certificate contradicts itself.
    LabelError
        If the label store cannot be read.
    """
    facts = read_run(run)
    drawings = draw_figures(facts, facts.folder.path / "plots")
    write_text(facts.folder.report, render(facts, drawings))
    return facts.folder.report
