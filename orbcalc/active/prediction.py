"""Committees asked through an executor about what is not labelled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ase import Atoms
from jaxtyping import Float

from orbcalc.active.executor import Executor
from orbcalc.active.quantities import expected_error
from orbcalc.config import RunConfig
from orbcalc.errors import MissingLabelError, OrbcalcError, StructureError
from orbcalc.labels.store import LabelStore
from orbcalc.structures import is_lone_atom

__all__ = [
    "finite_numbers", "joined_features", "pool_functions", "predict_pool", "predict_results",
    "with_baseline",
]  # fmt: skip

#: Structures that a worker predicts in one task.
CHUNK = 256

#: Of which functions of all atoms are held at a time, a thousand numbers each.
_FEW = 16

T = TypeVar("T")


def with_baseline(
    config: RunConfig, store: LabelStore, structures: Mapping[str, Atoms]
) -> list[Atoms]:
    """Return structures, by structure key, with the GFN1-xTB labels that the pool has.

    Above a computed baseline one whose label failed cannot be predicted. Above a learned one the
    label takes its place, as it is more accurate.
    """
    return store.labelled_atoms(structures) if config.pool.charges else list(structures.values())


def predict_pool(
    executor: Executor,
    model: Path,
    structures: Sequence[Atoms],
    device: str,
    *,
    quantity: str = "energy_per_atom",
    forces: bool = False,
) -> list[dict[str, Any]]:
    """Predict energy, its uncertainty per atom, features, and forces if asked for.

    Returns
    -------
    list of dict
        Empty for a structure that cannot be predicted. ``score`` is the expected error of the
        quantity, see `quantities.expected_error`.

    Raises
    ------
    OrbcalcError
        If the model cannot predict at all.
    """
    return _in_chunks(executor, partial(predict_chunk, model, device, quantity, forces), structures)


def pool_functions(
    executor: Executor, model: Path, structures: Sequence[Atoms], device: str
) -> tuple[Float[np.ndarray, "n n_inducing"], Float[np.ndarray, "n n_elements"]]:
    """Evaluate what the energies of a process are linear in, by the first member of a model.

    Returns
    -------
    functions, counts
        Sums over atoms; NaN for what cannot be predicted, and for lone atoms.

    Raises
    ------
    OrbcalcError
        If the model cannot predict at all.
    """
    rows = _in_chunks(executor, partial(functions_chunk, model, device), structures)
    functions, counts = (np.array(column) for column in zip(*rows, strict=True))
    return functions, counts


def predict_results(
    executor: Executor, model: Path, structures: Sequence[Atoms], device: str
) -> list[dict[str, Any] | str]:
    """Predict what a calculator would hold: energy, forces, stress in a volume, uncertainties.

    There is no stress above a computed baseline, whose labels hold none.

    Returns
    -------
    list of dict or str
        As :func:`orbcalc.predict`; for a structure that cannot be predicted, why.

    Raises
    ------
    OrbcalcError
        If the model cannot predict at all.
    """
    return _in_chunks(executor, partial(predict_results_chunk, model, device), structures)


def _in_chunks(
    executor: Executor, function: Callable[[list[Atoms]], list[T]], structures: Sequence[Atoms]
) -> list[T]:
    """Call a function with some structures at a time, on the model workers."""
    chunks = [
        (start, list(structures[start : start + CHUNK]))
        for start in range(0, len(structures), CHUNK)
    ]
    found: dict[int, list[T]] = {}
    for (start, _), outcome in executor.map(partial(_on_chunk, function), chunks, "model"):
        if isinstance(outcome, Exception):
            raise OrbcalcError(f"prediction failed: {outcome!r}") from outcome
        found[start] = outcome
    return [item for start in sorted(found) for item in found[start]]


def _on_chunk(function: Callable[[list[Atoms]], T], chunk: tuple[int, list[Atoms]]) -> T:
    return function(chunk[1])


def predict_results_chunk(
    model: Path, device: str, structures: list[Atoms]
) -> list[dict[str, Any] | str]:
    """Predict some structures on a model worker."""
    from orbcalc.prediction import open_model, predict

    committee, _ = open_model(model, device=device)

    def or_why_not(atoms: Atoms, result: dict[str, Any]) -> dict[str, Any] | str:
        if not result:
            try:
                (result,) = predict(committee, [atoms], baseline="labels")
            except (StructureError, MissingLabelError) as error:
                return str(error)
        bad = [name for name, value in result.items() if not np.isfinite(value).all()]
        return f"not finite: {', '.join(bad)}" if bad else result

    results = predict(committee, structures, on_error="skip", baseline="labels")
    return [or_why_not(*pair) for pair in zip(structures, results, strict=True)]


def functions_chunk(
    model: Path, device: str, structures: list[Atoms]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Evaluate them for some structures on a model worker."""
    from orbcalc.model.committee import Committee
    from orbcalc.prediction import open_model, predict

    committee, _ = open_model(model, device=device)
    first = committee.first
    n_elements = len(first.elements)
    unknown = np.full((1, first.n_inducing + n_elements), np.nan)
    rows = []
    for start in range(0, len(structures), _FEW):
        some = structures[start : start + _FEW]
        for atoms, result in zip(
            some,
            predict(Committee([first]), some, ("last_layer",), on_error="skip"),
            strict=True,
        ):
            # What a lone atom says, a process cannot learn.
            is_told = result and not is_lone_atom(atoms)
            row = (result["last_layer"] if is_told else unknown).sum(0)
            rows.append((row[:-n_elements], row[-n_elements:]))
    return rows


def predict_chunk(
    model: Path, device: str, quantity: str, forces: bool, structures: list[Atoms]
) -> list[dict[str, Any]]:
    """Predict some structures on a model worker."""
    from orbcalc.prediction import predict

    more = ("forces",) if forces else ()
    scored = ("forces_uncertainty",) if quantity == "forces" else ()
    results = predict(
        model,
        structures,
        ("energy", "features", *scored, *more),
        device=device,
        on_error="skip",
        baseline="labels",
    )
    return [
        {
            "energy": result["energy"],
            "uncertainty": result["energy_uncertainty"] / len(atoms),
            "features": result["features"],
            "score": expected_error(quantity, result, len(atoms)),
            **{name: result[name] for name in more},
        }
        if result
        else {}
        for atoms, result in zip(structures, results, strict=True)
    ]


def finite_numbers(
    predictions: Mapping[str, Mapping[str, Any]], *more: str
) -> dict[str, dict[str, Any]]:
    """Return the numbers of each prediction that has an energy, if all are finite."""
    names = ("energy", "uncertainty", *more)
    return {
        key: {name: np.asarray(p[name]).tolist() for name in names if name in p}
        for key, p in predictions.items()
        if "energy" in p and all(np.isfinite(p[name]).all() for name in names if name in p)
    }


def joined_features(predictions: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Return the features of all, NaN for what cannot be predicted; None without any."""
    width = next((len(p["features"]) for p in predictions if p), None)
    if width is None:
        return None
    return np.array([p["features"] if p else np.full(width, np.nan) for p in predictions])
