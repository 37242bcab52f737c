"""The certificate of a pool: every look that was taken, the verdict, and what it says.

The bounds are in :mod:`orbcalc.active.bounds`, the accounting and its proof in
:mod:`orbcalc.active.looks`; their public names can be imported from here as well.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orbcalc.active.bounds import (
    check_tolerance,
    clipped_losses,
    kl_lower_bound,
    look_level,
    max_mean,
    max_misses,
)
from orbcalc.active.looks import (
    Look,
    PoolCounts,
    audit_look,
    hits,
    kl_batch_look,
    recompute,
)
from orbcalc.active.selection import as_count
from orbcalc.errors import ConfigError
from orbcalc.files import replace_file
from orbcalc.rounding import at_most

__all__ = [
    "Certificate",
    "Look",
    "PoolCounts",
    "audit_look",
    "clipped_losses",
    "hits",
    "kl_batch_look",
    "kl_lower_bound",
    "look_level",
    "max_mean",
    "max_misses",
    "recompute",
]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Certificate:
    """What was proved about a pool, with everything needed to check it.

    The looks are recomputed from their counts when a certificate is made or read, so one that
    contradicts itself does not exist.

    Raises
    ------
    ConfigError
        If looks are missing or do not follow from their counts, or the reason, the pool size or
        a parameter does not fit them.
    """

    reason: str
    """'certified', or why the run ended without: 'max_rounds', 'max_labels', ..."""
    looks: tuple[Look, ...]
    tolerance: float
    quantity: str
    """What the tolerance applies to, with its unit: 'energy per atom, eV'."""
    gamma: float
    delta: float
    seed: int
    n_pool: int
    pool_hash: str
    model_hash: str
    """Of the model that the last look was taken with."""
    version: str
    """Of orbcalc."""
    mean_error: float | None = None
    """Largest mean of the error, clipped at the tolerance, if that was asked for as well."""
    objects: str = "structures"
    """What the pool is made of, for the statement."""
    not_covered: str = "structures met later, as in MD run with the model"
    """What the certificate says nothing about, for the statement."""

    def __post_init__(self) -> None:
        """Recompute every look and check that the parts agree."""
        object.__setattr__(self, "looks", tuple(self.looks))
        check_tolerance(self.tolerance)
        as_count(self.seed, "seed")
        as_count(self.n_pool, "n_pool")
        terms = {"gamma": self.gamma, "delta": self.delta, "max_loss": self._max_loss()}
        for number, look in enumerate(self.looks, start=1):
            if (look.losses is None) != (self.mean_error is None):
                raise ConfigError(
                    f"look {number} and the certificate disagree on whether the mean error counts"
                )
            if look != recompute(look, number, **terms):
                raise ConfigError(
                    f"look {number} of the certificate does not follow from its counts, "
                    f"gamma {self.gamma} and delta {self.delta}: list all looks, unchanged"
                )
        if self.looks and self.looks[-1].n_pool != self.n_pool:
            raise ConfigError(
                f"the last look is at a pool of {self.looks[-1].n_pool} {self.objects}, but the "
                f"certificate is for {self.n_pool}"
            )
        if self.certified != (self.reason == "certified"):
            raise ConfigError(
                f"the reason is {self.reason!r}, but the last look is "
                f"{'' if self.certified else 'not '}certified"
            )

    def _max_loss(self) -> float:
        if self.mean_error is None:
            return 1.0
        if not 0 < self.mean_error <= self.tolerance:
            raise ConfigError(
                f"mean_error is {self.mean_error}, expected a number above 0 and at most the "
                f"tolerance, {self.tolerance}, at which errors are clipped"
            )
        return self.mean_error / self.tolerance

    @property
    def certified(self) -> bool:
        """Whether the last look proves everything that was asked for."""
        return bool(self.looks) and self.looks[-1].certified

    @property
    def statement(self) -> str:
        """One sentence that says what is proved, and of what."""
        if not self.looks:
            return (
                f"Not certified ({self.reason}): no look was taken at pool {self.pool_hash} of "
                f"{self.n_pool} {self.objects}, so nothing is proved about it."
            )
        last = self.looks[-1]
        verdict = "Certified" if self.certified else f"Not certified ({self.reason})"
        assumptions = (
            "under two assumptions that were not checked (accuracy on the hardest batch is no "
            "better than on the rest; a batch is a random sample), "
            if last.method == "kl_batch"
            else ""
        )
        return (
            f"{verdict}: {assumptions}with {100 * (1 - self.delta):.10g} % confidence over the "
            f"random samples of all {len(self.looks)} look(s), at least {last.n_right} of the "
            f"{self.n_pool} {self.objects} of pool {self.pool_hash} "
            f"({100 * self.gamma:.10g} % were asked for) have a reference label or are predicted "
            f"by model {self.model_hash} within {self.tolerance:g} of it ({self.quantity}), "
            f"{self._mean_error_clause()}failed labels counting as wrong; this covers that pool "
            f"only, not {self.not_covered}."
        )

    def _mean_error_clause(self) -> str:
        bound = self.looks[-1].loss_bound
        if self.mean_error is None or bound is None:
            return ""
        return (
            f"and the mean over the pool of the absolute error, clipped at {self.tolerance:g}, is "
            f"at most {at_most(bound * self.tolerance)} ({self.mean_error:g} was asked for), "
        )

    def to_json(self) -> str:
        """Write the certificate, its verdict and its statement as JSON."""
        head = {
            "format_version": FORMAT_VERSION,
            "certified": self.certified,
            "statement": self.statement,
        }
        return json.dumps(head | asdict(self), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read a certificate and check it.

        Raises
        ------
        ConfigError
            If the text is no certificate of this format, or contradicts itself.
        """
        try:
            data: dict[str, Any] = dict(json.loads(text))
            found, verdict = data.pop("format_version"), data.pop("certified")
            if found != FORMAT_VERSION:
                raise ConfigError(f"the certificate has format {found}, expected {FORMAT_VERSION}")
            del data["statement"]  # derived; its wording may change between versions
            looks = tuple(Look(**look) for look in data.pop("looks"))
            certificate = cls(looks=looks, **data)
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"this text is no certificate: {error!r}") from error
        if certificate.certified is not verdict:
            raise ConfigError(
                f"the certificate says certified: {verdict}, but its looks say otherwise"
            )
        return certificate

    def write(self, path: str | Path) -> None:
        """Write the JSON file at once or not at all; an older one is replaced."""
        replace_file(path, self.to_json() + "\n")
