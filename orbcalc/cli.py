"""The `orbcalc` command: a thin shell around the functions of the package.

Exit codes: 0, it is done; 1, it failed, or a run ended without a certificate; 2, the command
line or a configuration is wrong.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from orbcalc.errors import ConfigError, OrbcalcError

if TYPE_CHECKING:
    from orbcalc.labels.label import Label

__all__ = ["app", "main"]

app = typer.Typer(
    name="orbcalc",
    help="Interatomic potentials taught by cheap orbital charges.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Texts are printed as they are: brackets are no markup, and lines of a log are not cut at 80.
_PLAIN: dict[str, bool] = {"markup": False, "highlight": False, "soft_wrap": True}
console = Console(stderr=True, **_PLAIN)  # type: ignore[arg-type]
output = Console(**_PLAIN)  # type: ignore[arg-type]

Dask = Annotated[
    str | None,
    typer.Option("--dask", metavar="ADDRESS", help="Scheduler to use instead of a LocalCluster."),
]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Configuration.")]


def main() -> None:
    """Run the command line and exit with its code."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("orbcalc").addHandler(handler)
    try:
        app()
    except ConfigError as error:
        console.print(Text.assemble(("error: ", "red"), str(error)))
        sys.exit(2)
    except (OrbcalcError, OSError) as error:
        console.print(Text.assemble(("error: ", "red"), str(error)))
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("interrupted; start the same command again to go on")
        sys.exit(1)


@app.command("label")
def label_command(
    structures: Annotated[list[Path], typer.Argument(help="Files that ASE reads.")],
    out: Annotated[
        Path, typer.Option("--output", "-o", help="Labelled structures, extxyz.")
    ] = Path("labelled.extxyz"),
    store: Annotated[
        Path | None, typer.Option(help="Label store (.db) to keep and reuse labels in.")
    ] = None,
    reference: Annotated[
        str,
        typer.Option(
            help="GFN2-xTB, pyscf, file, an ASE calculator 'package.module:Name', or 'none'."
        ),
    ] = "GFN2-xTB",
    arguments: Annotated[
        str, typer.Option(help="Keyword arguments of the reference calculator, as JSON.")
    ] = "{}",
    charges: Annotated[bool, typer.Option(help="GFN1-xTB orbital charges.")] = True,
    forces: Annotated[bool, typer.Option(help="Reference forces.")] = True,
    stress: Annotated[bool, typer.Option(help="Reference stress.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that one label may take.")] = 600.0,
    dask: Dask = None,
) -> None:
    """Label structures: GFN1-xTB orbital charges, reference energies and forces."""
    from orbcalc.active.executor import open_executor
    from orbcalc.active.folder import write_structures
    from orbcalc.active.labelling import label_into_store
    from orbcalc.config import DaskConfig, LabelConfig, parse_config
    from orbcalc.labels.store import LabelStore
    from orbcalc.structures import read_structures, structure_key

    if reference == "none" and not charges:
        raise ConfigError("nothing to label: --reference none and --no-charges")
    config = parse_config(
        {
            "reference": {
                "calculator": "GFN2-xTB" if reference == "none" else reference,
                "arguments": _json(arguments),
            },
            "charges": charges,
            "forces": forces,
            "stress": stress,
            "timeout_s": timeout,
        },
        LabelConfig,
        source="command line",
    )
    kinds = tuple(
        kind
        for kind, wanted in (("charges", charges), ("reference", reference != "none"))
        if wanted
    )
    atoms_list = read_structures(structures)
    labels = LabelStore(store or out.with_suffix(".db"))
    with (
        open_executor(DaskConfig(address=dask, model_workers=1)) as executor,
        _label_bar() as progress,
    ):
        statuses = label_into_store(
            executor,
            atoms_list,
            config,
            labels,
            kinds=kinds,  # type: ignore[arg-type]
            progress=progress,
        )
    keys = list(dict.fromkeys(structure_key(atoms) for atoms in atoms_list))
    write_structures(out, labels.labelled_atoms(keys))
    _print_census(labels.census())
    failed = sum(count for status, count in statuses.items() if status != "ok")
    output.print(f"{len(keys)} structures -> {out} (labels kept in {labels.path})")
    if failed:
        failures = Text(f"{failed} new labels failed", "yellow")
        console.print(failures + f": see {labels.path}; never trained on")


