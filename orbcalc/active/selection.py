"""Which structures to label next: the hardest ones, and a uniform random audit.

Arrays in, indices out; nothing here knows what the candidates are. All randomness comes from
the generator that the caller hands in.
"""

from __future__ import annotations

import operator

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

from orbcalc.errors import ConfigError

__all__ = ["draw_audit", "select_hardest"]


def draw_audit(
    n_candidates: int, size: int, rng: np.random.Generator
) -> Int[np.ndarray, " n_audit"]:
    """Draw a uniform random sample without replacement.

    The bound of :func:`orbcalc.active.certificate.audit_look` holds if ``rng`` is independent of
    everything that shaped the model: spawn it from the run's seed and use it for audits only.

    Parameters
    ----------
    n_candidates
        Size of the set to draw from.
    size
        How many to draw; a size beyond the set means the whole set.
    rng
        Source of the draw.

    Returns
    -------
    indices
        Sorted, distinct positions in ``range(n_candidates)``.

    Raises
    ------
    ConfigError
        If a number is negative or no integer, or ``rng`` is no Generator.

    Examples
    --------
    >>> draw_audit(100, 3, np.random.default_rng(0)).shape
    (3,)
    >>> draw_audit(3, 10, np.random.default_rng(0)).tolist()
    [0, 1, 2]
    """
    n_candidates = as_count(n_candidates, "n_candidates")
    size = min(as_count(size, "size"), n_candidates)
    _check_generator(rng)
    return np.sort(rng.choice(n_candidates, size=size, replace=False, shuffle=False))


def select_hardest(
    scores: npt.ArrayLike,
    size: int,
    *,
    features: npt.ArrayLike | None = None,
    diversity: float = 2.0,
    rng: np.random.Generator,
) -> Int[np.ndarray, " n_selected"]:
    """Select the candidates with the highest scores, spread out in feature space.

    The ``int(diversity * size)`` hardest candidates are kept; among them the batch starts at the
    hardest and grows by the one farthest (Euclidean) from all chosen so far. Without features,
    or with a diversity of 1, it is the ``size`` hardest.

    Parameters
    ----------
    scores
        (n,) array, higher is harder. A score that is not finite is the hardest of all: nothing
        is known about such a candidate.
    size
        How many to select; a size beyond the pool means the whole pool.
    features
        (n, d) array, or none. A row that is not finite counts as infinitely far from the others.
    diversity
        The batch is spread out among this many times as many candidates; at least 1.
    rng
        Breaks ties between equal scores.

    Returns
    -------
    indices
        Distinct positions in ``scores``, in the order of choice, the hardest first.

    Raises
    ------
    ConfigError
        If a shape, the size or the diversity is wrong, or ``rng`` is no Generator.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> select_hardest([0.1, 0.9, np.nan, 0.5], 2, rng=rng).tolist()
    [2, 1]
    >>> select_hardest([3, 2, 1, 0], 2, features=[[0], [0.1], [5], [9]], rng=rng).tolist()
    [0, 3]
    """
    hardness = _numbers(scores, "scores", n_axes=1)
    size = min(as_count(size, "size"), len(hardness))
    _check_generator(rng)
    if not (np.isfinite(diversity) and diversity >= 1):
        raise ConfigError(f"diversity is {diversity}, expected a finite number of at least 1")
    hardness = np.where(np.isfinite(hardness), hardness, np.inf)
    # A random order first, then a stable sort: equal scores stay in random order.
    shuffled = rng.permutation(len(hardness))
    ranking = shuffled[np.argsort(-hardness[shuffled], kind="stable")]
    if features is None:
        return ranking[:size]
    points = _numbers(features, "features", n_axes=2)
    if len(points) != len(hardness):
        raise ConfigError(
            f"features have {len(points)} rows for {len(hardness)} scores: give one row for each"
        )
    shortlist = ranking[: int(min(diversity * size, len(ranking)))]
    if len(shortlist) == size:
        return shortlist
    return np.take(shortlist, _farthest_points(points[shortlist], size))


def _farthest_points(points: Float[np.ndarray, "n d"], size: int) -> Int[np.ndarray, " size"]:
    """Choose greedily, from row 0 on, the row farthest from all chosen ones (Gonzalez 1985)."""
    points = np.where(np.isfinite(points).all(axis=1, keepdims=True), points, np.nan)
    largest = np.fmax.reduce(np.abs(points), axis=None, initial=0.0)
    points = points / largest if largest > 0 else points  # squares cannot overflow
    chosen = np.zeros(size, dtype=np.intp)
    distance = np.full(len(points), np.inf)  # to the nearest chosen row
    for step in range(1, size):
        centre = points[chosen[step - 1]]
        squares = ((points - centre) ** 2).sum(axis=1)
        distance = np.fmin(distance, squares)  # fmin: a NaN row stays infinitely far
        distance[chosen[step - 1]] = -np.inf  # never twice
        chosen[step] = np.argmax(distance)  # a tie goes to the harder one
    return chosen


def _numbers(values: npt.ArrayLike, name: str, *, n_axes: int) -> npt.NDArray[np.float64]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} are not an array of real numbers: {error}") from error
    if array.ndim != n_axes:
        expected = "(n,)" if n_axes == 1 else "(n, d)"
        raise ConfigError(f"{name} have shape {array.shape}, expected {expected}")
    return array


def as_count(value: int, name: str) -> int:
    """Return an argument as a plain integer of at least 0, or raise a ConfigError."""
    try:
        count = operator.index(value)
    except TypeError as error:
        raise ConfigError(f"{name} is {value!r}, expected an integer") from error
    if count < 0:
        raise ConfigError(f"{name} is {count}, expected 0 or more")
    return count


def _check_generator(rng: object) -> None:
    if not isinstance(rng, np.random.Generator):
        raise ConfigError(
            f"rng is {type(rng).__name__}, expected a numpy.random.Generator: "
            f"pass numpy.random.default_rng(seed)"
        )
