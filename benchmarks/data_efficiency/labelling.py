"""GFN1-xTB labels of all structures of a set, made once and kept in a label store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ase.db
from ase import Atoms
from locks import waiting_lock
from rich.console import Console

from orbcalc.active.executor import open_executor
from orbcalc.active.labelling import label_into_store
from orbcalc.config import DaskConfig, LabelConfig
from orbcalc.labels.store import LabelStore
from orbcalc.properties import XTB_BLOCKS, XTB_ENERGY, XTB_FORCES, XTB_SHELLS
from orbcalc.structures import structure_key

__all__ = ["Labelling", "add_labels"]

console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Labelling:
    """What became of the labels."""

    failed: int
    seconds: dict[str, float]
    """Time that each label took, by structure."""


def add_labels(structures: Sequence[Atoms], path: Path, workers: int) -> Labelling:
    """Write the GFN1 labels of structures into them; what failed has none.

    Parameters
    ----------
    structures
        To label.
    path
        Label store. What it has is not computed again, failures included.
    workers
        Processes that compute.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with waiting_lock(path.with_suffix(".lock")):
        store = LabelStore(path)
        missing = [a for a in structures if store.status(structure_key(a), "charges") is None]
        if missing:
            console.print(f"{len(missing)} GFN1-xTB labels are computed, kept in {path}")
            with open_executor(DaskConfig(label_workers=workers, model_workers=1)) as executor:
                label_into_store(executor, missing, LabelConfig(), store, kinds=("charges",))
    keys = [structure_key(atoms) for atoms in structures]
    for atoms, labelled in zip(structures, store.labelled_atoms(keys), strict=True):
        if XTB_ENERGY in labelled.info:
            atoms.info[XTB_ENERGY] = labelled.info[XTB_ENERGY]
            for key in (XTB_FORCES, XTB_BLOCKS, XTB_SHELLS):
                atoms.arrays[key] = labelled.arrays[key]
    with ase.db.connect(path) as database:
        rows = database.select(include_data=False)
        seconds = {row.structure_key: row.charges_wall_s for row in rows}
    return Labelling(sum(XTB_ENERGY not in atoms.info for atoms in structures), seconds)
