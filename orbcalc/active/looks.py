"""Prove, from a few labels, that predictions for a whole pool are good enough.

A pool of N structures is divided into labelled ones, ones whose label failed, and the inference
set I, which the model predicts. The *output* for the pool is the reference label where there is
one and the prediction elsewhere. A structure of I is a **hit** if its prediction is within the
tolerance of its label, and a **miss** otherwise; it is also a miss if its label would fail, for
then nothing can be verified. Labelled structures are right in the output, failed ones wrong for
ever. Nothing here knows of atoms: arrays of hits go in, a decision comes out.

At a look, s structures of I are labelled before any training on them; k of them are misses,
f <= k of these because their label failed. If I holds M misses, then afterwards

- k - f misses have been repaired, because their labels now stand in the output;
- f labels have failed and stay wrong, in addition to the n_failed earlier ones;
- M - k misses are left among the structures of I that were not labelled.

An upper bound U on M thus gives ``accuracy >= 1 - (n_failed + f + U - k) / N``. Labels that fail
by accident (a lost worker) do no harm: they turn hits of the sample into misses, and U(k) - k
never falls as k grows. The bound concerns the model that was looked at: release that one, not
one trained later.

Losses in [0, 1] are counted in a like way: 0 for what is labelled, 1 for what failed. If they
add up to L over I and to l over those structures of the sample whose label did not fail, then an
upper bound U on L gives ``mean loss of the output <= (n_failed + f + U - l) / N``. A label that
failed is bet on as a loss of 1, which makes U no smaller than the loss that it hides would; but
that loss is not known, and what is not known must not be taken from U (U - l may fall as l
grows). So a label that fails by accident does no harm, and one that always fails counts twice.
A loss is an error clipped at the tolerance, in units of it, so that every hit is also told *how*
near it is, and the share of the pool for which clipping hides something is bounded by the hits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool

from orbcalc.active.bounds import (
    checked_errors,
    kl_lower_bound,
    look_level,
    max_mean,
    max_misses,
    max_misses_sequential,
)
from orbcalc.active.selection import as_count
from orbcalc.errors import ConfigError

__all__ = [
    "AuditMethod",
    "Look",
    "PoolCounts",
    "audit_look",
    "hits",
    "kl_batch_look",
    "recompute",
]

AuditMethod = Literal["sequential", "hypergeometric"]
Method = Literal[AuditMethod, "kl_batch"]


def hits(errors: npt.ArrayLike, tolerance: float) -> Bool[np.ndarray, " n"]:
    """Tell which errors are within the tolerance; NaN and infinite ones are not.

    Parameters
    ----------
    errors
        (n,) prediction minus reference.
    tolerance
        Largest absolute error of a hit, in the unit of the errors.

    Raises
    ------
    ConfigError
        If the errors are no one-axis array, or the tolerance is not finite and positive.

    Examples
    --------
    >>> hits([0.001, -0.02, float("nan")], 0.005).tolist()
    [True, False, False]
    """
    found: Bool[np.ndarray, " n"] = np.abs(checked_errors(errors, tolerance)) <= tolerance
    return found


@dataclass(frozen=True)
class PoolCounts:
    """State of the pool when a sample is drawn, without that sample's labels."""

    n_pool: int
    n_labelled: int
    n_failed: int

    def __post_init__(self) -> None:
        """Check that the parts fit into the pool."""
        for name in ("n_pool", "n_labelled", "n_failed"):
            object.__setattr__(self, name, as_count(getattr(self, name), name))
        if self.n_pool == 0:
            raise ConfigError("the pool is empty: there is nothing to certify")
        if self.n_labelled + self.n_failed > self.n_pool:
            raise ConfigError(
                f"{self.n_labelled} labelled and {self.n_failed} failed structures in a pool of "
                f"{self.n_pool}: count each structure once, and only those of the pool"
            )

    @property
    def n_inference(self) -> int:
        """Size of the inference set, the sample included."""
        return self.n_pool - self.n_labelled - self.n_failed


@dataclass(frozen=True)
class Look:
    """One look at the pool; counts are from before the sample was labelled."""

    look: int
    method: Method
    n_pool: int
    n_labelled: int
    n_failed: int
    n_inference: int
    n_audit: int
    n_audit_misses: int
    n_audit_failed: int
    level: float
    misses_bound: int
    """Most misses left among the structures of I that were not sampled (U - k)."""
    accuracy_bound: float
    """Lower bound on the share of the pool that is right in the output."""
    certified: bool
    losses: Sequence[float] | None = None
    """Losses of the sample in the order they were bet on, if the mean loss is certified too."""
    loss_bound: float | None = None
    """Upper bound on the mean loss of the output."""

    def __post_init__(self) -> None:
        """Take the losses as JSON has them."""
        if self.losses is not None:
            object.__setattr__(self, "losses", tuple(self.losses))

    @property
    def n_right(self) -> int:
        """Least number of structures of the pool that are right in the output."""
        return self.n_pool - self.n_failed - self.n_audit_failed - self.misses_bound


