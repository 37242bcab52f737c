"""A pool of cheap structures: GFN1-xTB dynamics that start from structures of a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from rich.progress import track

from orbcalc.labels.xtb import make_ase_calculator

__all__ = ["walk"]

#: fs.
TIMESTEP, FRICTION_TIME = 0.5, 50.0
#: Steps of each walker before its first structure.
SETTLE = 40


def walk(
    known: Sequence[Atoms],
    temperature: float,
    *,
    walkers: int,
    samples: int,
    every: int,
    seed: int,
) -> list[Atoms]:
    """Return structures of GFN1-xTB Langevin dynamics, without labels.

    Parameters
    ----------
    known
        Molecules to start from; the walkers choose at random.
    temperature
        K.
    walkers, samples
        Trajectories, and structures of each.
    every
        Steps between structures.
    seed
        Of the choice and the dynamics.
    """
    rng = np.random.default_rng(seed)
    found: list[Atoms] = []
    for start in track(rng.permutation(len(known))[:walkers].tolist(), description="walkers"):
        atoms = Atoms(known[start].numbers, known[start].positions)
        atoms.calc = make_ase_calculator("GFN1-xTB", atoms)
        thermalize_momenta(atoms, temperature, rng=rng)
        dynamics = Langevin(
            atoms,
            TIMESTEP * units.fs,
            temperature_K=temperature,
            friction=1 / (FRICTION_TIME * units.fs),
            fixcm=False,
            rng=rng,
        )
        dynamics.run(SETTLE)
        for _ in range(samples):
            dynamics.run(every)
            found.append(Atoms(atoms.numbers, atoms.positions))
    return found


def main() -> None:
    """Read the command line, run the walkers and write their structures."""
    options = _options()
    found = walk(
        list(ase.io.iread(options.start, ":")),
        options.temperature,
        walkers=options.walkers,
        samples=options.samples,
        every=options.every,
        seed=options.seed,
    )
    ase.io.write(options.out, found, format="extxyz")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, required=True, help="molecules, none of the test set")
    parser.add_argument("--out", type=Path, required=True, help="extxyz file")
    parser.add_argument("--temperature", type=float, default=600.0, help="K")
    parser.add_argument("--walkers", type=int, default=40)
    parser.add_argument("--samples", type=int, default=60, help="structures of each walker")
    parser.add_argument("--every", type=int, default=20, help="steps between structures")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