@app.command()
def train(config_file: ConfigFile) -> None:
    """Train a potential or a committee; the same command again goes on after a kill."""
    from orbcalc.active.folder import append_json
    from orbcalc.config import TrainConfig, load_config
    from orbcalc.training.run import train as train_model

    config = load_config(config_file, TrainConfig)
    metrics = config.output.with_name("metrics.jsonl")
    with _training_bars() as show:

        def report(record: Mapping[str, Any]) -> None:
            append_json(metrics, record)
            show(record)

        train_model(config, report)
    output.print(f"model written to {config.output}, metrics to {metrics}")
    _print_model(config.output)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Model file, .orbcalc.")],
    structures: Annotated[list[Path], typer.Argument(help="Labelled structures.")],
    device: str = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a model with the labels of structures."""
    from orbcalc.model.checkpoint import load_model
    from orbcalc.training.dataset import LabelDataset
    from orbcalc.training.run import load_labelled, model_errors
    from orbcalc.training.trainer import resolve_device

    committee, _ = load_model(model, device=resolve_device(device))
    labelled = load_labelled(tuple(structures))
    for atoms in labelled:
        committee.first.check_elements(atoms.numbers.tolist())
    dataset = LabelDataset(labelled, committee.cutoff)
    census = dataset.census()
    names = ["energy"] + [name for name in ("forces", "stress", "charges") if census[name]]
    errors = model_errors(committee, dataset, names)
    if not errors:
        raise OrbcalcError(f"no labels to compare with in {len(dataset)} structures: {census}")
    if as_json:
        output.print_json(json.dumps({"structures": len(dataset), **errors}))
    else:
        _print_errors(errors, f"{len(dataset)} structures")
    if not all(math.isfinite(value) for value in errors.values()):
        raise OrbcalcError("the model predicts NaN for some of these structures")


@app.command("run")
def run_command(
    config_file: ConfigFile,
    dask: Dask = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder, instead of the config's.")
    ] = None,
) -> None:
    """Run the active-learning loop, or go on with it."""
    from orbcalc.active.loop import run
    from orbcalc.config import RunConfig, load_config

    config = load_config(config_file, RunConfig)
    if dask is not None:
        config = config.model_copy(
            update={"dask": config.dask.model_copy(update={"address": dask})}
        )
    if out is not None:
        config = config.model_copy(update={"output": out})
    with _run_display() as notify:
        certificate = run(config, notify=notify)
    from orbcalc.report import write_report

    page = write_report(config.output)
    output.print(certificate.statement)
    output.print(f"model: {config.output / 'model.orbcalc'}\nreport: {page}")
    if not certificate.certified:
        raise typer.Exit(1)


@app.command()
def check(config_file: ConfigFile) -> None:
    """Check a configuration and its data, and time one label, before anything is started."""
    from orbcalc.config import RunConfig, TrainConfig, load_config

    text = config_file.read_text(encoding="utf-8") if config_file.exists() else ""
    if "\npool:" in f"\n{text}":
        _check_run(load_config(config_file, RunConfig))
    else:
        _check_training(load_config(config_file, TrainConfig))


@app.command()
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
        _print_census(store.census())
    else:
        _print_model(path)


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(metavar="RUN")]) -> None:
    """Write the HTML page of a run and its figures."""
    from orbcalc.report import write_report

    output.print(f"{write_report(run_folder)}")


@app.command()
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


# ----------------------------------------------------------------------------- progress
def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def _label_bar() -> Iterator[Callable[[int, int, Any], None]]:
    """Show labels as a bar on a terminal; nothing in a log but the census at the end."""
    with _bar() as bar:
        task = bar.add_task("labels", total=None, note="")

        def progress(done: int, total: int, labels: list[Label]) -> None:
            bar.update(task, completed=done, total=total)

        yield progress


@contextlib.contextmanager
def _training_bars() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show the steps of each member as a bar on a terminal, as lines in a log."""
    with _bar() as bar:
        tasks: dict[Any, Any] = {}

        def show(record: Mapping[str, Any]) -> None:
            member = record["member"]
            if member not in tasks:
                tasks[member] = bar.add_task(f"member {member}", total=record["steps"], note="")
            note = _errors_in_words(record)
            bar.update(tasks[member], completed=record["step"], note=note)
            if not console.is_terminal:
                console.print(f"member {member} step {record['step']}/{record['steps']} {note}")

        yield show


