"""What a stand-in for a GPU cannot show; all other tests of devices are in test_device.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from small_runs import train_config

from orbcalc.calculator import OrbcalcCalculator
from orbcalc.neighbors import _can_search, neighbor_list
from orbcalc.training.run import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SKEWED = np.array([[1.0, 0.0, 0.0], [0.4, 0.9, 0.0], [-0.3, 0.2, 0.8]])


@pytest.mark.parametrize(
    ("n_atoms", "cell"),
    [
        (300, np.diag([-15.0, 16.0, -17.0])),
        (1_000, 25.0 * SKEWED),
        (6_000, np.diag([40.0, 41.0, 42.0])),
        (6_000, 45.0 * SKEWED),
    ],
    ids=str,
)
def test_neighbors_are_found_on_a_gpu(n_atoms: int, cell: np.ndarray) -> None:
    assert _can_search(torch.device("cuda"))
    positions = np.random.default_rng(1).uniform(-1, 2, (n_atoms, 3)) @ cell
    atoms = Atoms(f"H{n_atoms}", positions=positions, cell=cell, pbc=True)
    own, expected = (neighbor_list(atoms, 5.0, device) for device in ("cuda", "cpu"))
    for name, value in vars(expected).items():
        assert torch.equal(getattr(own, name).cpu(), value), name


def test_a_gpu_predicts_what_a_cpu_does(labelled_file: Path, tmp_path: Path) -> None:
    config = train_config(labelled_file, tmp_path / "model.orbcalc", device="cuda")
    train(config)
    crystal = bulk("O", "fcc", 5.0, cubic=True) * 2
    crystal.rattle(0.1, seed=0)
    for atoms in (molecule("H2O"), crystal):
        results = []
        for device in ("cpu", "cuda"):
            copy = atoms.copy()
            copy.calc = OrbcalcCalculator(config.output, device=device)
            results.append((copy.get_potential_energy(), copy.get_forces()))
        (energy, forces), (own_energy, own_forces) = results
        assert own_energy == pytest.approx(energy, abs=1e-5 * len(atoms))
        np.testing.assert_allclose(own_forces, forces, atol=1e-4)
