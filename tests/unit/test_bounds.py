"""Bounds: exact against brute force, monotone, right at the edges and in known limits."""

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from orbcalc.active.bounds import (
    BET_LIMIT,
    clipped_losses,
    kl_lower_bound,
    look_level,
    max_mean,
    max_misses,
    max_misses_sequential,
)
from orbcalc.errors import ConfigError

deltas = st.floats(1e-4, 0.5)


@st.composite
def samples(draw, largest: int = 60):
    population = draw(st.integers(1, largest))
    sample = draw(st.integers(0, population))
    return population, sample, draw(st.integers(0, sample))


def tail(k: int, population: int, misses: int, sample: int) -> Fraction:
    """P(X <= k) as an exact fraction, summed term by term."""
    ways = sum(
        math.comb(misses, j) * math.comb(population - misses, sample - j)
        for j in range(min(k, sample) + 1)
    )
    return Fraction(ways, math.comb(population, sample))


@settings(deadline=None)
@given(samples(), deltas)
def test_bound_equals_brute_force(sizes, delta: float) -> None:
    population, sample, misses = sizes
    limit = Fraction(delta) * (1 - Fraction(1, 10**6))  # the documented room for rounding
    possible = range(misses, population - (sample - misses) + 1)
    expected = max(m for m in possible if tail(misses, population, m, sample) > limit)
    assert max_misses(population, sample, misses, delta) == expected


@pytest.mark.parametrize("delta", [0.05, 0.3])
@pytest.mark.parametrize(("population", "sample"), [(12, 5), (30, 10), (40, 33)])
def test_exact_coverage_for_every_true_number(population: int, sample: int, delta: float) -> None:
    bounds = [max_misses(population, sample, k, delta) for k in range(sample + 1)]
    worst = Fraction(0)
    for true in range(population + 1):
        pmf = [
            tail(k, population, true, sample) - tail(k - 1, population, true, sample)
            for k in range(sample + 1)
        ]
        wrong = sum((p for p, bound in zip(pmf, bounds, strict=True) if true > bound), Fraction(0))
        worst = max(worst, wrong)
    assert worst <= Fraction(delta)
    assert worst > Fraction(delta) / 2  # and it is not safe by being vacuous


@settings(deadline=None)
@given(samples(), deltas)
def test_bound_is_monotone(sizes, delta: float) -> None:
    population, sample, misses = sizes
    bound = max_misses(population, sample, misses, delta)
    assert misses <= bound <= population - (sample - misses)
    assert max_misses(population, sample, misses, delta / 2) >= bound
    assert max_misses(population + 1, sample, misses, delta) >= bound
    if misses < sample:
        # A hit turned into a miss never lowers U - k: accidental failures are harmless.
        assert max_misses(population, sample, misses + 1, delta) >= bound + 1
    if sample < population:  # one more structure seen, and it is right
        assert max_misses(population, sample + 1, misses, delta) <= bound


@pytest.mark.parametrize("misses", [0, 1, 7, 39, 40])
def test_bound_tends_to_clopper_pearson(misses: int) -> None:
    share = max_misses(1_000_000, 40, misses, 0.05) / 1_000_000
    limit = 1.0 if misses == 40 else float(beta.ppf(0.95, misses + 1, 40 - misses))
    assert share == pytest.approx(limit, abs=3e-5)


def test_bound_at_the_edges() -> None:
    assert max_misses(0, 0, 0, 0.05) == 0
    assert max_misses(9, 0, 0, 0.05) == 9
    assert max_misses(9, 9, 4, 0.05) == 4
    assert max_misses(9, 3, 3, 0.05) == 9
    assert max_misses(10**7, 10**5, 10**3, 0.05) > 10**5


@pytest.mark.parametrize("numbers", [(5, 6, 0), (5, 3, 4)])
def test_impossible_samples_are_refused(numbers) -> None:
    with pytest.raises(ConfigError, match="expected misses <= sample <= population"):
        max_misses(*numbers, 0.05)


# ------------------------------------------------------------------------- sequential
@settings(deadline=None)
@given(samples(), deltas, st.integers(0, 60))
def test_sequential_bound_equals_brute_force(sizes, delta: float, expected: int) -> None:
    population, sample, misses = sizes
    expected = min(expected, population)
    possible = range(misses, population - (sample - misses) + 1)

    def chance(m: int) -> Fraction:  # of these misses, in the order in which they came
        ways = math.comb(population - sample, m - misses)
        return Fraction(ways, math.comb(population, m))

    usual = Fraction(9, 10) / (expected + 1)
    evidence = sum(
        chance(m) * ((m <= expected) * usual + Fraction(1, 10) / (population + 1)) for m in possible
    )
    limit = Fraction(delta) * evidence * (1 - Fraction(1, 10**6))
    found = max_misses_sequential(population, sample, misses, delta, expected=expected)
    assert found == max(m for m in possible if chance(m) > limit)


