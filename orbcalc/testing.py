"""Assertions about the physics of any potential, for tests of your own models.

Each raises :class:`AssertionError` with the quantity, the structure, the difference and what was
allowed. They look at a model only through its predictions, so they hold for any head or layer::

    from orbcalc.model.checkpoint import load_model
    from orbcalc.testing import assert_consistent, assert_derivatives, assert_equivariant

    model, _ = load_model("model.orbcalc")
    assert_equivariant(model, atoms)
    assert_derivatives(model, atoms)
    assert_consistent(model, [atoms, other_atoms])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from ase import Atoms
from e3nn import o3
from jaxtyping import Float

from orbcalc.graph import AtomGraph, atoms_at_once
from orbcalc.model.checkpoint import load_weights, potential_content, potential_from
from orbcalc.model.committee import Committee
from orbcalc.model.potential import Potential
from orbcalc.properties import BLOCK_IRREPS, PROPERTIES

__all__ = [
    "TOLERANCES",
    "assert_consistent",
    "assert_derivatives",
    "assert_equivariant",
    "in_dtype",
    "predicted",
]

Model = Committee | Potential
Array = Float[np.ndarray, "..."]
Deform = Callable[[Atoms, Array, float], Atoms]

#: What two ways to compute the same may differ by, relative to the quantity (or to 1 eV, e, ...,
#: if it is smaller than that), and what finite differences may.
TOLERANCES: Mapping[torch.dtype | str, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    "finite differences": 1e-6,
}

#: Central differences of fourth order: f'(0) = Σ w f(s h) / h + O(h⁴).
STENCIL = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}

#: Step of finite differences, Å or strain: it keeps the h⁴ term below the tolerance, and the
#: rounding of total energies up to 10⁵ eV.
STEP = 3e-4

UNITS = {spec.name: spec.unit for spec in PROPERTIES}


def predicted(model: Model, structures: Sequence[Atoms]) -> list[dict[str, Array]]:
    """Predict everything a model can, in one batch, and split it into structures.

    Returns
    -------
    list of dict
        The fields of `Prediction` (or `CommitteePrediction`) that are not None, as arrays
        without the axis of structures. Rigidities are left out: uncertainties are what they are
        scaled to. ``interaction`` is the energy (eV) without the reference
        energies of the atoms.
    """
    graph = AtomGraph.batch(
        [AtomGraph.from_atoms(a, _first(model).config.cutoff) for a in structures]
    )
    device = _first(model).element_index.device
    wanted = ("energy", "forces", "stress", "charges", "features")
    prediction = model(graph.to(device), wanted)
    split = [len(atoms) for atoms in structures]
    results: list[dict[str, Array]] = [{} for _ in structures]
    for field in fields(prediction):
        values = getattr(prediction, field.name)
        if values is None or field.name in _UNSCALED:
            continue
        array = values.detach().double().cpu().numpy()
        per_atom = field.name in _PER_ATOM
        parts = np.split(array, np.cumsum(split)[:-1]) if per_atom else list(array)
        for result, part in zip(results, parts, strict=True):
            result[field.name] = np.asarray(part)
    for result, atoms in zip(results, structures, strict=True):
        numbers = torch.as_tensor(atoms.numbers, device=device)
        lone = [
            m.reference_energies[m.element_index[numbers]].sum().item() for m in _members(model)
        ]
        result["interaction"] = np.asarray(result["energy"] - np.mean(lone))
    return results


def assert_equivariant(
    model: Model,
    atoms: Atoms,
    *,
    tolerance: float | None = None,
    n_rotations: int = 2,
    seed: int = 0,
) -> None:
    """Check that predictions rotate and reflect with the structure.

    For random rotations R, and -R: energy, charges, uncertainties and features stay, forces
    become R F, stress R σ Rᵀ, and orbital charge blocks D(R) B D(R)ᵀ, by the irreps of
    `BLOCK_IRREPS`. Charges of single orbitals have no such law and are not compared.

    Parameters
    ----------
    atoms
        Molecule or crystal.
    tolerance
        By default that of `TOLERANCES` for the model's dtype.

    Raises
    ------
    AssertionError
        If a prediction does not transform as it must.
    """
    (before,) = predicted(model, [atoms])
    _assert_finite(before, atoms)
    for turn in _rotations(n_rotations, seed):
        moved: Atoms = atoms.copy()
        moved.positions = atoms.positions @ turn.matrix.T
        moved.cell = atoms.cell.array @ turn.matrix.T
        (after,) = predicted(model, [moved])
        expected = {name: turn.applied_to(name, values) for name, values in before.items()}
        expected.pop("orbital_charges", None)  # they depend on the frame
        _assert_same(after, expected, atoms, turn.name, model, tolerance)


def assert_consistent(
    model: Model, structures: Sequence[Atoms], *, tolerance: float | None = None, seed: int = 0
) -> None:
    """Check that predictions depend on a structure only, not on how it is written down.

    Each structure of a batch must give what it gives alone; a permutation of the atoms permutes
    the predictions; a translation, and lattice vectors added to single atoms, change nothing;
    the input stays as it is.

    Raises
    ------
    AssertionError
        If a prediction differs.
    """
    rng = np.random.default_rng(seed)
    copies = [atoms.copy() for atoms in structures]
    batch = predicted(model, structures)
    for atoms, copy, together in zip(structures, copies, batch, strict=True):
        if atoms != copy:
            raise AssertionError(f"the prediction changed {copy.get_chemical_formula()} itself")
        (alone,) = predicted(model, [atoms])
        _assert_finite(alone, atoms)
        _assert_same(together, alone, atoms, "in a batch", model, tolerance)

        order = rng.permutation(len(atoms))
        (shuffled,) = predicted(model, [atoms[order]])
        expected = {k: v[order] if k in _PER_ATOM else v for k, v in alone.items()}
        _assert_same(shuffled, expected, atoms, "with permuted atoms", model, tolerance)

        moved: Atoms = atoms.copy()
        moved.positions += rng.uniform(-5, 5, 3)
        images = rng.integers(-2, 3, (len(atoms), 3)) * atoms.pbc
        moved.positions += images @ atoms.cell.array
        (elsewhere,) = predicted(model, [moved])
        _assert_same(elsewhere, alone, atoms, "translated, unwrapped", model, tolerance)


def assert_derivatives(
    model: Model,
    atoms: Atoms,
    *,
    tolerance: float | None = None,
    n_coordinates: int = 48,
    seed: int = 0,
) -> None:
    """Check forces and stress against central differences of the energy, in float64.

    A float32 model is rebuilt in float64 for it. The allowed difference is relative to the
    largest component, or to the model's energy scale per Å if that is larger.

    Parameters
    ----------
    n_coordinates
        How many of the 3 n_atoms coordinates are displaced, drawn at random; all if there are
        fewer.

    Raises
    ------
    AssertionError
        If forces or stress are not the derivatives of the energy.
    """
    tolerance = TOLERANCES["finite differences"] if tolerance is None else tolerance
    model = in_dtype(model, torch.float64)
    scale = _first(model).energy_scale
    (prediction,) = predicted(model, [atoms])
    _assert_finite(prediction, atoms)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(3 * len(atoms))[:n_coordinates])
    modes = np.zeros((len(chosen), len(atoms), 3))
    modes.reshape(len(chosen), -1)[np.arange(len(chosen)), chosen] = 1.0
    numeric = -_slopes(model, atoms, _displaced, list(modes))
    analytic = prediction["forces"].ravel()[chosen]
    _compare("forces", analytic, numeric, atoms, "as finite differences", tolerance, scale)
    if np.isnan(prediction["stress"]).all():
        return
    one = np.eye(3)
    pairs = [np.outer(one[a], one[b]) for a in range(3) for b in range(a, 3)]
    strains = [(pair + pair.T) / 2 for pair in pairs]
    numeric = _slopes(model, atoms, _strained, strains)
    virial = prediction["stress"] * atoms.get_volume()
    analytic = np.array([np.sum(virial * strain) for strain in strains])
    _compare("virial", analytic, numeric, atoms, "as finite differences", tolerance, scale)


def in_dtype(model: Model, dtype: torch.dtype) -> Model:
    """Rebuild a model in another precision; itself if it has that already.

    `torch.nn.Module.double` would keep constants that were rounded to float32.
    """
    if isinstance(model, Committee):
        return Committee([_in_dtype(m, dtype) for m in _members(model)], model.calibration)
    return _in_dtype(model, dtype)


#: Quantities with one row for each atom.
_PER_ATOM = (
    *("forces", "orbital_blocks", "orbital_charges", "charges"),
    *("forces_spread", "forces_uncertainty", "forces_interval_95"),
)

#: Quantities of any size, which no absolute tolerance fits.
_UNSCALED = ("energy_rigidity", "atom_rigidity")


@dataclass(frozen=True)
class _Rotation:
    """A proper or improper rotation, and how quantities transform under it."""

    name: str
    matrix: Float[np.ndarray, "3 3"]
    representation: Float[np.ndarray, "23 23"]

    def applied_to(self, quantity: str, values: Array) -> Array:
        if quantity == "forces":
            return np.asarray(values @ self.matrix.T)
        if quantity == "stress":
            return np.asarray(self.matrix @ values @ self.matrix.T)
        if quantity == "orbital_blocks":  # absent shells are NaN, and whole irreps
            turned = np.nan_to_num(values) @ self.representation.T
            return np.where(np.isnan(values), np.nan, turned)
        return values


def _rotations(number: int, seed: int) -> list[_Rotation]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        orthogonal, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        matrix = orthogonal * np.linalg.det(orthogonal)
        blocks = _representation(matrix)  # they are even: an inversion leaves them alone
        found += [
            _Rotation("after a rotation", matrix, blocks),
            _Rotation("after an improper rotation", -matrix, blocks),
        ]
    return found


def _representation(rotation: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "23 23"]:
    """Return D(R) of the charge blocks, solved for in Y(R r) = D(R) Y(r).

    e3nn's own matrices go through float32 and are good to 1e-7 only.
    """
    points = torch.as_tensor(np.random.default_rng(0).normal(size=(40, 3)))
    turned = points @ torch.as_tensor(rotation).T
    irreps = o3.Irreps(BLOCK_IRREPS)
    matrix = np.zeros((irreps.dim, irreps.dim))
    for (_, irrep), span in zip(irreps, irreps.slices(), strict=True):
        before, after = (
            o3.spherical_harmonics(irrep.l, xyz, normalize=True).numpy() for xyz in (points, turned)
        )
        matrix[span, span] = np.linalg.lstsq(before, after, rcond=None)[0].T
    return matrix


def _displaced(atoms: Atoms, direction: Float[np.ndarray, "n_atoms 3"], size: float) -> Atoms:
    moved: Atoms = atoms.copy()
    moved.positions += size * direction
    return moved


def _strained(atoms: Atoms, strain: Float[np.ndarray, "3 3"], size: float) -> Atoms:
    deformation = np.eye(3) + size * strain
    moved: Atoms = atoms.copy()
    moved.cell = atoms.cell.array @ deformation
    moved.positions = atoms.positions @ deformation
    return moved


def _slopes(
    model: Model, atoms: Atoms, deform: Deform, modes: Sequence[Array]
) -> Float[np.ndarray, " n_modes"]:
    """Return the derivative of the energy along each mode."""
    changed = [deform(atoms, mode, k * STEP) for mode in modes for k in STENCIL]
    energies: list[float] = []
    device, cutoff = _first(model).element_index.device, _first(model).config.cutoff
    size = max(1, atoms_at_once(device) // len(atoms))
    for start in range(0, len(changed), size):
        graphs = [AtomGraph.from_atoms(moved, cutoff) for moved in changed[start : start + size]]
        energies += model(AtomGraph.batch(graphs).to(device)).energy.tolist()
    by_mode = np.array(energies).reshape(len(modes), len(STENCIL))
    slopes: Array = (by_mode - by_mode.mean()) @ np.array(list(STENCIL.values())) / STEP
    return slopes


def _in_dtype(potential: Potential, dtype: torch.dtype) -> Potential:
    if potential.dtype == dtype:
        return potential
    rebuilt = potential_from(potential_content(potential), dtype)
    load_weights(rebuilt, potential.state_dict())
    return rebuilt.to(potential.element_index.device)


def _members(model: Model) -> list[Potential]:
    if isinstance(model, Potential):
        return [model]
    return [member for member in model.members if isinstance(member, Potential)]


def _first(model: Model) -> Potential:
    return _members(model)[0]


def _assert_finite(prediction: Mapping[str, Array], atoms: Atoms) -> None:
    for name in ("energy", "forces", "charges"):
        if name in prediction and not np.isfinite(prediction[name]).all():
            raise AssertionError(f"{name} of {atoms.get_chemical_formula()} is not finite")


def _assert_same(
    actual: Mapping[str, Array],
    expected: Mapping[str, Array],
    atoms: Atoms,
    how: str,
    model: Model,
    tolerance: float | None,
) -> None:
    if tolerance is None:
        tolerance = TOLERANCES[_first(model).dtype]
    for name, values in expected.items():
        # A total energy is mostly that of its atoms: compare what the network adds to it.
        if name != "energy":
            _compare(name, actual[name], values, atoms, how, tolerance, 1.0)


def _compare(
    name: str,
    actual: Array,
    expected: Array,
    atoms: Atoms,
    how: str,
    tolerance: float,
    scale: float,
) -> None:
    """Compare arrays in which absent values are NaN."""
    formula = atoms.get_chemical_formula()
    if actual.shape != expected.shape:
        raise AssertionError(
            f"{name} of {formula}, {how}: shape {actual.shape}, expected {expected.shape}"
        )
    if not np.array_equal(np.isnan(actual), np.isnan(expected)):
        raise AssertionError(f"{name} of {formula}, {how}: other values are absent (NaN)")
    present = ~np.isnan(expected)
    allowed = tolerance * max(scale, float(np.abs(expected[present]).max(initial=0.0)))
    error = float(np.abs(actual[present] - expected[present]).max(initial=0.0))
    if not error <= allowed:
        unit = UNITS.get(name, "eV")
        raise AssertionError(
            f"{name} of {formula}, {how}: off by {error:.2e} {unit}, allowed {allowed:.2e}"
        )
