"""Confidence bounds that certificates rest on: counts in, bounds out."""

from __future__ import annotations

import math

from scipy.special import rel_entr
from scipy.stats import hypergeom

from orbcalc.active.selection import as_count
from orbcalc.errors import ConfigError

__all__ = ["kl_lower_bound", "look_level", "max_misses"]

#: Relative room for rounding in SciPy's hypergeometric CDF: against exact fractions it was off
#: by 2e-10 at most (populations up to a million). It can only enlarge a bound.
CDF_MARGIN = 1e-6


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
    population = as_count(n_population, "n_population")
    sample = as_count(n_sample, "n_sample")
    misses = as_count(n_sample_misses, "n_sample_misses")
    _check_open_unit(delta, "delta")
    if not misses <= sample <= population:
        raise ConfigError(
            f"{misses} misses in a sample of {sample} from {population}: "
            f"expected misses <= sample <= population"
        )
    limit = delta * (1 - CDF_MARGIN)
    low, high = misses, population - (sample - misses)  # the hits that were seen are certain
    while low < high:
        middle = (low + high + 1) // 2
        if hypergeom.cdf(misses, population, middle, sample) <= limit:
            high = middle - 1
        else:
            low = middle
    return low


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
