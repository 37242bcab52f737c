"""Which structures to label next: a batch of hard or diverse ones, and a uniform random audit.

Arrays in, indices out; nothing here knows what the candidates are. All randomness comes from
the generator that the caller hands in.
"""

from __future__ import annotations

import operator
from typing import Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

from orbcalc.errors import ConfigError

__all__ = [
    "draw_audit",
    "power_law_costs",
    "score_per_cost",
    "select_batch",
    "select_determinant",
    "select_diverse",
    "select_hardest",
]

#: How a batch is chosen.
BatchMethod = Literal["uncertainty", "determinant", "diversity", "random"]


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
    check_generator(rng)
    return np.sort(rng.choice(n_candidates, size=size, replace=False, shuffle=False))


def select_batch(
    method: BatchMethod,
    scores: npt.ArrayLike,
    size: int,
    *,
    features: npt.ArrayLike | None = None,
    costs: npt.ArrayLike | None = None,
    diversity: float = 2.0,
    rng: np.random.Generator,
) -> Int[np.ndarray, " n_selected"]:
    """Select a batch by one of four methods.

    ``uncertainty`` is :func:`select_hardest`, ``determinant`` :func:`select_determinant`, both of
    the scores per cost; ``diversity`` is :func:`select_diverse`, which knows no scores, and
    ``random`` a uniform sample: the baselines.

    Parameters
    ----------
    method
        One of the four.
    scores, size, features, diversity, rng
        As in :func:`select_hardest`.
    costs
        (n,) seconds or any other positive cost of each label, see :func:`score_per_cost`.

    Raises
    ------
    ConfigError
        If an argument does not fit the method.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> select_batch("uncertainty", [4, 3, 1], 1, costs=[8, 1, 1], rng=rng).tolist()
    [1]
    """
    hardness = as_numbers(scores, "scores", n_axes=1)
    if method == "random":
        check_generator(rng)
        shuffled: Int[np.ndarray, " n"] = rng.permutation(len(hardness))
        return shuffled[: as_count(size, "size")]
    if costs is not None:
        hardness = score_per_cost(hardness, costs)
    if len(hardness) == 0:
        return np.zeros(0, dtype=np.intp)
    # Without any prediction there are no features, and all are as hard as can be.
    if method == "uncertainty" or (features is None and not np.isfinite(hardness).any()):
        return select_hardest(hardness, size, features=features, diversity=diversity, rng=rng)
    if features is None:
        raise ConfigError(f"the selection method {method!r} needs features")
    if method == "determinant":
        return select_determinant(hardness, size, features=features, rng=rng)
    return select_diverse(_points(features, len(hardness)), size, rng=rng)


def score_per_cost(scores: npt.ArrayLike, costs: npt.ArrayLike) -> Float[np.ndarray, " n"]:
    """Divide scores by what the labels cost; a score that is not finite stays the hardest.

    Parameters
    ----------
    scores
        (n,) at least 0 where they are finite: else a dear label would look the better one.
    costs
        (n,) finite and positive, in any one unit.

    Raises
    ------
    ConfigError
        If shapes differ, a cost is not finite and positive, or a score is negative.

    Examples
    --------
    >>> score_per_cost([1.0, 4.0, np.nan], [2.0, 2.0, 5.0]).tolist()
    [0.5, 2.0, inf]
    """
    hardness, divisors = (
        as_numbers(scores, "scores", n_axes=1),
        as_numbers(costs, "costs", n_axes=1),
    )
    if hardness.shape != divisors.shape:
        raise ConfigError(f"{len(divisors)} costs for {len(hardness)} scores: give one for each")
    if not (np.isfinite(divisors) & (divisors > 0)).all():
        raise ConfigError("costs must be finite and positive")
    known = np.isfinite(hardness)
    if (hardness[known] < 0).any():
        raise ConfigError("scores must not be negative if they are divided by costs")
    return np.divide(hardness, divisors, out=np.full_like(hardness, np.inf), where=known)


