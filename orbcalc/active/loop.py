"""The active-learning loop: one round at a time, everything it needs to know on disk.

A round::

    pool      structures from files, and from MD with the committee of the last round
    audit     a uniform sample of the unlabelled is labelled and compared with the predictions
              that this committee made before; the certificate follows from that, and ends the run
    batch     otherwise the hardest structures are labelled too
    train     and a new committee is trained on everything labelled so far

Every step writes its result to the run folder and is skipped where that exists, so *resume* and
*run* are the same code: a run that was killed anywhere goes on by being started again, computes
no stored label twice, and makes the same decisions.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms

import orbcalc
from orbcalc.active.certificate import Certificate, Look, PoolCounts, audit_look, kl_batch_look
from orbcalc.active.executor import Executor, open_executor
from orbcalc.active.folder import (
    RoundFiles,
    RunFolder,
    append_json,
    read_json,
    read_jsonl,
    write_json,
    write_structures,
    write_text,
)
from orbcalc.active.labelling import label_into_store
from orbcalc.active.sampling import Walk, WalkTask, bootstrap_walk, committee_walk
from orbcalc.active.selection import draw_audit, select_hardest
from orbcalc.config import RunConfig, TrainConfig, dump_config, load_config
from orbcalc.errors import ConfigError, OrbcalcError
from orbcalc.files import replace_file
from orbcalc.labels.label import Label, LabelStatus
from orbcalc.labels.reference import check_file_labels
from orbcalc.labels.store import LabelStore
from orbcalc.structures import hold_out, read_structures, structure_key

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["ActiveLearning", "run"]

logger = logging.getLogger(__name__)

Notify = Callable[[Mapping[str, Any]], None]

#: Independent random streams of a round.
_AUDIT, _BATCH, _MD = 1, 2, 3


def run(
    config: RunConfig, *, client: Client | None = None, notify: Notify | None = None
) -> Certificate:
    """Run the loop to its end, or go on with it.

    Parameters
    ----------
    config
        See `RunConfig`; the folder it names holds everything that is known about the run.
    client
        Dask client; by default what ``config.dask`` says.
    notify
        Receives every event, and the progress of labels and training.

    Returns
    -------
    Certificate
        Certified or not; `Certificate.reason` says why the run ended.

    Raises
    ------
    ConfigError
        If the folder holds another run, or the configuration cannot work.
    OrbcalcError
        If labels or models cannot be made at all; the folder stays resumable.
    """
    folder = RunFolder(config.output)
    folder.prepare(config)
    if folder.certificate.exists():
        done = Certificate.from_json(folder.certificate.read_text(encoding="utf-8"))
        if done.certified or not _limits_were_raised(done, config, folder):
            return done
        folder.certificate.unlink()  # it speaks of an end that is none any more
    if not folder.round(0).pool.exists():
        check_file_labels(
            read_structures(config.pool.structures) if config.pool.structures else [], config.labels
        )
    with open_executor(config.dask, members=config.committee, client=client) as executor:
        return ActiveLearning(config, folder, executor, notify).run()


class ActiveLearning:
    """The loop on an executor; see the module for the anatomy of a round."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        executor: Executor,
        notify: Notify | None = None,
    ) -> None:
        self.config, self.folder, self.executor = config, folder, executor
        self.notify: Notify = notify or (lambda record: None)
        self.store = LabelStore(folder.labels)
        self._metrics_seen = len(read_jsonl(folder.metrics))

    def run(self) -> Certificate:
        """Do rounds until one of them ends the run."""
        number = 0
        while (certificate := self.step(number)) is None:
            number += 1
        certificate.write(self.folder.certificate)
        self._event("finished", reason=certificate.reason, statement=certificate.statement)
        return certificate

    def step(self, number: int) -> Certificate | None:
        """Do one round, or what is left of it; returns a certificate if the run ends here."""
        files = self.folder.round(number)
        if files.summary.exists():
            return None
        self._grow_pool(number, files)
        pool = self.folder.pool(number + 1)
        selection = self._select(number, files, pool)
        if number > 0:
            self._label(number, "audit", [pool[key] for key in selection["audit"]])
            looks = [*self._earlier_looks(number), self._look(number, selection, pool)]
            certificate = self._verdict(number, looks, pool)
            if certificate is not None:
                return certificate
        self._label(number, "batch", [pool[key] for key in selection["batch"]])
        self._train(number, files, pool)
        summary = self._summary(number, pool, None if number == 0 else looks[-1])
        write_json(files.summary, summary)
        self._event("round", **summary)
        return None

    # ----------------------------------------------------------------------------- pool
    def _grow_pool(self, number: int, files: RoundFiles) -> None:
        if files.pool.exists():
            return
        source = self.config.pool
        found = read_structures(source.structures) if number == 0 and source.structures else []
        if source.md is not None and number < source.md.rounds:
            found += self._walk(number)
        known = set(self.folder.pool(number))
        fresh = {structure_key(atoms): atoms for atoms in found}
        added = [_bare(atoms) for key, atoms in fresh.items() if key not in known]
        write_structures(files.pool, added)
        if added:
            self._event("pool", round=number, added=len(added), pool=len(known) + len(added))

    def _walk(self, number: int) -> list[Atoms]:
        """Let the walkers run; in the first round with the bootstrap method."""
        source = self.config.pool
        assert source.md is not None
        rng = self._rng(number, _MD)
        starts = read_structures(source.start or source.structures)
        if number > 0:  # spread out: start where earlier walkers have been
            known = list(self.folder.pool(number).values())
            starts = [known[i] for i in rng.permutation(len(known))[: source.md.walkers]]
        tasks = [
            WalkTask(
                start=_bare(starts[walker % len(starts)]),
                config=source.md,
                seed=int(rng.integers(2**32)),
                model=None if number == 0 else self.folder.round(number - 1).model.absolute(),
            )
            for walker in range(source.md.walkers)
        ]
        walks: dict[int, Walk] = {}
        function = bootstrap_walk if number == 0 else committee_walk
        for task, outcome in self.executor.map(
            function, tasks, "label" if number == 0 else "model"
        ):
            if isinstance(outcome, Exception):
                raise OrbcalcError(f"an MD walker failed: {outcome!r}") from outcome
            walks[tasks.index(task)] = outcome
            self._event("walk", round=number, frames=len(outcome.frames), ended=outcome.reason)
        return [frame for walker in sorted(walks) for frame in walks[walker].frames]

    # ------------------------------------------------------------------------ selection
    def _select(self, number: int, files: RoundFiles, pool: Mapping[str, Atoms]) -> dict[str, Any]:
        """Draw the audit and select the batch, before any of them is labelled."""
        if files.selection.exists():
            selection: dict[str, Any] = read_json(files.selection)
            return selection
        open_keys = [k for k in pool if self.store.status(k, "reference") is None]
        rng_audit, rng_batch = self._rng(number, _AUDIT), self._rng(number, _BATCH)
        sizes = self.config.selection
        if number == 0:
            chosen = draw_audit(len(open_keys), self._affordable(sizes.initial), rng_batch)
            selection = {"audit": [], "batch": [open_keys[i] for i in chosen], "predictions": {}}
        else:
            predictions = self._predict(number, [pool[key] for key in open_keys])
            by_audit = self.config.certificate.method == "hypergeometric"
            n_audit = self._affordable(sizes.audit) if by_audit else 0
            audit = set(draw_audit(len(open_keys), n_audit, rng_audit).tolist())
            rest = [i for i in range(len(open_keys)) if i not in audit]
            scores = [predictions[i].get("uncertainty", np.nan) for i in rest]
            batch = select_hardest(
                scores,
                self._affordable(sizes.batch, len(audit)),
                features=_features([predictions[i] for i in rest]),
                diversity=sizes.diversity,
                rng=rng_batch,
            )
            selection = {
                "audit": [open_keys[i] for i in sorted(audit)],
                "batch": [open_keys[rest[i]] for i in batch],
                "predictions": {
                    open_keys[i]: {"energy": p["energy"], "uncertainty": p["uncertainty"]}
                    for i in (*sorted(audit), *(rest[int(i)] for i in batch))
                    if "energy" in (p := predictions[i])
                    and np.isfinite([p["energy"], p["uncertainty"]]).all()
                },
            }
        write_json(files.selection, selection)
        self._event(
            "selection",
            round=number,
            audit=len(selection["audit"]),
            batch=len(selection["batch"]),
            unlabelled=len(open_keys),
        )
        return selection

    def _affordable(self, size: int, already: int = 0) -> int:
        """Return how many structures may still be labelled, at most a size."""
        limit = self.config.stop.max_labels
        if limit is None:
            return size
        return max(0, min(size, limit - len(self._decided()) - already))

    def _decided(self) -> list[str]:
        return self.store.keys("reference")

    def _predict(self, number: int, structures: Sequence[Atoms]) -> list[dict[str, Any]]:
        """Predict with the committee of the last round; empty where that is impossible."""
        model = self.folder.round(number - 1).model.absolute()
        size = 256
        chunks = [
            (start, list(structures[start : start + size]))
            for start in range(0, len(structures), size)
        ]
        predictions: list[dict[str, Any]] = [{} for _ in structures]
        for (start, chunk), outcome in self.executor.map(
            partial(predict_chunk, model), chunks, "model"
        ):
            if isinstance(outcome, Exception):
                raise OrbcalcError(f"prediction failed: {outcome!r}") from outcome
            predictions[start : start + len(chunk)] = outcome
        return predictions

    # -------------------------------------------------------------------------- labels
    def _label(self, number: int, purpose: str, structures: Sequence[Atoms]) -> None:
        missing = [
            atoms
            for atoms in structures
            if self.store.status(structure_key(atoms), "reference") is None
        ]
        if not missing:
            return
        seconds = {"charges": 0.0, "reference": 0.0}

        def progress(done: int, total: int, labels: Sequence[Label]) -> None:
            for item in labels:
                seconds[item.kind] += item.wall_time_s
            self.notify({"event": "labelling", "purpose": purpose, "done": done, "of": total})

        statuses = label_into_store(
            self.executor, missing, self.config.labels, self.store, progress=progress
        )
        self._event(
            "labelled",
            round=number,
            purpose=purpose,
            structures=len(missing),
            statuses=dict(statuses),
            seconds={kind: round(value, 3) for kind, value in seconds.items()},
        )

    # --------------------------------------------------------------------- certificate
    def _look(self, number: int, selection: Mapping[str, Any], pool: Mapping[str, Atoms]) -> Look:
        """Compare the predictions with the labels that were made after them."""
        options = self.config.certificate
        by_audit = options.method == "hypergeometric"
        if not by_audit:
            self._label(number, "batch", [pool[key] for key in selection["batch"]])
        sample = selection["audit"] if by_audit else selection["batch"]
        later = {*selection["audit"], *selection["batch"]}
        before = [key for key in pool if key not in later]
        ok = self.store.keys("reference", LabelStatus.ok)
        failed_keys = set(self._decided()) - set(ok)
        known = set(ok)
        counts = PoolCounts(
            n_pool=len(pool),
            n_labelled=sum(key in known for key in before),
            n_failed=sum(key in failed_keys for key in before),
        )
        errors = [self._error_per_atom(key, pool[key], selection) for key in sample]
        failed = np.array([key not in known for key in sample], dtype=bool)
        hit = np.abs(np.array(errors, dtype=float)) <= options.tolerance
        judge = audit_look if by_audit else kl_batch_look
        look = judge(
            counts,
            hit & ~failed,
            failed=failed,
            look=number,
            gamma=options.accuracy,
            delta=options.delta,
        )
        finite = [abs(e) for e in errors if np.isfinite(e)]
        self._event(
            "look",
            round=number,
            audit=look.n_audit,
            misses=look.n_audit_misses,
            mae_per_atom=float(np.mean(finite)) if finite else None,
            accuracy_bound=look.accuracy_bound,
            certified=look.certified,
        )
        return look

    def _error_per_atom(self, key: str, atoms: Atoms, selection: Mapping[str, Any]) -> float:
        label = self.store.get(key, "reference")
        prediction = selection["predictions"].get(key)
        if label is None or label.status is not LabelStatus.ok or prediction is None:
            return float("nan")
        return float(prediction["energy"] - label.values["energy"]) / len(atoms)

    def _earlier_looks(self, number: int) -> list[Look]:
        summaries = [read_json(self.folder.round(k).summary) for k in range(1, number)]
        return [Look(**summary["look"]) for summary in summaries]

    def _verdict(
        self, number: int, looks: list[Look], pool: Mapping[str, Atoms]
    ) -> Certificate | None:
        """End the run if it is certified or may not go on."""
        look = looks[-1]
        stop = self.config.stop
        # As of this look: a run that goes on after a kill may have labelled more already.
        labelled = look.n_labelled + look.n_failed + look.n_audit
        if look.certified:
            reason = "certified"
        elif number >= stop.max_rounds:
            reason = "max_rounds"
        elif stop.max_labels is not None and labelled >= stop.max_labels:
            reason = "max_labels"
        elif look.n_inference == look.n_audit:
            reason = "pool exhausted"
        else:
            return None
        released = self.folder.round(number - 1).model
        data = released.read_bytes()
        replace_file(self.folder.model, data)
        options = self.config.certificate
        return Certificate(
            reason=reason,
            looks=tuple(looks),
            tolerance=options.tolerance,
            quantity="energy per atom, eV",
            gamma=options.accuracy,
            delta=options.delta,
            seed=self.config.seed,
            n_pool=len(pool),
            pool_hash=hashlib.sha256("".join(sorted(pool)).encode()).hexdigest()[:16],
            model_hash=hashlib.sha256(data).hexdigest()[:16],
            version=orbcalc.__version__,
        )

    # ------------------------------------------------------------------------ training
    def _train(self, number: int, files: RoundFiles, pool: Mapping[str, Atoms]) -> None:
        """Train the members on the model workers, then join them."""
        if files.model.exists():
            return
        if not files.train.exists():
            self._write_training_set(number, files, pool)
        train_config = load_config(files.train, TrainConfig)
        tasks: list[TrainTask] = [
            (str(files.train.absolute()), member, str(self.folder.metrics.absolute()), number)
            for member in range(self.config.committee)
        ]
        for task, outcome in self.executor.map(
            train_on_worker, tasks, "model", on_wait=self._pass_on_metrics
        ):
            if isinstance(outcome, Exception):
                raise OrbcalcError(f"training of member {task[1]} failed: {outcome!r}") from outcome
        for _, outcome in self.executor.map(
            finish_on_worker, [str(files.train.absolute())], "model"
        ):
            if isinstance(outcome, Exception):
                raise OrbcalcError(f"the committee could not be made: {outcome!r}") from outcome
            self._event("trained", round=number, model=str(train_config.output), **outcome)

    def _write_training_set(
        self, number: int, files: RoundFiles, pool: Mapping[str, Atoms]
    ) -> None:
        known = set(self.store.keys("reference", LabelStatus.ok))
        labelled = self.store.labelled_atoms([key for key in pool if key in known])
        fraction = self.config.selection.valid_fraction
        held_out = _held_out(labelled, fraction)
        train_file, valid_file = files.folder / "train.extxyz", files.folder / "valid.extxyz"
        write_structures(
            train_file, [a for a, out in zip(labelled, held_out, strict=True) if not out]
        )
        write_structures(valid_file, [a for a, out in zip(labelled, held_out, strict=True) if out])
        previous = self.folder.round(number - 1).model.absolute() if number > 0 else None
        config = TrainConfig(
            train=(train_file.absolute(),),
            valid=(valid_file.absolute(),),
            output=files.model.absolute(),
            seed=int(self._rng(number, 0).integers(2**31)),
            committee=self.config.committee,
            device=self.config.device,
            potential=self.config.potential,
            tasks=self.config.tasks,
            optimizer=self.config.optimizer,
            start_from=previous if self.config.warm_start else None,
        )
        write_text(files.train, dump_config(config))

    def _pass_on_metrics(self) -> None:
        records = read_jsonl(self.folder.metrics)
        for record in records[self._metrics_seen :]:
            self.notify({"event": "training", **record})
        self._metrics_seen = len(records)

    # ------------------------------------------------------------------------- general
    def _summary(self, number: int, pool: Mapping[str, Atoms], look: Look | None) -> dict[str, Any]:
        ok = set(self.store.keys("reference", LabelStatus.ok))
        return {
            "round": number,
            "pool": len(pool),
            "labelled": len(ok),
            "failed": len(set(self._decided()) - ok),
            "look": None if look is None else vars(look),
        }

    def _event(self, name: str, **details: Any) -> None:
        record = self.folder.event(name, **details)
        logger.info("%s", record)
        self.notify(record)

    def _rng(self, number: int, stream: int) -> np.random.Generator:
        """Return the random stream of one purpose in one round, the same after a resume."""
        return np.random.default_rng([self.config.seed, number, stream])


