"""Dynamics with a trained model: whether its energy stays, and its molecule.

First NVE, whose drift of the total energy is fitted by a line; then Langevin dynamics at a high
temperature, in which no bond between heavy atoms may break or form, no hydrogen may come off and no
force may run away. A hydrogen that goes from one heavy atom to another, as in an enol, is reported
and no failure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.data import covalent_radii
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from common import machine
from matplotlib.axes import Axes
from rich.console import Console

from orbcalc import OrbcalcCalculator
from orbcalc.errors import OrbcalcError
from orbcalc.files import write_json
from orbcalc.report.style import (
    BLUE,
    GREY,
    RED,
    new_figure,
    png,
    set_legend,
    set_title,
    style_axes,
)

#: A bond is a pair closer than this many sums of covalent radii; it is broken from the second
#: one on. Between them a bond may stretch without ending.
BOND, BROKEN = 1.25, 1.5
#: fs between two looks.
LOOK = 20.0
#: fs, of the Langevin thermostat.
FRICTION_TIME = 100.0

console = Console(soft_wrap=True, highlight=False)


def main() -> None:
    """Read the command line and run both dynamics."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    atoms = ase.io.read(options.start)
    assert isinstance(atoms, Atoms)
    if not atoms.pbc.any():
        atoms.set_cell([0.0, 0.0, 0.0])  # a box around a molecule means nothing
    atoms.calc = OrbcalcCalculator(options.model, device=options.device, dtype=options.dtype)
    rng = np.random.default_rng(options.seed)
    bonds = _Bonds(atoms)
    stability: dict[str, Any] = {
        "model": str(options.model),
        "start": str(options.start),
        "formula": atoms.get_chemical_formula(),
        "settings": {
            name: getattr(options, name)
            for name in (
                *("timestep_fs", "nve_ps", "nve_temperature", "settle_ps"),
                *("langevin_ps", "langevin_temperature", "max_force", "dtype", "device", "seed"),
            )
        },
        "machine": machine(options.threads),
    }
    hot = atoms.copy()
    hot.calc = atoms.calc
    stability["nve"] = _nve(atoms, options, rng)
    write_json(options.out / "stability.json", stability, allow_nan=True)
    stability["langevin"] = _langevin(hot, bonds, options, rng)
    write_json(options.out / "stability.json", stability, allow_nan=True)
    (options.out / "stability.png").write_bytes(_figure(stability))
    _report(stability)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a .orbcalc file")
    parser.add_argument("--start", type=Path, required=True, help="structure to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--timestep-fs", type=float, default=0.5)
    parser.add_argument("--nve-ps", type=float, default=10.0)
    parser.add_argument("--nve-temperature", type=float, default=300.0, help="K")
    parser.add_argument("--settle-ps", type=float, default=1.0, help="Langevin before NVE")
    parser.add_argument("--langevin-ps", type=float, default=100.0)
    parser.add_argument("--langevin-temperature", type=float, default=600.0, help="K")
    parser.add_argument("--max-force", type=float, default=30.0, help="eV/Å that is too much")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


# ---------------------------------------------------------------------------- dynamics
def _nve(atoms: Atoms, options: argparse.Namespace, rng: np.random.Generator) -> dict[str, Any]:
    """Let the structure settle at a temperature, then follow its total energy."""
    step = options.timestep_fs * units.fs
    thermalize_momenta(atoms, options.nve_temperature, rng=rng)
    _langevin_dynamics(atoms, options, options.nve_temperature, rng).run(
        round(1e3 * options.settle_ps / options.timestep_fs)
    )
    Stationary(atoms)
    found = _follow(VelocityVerlet(atoms, step), options.nve_ps, options, "NVE")
    if "failure" in found or len(found["time_ps"]) < 3:
        return found
    energy = 1e3 * np.array(found["total_energy"]) / len(atoms)
    slope, offset = np.polyfit(found["time_ps"], energy, 1)
    rest = energy - slope * np.array(found["time_ps"]) - offset
    return {
        "drift_meV_per_atom_per_ps": float(slope),
        "fluctuation_meV_per_atom": float(rest.std()),
        "mean_temperature": float(np.mean(found["temperature"])),
        **found,
    }


