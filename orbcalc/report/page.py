"""From facts and figures to HTML: the words and numbers of the page."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from jinja2 import Environment, PackageLoader, StrictUndefined

import orbcalc
from orbcalc.active.quantities import QUANTITIES
from orbcalc.files import replace_file
from orbcalc.report import figures
from orbcalc.report.facts import RoundFacts, RunFacts
from orbcalc.report.style import png, svg
from orbcalc.rounding import at_least, at_most

__all__ = ["draw_figures", "render"]

PACKAGES = ("orbcalc", "torch", "e3nn", "ase", "tblite", "numpy", "scipy", "dask", "distributed")
DRAWERS = {
    "certificate": figures.certificate,
    "learning": figures.learning,
    "parity": figures.parity,
    "uncertainty": figures.uncertainty,
    "costs": figures.costs,
}


@dataclass(frozen=True)
class _Number:
    """One of the big numbers at the head of the page."""

    value: str
    name: str
    detail: str = ""


def draw_figures(run: RunFacts, folder: Path) -> dict[str, str]:
    """Draw what there is to draw; write PNG files and return images to put into the page.

    Returns
    -------
    dict
        ``data:`` addresses by the name of the figure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, str] = {}
    for name, draw in DRAWERS.items():
        path = folder / f"{name}.png"
        figure = draw(run)
        if figure is None:
            path.unlink(missing_ok=True)  # it would belong to an earlier run
            continue
        encoded = base64.b64encode(svg(figure)).decode("ascii")
        images[name] = f"data:image/svg+xml;base64,{encoded}"
        replace_file(path, png(figure))
    return images


