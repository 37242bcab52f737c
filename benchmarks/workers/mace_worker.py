"""MACE behind the protocol of the benchmarks. It runs in an environment of its own."""

from __future__ import annotations

from protocol import ModelWorker, serve

# isort: split
from collections.abc import Callable, Iterable
from tempfile import TemporaryDirectory
from typing import Any

import mace
import numpy as np
import torch
from ase import Atoms
from mace import tools
from mace.calculators import MACECalculator
from mace.data import AtomicData, KeySpecification, config_from_atoms
from mace.tools import torch_geometric
from mace.tools.model_script_utils import configure_model


class MaceWorker(ModelWorker):
    """A model as `mace_run_train` builds it, or one that it has trained."""

    package = "mace-torch"

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None
        self.dtype = "float32"

    def describe(self) -> dict[str, str]:
        """Name the versions at work."""
        return {"mace-torch": mace.__version__, **super().describe()}

    def make(
        self, elements: list[int], architecture: dict[str, Any], dtype: str, device: str
    ) -> dict[str, Any]:
        """Build a model with random weights, all else being the defaults of `mace_run_train`."""
        tools.set_default_dtype(dtype)
        tools.set_seeds(0)
        options = {"name": "benchmark", "train_file": "none", **architecture}
        line = [f"--{key}={value}" for key, value in options.items()]
        arguments, _ = tools.check_args(tools.build_default_arg_parser().parse_args(line))
        # What it would take from the training set.
        arguments.mean, arguments.std, arguments.avg_num_neighbors = 0.0, [1.0], 50.0
        arguments.compute_energy, arguments.compute_dipole = True, False
        model, _ = configure_model(
            arguments,
            None,
            np.zeros((1, len(elements))),
            heads=["Default"],
            z_table=tools.AtomicNumberTable(sorted(elements)),
        )
        return self._use(model, dtype, device)

    def load(self, path: str, dtype: str, device: str) -> dict[str, Any]:
        """Load a model that was trained here: MACE's files are pickles."""
        model = torch.load(path, map_location=device, weights_only=False)
        return self._use(model.to(getattr(torch, dtype)), dtype, device)

    def measure(self, settings: list[str], steps: int) -> float:
        """Return the seconds that an epoch takes, from a few steps of it."""
        from mace_training import measure

        with TemporaryDirectory() as folder:
            return measure([*settings, f"--work_dir={folder}"], steps)

    def train(self, settings: list[str], seconds: float, path: str) -> dict[str, Any]:
        """Train, or go on training, with arguments of `mace_run_train`; write the best model."""
        from mace_training import train

        return train(settings, seconds, path)

    def _use(self, model: Any, dtype: str, device: str) -> dict[str, Any]:
        tools.set_default_dtype(dtype)
        self.device, self.dtype = device, dtype
        self.model = model.to(device).requires_grad_(False).eval()
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "cutoff": float(model.r_max),
        }

    def _predictions(self) -> Iterable[tuple[float, np.ndarray]]:
        loader = torch_geometric.dataloader.DataLoader(
            [self._graph(atoms) for atoms in self.structures], batch_size=16, shuffle=False
        )
        for batch in loader:
            found = self._model()(batch.to(self.device).to_dict(), compute_force=True)
            ends = batch.ptr[1:-1].cpu().numpy()
            forces = np.split(found["forces"].detach().cpu().double().numpy(), ends)
            yield from zip(found["energy"].detach().cpu().tolist(), forces, strict=True)

    def _model(self) -> Any:
        if self.model is None:
            raise RuntimeError("there is no model yet")
        return self.model

    def _evaluation(self, atoms: Atoms) -> Callable[[], object]:
        model = self._model()
        graphs = torch_geometric.Batch.from_data_list([self._graph(atoms)]).to(self.device)
        data = graphs.to_dict()
        return lambda: model(data, training=False, compute_force=True)

    def _calculator(self) -> MACECalculator:
        return MACECalculator(models=self._model(), device=self.device, default_dtype=self.dtype)

    def _graph(self, atoms: Atoms) -> AtomicData:
        model = self._model()
        return AtomicData.from_config(
            config_from_atoms(atoms, key_specification=KeySpecification()),
            z_table=tools.AtomicNumberTable([int(z) for z in model.atomic_numbers]),
            cutoff=float(model.r_max),
            heads=model.heads,
        )


if __name__ == "__main__":
    serve(MaceWorker())
