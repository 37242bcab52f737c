"""Train one model on one set within a time, and test it; the same call again goes on.

Both packages see the same structures, and their predictions are judged by the same code.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from common import Worker, machine, start
from datasets import DataSet, load_set
from models import Model, parse_model
from recipes import Recipe, mace_arguments, orbcalc_config
from rich.console import Console
from rich.table import Table

from orbcalc.config import dump_config
from orbcalc.files import read_json, write_json
from orbcalc.properties import (
    REF_ENERGY,
    REF_FORCES,
    XTB_BLOCKS,
    XTB_ENERGY,
    XTB_FORCES,
    XTB_METHOD,
    XTB_SHELLS,
)
from orbcalc.structures import structure_key

#: Steps of training that are timed to plan how many epochs the time allows.
MEASURED_STEPS = 8

console = Console(soft_wrap=True, highlight=False)


def main() -> None:
    """Read the command line, train and test."""
    options = _options()
    model, data = parse_model(options.model), load_set(options.data, options.set)
    if options.structures:
        data = data.trained_on(options.structures)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("train", "valid", "test"):
        _write_once(options.out / f"{name}.extxyz", [_bare(a) for a in getattr(data, name)])
    recipe = _recipe(options)
    if model.package == "orbcalc" and (recipe.charges or recipe.pool or recipe.above_xtb):
        for name in ("train", "valid") if recipe.above_xtb else ("train",):
            cache = options.out.parent / f"{data.name}_{name}_labels.extxyz"
            _add_charges(options.out / f"{name}.extxyz", cache)
    if options.pool:
        pool = [Atoms(a.numbers, a.positions) for a in ase.io.iread(options.pool, ":")]
        _write_once(options.out / "pool.extxyz", pool)
        _add_charges(options.out / "pool.extxyz", options.out.parent / f"{data.name}_pool.extxyz")
    plan = _plan(options, model, data)
    progress = _train(options, model, plan)
    result = {**plan, **_summary(progress), **_test(options, model)}
    write_json(options.out / "result.json", result, allow_nan=True)
    console.print(_table(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sets")
    parser.add_argument("--set", required=True, help="acac, 3bpa, mlearn-Cu, FILE.extxyz, ...")
    parser.add_argument("--model", required=True, help="orbcalc:medium, mace:128x0e, ...")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--minutes", type=float, required=True, help="of training in this call")
    parser.add_argument(
        "--epochs", type=int, help="of the whole training; default: what the minutes allow"
    )
    parser.add_argument("--structures", type=int, help="to train on, at random; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mace-python", type=Path, help="interpreter of MACE's environment")
    parser.add_argument(
        "--charges",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="orbcalc also learns GFN1-xTB orbital charges of the training structures",
    )
    parser.add_argument(
        "--pool",
        type=Path,
        help="structures for which orbcalc has GFN1-xTB labels only (see md_pool.py); "
        "their energies and forces are learned as a baseline",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of orbcalc's configuration (optimizer.batch_size=8) or an argument of MACE",
    )
    return parser.parse_args()


def _recipe(options: argparse.Namespace) -> Recipe:
    return Recipe(
        options.seed,
        options.device,
        options.charges,
        options.pool is not None,
        tuple(options.option),
    )


# -------------------------------------------------------------------------- structures
def _bare(atoms: Atoms) -> Atoms:
    """Return a structure with nothing but its labels; a box around a molecule means nothing."""
    cell = atoms.cell if atoms.pbc.any() else None
    bare = Atoms(atoms.numbers, atoms.positions, cell=cell, pbc=atoms.pbc)
    bare.info[REF_ENERGY] = atoms.info[REF_ENERGY]
    bare.arrays[REF_FORCES] = atoms.arrays[REF_FORCES]
    return bare


def _write_once(path: Path, structures: Sequence[Atoms]) -> None:
    if not path.exists():
        ase.io.write(path, structures, format="extxyz")


def _add_charges(path: Path, cache: Path) -> None:
    """Label structures with GFN1-xTB; labels are kept beside the run folder, for other runs."""
    structures = list(ase.io.iread(path, ":"))
    labelled = _by_key(cache)
    if not all(structure_key(atoms) in labelled for atoms in structures):
        command = "from orbcalc.cli import main; main()"
        arguments = ["label", str(path), "-o", str(cache.resolve()), "--reference", "none"]
        subprocess.run([sys.executable, "-c", command, *arguments], check=True)
        labelled = _by_key(cache)
    for atoms in structures:
        found = labelled[structure_key(atoms)]
        if XTB_BLOCKS in found.arrays:  # a failed label is missing
            for key in (XTB_BLOCKS, XTB_SHELLS, XTB_FORCES):
                atoms.arrays[key] = found.arrays[key]
            for key in (XTB_ENERGY, XTB_METHOD):
                atoms.info[key] = found.info[key]
    ase.io.write(path, structures, format="extxyz")


def _by_key(path: Path) -> dict[str, Atoms]:
    if not path.exists():
        return {}
    return {structure_key(atoms): atoms for atoms in ase.io.iread(path, ":")}


# ---------------------------------------------------------------------------- training
def _plan(options: argparse.Namespace, model: Model, data: DataSet) -> dict[str, Any]:
    """Decide on all settings, or read what the first call decided."""
    path = options.out / "plan.json"
    given = {
        "model": model.name,
        "set": data.name,
        "structures": {n: len(getattr(data, n)) for n in ("train", "valid", "test")},
        "seed": options.seed,
        "charges": options.charges and model.package == "orbcalc",
        "pool": str(options.pool) if options.pool else None,
        "device": options.device,
        "options": options.option,
    }
    if path.exists():
        plan = read_json(path)
        changed = [key for key, value in given.items() if plan[key] != value]
        if changed:
            raise SystemExit(f"{options.out} holds another training: {', '.join(changed)} differ")
        return plan
    epochs, measured = options.epochs, None
    if epochs is None:
        settings = _settings(options, model, data, epochs=100)
        with _worker(options, model) as worker:
            measured = worker.ask("measure", settings=settings, steps=MEASURED_STEPS)
        epochs = max(int(60 * options.minutes / measured), 1)
    plan = {
        **given,
        "split": data.split,
        "epochs_planned": epochs,
        "seconds_per_epoch_measured": measured,
        "settings": _settings(options, model, data, epochs),
    }
    write_json(path, plan)
    return plan


def _settings(
    options: argparse.Namespace, model: Model, data: DataSet, epochs: int
) -> str | list[str]:
    """Return what the worker is to train with; a copy for people is written beside it."""
    recipe = _recipe(options)
    if model.package == "orbcalc":
        config = orbcalc_config(model, data, recipe, epochs)
        (options.out / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        return "config.yaml"
    arguments = mace_arguments(model, data, recipe, epochs)
    command = " \\\n    ".join(shlex.quote(part) for part in ("mace_run_train", *arguments))
    (options.out / "command.sh").write_text(command + "\n", encoding="utf-8")
    return arguments


def _train(options: argparse.Namespace, model: Model, plan: dict[str, Any]) -> dict[str, Any]:
    """Train unless that is done; returns what all calls so far came to."""
    path = options.out / "progress.json"
    progress: dict[str, Any] = {"calls": [], "killed": 0}
    if path.exists():
        progress = read_json(path)
    if progress["calls"] and progress["calls"][-1]["complete"]:
        return progress
    # Should this call be killed, its time is lost; then the next one finds this count.
    write_json(path, {**progress, "killed": progress["killed"] + 1})
    console.print(
        f"training {model.name} on {plan['set']}: {plan['epochs_planned']} epochs in all, "
        f"{options.minutes:g} minutes at most; messages in {options.out / 'log.txt'}"
    )
    with _worker(options, model) as worker:
        call = worker.ask(
            "train",
            settings=plan["settings"],
            seconds=60 * options.minutes,
            path=_model_file(model),
        )
    progress["calls"].append({**call, "machine": machine(options.threads)})
    write_json(path, progress)
    return progress


def _worker(options: argparse.Namespace, model: Model) -> Worker:
    """Start a worker inside the run folder."""
    return start(
        model,
        options.mace_python,
        threads=options.threads,
        log=options.out / "log.txt",
        folder=options.out,
    )


def _model_file(model: Model) -> str:
    return "best.orbcalc" if model.package == "orbcalc" else "best.model"


def _summary(progress: dict[str, Any]) -> dict[str, Any]:
    calls = progress["calls"]
    seconds = sum(call["seconds"] for call in calls)
    epochs = sum(call["epochs"] for call in calls)
    return {
        "complete": calls[-1]["complete"],
        "calls": len(calls),
        "killed": progress["killed"],
        "seconds": seconds,
        "epochs": calls[-1]["at_epoch"],
        "seconds_per_epoch": seconds / epochs if epochs else None,
        "machine": calls[-1]["machine"],
    }


# -------------------------------------------------------------------------------- test
def _test(options: argparse.Namespace, model: Model) -> dict[str, Any]:
    """Predict the test set, in float64, and compare."""
    begin = time.monotonic()
    with _worker(options, model) as worker:
        facts = worker.ask("load", path=_model_file(model), dtype="float64", device=options.device)
        worker.ask("load_structures", path="test.extxyz")
        worker.ask("predict", path="predictions.extxyz")
        versions = worker.ask("describe")
    errors = test_errors(
        list(ase.io.iread(options.out / "test.extxyz", ":")),
        list(ase.io.iread(options.out / "predictions.extxyz", ":")),
    )
    return {
        "parameters": facts["parameters"],
        "versions": versions,
        "seconds_of_test": time.monotonic() - begin,
        "errors": errors,
    }


def test_errors(labelled: Sequence[Atoms], predicted: Sequence[Atoms]) -> dict[str, float]:
    """Return MAE and RMSE: energies in meV and meV/atom, force components in meV/Å."""
    pairs = list(zip(labelled, predicted, strict=True))
    energy = np.array([p.info["predicted_energy"] - a.info[REF_ENERGY] for a, p in pairs])
    n_atoms = np.array([len(atoms) for atoms in labelled])
    forces = np.concatenate(
        [(p.arrays["predicted_forces"] - a.arrays[REF_FORCES]).ravel() for a, p in pairs]
    )
    errors = {}
    for name, values in (
        ("energy_meV", energy),
        ("energy_meV_per_atom", energy / n_atoms),
        ("forces_meV_per_A", forces),
    ):
        errors[f"{name}_mae"] = float(1e3 * np.abs(values).mean())
        errors[f"{name}_rmse"] = float(1e3 * np.sqrt((values**2).mean()))
    return errors


def _table(result: dict[str, Any]) -> Table:
    ended = "complete" if result["complete"] else "not complete: the same call goes on"
    table = Table(
        title=f"{result['model']} on {result['set']}, {result['epochs']:.0f} epochs ({ended})"
    )
    for column in ("error", "MAE", "RMSE"):
        table.add_column(column, justify="right")
    for name, text in (
        ("energy_meV", "energy, meV"),
        ("energy_meV_per_atom", "energy, meV/atom"),
        ("forces_meV_per_A", "forces, meV/Å"),
    ):
        errors = (result["errors"][f"{name}_{kind}"] for kind in ("mae", "rmse"))
        table.add_row(text, *(f"{error:.3g}" for error in errors))
    return table


if __name__ == "__main__":
    main()