@settings(deadline=None)
@given(samples(), deltas, st.integers(0, 60))
def test_sequential_bound_is_monotone_and_dearer(sizes, delta: float, expected: int) -> None:
    population, sample, misses = sizes
    expected = min(expected, population)
    found = max_misses_sequential(population, sample, misses, delta, expected=expected)
    assert found >= max_misses(population, sample, misses, delta)
    if misses < sample:  # a hit that is turned into a miss repairs nothing
        worse = max_misses_sequential(population, sample, misses + 1, delta, expected=expected)
        assert worse >= found + 1


def test_sequential_bound_of_large_pools() -> None:
    bound = max_misses_sequential(1_000_000, 200, 0, 0.05, expected=25_000)
    assert max_misses(1_000_000, 200, 0, 0.05) < bound < 25_000
    assert max_misses_sequential(10, 0, 0, 0.05, expected=0) == 10  # nothing seen
    assert max_misses_sequential(10, 10, 4, 0.05, expected=0) == 4  # all seen
    with pytest.raises(ConfigError, match="11 misses expected among 10"):
        max_misses_sequential(10, 5, 0, 0.05, expected=11)
    with pytest.raises(ConfigError, match="misses <= sample"):
        max_misses_sequential(10, 5, 6, 0.05, expected=1)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, float("nan")])
def test_delta_must_be_a_probability(delta: float) -> None:
    for call in (
        lambda: max_misses(5, 3, 1, delta),
        lambda: kl_lower_bound(0.5, 3, delta),
        lambda: look_level(delta, 1),
        lambda: max_mean([0.5], 3, delta),
    ):
        with pytest.raises(ConfigError, match=r"delta is .*, expected a number in \(0, 1\)"):
            call()


def test_levels_of_all_looks_sum_to_delta() -> None:
    spent = sum(look_level(0.05, look) for look in range(1, 10_001))
    assert spent == pytest.approx(0.05 * (1 - 1 / 10_001), rel=1e-12)
    with pytest.raises(ConfigError, match="the first look is number 1"):
        look_level(0.05, 0)


@settings(deadline=None)
@given(st.integers(1, 200), st.floats(0, 1), deltas)
def test_kl_bound_solves_its_equation(n: int, accuracy: float, delta: float) -> None:
    alpha = kl_lower_bound(accuracy, n, delta)
    assert 0 <= alpha <= accuracy
    if alpha > 1e-12 and accuracy < 1:
        divergence = accuracy * math.log(accuracy / alpha)
        divergence += (1 - accuracy) * math.log((1 - accuracy) / (1 - alpha))
        assert n * divergence == pytest.approx(math.log(1 / delta), rel=1e-6, abs=1e-9)


def test_kl_bound_at_the_edges() -> None:
    assert kl_lower_bound(0.0, 10, 0.05) == 0.0
    assert kl_lower_bound(0.9, 0, 0.05) == 0.0
    assert kl_lower_bound(1.0, 25, 0.05) == pytest.approx(0.05 ** (1 / 25), abs=1e-15)
    for accuracy in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"expected a number in \[0, 1\]"):
            kl_lower_bound(accuracy, 5, 0.05)


@settings(deadline=None)
@given(samples(), deltas)
def test_kl_bound_is_never_tighter_than_the_exact_one(sizes, delta: float) -> None:
    population, sample, misses = sizes
    alpha = kl_lower_bound((sample - misses) / max(sample, 1), sample, delta)
    exact = max_misses(population, sample, misses, delta)
    assert math.floor((1 - alpha) * population + 1e-9) >= exact


# ------------------------------------------------------------------------------ betting
@st.composite
def losses_of_pools(draw, most: int = 25):
    unit = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0]))
    pool = draw(st.lists(unit, min_size=1, max_size=most))
    return np.array(pool), draw(st.integers(0, len(pool)))


def is_refuted(mean: float, losses: np.ndarray, population: int, delta: float) -> bool:
    """Bet against a mean, one loss after the other, as the paper says it."""
    capital, seen, squares, sums = 1.0, 0.0, 0.25, 0.5
    for i, x in enumerate(losses, start=1):
        rest = (population * mean - seen) / (population - i + 1)
        variance = squares / i
        bet = math.sqrt(2 * math.log(1 / delta) / (variance * i * math.log(1 + i)))
        capital *= 1 - min(bet, BET_LIMIT / max(1 - rest, 1e-300)) * (x - rest)
        if capital >= 1 / delta:
            return True
        seen, sums = seen + x, sums + x
        squares += (x - sums / (i + 1)) ** 2
    return False