@contextlib.contextmanager
def _run_display() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show the events of a run as lines, and what is under way as bars on a terminal."""
    with _bar() as bar:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int, note: str = "") -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total, note=note)
            bar.update(tasks[name], completed=done, total=total, note=note)

        def notify(record: Mapping[str, Any]) -> None:
            if record["event"] == "labelling":
                show(f"labels ({record['purpose']})", record["done"], record["of"])
            elif record["event"] == "training":
                note = _errors_in_words(record)
                show(f"training, member {record['member']}", record["step"], record["steps"], note)
            else:
                for name in list(tasks):
                    bar.remove_task(tasks.pop(name))
                console.print(_event_in_words(record))

        yield notify


def _event_in_words(record: Mapping[str, Any]) -> str:
    """Say an event in one line."""
    event, where = record["event"], f"round {record.get('round', '-')}: "
    if event == "pool":
        return f"{where}{record['added']} structures added, the pool holds {record['pool']}"
    if event == "walk":
        return f"{where}a walker found {record['frames']} structures, ended: {record['ended']}"
    if event == "selection":
        return (
            f"{where}{record['audit']} drawn for the audit, {record['batch']} selected, "
            f"of {record['unlabelled']} unlabelled"
        )
    if event == "labelled":
        statuses = ", ".join(f"{count} {status}" for status, count in record["statuses"].items())
        return f"{where}labelled {record['structures']} ({record['purpose']}): {statuses} labels"
    if event == "trained":
        return (
            f"{where}trained on {record['n_train']}: {_errors_in_words(record['errors'])} "
            f"on {record['n_valid']} held out"
        )
    if event == "look":
        mae = record["mae_per_atom"]
        error = "no prediction" if mae is None else f"MAE {1000 * mae:.2f} meV/atom"
        return (
            f"{where}audit of {record['audit']}: {record['misses']} misses, {error}, accuracy of "
            f"the pool at least {record['accuracy_bound']:.3f}"
        )
    if event == "round":
        return f"{where}done, {record['labelled']} of {record['pool']} labelled"
    return f"{event}: " + ", ".join(
        f"{key} {value}" for key, value in record.items() if key not in ("event", "time")
    )


def _errors_in_words(errors: Mapping[str, Any]) -> str:
    parts = []
    if "energy_mae" in errors:
        parts.append(f"energy MAE {1000 * errors['energy_mae']:.2f} meV/atom")
    if "forces_mae" in errors:
        parts.append(f"force MAE {1000 * errors['forces_mae']:.1f} meV/Å")
    if "charges_mae" in errors:
        parts.append(f"charge block MAE {1000 * errors['charges_mae']:.1f} me")
    return ", ".join(parts)


# ------------------------------------------------------------------------------- tables
_UNITS = {
    "energy": ("meV/atom", 1e3),
    "forces": ("meV/Å", 1e3),
    "stress": ("meV/Å³", 1e3),
    "charges": ("me", 1e3),
}


def _print_errors(errors: Mapping[str, float], title: str) -> None:
    table = Table(title=title)
    for column in ("quantity", "MAE", "RMSE", "unit"):
        table.add_column(column, justify="left" if column in ("quantity", "unit") else "right")
    for name, (unit, factor) in _UNITS.items():
        if f"{name}_mae" in errors:
            mae, rmse = (f"{factor * errors[f'{name}_{kind}']:.3f}" for kind in ("mae", "rmse"))
            table.add_row(name, mae, rmse, unit)
    output.print(table)


def _print_census(census: Mapping[Any, Mapping[str, float]]) -> None:
    for kind, counts in census.items():
        words = ", ".join(
            f"{count:.1f} s" if status.endswith("_s") else f"{count:g} {status}"
            for status, count in counts.items()
        )
        output.print(f"{kind}: {words or 'none'}")


def _print_model(path: Path) -> None:
    from ase.data import chemical_symbols

    from orbcalc.files import file_sha256
    from orbcalc.model.checkpoint import load_model

    committee, metadata = load_model(path)
    first = committee.first
    n_weights = sum(p.numel() for p in first.parameters())
    lines = [
        f"{path}: {len(committee.members)} member(s) of {n_weights} weights",
        f"elements {' '.join(chemical_symbols[z] for z in first.elements)}, "
        f"cutoff {first.config.cutoff} Å, charges: {first.config.charge_head}",
        f"labels: {metadata.get('labels') or 'methods not recorded'}",
        f"training set: {metadata.get('training_set')}",
        f"SHA-256 {file_sha256(path)}",
    ]
    output.print("\n".join(lines))
    if metadata.get("valid_errors"):
        _print_errors(metadata["valid_errors"], "held-out structures")


def _print_run(path: Path) -> None:
    from orbcalc.active.certificate import Certificate
    from orbcalc.active.folder import RunFolder, read_jsonl

    folder = RunFolder(path)
    if not folder.config_file.exists():
        raise ConfigError(f"{path} is no run folder: it has no config.yaml")
    for record in read_jsonl(folder.events):
        output.print(f"{record['time']}  {_event_in_words(record)}")
    if folder.certificate.exists():
        text = folder.certificate.read_text(encoding="utf-8")
        output.print(Certificate.from_json(text).statement)
    else:
        output.print("unfinished: `orbcalc run` with its configuration goes on")


# ------------------------------------------------------------------------------- checks
def _check_run(config: Any) -> None:
    from orbcalc.labels.process import WorkerProcess, label_structure
    from orbcalc.labels.reference import check_file_labels
    from orbcalc.structures import read_structures

    source = config.pool
    structures = read_structures(source.structures) if source.structures else []
    starts = read_structures(source.start) if source.start else []
    output.print(f"pool: {len(structures)} structures from files, {len(starts)} to start MD from")
    if config.labels.reference.calculator == "file":
        check_file_labels(structures, config.labels)
    probe = max(structures or starts, key=len)
    with WorkerProcess() as process:
        for item in label_structure(process, probe, config.labels):
            output.print(
                f"{item.kind} label of {probe.get_chemical_formula()}: {item.status} in "
                f"{item.wall_time_s:.2f} s by {item.provenance} {item.message}",
            )
            if item.status != "ok":
                raise OrbcalcError("the largest structure could not be labelled")


def _check_training(config: Any) -> None:
    from orbcalc.training.dataset import LabelDataset
    from orbcalc.training.run import load_labelled

    structures = load_labelled(config.train)
    dataset = LabelDataset(structures, config.potential.cutoff)
    output.print(f"{len(dataset)} structures, labels: {dataset.census()}")
    dataset.require(config.tasks)


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--arguments is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"--arguments must be a JSON object, got {text}")
    return value
