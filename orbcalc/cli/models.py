"""`orbcalc train` and `orbcalc evaluate`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from orbcalc.cli.console import ConfigFile, check_output, output
from orbcalc.cli.progress import training_bars
from orbcalc.cli.tables import print_errors, print_model
from orbcalc.errors import OrbcalcError

__all__ = ["evaluate", "train"]


def train(config_file: ConfigFile) -> None:
    """Train a potential or a committee; the same command again goes on after a kill."""
    from orbcalc.config import TrainConfig, load_config
    from orbcalc.files import append_json
    from orbcalc.training.run import train as train_model

    config = load_config(config_file, TrainConfig)
    metrics = config.output.with_name(f"{config.output.stem}.metrics.jsonl")
    with training_bars() as show:

        def report(record: Mapping[str, Any]) -> None:
            append_json(metrics, record)
            show(record)

        train_model(config, report)
    output.print(f"model written to {config.output}, metrics to {metrics}")
    print_model(config.output)


def evaluate(
    model: Annotated[Path, typer.Argument(help="Model file, .orbcalc.")],
    structures: Annotated[list[Path], typer.Argument(help="Labelled structures.")],
    device: str = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Structures with their predictions, extxyz."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a model with the labels of structures: errors, and shares within uncertainties."""
    from orbcalc.active.folder import write_structures
    from orbcalc.model.checkpoint import learned_charges
    from orbcalc.prediction import baseline_worker, open_model, predict
    from orbcalc.properties import OWN_LABELS
    from orbcalc.results import with_results
    from orbcalc.training.dataset import LabelDataset
    from orbcalc.training.run import model_errors, read_labelled

    if out is not None:
        check_output(out)
    committee, metadata = open_model(model, device=device)
    labelled = read_labelled(tuple(structures))
    for number, atoms in enumerate(labelled):
        committee.first.check_elements(atoms.numbers.tolist(), f"structure {number} of all files")
    if (worker := baseline_worker(committee, metadata)) is not None:
        with closing(worker):
            worker.label(labelled)
    dataset = LabelDataset(labelled, committee.cutoff, committee.first.config.baseline)
    census = dataset.census()
    charges = ("charges",) if learned_charges(committee, metadata) else ()
    learned = ("forces", "stress", *charges)
    names = ["energy"] + [name for name in learned if census[name]]
    errors = model_errors(committee, dataset, names, shares=True)
    if not errors:
        raise OrbcalcError(
            f"no labels to compare with in {len(dataset)} structures: {census}. {OWN_LABELS}"
        )
    if out is not None:
        wanted = dict.fromkeys([*names, "forces", *charges])
        source: Literal["compute", "labels"] = "compute" if worker is None else "labels"
        results = predict(committee, labelled, [*wanted], baseline=source)
        write_structures(out, [with_results(*pair) for pair in zip(labelled, results, strict=True)])
    if as_json:
        output.print_json(json.dumps({"structures": len(dataset), **errors}))
    else:
        print_errors(errors, f"{len(dataset)} structures")
    if not all(math.isfinite(value) for value in errors.values()):
        raise OrbcalcError("the model predicts NaN for some of these structures")