def _langevin(
    atoms: Atoms, bonds: _Bonds, options: argparse.Namespace, rng: np.random.Generator
) -> dict[str, Any]:
    """Heat the structure and watch its bonds and forces."""
    thermalize_momenta(atoms, options.langevin_temperature, rng=rng)
    dynamics = _langevin_dynamics(atoms, options, options.langevin_temperature, rng)
    changes: dict[str, float] = {}
    transfers: dict[str, float] = {}

    def look(time_ps: float) -> None:
        for name in bonds.changes(atoms):
            changes.setdefault(name, time_ps)
        for name in bonds.transfers(atoms):
            transfers.setdefault(name, time_ps)

    found = _follow(dynamics, options.langevin_ps, options, "Langevin", look)
    largest = max(found["max_force"], default=float("nan"))
    return {
        "changed_bonds": changes,
        "hydrogen_transfers": transfers,
        "largest_force": largest,
        "mean_temperature": float(np.mean(found["temperature"])),
        "is_stable": not changes and "failure" not in found and largest <= options.max_force,
        **found,
    }


def _langevin_dynamics(
    atoms: Atoms, options: argparse.Namespace, temperature: float, rng: np.random.Generator
) -> Langevin:
    return Langevin(
        atoms,
        options.timestep_fs * units.fs,
        temperature_K=temperature,
        friction=1 / (FRICTION_TIME * units.fs),
        fixcm=False,
        rng=rng,
    )


