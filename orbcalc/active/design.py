"""Inference set design for any predictor: label the hard part, predict the rest, stop by proof.

The decisions of the active-learning loop (:mod:`orbcalc.active.decisions`), without the loop, for
any model of any kind of object (idea: arXiv 2410.19631). Nothing here loads torch, Dask or ASE;
predictions and scores come in as arrays, indices go out.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float

import orbcalc
from orbcalc.active.certificate import Certificate, Look, PoolCounts
from orbcalc.active.decisions import (
    Indices,
    choose_audit,
    choose_batch,
    is_decided,
    next_part,
    reason_to_end,
    stream,
    take_look,
)
from orbcalc.active.selection import as_count, draw_audit
from orbcalc.config import CertificateConfig, SelectionConfig, StopConfig
from orbcalc.errors import ConfigError

__all__ = ["InferenceSetDesign", "largest_errors"]


class InferenceSetDesign:
    """Choose what to label in a pool of n objects, and say when the predictions are good enough.

    ::

        design = InferenceSetDesign(len(x))
        labels = np.full(len(x), np.nan)
        predictions = scores = None
        while not design.is_done:
            if design.awaits_model:
                known = design.labelled
                predictions, scores = fit_and_predict(x[known], labels[known], x)
            indices = design.ask(predictions, scores)
            labels[indices] = measure(indices)              # NaN where that fails
            design.tell(indices, labels[indices])
        print(design.certificate.statement)

    The first request is random. From then on a round is: fit a model (``awaits_model``), ask for
    the audit and tell its labels, part by part until they decide, which is a look and may end the
    design, ask for the batch, tell its labels. Predictions are taken down before the labels of
    the audit are asked for; a model must not be fitted to labels that it did not ask for in this
    way.

    Parameters
    ----------
    n_pool
        Number of objects. Duplicates harm no bound, but each is labelled and counted on its own.
    selection, certificate, stop
        As in the configuration of ``orbcalc run``. A hit has ``|prediction - label| <=
        tolerance``; for classes, use whole numbers and a tolerance of 0.5.
    seed
        Decides all draws.
    quantity
        What the tolerance applies to, with its unit, for the certificate.
    name
        Of the pool, for the certificate.
    objects
        What the pool is made of, in the plural, for the certificate.

    Raises
    ------
    ConfigError
        If the pool is empty.
    """

    def __init__(
        self,
        n_pool: int,
        *,
        selection: SelectionConfig | None = None,
        certificate: CertificateConfig | None = None,
        stop: StopConfig | None = None,
        seed: int = 0,
        quantity: str = "absolute error",
        name: str = "pool",
        objects: str = "objects",
    ) -> None:
        PoolCounts(n_pool, 0, 0)  # checks the number
        self.n_pool, self.seed = n_pool, as_count(seed, "seed")
        self.quantity, self.name, self.objects = quantity, name, objects
        self.selection = selection or SelectionConfig()
        self.rules = certificate or CertificateConfig()
        self.stop = stop or StopConfig()
        self.looks: list[Look] = []
        self._state = np.zeros(n_pool, dtype=np.int8)  # 0 open, 1 labelled, -1 failed
        self._asked: Indices | None = None  # what must be told next
        self._sample: _Sample | None = None  # the look that is being taken
        self._hardness: _Hardness | None = None  # of what is asked for after the audit
        self._model_hash = ""
        self._reason: str | None = None

    # ------------------------------------------------------------------------ questions
    @property
    def labelled(self) -> Indices:
        """Indices of all objects with a label."""
        return np.flatnonzero(self._state == 1)

    @property
    def is_done(self) -> bool:
        """Whether the design has ended, with a certificate or without."""
        return self._reason is not None

    @property
    def awaits_model(self) -> bool:
        """Whether the next request needs predictions and scores of a model fitted anew."""
        started = bool((self._state != 0).any())
        busy = (self._asked, self._sample, self._hardness)
        return started and not self.is_done and all(part is None for part in busy)

    @property
    def certificate(self) -> Certificate:
        """What is proved.

        Raises
        ------
        ConfigError
            If the design has not ended.
        """
        if self._reason is None:
            raise ConfigError("the design has not ended: go on asking until is_done")
        return Certificate(
            reason=self._reason,
            looks=tuple(self.looks),
            tolerance=self.rules.tolerance,
            quantity=self.quantity,
            gamma=self.rules.accuracy,
            delta=self.rules.delta,
            seed=self.seed,
            n_pool=self.n_pool,
            pool_hash=self.name,
            model_hash=self._model_hash,
            version=orbcalc.__version__,
            mean_error=self.rules.mean_error,
            objects=self.objects,
            not_covered=f"{self.objects} met later",
        )

    # ----------------------------------------------------------------------- ask and tell
    def ask(
        self,
        predictions: npt.ArrayLike | None = None,
        scores: npt.ArrayLike | None = None,
        *,
        features: npt.ArrayLike | None = None,
        costs: npt.ArrayLike | None = None,
    ) -> Indices:
        """Return the indices of what is to be labelled now; asked again, the same ones.

        Parameters
        ----------
        predictions, scores
            (n, ...) and (n,) for the whole pool, higher scores being harder; needed where
            ``awaits_model`` and ignored elsewhere. NaN: no prediction, and the hardest.
        features, costs
            As in :func:`orbcalc.active.selection.select_batch`, for the whole pool.

        Returns
        -------
        indices
            Empty if the budget leaves nothing to label, or the pool is used up: tell that, too.

        Raises
        ------
        ConfigError
            If the design has ended, or predictions or scores are missing or of a wrong shape.
        """
        if self.is_done:
            raise ConfigError("the design has ended: nothing is to be labelled any more")
        if self._asked is not None:
            return self._asked.copy()
        if self.awaits_model:
            self._ask_model(predictions, _Hardness(scores, features, costs))
        if self._sample is not None:
            done, size = len(self._sample.errors), len(self._sample.indices)
            part = next_part(done, size, self.selection, self.rules)
            self._asked = self._sample.indices[done : done + part]
        elif self._hardness is not None:
            self._asked = self._choose_batch(self._hardness, len(self.looks))
            self._hardness = None
        else:
            size = min(self.selection.initial, self.stop.max_labels or self.n_pool)
            self._asked = draw_audit(self.n_pool, size, stream(self.seed, 0, "batch"))
        return self._asked.copy()  # the caller may sort it; what is told must be in this order

    def tell(
        self, indices: npt.ArrayLike, labels: npt.ArrayLike, *, failed: npt.ArrayLike | None = None
    ) -> Look | None:
        """Take down labels of what was asked for.

        Parameters
        ----------
        indices
            As :meth:`ask` returned them.
        labels
            (k, ...) in the same order, of the shape of the predictions. Where a label has more
            than one number, its error is the largest one.
        failed
            (k,) booleans; by default, a label with a NaN has failed.

        Returns
        -------
        look
            What the labels prove, if they were the last ones of a sample for that; else None.

        Raises
        ------
        ConfigError
            If these are not the indices asked for, or the labels have a wrong shape.
        """
        asked, told = self._asked, np.asarray(indices)
        if asked is None or told.shape != asked.shape or not (told == asked).all():
            raise ConfigError("these are not the indices that were asked for: pass what ask gave")
        values = np.asarray(labels, dtype=np.float64)
        if len(values) != len(asked):
            raise ConfigError(f"{len(values)} labels for {len(asked)} indices")
        fail = np.isnan(largest_errors(values))
        if failed is not None:
            fail = fail | np.asarray(failed, dtype=bool)
        look = None if self._sample is None else self._look(self._sample, values, fail)
        self._state[asked] = np.where(fail, -1, 1)
        self._asked = None
        return look

    # ---------------------------------------------------------------------------- inside
    @property
    def _budget(self) -> int | None:
        limit = self.stop.max_labels
        return None if limit is None else max(limit - int((self._state != 0).sum()), 0)

    def _ask_model(self, predictions: npt.ArrayLike | None, hardness: _Hardness) -> None:
        """Take down what a model says, and what its look will be taken at."""
        if predictions is None or hardness.scores is None:
            raise ConfigError("a model is awaited: ask with its predictions and scores")
        values = np.asarray(predictions, dtype=np.float64)
        for name, array in (("predictions", values), ("scores", np.asarray(hardness.scores))):
            if array.shape[:1] != (self.n_pool,):
                raise ConfigError(f"{name} have shape {array.shape} for a pool of {self.n_pool}")
        number = len(self.looks) + 1
        # Also where the audit comes first: what is wrong is told before any label is paid for.
        indices = self._choose_batch(hardness, number)
        if self.rules.by_audit:
            open_ = np.flatnonzero(self._state == 0)
            indices = open_[choose_audit(len(open_), self.selection, **self._terms(number))]
            # Copies: what was said before the labels counts.
            self._hardness = _Hardness(*(None if v is None else np.array(v) for v in hardness))
        counts = PoolCounts(
            self.n_pool, int((self._state == 1).sum()), int((self._state == -1).sum())
        )
        nothing = np.zeros(0), np.zeros(0, dtype=bool)
        self._sample = _Sample(indices, values[indices], counts, *nothing)
        self._model_hash = hashlib.sha256(values.tobytes()).hexdigest()[:16]

    def _choose_batch(self, hardness: _Hardness, number: int) -> Indices:
        open_ = np.flatnonzero(self._state == 0)
        scores, features, costs = (None if v is None else np.asarray(v)[open_] for v in hardness)
        assert scores is not None
        terms = {"features": features, "costs": costs, **self._terms(number)}
        batch: Indices = open_[choose_batch(scores, self.selection, **terms)]
        return batch

    def _terms(self, number: int) -> dict[str, Any]:
        """Return what every choice of a round depends on."""
        return {"budget": self._budget, "seed": self.seed, "number": number}

    def _look(
        self, sample: _Sample, labels: npt.NDArray[np.float64], failed: Bool[np.ndarray, " k"]
    ) -> Look | None:
        """Take the look, or what there is of it; None if it goes on."""
        done = len(sample.errors)
        predictions = sample.predictions[done : done + len(labels)]
        if len(labels) and predictions.shape != labels.shape:
            raise ConfigError(
                f"labels have shape {labels.shape}, but their predictions {predictions.shape}"
            )
        errors = largest_errors(predictions - labels) if len(labels) else np.zeros(0)
        sample = sample._replace(
            errors=np.concatenate([sample.errors, errors]),
            failed=np.concatenate([sample.failed, failed]),
        )
        number = len(self.looks) + 1
        look = take_look(sample.counts, sample.errors, sample.failed, self.rules, number=number)
        if look.n_audit < len(sample.indices) and not is_decided(
            look, len(sample.indices), self.selection, self.rules
        ):
            self._sample = sample
            return None
        self._sample = None
        self.looks.append(look)
        self._reason = reason_to_end(look, self.stop, self.rules)
        return look


class _Hardness(NamedTuple):
    """What a model says of the pool beside its predictions, as `ask` is given it."""

    scores: npt.ArrayLike | None
    features: npt.ArrayLike | None
    costs: npt.ArrayLike | None


class _Sample(NamedTuple):
    """What a look is taken at, and what has been told of it."""

    indices: Indices
    predictions: npt.NDArray[np.float64]
    counts: PoolCounts
    """Of the pool without it."""
    errors: npt.NDArray[np.float64]
    failed: Bool[np.ndarray, " k"]


def largest_errors(differences: npt.ArrayLike) -> Float[np.ndarray, " n"]:
    """Return the largest absolute number of each row; NaN if there is one.

    Examples
    --------
    >>> largest_errors([[3.0, -4.0], [0.0, float("nan")]]).tolist()
    [4.0, nan]
    """
    array = np.abs(np.asarray(differences, dtype=np.float64))
    largest: Float[np.ndarray, " n"] = array.max(axis=tuple(range(1, array.ndim)), initial=0.0)
    return largest
