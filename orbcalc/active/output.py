"""The output of a run: what is known of every structure of its pool, in one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ase import Atoms

from orbcalc.active.certificate import Certificate
from orbcalc.active.executor import Executor
from orbcalc.active.folder import RunFolder, write_structures
from orbcalc.active.prediction import predict_results, with_baseline
from orbcalc.config import RunConfig
from orbcalc.errors import CheckpointError
from orbcalc.files import file_sha256
from orbcalc.labels.label import LabelStatus
from orbcalc.labels.store import STRUCTURE_KEY, LabelStore
from orbcalc.properties import (
    POOL_CERTIFIED,
    POOL_FAILURE,
    POOL_MODEL,
    POOL_SOURCE,
    REF_ENERGY,
    REF_FORCES,
    REF_METHOD,
    REF_STRESS,
)
from orbcalc.results import with_results
from orbcalc.structures import structure_key

__all__ = ["Source", "write_output"]

#: Value of ``info["orbcalc_source"]``.
Source = Literal["reference", "prediction", "failed"]

_LABELS = {"energy": REF_ENERGY, "forces": REF_FORCES, "stress": REF_STRESS}
#: What a file may hold from elsewhere, an earlier run for example, and must not be taken for ours.
_REPLACED = {*_LABELS.values(), REF_METHOD}
_REPLACED |= {POOL_SOURCE, POOL_CERTIFIED, POOL_MODEL, POOL_FAILURE}


class _Answer(NamedTuple):
    """What is known of a structure."""

    source: Source
    results: Mapping[str, Any]
    info: Mapping[str, Any]


def write_output(
    executor: Executor,
    folder: RunFolder,
    store: LabelStore,
    certificate: Certificate,
    config: RunConfig,
) -> dict[Source, int]:
    """Write the whole pool: its labels, and predictions of the released model for the others.

    Structures come in the order of the pool's files, duplicates included; those that MD found
    follow. Their ``info`` and ``arrays`` are kept, except labels (``REF_...``) that the run did
    not make. ``info["orbcalc_source"]`` is one of

    ``reference``
        A label: ``REF_energy``, ``REF_forces``, ``REF_stress``, as far as they were asked for.
    ``prediction``
        Energy, forces, stress (in a volume) and uncertainties of the model whose SHA-256 begins
        with ``info["orbcalc_model"]``; ``info["orbcalc_certified"]`` tells whether the pool's
        certificate was granted.
    ``failed``
        Neither. ``info["orbcalc_failure"]`` says why; the certificate counts it as wrong.

    Labels and predictions are also the results of a calculator of each structure.

    Parameters
    ----------
    executor
        Its model workers predict.
    folder, store
        Of the run; the model is released already.
    certificate
        The run's end, granted or not.
    config
        Of the run.

    Returns
    -------
    dict
        Number of structures in the file by source.

    Raises
    ------
    CheckpointError
        If the released model is not the one of the certificate.
    OrbcalcError
        If it cannot predict at all.
    """
    model_hash = file_sha256(folder.model)
    if not model_hash.startswith(certificate.model_hash):
        raise CheckpointError(
            f"{folder.model} is not the model of {folder.certificate}: its SHA-256 begins with "
            f"{model_hash[:16]}, not with {certificate.model_hash}. Restore it: the models of "
            f"all rounds are in {folder.path / 'rounds'}."
        )
    pool = folder.arrivals(certificate.looks[-1].look + 1)
    keys = [structure_key(atoms) for atoms in pool]
    answers = _labels(store, set(keys))
    rest = {key: a for key, a in zip(keys, pool, strict=True) if key not in answers}
    structures = with_baseline(config, store, rest)
    found = predict_results(executor, folder.model.absolute(), structures, config.device)
    told = {POOL_CERTIFIED: certificate.certified, POOL_MODEL: f"sha256:{certificate.model_hash}"}
    for key, result in zip(rest, found, strict=True):
        if isinstance(result, str):
            answers[key] = _failed(f"it cannot be predicted: {result}")
        else:
            answers[key] = _Answer("prediction", result, told)
    done = [_answered(atoms, answers[key]) for key, atoms in zip(keys, pool, strict=True)]
    write_structures(folder.results, done)
    counts = Counter(answers[key].source for key in keys)
    return {"reference": 0, "prediction": 0, "failed": 0, **counts}


def _labels(store: LabelStore, keys: set[str]) -> dict[str, _Answer]:
    """Return what the reference method said of those structures that it was asked about."""
    answers: dict[str, _Answer] = {}
    ok = [key for key in store.keys("reference", LabelStatus.ok) if key in keys]
    for atoms in store.labelled_atoms(ok):
        entries = {**atoms.info, **atoms.arrays}
        values = {name: entries[key] for name, key in _LABELS.items() if key in entries}
        method = {REF_METHOD: atoms.info[REF_METHOD]}
        answers[atoms.info[STRUCTURE_KEY]] = _Answer("reference", values, method)
    for key in store.keys("reference"):
        if key in keys and key not in answers:
            label = store.get(key, "reference")
            assert label is not None
            answers[key] = _failed(f"its label is {label.status}: {label.message}")
    return answers


def _failed(reason: str) -> _Answer:
    # Messages of programs have many lines; in a comment line of extxyz a backslash escapes.
    return _Answer("failed", {}, {POOL_FAILURE: " ".join(reason.replace("\\", "/").split())})


def _answered(atoms: Atoms, answer: _Answer) -> Atoms:
    """Return a structure of the pool with what is known of it."""
    done = with_results(atoms, answer.results)
    for name in _REPLACED:
        done.info.pop(name, None)
        done.arrays.pop(name, None)
    if answer.source == "reference":
        for name, value in answer.results.items():
            place: dict[str, Any] = done.arrays if name == "forces" else done.info
            place[_LABELS[name]] = value
    done.info |= {POOL_SOURCE: answer.source, **answer.info}
    return done
