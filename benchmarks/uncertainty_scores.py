"""From what potentials say to scores, and from those to ranks and reliabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from ranking import (
    bootstrap_weights,
    ideal_spearman,
    share_within,
    sparsification,
    sparsification_area,
    spearman,
)

__all__ = ["GROUPS", "Answers", "judge"]

#: Which of the members are one predictor, by their number.
GROUPS = {1: ((0,), (1,), (2,), (3,)), 2: ((0, 1), (2, 3)), 4: ((0, 1, 2, 3),)}
#: Of the errors within the two limits.
SHARES = (0.6827, 0.95)
#: Structures of random validation sets, and how many of those are drawn.
VALIDATION_SIZES, _DRAWS = (25, 50, 100, 200, 400), 50


#: The package's calibration, as a mapping, of each choice of members.
Calibrations = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Answers:
    """What all members say about a part of a problem, and the truth."""

    n_atoms: np.ndarray
    """(n,) of each structure."""
    energies: np.ndarray
    """(n,) reference, eV."""
    forces: np.ndarray
    """(atoms, 3) reference, eV/Å; NaN where there are none."""
    members: dict[str, np.ndarray]
    """By name, the members first: energy, energy_rigidity, forces, ..."""

    @staticmethod
    def save(path: Path, parts: dict[str, Answers]) -> None:
        """Write all parts of a problem."""
        arrays = {}
        for part, answers in parts.items():
            own = {"n_atoms": answers.n_atoms, "energies": answers.energies}
            own |= {"forces": answers.forces}
            own |= {f"members/{key}": values for key, values in answers.members.items()}
            arrays |= {f"{part}/{key}": values for key, values in own.items()}
        np.savez_compressed(path, **arrays)

    @staticmethod
    def load(path: Path) -> dict[str, Answers]:
        """Read all parts of a problem."""
        parts: dict[str, dict] = {}
        with np.load(path) as file:
            for name in file.files:
                part, key = name.split("/", 1)
                parts.setdefault(part, {})[key] = file[name]
        return {
            part: Answers(
                own["n_atoms"],
                own["energies"],
                own["forces"],
                {key[8:]: values for key, values in own.items() if key.startswith("members/")},
            )
            for part, own in parts.items()
        }


# --------------------------------------------------------------------------------- cases
@dataclass(frozen=True)
class Case:
    """One or more members as one predictor of energies, or of forces, on one part."""

    errors: np.ndarray
    """(m, 1) of energies (eV) or (m, 3) of forces (eV/Å)."""
    scores: dict[str, np.ndarray]
    """(m,) by name, higher is harder."""
    owner: np.ndarray
    """(m,) the structure that each row belongs to."""

    @property
    def sizes(self) -> np.ndarray:
        """(m,) absolute errors of energies, or lengths of errors of forces."""
        return np.linalg.norm(self.errors, axis=1)

    def part(self, structures: np.ndarray) -> Case:
        """Return the rows of some structures."""
        own = np.isin(self.owner, structures)
        scores = {name: values[own] for name, values in self.scores.items()}
        return Case(self.errors[own], scores, self.owner[own])


def case_of(
    answers: Answers, chosen: Sequence[int], quantity: str, calibrations: Calibrations
) -> Case:
    """Let some members predict a part."""
    own = {name: values[list(chosen)] for name, values in answers.members.items()}
    n_structures = len(answers.n_atoms)
    if quantity == "energy":
        values, truth, prefix = own["energy"][..., None], answers.energies[:, None], ""
        rigidity, owner = own["energy_rigidity"], np.arange(n_structures)
    else:
        values, truth, prefix = own["forces"], answers.forces, "atom_"
        rigidity, owner = own["atom_rigidity"], np.repeat(np.arange(n_structures), answers.n_atoms)
    scores = {}
    if len(chosen) > 1:
        scores["spread"] = np.sqrt(values.var(0, ddof=1).mean(-1))
    scores["last layer"] = rigidity.astype(float).mean(0)
    if len(chosen) > 1:
        weight = calibrations[str(tuple(chosen))][f"{quantity}_spread_weight"]
        scores["combined"] = np.hypot(scores["last layer"], weight * scores["spread"])
    scores["charges"] = own[f"{prefix}charge_error"].astype(float).mean(0)
    scores["layer × charges"] = scores["last layer"] * scores["charges"]
    scores["distance"] = own[f"{prefix}distance"].mean(0)
    scores["random"] = np.random.default_rng(0).random(len(owner))
    return Case(values.mean(0) - truth, scores, owner)


# -------------------------------------------------------------------------- calibrations
def rms_factor(case: Case, score: str) -> float:
    """Return the RMS of the errors over that of the score."""
    return float(np.sqrt((case.errors**2).mean() / (case.scores[score] ** 2).mean()))


def quantile_factors(case: Case, score: str) -> tuple[float, float]:
    """Return the factors within which 68.3 and 95 % of the errors are (split conformal)."""
    ratios = (np.abs(case.errors) / case.scores[score][:, None]).ravel()
    n = len(ratios)
    ranks = [min((n + 1) * share / n, 1.0) for share in SHARES]
    return tuple(float(q) for q in np.quantile(ratios, ranks, method="higher"))


# --------------------------------------------------------------------------------- judge
def judge(runs: Sequence[tuple[dict[str, Answers], dict]], forces: bool) -> dict[str, Any]:
    """Rank errors by all scores, and compare their sizes with uncertainties.

    Parameters
    ----------
    runs
        For each seed, what the members say, and the factors of the package's calibration.
    forces
        Whether the members predict forces as well.
    """
    judged = [name for name in runs[0][0] if name not in ("valid", "spare")]
    ranks, reliabilities, sizes, curves = [], [], [], []
    for part, quantity, n_members in product(
        judged, ("energy", "forces") if forces else ("energy",), GROUPS
    ):
        terms = {"part": part, "quantity": quantity, "members": n_members}
        cases = []
        for parts, factors in runs:
            for chosen in GROUPS[n_members]:
                case, valid, more = (
                    case_of(answers, chosen, quantity, factors)
                    for answers in (parts[part], parts["valid"], joined(parts))
                )
                own = factors[str(chosen)]
                cases.append((case, valid, more, (own[quantity], own[f"{quantity}_95"])))
        weights = bootstrap_weights(len(runs[0][0][part].n_atoms))
        ranks += [{**terms, **row} for row in _ranks([c[0] for c in cases], weights)]
        reliabilities += [{**terms, **row} for row in _reliabilities(cases, weights)]
        curves.append({**terms, **_curves(cases)})
        if part == "same":
            sizes += [{**terms, **row} for row in _by_size(cases)]
    return {
        "seeds": len(runs),
        "ranks": ranks,
        "reliability": reliabilities,
        "sizes": sizes,
        "curves": curves,
    }


def joined(parts: dict[str, Answers]) -> Answers:
    """Return the validation set and what else there is of its kind as one."""
    if "spare" not in parts:
        return parts["valid"]
    both = parts["valid"], parts["spare"]
    return Answers(
        np.concatenate([part.n_atoms for part in both]),
        np.concatenate([part.energies for part in both]),
        np.concatenate([part.forces for part in both]),
        {
            name: np.concatenate([part.members[name] for part in both], axis=1)
            for name in parts["valid"].members
        },
    )


def _ranks(cases: Sequence[Case], weights: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for score in cases[0].scores:
        found = {"spearman": [], "ideal": [], "area": [], "oracle": []}
        for case in cases:
            own = np.vstack([np.ones(len(case.owner)), weights[:, case.owner]])
            values, sizes = case.scores[score], case.sizes
            found["spearman"].append(spearman(values, sizes, own))
            found["ideal"].append(ideal_spearman(values, case.errors.shape[1]))
            found["area"].append(sparsification_area(values, sizes, own))
            found["oracle"].append(sparsification_area(sizes, sizes, own))
        means = {name: np.mean(values, 0) for name, values in found.items()}
        means["ause"] = means["area"] - means.pop("oracle")
        rmse = float(np.sqrt(np.mean([(case.errors**2).mean() for case in cases])))
        row = {name: _with_interval(values) for name, values in means.items()}
        rows.append({"score": score, "rmse": rmse, **row})
    return rows


def _with_interval(values: np.ndarray) -> list[float]:
    """Return a statistic and the central 95 % of its bootstrap."""
    return [float(values[0]), *(float(q) for q in np.percentile(values[1:], [2.5, 97.5]))]


def _reliabilities(cases: Sequence[tuple], weights: np.ndarray) -> list[dict[str, Any]]:
    """Count errors within the limits of 68 and 95 %, by several calibrations."""
    found: dict[str, list[list[np.ndarray]]] = {}
    for case, valid, _, (first, second) in cases:
        values = case.scores.get("combined", case.scores["last layer"])
        limits = {"package": (first * values, second * values)}
        for score in ("last layer", "spread"):
            if score not in case.scores:
                continue
            own_values, rms = case.scores[score], rms_factor(valid, score)
            limits[f"{score}, RMS"] = rms * own_values, 2 * rms * own_values
        if "spread" in case.scores:
            factors = quantile_factors(valid, "spread")
            limits["spread, quantiles"] = tuple(f * case.scores["spread"] for f in factors)
        width = case.errors.shape[1]
        own = np.vstack([np.ones(len(case.owner)), weights[:, case.owner]]).repeat(width, 1)
        for name, pair in limits.items():
            shares = [share_within(case.errors.ravel(), s.repeat(width), own) for s in pair]
            found.setdefault(name, []).append(shares)
    return [
        {
            "calibration": name,
            "within_1": _with_interval(np.mean([s[0] for s in shares], 0)),
            "within_2": _with_interval(np.mean([s[1] for s in shares], 0)),
        }
        for name, shares in found.items()
    ]


def _by_size(cases: Sequence[tuple]) -> list[dict[str, Any]]:
    """Calibrate with random validation sets of several sizes, and count again."""
    rows = []
    for size in VALIDATION_SIZES:
        found: dict[str, list[list[float]]] = {"RMS": [], "two quantiles": []}
        for case, _, more, _ in cases:
            n = int(more.owner.max()) + 1
            rng = np.random.default_rng(size)
            for _ in range(_DRAWS if n > size else 0):
                known = more.part(rng.choice(n, size, replace=False))
                factors = {
                    "RMS": rms_factor(known, "last layer") * np.array([1, 2]),
                    "two quantiles": quantile_factors(known, "last layer"),
                }
                ratios = np.abs(case.errors) / case.scores["last layer"][:, None]
                for name, pair in factors.items():
                    found[name].append([float((ratios <= factor).mean()) for factor in pair])
        for name, shares in found.items():
            if shares:
                mean, spread = np.mean(shares, 0).tolist(), np.std(shares, 0).tolist()
                rows.append({"size": size, "calibration": name, "mean": mean, "spread": spread})
    return rows


def _curves(cases: Sequence[tuple]) -> dict[str, Any]:
    """Return what the figures draw: sparsification, and errors against uncertainties."""
    grid = np.linspace(0.02, 1, 50)
    lines: dict[str, list[np.ndarray]] = {}
    bins: list[np.ndarray] = []
    for case, _, _, (first, _) in cases:
        sizes = case.sizes
        for name, values in {**case.scores, "oracle": sizes}.items():
            at = np.arange(1, len(sizes) + 1) / len(sizes)
            lines.setdefault(name, []).append(np.interp(grid, at, sparsification(values, sizes)))
        sigma = first * case.scores["last layer"]
        groups = np.array_split(np.argsort(sigma), 10)
        bins.append(np.array([[_rms(sigma[g]), _rms(case.errors[g])] for g in groups]))
    return {
        "kept": grid.tolist(),
        "sparsification": {name: np.mean(rows, 0).tolist() for name, rows in lines.items()},
        "bins": np.mean(bins, 0).tolist(),
    }


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))
