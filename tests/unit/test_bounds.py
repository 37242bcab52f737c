"""Bounds: exact against brute force, monotone, right at the edges and in known limits."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from orbcalc.active.bounds import kl_lower_bound, look_level, max_misses
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


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, float("nan")])
def test_delta_must_be_a_probability(delta: float) -> None:
    for call in (
        lambda: max_misses(5, 3, 1, delta),
        lambda: kl_lower_bound(0.5, 3, delta),
        lambda: look_level(delta, 1),
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
