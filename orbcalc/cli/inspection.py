"""Commands that show what is there: `orbcalc info`, `orbcalc report` and `orbcalc schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from orbcalc.cli.console import output
from orbcalc.cli.progress import event_in_words
from orbcalc.cli.tables import print_census, print_failures, print_model
from orbcalc.errors import ConfigError

__all__ = ["info", "report", "schema"]


def info(
    path: Annotated[Path, typer.Argument(help="Model file, label store or run folder.")],
) -> None:
    """Say what a model, a label store or a run folder holds."""
    if path.is_dir():
        _print_run(path)
    elif path.suffix in (".db", ".aselmdb"):
        from orbcalc.labels.store import LabelStore

        store = LabelStore(path, create=False)
        output.print(f"{len(store)} structures")
        for kind in ("charges", "reference"):
            output.print(f"{kind}: {store.provenance(kind) or 'none'}")
        print_census(store.census())
        print_failures(store.failures())
    else:
        print_model(path)


def report(run_folder: Annotated[Path, typer.Argument(metavar="RUN")]) -> None:
    """Write the HTML page of a run and its figures."""
    from orbcalc.report import write_report

    output.print(f"{write_report(run_folder)}")


def schema(
    name: Annotated[str, typer.Argument(help="run or train")] = "run",
) -> None:
    """Print the JSON schema of a configuration."""
    from pydantic import BaseModel

    from orbcalc.config import RunConfig, TrainConfig

    models: dict[str, type[BaseModel]] = {"run": RunConfig, "train": TrainConfig}
    if name not in models:
        raise ConfigError(f"there is no schema {name!r}; give one of {', '.join(models)}")
    output.print_json(json.dumps(models[name].model_json_schema()))


def _print_run(path: Path) -> None:
    from orbcalc.active.certificate import Certificate
    from orbcalc.active.folder import RunFolder
    from orbcalc.files import read_jsonl

    folder = RunFolder(path)
    if not folder.config_file.exists():
        raise ConfigError(f"{path} is no run folder: it has no config.yaml")
    for record in read_jsonl(folder.events):
        output.print(f"{record['time']}  {event_in_words(record)}")
    if folder.certificate.exists():
        text = folder.certificate.read_text(encoding="utf-8")
        output.print(Certificate.from_json(text).statement)
    else:
        output.print("unfinished: `orbcalc run` with its configuration goes on")
