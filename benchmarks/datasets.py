"""The labelled sets that models are trained and tested on, and how each is divided."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms

__all__ = ["DataSet", "load_set"]

#: Of every random division, whatever the seed of a training: all models see the same structures.
SPLIT_SEED = 1


@dataclass(frozen=True)
class DataSet:
    """Structures with ``REF_energy`` and ``REF_forces``."""

    name: str
    train: list[Atoms]
    valid: list[Atoms]
    test: list[Atoms]
    split: str
    """How it was divided, in words."""
    atom_energies: dict[str, float] | None
    """Energy of each isolated atom, eV, where the source has them."""

    def trained_on(self, n_structures: int) -> DataSet:
        """Return the same with at most so many structures to train on, at random."""
        return replace(self, train=_divide(self.train, n_structures)[0])


def load_set(folder: Path, name: str) -> DataSet:
    """Read and divide a set.

    Parameters
    ----------
    folder
        With the files ``acac_*``, ``3bpa_*`` and ``mlearn.extxyz.gz``, or a file of one's own.
    name
        "acac", "3bpa", "mlearn-X" with an element X, or the name of an extxyz file.

    Raises
    ------
    ValueError
        If there is no such set.
    """
    if name.endswith(".extxyz"):
        known, test = _divide_tenth(list(ase.io.iread(folder / name, ":")))
        train, valid = _divide_tenth(known)
        split = f"{name}, 10 % at random for the test, 10 % of the others held out"
        name = name.removesuffix(".extxyz")
        return DataSet(name, train, valid, test, f"{split} (seed {SPLIT_SEED})", None)
    if name == "acac":
        known = _read(folder, "acac_train_300K")
        train, valid = _divide(known, round(0.95 * len(known)))
        return DataSet(
            name,
            train,
            valid,
            _read(folder, "acac_test_300K"),
            f"acac_train_300K, 5 % of it held out (seed {SPLIT_SEED}); acac_test_300K",
            _atom_energies(folder, "acac_isolated_atoms"),
        )
    if name == "3bpa":
        train, valid, test = _divide(_read(folder, "3bpa_train_300K"), 400, 425)
        return DataSet(
            name,
            train,
            valid,
            test,
            f"3bpa_train_300K, 400 + 25 + 75 structures at random (seed {SPLIT_SEED})",
            _atom_energies(folder, "3bpa_isolated_atoms"),
        )
    if name.startswith("mlearn-"):
        return _load_mlearn(folder, name)
    raise ValueError(f"no set {name!r}: give acac, 3bpa, mlearn-X, X an element, or FILE.extxyz")


def _load_mlearn(folder: Path, name: str) -> DataSet:
    element = name.removeprefix("mlearn-")
    own = [a for a in _read(folder, "mlearn") if a.info["element_set"] == element]
    if not own:
        raise ValueError(f"mlearn has no structures of {element!r}")
    known = [atoms for atoms in own if atoms.info["split"] == "train"]
    test = [atoms for atoms in own if atoms.info["split"] == "test"]
    split = f"mlearn, {element}, its own test set; 10 % of the others held out (seed {SPLIT_SEED})"
    if not test:
        known, test = _divide_tenth(known)
        split = (
            f"mlearn, {element}, which has no test set: 10 % at random, "
            f"and 10 % of the others held out (seed {SPLIT_SEED})"
        )
    train, valid = _divide_tenth(known)
    return DataSet(name, train, valid, test, split, None)


def _read(folder: Path, name: str) -> list[Atoms]:
    with gzip.open(folder / f"{name}.extxyz.gz", "rt") as file:
        return list(ase.io.iread(file, ":", format="extxyz"))


def _divide(structures: Sequence[Atoms], *ends: int) -> list[list[Atoms]]:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(structures))
    return [[structures[i] for i in sorted(part)] for part in np.split(order, ends)]


def _divide_tenth(structures: Sequence[Atoms]) -> tuple[list[Atoms], list[Atoms]]:
    """Return nine tenths of the structures, and a tenth."""
    most, tenth = _divide(structures, round(0.9 * len(structures)))
    return most, tenth


def _atom_energies(folder: Path, name: str) -> dict[str, float]:
    return {str(a.symbols[0]): float(a.info["REF_energy"]) for a in _read(folder, name)}
