"""A pool of cheap structures: GFN1-xTB dynamics that start from structures of a file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
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
FRICTION_TIME = 50.0
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
    timestep: float = 0.5,
) -> Iterator[Atoms]:
    """Yield structures of GFN1-xTB Langevin dynamics, without labels.

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
    timestep
        fs.
    """
    rng = np.random.default_rng(seed)
    for start in track(rng.permutation(len(known))[:walkers].tolist(), description="walkers"):
        atoms = Atoms(known[start].numbers, known[start].positions)
        atoms.calc = make_ase_calculator("GFN1-xTB", atoms)
        thermalize_momenta(atoms, temperature, rng=rng)
        dynamics = Langevin(
            atoms,
            timestep * units.fs,
            temperature_K=temperature,
            friction=1 / (FRICTION_TIME * units.fs),
            fixcm=False,
            rng=rng,
        )
        dynamics.run(SETTLE)
        for _ in range(samples):
            dynamics.run(every)
            yield Atoms(atoms.numbers, atoms.positions)


def main() -> None:
    """Read the command line, run the walkers and write their structures."""
    options = _options()
    structures = walk(
        list(ase.io.iread(options.start, ":")),
        options.temperature,
        walkers=options.walkers,
        samples=options.samples,
        every=options.every,
        seed=options.seed,
        timestep=options.timestep,
    )
    # Each as it comes, so that a walk that is ended early has made a smaller pool.
    with options.out.open("w", encoding="utf-8") as file:
        for atoms in structures:
            ase.io.write(file, atoms, format="extxyz")
            file.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, required=True, help="molecules, none of the test set")
    parser.add_argument("--out", type=Path, required=True, help="extxyz file")
    parser.add_argument("--temperature", type=float, default=600.0, help="K")
    parser.add_argument("--walkers", type=int, default=40)
    parser.add_argument("--samples", type=int, default=60, help="structures of each walker")
    parser.add_argument("--every", type=int, default=20, help="steps between structures")
    parser.add_argument("--timestep", type=float, default=0.5, help="fs")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
