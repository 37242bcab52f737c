"""`orbcalc train`: from a configuration to a model file, in steps that can be distributed.

The steps are plain functions of the configuration and the files beside its output, so the
members of a committee can be trained one after another here, or each in a task elsewhere, and
any of them can be repeated after a kill.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms

from orbcalc.config import PROCESS_LABELS, REFERENCE_TASKS, TrainConfig
from orbcalc.errors import CheckpointError, ConfigError, LabelConflictError
from orbcalc.files import (
    Fingerprints,
    changed_files,
    fingerprints,
    read_json,
    replace_file,
    write_json,
)
from orbcalc.labels.reference import contradiction
from orbcalc.labels.sources import read_sources
from orbcalc.model.checkpoint import load_model, save_model
from orbcalc.model.committee import Committee
from orbcalc.properties import (
    REF_ENERGY,
    REF_FORCES,
    REF_METHOD,
    REF_STRESS,
    XTB_BLOCKS,
    XTB_ENERGY,
    XTB_FORCES,
    XTB_METHOD,
    XTB_SHELLS,
)
from orbcalc.structures import charge_and_multiplicity, hold_out, is_lone_atom, structure_key
from orbcalc.training.calibration import calibrate
from orbcalc.training.dataset import LabelDataset, on_device
from orbcalc.training.initial import initial_potential
from orbcalc.training.loss import ErrorSums, active_properties
from orbcalc.training.process import left_out
from orbcalc.training.trainer import Trainer, resolve_device

__all__ = [
    "finish_training",
    "load_labelled",
    "model_errors",
    "prepared",
    "read_labelled",
    "split",
    "train",
    "train_member",
]

logger = logging.getLogger(__name__)

#: Beside the members: fingerprints of the files that they are trained on.
_INPUTS = "inputs.json"

_REFERENCE_KEYS = frozenset({REF_ENERGY, REF_FORCES, REF_STRESS})
_CHEAP_KEYS = frozenset({XTB_ENERGY, XTB_FORCES, XTB_BLOCKS, XTB_SHELLS})

MemberReport = Callable[[Mapping[str, Any]], None]


class LabelledSets(NamedTuple):
    """What a configuration trains on, and the content of the files that it comes from."""

    train: list[Atoms]
    valid: list[Atoms]
    """Held out; none if each of `train` is left out in turn."""
    files: Fingerprints


def train(config: TrainConfig, report: MemberReport | None = None) -> Committee:
    """Train a potential or a committee and write the model file.

    A run that was killed goes on where its state was last saved.

    Parameters
    ----------
    config
        See `TrainConfig`.
    report
        Called at every validation with member, step, steps and errors.

    Returns
    -------
    Committee
        The calibrated model, as written to ``config.output``.

    Raises
    ------
    MissingLabelError
        If a task with weight has no labels.
    LabelConflictError
        If labels of different methods or versions are mixed.
    CheckpointError
        If the unfinished training was of another configuration, or of files that have changed.
    """
    sets = _read_sets(config)
    for member in range(config.committee):
        train_member(config, member, report, sets=sets)
    return finish_training(config, sets=sets)


def train_member(
    config: TrainConfig,
    member: int,
    report: MemberReport | None = None,
    *,
    sets: LabelledSets | None = None,
) -> Path:
    """Train one member to its end; returns the file that holds it.

    Raises
    ------
    CheckpointError
        If another configuration, or other content of its files, was begun to be trained here.
    """
    finished = _member_path(config, member)
    finished.parent.mkdir(parents=True, exist_ok=True)
    _refuse_other_run(config, finished.parent)
    if finished.exists():
        return finished
    config, sets, train_set, valid_set = prepared(config, sets)
    seed = int(np.random.SeedSequence([config.seed, member]).generate_state(1)[0])
    state_path = finished.with_suffix(".state")
    trainer = Trainer(
        train_set,
        valid_set,
        config,
        seed=seed,
        state_path=state_path,
        report=None if report is None else lambda record: report({"member": member, **record}),
    )
    inputs = finished.with_name(_INPUTS)
    if not inputs.exists():  # not before it is known that they can be trained on
        write_json(inputs, sets.files)
    method = _methods(sets.train).get("reference")
    potential = trainer.fit(lambda: initial_potential(config, member, seed, train_set, method))
    save_model(finished, Committee([potential]))
    state_path.unlink(missing_ok=True)
    return finished


def finish_training(
    config: TrainConfig,
    metadata: Mapping[str, Any] | None = None,
    *,
    sets: LabelledSets | None = None,
) -> Committee:
    """Join the trained members, calibrate them, and write the model file."""
    device, dtype = resolve_device(config.device), getattr(torch, config.dtype)
    members = []
    for number in range(config.committee):
        member, _ = load_model(_member_path(config, number), device=device, dtype=dtype)
        members.append(member.first)
    config, sets, train_set, valid_set = prepared(config, sets)
    in_turn = valid_set is None
    judged = left_out(members[0], train_set) if valid_set is None else valid_set
    committee = calibrate(Committee(members), train_set, judged, in_turn=in_turn)
    labelled = train_set.labelled(REFERENCE_TASKS)
    save_model(
        config.output,
        committee,
        {
            "config": config.model_dump(mode="json"),
            "labels": _methods(sets.train + sets.valid),
            "training_set": {
                "sha256": _content_hash(sets.train),
                "n_train": len(labelled),
                "n_cheap": len(train_set) - len(labelled),
                "n_valid": len(sets.valid),
                "n_left_out": len(labelled) if in_turn else 0,
                "electrons": sorted({charge_and_multiplicity(sets.train[i]) for i in labelled}),
            },
            "valid_errors": model_errors(committee, judged, active_properties(config.tasks)),
            **(metadata or {}),
        },
    )
    shutil.rmtree(_member_path(config, 0).parent, ignore_errors=True)
    return committee


def prepared(
    config: TrainConfig, sets: LabelledSets | None = None
) -> tuple[TrainConfig, LabelledSets, LabelDataset, LabelDataset | None]:
    """Return what a training begins with: its settings in full, its structures and data sets.

    Nothing need be held out of a process on known features, which can leave out each structure in
    turn: there is no validation set, unless one is given.

    Raises
    ------
    LabelConflictError
        If labels of different methods or versions are mixed.
    ConfigError
        If there are too few structures to hold some out.
    """
    sets = sets or _read_sets(config)
    config = _resolved(config, sets)
    if config.leaves_one_out:
        sets = sets._replace(train=[*sets.train, *sets.valid], valid=[])
    terms = (config.potential.cutoff, config.potential.baseline)
    train_set = LabelDataset(sets.train, *terms)
    return config, sets, train_set, LabelDataset(sets.valid, *terms) if sets.valid else None


def model_errors(
    committee: Committee,
    dataset: LabelDataset,
    properties: list[str],
    *,
    shares: bool = False,
) -> dict[str, float]:
    """Return MAE and RMSE of a committee's mean: eV/atom, eV/Å, eV/Å³, e; see `ErrorSums`."""
    sums = ErrorSums(shares=shares)
    for graph, targets in on_device(dataset, committee.first):
        sums.add(committee.first, committee(graph, properties), graph, targets)
    return sums.result()


