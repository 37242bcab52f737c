"""orbcalc behind the protocol of the benchmarks."""

from __future__ import annotations

from protocol import ModelWorker, serve

# isort: split
from collections.abc import Callable
from typing import Any

import torch
from ase import Atoms

import orbcalc
from orbcalc.calculator import OrbcalcCalculator
from orbcalc.config import PotentialConfig
from orbcalc.graph import AtomGraph
from orbcalc.model.checkpoint import load_model
from orbcalc.model.committee import Committee
from orbcalc.model.potential import Potential, Statistics


class OrbcalcWorker(ModelWorker):
    """A potential of orbcalc, or a committee from a file."""

    package = "orbcalc"

    def __init__(self) -> None:
        super().__init__()
        self.committee: Committee | None = None

    def describe(self) -> dict[str, str]:
        """Name the versions at work."""
        return {"orbcalc": orbcalc.__version__, **super().describe()}

    def make(
        self, elements: list[int], architecture: dict[str, Any], dtype: str, device: str
    ) -> dict[str, Any]:
        """Build a potential with random weights from arguments of `PotentialConfig`."""
        torch.manual_seed(0)
        count = len(elements)
        statistics = Statistics(
            reference_energies=torch.zeros(count, dtype=torch.float64),
            energy_scale=1.0,
            neighbor_scale=3.0,
            charge_shift=torch.zeros(count, 0),
            charge_scale=torch.ones(count, 0),
        )
        # No shells, no charge head: it is not evaluated for energies and forces anyway.
        made = Potential(
            PotentialConfig(**architecture), elements, {}, statistics, getattr(torch, dtype)
        )
        return self._use(Committee([made]), device)

    def load(self, path: str, dtype: str, device: str) -> dict[str, Any]:
        """Load a model file."""
        committee, _ = load_model(path, dtype=getattr(torch, dtype))
        return self._use(committee, device)

    def _use(self, committee: Committee, device: str) -> dict[str, Any]:
        self.device = device
        self.committee = committee.to(device).requires_grad_(False).eval()
        return {
            "parameters": sum(p.numel() for p in committee.parameters()),
            "cutoff": committee.cutoff,
        }

    def _model(self) -> Committee:
        if self.committee is None:
            raise RuntimeError("there is no model yet")
        return self.committee

    def _evaluation(self, atoms: Atoms) -> Callable[[], object]:
        model = self._model()
        graph = AtomGraph.from_atoms(atoms, model.cutoff).to(self.device)
        return lambda: model(graph, ("energy", "forces"))

    def _calculator(self) -> OrbcalcCalculator:
        return OrbcalcCalculator(self._model(), device=self.device)


if __name__ == "__main__":
    serve(OrbcalcWorker())
