"""Molecular dynamics that proposes structures for a pool."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import CalculationFailed
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta

from orbcalc.active.folder import bare
from orbcalc.active.labelling import worker_process
from orbcalc.active.quantities import QUANTITIES, expected_error
from orbcalc.config import MDConfig
from orbcalc.errors import OrbcalcError
from orbcalc.labels.process import WorkerCrashed, WorkerTimeout
from orbcalc.structures import geometry

__all__ = ["Walk", "WalkTask", "bootstrap_walk", "committee_walk", "walk", "walk_tasks"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WalkTask:
    """One trajectory."""

    start: Atoms
    config: MDConfig
    seed: int
    model: Path | None = None
    """Drives the walker; without a model the bootstrap method does."""
    device: str = "auto"
    """Of the model."""


@dataclass(frozen=True)
class Walk:
    """What a walker found, and why it ended."""

    frames: list[Atoms]
    reason: str
    """"finished", or what stopped it early."""


def walk_tasks(
    starts: Sequence[Atoms],
    config: MDConfig,
    rng: np.random.Generator,
    model: Path | None,
    device: str,
) -> list[WalkTask]:
    """Give each walker a start, at random if there are more starts than walkers, and a seed."""
    if len(starts) > config.walkers:
        starts = [starts[i] for i in rng.permutation(len(starts))[: config.walkers]]
    return [
        WalkTask(
            start=bare(starts[walker % len(starts)]),
            config=config,
            seed=int(rng.integers(2**32)),
            model=model,
            device=device,
        )
        for walker in range(config.walkers)
    ]


def walk(
    atoms: Atoms,
    calculator: Any,
    config: MDConfig,
    seed: int,
    *,
    stop: Callable[[Atoms], str | None] | None = None,
    limit_s: float = math.inf,
) -> Walk:
    """Run Langevin MD and keep a structure every so many steps.

    A calculator that fails, or coordinates that are not finite, end the walk: what was found
    before is kept.

    Parameters
    ----------
    atoms
        Where to start; left as it is.
    calculator
        ASE calculator with forces.
    config
        Temperature, steps and intervals.
    seed
        Of velocities and noise.
    stop
        Looks at each structure that is kept; a reason ends the walk.
    limit_s
        No step is begun after so many seconds.
    """
    end = time.monotonic() + limit_s
    rng = np.random.default_rng(seed)
    moving = atoms.copy()
    moving.calc = calculator
    thermalize_momenta(moving, config.temperature_K, rng=rng)
    dynamics = Langevin(
        moving,
        timestep=config.timestep_fs * units.fs,
        temperature_K=config.temperature_K,
        friction=config.friction_per_fs / units.fs,
        fixcm=False,  # the other choice does not sample NVT, and has no single atom
        rng=rng,
    )
    frames: list[Atoms] = []
    for _ in range(config.steps // config.every):
        try:
            dynamics.run(config.every)
        except (OrbcalcError, CalculationFailed, RuntimeError, ValueError) as error:
            return Walk(frames, f"{type(error).__name__}: {error}")
        if not np.isfinite(moving.positions).all():
            return Walk(frames, "positions are not finite")
        frames.append(_frame(moving))
        reason = stop(moving) if stop is not None else None
        if reason is not None:
            return Walk(frames, reason)
        if time.monotonic() > end:
            return Walk(frames, f"out of time after {limit_s:.0f} s")
    return Walk(frames, "finished")


def _frame(moving: Atoms) -> Atoms:
    """Copy a structure with what references and later walks depend on, but no labels."""
    frame = geometry(moving)
    for name in ("initial_charges", "initial_magmoms"):
        if name in moving.arrays:
            frame.set_array(name, moving.arrays[name])
    frame.set_constraint(moving.copy().constraints)
    return frame


def bootstrap_walk(task: WalkTask) -> Walk:
    """Run a walker with GFN1-xTB, in the torch-free child of a label worker."""
    # So that a hanging SCF cannot hold the run; a slow one ends with what it has found.
    limit = 2 * _bootstrap_limit(task.config)
    try:
        result: Walk = worker_process().call(
            "orbcalc.active.sampling:_bootstrap_here", task, timeout_s=limit
        )
    except (WorkerCrashed, WorkerTimeout) as error:
        return Walk([], f"{type(error).__name__}: {error}")
    return result


def _bootstrap_limit(config: MDConfig) -> float:
    """Return the seconds that a walk may take."""
    return 60.0 + 5.0 * config.steps


def _bootstrap_here(task: WalkTask) -> Walk:
    from orbcalc.labels.xtb import make_ase_calculator

    calculator = make_ase_calculator(task.config.bootstrap, task.start)
    limit = _bootstrap_limit(task.config)
    return walk(task.start, calculator, task.config, task.seed, limit_s=limit)


def committee_walk(task: WalkTask) -> Walk:
    """Run a walker with a committee until it is done or too uncertain."""
    from orbcalc.calculator import OrbcalcCalculator

    assert task.model is not None
    calculator = OrbcalcCalculator(task.model, device=task.device)
    limits = (
        ("energy_per_atom", "energy_uncertainty", task.config.max_uncertainty),
        ("forces", "forces_uncertainty", task.config.max_force_uncertainty),
    )

    def stop(atoms: Atoms) -> str | None:
        for quantity, source, limit in limits:
            if limit is None or source not in calculator.results:
                continue
            found = expected_error(quantity, calculator.results, len(atoms))
            if not found <= limit:  # NaN is not
                unit = QUANTITIES[quantity].unit
                return f"uncertainty {found:.3f} {unit} above {limit} {unit}"
        return None

    return walk(task.start, calculator, task.config, task.seed, stop=stop)
