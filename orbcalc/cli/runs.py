"""`orbcalc run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orbcalc.cli.console import ConfigFile, Dask, output
from orbcalc.cli.progress import run_display

__all__ = ["run"]


def run(
    config_file: ConfigFile,
    dask: Dask = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder, instead of the config's.")
    ] = None,
) -> None:
    """Run the active-learning loop, or go on with it."""
    from orbcalc.active import loop
    from orbcalc.active.folder import RunFolder
    from orbcalc.config import RunConfig, load_config

    config = load_config(config_file, RunConfig)
    if dask is not None:
        config = config.model_copy(
            update={"dask": config.dask.model_copy(update={"address": dask})}
        )
    if out is not None:
        config = config.model_copy(update={"output": out})
    with run_display() as notify:
        certificate = loop.run(config, notify=notify)
    from orbcalc.report import write_report

    page = write_report(config.output)
    output.print(certificate.statement)
    folder = RunFolder(config.output)
    output.print(f"model: {folder.model}\npool: {folder.results}\nreport: {page}")
    if not certificate.certified:
        raise typer.Exit(1)
