"""Inference set design: the protocol, every end, and never a false certificate at the edges."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orbcalc.active.decisions import choose_batch, is_decided, reason_to_end
from orbcalc.active.design import InferenceSetDesign, largest_errors
from orbcalc.active.looks import PoolCounts, audit_look
from orbcalc.config import CertificateConfig, SelectionConfig, StopConfig
from orbcalc.errors import ConfigError

SIZES = SelectionConfig(initial=10, batch=8, audit=12)
RULES = CertificateConfig(tolerance=0.5, accuracy=0.8, delta=0.1)
FIXED = RULES.model_copy(update={"method": "hypergeometric"})


def finish(
    design: InferenceSetDesign,
    truth: np.ndarray,
    predictions: np.ndarray,
    scores: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Run a design with a model that learns nothing; returns what was asked for."""
    asked = []
    while not design.is_done:
        if design.awaits_model:
            asked.append(
                design.ask(predictions, np.zeros(len(truth)) if scores is None else scores)
            )
        else:
            asked.append(design.ask())
        design.tell(asked[-1], truth[asked[-1]])
        assert len(asked) < 200
    return asked


def make(n: int, **changes) -> InferenceSetDesign:
    options = {"selection": SIZES, "certificate": RULES} | changes
    return InferenceSetDesign(n, **options)


# ------------------------------------------------------------------------------ protocol
def test_a_good_model_is_certified_at_the_first_look() -> None:
    design = make(200, certificate=FIXED, name="squares", quantity="area")
    asked = finish(design, np.zeros(200), np.zeros(200))
    assert [len(a) for a in asked] == [10, 12]
    assert design.certificate.certified
    statement = design.certificate.statement
    assert "of the 200 objects of pool squares" in statement
    assert statement.endswith("this covers that pool only, not objects met later.")
    assert "structure" not in statement
    assert "(area)" in statement
    assert sorted(design.labelled) == sorted(np.concatenate(asked))


def test_a_sequential_audit_goes_on_until_it_decides() -> None:
    sizes = SIZES.model_copy(update={"audit": 60, "audit_step": 5})
    good = make(200, selection=sizes)
    asked = finish(good, np.zeros(200), np.zeros(200))
    assert good.certificate.certified
    assert [len(a) for a in asked] == [10, 5, 5, 5]
    assert [look.n_audit for look in good.looks] == [15]
    shorter = audit_look(
        PoolCounts(200, 10, 0),
        np.ones(10, dtype=bool),
        look=1,
        gamma=0.8,
        delta=0.1,
        method="sequential",
    )
    assert not shorter.certified
    bad = make(200, selection=sizes, stop=StopConfig(max_rounds=2))
    asked = finish(bad, np.zeros(200), np.ones(200))
    assert [len(a) for a in asked] == [10, 5, 8, 5]  # one part tells that it is in vain
    everything = np.concatenate(asked)
    assert len(set(everything.tolist())) == len(everything)


def test_a_sequential_audit_ends_at_its_limit_and_at_the_budget() -> None:
    truth = np.zeros(200)
    truth[::9] = 1.0  # 11 % misses, which is neither good nor bad
    # Fewer than prove anything, so what is foreseen at its end does not end it.
    sizes = SelectionConfig(initial=10, batch=8, audit=13, audit_step=5)
    design = make(200, selection=sizes, stop=StopConfig(max_rounds=1), seed=4)
    assert [len(a) for a in finish(design, truth, np.zeros(200))] == [10, 5, 5, 3]
    assert design.certificate.reason == "max_rounds"
    design = make(200, selection=sizes, stop=StopConfig(max_labels=24), seed=4)
    assert sum(len(a) for a in finish(design, truth, np.zeros(200))) == 24
    assert design.certificate.reason == "max_labels"


def test_an_audit_of_mean_errors_goes_on_while_they_are_not_proved() -> None:
    rules = CertificateConfig(tolerance=1.0, accuracy=0.5, mean_error=0.2)
    sizes = SelectionConfig(initial=10, batch=10, audit=200, audit_step=10)
    near, far = (make(300, certificate=rules, selection=sizes) for _ in range(2))
    finish(near, np.zeros(300), np.full(300, 0.1))
    assert near.certificate.certified
    assert near.looks[0].n_audit > 10  # whose hits alone would prove the share
    finish(far, np.zeros(300), np.full(300, 0.4))
    assert far.looks[0].n_audit == 10
    assert far.looks[0].accuracy_bound > 0.5


def test_every_index_is_asked_for_once_and_by_the_stated_sizes() -> None:
    rng = np.random.default_rng(0)
    design = make(100, stop=StopConfig(max_rounds=3))
    asked = finish(design, np.zeros(100), np.ones(100), rng.random(100))
    assert [len(a) for a in asked] == [10, 12, 8, 12, 8, 12]
    everything = np.concatenate(asked)
    assert len(set(everything.tolist())) == len(everything)
    assert design.certificate.reason == "max_rounds"
    assert [look.n_labelled for look in design.looks] == [10, 30, 50]


