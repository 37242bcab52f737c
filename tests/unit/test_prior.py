"""What is labelled first: the choice before anything is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbcalc.active.prior import process_columns, select_informative
from orbcalc.errors import ConfigError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def left_unknown(columns: np.ndarray, chosen: list[int], noise: float) -> float:
    """Return the sum of the posterior variances, by the textbook's formula."""
    own = columns[chosen]
    precision = np.eye(columns.shape[1]) + own.T @ own / noise
    return float(np.trace(columns @ np.linalg.solve(precision, columns.T)))


@given(st.integers(0, 1000), st.integers(1, 25), st.floats(1e-3, 1.0))
def test_each_step_lowers_the_variance_of_all_most(seed: int, n: int, noise: float) -> None:
    columns = rng(seed).normal(size=(n, 4)) * [3.0, 1.0, 1.0, 0.1]
    chosen = select_informative(columns, n, noise=noise, rng=rng(seed)).tolist()
    assert sorted(chosen) == list(range(n))
    for step, index in enumerate(chosen[:6]):
        before = chosen[:step]
        others = [i for i in range(n) if i not in before]
        best = min(left_unknown(columns, [*before, i], noise) for i in others)
        assert left_unknown(columns, [*before, index], noise) == pytest.approx(best, 1e-6)


def test_many_alike_tell_more_than_one_outlier() -> None:
    columns = np.array([[1.0, 0.0]] * 20 + [[0.0, 2.0]])
    first, second = select_informative(columns, 2, noise=0.1, rng=rng()).tolist()
    assert first < 20
    assert second == 20


def test_what_is_not_known_comes_last() -> None:
    columns = np.ones((5, 2))
    columns[3, 0], columns[1, 1] = np.nan, np.inf
    chosen = select_informative(columns, 5, rng=rng()).tolist()
    assert set(chosen[3:]) == {1, 3}


def test_ties_are_broken_at_random_and_seeded() -> None:
    columns = np.ones((50, 1))
    chosen = [select_informative(columns, 1, rng=rng(seed)).item() for seed in range(10)]
    assert len(set(chosen)) > 3
    assert chosen == [select_informative(columns, 1, rng=rng(seed)).item() for seed in range(10)]


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_there_may_be_nothing(shape: tuple[int, int]) -> None:
    assert len(select_informative(np.zeros(shape), 2, rng=rng())) == min(2, shape[0])


@pytest.mark.parametrize(
    ("columns", "size", "noise", "message"),
    [
        ([1.0, 2.0], 1, 0.1, "columns have shape"),
        ([[1.0]], -1, 0.1, "size is -1"),
        ([[1.0]], 1, 0.0, "noise is 0"),
        ([[1.0]], 1, np.nan, "noise is nan"),
    ],
)
def test_wrong_arguments_are_refused(
    columns: list[float], size: int, noise: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        select_informative(columns, size, noise=noise, rng=rng())


def test_columns_have_the_size_of_the_process_whatever_its_unit() -> None:
    functions = rng().normal(size=(30, 5))
    counts = rng(1).integers(1, 9, size=(30, 2))
    columns = process_columns(functions, counts)
    np.testing.assert_allclose(process_columns(1e6 * functions, counts), columns)
    assert (columns[:, :5] ** 2).sum(1).mean() == pytest.approx(1.0)
    np.testing.assert_allclose(columns[:, 5:], 10 * counts / np.sqrt(counts.sum(1))[:, None])


def test_unknown_functions_do_not_change_the_columns_of_others() -> None:
    functions, counts = rng().normal(size=(30, 5)), np.ones((30, 2))
    unknown = np.vstack([functions, np.full(5, np.nan)])
    columns = process_columns(unknown, np.vstack([counts, [np.nan, np.nan]]))
    np.testing.assert_allclose(columns[:30], process_columns(functions, counts))
    assert not np.isfinite(columns[30]).any()


def test_a_process_that_says_nothing_leaves_the_elements() -> None:
    columns = process_columns(np.zeros((3, 4)), [[1, 0], [1, 0], [0, 1]])
    assert select_informative(columns, 2, rng=rng())[1] == 2
