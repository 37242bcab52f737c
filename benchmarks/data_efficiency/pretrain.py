"""Learn features from the cheap labels of several sets, for arm 13 to train on (`--start`).

The structures: those of hydroform22 without its validation and test sets, all of Vaska, neutral
complexes of tmQM with a metal of hydroform22 or phosphorus, and molecules of the pool of QM9. No
label of an expensive method is used. The same call again goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from arms import ARMS, WEIGHT
from ase import Atoms
from labelling import add_labels
from rich.console import Console
from sets import Limits, load_set, read_tmqm
from training import Run, Settings, feature_config, learn_features

from orbcalc.properties import XTB_BLOCKS

console = Console(soft_wrap=True, highlight=False)

#: Structures of a step.
BATCH_SIZE = 12

#: More than any set has.
ALL = 10**6

#: Of tmQM, complexes of one of these metals, or with phosphorus; and of no elements but those.
METALS = frozenset({"Co", "Rh", "Ir"})
NEARBY = {"H", "C", "N", "O", "F", "P", "S", "Cl", "As", "Br", "I", "Fe", "Ni", "Ru", "Pd", "Pt"}


def main() -> None:
    """Read the command line; label, train."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    unlimited = Limits(pool=ALL, test=ALL)
    metals = load_set(
        options.data, "hydroform22", Limits(ALL, ALL, options.max_atoms, larger=options.larger)
    )
    vaska = load_set(options.data, "vaska", unlimited)
    qm9 = load_set(options.data, "qm9", Limits(pool=12_000, test=10))
    parts = {
        "hydroform22": [*metals.pool, *metals.larger],
        "vaska": [*vaska.pool, *vaska.valid, *vaska.test],
        "tmqm": [atoms for atoms in read_tmqm(options.data) if _is_near(atoms)],
        "qm9": qm9.pool[: options.qm9],
    }
    valid = metals.validation(0)
    cheap = list[Atoms]()
    for name, structures in parts.items():
        judging = valid if name == "hydroform22" else []
        store = options.labels / f"{name}.db"
        failed = add_labels([*structures, *judging], store, options.threads).failed
        cheap += [atoms for atoms in structures if XTB_BLOCKS in atoms.arrays]
        console.print(f"{len(structures)} structures of {name}; {failed} labels failed")
    settings = Settings(
        steps=options.steps,
        preset=options.preset,
        batch_size=BATCH_SIZE,
        cheap_batch_size=0,
        learning_rate=options.learning_rate,
        draw="structure",
        device=options.device,
    )
    config = feature_config(Run("13", 0, options.seed, WEIGHT), settings)
    learn_features(options.out / "model.orbcalc", cheap, valid, config, ARMS["13"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sets")
    parser.add_argument("--out", type=Path, required=True, help="gets model.orbcalc")
    parser.add_argument("--labels", type=Path, required=True, help="folder of the label stores")
    parser.add_argument("--max-atoms", type=int, default=80, help="as in run.py")
    parser.add_argument("--larger", type=int, default=1000, help="as in run.py")
    parser.add_argument("--qm9", type=int, default=3000, help="molecules of QM9")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--preset", default="medium", choices=["small", "medium", "large"])
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _is_near(atoms: Atoms) -> bool:
    """Tell whether a complex of tmQM is like those of hydroform22."""
    symbols = {*atoms.symbols}
    is_alike = "P" in symbols or bool(METALS & symbols)
    return atoms.info["charge"] == 0 and is_alike and symbols <= METALS | NEARBY


if __name__ == "__main__":
    main()