def read_labelled(paths: tuple[Path, ...]) -> list[Atoms]:
    """Read labelled structures from files and label stores.

    Raises
    ------
    LabelConflictError
        If their labels come from different methods, versions or settings.
    """
    found = read_sources(paths)
    _methods(found)
    return found


def load_labelled(paths: tuple[Path, ...]) -> list[Atoms]:
    """Read labelled structures without duplicates; see `read_labelled`.

    Of a duplicate, the kind of label is kept that the first one lacks; a warning tells of labels
    that contradict each other.

    Raises
    ------
    LabelConflictError
        If their labels come from different methods, versions or settings.
    """
    structures: dict[str, Atoms] = {}
    contradicted: list[str] = []
    for atoms in read_sources(paths):
        known = structures.setdefault(structure_key(atoms), atoms)
        if known is not atoms:
            if (name := contradiction(known, atoms)) is not None:
                contradicted.append(f"{known.get_chemical_formula()} (another {name})")
            _add_labels(known, atoms)
    if contradicted:
        logger.warning(
            "%d structures, %s the first, are there again with other labels: the first are taken",
            len(contradicted),
            contradicted[0],
        )
    result = list(structures.values())
    _methods(result)
    return result


def split(structures: list[Atoms], fraction: float, seed: int) -> tuple[list[Atoms], list[Atoms]]:
    """Hold out a random share, at least one, of the structures that have a reference label."""
    labelled = [i for i, atoms in enumerate(structures) if _has_reference(atoms)]
    candidates = labelled or list(range(len(structures)))
    n_valid = max(1, round(fraction * len(candidates)))
    order = np.random.default_rng(seed).permutation(len(candidates))
    chosen = hold_out([structures[i] for i in candidates], order.tolist(), n_valid)
    held_out = {candidates[i] for i in chosen}
    if not held_out or len(held_out) == len(candidates):
        raise ConfigError(
            f"{len(candidates)} labelled structures are too few to hold out {fraction:.0%} for "
            f"validation and to train on the others. Give more structures, or `valid`."
        )
    train_set = [atoms for i, atoms in enumerate(structures) if i not in held_out]
    return train_set, [structures[i] for i in sorted(held_out)]


def _has_reference(atoms: Atoms) -> bool:
    """Tell whether any reference label is there; NaN is none."""
    found = {**atoms.info, **atoms.arrays}
    return any(_has_number(found[key]) for key in _REFERENCE_KEYS & found.keys())


def _carries(atoms: Atoms, key: str) -> bool:
    return key in atoms.info and _has_number(atoms.info[key])


def _has_number(label: Any) -> bool:
    try:
        return bool(np.isfinite(np.array(label, dtype=float)).any())
    except (TypeError, ValueError):
        return label is not None  # what is wrong with it is told when it is read