def render(run: RunFacts, images: Mapping[str, str]) -> str:
    """Return the page.

    Parameters
    ----------
    run
        From :func:`orbcalc.report.reading.read_run`.
    images
        From :func:`draw_figures`; what is missing is said in words.
    """
    environment = Environment(
        loader=PackageLoader("orbcalc", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        name=run.folder.path.resolve().name,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=orbcalc.__version__,
        verdict=_verdict(run),
        numbers=_numbers(run),
        images=images,
        captions=_captions(run),
        rounds=[_row(facts, run) for facts in run.rounds],
        tolerance=_tolerance(run),
        energy_unit=run.energy_unit,
        proof=_proof(run),
        provenance=_provenance(run),
        packages=_packages(),
        settings=list(_settings(run)),
    )


# ------------------------------------------------------------------------------- verdict
def _verdict(run: RunFacts) -> dict[str, str]:
    """Return kind (a CSS class), heading and text; the certificate's statement is verbatim."""
    if run.certificate is None:
        return {"kind": "open", "heading": "Unfinished", "text": _state(run), "note": ""}
    looks = len(run.certificate.looks)
    later = [facts for facts in run.rounds if facts.number > looks]
    return {
        "kind": "good" if run.certificate.certified else "bad",
        "heading": "Certified" if run.certificate.certified else "Not certified",
        "text": run.certificate.statement,
        "note": f"The run has gone on since: {_state(run)}" if later else "",
    }


def _state(run: RunFacts) -> str:
    """Say how far an unfinished run has come."""
    if not run.events:
        return "The run has a configuration, but nothing has happened in it yet."
    last = run.events[-1]
    where = f" in round {last['round']}" if "round" in last else ""
    waiting = sum(c["waiting"] for facts in run.rounds for c in facts.statuses.values())
    labels = f" {waiting} selected structures wait for their reference label." if waiting else ""
    when = str(last.get("time", "?")).replace("T", " ")
    return (
        f"There is no certificate yet, so nothing is proved. The last event was "
        f"“{last.get('event', '?')}”{where} at {when}.{labels} "
        f"Starting the same run again resumes it."
    )


def _numbers(run: RunFacts) -> list[_Number]:
    reference = run.count("reference")
    ok, decided = reference.get("ok", 0), sum(reference.values())
    never = f"{1 - decided / run.n_pool:.1%}".replace("%", " %") if run.n_pool else "–"
    found = [
        _Number(f"{run.n_pool:,}", "structures in the pool", f"rounds begun: {len(run.rounds)}"),
        _Number(f"{ok:,}", "reference labels", _where_from(run)),
        _Number(f"{decided - ok:,}", "failed labels", _failures(reference)),
        _Number(never, "of the pool never labelled", "predicted only"),
        _Number(_duration(run.wall_time_s), "wall time", "first to last event, pauses included"),
        _Number(
            _duration(run.seconds("charges")),
            "for GFN1 labels",
            f"{sum(run.count('charges').values()):,} structures, CPU time",
        ),
        _Number(
            _duration(run.seconds("reference")),
            "for reference labels",
            f"{decided:,} structures, CPU time",
        ),
    ]
    latest = run.latest_audit
    if latest is not None and latest.audited is not None and latest.audited.mae is not None:
        detail = f"m{run.energy_unit}, round {latest.number}, before training on it"
        found.insert(4, _Number(_milli(latest.audited.mae), "MAE of the last audit", detail))
    certified = QUANTITIES[run.config.certificate.quantity]
    looks = [e for e in run.events if e.get("event") == "look" and e.get("mean_error") is not None]
    if looks and run.energy_tolerance is None:  # the number before is of energies
        detail = f"m{certified.unit}, round {looks[-1]['round']}: mean {certified.name}"
        error = _milli(looks[-1]["mean_error"])
        found.insert(4, _Number(error, "error of what is certified, last look", detail))
    return found


def _where_from(run: RunFacts) -> str:
    chosen = [sum(r.statuses[name]["ok"] for r in run.rounds) for name in ("audit", "batch")]
    return f"{chosen[1]:,} for training, {chosen[0]:,} in audits" if chosen[0] else ""


def _failures(counts: Mapping[str, int]) -> str:
    failed = [f"{n:,} {status}" for status, n in sorted(counts.items()) if status != "ok"]
    return ", ".join(failed) or "every calculation succeeded"


# ------------------------------------------------------------------------------ captions
def _captions(run: RunFacts) -> dict[str, str]:
    return {
        "learning": _learning_caption(run),
        "parity": _parity_caption(run),
        "uncertainty": _uncertainty_caption(run),
    }


def _learning_caption(run: RunFacts) -> str:
    audits = [r for r in run.rounds if r.audited is not None and r.audited.mae is not None]
    if not audits:
        return "No audit has been labelled completely yet."
    first, last = audits[0], audits[-1]
    assert first.audited is not None
    assert last.audited is not None
    text = (
        f"MAE on the latest audit: {_milli(last.audited.mae)} m{run.energy_unit}, with "
        f"{last.n_known:,} labels known to the model."
    )
    if len(audits) > 1:
        error = f"{_milli(first.audited.mae)} m{run.energy_unit}"
        text += f" On the first: {error}, with {first.n_known:,}."
    if first.n_pool != last.n_pool:
        text += f" The pool grew from {first.n_pool:,} to {last.n_pool:,} structures in between."
    return text


def _parity_caption(run: RunFacts) -> str:
    audit, forces = run.latest_audit, run.forces
    parts = []
    if audit is not None:
        parts.append(
            f"Energies: the sample of round {audit.number}, as predicted before it was labelled, "
            f"minus a per-element least-squares fit to all labels"
            f"{'' if run.energy_tolerance is None else '; the band is the tolerance'}."
        )
    if forces is not None:
        parts.append(f"Forces: {forces.source}, {forces.n_structures:,} structures.")
    else:
        parts.append(run.forces_problem)
    return " ".join(parts)


def _uncertainty_caption(run: RunFacts) -> str:
    ratios, latest = figures.audit_ratios(run.rounds), run.latest_audit
    if latest is None or not len(ratios):
        return "No audit has been labelled completely yet."
    text = (
        f"Of all {len(ratios):,} audited structures, {_inside(ratios, 1)} have an error below one "
        f"predicted standard deviation σ and {_inside(ratios, 2)} below two; 68 % are meant to be "
        f"below one, and below two it is 95 % of a normal distribution, fewer of heavier tails. "
    )
    newest = figures.audit_ratios([latest])
    if len(newest):
        text += (
            f"In round {latest.number} alone: {_inside(newest, 1)} and {_inside(newest, 2)}. A "
            f"curve above the dashed one means that σ is too large, below it too small."
        )
    return text


def _inside(ratios: Float[np.ndarray, " n"], k: int) -> str:
    return f"{100 * float((ratios <= k).mean()):.0f} %"


# -------------------------------------------------------------------------------- tables
def _row(facts: RoundFacts, run: RunFacts) -> dict[str, str]:
    sample = facts.audited
    share = None
    if run.energy_tolerance is not None and sample:
        share = sample.share_within(run.energy_tolerance)
    elif facts.look is not None and facts.look.n_audit:
        share = 1 - facts.look.n_misses / facts.look.n_audit
    statuses = facts.statuses["audit"] + facts.statuses["batch"]
    failed = sum(n for status, n in statuses.items() if status not in ("ok", "waiting"))
    acquired = facts.acquired.mae if facts.acquired else None
    return {
        "round": str(facts.number),
        "pool": f"{facts.n_pool:,}",
        "known": f"{facts.n_known:,}",
        "audit": _progress(facts.audit, facts.statuses["audit"]),
        "batch": _progress(facts.batch, facts.statuses["batch"]),
        "failed": f"{failed:,}",
        "mae": _milli(sample.mae if sample else None),
        "batch_mae": _milli(acquired),
        "inside": "–" if share is None else f"{100 * share:.0f}",
        "bound": at_least(facts.look.accuracy_bound, 1, percent=True) if facts.look else "–",
        "valid_energy": _milli(facts.valid_errors.get("energy_mae")),
        "valid_forces": _milli(facts.valid_errors.get("forces_mae")),
        "state": "" if facts.finished or run.ended_in(facts.number) else "open",
    }


def _progress(chosen: tuple[str, ...], statuses: Counter[str]) -> str:
    """Return the size of a sample, and how much of it is labelled if not all is."""
    waiting = statuses["waiting"]
    return f"{len(chosen) - waiting:,} of {len(chosen):,}" if waiting else f"{len(chosen):,}"


def _tolerance(run: RunFacts) -> str:
    options = run.config.certificate
    quantity = QUANTITIES[options.quantity]
    return f"{quantity.tolerance(options.tolerance)} ({quantity.name})"


def _proof(run: RunFacts) -> dict[str, str]:
    options, certificate = run.config.certificate, run.certificate
    rows = {
        "Tolerance": _tolerance(run),
        "Asked for (γ)": f"{100 * options.accuracy:g} % of the pool right",
        "Mean error (clipped)": _mean_error(run),
        "Confidence (1 − δ)": f"{100 * (1 - options.delta):g} % over all looks together",
        "Method": {
            "sequential": "random audit without replacement, part by part; exact sequential bound",
            "hypergeometric": "random audit without replacement, exact hypergeometric bound",
            "kl_batch": "hardest batch, KL bound; rests on two assumptions that are not checked",
        }[options.method],
    }
    if certificate is not None:
        rows |= {
            "Looks": str(len(certificate.looks)),
            "Ended because": certificate.reason,
            "Pool": f"{certificate.n_pool:,} structures, hash {certificate.pool_hash}",
            "Model": f"SHA-256 {certificate.model_hash}…",
            "Output": _output(run),
            "Seed, version": f"{certificate.seed}, orbcalc {certificate.version}",
        }
    return {name: text for name, text in rows.items() if text}


def _output(run: RunFacts) -> str:
    """Say what the file with the whole pool holds."""
    ends = [event for event in run.events if "sources" in event]
    if not ends or not run.folder.results.is_file():
        return ""
    n_label, n_predicted, n_failed = (
        f"{ends[-1]['sources'][name]:,}" for name in ("reference", "prediction", "failed")
    )
    return (
        f"{run.folder.results.name}: {n_label} structures with a reference label, {n_predicted} "
        f"with a prediction of this model, {n_failed} with neither"
    )


def _mean_error(run: RunFacts) -> str:
    options, certificate = run.config.certificate, run.certificate
    if options.mean_error is None:
        return ""
    quantity = QUANTITIES[options.quantity]
    asked = f"at most {quantity.tolerance(options.mean_error)} asked for"
    proved = certificate.looks[-1].loss_bound if certificate and certificate.looks else None
    if proved is None:
        return asked
    return f"{asked}, {at_most(1000 * proved * options.tolerance)} m{quantity.unit} proved"


def _provenance(run: RunFacts) -> dict[str, str]:
    names = {"reference": "Reference labels", "charges": "Cheap labels"}
    rows = {}
    for kind, origin in run.provenance.items():
        counts = run.count(kind)
        failed = [f"{n:,} {status}" for status, n in sorted(counts.items()) if status != "ok"]
        rows[names[kind]] = ", ".join([f"{origin}: {counts.get('ok', 0):,} ok", *failed])
    return rows | {name.capitalize(): value for name, value in run.model.items()}


def _packages() -> dict[str, str]:
    """Return what is installed where the page is written."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _settings(run: RunFacts) -> Iterator[tuple[str, list[tuple[str, str, bool]]]]:
    """Yield sections of the resolved configuration: key, value, and whether it was chosen."""
    chosen = _flat(run.config.model_dump(mode="json", exclude_defaults=True))
    sections: dict[str, list[tuple[str, str, bool]]] = {}
    for key, value in _flat(run.config.model_dump(mode="json")).items():
        section, _, rest = key.partition(".")
        row = (rest or key, _plain(value), key in chosen)
        sections.setdefault(section if rest else "run", []).append(row)
    yield from sections.items()


def _flat(data: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat


# --------------------------------------------------------------------------------- words
def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def _milli(value: float | None) -> str:
    """Write eV as meV, three figures."""
    return "–" if value is None else f"{1000 * value:.3g}"


def _duration(seconds: float) -> str:
    """Write a time as people say it.

    Examples
    --------
    >>> _duration(3.04), _duration(75.2), _duration(7260.0)
    ('3.0 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