def power_law_costs(
    sizes: npt.ArrayLike, known_sizes: npt.ArrayLike, known_costs: npt.ArrayLike
) -> Float[np.ndarray, " n"]:
    """Predict costs from sizes by ``cost = a size^b``, fitted in logarithms (least squares).

    Parameters
    ----------
    sizes
        (n,) positive sizes, as numbers of atoms, of what a cost is wanted for.
    known_sizes, known_costs
        (m,) of what has been labelled; costs of 0 or that are not finite are left out.

    Returns
    -------
    costs
        (n,) in the unit of the known ones. With fewer than two different sizes known, b = 0; with
        none, all 1.

    Raises
    ------
    ConfigError
        If shapes differ or a size is not positive.

    Examples
    --------
    >>> power_law_costs([40], [10, 20], [1.0, 8.0]).round(6).tolist()
    [64.0]
    """
    wanted, x = as_numbers(sizes, "sizes", n_axes=1), as_numbers(known_sizes, "sizes", n_axes=1)
    y = as_numbers(known_costs, "costs", n_axes=1)
    if x.shape != y.shape:
        raise ConfigError(f"{len(y)} costs for {len(x)} known sizes: give one for each")
    if not ((wanted > 0).all() and (x > 0).all()):
        raise ConfigError("sizes must be positive")
    usable = np.isfinite(y) & (y > 0)
    if not usable.any():
        return np.ones(len(wanted))
    log_x, log_y = np.log(x[usable]), np.log(y[usable])
    spread = ((log_x - log_x.mean()) ** 2).sum()
    power = ((log_x - log_x.mean()) * log_y).sum() / spread if spread > 1e-12 else 0.0
    costs: Float[np.ndarray, " n"] = np.exp(log_y.mean() + power * (np.log(wanted) - log_x.mean()))
    return costs


def select_diverse(
    features: npt.ArrayLike, size: int, *, rng: np.random.Generator
) -> Int[np.ndarray, " n_selected"]:
    """Select candidates far from each other, whatever their scores: a baseline.

    It starts at a random one and grows by the one farthest (Euclidean) from all chosen so far.

    Parameters
    ----------
    features
        (n, d) array; a row that is not finite counts as infinitely far from the others.
    size
        How many to select; a size beyond the pool means the whole pool.
    rng
        Chooses the first one.

    Raises
    ------
    ConfigError
        If a shape or the size is wrong, or ``rng`` is no Generator.

    Examples
    --------
    >>> chosen = select_diverse([[0], [1], [9]], 2, rng=np.random.default_rng(0))
    >>> 2 in chosen
    True
    """
    points = as_numbers(features, "features", n_axes=2)
    check_generator(rng)
    order: Int[np.ndarray, " n"] = rng.permutation(len(points))
    size = min(as_count(size, "size"), len(points))
    return np.take(order, _farthest_points(points[order], size))