def _add_labels(atoms: Atoms, duplicate: Atoms) -> None:
    """Add labels that only a duplicate has; whole kinds, so that no two methods are mixed."""
    for keys in ({*_REFERENCE_KEYS, REF_METHOD}, {*_CHEAP_KEYS, XTB_METHOD}):
        if keys.isdisjoint({*atoms.info, *atoms.arrays}):
            atoms.info |= {key: value for key, value in duplicate.info.items() if key in keys}
            atoms.arrays |= {key: value for key, value in duplicate.arrays.items() if key in keys}


def _read_sets(config: TrainConfig) -> LabelledSets:
    files = fingerprints(config.files)  # before they are read: whatever changes later has changed
    structures = load_labelled(config.train)
    if isinstance(config.valid, float):
        return LabelledSets(*split(structures, config.valid, config.seed), files)
    valid = load_labelled(config.valid)
    _methods(structures + valid)
    return LabelledSets(_without(structures, valid), valid, files)


def _without(structures: list[Atoms], valid: list[Atoms]) -> list[Atoms]:
    """Leave out what is validated on: errors of structures that are trained on tell nothing.

    Raises
    ------
    ConfigError
        If nothing is left.
    """
    held_out = {structure_key(atoms) for atoms in valid}
    left = [atoms for atoms in structures if structure_key(atoms) not in held_out]
    if not left:
        raise ConfigError(
            "every structure of `train` is in `valid` too: nothing is left to train on. Give other "
            "structures, or a fraction to hold out, as `valid: 0.1`."
        )
    if len(left) < len(structures):
        logger.warning(
            "%d structures of `train` are in `valid` too: they are not trained on",
            len(structures) - len(left),
        )
    return left


def _resolved(config: TrainConfig, sets: LabelledSets) -> TrainConfig:
    """Decide what the configuration leaves to the structures."""
    told = [atoms for atoms in sets.train if _carries(atoms, REF_ENERGY)]
    n_cheap = sum(_carries(atoms, XTB_ENERGY) and not _has_reference(atoms) for atoms in sets.train)
    few_energies = (
        0 < len(told) <= min(PROCESS_LABELS, n_cheap)
        and not any(map(is_lone_atom, told))
        and any(_carries(atoms, XTB_ENERGY) for atoms in sets.valid)
    )
    is_open = config.potential.energy_head is None  # else the model need not be read for it
    has_features = is_open and _has_features(config.start_from)
    return config.resolved(
        cheap_only=n_cheap > 0 or has_features, few_energies=few_energies or has_features
    )


def _has_features(model: Path | None) -> bool:
    """Tell whether a process can be fitted on the features of a model to start from."""
    return model is not None and load_model(model)[0].first.n_inducing > 0


def _member_path(config: TrainConfig, member: int) -> Path:
    folder = config.output.with_name(f"{config.output.name}.training")
    return folder / f"member_{member}.orbcalc"


def _refuse_other_run(config: TrainConfig, folder: Path) -> None:
    """Write down what is trained here, and refuse to go on with something else."""
    path, inputs, text = folder / "config.json", folder / _INPUTS, _portable(config, folder)
    if not any(folder.glob("member_*")):  # nothing was done that another one could spoil
        inputs.unlink(missing_ok=True)
    elif path.exists() and path.read_bytes() != text.encode():
        raise CheckpointError(
            f"{folder} holds an unfinished training of another configuration. "
            f"Restore that configuration to go on, or delete the folder."
        )
    known = read_json(inputs) if inputs.exists() else {}
    changed = changed_files(config.files, known)
    if changed:
        raise CheckpointError(
            f"{changed[0]} has changed since the unfinished training in {folder} read it. "
            f"Restore that file to go on, or delete the folder."
        )
    replace_file(path, text)  # members in other processes read it too


def _portable(config: TrainConfig, folder: Path) -> str:
    """Return what decides a training, as text that stays when folders are moved together."""

    def relative(value: Any) -> Any:
        if isinstance(value, tuple):
            return [relative(item) for item in value]
        return os.path.relpath(value, folder) if isinstance(value, Path) else value

    tree = config.model_dump(exclude={"device"})
    return json.dumps({name: relative(value) for name, value in tree.items()})


def _methods(structures: list[Atoms]) -> dict[str, str]:
    """Return the method behind each kind of label, and refuse a mixture."""
    methods = {}
    for kind, key in (("reference", REF_METHOD), ("charges", XTB_METHOD)):
        found = sorted({str(a.info[key]) for a in structures if key in a.info})
        if len(found) > 1:
            raise LabelConflictError(
                f"{kind} labels of different methods cannot be trained on together: "
                f"{'; '.join(found)}. Label all structures with one of them."
            )
        if found:
            methods[kind] = found[0]
    return methods


def _content_hash(structures: list[Atoms]) -> str:
    digest = hashlib.sha256()
    for atoms in structures:
        label = [structure_key(atoms), atoms.info.get(REF_ENERGY)]
        digest.update(json.dumps(label, default=float).encode())
    return digest.hexdigest()
