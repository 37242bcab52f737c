"""Where the commands print, and the arguments that several of them have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from orbcalc.errors import ConfigError

__all__ = ["ConfigFile", "Dask", "check_output", "console", "output"]

# Texts are printed as they are: brackets are no markup, and lines of a log are not cut at 80.
_PLAIN: dict[str, bool] = {"markup": False, "highlight": False, "soft_wrap": True}
console = Console(stderr=True, **_PLAIN)  # type: ignore[arg-type]
output = Console(**_PLAIN)  # type: ignore[arg-type]

Dask = Annotated[
    str | None,
    typer.Option("--dask", metavar="ADDRESS", help="Scheduler to use instead of a LocalCluster."),
]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Configuration.")]


def check_output(path: Path) -> None:
    """Refuse a name of an extxyz file that belongs to a label store, which would be lost.

    Raises
    ------
    ConfigError
        Saying which names do.
    """
    from orbcalc.labels.store import SUFFIXES

    if path.suffix in SUFFIXES:
        raise ConfigError(
            f"--output {path}: structures are written as extxyz, and names in "
            f"{' or '.join(SUFFIXES)} are those of label stores. Name it .extxyz."
        )
