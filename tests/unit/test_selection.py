"""Selection: uniform audits, hardest first, spread out, ties broken at random."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from orbcalc.active.selection import draw_audit, select_hardest
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
