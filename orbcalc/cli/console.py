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

#: Names by which ASE knows an extxyz file.
_EXTXYZ = (".extxyz", ".xyz")

Dask = Annotated[
    str | None,
    typer.Option("--dask", metavar="ADDRESS", help="Scheduler to use instead of a LocalCluster."),
]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Configuration.")]


def check_output(path: Path) -> None:
    """Refuse names that an extxyz file must not have: those of other formats, of label stores too.

    Raises
    ------
    ConfigError
        Saying which names serve.
    """
    if path.suffix not in _EXTXYZ:
        raise ConfigError(
            f"--output {path}: structures are written as extxyz, and read by their names. "
            f"Name it {' or '.join(_EXTXYZ)}."
        )
