"""Structures with labels to judge uncertainties by: of the training's kind, and of another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from data_efficiency import sets as energy_sets
from datasets import load_set
from md_pool import walk
from rich.console import Console

from orbcalc.active.executor import open_executor
from orbcalc.active.labelling import label_into_store
from orbcalc.config import DaskConfig, LabelConfig, ReferenceConfig
from orbcalc.labels.compute import label_kinds
from orbcalc.labels.label import LabelStatus
from orbcalc.labels.store import LabelStore
from orbcalc.structures import structure_key

__all__ = ["ENERGIES", "PROBLEMS", "Problem", "label"]

console = Console(soft_wrap=True, highlight=False)

#: Steps and the batch of each training.
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """What a potential is trained on, and what it is judged by."""

    train: list[Atoms]
    valid: list[Atoms]
    judged: dict[str, list[Atoms]]
    """Test structures by name; those of "same" are of the training's kind."""
    spare: list[Atoms]
    """More of the training's kind: would a larger validation set help?"""


@dataclass(frozen=True)
class Source:
    """Where a problem comes from."""

    says: str
    make: Callable[[Path, int], Problem]
    """From the folder with the data and a seed, without GFN1 labels."""
    labels: LabelConfig
    forces: bool
    optimizer: Settings


def label(structures: Sequence[Atoms], config: LabelConfig, path: Path) -> list[Atoms]:
    """Return structures with reference and GFN1-xTB labels; those where one failed are left out.

    What the store in the path holds is not computed again.
    """
    if not structures:
        return []
    store = LabelStore(path)
    with open_executor(DaskConfig(label_workers=1, model_workers=1)) as executor:
        label_into_store(executor, structures, config, store)
    keys = [structure_key(atoms) for atoms in structures]
    done = [
        key
        for key in keys
        if all(store.status(key, kind) == LabelStatus.ok for kind in label_kinds(config))
    ]
    if len(done) < len(keys):
        console.print(f"{len(keys) - len(done)} of {len(keys)} structures have a failed label")
    return store.labelled_atoms(done)


def _parts(structures: Sequence[Atoms], seed: int, *sizes: int) -> list[list[Atoms]]:
    """Cut a random order into pieces of these sizes; the last one is the rest."""
    order = np.random.default_rng(seed).permutation(len(structures))
    ends = np.cumsum([0, *sizes, len(order) - sum(sizes)])
    return [[structures[i] for i in order[a:b]] for a, b in pairwise(ends)]


# ------------------------------------------------------------------------------- sources
def qm9(data: Path, seed: int) -> Problem:
    """Molecules at random."""
    found = energy_sets.load_set(data, "qm9", energy_sets.Limits(pool=12_000, test=2_000))
    train, rest = np.split(found.labelled(len(found.pool), seed), [1000])
    valid, spare = rest[:100], rest[100:600]
    return Problem(
        [found.pool[i] for i in train],
        [found.pool[i] for i in valid],
        {"same": found.test[:1000]},
        [found.pool[i] for i in spare],
    )


def hydroform22(data: Path, seed: int) -> Problem:
    """Complexes; those of a catalyst are in one part only."""
    limits = energy_sets.Limits(pool=1000, test=1000, max_atoms=65, catalysts=75)
    found = energy_sets.load_set(data, "hydroform22", limits)
    # The seed changes the weights only: there are too few catalysts to draw from.
    return Problem(found.pool, found.valid, {"same": found.test}, [])


def acac(data: Path, seed: int) -> Problem:
    """Acetylacetone at 300 K."""
    found = load_set(data, "acac")
    train, valid, spare = _parts([*found.train, *found.valid], seed, 200, 50)
    return Problem(train, valid, {"same": found.test}, spare)


def acac_gfn2(data: Path, seed: int) -> Problem:
    """Acetylacetone at 300 K, and at higher temperatures."""
    return _with_hotter(acac(data, seed), seed)


def bpa_gfn2(data: Path, seed: int) -> Problem:
    """3BPA, which turns about its bonds, at 300 K and at higher temperatures."""
    found = load_set(data, "3bpa")
    train, valid, same = _parts([*found.train, *found.valid, *found.test], seed, 200, 50)
    return _with_hotter(Problem(train, valid, {"same": same}, []), seed)


def _with_hotter(known: Problem, seed: int) -> Problem:
    hot = {
        f"{kelvin} K": list(walk(known.train, kelvin, walkers=20, samples=15, every=40, seed=seed))
        for kelvin in (600, 1200)
    }
    return Problem(known.train, known.valid, {**known.judged, **hot}, known.spare)


FILE = ReferenceConfig(calculator="file")
ENERGIES, WITH_FORCES = LabelConfig(reference=FILE, forces=False), LabelConfig(reference=FILE)

PROBLEMS: dict[str, Source] = {
    "qm9": Source(
        "QM9, B3LYP energies; 1,000 molecules, validated with 100, judged by 1,000 others",
        qm9, ENERGIES, False, {"steps": 2500, "batch_size": 8},
    ),
    "hydroform22": Source(
        "hydroform22, DFT energies of Co, Rh and Ir complexes of at most 65 atoms of 75 "
        "catalysts; validated with and judged by unseen catalysts",
        hydroform22, ENERGIES, False, {"steps": 1500, "batch_size": 4},
    ),
    "acac": Source(
        "acetylacetone, PBE+D3; 200 structures at 300 K, validated with 50, judged by the 650 of "
        "acac_test_300K",
        acac, WITH_FORCES, True, {"steps": 2000, "batch_size": 5},
    ),
    "acac-gfn2": Source(
        "the same structures with GFN2-xTB labels, and 300 each of GFN1-xTB dynamics at 600 and "
        "1200 K",
        acac_gfn2, LabelConfig(), True, {"steps": 2000, "batch_size": 5},
    ),
    "3bpa-gfn2": Source(
        "3BPA with GFN2-xTB labels, 200 structures at 300 K, validated with 50, judged by 250 "
        "others, and by 300 each of GFN1-xTB dynamics at 600 and 1200 K",
        bpa_gfn2, LabelConfig(), True, {"steps": 2000, "batch_size": 5},
    ),
}  # fmt: skip