TrainTask = tuple[str, int, str, int]


def predict_chunk(model: Path, chunk: tuple[int, list[Atoms]]) -> list[dict[str, Any]]:
    """Predict some structures on a model worker."""
    from orbcalc.calculator import predict

    results = predict(model, chunk[1], ("energy", "features"), on_error="skip")
    return [
        {
            "energy": result["energy"],
            "uncertainty": result["energy_uncertainty"] / len(atoms),
            "features": result["features"],
        }
        if result
        else {}
        for atoms, result in zip(chunk[1], results, strict=True)
    ]


def train_on_worker(task: TrainTask) -> str:
    """Train one member on a model worker."""
    from orbcalc.training.run import train_member

    config_path, member, metrics, number = task
    config = load_config(config_path, TrainConfig)
    path = train_member(
        config,
        member,
        report=lambda record: append_json(Path(metrics), {"round": number, **record}),
    )
    return str(path)


def finish_on_worker(config_path: str) -> dict[str, Any]:
    """Join the members of a committee on a model worker."""
    from orbcalc.model.checkpoint import load_model
    from orbcalc.training.run import finish_training

    config = load_config(config_path, TrainConfig)
    if not config.output.exists():  # else the worker died after it had written the model
        finish_training(config)
    _, metadata = load_model(config.output)
    found: dict[str, Any] = {
        "errors": metadata["valid_errors"],
        "n_train": metadata["training_set"]["n_train"],
        "n_valid": metadata["training_set"]["n_valid"],
    }
    return found


