"""Selection: uniform audits, hardest first, spread out, ties broken at random."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from orbcalc.active.selection import (
    draw_audit,
    power_law_costs,
    score_per_cost,
    select_batch,
    select_determinant,
    select_diverse,
    select_hardest,
)
from orbcalc.errors import ConfigError


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ------------------------------------------------------------------------------- audit
@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 80), st.integers(0, 2**32))
def test_audit_is_a_sorted_subset_and_reproducible(n: int, size: int, seed: int) -> None:
    drawn = draw_audit(n, size, seeded(seed))
    assert len(drawn) == min(n, size)
    assert (np.diff(drawn) > 0).all()
    assert set(drawn.tolist()) <= set(range(n))
    np.testing.assert_array_equal(drawn, draw_audit(n, size, seeded(seed)))


def test_audit_draws_every_subset_equally_often() -> None:
    rng = seeded()
    counts = Counter(tuple(draw_audit(6, 3, rng).tolist()) for _ in range(4000))
    observed = [counts[subset] for subset in combinations(range(6), 3)]
    assert sum(observed) == 4000
    assert chisquare(observed).pvalue > 1e-3


def test_audit_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    draw_audit(100, 10, seeded())
    select_hardest(np.ones(20), 5, rng=seeded())
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize(
    "draw", [lambda: draw_audit(-1, 3, seeded()), lambda: draw_audit(9, -3, seeded())]
)
def test_audit_refuses_negative_sizes(draw) -> None:
    with pytest.raises(ConfigError, match=r"is -\d, expected 0 or more"):
        draw()


# ----------------------------------------------------------------------------- hardest
@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.integers(0, 50))
def test_without_features_the_highest_scores_are_taken(scores: list[float], size: int) -> None:
    chosen = select_hardest(scores, size, rng=seeded())
    best = sorted(scores, reverse=True)[:size]
    assert [scores[i] for i in chosen] == best
    assert len(set(chosen.tolist())) == len(chosen)


def test_scores_that_are_not_finite_come_first() -> None:
    scores = [5.0, np.nan, 7.0, np.inf, -np.inf, 1e300]
    assert set(select_hardest(scores, 3, rng=seeded()).tolist()) == {1, 3, 4}
    assert select_hardest(scores, 4, rng=seeded())[3] == 5


def test_ties_are_broken_by_the_generator() -> None:
    first = Counter(int(select_hardest(np.zeros(4), 1, rng=seeded(s))[0]) for s in range(2000))
    assert chisquare([first[i] for i in range(4)]).pvalue > 1e-3


def slow_farthest(scores: np.ndarray, points: np.ndarray, size: int, n_short: int) -> list[int]:
    """Do the greedy choice with plain loops."""
    short = sorted(range(len(scores)), key=lambda i: -scores[i])[:n_short]
    chosen = short[:1]
    while len(chosen) < size:
        rest = [i for i in short if i not in chosen]
        gap = [min(np.linalg.norm(points[i] - points[j]) for j in chosen) for i in rest]
        chosen.append(rest[int(np.argmax(gap))])
    return chosen


@pytest.mark.parametrize("diversity", [1.0, 1.5, 2.0, 5.0, 100.0])
def test_diverse_batch_equals_plain_loops(diversity: float) -> None:
    rng = seeded(3)
    scores, points = rng.random(50), rng.normal(size=(50, 3))
    chosen = select_hardest(scores, 8, features=points, diversity=diversity, rng=rng)
    n_short = min(int(diversity * 8), 50)
    expected = slow_farthest(scores, points, 8, n_short)
    if n_short == 8:
        assert set(chosen.tolist()) == set(expected)
    else:
        assert chosen.tolist() == expected
    assert chosen[0] == np.argmax(scores)


def test_diverse_batch_takes_one_of_each_cluster() -> None:
    centres = np.repeat(10.0 * np.arange(4), 5)
    points = np.stack([centres + 0.01 * seeded().random(20), np.zeros(20)], axis=1)
    chosen = select_hardest(np.ones(20), 4, features=points, diversity=5.0, rng=seeded())
    assert sorted(centres[chosen]) == [0.0, 10.0, 20.0, 30.0]


def test_features_that_are_not_finite_are_far_and_never_chosen_twice() -> None:
    points = np.array([[0.0], [0.1], [np.nan], [np.inf], [1e200]])
    scores = [5, 4, 3, 2, 1]
    chosen = select_hardest(scores, 4, features=points, diversity=2.0, rng=seeded())
    assert chosen.tolist() == [0, 2, 3, 4]
    every = select_hardest(np.ones(6), 5, features=np.full((6, 2), np.nan), rng=seeded())
    assert len(set(every.tolist())) == 5
    same = select_hardest(np.ones(6), 5, features=np.zeros((6, 2)), rng=seeded())
    assert len(set(same.tolist())) == 5


def test_empty_and_too_small_pools() -> None:
    assert len(select_hardest([], 3, rng=seeded())) == 0
    assert len(select_hardest([], 3, features=np.zeros((0, 2)), rng=seeded())) == 0
    assert select_hardest([1, 2], 9, features=[[0], [1]], rng=seeded()).tolist() == [1, 0]
    assert len(select_hardest([1, 2], 0, features=[[0], [1]], rng=seeded())) == 0


@pytest.mark.parametrize(
    ("scores", "features", "diversity", "message"),
    [
        ([[1.0]], None, 2.0, r"scores have shape \(1, 1\), expected \(n,\)"),
        (["hard"], None, 2.0, "scores are not an array of real numbers"),
        ([1.0, 2.0], [1.0, 2.0], 2.0, r"features have shape \(2,\), expected \(n, d\)"),
        ([1.0, 2.0], [[1.0]], 2.0, "features have 1 rows for 2 scores"),
        ([1.0, 2.0], None, 0.5, "diversity is 0.5"),
        ([1.0, 2.0], None, float("nan"), "diversity is nan"),
        ([1.0, 2.0], None, float("inf"), "diversity is inf"),
    ],
)
def test_bad_input_is_named(scores, features, diversity, message) -> None:
    with pytest.raises(ConfigError, match=message):
        select_hardest(scores, 1, features=features, diversity=diversity, rng=seeded())


def test_a_size_that_is_no_integer_or_a_seed_is_refused() -> None:
    # TypeError: what the annotations raise where tests check them at run time.
    with pytest.raises((ConfigError, TypeError), match=r"1\.5"):
        select_hardest([1.0, 2.0], 1.5, rng=seeded())  # type: ignore[arg-type]
    with pytest.raises((ConfigError, TypeError), match="Generator"):
        select_hardest([1.0, 2.0], 1, rng=0)  # type: ignore[arg-type]
    with pytest.raises((ConfigError, TypeError), match="Generator"):
        draw_audit(5, 2, np.random)  # type: ignore[arg-type]


# ------------------------------------------------------------------------ other batches
METHODS = ("uncertainty", "determinant", "diversity", "random")


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(METHODS),
    st.lists(st.floats(0, 10) | st.just(float("nan")), max_size=20),
    st.integers(0, 25),
    st.integers(0, 9),
)
def test_every_method_selects_distinct_candidates_and_reproducibly(method, scores, size, seed):
    points = seeded(seed).normal(size=(len(scores), 2))
    points[::4] = points[:1]  # duplicates
    points[1::5] = np.nan
    first, again = (
        select_batch(method, scores, size, features=points, rng=seeded(seed)) for _ in range(2)
    )
    assert first.tolist() == again.tolist()
    assert len(first) == len(set(first.tolist())) == min(size, len(scores))
    assert set(first.tolist()) <= set(range(len(scores)))


def test_the_default_method_is_the_hardest_first() -> None:
    scores, points = seeded(1).random(30), seeded(2).normal(size=(30, 3))
    chosen = select_batch("uncertainty", scores, 6, features=points, rng=seeded())
    expected = select_hardest(scores, 6, features=points, rng=seeded())
    assert chosen.tolist() == expected.tolist()


def test_random_batches_do_not_look_at_scores() -> None:
    counts = Counter(
        i for s in range(600) for i in select_batch("random", [9, 1, 0, 5], 2, rng=seeded(s))
    )
    assert chisquare([counts[i] for i in range(4)]).pvalue > 1e-3


@pytest.mark.parametrize("method", ["determinant", "diversity"])
def test_methods_that_need_features_say_so(method) -> None:
    with pytest.raises(ConfigError, match=f"'{method}' needs features"):
        select_batch(method, [1.0], 1, rng=seeded())
    assert len(select_batch(method, [], 1, rng=seeded())) == 0
    assert len(select_batch(method, [np.nan, np.inf, np.nan], 2, rng=seeded())) == 2  # unknown


def slow_determinant(scores: np.ndarray, points: np.ndarray, size: int) -> list[int]:
    """Grow the batch by the largest determinant, each computed from scratch."""
    centred = points - points.mean(axis=0)
    width = (centred**2).sum(axis=1).mean()
    squares = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    kernel = np.outer(scores, scores) * np.exp(-squares / (2 * width))
    chosen: list[int] = []
    while len(chosen) < size:
        rest = [i for i in range(len(scores)) if i not in chosen]
        values = [np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])]) for i in rest]
        chosen.append(rest[int(np.argmax(values))])
    return chosen


def test_determinant_equals_determinants() -> None:
    rng = seeded(5)
    scores, points = rng.uniform(0.5, 1, 30), rng.normal(size=(30, 4))
    chosen = select_determinant(scores, 7, features=points, rng=seeded())
    assert chosen.tolist() == slow_determinant(scores, points, 7)


def test_determinant_weighs_scores_against_distances() -> None:
    points = np.array([[0.0], [0.01], [5.0], [9.0]])
    chosen = select_determinant([3, 2.9, 1, 1e-9], 3, features=points, rng=seeded())
    assert chosen.tolist() == [0, 2, 1]  # far but hopelessly easy: last
    first = select_determinant([1, np.nan, 5], 1, features=np.zeros((3, 1)), rng=seeded())
    assert first.tolist() == [1]
    nothing = select_determinant(np.zeros(5), 5, features=np.zeros((5, 2)), rng=seeded())
    assert sorted(nothing.tolist()) == list(range(5))


def test_diversity_alone_takes_one_of_each_cluster() -> None:
    centres = np.repeat(10.0 * np.arange(4), 5)[:, None]
    for seed in range(10):
        chosen = select_diverse(centres, 4, rng=seeded(seed))
        assert sorted(centres[chosen, 0]) == [0.0, 10.0, 20.0, 30.0]


# -------------------------------------------------------------------------------- costs
def test_costs_decide_between_equal_scores_and_unknown_scores_stay_first() -> None:
    scores, costs = [1.0, 1.0, np.nan, np.inf], [4.0, 2.0, 1e9, 1.0]
    assert score_per_cost(scores, costs).tolist() == [0.25, 0.5, np.inf, np.inf]
    chosen = select_batch("uncertainty", scores, 3, costs=costs, rng=seeded())
    assert set(chosen[:2].tolist()) == {2, 3}
    assert chosen[2] == 1


@pytest.mark.parametrize(
    ("scores", "costs", "message"),
    [
        ([1.0], [1.0, 2.0], "2 costs for 1 scores"),
        ([1.0], [0.0], "finite and positive"),
        ([1.0], [float("nan")], "finite and positive"),
        ([-1.0], [1.0], "must not be negative"),
    ],
)
def test_costs_that_make_no_sense(scores, costs, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        score_per_cost(scores, costs)


@settings(deadline=None, max_examples=40)
@given(st.floats(0.001, 100), st.floats(0, 4), st.integers(0, 9))
def test_power_law_is_found_again(factor: float, power: float, seed: int) -> None:
    sizes = np.concatenate([[3, 40], seeded(seed).integers(2, 100, 10)]).astype(float)
    costs = factor * sizes**power
    costs[5], costs[6] = np.nan, 0.0  # unknown ones
    found = power_law_costs([7, 200], sizes, costs)
    np.testing.assert_allclose(found, factor * np.array([7.0, 200.0]) ** power, rtol=1e-6)


def test_costs_without_anything_to_learn_from() -> None:
    assert power_law_costs([5, 9], [], []).tolist() == [1.0, 1.0]
    assert power_law_costs([5, 9], [4], [0.0]).tolist() == [1.0, 1.0]
    np.testing.assert_allclose(power_law_costs([5, 9], [4, 4], [2.0, 8.0]), 4.0)  # one size
    assert power_law_costs([], [4], [1.0]).shape == (0,)
    with pytest.raises(ConfigError, match="2 costs for 1 known sizes"):
        power_law_costs([5], [4], [1.0, 2.0])
    with pytest.raises(ConfigError, match="sizes must be positive"):
        power_law_costs([0], [4], [1.0])
