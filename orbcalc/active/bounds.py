"""Confidence bounds that certificates rest on: counts or losses in, bounds out."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from scipy.special import gammaln, logsumexp, rel_entr
from scipy.stats import hypergeom

from orbcalc.active.selection import as_count
from orbcalc.errors import ConfigError

__all__ = [
    "check_tolerance",
    "checked_errors",
    "clipped_losses",
    "kl_lower_bound",
    "look_level",
    "max_mean",
    "max_misses",
    "max_misses_sequential",
]

#: Relative room for rounding in SciPy's hypergeometric CDF: against exact fractions it was off
#: by 2e-10 at most (populations up to a million). It can only enlarge a bound.
CDF_MARGIN = 1e-6

#: Weight of all numbers of misses alike in the prior of the sequential bound; the rest of it is
#: on the few misses of a good model.
UNEXPECTED = 0.1

#: Largest share of the capital that a bet may lose at once, c of arXiv 2010.09686. It names 1/2
#: and 3/4; for small losses, 40 of 1,000, the bound's excess was 0.14 with the one and 0.10 with
#: the other.
BET_LIMIT = 0.75
#: Steps of the bisection for the bound, which then is too high by 2⁻³⁰ at most.
BISECTIONS = 30


def look_level(delta: float, look: int) -> float:
    """Return the error probability that look 1, 2, ... may spend.

    ``delta / (look (look + 1))`` sums to delta over all looks, so any number of them is paid for.

    Raises
    ------
    ConfigError
        If delta is outside (0, 1) or the look is below 1.

    Examples
    --------
    >>> look_level(0.06, 2)
    0.01
    """
    _check_open_unit(delta, "delta")
    look = as_count(look, "look")
    if look < 1:
        raise ConfigError(f"look is {look}, expected 1, 2, ...: the first look is number 1")
    return delta / (look * (look + 1))


def max_misses(n_population: int, n_sample: int, n_sample_misses: int, delta: float) -> int:
    """Bound the number of misses in a population from a uniform sample without replacement.

    ``U(k) = max{M : P(X <= k | M) > delta}`` with X hypergeometric, found by bisection, since the
    probability falls with M. Exact: M > U(X) means F_M(X) <= delta, where F_M is the distribution
    function of X itself, and P(F_M(X) <= delta) <= delta for any M, N and sample size.

    Parameters
    ----------
    n_population, n_sample, n_sample_misses
        Sizes of the population and the sample; misses in the sample.
    delta
        Probability with which the bound may be too low.

    Raises
    ------
    ConfigError
        Unless 0 <= n_sample_misses <= n_sample <= n_population and 0 < delta < 1.

    Examples
    --------
    >>> max_misses(1000, 60, 0, 0.05)
    47
    >>> max_misses(1000, 1000, 7, 0.05)  # all seen
    7
    """
    population, sample, misses = _checked_counts(n_population, n_sample, n_sample_misses)
    _check_open_unit(delta, "delta")
    return _max_misses(population, sample, misses, delta)


@lru_cache(maxsize=65536)
def _max_misses(population: int, sample: int, misses: int, delta: float) -> int:
    limit = delta * (1 - CDF_MARGIN)
    low, high = misses, population - (sample - misses)  # the hits that were seen are certain
    while low < high:
        middle = (low + high + 1) // 2
        if hypergeom.cdf(misses, population, middle, sample) <= limit:
            high = middle - 1
        else:
            low = middle
    return low


def max_misses_sequential(
    n_population: int, n_sample: int, n_sample_misses: int, delta: float, *, expected: int
) -> int:
    """Bound the misses in a population from a uniform sample that may be looked at while it grows.

    The misses M that are not refuted have ``P(sequence | M) > delta sum_m w(m) P(sequence | m)``,
    with ``P(sequence | M) = C(N - s, M - k) / C(N, M)`` for k misses among the s drawn, in any
    order. The ratio of the two sides is a nonnegative martingale under the true M that begins at
    1, so it reaches 1 / delta with probability delta at most, *whenever* one looks (Ville; the
    prior-posterior ratio of arXiv 2006.04347). The prior w is uniform up to ``expected`` for the
    most part. It must not depend on the sample; it decides how tight the bound is, not whether it
    holds.

    Parameters
    ----------
    n_population, n_sample, n_sample_misses
        Sizes of the population and of the sample so far; misses in the sample.
    delta
        Probability with which the bound may ever be too low.
    expected
        Most misses in the population that are expected.

    Raises
    ------
    ConfigError
        Unless 0 <= n_sample_misses <= n_sample <= n_population, 0 < delta < 1 and
        0 <= expected <= n_population.

    Examples
    --------
    >>> max_misses_sequential(1000, 60, 0, 0.05, expected=25)
    59
    >>> max_misses_sequential(1000, 1000, 7, 0.05, expected=25)  # all seen
    7
    """
    population, sample, misses = _checked_counts(n_population, n_sample, n_sample_misses)
    expected = as_count(expected, "expected")
    _check_open_unit(delta, "delta")
    if expected > population:
        raise ConfigError(f"{expected} misses expected among {population}")
    possible = np.arange(misses, population - (sample - misses) + 1)
    likelihood = _log_choose(population - sample, possible - misses)
    likelihood -= _log_choose(population, possible)
    weight = np.where(possible <= expected, (1 - UNEXPECTED) / (expected + 1), 0.0)
    weight += UNEXPECTED / (population + 1)
    evidence = logsumexp(likelihood, b=weight)
    left = possible[likelihood > evidence + math.log(delta) - CDF_MARGIN]
    return int(left.max())


def _log_choose(n: int, k: npt.NDArray[np.int64]) -> Float[np.ndarray, " m"]:
    found: Float[np.ndarray, " m"] = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return found


def _checked_counts(n_population: int, n_sample: int, misses: int) -> tuple[int, int, int]:
    population = as_count(n_population, "n_population")
    sample, misses = as_count(n_sample, "n_sample"), as_count(misses, "n_sample_misses")
    if not misses <= sample <= population:
        raise ConfigError(
            f"{misses} misses in a sample of {sample} from {population}: "
            f"expected misses <= sample <= population"
        )
    return population, sample, misses


def checked_errors(errors: npt.ArrayLike, tolerance: float) -> Float[np.ndarray, " n"]:
    """Return errors as an array of one axis.

    Raises
    ------
    ConfigError
        If they are none, or the tolerance is not finite and positive.
    """
    array = np.asarray(errors, dtype=np.float64)
    if array.ndim != 1:
        raise ConfigError(f"errors have shape {array.shape}, expected (n,)")
    check_tolerance(tolerance)
    return array


def check_tolerance(tolerance: float) -> None:
    """Raise a ConfigError unless a tolerance is finite and positive."""
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ConfigError(f"tolerance is {tolerance}, expected a finite number above 0")


def clipped_losses(errors: npt.ArrayLike, tolerance: float) -> Float[np.ndarray, " n"]:
    """Turn errors into losses in [0, 1]: ``min(|error| / tolerance, 1)``, and 1 for NaN.

    Parameters
    ----------
    errors
        (n,) prediction minus reference; NaN where either is missing.
    tolerance
        Error from which on all errors count alike, in the unit of the errors.

    Raises
    ------
    ConfigError
        If the errors are no one-axis array, or the tolerance is not finite and positive.

    Examples
    --------
    >>> clipped_losses([0.002, -0.02, float("nan")], 0.01).tolist()
    [0.2, 1.0, 1.0]
    """
    array = checked_errors(errors, tolerance)
    return np.where(np.isnan(array), 1.0, np.minimum(np.abs(array) / tolerance, 1.0))


def max_mean(
    losses: npt.ArrayLike, n_population: int, delta: float
) -> Float[np.ndarray, "*samples"]:
    """Bound the mean loss of a population from a uniform sample without replacement, by betting.

    Waudby-Smith & Ramdas (arXiv 2010.09686, section 5). For a candidate mean m of N losses x in
    [0, 1], seen in random order, ``m_i = (N m - sum_{j<i} x_j) / (N - i + 1)`` is the mean of
    what is left before draw i. A gambler who believes that the true mean is lower has the capital
    ``K_t(m) = prod_{i<=t} (1 - lambda_i (x_i - m_i))``, a martingale of mean 1 if m is the
    truth, never negative since ``lambda_i = min(sqrt(2 ln(1/delta) / (v_{i-1} i ln(1+i))),
    0.75 / (1 - m_i))`` depends on earlier draws only; ``v_i = (1/4 + sum_{j<=i} (x_j - a_j)^2) /
    (i+1)`` with ``a_j = (1/2 + sum_{k<=j} x_k) / (j+1)``. By Ville's inequality K reaches 1/delta
    at any time with probability delta at most, so the bound is the largest m with
    ``max_{t<=n} K_t(m) < 1/delta``. It holds for all sample sizes at once: one may look after
    each draw. K rises with m, hence bisection.

    Parameters
    ----------
    losses
        (..., n) losses in [0, 1] **in the order in which they were drawn, or shuffled**: an order
        that the losses have anything to do with invalidates the bound. Each row is a sample.
    n_population
        N, the sample included.
    delta
        Probability with which the bound may be too low.

    Returns
    -------
    bound
        (...) upper bounds of the mean of all N losses; 1 without a sample, 0 if N is 0.

    Raises
    ------
    ConfigError
        If a loss is outside [0, 1] or NaN, the sample exceeds the population, or delta is outside
        (0, 1).

    Examples
    --------
    >>> round(float(max_mean([0.0] * 60, 1000, 0.05)), 4)
    0.062
    >>> float(max_mean([0.0, 0.5, 1.0], 3, 0.05))  # all seen
    0.5
    """
    x = np.asarray(losses, dtype=np.float64)
    population = as_count(n_population, "n_population")
    _check_open_unit(delta, "delta")
    if x.ndim == 0 or x.shape[-1] > population:
        raise ConfigError(
            f"losses have shape {x.shape} in a population of {population}: "
            f"expected (..., n) with n <= population"
        )
    if not ((x >= 0) & (x <= 1)).all():
        raise ConfigError("losses must be in [0, 1], NaN excluded: clip them first")
    n = x.shape[-1]
    if n in (0, population):
        return np.asarray(x.mean(axis=-1) if n else np.full(x.shape[:-1], float(population > 0)))
    before = np.cumsum(x, axis=-1) - x  # sums of earlier losses
    left = population - np.arange(n)  # N - i + 1
    bets = _bets(x, delta)
    low = x.sum(axis=-1) / population  # all others are 0
    high = low + (population - n) / population  # all others are 1
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        rest = (population * middle[..., None] - before) / left  # m_i, below 1 for these m
        stakes = np.minimum(bets, BET_LIMIT / np.maximum(1 - rest, 1e-300))
        log_capital = np.cumsum(np.log1p(-stakes * (x - rest)), axis=-1)
        refuted = log_capital.max(axis=-1) >= -math.log(delta)
        low, high = np.where(refuted, low, middle), np.where(refuted, middle, high)
    bound: Float[np.ndarray, "*samples"] = high  # the end that rounding cannot make too low
    return bound


def _bets(x: Float[np.ndarray, "*samples n"], delta: float) -> Float[np.ndarray, "*samples n"]:
    """Return lambda_i before it is limited; it depends on the losses before i only."""
    i = np.arange(1, x.shape[-1] + 1)
    averages = (0.5 + np.cumsum(x, axis=-1)) / (i + 1)
    variances = (0.25 + np.cumsum((x - averages) ** 2, axis=-1)) / (i + 1)
    earlier = np.concatenate([np.full((*x.shape[:-1], 1), 0.25), variances[..., :-1]], axis=-1)
    bets: Float[np.ndarray, "*samples n"] = np.sqrt(
        -2 * math.log(delta) / (earlier * i * np.log1p(i))
    )
    return bets


def kl_lower_bound(accuracy: float, n: int, delta: float) -> float:
    """Return the Chernoff lower bound on a proportion.

    It is ``min{q <= mu : n kl(mu, q) <= ln(1/delta)}``, where
    ``kl(p, q) = p ln(p/q) + (1-p) ln((1-p)/(1-q))`` and mu is the accuracy in a random sample of
    size n; valid with and without replacement (Hoeffding 1963), never tighter than the exact
    bound.

    Raises
    ------
    ConfigError
        If the accuracy is outside [0, 1], n is no count, or delta is outside (0, 1).

    Examples
    --------
    >>> round(kl_lower_bound(1.0, 10, 0.05), 6) == round(0.05 ** (1 / 10), 6)
    True
    """
    if not 0 <= accuracy <= 1:
        raise ConfigError(f"accuracy is {accuracy}, expected a number in [0, 1]")
    n = as_count(n, "n")
    _check_open_unit(delta, "delta")
    if n == 0 or accuracy == 0:
        return 0.0
    low, high = 0.0, float(accuracy)
    while low < (middle := (low + high) / 2) < high:
        divergence = rel_entr(accuracy, middle) + rel_entr(1 - accuracy, 1 - middle)
        low, high = (middle, high) if n * divergence > -math.log(delta) else (low, middle)
    return low  # the end that rounding cannot make too high


def _check_open_unit(value: float, name: str) -> None:
    if not 0 < value < 1:
        raise ConfigError(f"{name} is {value}, expected a number in (0, 1)")
