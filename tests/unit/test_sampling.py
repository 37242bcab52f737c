"""MD that proposes structures: reproducible, and every ending keeps what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import CalculationFailed, Calculator, all_changes
from ase.constraints import FixAtoms
from ase.units import kB
from structures import water

from orbcalc.active.sampling import WalkTask, bootstrap_walk, committee_walk, walk
from orbcalc.config import MDConfig
from orbcalc.labels.process import WorkerCrashed
from orbcalc.model.checkpoint import save_model
from orbcalc.model.committee import Calibration, Committee

CONFIG = MDConfig(walkers=1, steps=20, every=5, timestep_fs=0.5)


class Springs(Calculator):
    """Harmonic pairs that keep water together, until a call that goes wrong."""

    implemented_properties = ("energy", "forces")

    def __init__(self, atoms: Atoms, error: Exception | None = None, after: int = 0) -> None:
        super().__init__()
        self.rest, self.error, self.after = atoms.get_all_distances(), error, after

    def calculate(self, atoms: Any = None, properties: Any = None, changes: Any = None) -> None:
        """Compute."""
        super().calculate(atoms, properties, changes or all_changes)
        self.after -= 1
        if self.error is not None and self.after < 0:
            raise self.error
        vectors = self.atoms.positions[:, None] - self.atoms.positions
        lengths = np.linalg.norm(vectors, axis=-1)
        stretch = lengths - self.rest
        np.fill_diagonal(lengths, 1.0)
        self.results = {
            "energy": 5.0 * float((stretch**2).sum()),
            "forces": -20.0 * (vectors * (stretch / lengths)[..., None]).sum(1),
        }


def positions(frames: list[Atoms]) -> np.ndarray:
    """Return all positions."""
    return np.array([atoms.positions for atoms in frames])


def test_a_walk_out_of_time_keeps_what_it_found() -> None:
    found = walk(water(), Springs(water()), CONFIG, 1, limit_s=-1.0)
    assert (len(found.frames), found.reason) == (1, "out of time after -1 s")


def test_a_walk_follows_from_its_seed() -> None:
    start = water()
    before = start.positions.copy()
    walks = [walk(start, Springs(start), CONFIG, seed) for seed in (1, 1, 2)]
    assert [w.reason for w in walks] == ["finished"] * 3
    assert [len(w.frames) for w in walks] == [4, 4, 4]
    np.testing.assert_array_equal(positions(walks[0].frames), positions(walks[1].frames))
    assert np.abs(positions(walks[0].frames) - positions(walks[2].frames)).max() > 1e-3
    np.testing.assert_array_equal(start.positions, before)
    assert start.calc is None


def test_frames_keep_what_references_and_later_walks_need_and_no_labels() -> None:
    start = water()
    start.info.update(charge=1, spin=2, REF_energy=-5.0, name="x")
    start.arrays["REF_forces"] = np.zeros((3, 3))
    start.set_initial_magnetic_moments([1.0, 0.0, 0.0])
    start.set_constraint(FixAtoms([0]))
    frames = walk(start, Springs(start), CONFIG, 0).frames
    for frame in frames:
        assert frame.info == {"charge": 1, "spin": 2}
        assert set(frame.arrays) == {"numbers", "positions", "initial_magmoms"}
        assert frame.calc is None
        assert [c.todict() for c in frame.constraints] == [FixAtoms([0]).todict()]
        np.testing.assert_allclose(frame.positions[0], start.positions[0])


def test_the_temperature_is_about_right() -> None:
    start = water()
    config = MDConfig(temperature_K=300, steps=4000, every=4000, timestep_fs=0.5)
    kinetic: list[float] = []

    class Watched(Springs):
        def calculate(self, atoms: Any = None, properties: Any = None, changes: Any = None) -> None:
            super().calculate(atoms, properties, changes)
            kinetic.append(atoms.get_kinetic_energy())

    walk(start, Watched(start), config, 3)
    # Nine degrees of freedom, or six while ASE's Langevin keeps the centre of mass.
    low, high = (n / 2 * kB * 300 for n in (6, 9))
    assert 0.7 * low < np.mean(kinetic[500:]) < 1.3 * high


@pytest.mark.parametrize(
    "error", [CalculationFailed("no SCF"), ValueError("odd"), RuntimeError("lost")]
)
def test_a_failing_calculator_ends_the_walk_and_keeps_the_frames(error: Exception) -> None:
    start = water()
    found = walk(start, Springs(start, error, after=12), CONFIG, 0)
    assert len(found.frames) == 2
    assert found.reason == f"{type(error).__name__}: {error}"


def test_positions_that_are_not_finite_end_the_walk() -> None:
    class Broken(Springs):
        def calculate(self, atoms: Any = None, properties: Any = None, changes: Any = None) -> None:
            super().calculate(atoms, properties, changes)
            self.results["forces"] = np.full((3, 3), np.nan)

    start = water()
    found = walk(start, Broken(start), CONFIG, 0)
    assert found.frames == []
    assert found.reason == "positions are not finite"


def test_a_reason_to_stop_keeps_the_frame_it_was_given_for() -> None:
    start = water()
    seen: list[Atoms] = []

    def stop(atoms: Atoms) -> str | None:
        seen.append(atoms)
        return "enough" if len(seen) == 2 else None

    found = walk(start, Springs(start), CONFIG, 0, stop=stop)
    assert (len(found.frames), found.reason) == (2, "enough")


def test_the_bootstrap_walk_runs_with_gfn1_in_a_torch_free_process() -> None:
    task = WalkTask(water(), CONFIG, seed=7)
    one, other = bootstrap_walk(task), bootstrap_walk(task)
    assert one.reason == "finished"
    np.testing.assert_array_equal(positions(one.frames), positions(other.frames))
    distances = np.linalg.norm(positions(one.frames)[:, 1] - positions(one.frames)[:, 0], axis=1)
    assert ((distances > 0.8) & (distances < 1.2)).all()  # still water


def test_an_uncertainty_that_is_no_number_ends_a_walk(
    committee: Committee, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.orbcalc"
    save_model(path, committee)
    monkeypatch.setattr("orbcalc.active.sampling.expected_error", lambda *_: np.nan)
    config = CONFIG.model_copy(update={"timestep_fs": 0.01})
    found = committee_walk(WalkTask(water(), config, seed=0, model=path))
    assert (len(found.frames), found.reason[:15]) == (1, "uncertainty nan")


def test_a_bootstrap_walk_whose_process_dies_ends_without_frames(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Dying:
        def call(self, *_: object, **__: object) -> None:
            raise WorkerCrashed("the worker died")

    monkeypatch.setattr("orbcalc.active.sampling.worker_process", Dying)
    found = bootstrap_walk(WalkTask(water(), CONFIG, seed=7))
    assert (found.frames, found.reason) == ([], "WorkerCrashed: the worker died")


@pytest.mark.parametrize(
    ("factor", "limit", "n_frames"), [(1.0, None, 4), (1e6, 0.05, 1), (1e-9, 0.05, 4)]
)
@pytest.mark.parametrize(
    ("name", "unit"), [("max_uncertainty", "eV/atom"), ("max_force_uncertainty", "eV/Å")]
)
def test_a_committee_walk_ends_where_the_members_disagree(
    committee: Committee,
    tmp_path: Path,
    name: str,
    unit: str,
    factor: float,
    limit: float | None,
    n_frames: int,
) -> None:
    path = tmp_path / "model.orbcalc"
    save_model(path, Committee([*committee.members], Calibration(factor, factor)))
    limits = {"max_uncertainty": None, "max_force_uncertainty": None, name: limit}
    config = CONFIG.model_copy(update={**limits, "timestep_fs": 0.01})
    found = committee_walk(WalkTask(water(), config, seed=0, model=path))
    assert len(found.frames) == n_frames
    assert (found.reason == "finished") == (n_frames == 4)
    if n_frames == 1:
        assert found.reason.endswith(f"above 0.05 {unit}")