class _Sample(NamedTuple):
    size: int
    misses: int
    failed: int
    losses: Sequence[float] | None = None


class _Terms(NamedTuple):
    look: int
    gamma: float
    delta: float
    max_loss: float = 1.0


def audit_look(
    counts: PoolCounts,
    sample_hits: npt.ArrayLike,
    *,
    failed: npt.ArrayLike | None = None,
    look: int,
    gamma: float,
    delta: float,
    losses: npt.ArrayLike | None = None,
    max_loss: float = 1.0,
    method: AuditMethod = "hypergeometric",
) -> Look:
    """Bound the accuracy of the pool from a random audit, exactly.

    The sample must be drawn uniformly without replacement from the inference set, with
    randomness that the frozen model and the division of the pool do not depend on
    (:func:`orbcalc.active.selection.draw_audit`). With the method ``hypergeometric`` its size
    must not depend on its labels. With ``sequential`` it may be labelled in a random order, be
    looked at after any part of it, and end where one likes: this function may be called again and
    again with more of it and the same number of the look. Everything may depend on earlier
    looks: given that past, each bound fails with probability at most its level, so by the
    union bound the probability that *any* look's bound is false is at most
    ``sum_t delta / (t (t+1)) = delta``, whenever the loop stops.

    An empty sample is allowed: everything not labelled then counts as wrong, which is how a
    wholly labelled pool is certified.

    Parameters
    ----------
    counts
        The pool without the sample's labels. Structures labelled together with the sample (a
        hardest batch, chosen before the draw and not drawn from) may already be counted.
    sample_hits
        (s,) booleans of *all* drawn structures; one without a verified prediction is False.
    failed
        (s,) booleans: the label failed or is missing. Such a structure is a miss of the sample,
        and stays wrong in the output. Default: no label failed.
    look
        1 at the first look, counting every look whose result may end the loop.
    gamma
        Share of the pool that must be right.
    delta
        Probability, over all looks, that a certificate may be false.
    losses
        (s,) errors clipped at the tolerance, in units of it
        (:func:`orbcalc.active.bounds.clipped_losses`), 1 where the label failed. They are bet on
        in the order given, so **shuffle the sample first**. If given, the look's level is halved:
        one half pays for the bound on hits, one for the bound on the mean loss
        (:func:`orbcalc.active.bounds.max_mean`), and a certificate needs both.
    max_loss
        Mean loss of the output that is certified at most.
    method
        Bound on the misses, :func:`orbcalc.active.bounds.max_misses` or
        :func:`orbcalc.active.bounds.max_misses_sequential`; that on losses holds for both.

    Raises
    ------
    ConfigError
        If a number is out of range, the sample exceeds the inference set, the arrays are not
        booleans of one shape, a failed label is called a hit, or losses do not fit the hits.

    Examples
    --------
    >>> counts = PoolCounts(n_pool=1000, n_labelled=300, n_failed=0)
    >>> audit_look(counts, [True] * 100, look=1, gamma=0.95, delta=0.05).accuracy_bound
    0.977
    """
    sample = _summarise(sample_hits, failed, losses)
    terms = _Terms(look, gamma, delta, max_loss)
    return _conclude(method, counts, sample, terms)


def kl_batch_look(
    counts: PoolCounts,
    batch_hits: npt.ArrayLike,
    *,
    failed: npt.ArrayLike | None = None,
    look: int,
    gamma: float,
    delta: float,
) -> Look:
    """Bound the accuracy of the pool from the acquired, hardest batch (arXiv 2410.19631).

    ``alpha = kl_lower_bound(accuracy of the batch before training on it)`` is taken for the
    accuracy over the inference set. **Two assumptions are made and neither is checked**: that
    accuracy on the hardest batch is no better than on the rest, and that a batch is a random
    sample. Where the model is confidently wrong, or the batch is chosen for diversity, they
    fail and so may the certificate: prefer :func:`audit_look`. The public code of the rule's
    authors contains no stopping rule.

    Under the assumptions M <= (1 - alpha) |I| fails with at most the look's level. The published
    rule, ``(|O| + alpha |I|) / N >= gamma``, is used with two refinements: the misses found in
    the batch are counted as repaired, as in an audit, and delta is divided among the looks.

    Parameters
    ----------
    counts
        The pool without the batch's labels.
    batch_hits, failed
        As in :func:`audit_look`, for the batch.
    look, gamma, delta
        As in :func:`audit_look`.

    Raises
    ------
    ConfigError
        As :func:`audit_look`.
    """
    batch = _summarise(batch_hits, failed)
    return _conclude("kl_batch", counts, batch, _Terms(look, gamma, delta))