@settings(deadline=None, max_examples=60)
@given(losses_of_pools(), deltas)
def test_betting_bound_is_where_a_plain_loop_stops_to_refute(pool, delta: float) -> None:
    losses, size = pool[0][: pool[1]], pool[1]
    n = len(pool[0])
    bound = float(max_mean(losses, n, delta))
    least = losses.sum() / n
    assert least - 1e-12 <= bound <= least + (n - size) / n + 1e-12
    if 0 < size < n:
        if bound < least + (n - size) / n - 1e-6:
            assert is_refuted(bound + 1e-7, losses, n, delta)
        if bound > least + 1e-6:
            assert not is_refuted(bound - 1e-7, losses, n, delta)


@settings(deadline=None, max_examples=60)
@given(losses_of_pools(), deltas)
def test_betting_bound_falls_with_delta_and_with_each_loss_seen(pool, delta: float) -> None:
    losses, size = pool
    n = len(losses)
    bound = float(max_mean(losses[:size], n, delta))
    assert float(max_mean(losses[:size], n, delta / 2)) >= bound - 1e-8
    if size < n - 1:  # capital that was won once counts for ever
        # ... but never against what has been seen: a bound may be wrong, with probability delta
        seen = losses[: size + 1].sum() / n
        assert float(max_mean(losses[: size + 1], n, delta)) <= max(bound, seen) + 1e-8


@pytest.mark.parametrize("delta", [0.05, 0.2, 0.4])
@pytest.mark.parametrize(
    "pool", [[0, 0, 0, 0, 0, 1, 1], [0, 0.1, 0.2, 0.3, 0.9, 1, 1], [0.5] * 7, [0, 0, 1, 1, 1, 1, 1]]
)
def test_betting_bound_holds_at_all_times_for_every_order(pool: list[float], delta: float) -> None:
    """Every ordered sample of a small pool, so the probabilities are exact."""
    orders = np.array(list(permutations(pool)), dtype=float)
    wrong = np.zeros(len(orders), dtype=bool)
    for size in range(1, len(pool)):
        wrong |= max_mean(orders[:, :size], len(pool), delta) < np.mean(pool) - 1e-9
    assert wrong.mean() <= delta


def test_a_sorted_sample_breaks_the_betting_bound() -> None:
    """The order must have nothing to do with the losses; this is why samples are shuffled."""
    rng = np.random.default_rng(0)
    pools = (rng.random((400, 300)) < 0.3).astype(float)
    samples = pools[:, :60]
    truth = pools.mean(axis=1)
    assert (max_mean(samples, 300, 0.2) < truth).mean() < 0.2
    assert (max_mean(np.sort(samples, axis=1), 300, 0.2) < truth).mean() > 0.2


def test_betting_bound_of_many_samples_is_that_of_each() -> None:
    samples = np.random.default_rng(0).random((3, 4, 10))
    together = max_mean(samples, 40, 0.1)
    assert together.shape == (3, 4)
    for index in np.ndindex(3, 4):
        assert together[index] == max_mean(samples[index], 40, 0.1)


def test_betting_bound_at_the_edges() -> None:
    assert float(max_mean([], 9, 0.05)) == 1.0
    assert float(max_mean([], 0, 0.05)) == 0.0
    assert float(max_mean([0.25, 0.75], 2, 0.05)) == 0.5
    assert float(max_mean([1.0] * 8, 9, 0.05)) == pytest.approx(1.0, abs=1e-8)
    assert float(max_mean([1.0], 9, 0.05)) == pytest.approx(1.0, abs=1e-8)
    assert float(max_mean([0.0] * 8, 9, 0.05)) <= 1 / 9
    assert float(max_mean(np.zeros(5000), 10**6, 0.05)) < 0.002


def test_betting_bound_notices_small_errors_where_counting_misses_cannot() -> None:
    losses = np.random.default_rng(0).uniform(0, 0.1, 100)
    assert float(max_mean(losses, 1000, 0.05)) < 0.1 + 0.5 * losses.mean()


@pytest.mark.parametrize(
    ("losses", "n", "message"),
    [
        ([0.5, 1.1], 5, r"must be in \[0, 1\]"),
        ([0.5, -0.1], 5, r"must be in \[0, 1\]"),
        ([float("nan")], 5, "NaN excluded"),
        ([0.5, 0.5], 1, r"shape \(2,\) in a population of 1"),
        (np.array(0.5), 5, r"expected \(\.\.\., n\)"),
    ],
)
def test_losses_that_cannot_be_bet_on(losses, n: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        max_mean(losses, n, 0.05)


def test_losses_are_clipped_and_what_is_unknown_is_lost() -> None:
    found = clipped_losses([0.0, -0.5, 2.0, np.inf, -np.inf, np.nan], 1.0)
    assert found.tolist() == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert clipped_losses([], 1.0).shape == (0,)
    for cap in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="expected a finite number above 0"):
            clipped_losses([0.0], cap)
    with pytest.raises(ConfigError, match=r"errors have shape \(1, 1\)"):
        clipped_losses([[0.0]], 1.0)
