"""Models for screens: from the labels known so far to predictions and scores of the whole pool.

Both are called with the indices that are labelled and return, for all, an energy (eV) and how
hard they think it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from scipy.linalg import cho_factor, cho_solve, solve_triangular

import orbcalc
from orbcalc.active.folder import write_structures
from orbcalc.config import TrainConfig, parse_config
from orbcalc.properties import REF_ENERGY, XTB_BLOCKS
from orbcalc.training.run import split

__all__ = ["RECIPES", "GaussianProcess", "PotentialOnPool", "atomic_features", "random_features"]

Array = np.ndarray
Guess = tuple[Array, Array]

#: Å; centres and width of the shells in which neighbours of each element are counted.
_SHELLS, _WIDTH, _CUTOFF = np.linspace(0.9, 4.5, 10), 0.4, 5.0
#: Random features of an element; their length, in spreads of all of an atom's features.
_N_RANDOM, _LENGTH = 200, 1.5
#: Parts of the configuration of each kind of potential. *Computed*: the difference from GFN1-xTB
#: is learned, with the charges of the labelled structures. *Cheap labels*: GFN1-xTB energies (as a
#: learned baseline) and charges of the whole pool are learned, too; *first*: before all others,
#: which a process is then fitted to, as in `orbcalc run`. Without: the charges of the labelled
#: structures only.
RECIPES = {
    "GFN1-xTB computed": {"xtb_head": "none", "baseline": "GFN1-xTB"},
    "cheap labels": {"xtb_head": "baseline", "energy_head": "network"},
    "cheap labels first": {"xtb_head": "baseline", "energy_head": "process"},
    "no cheap labels": {"xtb_head": "none"},
}
#: Variance of the noise, in mean variances of the process.
_NOISE = 1e-3


# --------------------------------------------------------------------------- fingerprint
def atomic_features(atoms: Atoms, elements: Sequence[int]) -> Array:
    """Return neighbours by element and distance, and invariants of the GFN1 blocks if known.

    Returns
    -------
    (n_atoms, n_features)
    """
    distances = np.minimum(atoms.get_all_distances(), _CUTOFF)
    np.fill_diagonal(distances, _CUTOFF)  # where the cutoff function is zero
    smooth = 0.5 + 0.5 * np.cos(np.pi * distances / _CUTOFF)
    near = (distances[..., None] - _SHELLS) / _WIDTH
    shells = np.exp(-0.5 * near**2) * smooth[..., None]
    columns = [shells[:, atoms.numbers == z].sum(1) for z in elements]
    if XTB_BLOCKS in atoms.arrays:
        blocks = np.nan_to_num(atoms.arrays[XTB_BLOCKS])
        slopes = np.linalg.norm(blocks[:, 3:8], axis=1)  # how far a p shell is from a sphere
        # As many columns as the neighbours have, so that both weigh the same in a distance.
        columns += [blocks[:, :3], slopes[:, None]] * len(_SHELLS)
    return np.hstack(columns)


def random_features(structures: Sequence[Atoms], seed: int = 0) -> tuple[Array, Array]:
    """Return numbers of atoms, and sums over atoms of random Fourier features of each.

    Inner products of the sums are sums of Gaussian kernels over all pairs of atoms of one element.

    Returns
    -------
    counts
        (n, n_elements).
    sums
        (n, n_elements * _N_RANDOM), less their mean.
    """
    elements = sorted({int(z) for atoms in structures for z in atoms.numbers})
    values = np.concatenate([atomic_features(atoms, elements) for atoms in structures])
    numbers = np.concatenate([atoms.numbers for atoms in structures])
    owner = np.repeat(np.arange(len(structures)), [len(atoms) for atoms in structures])
    rng, n = np.random.default_rng(seed), len(structures)
    counts, columns = [], []
    for element in elements:
        own = numbers == element
        known = values[own]
        spread = known.std(0)
        varies = spread > 1e-6
        scaled = ((known - known.mean(0)) / np.where(varies, spread, 1.0))[:, varies]
        waves = rng.normal(size=(scaled.shape[1], _N_RANDOM))
        phases = rng.uniform(0, 2 * np.pi, _N_RANDOM)
        angles = scaled @ waves / (_LENGTH * np.sqrt(scaled.shape[1])) + phases
        sums = np.zeros((n, _N_RANDOM))
        np.add.at(sums, owner[own], np.sqrt(2 / _N_RANDOM) * np.cos(angles))
        counts.append(np.bincount(owner[own], minlength=n))
        columns.append(sums)
    features = np.hstack(columns)
    return np.column_stack(counts).astype(float), features - features.mean(0)


# -------------------------------------------------------------------------------- models
class GaussianProcess:
    """A Gaussian process on fingerprints, beside energies of atoms by least squares.

    Parameters
    ----------
    counts, features
        Of the pool, as :func:`random_features` makes them.
    baseline
        (n,) eV, what the energies are learned on top of.
    """

    def __init__(self, counts: Array, features: Array, baseline: Array) -> None:
        self.counts, self.baseline = counts, baseline
        self.kernel = features @ features.T
        self.kernel += _NOISE * np.trace(self.kernel) / len(self.kernel) * np.eye(len(self.kernel))

    def __call__(self, labelled: Array, energies: Array) -> Guess:
        """Return predictions and standard deviations, these up to a factor."""
        counts, target = self.counts[labelled], energies - self.baseline[labelled]
        atoms = np.linalg.lstsq(counts, target, rcond=None)[0]
        factor = cho_factor(self.kernel[np.ix_(labelled, labelled)], lower=True)
        across = self.kernel[:, labelled]
        guess = across @ cho_solve(factor, target - counts @ atoms)
        explained = solve_triangular(factor[0], across.T, lower=True, check_finite=False)
        variance = np.diagonal(self.kernel) - np.einsum("ij,ij->j", explained, explained)
        return self.baseline + self.counts @ atoms + guess, np.sqrt(np.maximum(variance, 0.0))


class PotentialOnPool:
    """A potential that is trained on from round to round, much as in `orbcalc run`.

    Parameters
    ----------
    pool
        Structures with GFN1-xTB labels, and without reference labels.
    folder
        Of this pool alone. Keeps what every set of labels came to, so that a screen that was
        killed goes on.
    recipe
        One of `RECIPES`.
    optimizer
        Steps and batches of each training.
    seed
        Of the first weights and the batches.
    """

    def __init__(
        self,
        pool: Sequence[Atoms],
        folder: Path,
        *,
        recipe: str,
        optimizer: Mapping[str, int],
        seed: int,
    ) -> None:
        self.pool, self.folder, self.recipe = pool, folder, recipe
        self.optimizer, self.seed = optimizer, seed
        self._last: Path | None = None

    def __call__(self, labelled: Array, energies: Array) -> Guess:
        """Return predictions and uncertainties, eV; NaN where there is none."""
        history = "" if self._last is None else self._last.stem
        terms = f"{history} {self.recipe} {self.optimizer} {self.seed} {labelled.tolist()}"
        name = hashlib.sha256(terms.encode()).hexdigest()[:16]
        before, self._last = self._last, self.folder / f"{name}.orbcalc"
        self.folder.mkdir(parents=True, exist_ok=True)
        answer = self._last.with_suffix(".npz")
        if not answer.exists():
            self._train(labelled, energies, before)
            found = orbcalc.predict(
                self._last, self.pool, ("energy",), on_error="skip", baseline="labels"
            )
            values = {
                key: [result.get(key, np.nan) for result in found]
                for key in ("energy", "energy_uncertainty")
            }
            np.savez(answer, **values)
        with np.load(answer) as file:
            return file["energy"], file["energy_uncertainty"]

    def _train(self, labelled: Array, energies: Array, before: Path | None) -> None:
        assert self._last is not None
        known = []
        for index, energy in zip(labelled, energies, strict=True):
            known.append(self.pool[index].copy())
            known[-1].info[REF_ENERGY] = float(energy)
        if self.recipe == "cheap labels first":
            self._fit(self._last, known, {}, self._features())
            return
        train, valid = split(known, 0.1, self.seed)
        if self.recipe == "cheap labels":
            train += [self.pool[i] for i in sorted({*range(len(self.pool))} - {*labelled.tolist()})]
        self._fit(self._last, train, {}, before, valid)

    def _features(self) -> Path:
        """Learn the cheap labels of the pool, once."""
        terms = f"{self.recipe} {self.optimizer} {self.seed}"
        path = self.folder / f"features_{hashlib.sha256(terms.encode()).hexdigest()[:8]}.orbcalc"
        if not path.exists():
            self._fit(path, self.pool, {"energy": 0.0}, None)
        return path

    def _fit(
        self,
        output: Path,
        train: Sequence[Atoms],
        tasks: Mapping[str, float],
        before: Path | None,
        valid: Sequence[Atoms] = (),
    ) -> None:
        """Train a model; without structures to validate with it holds some out if need be."""
        files = {name: output.with_name(f"{output.stem}_{name}.extxyz") for name in ("t", "v")}
        for path, structures in zip(files.values(), (train, valid), strict=True):
            if structures:
                write_structures(path, structures)
        steps = self.optimizer["steps"]
        config = {
            "train": str(files["t"]),
            "valid": [str(files["v"])] if valid else 0.1,
            "output": str(output),
            "seed": self.seed,
            "potential": {"preset": "small", **RECIPES[self.recipe]},
            "tasks": {"forces": 0.0, **tasks},
            "optimizer": {**self.optimizer, "evaluate_every": max(steps // 5, 1)},
            "start_from": None if before is None else str(before),
        }
        orbcalc.train(parse_config(config, TrainConfig, source="screen"))
        for path in files.values():
            path.unlink(missing_ok=True)