def _summarise(
    sample_hits: npt.ArrayLike, failed: npt.ArrayLike | None, losses: npt.ArrayLike | None = None
) -> _Sample:
    hit = _booleans(sample_hits, "hits")
    fail = np.zeros_like(hit) if failed is None else _booleans(failed, "failed")
    if hit.shape != fail.shape:
        raise ConfigError(f"hits have shape {hit.shape}, but failed has {fail.shape}")
    if (hit & fail).any():
        raise ConfigError(
            f"structure {np.flatnonzero(hit & fail)[0]} of the sample is a hit although its label "
            f"failed: without a label nothing is verified, so it must be False"
        )
    sample = _Sample(len(hit), int((~hit).sum()), int(fail.sum()))
    if losses is None:
        return sample
    loss = np.asarray(losses, dtype=np.float64)
    if loss.shape != hit.shape or not (loss[fail] == 1).all():
        raise ConfigError(
            f"losses have shape {loss.shape} for {len(hit)} hits: expected one for each structure "
            f"of the sample, and 1 where the label failed"
        )
    return sample._replace(losses=tuple(loss.tolist()))


def _conclude(method: Method, counts: PoolCounts, sample: _Sample, terms: _Terms) -> Look:
    """Do the accounting that is proved at the top of this module."""
    look, gamma, delta, max_loss = terms
    for name, value in (("gamma", gamma), ("max_loss", max_loss)):
        if not 0 < value <= 1:
            raise ConfigError(f"{name} is {value}, expected a number in (0, 1]")
    level = look_level(delta, look) / (1 if sample.losses is None else 2)
    if not 0 <= sample.failed <= sample.misses <= sample.size:
        raise ConfigError(f"expected 0 <= failed <= misses <= size, got {sample}")
    n_inference = counts.n_inference
    if sample.size > n_inference:
        raise ConfigError(
            f"a sample of {sample.size} from an inference set of {n_inference}: "
            f"give the counts from before the sample was labelled"
        )
    if method == "hypergeometric":
        bound = max_misses(n_inference, sample.size, sample.misses, level)
    elif method == "sequential":
        allowed = math.floor((1 - gamma) * counts.n_pool + 1e-9) - counts.n_failed
        expected = min(max(allowed // 2, 0), n_inference)  # of a model that is good enough
        bound = max_misses_sequential(
            n_inference, sample.size, sample.misses, level, expected=expected
        )
    else:
        n_hits = sample.size - sample.misses
        alpha = kl_lower_bound(n_hits / max(sample.size, 1), sample.size, level)
        # Misses are a whole number, so the floor (1e-9: room for rounding, upwards only); the
        # hits that were seen are certain.
        bound = min(math.floor((1 - alpha) * n_inference + 1e-9), n_inference - n_hits)
    left = bound - sample.misses
    accuracy = (counts.n_pool - counts.n_failed - sample.failed - left) / counts.n_pool
    loss_bound = _loss_bound(counts, sample, level)
    return Look(
        look=as_count(look, "look"),
        method=method,
        **asdict(counts),
        n_inference=n_inference,
        n_audit=sample.size,
        n_audit_misses=sample.misses,
        n_audit_failed=sample.failed,
        level=level,
        misses_bound=left,
        accuracy_bound=accuracy,
        certified=accuracy >= gamma and (loss_bound is None or loss_bound <= max_loss),
        losses=sample.losses,
        loss_bound=loss_bound,
    )


def _loss_bound(counts: PoolCounts, sample: _Sample, level: float) -> float | None:
    """Bound the mean loss of the output; None if there are no losses."""
    if sample.losses is None:
        return None
    if len(sample.losses) != sample.size:
        raise ConfigError(f"{len(sample.losses)} losses for a sample of {sample.size}")
    n_inference = counts.n_inference
    seen = math.fsum(sample.losses) - sample.failed  # of these only that they failed is known
    bound = n_inference * float(max_mean(np.array(sample.losses), n_inference, level))
    left = min(max(bound - seen, 0.0), float(n_inference - sample.size))
    bound = (counts.n_failed + sample.failed + left) / counts.n_pool
    return math.ceil(bound * 1e6 - 1e-6) / 1e6  # upwards, so that every machine finds the same


def recompute(
    look: Look, number: int, *, gamma: float, delta: float, max_loss: float = 1.0
) -> Look:
    """Return what look ``number`` must be, given the method and the counts of a recorded one.

    Raises
    ------
    ConfigError
        If the method is unknown or the counts are impossible.
    """
    if look.method not in get_args(Method):
        raise ConfigError(f"look {number} has the unknown method {look.method!r}")
    if look.losses is not None and look.method == "kl_batch":
        raise ConfigError(f"look {number} has losses, but {look.method} says nothing about them")
    counts = PoolCounts(look.n_pool, look.n_labelled, look.n_failed)
    sample = _Sample(
        as_count(look.n_audit, "n_audit"),
        as_count(look.n_audit_misses, "n_audit_misses"),
        as_count(look.n_audit_failed, "n_audit_failed"),
        look.losses,
    )
    return _conclude(look.method, counts, sample, _Terms(number, gamma, delta, max_loss))


def _booleans(values: npt.ArrayLike, name: str) -> Bool[np.ndarray, " n"]:
    array = np.asarray(values)
    if array.shape == (0,):
        return np.zeros(0, dtype=bool)
    if array.ndim != 1 or array.dtype != np.bool_:
        raise ConfigError(
            f"{name} have shape {array.shape} and type {array.dtype}, expected (n,) booleans"
        )
    return array