def test_the_batch_is_the_hardest_of_what_is_not_audited() -> None:
    scores = np.random.default_rng(1).random(100)
    design = make(100, selection=SIZES.model_copy(update={"diversity": 1.0}))
    initial = design.ask()
    design.tell(initial, np.zeros(10))
    audit = design.ask(np.ones(100), scores)
    design.tell(audit, np.zeros(12))
    rest = np.setdiff1d(np.arange(100), np.concatenate([initial, audit]))
    assert design.ask().tolist() == rest[np.argsort(-scores[rest])[:8]].tolist()


def test_the_same_seed_asks_for_the_same() -> None:
    runs = [finish(make(80, seed=s), np.zeros(80), np.ones(80)) for s in (3, 3, 4)]
    first, again, other = (np.concatenate(asked).tolist() for asked in runs)
    assert first == again != other


def test_asking_twice_changes_nothing_and_predictions_are_frozen() -> None:
    design = make(100)
    first = design.ask()
    assert design.ask().tolist() == first.tolist()
    design.tell(first, np.zeros(10))
    predictions = np.ones(100)
    audit = design.ask(predictions, np.zeros(100))
    predictions[:] = 0  # what was said before the labels counts
    assert design.ask(np.zeros(100), np.zeros(100)).tolist() == audit.tolist()
    look = design.tell(audit, np.zeros(12))
    assert look is not None
    assert look.n_audit_misses == 12


def test_what_was_asked_for_may_be_sorted_by_the_caller() -> None:
    design = make(100)
    design.tell(design.ask(), np.zeros(10))
    audit = design.ask(np.zeros(100), np.zeros(100))
    expected = audit.tolist()
    audit.sort()
    assert audit.tolist() != expected
    with pytest.raises(ConfigError, match="not the indices that were asked for"):
        design.tell(audit, np.zeros(len(audit)))
    assert design.ask().tolist() == expected


def test_the_published_rule_asks_for_no_audit() -> None:
    design = make(100, certificate=RULES.model_copy(update={"method": "kl_batch"}))
    asked = finish(design, np.zeros(100), np.zeros(100))
    assert {len(a) for a in asked[1:]} <= {8, 2}
    assert {look.method for look in design.looks} == {"kl_batch"}
    assert "assumptions that were not checked" in design.certificate.statement


def test_mean_errors_are_certified_too() -> None:
    rules = CertificateConfig(tolerance=1.0, accuracy=0.8, mean_error=0.3)
    sizes = SelectionConfig(initial=10, batch=10, audit=60, audit_step=60)
    good, bad = (make(300, certificate=rules, selection=sizes) for _ in range(2))
    finish(good, np.zeros(300), np.full(300, 0.05))
    assert good.certificate.certified
    assert len(good.looks) == 1
    assert "clipped at 1, is at most" in good.certificate.statement
    finish(bad, np.zeros(300), np.full(300, 0.9))  # hits all of them, but not near ones
    assert bad.looks[0].accuracy_bound >= 0.8
    assert not bad.looks[0].certified
    left = 300 - len(bad.labelled)
    assert 0.9 * left / 300 <= bad.looks[-1].loss_bound


def test_losses_are_shuffled_before_they_are_bet_on() -> None:
    rules = CertificateConfig(tolerance=1.0, accuracy=0.5, mean_error=0.9)
    sizes = SelectionConfig(initial=10, batch=10, audit=90, audit_step=90)
    design = make(100, certificate=rules, selection=sizes)
    finish(design, np.zeros(100), np.arange(100) / 100)
    losses = np.array(design.looks[0].losses)
    assert (np.diff(losses) < 0).sum() > 20


def test_labels_of_several_numbers_are_compared_by_the_largest_error() -> None:
    predictions = np.zeros((100, 2, 3))
    truth = np.zeros((100, 2, 3))
    truth[:, 1, 2] = 0.6  # beyond the tolerance
    design = make(100, stop=StopConfig(max_rounds=1))
    finish(design, truth, predictions)
    assert design.looks[0].n_audit_misses == 12
    assert largest_errors(np.zeros((0, 3))).shape == (0,)


def test_features_and_costs_reach_the_selection() -> None:
    features = np.repeat(np.arange(8.0), 25)[:, None]
    sizes = SIZES.model_copy(update={"method": "diversity"})
    terms = {"budget": None, "seed": 0, "number": 1}
    batch = choose_batch(np.zeros(200), sizes, features=features, **terms)
    assert len(set(features[batch, 0])) == 8
    costs = np.where(np.arange(200) < 50, 1.0, 100.0)
    assert (choose_batch(np.ones(200), SIZES, costs=costs, **terms) < 50).all()


