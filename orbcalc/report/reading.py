"""From the files of a run folder to facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from jaxtyping import Float

from orbcalc.active.certificate import Certificate
from orbcalc.active.folder import RoundFiles, RunFolder
from orbcalc.config import RunConfig, load_config
from orbcalc.errors import ConfigError, OrbcalcError
from orbcalc.files import read_json, read_jsonl
from orbcalc.labels.label import LabelStatus
from orbcalc.labels.store import STRUCTURE_KEY, LabelStore
from orbcalc.model.checkpoint import load_model
from orbcalc.prediction import predict
from orbcalc.properties import REF_ENERGY, REF_FORCES
from orbcalc.report.facts import Comparison, ForceComparison, LookFacts, RoundFacts, RunFacts
from orbcalc.structures import read_structures

__all__ = ["read_run"]

#: Forces are predicted for at most so many structures: a page should take seconds, not hours.
MAX_FORCE_STRUCTURES = 400


def read_run(path: str | Path) -> RunFacts:
    """Read a run folder, finished or not.

    Raises
    ------
    ConfigError
        If it is no run folder, or its certificate contradicts itself.
    LabelError
        If its label store cannot be read.
    """
    folder = RunFolder(path)
    if not folder.config_file.is_file():
        raise ConfigError(
            f"{folder.path} is no run folder: it has no {folder.config_file.name}. "
            f"Give the folder that `orbcalc run` wrote into (`output` in its configuration)."
        )
    config = load_config(folder.config_file, RunConfig)
    store = LabelStore(folder.labels, create=False) if folder.labels.is_file() else None
    certificate = _certificate(folder)
    events = tuple(read_jsonl(folder.events))
    looks = tuple(vars(look) for look in certificate.looks) if certificate else ()
    rounds = _rounds(folder, _Sources(config, _Labels(store, config), looks, events))
    forces, problem = _forces(folder, rounds, store)
    return RunFacts(
        folder=folder,
        config=config,
        rounds=tuple(rounds),
        certificate=certificate,
        events=events,
        metrics=tuple(read_jsonl(folder.metrics)),
        census={kind: counts for kind, counts in store.census().items()} if store else {},
        provenance=_provenance(store),
        forces=forces,
        forces_problem=problem,
        model=_model_facts(folder, rounds),
    )


# ------------------------------------------------------------------------------- rounds
@dataclass(frozen=True)
class _Sources:
    """What the facts of a round are gathered from, beside its own files."""

    config: RunConfig
    labels: _Labels
    looks: tuple[Mapping[str, Any], ...]
    """Of the certificate."""
    events: tuple[dict[str, Any], ...]


def _rounds(folder: RunFolder, sources: _Sources) -> list[RoundFacts]:
    rounds: list[RoundFacts] = []
    earlier: list[str] = []
    n_pool = 0
    while (files := folder.round(len(rounds))).pool.is_file():
        if (event := _last(sources.events, "pool", len(rounds))) is not None:
            n_pool = event["pool"]
        facts = _round(files, len(rounds), n_pool, earlier, sources)
        rounds.append(facts)
        earlier += [*facts.audit, *facts.batch]
    return rounds


def _round(
    files: RoundFiles, number: int, n_pool: int, earlier: Sequence[str], sources: _Sources
) -> RoundFacts:
    selection = read_json(files.selection) if files.selection.is_file() else {}
    labels, predictions = sources.labels, selection.get("predictions", {})
    look, by_audit = _look(files, number, sources), sources.config.certificate.by_audit
    audit, batch = (tuple(selection.get(name, ())) for name in ("audit", "batch"))
    # Of those drawn, what was labelled before the look was decided; the others are open again.
    n_audit = sum(labels.status(key) is not None for key in audit) if look is None else look.n_audit
    audit, sample = audit[:n_audit], audit[:n_audit] if by_audit else batch
    return RoundFacts(
        number=number,
        n_pool=n_pool,
        n_known=sum(labels.status(key) == LabelStatus.ok for key in earlier),
        audit=audit,
        batch=batch,
        statuses={"audit": labels.count(audit), "batch": labels.count(batch)},
        audited=None if look is None else labels.compare(sample, predictions),
        acquired=labels.compare(batch, predictions) if by_audit else None,
        look=look,
        valid_errors=_valid_errors(files, number, sources.events),
        finished=files.summary.is_file(),
    )


class _Labels:
    """Reference labels by key, read from the store in one go."""

    def __init__(self, store: LabelStore | None, config: RunConfig) -> None:
        self._store = store
        self._totals = config.certificate.quantity == "energy"
        known = store.keys("reference", LabelStatus.ok) if store else []
        atoms_list = store.labelled_atoms(known) if store else []
        self._atoms: dict[str, Atoms] = {a.info[STRUCTURE_KEY]: a for a in atoms_list}
        self._zero = _ElementFit(atoms_list)

    def status(self, key: str) -> LabelStatus | None:
        return self._store.status(key, "reference") if self._store else None

    def count(self, keys: Sequence[str]) -> Counter[str]:
        return Counter(str(self.status(key) or "waiting") for key in keys)

    def compare(self, keys: Sequence[str], predictions: Mapping[str, Any]) -> Comparison | None:
        """Compare predictions with labels; None while a label is waited for, or without any."""
        if not predictions or not keys or any(self.status(key) is None for key in keys):
            return None
        rows = [self._row(key, predictions.get(key)) for key in keys]
        predicted, reference, uncertainty = np.array(rows, dtype=float).T
        return Comparison(predicted, reference, uncertainty)

    def _row(self, key: str, prediction: Mapping[str, float] | None) -> tuple[float, float, float]:
        atoms = self._atoms.get(key)
        if atoms is None or prediction is None:
            return np.nan, np.nan, np.nan
        zero = self._zero(atoms)
        size = 1 if self._totals else len(atoms)
        uncertainty = prediction["uncertainty"] * len(atoms)  # recorded for an atom
        energies = prediction["energy"], float(atoms.info[REF_ENERGY])
        return (energies[0] - zero) / size, (energies[1] - zero) / size, uncertainty / size


class _ElementFit:
    """Least-squares atomic energies: the zero against which energies are shown."""

    def __init__(self, labelled: Sequence[Atoms]) -> None:
        self._elements = sorted({int(z) for atoms in labelled for z in atoms.numbers})
        counts = np.array([self._count(atoms) for atoms in labelled])
        energies = np.array([float(atoms.info[REF_ENERGY]) for atoms in labelled])
        self._energies = np.linalg.lstsq(counts, energies, rcond=None)[0] if labelled else None

    def __call__(self, atoms: Atoms) -> float:
        return 0.0 if self._energies is None else float(self._count(atoms) @ self._energies)

    def _count(self, atoms: Atoms) -> Float[np.ndarray, " n_elements"]:
        return np.array([(atoms.numbers == z).sum() for z in self._elements], dtype=float)


def _look(files: RoundFiles, number: int, sources: _Sources) -> LookFacts | None:
    """Return the look of a round; of one that is under way, only its event exists."""
    if 0 < number <= len(sources.looks):
        return _recorded_look(sources.looks[number - 1])
    if files.summary.is_file():
        recorded = read_json(files.summary).get("look")
        return None if recorded is None else _recorded_look(recorded)
    event = _last(sources.events, "look", number)
    if event is None:
        return None
    return LookFacts(
        number=number,
        n_audit=int(event["audit"]),
        n_misses=int(event["misses"]),
        accuracy_bound=float(event["accuracy_bound"]),
        estimate=None,
        certified=bool(event["certified"]),
    )


def _recorded_look(look: Mapping[str, Any]) -> LookFacts:
    """Take a look over, with the share that its sample suggests where nothing was labelled."""
    sampled, misses, failed = (look[f"n_audit{s}"] for s in ("", "_misses", "_failed"))
    hit_rate = 1 - misses / sampled if sampled else 0.0
    right = look["n_labelled"] + sampled - failed + (look["n_inference"] - sampled) * hit_rate
    return LookFacts(
        number=int(look["look"]),
        n_audit=int(sampled),
        n_misses=int(misses),
        accuracy_bound=float(look["accuracy_bound"]),
        estimate=right / look["n_pool"] if sampled else None,
        certified=bool(look["certified"]),
    )


def _valid_errors(
    files: RoundFiles, number: int, events: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Return the errors of a round's committee on its validation set."""
    if (event := _last(events, "trained", number)) is not None:
        return dict(event["errors"])
    if files.model.is_file():  # killed between the model and its event
        return dict(load_model(files.model)[1].get("valid_errors", {}))
    return {}


