"""Training, predictions and dynamics beside the CPU: nothing is left behind on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from pretended_device import Remote, pretended_device
from small_runs import train_config, waters

from orbcalc.calculator import OrbcalcCalculator
from orbcalc.prediction import predict
from orbcalc.training.run import train

SHORT = {"steps": 6, "evaluate_every": 6}
KINDS: dict[str, dict[str, Any]] = {
    "forces": {"optimizer": {**SHORT, "max_edges": 20}},
    "committee": {
        "optimizer": SHORT,
        "committee": 2,
        "potential": {"charge_head": "invariant", "xtb_head": "task"},
    },
    "difference": {"optimizer": SHORT, "potential": {"baseline": "GFN1-xTB"}, "dtype": "float64"},
    "process": {
        "optimizer": SHORT,
        "tasks": {"forces": 0},
        "potential": {"xtb_head": "baseline", "energy_head": "process"},
    },
}


def test_the_device_has_values_and_refuses_tensors_of_the_cpu() -> None:
    with pretended_device() as device:
        weights = torch.arange(3.0, device=device).requires_grad_()
        assert isinstance(weights, Remote)
        (weights**2).sum().backward()
        assert weights.grad is not None
        assert weights.grad.tolist() == [0.0, 2.0, 4.0]
        for other in (torch.ones(3), np.ones(3)):
            with pytest.raises((RuntimeError, TypeError)):
                weights + other
        with pytest.raises((RuntimeError, TypeError)):
            weights.detach().numpy()
        assert weights.detach().cpu().numpy().tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_potential_is_trained_and_used_there_as_on_the_cpu(
    labelled_file: Path, tmp_path: Path, kind: str
) -> None:
    structures = waters(3, seed=9)
    wanted = ["energy", "forces", "charges"]
    with pretended_device() as device:
        config = train_config(labelled_file, tmp_path / "a.orbcalc", device=device, **KINDS[kind])
        assert isinstance(train(config).first.element_index, Remote)
        here = predict(config.output, structures, wanted, device="cpu")
        there = predict(config.output, structures, wanted, device=device)
        for one, other in zip(here, there, strict=True):
            assert list(one) == list(other)
            for name, value in one.items():
                np.testing.assert_allclose(value, other[name], rtol=1e-4, atol=1e-4)
        for model_device in ("cpu", device):
            _step(structures[0].copy(), OrbcalcCalculator(config.output, device=model_device))


def _step(atoms: Atoms, calculator: OrbcalcCalculator) -> None:
    """Compute a structure, and again where it has moved."""
    atoms.calc = calculator
    first = atoms.get_potential_energy()
    atoms.positions[0] += 0.1
    assert atoms.get_potential_energy() != first
    assert np.isfinite(atoms.get_forces()).all()