# ------------------------------------------------------------------------------ refusals
def test_misuse_is_named() -> None:
    design = make(50)
    with pytest.raises(ConfigError, match="the design has not ended"):
        design.certificate  # noqa: B018
    with pytest.raises(ConfigError, match="not the indices that were asked for"):
        design.tell([1], [0.0])
    indices = design.ask()
    with pytest.raises(ConfigError, match="not the indices that were asked for"):
        design.tell(indices[::-1], np.zeros(10))
    with pytest.raises(ConfigError, match="3 labels for 10 indices"):
        design.tell(indices, np.zeros(3))
    design.tell(indices, np.zeros(10))
    with pytest.raises(ConfigError, match="a model is awaited"):
        design.ask()
    with pytest.raises(ConfigError, match=r"predictions have shape \(49,\) for a pool of 50"):
        design.ask(np.zeros(49), np.zeros(50))
    with pytest.raises(ConfigError, match=r"scores have shape \(1,\) for a pool of 50"):
        design.ask(np.zeros(50), np.zeros(1))
    audit = design.ask(np.zeros(50), np.zeros(50))
    with pytest.raises(ConfigError, match=r"labels have shape \(12, 2\)"):
        design.tell(audit, np.zeros((12, 2)))
    design.tell(audit, np.zeros(12))
    assert design.is_done
    with pytest.raises(ConfigError, match="the design has ended"):
        design.ask()


@pytest.mark.parametrize("rules", [RULES, RULES.model_copy(update={"method": "kl_batch"})])
def test_what_a_batch_lacks_is_told_before_any_label_is_paid_for(rules: CertificateConfig) -> None:
    sizes = SIZES.model_copy(update={"method": "diversity"})
    design = make(50, selection=sizes, certificate=rules, stop=StopConfig(max_rounds=1))
    design.tell(design.ask(), np.zeros(10))
    for _ in range(2):
        with pytest.raises(ConfigError, match="'diversity' needs features"):
            design.ask(np.zeros(50), np.zeros(50))
    assert design.awaits_model
    indices = design.ask(np.zeros(50), np.zeros(50), features=np.zeros((50, 2)))
    design.tell(indices, np.zeros(len(indices)))
    assert [look.look for look in design.certificate.looks] == [1]


# ---------------------------------------------------------------------------------- edges
def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match="the pool is empty"):
        make(0)


@pytest.mark.parametrize("n", [1, 2, 9, 10, 11, 15, 22])
@pytest.mark.parametrize("method", ["sequential", "hypergeometric", "kl_batch"])
def test_pools_smaller_than_a_round_are_labelled_and_then_right(n: int, method) -> None:
    design = make(n, certificate=RULES.model_copy(update={"method": method}))
    finish(design, np.zeros(n), np.ones(n))  # a model that is always wrong
    assert design.certificate.certified
    assert len(design.labelled) >= 0.8 * n
    assert design.looks[-1].n_right <= n


def test_a_pool_of_failures_is_never_certified() -> None:
    for n, reason in ((5, "pool exhausted"), (60, "too many failed labels")):
        design = make(n, stop=StopConfig(max_rounds=99))
        finish(design, np.full(n, np.nan), np.zeros(n))
        assert design.certificate.reason == reason
        assert design.looks[-1].accuracy_bound == 0.0
        assert len(design.labelled) == 0


def test_failures_can_be_told_without_nan() -> None:
    design = make(60)
    indices = design.ask()
    design.tell(indices, np.zeros(10), failed=np.arange(10) < 4)
    assert len(design.labelled) == 6


@pytest.mark.parametrize("predicted", [np.nan, np.inf, -np.inf])
def test_predictions_that_are_nothing_are_misses(predicted: float) -> None:
    design = make(60, stop=StopConfig(max_rounds=99))
    scores = np.full(60, np.nan)
    asked = finish(design, np.zeros(60), np.full(60, predicted), scores)
    assert all(look.n_audit_misses == look.n_audit for look in design.looks)
    assert design.certificate.certified  # once 80 % are labelled, and not before
    assert len(np.concatenate(asked)) >= 48


def test_a_target_out_of_reach_ends_at_the_budget_without_a_certificate() -> None:
    rules = CertificateConfig(tolerance=0.5, accuracy=0.999)
    design = make(500, certificate=rules, stop=StopConfig(max_rounds=99, max_labels=75))
    asked = finish(design, np.zeros(500), np.ones(500))
    assert design.certificate.reason == "max_labels"
    assert not design.certificate.certified
    assert sum(len(a) for a in asked) == 75


