"""What is known of a run at one moment, as plain numbers: all that the page shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from jaxtyping import Float

from orbcalc.active.certificate import Certificate
from orbcalc.active.folder import RunFolder
from orbcalc.config import RunConfig

__all__ = ["Comparison", "ForceComparison", "LookFacts", "RoundFacts", "RunFacts"]


@dataclass(frozen=True)
class Comparison:
    """Predictions made before labelling, beside the labels; NaN where either is missing.

    All in :attr:`RunFacts.energy_unit`.
    """

    predicted: Float[np.ndarray, " n"]
    """Energy minus the per-element fit."""
    reference: Float[np.ndarray, " n"]
    uncertainty: Float[np.ndarray, " n"]
    """One predicted standard deviation."""

    @property
    def error(self) -> Float[np.ndarray, " n"]:
        """Prediction minus reference."""
        return np.asarray(self.predicted - self.reference)

    @property
    def absolute(self) -> Float[np.ndarray, " m"]:
        """Absolute errors that are known."""
        return np.asarray(np.abs(self.error[np.isfinite(self.error)]))

    @property
    def mae(self) -> float | None:
        """Mean absolute error; None if nothing can be compared."""
        return float(self.absolute.mean()) if len(self.absolute) else None

    def share_within(self, tolerance: float) -> float | None:
        """Return the share with an error of at most a tolerance; unknown is outside."""
        if not len(self.error):
            return None
        return float((np.abs(self.error) <= tolerance).mean())


@dataclass(frozen=True)
class LookFacts:
    """One look at the certificate; ``estimate`` is the same share without a guarantee."""

    number: int
    n_audit: int
    n_misses: int
    accuracy_bound: float
    estimate: float | None
    certified: bool


@dataclass(frozen=True)
class RoundFacts:
    """One round, as far as it has come."""

    number: int
    n_pool: int
    n_known: int
    """Reference labels that existed when the round began: its predictions rest on them."""
    audit: tuple[str, ...]
    batch: tuple[str, ...]
    statuses: dict[str, Counter[str]]
    """Of the reference labels, for "audit" and "batch"; "waiting" where there is none yet."""
    audited: Comparison | None
    """The sample of the certificate; None before all of its labels are there."""
    acquired: Comparison | None
    look: LookFacts | None
    valid_errors: dict[str, float]
    finished: bool


@dataclass(frozen=True)
class ForceComparison:
    """Force components that the model was not trained on, eV/Å."""

    predicted: Float[np.ndarray, " n"]
    reference: Float[np.ndarray, " n"]
    n_structures: int
    source: str


@dataclass(frozen=True)
class RunFacts:
    """Everything that the page shows."""

    folder: RunFolder
    config: RunConfig
    rounds: tuple[RoundFacts, ...]
    certificate: Certificate | None
    events: tuple[dict[str, Any], ...]
    metrics: tuple[dict[str, Any], ...]
    census: dict[str, dict[str, float]]
    provenance: dict[str, str]
    forces: ForceComparison | None
    forces_problem: str
    model: dict[str, str]
    """What the newest model file says of itself."""

    @property
    def n_pool(self) -> int:
        """Size of the pool."""
        return self.rounds[-1].n_pool if self.rounds else 0

    @property
    def energy_unit(self) -> str:
        """Unit of the energies that are compared: that of the certificate if it is about them."""
        return "eV" if self.config.certificate.quantity == "energy" else "eV/atom"

    @property
    def energy_tolerance(self) -> float | None:
        """Tolerance of these energies; None if the certificate is about something else."""
        options = self.config.certificate
        return None if options.quantity == "forces" else options.tolerance

    @property
    def latest_audit(self) -> RoundFacts | None:
        """The last round whose sample is labelled completely."""
        return next((r for r in reversed(self.rounds) if r.audited is not None), None)

    @property
    def wall_time_s(self) -> float:
        """Time from the first to the last event, pauses included."""
        times = [_seconds(event) for event in self.events if "time" in event]
        return max(times) - min(times) if times else 0.0

    def ended_in(self, number: int) -> bool:
        """Tell whether the certificate was given in a round, and nothing followed."""
        looks = len(self.certificate.looks) if self.certificate else 0
        return number == looks > 0 and number == len(self.rounds) - 1

    def count(self, kind: str) -> dict[str, int]:
        """Count the labels of a kind ("reference", "charges") by status."""
        found = self.census.get(kind, {})
        return {status: int(n) for status, n in found.items() if status != "wall_time_s"}

    def seconds(self, kind: str) -> float:
        """Return the time spent in the labels of a kind, s."""
        return self.census.get(kind, {}).get("wall_time_s", 0.0)


def _seconds(event: dict[str, Any]) -> float:
    return datetime.strptime(event["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
