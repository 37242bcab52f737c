"""Committees trained through an executor: on cheap labels, and on what is labelled so far."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from orbcalc.active.executor import Executor
from orbcalc.active.folder import RoundFiles, write_structures
from orbcalc.config import (
    PROCESS_LABELS,
    RunConfig,
    TrainConfig,
    dump_config,
    load_config,
)
from orbcalc.errors import ConfigError, OrbcalcError
from orbcalc.files import append_json, read_jsonl, replace_file, write_text
from orbcalc.labels.label import LabelStatus
from orbcalc.labels.store import LabelStore
from orbcalc.properties import REF_ENERGY, REF_FORCES, REF_METHOD, REF_STRESS
from orbcalc.structures import hold_out, is_lone_atom, structure_key

__all__ = ["check_features", "train_committee", "write_features_set", "write_training_set"]

logger = logging.getLogger(__name__)

#: Structures at most that the training of features is validated with.
_MOST_HELD_OUT = 500

#: What the metadata of a model tell of its training.
_COUNTS = ("n_train", "n_cheap", "n_valid", "n_left_out")

#: Configuration file, member, log, number of the round, device.
TrainTask = tuple[str, int, str, int, str]


def check_features(config: RunConfig, structures: Iterable[Atoms]) -> None:
    """Refuse a model that the features of a pool cannot begin with, before it has cheap labels.

    Raises
    ------
    CheckpointError
        If it cannot be read.
    ConfigError
        If it does not fit.
    """
    path = config.pool.features
    if path is None:
        return
    from orbcalc.model.checkpoint import load_model
    from orbcalc.training.initial import misfits

    committee, _ = load_model(path)
    training = _training_config(RoundFiles(path.parent), config, seed=0)
    potential = training.resolved(cheap_only=config.pool.charges).potential
    elements = {z for atoms in structures for z in atoms.numbers.tolist()}
    if reasons := misfits(committee.first, potential, elements):
        raise ConfigError(
            f"pool.features: {path} does not fit this run: {'; '.join(reasons)}. Leave it out to "
            f"learn features of the pool alone."
        )


def write_features_set(
    files: RoundFiles,
    pool: Mapping[str, Atoms],
    store: LabelStore,
    config: RunConfig,
    *,
    seed: int,
) -> bool:
    """Write what features are learned from, if a process is to be fitted on them.

    That is so where it is asked for; by default where energies alone are learned and begin few,
    and cheap labels are those of the whole pool, which nothing enlarges and no lone atom is in.
    A model whose features are trained on is copied beside it.

    Parameters
    ----------
    files
        Of the features.
    pool
        By structure key.
    store
        Of the labels.
    config
        Of the run.
    seed
        Of the training.

    Returns
    -------
    bool
        Whether they are to be learned.
    """
    is_fixed = config.pool.charges and config.pool.md is None
    options, most = config.selection, config.stop.max_labels or len(pool)
    n_first = min(options.initial, most, len(pool))
    is_few = (1 - options.valid_fraction) * n_first <= PROCESS_LABELS
    training = _training_config(files, config, seed).resolved(
        cheap_only=config.pool.charges,
        few_energies=is_fixed and is_few and not any(map(is_lone_atom, pool.values())),
    )
    if training.potential.energy_head != "process":
        return False
    known = set(store.keys("charges", LabelStatus.ok))
    cheap = store.labelled_atoms([key for key in pool if key in known])
    for atoms in cheap:  # of a store that had them
        for key in (REF_ENERGY, REF_FORCES, REF_STRESS, REF_METHOD):
            atoms.info.pop(key, None)
            atoms.arrays.pop(key, None)
    fraction = min(options.valid_fraction, _MOST_HELD_OUT / max(len(cheap), 1))
    held_out = _held_out(cheap, fraction)
    if not any(held_out):
        return False
    tasks = training.tasks.model_copy(update={"energy": 0.0})
    start = None
    if config.pool.features is not None:  # the run goes on with what it began with
        start = Path("start.orbcalc")
        files.folder.mkdir(parents=True, exist_ok=True)
        replace_file(files.folder / start, config.pool.features.read_bytes())
    training = training.model_copy(update={"tasks": tasks, "start_from": start})
    _write(files, cheap, held_out, training)
    return True


def write_training_set(
    files: RoundFiles,
    pool: Mapping[str, Atoms],
    store: LabelStore,
    config: RunConfig,
    *,
    seed: int,
    start_from: Path | None,
    features: Path,
) -> None:
    """Write what is labelled so far, divided if need be, with the configuration of its training.

    Parameters
    ----------
    files
        Of the round that the committee belongs to.
    pool
        By structure key.
    store
        Of the labels.
    config
        Of the run.
    seed
        Of the training.
    start_from
        Model whose weights to begin with.
    features
        Model, if it is there, on whose features a process is fitted while energies are few.

    Raises
    ------
    ConfigError
        If they are too few.
    """
    known = pool.keys() & store.keys("reference", LabelStatus.ok)
    with_charges = pool.keys() & store.keys("charges", LabelStatus.ok)
    if config.potential.baseline != "none":
        known &= with_charges  # of the others the difference is not known
    n_known = len(known) * (1 - config.selection.valid_fraction)
    training = _training_config(files, config, seed).resolved(
        cheap_only=config.pool.charges,
        few_energies=features.exists() and n_known <= PROCESS_LABELS,
    )
    head = training.potential.energy_head
    cheap = with_charges - known if config.pool.charges else set[str]()
    if features.exists() and head == "process":
        known = _covered(known, with_charges, pool)
        start_from, cheap = features, set()  # which have been learned from
    elif start_from is not None and _head_of(start_from) != head:
        start_from = None
    labelled, others = (
        store.labelled_atoms([key for key in pool if key in own]) for own in (known, cheap)
    )
    if start_from is not None:  # paths from its own folder, which may be copied or moved
        start_from = Path(os.path.relpath(start_from, files.folder))
        training = training.model_copy(update={"start_from": start_from})
    held_out = _held_out(labelled, config.selection.valid_fraction)
    if not any(held_out):
        raise ConfigError(
            f"{len(labelled)} labelled structure(s) are too few to train on: none can be held out "
            f"for validation. Look at the failed labels, or begin another run with a larger "
            f"selection.initial."
        )
    in_turn = training.model_copy(update={"valid": config.selection.valid_fraction})
    if in_turn.leaves_one_out:
        training, held_out = in_turn, [False for _ in labelled]
    _write(files, [*labelled, *others], [*held_out, *(False for _ in others)], training)


def _covered(known: set[str], learned: set[str], pool: Mapping[str, Atoms]) -> set[str]:
    """Leave out what has an element that no cheap label is of: features do not know it."""
    elements = {z for key in learned for z in pool[key].numbers.tolist()}
    covered = {key for key in known if elements.issuperset(pool[key].numbers.tolist())}
    if n_left := len(known) - len(covered):
        logger.warning(
            "%d labelled structures are not learned from, and such are not predicted: no cheap "
            "label is of all of their elements, and a process needs them. Choose "
            "potential.energy_head: network for them.",
            n_left,
        )
    return covered


def _head_of(model: Path) -> str | None:
    """Return the energy head that a round before was trained with."""
    return load_config(RoundFiles(model.parent).train, TrainConfig).potential.energy_head


def _training_config(files: RoundFiles, config: RunConfig, seed: int) -> TrainConfig:
    """Return the configuration of a training, with the names that `_write` gives its files."""
    return TrainConfig(
        train=(Path("train.extxyz"),),
        valid=(Path("valid.extxyz"),),
        output=Path(files.model.name),
        seed=seed,
        committee=config.committee,
        device=config.device,
        potential=config.potential,
        tasks=config.tasks,
        optimizer=config.optimizer,
    )


def _write(
    files: RoundFiles, structures: Sequence[Atoms], held_out: Sequence[bool], training: TrainConfig
) -> None:
    pairs = list(zip(structures, held_out, strict=True))
    for name, is_out in (("train.extxyz", False), ("valid.extxyz", True)):
        own = [atoms for atoms, out in pairs if out is is_out]
        if own:
            write_structures(files.folder / name, own)
    write_text(files.train, dump_config(training))


def train_committee(
    executor: Executor,
    config_file: Path,
    metrics: Path,
    number: int,
    device: str,
    report: Callable[[Mapping[str, Any]], None],
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
    report
        Receives what comes to the log.

    Returns
    -------
    dict
        Errors of the committee on the structures held out, or left out in turn, and ``n_train``,
        ``n_cheap``, ``n_valid`` and ``n_left_out``.

    Raises
    ------
    OrbcalcError
        If a member cannot be trained.
    """
    seen = len(read_jsonl(metrics))

    def pass_on() -> None:
        nonlocal seen
        records = read_jsonl(metrics)
        for record in records[seen:]:
            report(record)
        seen = len(records)

    path = str(config_file.absolute())
    tasks: list[TrainTask] = [
        (path, member, str(metrics.absolute()), number, device)
        for member in range(load_config(path, TrainConfig).committee)
    ]
    for task, outcome in executor.map(train_on_worker, tasks, "model", on_wait=pass_on):
        if isinstance(outcome, Exception):
            raise OrbcalcError(f"training of member {task[1]} failed: {outcome!r}") from outcome
    pass_on()
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
        **{name: metadata["training_set"][name] for name in _COUNTS},
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
    return [index in chosen for index in range(len(structures))]
