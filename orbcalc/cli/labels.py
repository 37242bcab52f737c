"""`orbcalc label`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from orbcalc.cli.console import Dask, check_output, console, output
from orbcalc.cli.progress import label_bar
from orbcalc.cli.tables import print_census, print_failures
from orbcalc.errors import ConfigError

__all__ = ["label"]


def label(
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
            help="GFN2-xTB, pyscf, an ASE calculator 'package.module:Name', 'file' (keep the "
            "REF_ labels that the files have), or 'none' (leave them out)."
        ),
    ] = "GFN2-xTB",
    arguments: Annotated[
        str, typer.Option(help="Keyword arguments of the reference calculator, as JSON.")
    ] = "{}",
    charges: Annotated[bool, typer.Option(help="GFN1-xTB orbital charges.")] = True,
    forces: Annotated[bool, typer.Option(help="Reference forces.")] = True,
    stress: Annotated[bool, typer.Option(help="Reference stress.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that one label may take.")] = 600.0,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try labels again that failed before.")
    ] = False,
    dask: Dask = None,
) -> None:
    """Label structures: GFN1-xTB orbital charges, reference energies and forces."""
    from orbcalc.active.executor import open_executor
    from orbcalc.active.folder import write_structures
    from orbcalc.active.labelling import label_into_store, relabelled
    from orbcalc.config import DaskConfig, LabelConfig, parse_config
    from orbcalc.labels.label import Kind
    from orbcalc.labels.sources import look_over, read_sources
    from orbcalc.labels.store import LabelStore
    from orbcalc.structures import structure_key

    if reference == "none" and not charges:
        raise ConfigError("nothing to label: --reference none and --no-charges")
    check_output(out)
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
    wanted: dict[Kind, bool] = {"charges": charges, "reference": reference != "none"}
    kinds = tuple(kind for kind, is_wanted in wanted.items() if is_wanted)
    atoms_list = read_sources(structures)
    config = look_over(atoms_list, config)
    path = store or out.with_suffix(".db")
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = LabelStore(path)
    with (
        open_executor(DaskConfig(address=dask, model_workers=1)) as executor,
        label_bar() as progress,
    ):
        label_into_store(
            executor,
            atoms_list,
            config,
            labels,
            kinds=kinds,
            retry_failed=retry_failed,
            progress=progress,
        )
    keys = [structure_key(atoms) for atoms in atoms_list]
    stored = zip(atoms_list, labels.labelled_atoms(keys), strict=True)
    done = [relabelled(atoms, with_labels, kinds) for atoms, with_labels in stored]
    write_structures(out, done)
    print_census(labels.census())
    output.print(f"{len(done)} structures -> {out} (labels kept in {labels.path})")
    failures = labels.failures(keys)
    print_failures(failures)
    if failures:
        console.print("They are never trained on, and tried again with --retry-failed.")


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--arguments is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"--arguments must be a JSON object, got {text}")
    return value
