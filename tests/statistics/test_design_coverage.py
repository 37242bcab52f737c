"""Whole designs on simulated pools: false certificates are as rare as delta says."""

import numpy as np
import pytest
from scipy.stats import beta

from orbcalc.active.bounds import max_mean, max_misses, max_misses_sequential
from orbcalc.active.design import InferenceSetDesign
from orbcalc.config import CertificateConfig, SelectionConfig, StopConfig

DELTA = 0.2
N = 200


def limits(events: int, n: int) -> tuple[float, float]:
    """Return Clopper-Pearson limits of a share, each missed with probability 0.1 %."""
    lower = float(beta.ppf(0.001, events, n - events + 1)) if events else 0.0
    upper = float(beta.ppf(0.999, events + 1, n - events)) if events < n else 1.0
    return lower, upper


@pytest.mark.parametrize("shape", [(1, 9), (0.05, 0.15), (2, 2), (5, 1)])
def test_betting_covers_at_all_times(shape: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    pools = rng.beta(*shape, size=(5000, 150))  # each row in random order already
    truth, wrong = pools.mean(axis=1), np.zeros(5000, dtype=bool)
    for size in (5, 10, 20, 40, 80, 120):
        wrong |= max_mean(pools[:, :size], 150, DELTA) < truth
    assert limits(int(wrong.sum()), 5000)[1] <= DELTA
    if shape == (0.05, 0.15):  # nearly all or nothing: hardest to bound, and not vacuous
        assert wrong.mean() > DELTA / 4


def chance_ever_too_low(population: int, misses: int, delta: float, expected: int) -> float:
    """Return the probability that the bound is below the truth after any draw, exactly."""
    alive, lost = np.zeros(misses + 2), 0.0
    alive[0] = 1.0  # by misses drawn so far
    seen = np.arange(misses + 2)
    for size in range(1, population + 1):
        miss = np.clip((misses - seen) / (population - size + 1), 0, 1)
        drawn = alive * (1 - miss)
        drawn[1:] += (alive * miss)[:-1]
        bounds = np.array(
            [
                max_misses_sequential(population, size, k, delta, expected=expected)
                if drawn[k] > 0
                else population
                for k in range(misses + 2)
            ]
        )
        lost += drawn[bounds < misses].sum()
        alive = np.where(bounds < misses, 0.0, drawn)
    return lost


@pytest.mark.parametrize(("population", "expected"), [(15, 0), (15, 15), (40, 2), (40, 8)])
@pytest.mark.parametrize("delta", [0.3, 0.05])
def test_the_sequential_bound_holds_at_all_times(
    population: int, expected: int, delta: float
) -> None:
    chances = [
        chance_ever_too_low(population, misses, delta, expected) for misses in range(population + 1)
    ]
    assert delta / 5 < max(chances) <= delta  # and it is not vacuous


def test_the_fixed_bound_does_not() -> None:
    """It is for one look: a sample that is looked at as it grows breaks it."""
    rng = np.random.default_rng(0)
    misses = np.arange(60) < 12
    wrong = 0
    for _ in range(2000):
        found = np.cumsum(rng.permutation(misses))
        wrong += any(max_misses(60, s, int(found[s - 1]), DELTA) < 12 for s in range(1, 60))
    assert limits(wrong, 2000)[0] > DELTA


def confidently_wrong(seed: int, method: str, **rules: float) -> tuple[bool, bool]:
    """Let a fifth be wrong with the lowest scores; return (certified, falsely)."""
    rng = np.random.default_rng([seed, 1])
    wrong = rng.random(N) < 0.2
    errors = np.where(wrong, 2.0, rng.uniform(0, 0.5, N))
    cannot = rng.random(N) < 0.02
    design = InferenceSetDesign(
        N,
        selection=SelectionConfig(initial=20, batch=30, audit=20, audit_step=7, diversity=1),
        certificate=CertificateConfig(
            method=method, tolerance=1.0, accuracy=0.85, delta=DELTA, **rules
        ),
        stop=StopConfig(max_rounds=5),
        seed=seed,
    )
    labels = np.where(cannot, np.nan, 0.0)
    while not design.is_done:
        indices = design.ask(errors, rng.random(N) - wrong)
        design.tell(indices, labels[indices])
    losses = np.where(cannot, 1.0, np.minimum(errors, 1.0))
    right = ~wrong & ~cannot
    losses[design.labelled], right[design.labelled] = 0.0, True
    true = right.mean() >= 0.85 and losses.mean() <= rules.get("mean_error", 1.0)
    certified = design.certificate.certified
    return certified, certified and not true


@pytest.mark.parametrize("method", ["sequential", "hypergeometric"])
@pytest.mark.parametrize("rules", [{}, {"mean_error": 0.3}])
def test_audited_designs_cover(method: str, rules: dict[str, float]) -> None:
    found = np.array([confidently_wrong(s, method, **rules) for s in range(250)])
    assert limits(int(found[:, 1].sum()), 250)[1] <= DELTA


def test_the_published_rule_does_not() -> None:
    found = np.array([confidently_wrong(s, "kl_batch") for s in range(200)])
    assert limits(int(found[:, 1].sum()), 200)[0] > DELTA