def select_determinant(
    scores: npt.ArrayLike, size: int, *, features: npt.ArrayLike, rng: np.random.Generator
) -> Int[np.ndarray, " n_selected"]:
    """Select hard and mutually different candidates by a greedy determinant.

    With ``L_ij = q_i q_j exp(-|x_i - x_j|^2 / 2 w^2)``, q the scores and w the root mean square
    distance of the features from their mean, the batch grows by the candidate that makes det L of
    the batch largest: the mode of a determinantal point process, approximated greedily (Chen,
    Zhang & Zhou, arXiv 1709.05135, algorithm 1; O(n size^2)). There is no shortlist, so a
    candidate that is far away may win over a harder one.

    Parameters
    ----------
    scores
        (n,) array, higher is harder; below 0 counts as 0. One that is not finite counts as twice
        the highest finite one.
    size
        How many to select; a size beyond the pool means the whole pool.
    features
        (n, d) array; a row that is not finite resembles no other.
    rng
        Breaks ties.

    Raises
    ------
    ConfigError
        If a shape or the size is wrong, or ``rng`` is no Generator.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> select_determinant([3, 2.9, 1], 2, features=[[0], [0.1], [9]], rng=rng).tolist()
    [0, 2]
    """
    hardness = as_numbers(scores, "scores", n_axes=1)
    points = _points(features, len(hardness))
    check_generator(rng)
    size = min(as_count(size, "size"), len(hardness))
    order: Int[np.ndarray, " n"] = rng.permutation(len(hardness))
    hardness, points = hardness[order], _standardised(points[order])
    finite = np.isfinite(hardness)
    highest = max(hardness[finite].max(initial=0.0), np.finfo(float).tiny)
    quality = np.where(finite, np.maximum(hardness / highest, 0.0), 2.0)
    left = quality**2  # diagonal of L after the elimination of what was chosen
    rows = np.zeros((size, len(hardness)))  # of its Cholesky factor
    chosen = np.zeros(size, dtype=np.intp)
    is_open = np.ones(len(hardness), dtype=bool)
    for step in range(size):
        best = chosen[step] = int(np.argmax(np.where(is_open, left, -np.inf)))
        is_open[best] = False
        if left[best] > 1e-12:
            squares = ((points - points[best]) ** 2).sum(axis=1)
            column = quality * quality[best] * np.exp(-np.nan_to_num(squares, nan=np.inf) / 2)
            column[best] = quality[best] ** 2  # also where the features are not finite
            rows[step] = (column - rows[:step, best] @ rows[:step]) / np.sqrt(left[best])
            left = left - rows[step] ** 2
    return np.take(order, chosen)


def _standardised(points: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Scale features to a root mean square distance of 1 from their mean; not finite is NaN."""
    known = np.isfinite(points).all(axis=1)
    if not known.any():
        return np.full_like(points, np.nan)
    scaled = np.where(known[:, None], points, np.nan) / max(np.abs(points[known]).max(), 1e-300)
    centred = scaled - scaled[known].mean(axis=0)
    width = np.sqrt((centred[known] ** 2).sum(axis=1).mean())
    standardised: Float[np.ndarray, "n d"] = centred / (width if width > 0 else 1.0)
    return standardised


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
    hardness = as_numbers(scores, "scores", n_axes=1)
    size = min(as_count(size, "size"), len(hardness))
    check_generator(rng)
    if not (np.isfinite(diversity) and diversity >= 1):
        raise ConfigError(f"diversity is {diversity}, expected a finite number of at least 1")
    hardness = np.where(np.isfinite(hardness), hardness, np.inf)
    # A random order first, then a stable sort: equal scores stay in random order.
    shuffled = rng.permutation(len(hardness))
    ranking = shuffled[np.argsort(-hardness[shuffled], kind="stable")]
    if features is None:
        return ranking[:size]
    points = _points(features, len(hardness))
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


def as_numbers(values: npt.ArrayLike, name: str, *, n_axes: int) -> npt.NDArray[np.float64]:
    """Return an argument as an array of numbers, or raise a ConfigError."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} are not an array of real numbers: {error}") from error
    if array.ndim != n_axes:
        expected = "(n,)" if n_axes == 1 else "(n, d)"
        raise ConfigError(f"{name} have shape {array.shape}, expected {expected}")
    return array


def _points(features: npt.ArrayLike, n: int) -> Float[np.ndarray, "n d"]:
    points = as_numbers(features, "features", n_axes=2)
    if len(points) != n:
        raise ConfigError(f"features have {len(points)} rows for {n} scores: give one row for each")
    return points


def as_count(value: int, name: str) -> int:
    """Return an argument as a plain integer of at least 0, or raise a ConfigError."""
    try:
        count = operator.index(value)
    except TypeError as error:
        raise ConfigError(f"{name} is {value!r}, expected an integer") from error
    if count < 0:
        raise ConfigError(f"{name} is {count}, expected 0 or more")
    return count


def check_generator(rng: object) -> None:
    """Raise a ConfigError for what is no random generator."""
    if not isinstance(rng, np.random.Generator):
        raise ConfigError(
            f"rng is {type(rng).__name__}, expected a numpy.random.Generator: "
            f"pass numpy.random.default_rng(seed)"
        )