def test_a_budget_below_the_first_round_is_kept() -> None:
    design = make(500, stop=StopConfig(max_labels=4))
    assert len(design.ask()) == 4
    finish(design, np.zeros(500), np.zeros(500))
    assert design.certificate.reason == "max_labels"
    assert design.looks[-1].accuracy_bound == 4 / 500


def test_duplicates_are_counted_one_by_one() -> None:
    """Half the pool is one object that the model gets wrong, however often it is labelled."""
    truth = np.where(np.arange(100) < 50, 1.0, 0.0)
    features = truth[:, None]
    design = make(100, stop=StopConfig(max_rounds=99))
    while not design.is_done:
        indices = design.ask(np.zeros(100), np.zeros(100), features=features)
        design.tell(indices, truth[indices])
    right = np.zeros(100, dtype=bool)
    right[50:], right[design.labelled] = True, True
    assert right.mean() >= design.looks[-1].accuracy_bound
    assert design.certificate.certified


def test_reasons_come_in_order() -> None:
    terms, rules = {"gamma": 0.9, "delta": 0.05}, CertificateConfig(accuracy=0.9)
    bad = audit_look(PoolCounts(100, 10, 0), np.zeros(20, dtype=bool), look=2, **terms)
    assert reason_to_end(bad, StopConfig(max_rounds=3), rules) is None
    assert reason_to_end(bad, StopConfig(max_rounds=2, max_labels=30), rules) == "max_rounds"
    assert reason_to_end(bad, StopConfig(max_rounds=3, max_labels=30), rules) == "max_labels"
    lost = audit_look(PoolCounts(30, 0, 10), np.zeros(20, dtype=bool), look=1,
                      failed=np.ones(20, dtype=bool), **terms)  # fmt: skip
    assert reason_to_end(lost, StopConfig(), rules) == "pool exhausted"
    assert reason_to_end(lost, StopConfig(), rules, grows=True) is None


@pytest.mark.parametrize(("n_failed", "reason"), [(10, None), (11, "too many failed labels")])
def test_failed_labels_may_leave_nothing_to_certify(n_failed: int, reason: str | None) -> None:
    rules = CertificateConfig(accuracy=0.9)
    look = audit_look(
        PoolCounts(100, 20, n_failed), np.zeros(20, dtype=bool), look=1, gamma=0.9, delta=0.05
    )
    assert reason_to_end(look, StopConfig(), rules) == reason
    assert reason_to_end(look, StopConfig(), rules, grows=True) is None


def test_it_loads_neither_chemistry_nor_networks() -> None:
    heavy = "{'torch', 'ase', 'dask', 'distributed', 'tblite', 'e3nn'}"
    code = f"import orbcalc.active.design, sys; print({heavy} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(
    ("batch", "misses", "decided"),
    [(400, 8, True), (1000, 8, False), (400, 2, False), (1000, 0, False)],
)
def test_an_audit_is_given_up_when_it_has_cost_a_part_of_the_batch(batch, misses, decided):
    hit = np.arange(40) >= misses
    look = audit_look(PoolCounts(60_000, 19_820, 0), hit, look=3, gamma=0.95, delta=0.05)
    rules = CertificateConfig(tolerance=1.0, accuracy=0.95)
    assert is_decided(look, 1800, SelectionConfig(batch=batch), rules) is decided


@pytest.mark.parametrize(
    ("labelled", "misses", "limit", "decided"),
    [
        (40, 2, 1800, False),  # 1.5 are expected of a model that is good enough
        (40, 5, 1800, True),
        (300, 10, 1800, False),
        (300, 18, 1800, True),  # fewer than are allowed, but that will not be proved
        (80, 5, 100, False),  # nor would a quarter of those allowed, with so few
        (80, 9, 100, True),
        (40, 0, 60, False),
        (700, 3, 1800, True),  # certified
    ],
)
def test_an_audit_ends_where_its_end_would_prove_nothing(labelled, misses, limit, decided):
    hit = np.arange(labelled) >= misses
    terms = {"look": 3, "gamma": 0.95, "delta": 0.05, "method": "sequential"}
    look = audit_look(PoolCounts(60_000, 19_820, 0), hit, **terms)
    rules = CertificateConfig(tolerance=1.0, accuracy=0.95)
    assert is_decided(look, limit, SelectionConfig(), rules) is decided
    assert look.certified is (labelled == 700)


@pytest.mark.parametrize(("n_failed", "decided"), [(0, False), (60, False), (101, True)])
def test_failed_labels_leave_less_to_prove(n_failed, decided):
    terms = {"look": 1, "gamma": 0.95, "delta": 0.05, "method": "sequential"}
    look = audit_look(PoolCounts(2000, 400, n_failed), np.ones(20, dtype=bool), **terms)
    rules = CertificateConfig(tolerance=1.0, accuracy=0.95)
    assert is_decided(look, 400, SelectionConfig(), rules) is decided
