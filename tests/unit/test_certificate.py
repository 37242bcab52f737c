"""Certificates: honest accounting, nothing certified by accident."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orbcalc.active.certificate import (
    Certificate,
    Look,
    PoolCounts,
    audit_look,
    hits,
    kl_batch_look,
    kl_lower_bound,
    max_mean,
    max_misses,
)
from orbcalc.errors import ConfigError


# -------------------------------------------------------------------------------- hits
def test_hits_count_nothing_that_is_not_known() -> None:
    errors = [0.0, 0.005, -0.005, 0.0051, np.nan, np.inf, -np.inf]
    assert hits(errors, 0.005).tolist() == [True, True, True, False, False, False, False]
    assert hits([], 0.005).shape == (0,)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_tolerance_must_mean_something(tolerance: float) -> None:
    with pytest.raises(ConfigError, match="expected a finite number above 0"):
        hits([0.0], tolerance)


def test_hits_want_one_axis() -> None:
    with pytest.raises(ConfigError, match=r"errors have shape \(1, 2\)"):
        hits([[0.0, 1.0]], 0.005)


# ------------------------------------------------------------------------------- looks
TERMS = {"look": 1, "gamma": 0.9, "delta": 0.05}
COUNTS = PoolCounts(n_pool=200, n_labelled=90, n_failed=10)


def test_accounting_of_an_audit() -> None:
    sample_hits = np.array([True] * 36 + [False] * 4)
    failed = np.array([False] * 39 + [True])
    look = audit_look(COUNTS, sample_hits, failed=failed, **TERMS)
    bound = max_misses(100, 40, 4, 0.025)
    assert (look.n_inference, look.n_audit, look.n_audit_misses, look.n_audit_failed) == (
        100,
        40,
        4,
        1,
    )
    assert look.level == 0.025
    assert look.misses_bound == bound - 4
    # 10 failed before, 1 in the audit, and at most U - 4 misses among the 60 that are left.
    assert look.n_right == 200 - 10 - 1 - (bound - 4)
    assert look.accuracy_bound == look.n_right / 200


@settings(deadline=None)
@given(st.data())
def test_bound_holds_whenever_the_number_of_misses_does(data) -> None:
    """Compare with the output built structure by structure."""
    method = data.draw(st.sampled_from([audit_look, kl_batch_look]))
    state = np.array(data.draw(st.lists(st.sampled_from("OFhmx"), min_size=1, max_size=40)))
    # O labelled, F failed earlier; in I: h hit, m miss with a label, x miss without one.
    inference = np.flatnonzero(np.isin(state, list("hmx")))
    size = data.draw(st.integers(0, len(inference)))
    sample = np.array(data.draw(st.permutations(inference.tolist()))[:size], dtype=int)
    counts = PoolCounts(len(state), int((state == "O").sum()), int((state == "F").sum()))
    failed = state[sample] == "x"
    look = method(counts, state[sample] == "h", failed=failed, **TERMS)

    right = np.isin(state, ["O", "h"])
    right[sample[state[sample] == "m"]] = True  # repaired by their labels
    n_left = int(np.isin(np.delete(state, sample), ["m", "x"]).sum())
    assert 0 <= look.misses_bound <= len(inference) - size
    assert (n_left <= look.misses_bound) == (right.mean() >= look.accuracy_bound)
    assert look.certified == (look.accuracy_bound >= 0.9)
    if size == len(inference):
        assert look.accuracy_bound == right.mean()


def test_a_failed_audit_label_is_worse_than_a_miss() -> None:
    sample_hits = np.arange(40) != 0
    missed = audit_look(COUNTS, sample_hits, **TERMS)
    failed = audit_look(COUNTS, sample_hits, failed=~sample_hits, **TERMS)
    assert failed.misses_bound == missed.misses_bound
    assert failed.n_right == missed.n_right - 1


def test_a_wholly_labelled_pool_is_certified_by_counting() -> None:
    for method in (audit_look, kl_batch_look):
        good = method(PoolCounts(100, 90, 10), [], **TERMS)
        assert good.certified
        assert good.accuracy_bound == 0.9
        assert not method(PoolCounts(100, 89, 11), [], **TERMS).certified


def test_no_audit_means_no_trust() -> None:
    for method in (audit_look, kl_batch_look):
        look = method(PoolCounts(100, 89, 0), [], **TERMS)
        assert look.accuracy_bound == 0.89
        assert not look.certified


def test_kl_batch_follows_the_published_rule() -> None:
    batch_hits = np.arange(50) >= 1
    look = kl_batch_look(PoolCounts(1000, 500, 0), batch_hits, look=1, gamma=0.9, delta=0.05)
    alpha = kl_lower_bound(0.98, 50, 0.025)
    # (|O| + alpha |I|) / N plus the one miss that its label has repaired.
    assert look.n_right == 500 + math.ceil(alpha * 500) + 1
    assert look.method == "kl_batch"


def test_audit_beats_the_chernoff_bound() -> None:
    sample_hits = np.arange(60) >= 2
    exact = audit_look(COUNTS, sample_hits, **TERMS)
    assert exact.accuracy_bound > kl_batch_look(COUNTS, sample_hits, **TERMS).accuracy_bound


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0), "the pool is empty"),
        ((5, 3, 3), "3 labelled and 3 failed structures in a pool of 5"),
        ((5, -1, 3), "n_labelled is -1, expected 0 or more"),
    ],
)
def test_impossible_pools_are_refused(arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PoolCounts(*arguments)


@pytest.mark.parametrize(
    ("sample_hits", "failed", "message"),
    [
        ([True] * 101, None, "a sample of 101 from an inference set of 100"),
        (
            [0.001, 0.002],
            None,
            r"hits have shape \(2,\) and type float64, expected \(n,\) booleans",
        ),
        ([[True]], None, r"hits have shape \(1, 1\)"),
        ([True, False], [True], r"hits have shape \(2,\), but failed has \(1,\)"),
        ([False, True], [False, True], "structure 1 of the sample is a hit although"),
        ([False], [1], "failed have shape"),
    ],
)
def test_impossible_samples_of_a_look_are_refused(sample_hits, failed, message: str) -> None:
    for method in (audit_look, kl_batch_look):
        with pytest.raises(ConfigError, match=message):
            method(COUNTS, sample_hits, failed=failed, **TERMS)


@pytest.mark.parametrize("gamma", [0.0, -1.0, 1.01, float("nan")])
def test_gamma_must_be_a_share(gamma: float) -> None:
    with pytest.raises(ConfigError, match=r"gamma is .*, expected a number in \(0, 1\]"):
        audit_look(COUNTS, [True], look=1, gamma=gamma, delta=0.05)


# -------------------------------------------------------------------------- mean error
def test_accounting_of_a_mean_error() -> None:
    losses = np.full(40, 0.1)
    losses[:3] = 1.0
    hit, failed = losses < 1, np.arange(40) == 0
    look = audit_look(COUNTS, hit, failed=failed, losses=losses, max_loss=0.4, **TERMS)
    assert look.level == 0.0125  # half of look 1's for each of the two bounds
    assert look.misses_bound == max_misses(100, 40, 3, 0.0125) - 3
    left = 100 * float(max_mean(losses, 100, 0.0125)) - losses[1:].sum()
    # 10 failed before and 1 in the audit count in full, all other labels not at all. What the one
    # would have shown is not known, so nothing is taken away for it.
    assert look.loss_bound == pytest.approx((10 + 1 + left) / 200, abs=1.1e-6)
    assert look.loss_bound >= (10 + 1 + left) / 200 - 1e-11


def test_a_mean_error_is_certified_only_with_the_hits() -> None:
    hit, small, large = np.ones(100, dtype=bool), np.full(100, 0.05), np.full(100, 0.9)
    counts = PoolCounts(1000, 500, 0)
    terms = TERMS | {"max_loss": 0.2}
    assert audit_look(counts, hit, losses=small, **terms).certified
    assert not audit_look(counts, hit, losses=large, **terms).certified
    assert audit_look(counts, hit, losses=large, **TERMS | {"max_loss": 0.9}).certified
    assert not audit_look(counts, ~hit, losses=np.ones(100), **TERMS).certified


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_loss_bound_holds_whenever_the_mean_of_the_losses_does(data) -> None:
    """Compare with the output built structure by structure."""
    losses = np.array(data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=30)))
    size = data.draw(st.integers(0, len(losses)))
    n_labelled, n_failed = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    n = len(losses) + n_labelled + n_failed
    # Any label may be lost, whatever the loss that it would have shown.
    lost = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=bool)
    failed = lost | (losses[:size] == 1)
    seen = np.where(failed, 1.0, losses[:size])
    look = audit_look(
        PoolCounts(n, n_labelled, n_failed), ~failed, failed=failed, losses=seen, **TERMS
    )
    truth = (n_failed + failed.sum() + losses[size:].sum()) / n
    holds = losses.mean() <= float(max_mean(seen, len(losses), look.level)) + 1e-12
    assert (not holds) or truth <= look.loss_bound + 1e-9
    assert look.loss_bound <= (n - n_labelled) / n + 1e-6
    if size == len(losses):
        assert look.loss_bound == pytest.approx(truth, abs=1.1e-6)


@pytest.mark.parametrize(
    ("losses", "changes", "message"),
    [
        ([0.5], {}, r"losses have shape \(1,\) for 2 hits"),
        ([0.5, 0.5], {}, "1 where the label failed"),
        ([0.5, 1.0], {"max_loss": 0.0}, "max_loss is 0.0"),
        ([0.5, 1.0], {"max_loss": 1.5}, "max_loss is 1.5"),
        ([-0.5, 1.0], {}, r"must be in \[0, 1\]"),
    ],
)
def test_impossible_losses_are_refused(losses, changes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        audit_look(COUNTS, [True, False], failed=[False, True], losses=losses, **TERMS | changes)


def make_mean_certificate(**changes) -> Certificate:
    terms = {"gamma": 0.9, "delta": 0.05, "max_loss": 0.4}
    losses = np.random.default_rng(0).uniform(0, 0.2, 80)
    looks = [
        audit_look(
            PoolCounts(500, 100 * n, 1), np.ones(80, dtype=bool), losses=losses, look=n, **terms
        )
        for n in (1, 2)
    ]
    values = vars(make_certificate()) | {
        "looks": tuple(looks), "gamma": 0.9, "n_pool": 500, "mean_error": 0.002,
    }  # fmt: skip
    return Certificate(**values | changes)


def test_a_certificate_of_a_mean_error() -> None:
    certificate = make_mean_certificate()
    assert certificate.certified
    assert Certificate.from_json(certificate.to_json()) == certificate
    bound = certificate.looks[-1].loss_bound * 0.005
    assert (
        f"clipped at 0.005, is at most {bound:.3g} (0.002 was asked for)" in certificate.statement
    )
    assert "mean over the pool" not in make_certificate().statement


def test_a_mean_error_that_does_not_follow_from_its_losses_is_noticed() -> None:
    looks = make_mean_certificate().looks
    better = replace(looks[1], losses=(0.0, *looks[1].losses[1:]))
    for changes, message in (
        ({"looks": (looks[0], better)}, "look 2 of the certificate does not follow"),
        ({"looks": (looks[0], replace(looks[1], losses=(0.1,)))}, "1 losses for a sample of 80"),
        ({"mean_error": None}, "look 1 and the certificate disagree"),
        ({"mean_error": 0.006}, "mean_error is 0.006, expected"),
        ({"mean_error": 0.0}, "mean_error is 0.0, expected"),
        ({"mean_error": 0.0001}, "look 1 of the certificate does not follow"),
        ({"looks": (replace(looks[0], method="kl_batch"), looks[1])}, "says nothing about them"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_mean_certificate(**changes)


# ------------------------------------------------------------------------- certificate
def make_look(number: int, n_misses: int, method=audit_look) -> Look:
    counts = PoolCounts(1000, 300 + 60 * number, 2)
    failed = np.arange(60) < min(n_misses, 1)
    terms = {"look": number, "gamma": 0.95, "delta": 0.05}
    return method(counts, np.arange(60) >= n_misses, failed=failed, **terms)


def make_certificate(method=audit_look, reason: str = "certified", **changes) -> Certificate:
    last = make_look(3, 0 if reason == "certified" else 9, method)
    values = {
        "reason": reason,
        "looks": (make_look(1, 20, method), make_look(2, 8, method), last),
        "tolerance": 0.005,
        "quantity": "energy per atom, eV",
        "gamma": 0.95,
        "delta": 0.05,
        "seed": 7,
        "n_pool": 1000,
        "pool_hash": "p00l",
        "model_hash": "m0del",
        "version": "0.1.0",
    }
    return Certificate(**(values | changes))


@pytest.mark.parametrize("method", [audit_look, kl_batch_look])
@pytest.mark.parametrize("reason", ["certified", "max_rounds"])
def test_json_round_trip(method, reason: str) -> None:
    certificate = make_certificate(method, reason)
    text = certificate.to_json()
    assert Certificate.from_json(text) == certificate
    assert json.loads(text)["certified"] is (reason == "certified")
    assert json.loads(text)["statement"] == certificate.statement


def test_statement_says_what_is_proved_and_of_what() -> None:
    certificate = make_certificate()
    last = certificate.looks[-1]
    for words in (
        "Certified: with 95 % confidence",
        f"at least {last.n_right} of the 1000 structures",
        "pool p00l",
        "model m0del",
        "within 0.005 of it (energy per atom, eV)",
        "that pool only",
        "MD run",
    ):
        assert words in certificate.statement
    assert "assumptions" not in certificate.statement
    assert "two assumptions that were not checked" in make_certificate(kl_batch_look).statement
    assert make_certificate(reason="max_rounds").statement.startswith("Not certified (max_rounds)")
    nothing = make_certificate(reason="max_labels", looks=())
    assert not nothing.certified
    assert "nothing is proved" in nothing.statement


def test_a_statement_speaks_of_what_the_pool_is_made_of() -> None:
    digits = replace(make_certificate(), objects="images", not_covered="images met later")
    assert "of the 1000 images of pool" in digits.statement
    assert digits.statement.endswith("not images met later.")
    assert Certificate.from_json(digits.to_json()) == digits


def test_a_certificate_without_a_word_for_its_objects_is_one_of_structures() -> None:
    certificate = make_certificate()
    data = json.loads(certificate.to_json())
    del data["objects"], data["not_covered"]
    assert Certificate.from_json(json.dumps(data)) == certificate


def test_write_replaces_the_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "certificate.json"
    make_certificate(reason="max_rounds").write(path)
    make_certificate().write(path)
    assert Certificate.from_json(path.read_text(encoding="utf-8")) == make_certificate()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_certificate(reason="max_rounds").write(path)
    assert Certificate.from_json(path.read_text(encoding="utf-8")).certified
    assert [file.name for file in tmp_path.iterdir()] == ["certificate.json"]


@pytest.mark.parametrize(
    "field", ["n_failed", "n_labelled", "n_audit_misses", "misses_bound", "accuracy_bound", "level"]
)
def test_a_look_that_was_changed_is_noticed(field: str) -> None:
    looks = list(make_certificate().looks)
    looks[1] = replace(looks[1], **{field: getattr(looks[1], field) + 1})
    with pytest.raises(ConfigError, match="look 2 of the certificate does not follow"):
        make_certificate(looks=tuple(looks))


def test_impossible_recorded_counts_are_noticed() -> None:
    looks = make_certificate(kl_batch_look).looks
    for changes, message in (
        ({"n_audit_failed": -1}, "n_audit_failed is -1"),
        ({"n_audit_failed": 50}, "expected 0 <= failed <= misses <= size"),
        # The second half is what the annotation says where tests check it at run time.
        ({"method": "guess"}, "unknown method 'guess'|Actual value: 'guess'"),
    ):
        with pytest.raises((ConfigError, TypeError), match=message):
            make_certificate(kl_batch_look, looks=(replace(looks[0], **changes), *looks[1:]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"looks": (make_look(2, 8), make_look(3, 0))}, "look 1 .*list all looks"),
        ({"delta": 0.1}, "look 1 of the certificate does not follow"),
        ({"gamma": 0.5}, "look 1 of the certificate does not follow"),
        ({"n_pool": 999}, "a pool of 1000 structures, but the certificate is for 999"),
        ({"reason": "max_rounds"}, "'max_rounds', but the last look is certified"),
        ({"looks": ()}, "'certified', but the last look is not certified"),
        ({"looks": (make_look(1, 20),)}, "'certified', but the last look is not certified"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_contradictions_are_refused(changes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(make_certificate(), **changes)


@pytest.mark.parametrize("text", ["", "[]", "{}", "5", '{"format_version": 1, "certified": true}'])
def test_text_that_is_no_certificate(text: str) -> None:
    with pytest.raises(ConfigError, match="this text is no certificate"):
        Certificate.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format 2, expected 1"),
        ({"certified": True}, "says certified: True, but its looks say otherwise"),
        ({"surprise": 1}, "no certificate: .*surprise"),
        ({"n_pool": 1000.5}, "n_pool is 1000.5, expected an integer|n_pool"),
    ],
)
def test_json_that_was_changed(changes, message: str) -> None:
    data = json.loads(make_certificate(reason="max_rounds").to_json()) | changes
    with pytest.raises(ConfigError, match=message):
        Certificate.from_json(json.dumps(data))