def _limits_were_raised(done: Certificate, config: RunConfig, folder: RunFolder) -> bool:
    """Tell whether a run that ended without a certificate may now go on."""
    stop = config.stop
    if done.reason == "max_rounds":
        return len(done.looks) < stop.max_rounds
    if done.reason == "max_labels":
        return (
            stop.max_labels is None
            or len(LabelStore(folder.labels).keys("reference")) < stop.max_labels
        )
    return False


def _held_out(structures: Sequence[Atoms], fraction: float) -> list[bool]:
    """Choose validation structures by their content hash, so that the choice rarely changes."""
    scores = [int(structure_key(atoms)[-12:], 16) / 16**12 for atoms in structures]
    size = sum(score < fraction for score in scores)
    order = np.argsort(scores).tolist()
    chosen = set(hold_out(structures, order, min(max(size, 1), max(len(structures) // 2, 1))))
    if not chosen:
        raise ConfigError(
            f"{len(structures)} labelled structure(s) are too few to train on: none can be held "
            f"out for validation. Raise selection.initial, or look at the failed labels."
        )
    return [index in chosen for index in range(len(structures))]


def _features(predictions: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    width = next((len(p["features"]) for p in predictions if p), None)
    if width is None:
        return None
    return np.array([p["features"] if p else np.full(width, np.nan) for p in predictions])


def _bare(atoms: Atoms) -> Atoms:
    """Copy a structure for the pool: no calculator, no constraints; labels of a file are kept."""
    bare: Atoms = atoms.copy()
    bare.set_constraint()
    bare.calc = None
    for name in ("momenta", "initial_magmoms", "initial_charges"):
        bare.arrays.pop(name, None)
    return bare
