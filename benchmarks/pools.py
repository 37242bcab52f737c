"""Simulated pools with known truth: what a model would predict, and how hard it thinks that is.

Errors are in units of the tolerance: 1 is the largest error of a hit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from orbcalc.active.certificate import PoolCounts, audit_look
from orbcalc.config import SelectionConfig

__all__ = ["ACCURACY", "MEAN_ERROR", "N_POOL", "SCENARIOS", "Model", "Scenario", "View"]

N_POOL = 1000
ACCURACY = 0.9
#: Largest mean error, in tolerances, where that is certified.
MEAN_ERROR = 0.4
Array = np.ndarray


@dataclass(frozen=True)
class View:
    """What a simulated model shows at a round."""

    errors: Array
    """(n,) absolute errors in units of the tolerance."""
    scores: Array
    """(n,) what the model thinks of them; NaN where it thinks nothing."""


#: Makes a model's view from the pool, the labelled indices, the number of the look and delta.
Model = Callable[[Array, int, float], View]


@dataclass(frozen=True)
class Scenario:
    """A kind of pool, and the sizes of the rounds."""

    name: str
    says: str
    make: Callable[[np.random.Generator], tuple[Model, Array]]
    """Draws one pool: its model, and (n,) booleans of the labels that fail."""
    selection: SelectionConfig = field(
        default_factory=lambda: SelectionConfig(initial=50, batch=50, audit=50)
    )
    max_rounds: int = 20


def _learning(
    rng: np.random.Generator, scale: float, *, certainty: float = 1.0, drift: bool = False
) -> Model:
    """Make errors of lognormal difficulty that fall as labels are added.

    ``certainty`` is the power of the difficulty in the scores: negative, and they are reversed.
    With ``drift``, the difficulties are dealt out anew in each round, and scores are those of the
    round before.
    """
    difficulty = rng.lognormal(sigma=1.0, size=N_POOL)

    def model(labelled: Array, look: int, delta: float) -> View:
        nonlocal difficulty
        believed = difficulty
        if drift:
            difficulty = rng.permutation(difficulty) * rng.uniform(0.6, 1.6)
        size = scale * (len(labelled) / 50) ** -0.35
        errors = size * difficulty * np.abs(rng.normal(size=N_POOL))
        scores = believed**certainty * rng.lognormal(sigma=0.3, size=N_POOL)
        return View(errors, scores)

    return model


def _none_fail() -> Array:
    return np.zeros(N_POOL, dtype=bool)


def easy(rng: np.random.Generator) -> tuple[Model, Array]:
    """Make a pool with few misses from the start."""
    return _learning(rng, 0.15), _none_fail()


def hard(rng: np.random.Generator) -> tuple[Model, Array]:
    """Make a pool of which a third stays wrong, with scores that mean nothing."""

    def model(labelled: Array, look: int, delta: float) -> View:
        return View(np.abs(rng.normal(scale=1.0, size=N_POOL)), rng.random(N_POOL))

    return model, _none_fail()


def heterogeneous(rng: np.random.Generator) -> tuple[Model, Array]:
    """Make difficulties that differ much, and scores that know them."""
    return _learning(rng, 0.6), _none_fail()


def confidently_wrong(rng: np.random.Generator) -> tuple[Model, Array]:
    """Make a cluster of 15 % far off the mark, of which the model is surest."""
    cluster = rng.permutation(N_POOL) < 150
    inner = _learning(rng, 0.1)

    def model(labelled: Array, look: int, delta: float) -> View:
        view = inner(labelled, look, delta)
        return View(np.where(cluster, 3.0, view.errors), np.where(cluster, 0.0, view.scores))

    return model, _none_fail()


def drifting(rng: np.random.Generator) -> tuple[Model, Array]:
    """Make a model that is good at other structures in each round, and sometimes gets worse."""
    return _learning(rng, 0.5, drift=True), _none_fail()


def failures(rng: np.random.Generator) -> tuple[Model, Array]:
    """Make 3 % of the labels fail; of these structures the model thinks nothing."""
    cannot = rng.random(N_POOL) < 0.03
    inner = _learning(rng, 0.4)

    def model(labelled: Array, look: int, delta: float) -> View:
        view = inner(labelled, look, delta)
        return View(view.errors, np.where(cannot, np.nan, view.scores))

    return model, cannot


def adversarial(rng: np.random.Generator) -> tuple[Model, Array]:
    """Make scores that call the hardest the easiest."""
    return _learning(rng, 0.6, certainty=-1.0), _none_fail()


def borderline(rng: np.random.Generator) -> tuple[Model, Array]:
    """Make as many misses as make a certificate false by one structure, at every look.

    The model is an adversary that knows the audit's size and rule, though not its draw.
    """

    def model(labelled: Array, look: int, delta: float) -> View:
        open_ = np.setdiff1d(np.arange(N_POOL), labelled)
        misses = 1 + int((1 - ACCURACY) * N_POOL + 0.5) + _most_forgiven(len(open_), look, delta)
        errors = np.full(N_POOL, 0.1)
        errors[rng.permutation(open_)[:misses]] = 2.0
        return View(errors, rng.random(N_POOL))

    return model, _none_fail()


def borderline_mean(rng: np.random.Generator) -> tuple[Model, Array]:
    """Make hits only, but with a mean error just above the target of ``coverage.py``."""

    def model(labelled: Array, look: int, delta: float) -> View:
        open_ = np.setdiff1d(np.arange(N_POOL), labelled)
        total = MEAN_ERROR * N_POOL + 28 + 4 * look  # what an audit takes away that is forgiven
        n_large = round((total - 0.05 * len(open_)) / 0.94)
        errors = np.full(N_POOL, 0.05)
        errors[rng.permutation(open_)[:n_large]] = 0.99
        return View(errors, rng.random(N_POOL))

    return model, _none_fail()


def _most_forgiven(n_open: int, look: int, delta: float, n_audit: int = 100) -> int:
    """Return the most misses in an audit with which a pool is still certified, 0 at least."""
    counts = PoolCounts(N_POOL, N_POOL - n_open, 0)
    most = 0
    for misses in range(1, n_audit):
        sample = np.arange(n_audit) >= misses
        if not audit_look(counts, sample, look=look, gamma=ACCURACY, delta=delta).certified:
            break
        most = misses
    return most


SCENARIOS = (
    Scenario("easy", "few misses", easy),
    Scenario("hard", "a third stays wrong", hard),
    Scenario("heterogeneous", "difficulties differ, scores know", heterogeneous),
    Scenario("confidently wrong", "15 % far off, with the lowest scores", confidently_wrong),
    Scenario("drifting", "difficulties change between rounds", drifting),
    Scenario("failures", "3 % of labels fail", failures),
    Scenario("adversarial", "scores reversed", adversarial),
    Scenario(
        "many looks",
        "small batches, 30 looks",
        heterogeneous,
        SelectionConfig(initial=50, batch=10, audit=20),
        30,
    ),
    Scenario(
        "borderline",
        "an adversary one structure below the target",
        borderline,
        SelectionConfig(initial=50, batch=1, audit=100),
        8,
    ),
    Scenario(
        "borderline mean",
        "hits only, their mean error just above its target",
        borderline_mean,
        SelectionConfig(initial=50, batch=1, audit=100),
        5,
    ),
)
