"""Inference set design for any predictor: label the hard part, predict the rest, stop by proof.

The decisions of the active-learning loop, without the loop: `orbcalc run` takes its own through
the functions of this module, and :class:`InferenceSetDesign` offers them to any model of any
kind of object (idea: arXiv 2410.19631). Nothing here loads torch, Dask or ASE; predictions and
scores come in as arrays, indices go out.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int

import orbcalc
from orbcalc.active.certificate import (
    Certificate,
    Look,
    PoolCounts,
    audit_look,
    clipped_losses,
    hits,
    kl_batch_look,
)
from orbcalc.active.selection import as_count, draw_audit, select_batch
from orbcalc.config import CertificateConfig, SelectionConfig, StopConfig
from orbcalc.errors import ConfigError

__all__ = ["Choice", "InferenceSetDesign", "choose", "reason_to_end", "stream", "take_look"]

Indices = Int[np.ndarray, " k"]
Stream = Literal["training", "audit", "batch", "md", "order"]

#: Independent random streams of a round.
_STREAMS: dict[Stream, int] = {"training": 0, "audit": 1, "batch": 2, "md": 3, "order": 4}


# --------------------------------------------------------------- decisions, as functions
class Choice(NamedTuple):
    """What to label in a round: positions among the candidates."""

    audit: Indices
    """Drawn uniformly, sorted."""
    batch: Indices
    """Chosen from the others, in the order of choice."""


def stream(seed: int, number: int, purpose: Stream) -> np.random.Generator:
    """Return the random stream of one purpose in one round, the same after a resume."""
    return np.random.default_rng([seed, number, _STREAMS[purpose]])


def choose(
    scores: npt.ArrayLike,
    options: SelectionConfig,
    *,
    audited: bool,
    budget: int | None,
    seed: int,
    number: int,
    features: npt.ArrayLike | None = None,
    costs: npt.ArrayLike | None = None,
) -> Choice:
    """Draw the audit of a round, then select its batch from the other candidates.

    Parameters
    ----------
    scores
        (n,) of the candidates, higher is harder, by the model that is frozen now.
    options
        Sizes and the method of selection.
    audited
        Whether an audit is drawn at all.
    budget
        How many may still be labelled; the audit comes first. None: no limit.
    seed, number
        Of the run and the round; they make the random streams.
    features, costs
        As in :func:`orbcalc.active.selection.select_batch`, for all candidates.

    Raises
    ------
    ConfigError
        As :func:`orbcalc.active.selection.select_batch`.
    """
    hardness = np.asarray(scores, dtype=np.float64)
    most = len(hardness) if budget is None else max(budget, 0)
    size = min(options.audit, most) if audited else 0
    audit = draw_audit(len(hardness), size, stream(seed, number, "audit"))
    rest = np.delete(np.arange(len(hardness)), audit)
    batch = select_batch(
        options.method,
        hardness[rest],
        min(options.batch, most - len(audit)),
        features=None if features is None else np.asarray(features)[rest],
        costs=None if costs is None else np.asarray(costs)[rest],
        diversity=options.diversity,
        rng=stream(seed, number, "batch"),
    )
    return Choice(audit, rest[batch])


def take_look(
    counts: PoolCounts,
    errors: npt.ArrayLike,
    failed: npt.ArrayLike,
    options: CertificateConfig,
    *,
    seed: int,
    number: int,
) -> Look:
    """Compare the predictions of a sample with its labels, by the method of a configuration.

    Parameters
    ----------
    counts
        The pool without the sample's labels.
    errors
        (s,) prediction minus label of the audit (or, for ``kl_batch``, of the batch); NaN where
        there is no prediction.
    failed
        (s,) booleans: the label failed. Such a structure is a miss whatever its error says.
    options
        Method, tolerance and risks.
    seed, number
        Of the run and the round. The number, from 1, is that of the look.

    Raises
    ------
    ConfigError
        As :func:`orbcalc.active.looks.audit_look`.
    """
    error = np.where(np.asarray(failed, dtype=bool), np.nan, np.asarray(errors, dtype=np.float64))
    fail: Bool[np.ndarray, " s"] = np.asarray(failed, dtype=bool)
    hit = hits(error, options.tolerance)
    terms: dict[str, Any] = {"look": number, "gamma": options.accuracy, "delta": options.delta}
    if options.method == "kl_batch":
        return kl_batch_look(counts, hit, failed=fail, **terms)
    if options.mean_error is not None:
        order = stream(seed, number, "order").permutation(len(error))
        terms["losses"] = clipped_losses(error[order], options.tolerance)
        terms["max_loss"] = options.mean_error / options.tolerance
        hit, fail = hit[order], fail[order]
    return audit_look(counts, hit, failed=fail, **terms)


def reason_to_end(look: Look, stop: StopConfig) -> str | None:
    """Say why a run ends with a look; None if it goes on."""
    # As of this look: a run that goes on after a kill may have labelled more already.
    labelled = look.n_labelled + look.n_failed + look.n_audit
    if look.certified:
        return "certified"
    if look.look >= stop.max_rounds:
        return "max_rounds"
    if stop.max_labels is not None and labelled >= stop.max_labels:
        return "max_labels"
    if look.n_inference == look.n_audit:
        return "pool exhausted"
    return None


# ------------------------------------------------------------------------ any predictor
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
    the audit, tell its labels, which is a look and may end the design, ask for the batch, tell its
    labels. Predictions are taken down before the labels of the audit are asked for; a model must
    not be fitted to labels that it did not ask for in this way.

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
        self._batch: Indices | None = None  # what is asked for after the audit
        self._predictions: npt.NDArray[np.float64] | None = None  # of what was asked
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
        return started and not self.is_done and self._asked is None and self._batch is None

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
            return self._asked
        if self._batch is not None:
            self._asked, self._batch = self._batch, None
        elif self.awaits_model:
            self._asked = self._ask_model(predictions, scores, features, costs)
        else:
            size = min(self.selection.initial, self.stop.max_labels or self.n_pool)
            self._asked = draw_audit(self.n_pool, size, stream(self.seed, 0, "batch"))
        return self._asked

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
            What the labels prove, if they were those of a sample for that; else None.

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
        look = None if self._predictions is None else self._look(values, fail)
        self._state[asked] = np.where(fail, -1, 1)
        self._asked = self._predictions = None
        if self._batch is not None and len(self._batch) == 0:
            self._batch = None
        return look

    # ---------------------------------------------------------------------------- inside
    @property
    def _budget(self) -> int | None:
        limit = self.stop.max_labels
        return None if limit is None else max(limit - int((self._state != 0).sum()), 0)

    def _ask_model(
        self,
        predictions: npt.ArrayLike | None,
        scores: npt.ArrayLike | None,
        features: npt.ArrayLike | None,
        costs: npt.ArrayLike | None,
    ) -> Indices:
        if predictions is None or scores is None:
            raise ConfigError("a model is awaited: ask with its predictions and scores")
        values, hardness = np.asarray(predictions, dtype=np.float64), np.asarray(scores)
        for name, array in (("predictions", values), ("scores", hardness)):
            if array.shape[:1] != (self.n_pool,):
                raise ConfigError(f"{name} have shape {array.shape} for a pool of {self.n_pool}")
        candidates = np.flatnonzero(self._state == 0)
        audited = self.rules.method == "hypergeometric"
        choice = choose(
            hardness[candidates],
            self.selection,
            audited=audited,
            budget=self._budget,
            seed=self.seed,
            number=len(self.looks) + 1,
            features=None if features is None else np.asarray(features)[candidates],
            costs=None if costs is None else np.asarray(costs)[candidates],
        )
        batch = candidates[choice.batch]
        sample: Indices = candidates[choice.audit] if audited else batch
        self._batch = batch if audited else None
        self._predictions = values[sample]
        self._model_hash = hashlib.sha256(values.tobytes()).hexdigest()[:16]
        return sample

    def _look(self, labels: npt.NDArray[np.float64], failed: Bool[np.ndarray, " k"]) -> Look:
        predictions = self._predictions
        assert predictions is not None
        if len(labels) and predictions.shape != labels.shape:
            raise ConfigError(
                f"labels have shape {labels.shape}, but their predictions {predictions.shape}"
            )
        counts = PoolCounts(
            self.n_pool, int((self._state == 1).sum()), int((self._state == -1).sum())
        )
        number = len(self.looks) + 1
        look = take_look(
            counts,
            largest_errors(predictions - labels) if len(labels) else np.zeros(0),
            failed,
            self.rules,
            seed=self.seed,
            number=number,
        )
        self.looks.append(look)
        self._reason = reason_to_end(look, self.stop)
        return look


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
