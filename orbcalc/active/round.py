"""One round of the loop: its steps, each of which leaves its result in the run folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from orbcalc.active.certificate import Look, PoolCounts
from orbcalc.active.decisions import (
    Stream,
    choose_audit,
    choose_batch,
    is_decided,
    next_part,
    stream,
    take_look,
)
from orbcalc.active.executor import Executor
from orbcalc.active.folder import RoundFiles, RunFolder, write_structures
from orbcalc.active.inputs import Inputs, read_inputs
from orbcalc.active.labelling import all_failed, label_into_store, refuse_all_failed
from orbcalc.active.modelling import train_committee, write_features_set, write_training_set
from orbcalc.active.prediction import (
    finite_numbers,
    joined_features,
    pool_functions,
    predict_pool,
    with_baseline,
)
from orbcalc.active.prior import process_columns, select_informative
from orbcalc.active.quantities import QUANTITIES, prediction_error
from orbcalc.active.sampling import Walk, bootstrap_walk, committee_walk, walk_tasks
from orbcalc.active.selection import draw_audit, power_law_costs
from orbcalc.config import RunConfig
from orbcalc.errors import OrbcalcError
from orbcalc.files import read_json, write_json
from orbcalc.labels.compute import label_kinds
from orbcalc.labels.label import Kind, Label, LabelStatus
from orbcalc.labels.store import LabelStore
from orbcalc.structures import structure_key

__all__ = ["Notify", "Round"]

logger = logging.getLogger(__name__)

#: Structures that the first ones are chosen among.
_MOST_CANDIDATES = 20_000

Notify = Callable[[Mapping[str, Any]], None]


class Round:
    """The steps of a round, in the order of the methods; what is done already is read.

    Parameters
    ----------
    number
        From 0; the first round has neither a committee nor an audit.
    config, folder, store
        Of the run.
    executor
        Where its tasks run.
    notify
        Receives every event, and the progress of labels and training.
    """

    def __init__(
        self,
        number: int,
        config: RunConfig,
        folder: RunFolder,
        store: LabelStore,
        executor: Executor,
        notify: Notify,
    ) -> None:
        self.number, self.config, self.folder, self.store = number, config, folder, store
        self.executor, self.notify = executor, notify
        self.files = folder.round(number)
        self._predictions: dict[str, dict[str, Any]] = {}  # of what was open, by this committee

    @property
    def is_done(self) -> bool:
        """Whether every step was done before."""
        return self.files.summary.exists()

    @property
    def committee(self) -> Path | None:
        """Model file of the round before."""
        return self.folder.round(self.number - 1).model.absolute() if self.number > 0 else None

    # ----------------------------------------------------------------------------- pool
    def grow_pool(self, inputs: Inputs | None = None) -> dict[str, Atoms]:
        """Add structures of files and walkers; returns the pool by structure key.

        Those of files are kept as they are, duplicates included. Only the first round needs
        ``inputs``; it reads them if they are not given.
        """
        if not self.files.pool.exists():
            known = self.folder.pool(self.number)
            listed, starts = list[Atoms](), list(known.values())
            if self.number == 0:
                listed, starts = inputs or read_inputs(self.config, self.folder)
            seen = {*known, *(structure_key(atoms) for atoms in listed)}
            walks = self._walk(starts)
            sampled = {structure_key(a): a for walker in walks for a in walker.frames}
            fresh = [atoms for key, atoms in sampled.items() if key not in seen]
            n_pool = len(seen) + len(fresh)
            if n_pool == 0:
                raise OrbcalcError(
                    f"the pool is empty: no MD walker found a structure ({walks[0].reason}). "
                    f"Look at the starting structures and at pool.md, its timestep_fs for example."
                )
            if n_pool > len(known):
                self._event("pool", added=n_pool - len(known), pool=n_pool)
            write_structures(self.files.pool, [atoms.copy() for atoms in (*listed, *fresh)])
        return self.folder.pool(self.number + 1)

    def _walk(self, starts: Sequence[Atoms]) -> list[Walk]:
        """Let the walkers run, if there are any; in the first round with the bootstrap method."""
        md = self.config.pool.md
        if md is None or self.number >= md.rounds:
            return []
        tasks = walk_tasks(starts, md, self._rng("md"), self.committee, self.config.device)
        walks: dict[int, Walk] = {}
        function = bootstrap_walk if self.committee is None else committee_walk
        for task, outcome in self.executor.map(
            function, tasks, "label" if self.committee is None else "model"
        ):
            if isinstance(outcome, Exception):
                raise OrbcalcError(f"an MD walker failed: {outcome!r}") from outcome
            walks[tasks.index(task)] = outcome
            self._event("walk", frames=len(outcome.frames), ended=outcome.reason)
        return [walks[walker] for walker in sorted(walks)]

    # ------------------------------------------------------------------------- features
    def learn_features(self, pool: Mapping[str, Atoms]) -> None:
        """Learn from the cheap labels of the pool, once, what a process will be fitted on."""
        files = self.folder.features
        if self.number > 0 or files.model.exists():
            return
        if not files.train.exists():
            seed = int(self._rng("training").integers(2**31))
            if not write_features_set(files, pool, self.store, self.config, seed=seed):
                return
        self._train(files, "features")

    # ------------------------------------------------------------------------ selection
    def select(self, pool: Mapping[str, Atoms]) -> dict[str, Any]:
        """Choose what the look is taken at; in the first round, what is labelled first.

        The selection has the keys of the ``audit`` in the order in which they are labelled, those
        of the ``batch`` as soon as it is chosen, and the ``predictions`` for either.
        """
        if self.files.selection.exists():
            known: dict[str, Any] = read_json(self.files.selection)
            return known
        open_keys = self._open_keys(pool)
        selection: dict[str, Any] = {"open": len(open_keys), "audit": [], "predictions": {}}
        if self.committee is None:
            selection["batch"] = self._first(open_keys, pool)
        else:
            self._predict(open_keys, pool)
            if self._by_audit:
                drawn = choose_audit(len(open_keys), self.config.selection, **self._terms(pool))
                sample = selection["audit"] = [open_keys[i] for i in drawn]
            else:
                sample = selection["batch"] = self._hardest(open_keys, pool)
            selection["predictions"] = self._predictions_of(sample, pool)
        self._keep(selection, open_keys)
        return selection

    def select_batch(self, selection: dict[str, Any], pool: Mapping[str, Atoms]) -> None:
        """Choose the hardest of what the audit has left, if that has not been done."""
        if "batch" in selection:
            return
        open_keys = self._open_keys(pool)
        if not self._predictions:  # after a kill: all that was predicted before, and as it was
            before = {*open_keys, *selection["audit"]}
            self._predict([key for key in pool if key in before], pool)
        selection["batch"] = self._hardest(open_keys, pool)
        kept = {key: self._predictions[key] for key in selection["batch"]}
        selection["predictions"] = {**finite_numbers(kept), **selection["predictions"]}
        self._keep(selection, open_keys)

    def _keep(self, selection: Mapping[str, Any], open_keys: Sequence[str]) -> None:
        write_json(self.files.selection, selection)
        purpose = "batch" if "batch" in selection else "audit"
        self._event(
            "selection",
            purpose=purpose,
            structures=len(selection[purpose]),
            unlabelled=len(open_keys),
        )

    def _predict(self, keys: Sequence[str], pool: Mapping[str, Atoms]) -> None:
        assert self.committee is not None
        structures = self._predictable({key: pool[key] for key in keys})
        found = predict_pool(
            self.executor,
            self.committee,
            structures,
            self.config.device,
            quantity=self.config.certificate.quantity,
        )
        self._predictions = dict(zip(keys, found, strict=True))

    def _first(self, open_keys: Sequence[str], pool: Mapping[str, Atoms]) -> list[str]:
        """Choose what tells most about the pool, where features are known, or at random."""
        size, rng = self._affordable(self.config.selection.initial), self._rng("batch")
        features = self.folder.features.model.absolute()
        if not (open_keys and features.exists()) or self.config.selection.method == "random":
            return [open_keys[i] for i in draw_audit(len(open_keys), size, rng)]
        some = rng.permutation(len(open_keys))[:_MOST_CANDIDATES]
        structures = [pool[open_keys[i]] for i in some]
        found = pool_functions(self.executor, features, structures, self.config.device)
        drawn = select_informative(process_columns(*found), size, rng=rng)
        return [open_keys[some[i]] for i in drawn]

    def _hardest(self, open_keys: Sequence[str], pool: Mapping[str, Atoms]) -> list[str]:
        predictions = [self._predictions[key] for key in open_keys]
        chosen = choose_batch(
            [p["score"] if p else np.nan for p in predictions],
            self.config.selection,
            features=joined_features(predictions),
            costs=self._costs(open_keys, pool) if self.config.selection.cost_aware else None,
            **self._terms(pool),
        )
        return [open_keys[i] for i in chosen]

    def _predictions_of(
        self, sample: Sequence[str], pool: Mapping[str, Atoms]
    ) -> dict[str, dict[str, Any]]:
        """Return what the committee says of the sample of a look, for the records."""
        if self.config.certificate.quantity != "forces":
            return finite_numbers({key: self._predictions[key] for key in sample})
        assert self.committee is not None  # forces: too many to keep of all
        structures = self._predictable({key: pool[key] for key in sample})
        found = predict_pool(
            self.executor, self.committee, structures, self.config.device, forces=True
        )
        return finite_numbers(dict(zip(sample, found, strict=True)), "forces")

    def _open_keys(self, pool: Mapping[str, Atoms]) -> list[str]:
        decided = {*self._decided()}
        return [key for key in pool if key not in decided]

    def _terms(self, pool: Mapping[str, Atoms]) -> dict[str, Any]:
        budget = self._affordable(len(pool))
        return {"budget": budget, "seed": self.config.seed, "number": self.number}

    def _predictable(self, structures: Mapping[str, Atoms]) -> list[Atoms]:
        return with_baseline(self.config, self.store, structures)

    def _costs(self, open_keys: Sequence[str], pool: Mapping[str, Atoms]) -> np.ndarray:
        """Predict the seconds of reference labels from those of earlier ones, by atoms."""
        seconds = self.store.wall_times("reference")
        known = [key for key in seconds if key in pool]
        return power_law_costs(
            [len(pool[key]) for key in open_keys],
            [len(pool[key]) for key in known],
            [seconds[key] for key in known],
        )

    def _affordable(self, size: int) -> int:
        """Return how many structures may still be labelled, at most a size."""
        limit = self.config.stop.max_labels
        if limit is None:
            return size
        return max(0, min(size, limit - len(self._decided())))

    def _decided(self) -> list[str]:
        return self.store.keys("reference")

    @property
    def _by_audit(self) -> bool:
        return self.config.certificate.by_audit

    # -------------------------------------------------------------------------- labels
    def label(self, purpose: str, structures: Sequence[Atoms]) -> None:
        """Label what has no label yet; the purpose is "audit" or "batch".

        Where none of many comes out well, the run is ended (`LabelError`), and what starts it
        again tries them again.
        """
        keys = [structure_key(atoms) for atoms in structures]
        again = all_failed(self.store, keys)
        missing = [
            atoms
            for key, atoms in zip(keys, structures, strict=True)
            if again or self.store.status(key, "reference") is None
        ]
        self._label(purpose, missing, label_kinds(self.config.labels), retry_failed=again)
        refuse_all_failed(self.store, keys)

    def label_pool(self, pool: Mapping[str, Atoms]) -> None:
        """Make the cheap labels of the whole pool, where they are asked for and missing."""
        if not self.config.pool.charges:
            return
        missing = [a for key, a in pool.items() if self.store.status(key, "charges") is None]
        self._label("pool", missing, ("charges",))

    def _label(
        self,
        purpose: str,
        missing: Sequence[Atoms],
        kinds: tuple[Kind, ...],
        *,
        retry_failed: bool = False,
    ) -> None:
        if not missing:
            return
        seconds = {"charges": 0.0, "reference": 0.0}

        def progress(done: int, total: int, labels: Sequence[Label]) -> None:
            for item in labels:
                seconds[item.kind] += item.wall_time_s
            self.notify({"event": "labelling", "purpose": purpose, "done": done, "of": total})

        statuses = label_into_store(
            self.executor,
            missing,
            self.config.labels,
            self.store,
            kinds=kinds,
            retry_failed=retry_failed,
            progress=progress,
        )
        self._event(
            "labelled",
            purpose=purpose,
            structures=len(missing),
            statuses=dict(statuses),
            seconds={kind: round(value, 3) for kind, value in seconds.items()},
        )

    # ---------------------------------------------------------------------------- look
    def look(self, selection: Mapping[str, Any], pool: Mapping[str, Atoms]) -> Look:
        """Label a sample, part by part, and compare with the predictions that were made before."""
        options = self.config.certificate
        purpose = "audit" if self._by_audit else "batch"
        sample, done, errors = selection[purpose], 0, list[float]()
        while True:
            part = next_part(done, len(sample), self.config.selection, options)
            keys = sample[done : done + part]
            self.label(purpose, [pool[key] for key in keys])
            done += part
            errors += [self._error(key, len(pool[key]), selection) for key in keys]
            look = self._look_at(sample[:done], errors, selection, pool)
            if done == len(sample) or is_decided(look, len(sample), self.config.selection, options):
                break
        finite = [abs(e) for e in errors if np.isfinite(e)]
        self._event(
            "look",
            audit=look.n_audit,
            misses=look.n_audit_misses,
            mean_error=float(np.mean(finite)) if finite else None,
            unit=QUANTITIES[options.quantity].unit,
            accuracy_bound=look.accuracy_bound,
            loss_bound=look.loss_bound,
            certified=look.certified,
        )
        return look

    def _look_at(
        self,
        sample: Sequence[str],
        errors: Sequence[float],
        selection: Mapping[str, Any],
        pool: Mapping[str, Atoms],
    ) -> Look:
        later = {*selection["audit"], *selection.get("batch", ())}
        before = [key for key in pool if key not in later]
        known = set(self.store.keys("reference", LabelStatus.ok))
        failed_keys = set(self._decided()) - known
        counts = PoolCounts(
            n_pool=len(pool),
            n_labelled=sum(key in known for key in before),
            n_failed=sum(key in failed_keys for key in before),
        )
        if counts.n_inference != selection["open"]:
            raise OrbcalcError(
                f"{self.files.selection} was drawn from {selection['open']} unlabelled structures, "
                f"but {counts.n_inference} are unlabelled now: {self.folder.labels} was changed "
                f"by something else than this run, so nothing can be proved. Begin another run."
            )
        failed = np.array([key not in known for key in sample], dtype=bool)
        return take_look(counts, errors, failed, self.config.certificate, number=self.number)

    def _error(self, key: str, n_atoms: int, selection: Mapping[str, Any]) -> float:
        label = self.store.get(key, "reference")
        prediction = selection["predictions"].get(key)
        if label is None or label.status is not LabelStatus.ok or prediction is None:
            return float("nan")
        quantity = self.config.certificate.quantity
        return prediction_error(quantity, prediction, label.values, n_atoms)

    # ------------------------------------------------------------------------ training
    def train(self, pool: Mapping[str, Atoms]) -> None:
        """Train a committee on everything labelled so far."""
        if self.files.model.exists():
            return
        if not self.files.train.exists():
            write_training_set(
                self.files,
                pool,
                self.store,
                self.config,
                seed=int(self._rng("training").integers(2**31)),
                start_from=self.committee if self.config.warm_start else None,
                features=self.folder.features.model,
            )
        self._train(self.files, "trained")

    def _train(self, files: RoundFiles, event: str) -> None:
        found = train_committee(
            self.executor,
            files.train,
            self.folder.metrics,
            self.number,
            self.config.device,
            lambda record: self.notify({"event": "training", **record}),
        )
        self._event(event, model=str(files.model.absolute()), **found)

    # ----------------------------------------------------------------------------- end
    def finish(self, pool: Mapping[str, Atoms], look: Look | None) -> None:
        """Write what the round came to, which completes it."""
        ok = set(self.store.keys("reference", LabelStatus.ok))
        summary = {
            "round": self.number,
            "pool": len(pool),
            "labelled": len(ok),
            "failed": len(set(self._decided()) - ok),
            "look": None if look is None else vars(look),
        }
        write_json(self.files.summary, summary)
        self._event("round", **summary)

    def _event(self, name: str, **details: Any) -> None:
        record = self.folder.event(name, **{"round": self.number, **details})
        logger.info("%s", record)
        self.notify(record)

    def _rng(self, purpose: Stream) -> np.random.Generator:
        return stream(self.config.seed, self.number, purpose)
