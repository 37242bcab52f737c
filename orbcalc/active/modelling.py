"""Committees through an executor: trained on what is labelled, asked about what is not."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ase import Atoms

from orbcalc.active.executor import Executor
from orbcalc.active.folder import RoundFiles, write_structures
from orbcalc.active.quantities import expected_error
from orbcalc.config import (
    PROCESS_LABELS,
    PotentialConfig,
    RunConfig,
    TrainConfig,
    dump_config,
    load_config,
)
from orbcalc.errors import ConfigError, MissingLabelError, OrbcalcError, StructureError
from orbcalc.files import append_json, write_text
from orbcalc.labels.store import LabelStore
from orbcalc.properties import XTB_ENERGY
from orbcalc.structures import hold_out, structure_key

__all__ = [
    "predict_pool", "predict_results", "train_committee", "with_baseline", "write_training_set",
]  # fmt: skip

#: Structures that a worker predicts in one task.
CHUNK = 256

T = TypeVar("T")
#: Configuration file, member, log, number of the round, device.
TrainTask = tuple[str, int, str, int, str]


# ---------------------------------------------------------------------------- training
def write_training_set(
    files: RoundFiles,
    labelled: Sequence[Atoms],
    cheap: Sequence[Atoms],
    config: RunConfig,
    *,
    seed: int,
    start_from: Path | None,
) -> None:
    """Divide labelled structures and write them with the configuration of their training.

    Parameters
    ----------
    files
        Of the round that the committee belongs to.
    labelled
        Structures with reference labels.
    cheap
        Structures with cheap labels only.
    config
        Of the run.
    seed
        Of the training.
    start_from
        Model whose weights to begin with.

    Raises
    ------
    ConfigError
        If they are too few.
    """
    held_out = _held_out(labelled, config.selection.valid_fraction)
    train_file, valid_file = files.folder / "train.extxyz", files.folder / "valid.extxyz"
    known = [atoms for atoms, out in zip(labelled, held_out, strict=True) if not out]
    valid = [atoms for atoms, out in zip(labelled, held_out, strict=True) if out]
    write_structures(train_file, [*known, *cheap])
    write_structures(valid_file, valid)
    training = TrainConfig(  # with paths from its own folder, which may be copied or moved
        train=(Path(train_file.name),),
        valid=(Path(valid_file.name),),
        output=Path(files.model.name),
        seed=seed,
        committee=config.committee,
        device=config.device,
        potential=config.potential,
        tasks=config.tasks,
        optimizer=config.optimizer,
        start_from=start_from and Path(os.path.relpath(start_from, files.folder)),
    ).resolved(  # in all rounds alike, as long as labels are few, so that they go on training
        cheap_only=config.pool.charges,
        few_energies=config.pool.md is None
        and len(known) <= PROCESS_LABELS
        and all(len(atoms) > 1 or atoms.pbc.any() for atoms in known)
        and any(XTB_ENERGY in atoms.info for atoms in valid),
    )
    write_text(files.train, dump_config(training))


def train_committee(
    executor: Executor,
    config_file: Path,
    metrics: Path,
    number: int,
    device: str,
    on_wait: Callable[[], None],
) -> dict[str, Any]:
    """Train the members on the model workers, then join them.

    Parameters
    ----------
    executor
        Its model workers are used.
    config_file
        Configuration of the training.
    metrics
        Log that the members append to.
    number
        Of the round, noted with the metrics.
    device
        Where the members are trained; that of the file is not used.
    on_wait
        Called while the members are trained.

    Returns
    -------
    dict
        Errors of the committee on the structures held out, ``n_train``, ``n_cheap`` and
        ``n_valid``.

    Raises
    ------
    OrbcalcError
        If a member cannot be trained.
    """
    path = str(config_file.absolute())
    tasks: list[TrainTask] = [
        (path, member, str(metrics.absolute()), number, device)
        for member in range(load_config(path, TrainConfig).committee)
    ]
    for task, outcome in executor.map(train_on_worker, tasks, "model", on_wait=on_wait):
        if isinstance(outcome, Exception):
            raise OrbcalcError(f"training of member {task[1]} failed: {outcome!r}") from outcome
    ((_, joined),) = executor.map(finish_on_worker, [(path, device)], "model")
    if isinstance(joined, Exception):
        raise OrbcalcError(f"the committee could not be made: {joined!r}") from joined
    found: dict[str, Any] = joined
    return found


def train_on_worker(task: TrainTask) -> str:
    """Train one member on a model worker."""
    from orbcalc.training.run import train_member

    config_path, member, metrics, number, device = task
    path = train_member(
        _training(config_path, device),
        member,
        report=lambda record: append_json(Path(metrics), {"round": number, **record}),
    )
    return str(path)


def finish_on_worker(task: tuple[str, str]) -> dict[str, Any]:
    """Join the members of a committee on a model worker."""
    from orbcalc.model.checkpoint import load_model
    from orbcalc.training.run import finish_training

    config = _training(*task)
    if not config.output.exists():  # else the worker died after it had written the model
        finish_training(config)
    _, metadata = load_model(config.output)
    found: dict[str, Any] = {
        "errors": metadata["valid_errors"],
        **{name: metadata["training_set"][name] for name in ("n_train", "n_cheap", "n_valid")},
    }
    return found


def _training(config_path: str, device: str) -> TrainConfig:
    """Read the configuration of a training whose model comes beside it."""
    config = load_config(config_path, TrainConfig)
    output = Path(config_path).with_name(config.output.name)
    return config.model_copy(update={"output": output, "device": device})


def _held_out(structures: Sequence[Atoms], fraction: float) -> list[bool]:
    """Choose validation structures by their content hash, so that the choice rarely changes."""
    scores = [int(structure_key(atoms)[-12:], 16) / 16**12 for atoms in structures]
    size = sum(score < fraction for score in scores)
    order = np.argsort(scores).tolist()
    chosen = set(hold_out(structures, order, min(max(size, 1), max(len(structures) // 2, 1))))
    if not chosen:
        raise ConfigError(
            f"{len(structures)} labelled structure(s) are too few to train on: none can be held "
            f"out for validation. Look at the failed labels, or begin another run with a larger "
            f"selection.initial."
        )
    return [index in chosen for index in range(len(structures))]


# -------------------------------------------------------------------------- prediction
def with_baseline(
    potential: PotentialConfig, store: LabelStore, structures: Mapping[str, Atoms]
) -> list[Atoms]:
    """Return structures, by structure key, as predictions need them.

    Above a computed baseline they carry its labels of the store; one whose label failed carries
    none, and cannot be predicted.
    """
    if potential.baseline == "none":
        return list(structures.values())
    return store.labelled_atoms(structures)


def predict_pool(
    executor: Executor,
    model: Path,
    structures: Sequence[Atoms],
    device: str,
    *,
    quantity: str = "energy_per_atom",
    forces: bool = False,
) -> list[dict[str, Any]]:
    """Predict energy, its uncertainty per atom, features, and forces if asked for.

    Returns
    -------
    list of dict
        Empty for a structure that cannot be predicted. ``score`` is the expected error of the
        quantity, see `quantities.expected_error`.

    Raises
    ------
    OrbcalcError
        If the model cannot predict at all.
    """
    return _in_chunks(executor, partial(predict_chunk, model, device, quantity, forces), structures)


def predict_results(
    executor: Executor, model: Path, structures: Sequence[Atoms], device: str
) -> list[dict[str, Any] | str]:
    """Predict what a calculator would hold: energy, forces, stress in a volume, uncertainties.

    There is no stress above a computed baseline, whose labels hold none.

    Returns
    -------
    list of dict or str
        As :func:`orbcalc.predict`; for a structure that cannot be predicted, why.

    Raises
    ------
    OrbcalcError
        If the model cannot predict at all.
    """
    return _in_chunks(executor, partial(predict_results_chunk, model, device), structures)


def _in_chunks(
    executor: Executor, function: Callable[[list[Atoms]], list[T]], structures: Sequence[Atoms]
) -> list[T]:
    """Call a function with some structures at a time, on the model workers."""
    chunks = [
        (start, list(structures[start : start + CHUNK]))
        for start in range(0, len(structures), CHUNK)
    ]
    found: dict[int, list[T]] = {}
    for (start, _), outcome in executor.map(partial(_on_chunk, function), chunks, "model"):
        if isinstance(outcome, Exception):
            raise OrbcalcError(f"prediction failed: {outcome!r}") from outcome
        found[start] = outcome
    return [item for start in sorted(found) for item in found[start]]


def _on_chunk(function: Callable[[list[Atoms]], T], chunk: tuple[int, list[Atoms]]) -> T:
    return function(chunk[1])


def predict_results_chunk(
    model: Path, device: str, structures: list[Atoms]
) -> list[dict[str, Any] | str]:
    """Predict some structures on a model worker."""
    from orbcalc.calculator import open_model, predict

    committee, _ = open_model(model, device=device)

    def or_why_not(atoms: Atoms, result: dict[str, Any]) -> dict[str, Any] | str:
        if not result:
            try:
                (result,) = predict(committee, [atoms], baseline="labels")
            except (StructureError, MissingLabelError) as error:
                return str(error)
        bad = [name for name, value in result.items() if not np.isfinite(value).all()]
        return f"not finite: {', '.join(bad)}" if bad else result

    results = predict(committee, structures, on_error="skip", baseline="labels")
    return [or_why_not(*pair) for pair in zip(structures, results, strict=True)]


def predict_chunk(
    model: Path, device: str, quantity: str, forces: bool, structures: list[Atoms]
) -> list[dict[str, Any]]:
    """Predict some structures on a model worker."""
    from orbcalc.calculator import predict

    more = ("forces",) if forces else ()
    scored = ("forces_uncertainty",) if quantity == "forces" else ()
    results = predict(
        model,
        structures,
        ("energy", "features", *scored, *more),
        device=device,
        on_error="skip",
        baseline="labels",
    )
    return [
        {
            "energy": result["energy"],
            "uncertainty": result["energy_uncertainty"] / len(atoms),
            "features": result["features"],
            "score": expected_error(quantity, result, len(atoms)),
            **{name: result[name] for name in more},
        }
        if result
        else {}
        for atoms, result in zip(structures, results, strict=True)
    ]
