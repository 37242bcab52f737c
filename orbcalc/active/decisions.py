"""The decisions of inference set design: what to label, what that proves, when to end.

The active-learning loop and :class:`orbcalc.active.design.InferenceSetDesign` take them here, in
their own orders of work. Nothing here knows of atoms.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Int

from orbcalc.active.certificate import (
    Look,
    PoolCounts,
    audit_look,
    clipped_losses,
    hits,
    kl_batch_look,
    recompute,
)
from orbcalc.active.selection import draw_audit, select_batch
from orbcalc.config import CertificateConfig, SelectionConfig, StopConfig

__all__ = [
    "choose_audit",
    "choose_batch",
    "is_decided",
    "next_part",
    "reason_to_end",
    "stream",
    "take_look",
]

Indices = Int[np.ndarray, " k"]
Stream = Literal["training", "audit", "batch", "md", "order"]

#: Share of a batch that an audit has before it is given up.
PATIENCE = 0.05

#: Misses of a model that is good enough to be proved so with few labels, of those allowed.
GOOD = 0.25

#: How many structures of such a model an audit is thought to have seen already when its end is
#: foreseen, if its patience is not larger: at most so many, and such a part of it.
PRIOR, PRIOR_SHARE = 80, 0.2

#: Independent random streams of a round.
_STREAMS: dict[Stream, int] = {"training": 0, "audit": 1, "batch": 2, "md": 3, "order": 4}


def stream(seed: int, number: int, purpose: Stream) -> np.random.Generator:
    """Return the random stream of one purpose in one round, the same after a resume."""
    return np.random.default_rng([seed, number, _STREAMS[purpose]])


def choose_audit(
    n_candidates: int, options: SelectionConfig, *, budget: int | None, seed: int, number: int
) -> Indices:
    """Draw the audit of a round: positions, in the random order in which they are labelled.

    Parameters
    ----------
    n_candidates
        Size of the inference set.
    options
        Has the size.
    budget
        How many may still be labelled. None: no limit.
    seed, number
        Of the run and the round; they make the random streams.
    """
    size = options.audit if budget is None else min(options.audit, max(budget, 0))
    audit = draw_audit(n_candidates, size, stream(seed, number, "audit"))
    order: Indices = stream(seed, number, "order").permutation(audit)
    return order


def choose_batch(
    scores: npt.ArrayLike,
    options: SelectionConfig,
    *,
    budget: int | None,
    seed: int,
    number: int,
    features: npt.ArrayLike | None = None,
    costs: npt.ArrayLike | None = None,
) -> Indices:
    """Select the batch of a round: positions, in the order of choice.

    Parameters
    ----------
    scores
        (n,) of the candidates, higher is harder.
    options
        Size and method.
    budget, seed, number
        As in :func:`choose_audit`.
    features, costs
        As in :func:`orbcalc.active.selection.select_batch`.

    Raises
    ------
    ConfigError
        As :func:`orbcalc.active.selection.select_batch`.
    """
    return select_batch(
        options.method,
        scores,
        options.batch if budget is None else min(options.batch, max(budget, 0)),
        features=features,
        costs=costs,
        diversity=options.diversity,
        rng=stream(seed, number, "batch"),
    )


def next_part(done: int, size: int, selection: SelectionConfig, options: CertificateConfig) -> int:
    """Return how many of a sample are labelled next, after those that are."""
    step = selection.audit_step if options.method == "sequential" else size
    return min(step, size - done)


def take_look(
    counts: PoolCounts,
    errors: npt.ArrayLike,
    failed: npt.ArrayLike,
    options: CertificateConfig,
    *,
    number: int,
) -> Look:
    """Compare the predictions of a sample with its labels, by the method of a configuration.

    Parameters
    ----------
    counts
        The pool without the sample's labels.
    errors
        (s,) prediction minus label of the audit (or, for ``kl_batch``, of the batch) in the order
        in which they were drawn; NaN where there is no prediction.
    failed
        (s,) booleans: the label failed. Such a structure is a miss whatever its error says.
    options
        Method, tolerance and risks.
    number
        Of the look, from 1.

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
        terms["losses"] = clipped_losses(error, options.tolerance)
        terms["max_loss"] = options.mean_error / options.tolerance
    return audit_look(counts, hit, failed=fail, method=options.method, **terms)


def is_decided(
    look: Look, size: int, selection: SelectionConfig, options: CertificateConfig
) -> bool:
    """Tell whether an audit that has come so far is ended.

    It is where the look is certified, and where it will hardly be: if the rest of the audit is as
    it has been so far, then nothing is proved at its end. That is not believed of few structures
    where a batch, which is the price of giving up, is large; and others, of a model that is good
    enough, are counted beside them. An audit that is too small to prove even such a model good ends
    where all that is unlabelled would miss the target, if it is as the audit.

    Parameters
    ----------
    look
        What the audit proves so far.
    size
        Structures that were drawn for it.
    selection, options
        Of the run.
    """
    if look.certified:
        return True
    patience = PATIENCE * selection.batch
    if look.n_audit < patience:
        return False
    if look.losses is not None and options.mean_error is not None:
        most = options.mean_error / options.tolerance * look.n_pool
        if _wrong_at_last(look, math.fsum(look.losses) / max(look.n_audit, 1)) > most:
            return True
    allowed = (1 - options.accuracy) * look.n_pool
    good = max(allowed - look.n_failed, 0.0) / max(look.n_inference, 1) * GOOD
    start = replace(look, n_audit=0, n_audit_misses=0, n_audit_failed=0)
    if _proves(start, size, good, options):
        others = max(min(PRIOR, PRIOR_SHARE * size), patience)
        rate = (look.n_audit_misses + others * good) / (look.n_audit + others)
        # The end of an audit of nearly all that is open proves it by labels alone.
        return _wrong_at_last(look, rate) > allowed or not _proves(look, size, rate, options)
    return _wrong_at_last(look, look.n_audit_misses / max(look.n_audit, 1)) > allowed


def _wrong_at_last(look: Look, rate: float) -> float:
    """Return what of the pool is wrong when an audit with this rate has seen all that is open."""
    rest = look.n_inference - look.n_audit
    return look.n_failed + look.n_audit_failed + rest * rate


def _proves(look: Look, size: int, rate: float, options: CertificateConfig) -> bool:
    """Tell whether an audit that goes on with this rate of misses is certified at its end."""
    rest = max(size - look.n_audit, 0)
    end = replace(
        look,
        n_audit=look.n_audit + rest,
        n_audit_misses=look.n_audit_misses + min(round(rest * rate), rest),
        losses=None,
    )
    delta = options.delta if look.losses is None else options.delta / 2
    return recompute(end, look.look, gamma=options.accuracy, delta=delta).certified


def reason_to_end(
    look: Look, stop: StopConfig, options: CertificateConfig, *, grows: bool = False
) -> str | None:
    """Say why a run ends with a look; None if it goes on.

    Unless the pool `grows`, it is over when all of it is labelled, and when more labels failed
    than may: what failed stays wrong, and nothing can be certified any more.
    """
    # As of this look: a run that goes on after a kill may have labelled more already.
    labelled = look.n_labelled + look.n_failed + look.n_audit
    if look.certified:
        return "certified"
    if look.look >= stop.max_rounds:
        return "max_rounds"
    if stop.max_labels is not None and labelled >= stop.max_labels:
        return "max_labels"
    if grows:
        return None
    if look.n_inference == look.n_audit:
        return "pool exhausted"
    lost = look.n_failed + look.n_audit_failed
    if lost > (1 - options.accuracy) * look.n_pool + 1e-6:
        return "too many failed labels"
    return None
