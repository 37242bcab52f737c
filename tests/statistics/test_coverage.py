"""Simulated coverage: how often a bound is false, over thousands of pools.

A pool counts against a method if the bound of *any* of its looks is false. The 99.9 % upper
confidence limit of that share must be below delta; where a rule ought to fail, the lower limit
must be above it, which shows that the simulation would notice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pytest
from scipy.stats import beta

from orbcalc.active.bounds import kl_lower_bound, max_misses
from orbcalc.active.certificate import Look, PoolCounts, audit_look, kl_batch_look
from orbcalc.active.selection import draw_audit, select_hardest

DELTA = 0.2
GAMMA = 0.9


@pytest.fixture(autouse=True)
def remembered_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute each bound once; thousands of pools ask for the same ones."""
    monkeypatch.setattr("orbcalc.active.looks.max_misses", cache(max_misses))
    monkeypatch.setattr("orbcalc.active.looks.kl_lower_bound", cache(kl_lower_bound))


def share_limits(n_events: int, n: int) -> tuple[float, float]:
    """Return Clopper-Pearson limits of a share, each missed with probability 0.1 %."""
    lower = float(beta.ppf(0.001, n_events, n - n_events + 1)) if n_events else 0.0
    upper = float(beta.ppf(0.999, n_events + 1, n - n_events)) if n_events < n else 1.0
    return lower, upper


# ------------------------------------------------------------------ counts, many pools
def count_violations(
    next_misses: Callable[..., np.ndarray],
    *,
    n_looks: int,
    corrected: bool = True,
    n_pools: int = 20_000,
    n_inference: int = 400,
    n_audit: int = 40,
) -> int:
    """Count the pools with a false bound; the misses may depend on what was seen before."""
    rng = np.random.default_rng(0)
    seen, violated = np.zeros(n_pools, dtype=int), np.zeros(n_pools, dtype=bool)
    for look in range(1, n_looks + 1):
        misses = next_misses(look, seen, n_inference)
        seen = rng.hypergeometric(misses, n_inference - misses, n_audit)
        spent = {"look": look, "delta": DELTA} if corrected else {"look": 1, "delta": 2 * DELTA}
        counts = PoolCounts(n_inference, 0, 0)
        left = np.array(
            [
                audit_look(counts, np.arange(n_audit) >= k, gamma=GAMMA, **spent).misses_bound
                for k in range(n_audit + 1)
            ]
        )
        violated |= misses - seen > left[seen]
        n_inference -= n_audit
    return int(violated.sum())


def constant(share: float, look: int, seen: np.ndarray, n_inference: int) -> np.ndarray:
    """Give the same share of misses at each look."""
    return np.full_like(seen, int(share * n_inference))