def _follow(
    dynamics: MolecularDynamics,
    ps: float,
    options: argparse.Namespace,
    name: str,
    look: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Run dynamics and look at it now and then; it ends early when forces run away."""
    atoms, every = dynamics.atoms, max(round(LOOK / options.timestep_fs), 1)
    looks = max(round(1e3 * ps / options.timestep_fs / every), 1)
    series: dict[str, Any] = {"time_ps": [], "total_energy": [], "temperature": [], "max_force": []}
    peaks: list[float] = []
    dynamics.attach(lambda: peaks.append(_largest_force(atoms)))
    start = time.perf_counter()
    for number in range(looks):
        time_ps = 1e-3 * number * every * options.timestep_fs
        try:
            force = float(np.max([*peaks, _largest_force(atoms)]))  # since the last look
            peaks.clear()
            series["time_ps"].append(time_ps)
            series["total_energy"].append(float(atoms.get_total_energy()))
            series["temperature"].append(float(atoms.get_temperature()))
            series["max_force"].append(force)
            if look is not None:
                look(time_ps)
            if not force <= options.max_force:  # so that NaN counts
                return {**series, "failure": f"a force of {force:.3g} eV/Å at {time_ps:g} ps"}
            dynamics.run(every)
        except OrbcalcError as error:  # atoms overlap, or a coordinate is NaN
            return {**series, "failure": f"{error} (after {time_ps:g} ps)"}
        if 10 * (number + 1) // looks > 10 * number // looks:
            console.print(f"{name}: {time_ps + 1e-3 * LOOK:.3g} of {ps:g} ps")
    return {**series, "seconds_per_step": (time.perf_counter() - start) / (looks * every)}


def _largest_force(atoms: Atoms) -> float:
    return float(np.linalg.norm(atoms.get_forces(), axis=1).max())


# ------------------------------------------------------------------------------- bonds
class _Bonds:
    """The bonds of a structure, by covalent radii, and what becomes of them."""

    def __init__(self, atoms: Atoms) -> None:
        self.hydrogens = np.flatnonzero(atoms.numbers == 1)
        self.heavy = np.flatnonzero(atoms.numbers != 1)
        distances = _relative_distances(atoms)
        self.skeleton = self._pairs(distances < BOND)
        self.hosts = self._hosts(distances)

    def changes(self, atoms: Atoms) -> list[str]:
        """Name bonds of heavy atoms that have broken or are new, and hydrogens that came off."""
        distances = _relative_distances(atoms)
        broken = self.skeleton - self._pairs(distances < BROKEN)
        new = self._pairs(distances < BOND) - self.skeleton
        lost = [
            (int(h), host)
            for h, host in zip(self.hydrogens, self._hosts(distances), strict=True)
            if distances[h, host] >= BROKEN
        ]
        kinds = (("broken", sorted(broken)), ("new", sorted(new)), ("broken", lost))
        return [f"{kind}: {_name(atoms, *pair)}" for kind, pairs in kinds for pair in pairs]

    def transfers(self, atoms: Atoms) -> list[str]:
        """Name hydrogens that are nearer to another heavy atom than to the first one's."""
        hosts = self._hosts(_relative_distances(atoms))
        return [
            f"{_name(atoms, int(h), old)} to {_name(atoms, int(h), new)}"
            for h, old, new in zip(self.hydrogens, self.hosts, hosts, strict=True)
            if old != new
        ]

    def _pairs(self, bonded: np.ndarray) -> set[tuple[int, int]]:
        i, j = np.nonzero(np.triu(bonded[np.ix_(self.heavy, self.heavy)], 1))
        return set(zip(self.heavy[i].tolist(), self.heavy[j].tolist(), strict=True))

    def _hosts(self, distances: np.ndarray) -> list[int]:
        """Return the nearest heavy atom of each hydrogen."""
        nearest = distances[np.ix_(self.hydrogens, self.heavy)].argmin(1)
        hosts: list[int] = self.heavy[nearest].tolist()
        return hosts


def _relative_distances(atoms: Atoms) -> np.ndarray:
    """Return all distances in sums of covalent radii, (n_atoms, n_atoms)."""
    radii = covalent_radii[atoms.numbers]
    relative: np.ndarray = atoms.get_all_distances(mic=atoms.pbc.any()) / (radii[:, None] + radii)
    return relative


def _name(atoms: Atoms, a: int, b: int) -> str:
    return f"{atoms.symbols[a]}{a}-{atoms.symbols[b]}{b}"


# ------------------------------------------------------------------------------ report
def _report(stability: dict[str, Any]) -> None:
    nve, hot = stability["nve"], stability["langevin"]
    if "drift_meV_per_atom_per_ps" in nve:
        console.print(
            f"NVE: drift {nve['drift_meV_per_atom_per_ps']:+.3g} meV/atom/ps, fluctuation "
            f"{nve['fluctuation_meV_per_atom']:.3g} meV/atom at {nve['mean_temperature']:.0f} K"
        )
    verdict = "stable" if hot["is_stable"] else "NOT stable"
    console.print(
        f"Langevin: {verdict}; largest force {hot['largest_force']:.3g} eV/Å, "
        f"{len(hot['changed_bonds'])} bonds broken or new, {hot['mean_temperature']:.0f} K"
    )
    for name, time_ps in {**hot["changed_bonds"], **hot["hydrogen_transfers"]}.items():
        console.print(f"  {name}, first at {time_ps:g} ps")
    for part in (nve, hot):
        if "failure" in part:
            console.print(f"ended early: {part['failure']}")


def _figure(stability: dict[str, Any]) -> bytes:
    figure = new_figure(3.8)
    left, right = figure.subplots(1, 2)
    _draw_energy(left, stability["nve"], stability["formula"])
    hot, settings = stability["langevin"], stability["settings"]
    right.plot(hot["time_ps"], hot["max_force"], color=BLUE, lw=0.7)
    right.axhline(settings["max_force"], color=GREY, ls="--", lw=1, label="limit")
    for number, time_ps in enumerate(sorted(set(hot["changed_bonds"].values()))):
        right.axvline(time_ps, color=RED, lw=1, label=None if number else "a bond has changed")
    style_axes(right)
    set_title(right, f"Langevin dynamics, {settings['langevin_temperature']:g} K")
    right.set_xlabel("ps")
    right.set_ylabel("largest force, eV/Å")
    set_legend(right, "best")
    return png(figure)


def _draw_energy(axes: Axes, nve: dict[str, Any], formula: str) -> None:
    energy = 1e3 * np.array(nve["total_energy"])
    if "drift_meV_per_atom_per_ps" in nve:
        times = np.array(nve["time_ps"])
        slope, offset = np.polyfit(times, energy - energy.mean(), 1)
        drift = f"{nve['drift_meV_per_atom_per_ps']:+.2g} meV/atom/ps"
        axes.plot(times, slope * times + offset, color=RED, lw=1.3, label=f"drift {drift}")
    axes.plot(nve["time_ps"], energy - energy.mean(), color=BLUE, lw=0.8, zorder=1)
    style_axes(axes)
    set_title(axes, f"NVE, {formula}")
    axes.set_xlabel("ps")
    axes.set_ylabel("total energy of all atoms, meV")
    set_legend(axes, "best")


if __name__ == "__main__":
    main()