# ------------------------------------------------------------------------------- forces
def _forces(
    folder: RunFolder, rounds: Sequence[RoundFacts], store: LabelStore | None
) -> tuple[ForceComparison | None, str]:
    """Predict forces of structures that the model has not seen; says why if that fails."""
    for facts in reversed(rounds):
        sample = facts.audit or facts.batch
        model = folder.round(facts.number - 1).model
        if facts.audited is not None and store is not None and model.is_file():
            known = [key for key in sample if store.has(key, "reference", ["forces"])]
            source = f"the audit of round {facts.number}, not yet trained on"
            return _compare_forces(model, store.labelled_atoms(known), source)
    for facts in reversed(rounds):
        files = folder.round(facts.number)
        valid = files.folder / "valid.extxyz"
        if files.model.is_file() and valid.is_file():
            source = f"the validation set of round {facts.number}"
            return _compare_forces(files.model, read_structures(valid), source)
    return None, "There is no model yet."


def _compare_forces(
    model: Path, structures: Sequence[Atoms], source: str
) -> tuple[ForceComparison | None, str]:
    labelled = [atoms for atoms in structures if REF_FORCES in atoms.arrays]
    step = -(-len(labelled) // MAX_FORCE_STRUCTURES) or 1
    labelled = labelled[::step]
    try:
        results = predict(model, labelled, ("energy", "forces"), on_error="skip", baseline="labels")
    except OrbcalcError as error:
        return None, f"Forces could not be predicted with {model}: {error}"
    pairs = [
        (result["forces"].ravel(), atoms.arrays[REF_FORCES].ravel())
        for atoms, result in zip(labelled, results, strict=True)
        if "forces" in result
    ]
    if not pairs:
        return None, "No reference forces were asked for."
    predicted, reference = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    return ForceComparison(predicted, reference, len(pairs), source), ""


# -------------------------------------------------------------------------------- files
def _certificate(folder: RunFolder) -> Certificate | None:
    if not folder.certificate.is_file():
        return None
    try:
        return Certificate.from_json(folder.certificate.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise ConfigError(f"{folder.certificate}: {error}") from error


def _provenance(store: LabelStore | None) -> dict[str, str]:
    if store is None:
        return {}
    found = {"reference": store.provenance("reference"), "charges": store.provenance("charges")}
    return {kind: str(origin) for kind, origin in found.items() if origin is not None}


def _model_facts(folder: RunFolder, rounds: Sequence[RoundFacts]) -> dict[str, str]:
    for facts in reversed(rounds):
        path = folder.round(facts.number).model
        if not path.is_file():
            continue
        try:
            committee, metadata = load_model(path)
        except OrbcalcError as error:
            return {"newest model": str(error)}
        first = committee.first
        parameters = sum(weight.numel() for weight in first.parameters())
        training = metadata.get("training_set", {})
        is_fit = training.get("n_left_out", 0) > 0
        judged = "each left out in turn" if is_fit else f"{training.get('n_valid', '?')} held out"
        return {
            **_features_facts(folder),
            "newest model": f"round {facts.number}: committee of {len(committee.members)}, "
            f"{parameters:,} parameters each, cutoff {committee.cutoff:g} Å",
            "trained on": f"{training.get('n_train', '?')} structures, "
            f"{training.get('n_cheap', '?')} with cheap labels only, "
            f"{judged}; SHA-256 {training.get('sha256', '?')[:16]}",
        }
    return {}


def _features_facts(folder: RunFolder) -> dict[str, str]:
    """Tell what features were learned from before the first round, if they were."""
    if not folder.features.model.is_file():
        return {}
    training = load_model(folder.features.model)[1].get("training_set", {})
    learned = f"cheap labels of {training.get('n_cheap', '?')} structures"
    return {"features": f"{learned}, {training.get('n_valid', '?')} held out"}


def _last(events: Sequence[Mapping[str, Any]], name: str, number: int) -> Mapping[str, Any] | None:
    """Return the last event of a name in a round; a resumed run may have written several."""
    found = [e for e in events if e.get("event") == name and e.get("round") == number]
    return found[-1] if found else None