def adversary(look: int, seen: np.ndarray, n_inference: int) -> np.ndarray:
    """Train a bad model after a good audit and a good one after a bad audit."""
    return np.where(seen <= 4, n_inference // 4, n_inference // 20)


@pytest.mark.parametrize("n_looks", [1, 3, 8])
@pytest.mark.parametrize(
    "next_misses",
    [*(partial(constant, share) for share in (0.02, 0.06, 0.15, 0.5, 0.9)), adversary],
)
def test_audits_cover_over_all_looks(next_misses: Callable[..., np.ndarray], n_looks: int) -> None:
    n_violated = count_violations(next_misses, n_looks=n_looks)
    assert share_limits(n_violated, 20_000)[1] <= DELTA


def test_coverage_is_not_bought_by_vacuous_bounds() -> None:
    # Eight looks may spend 8/9 of delta; the rest is lost to the discreteness of the counts,
    # which is least in the middle.
    n_violated = count_violations(partial(constant, 0.5), n_looks=8)
    assert share_limits(n_violated, 20_000)[0] > DELTA / 2


def test_looks_that_are_not_paid_for_are_noticed() -> None:
    n_violated = count_violations(partial(constant, 0.15), n_looks=8, corrected=False)
    assert share_limits(n_violated, 20_000)[0] > DELTA


# --------------------------------------------------------- whole loops, real functions
@dataclass
class Pool:
    """A pool with known truth; ``miss`` is drawn anew for each model."""

    scores: np.ndarray
    miss_probability: np.ndarray
    cannot: np.ndarray  # labels that will fail


@dataclass(frozen=True)
class Tally:
    """Over many pools: some bound false; certified at some look; the first of those false."""

    violated: int
    certified: int
    falsely: int


def hardness_pool(rng: np.random.Generator, failing: float = 0.0) -> Pool:
    """Make a pool whose scores tell something about the misses."""
    hardness = rng.random(300)
    scores = hardness + 0.3 * rng.random(300)
    return Pool(scores, 0.3 * hardness**2, rng.random(300) < failing)


def confidently_wrong_pool(rng: np.random.Generator) -> Pool:
    """Make a quarter of the pool wrong with the lowest scores, the rest right."""
    wrong = np.arange(300) < 75
    return Pool(rng.random(300) - wrong, wrong.astype(float), np.zeros(300, dtype=bool))


def uninformative_pool(rng: np.random.Generator) -> Pool:
    """Make scores random, so that the hardest batch *is* a random sample."""
    return Pool(rng.random(300), np.full(300, 0.12), np.zeros(300, dtype=bool))


def run_loop(
    pool: Pool,
    rng: np.random.Generator,
    method: Callable[..., Look],
    *,
    n_looks: int,
    size: int,
    repair_failed: bool,
) -> tuple[bool, bool, bool]:
    """Look several times; return (violated, certified, falsely certified)."""
    labelled, failed = np.zeros_like(pool.cannot), np.zeros_like(pool.cannot)
    violated, certified, falsely = False, False, False

    def label(chosen: np.ndarray) -> None:
        labelled[chosen] = ~pool.cannot[chosen]
        failed[chosen] = pool.cannot[chosen]

    label(draw_audit(300, 40, rng))
    for look in range(1, n_looks + 1):
        miss = (rng.random(300) < pool.miss_probability / look) | pool.cannot
        rest = np.flatnonzero(~labelled & ~failed)
        if method is audit_look:
            sample = rest[draw_audit(len(rest), size, rng)]
        else:
            sample = rest[select_hardest(pool.scores[rest], size, rng=rng)]
        bad_labels = np.zeros(size, dtype=bool) if repair_failed else pool.cannot[sample]
        counts = PoolCounts(300, int(labelled.sum()), int(failed.sum()))
        result = method(
            counts, ~miss[sample], failed=bad_labels, look=look, gamma=GAMMA, delta=DELTA
        )
        label(sample)
        accuracy = float(np.mean(labelled | (~failed & ~miss)))
        violated |= accuracy < result.accuracy_bound
        falsely |= result.certified and not certified and accuracy < GAMMA
        certified |= result.certified
        if method is audit_look:
            rest = np.flatnonzero(~labelled & ~failed)
            label(rest[select_hardest(pool.scores[rest], 20, rng=rng)])
    return violated, certified, falsely


def run_pools(
    make_pool: Callable[[np.random.Generator], Pool],
    method: Callable[..., Look],
    *,
    n_looks: int = 3,
    size: int = 30,
    repair_failed: bool = False,
) -> Tally:
    loop = partial(run_loop, n_looks=n_looks, size=size, repair_failed=repair_failed)
    outcomes = []
    for seed in np.random.SeedSequence(1).spawn(1000):
        rng = np.random.default_rng(seed)
        outcomes.append(loop(make_pool(rng), rng, method))
    return Tally(*(int(n) for n in np.sum(outcomes, axis=0)))


@pytest.mark.parametrize("failing", [0.0, 0.05, 0.3])
def test_audited_loops_cover_with_failing_labels(failing: float) -> None:
    tally = run_pools(partial(hardness_pool, failing=failing), audit_look)
    assert share_limits(tally.violated, 1000)[1] <= DELTA
    assert share_limits(tally.falsely, 1000)[1] <= DELTA
    if failing == 0:
        assert tally.certified > 900  # and good pools do get their certificate


def test_counting_failed_audit_labels_as_repaired_is_noticed() -> None:
    run = partial(run_pools, partial(hardness_pool, failing=0.3), audit_look, n_looks=1, size=150)
    assert share_limits(run().violated, 1000)[1] <= DELTA
    assert share_limits(run(repair_failed=True).violated, 1000)[0] > DELTA


def test_kl_batch_covers_where_its_assumptions_hold() -> None:
    tally = run_pools(uninformative_pool, kl_batch_look)
    assert share_limits(tally.violated, 1000)[1] <= DELTA


def test_kl_batch_fails_on_a_confidently_wrong_cluster_and_audits_do_not() -> None:
    batch = run_pools(confidently_wrong_pool, kl_batch_look)
    assert share_limits(batch.violated, 1000)[0] > DELTA
    assert share_limits(batch.falsely, 1000)[0] > DELTA
    audit = run_pools(confidently_wrong_pool, audit_look)
    assert share_limits(audit.violated, 1000)[1] <= DELTA
    assert share_limits(audit.falsely, 1000)[1] <= DELTA
