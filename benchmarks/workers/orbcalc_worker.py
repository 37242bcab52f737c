"""orbcalc behind the protocol of the benchmarks."""

from __future__ import annotations

from protocol import ModelWorker, serve

# isort: split
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from ase import Atoms

import orbcalc
from orbcalc.calculator import OrbcalcCalculator
from orbcalc.config import PotentialConfig, TrainConfig, load_config
from orbcalc.graph import AtomGraph
from orbcalc.model.checkpoint import load_model, save_model
from orbcalc.model.committee import Committee
from orbcalc.model.compiled import compiled
from orbcalc.model.potential import Potential, Statistics
from orbcalc.properties import REF_ENERGY
from orbcalc.structures import read_structures
from orbcalc.training.state import TrainState


class OrbcalcWorker(ModelWorker):
    """A potential of orbcalc, or a committee from a file."""

    package = "orbcalc"

    def __init__(self) -> None:
        super().__init__()
        self.committee: Committee | None = None
        self.compiled = False

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

    def compile(self) -> None:
        """Compile the model before it is timed; that takes a minute or more each time."""
        self.compiled = True

    def measure(self, settings: str, steps: int) -> float:
        """Return the seconds that an epoch takes, from a few steps of it."""
        config = load_config(settings, TrainConfig)
        times: list[float] = []
        with TemporaryDirectory() as folder:
            short = {"steps": 2 * steps, "evaluate_every": steps}
            update = {
                "output": Path(folder) / "model.orbcalc",
                "optimizer": config.optimizer.model_copy(update=short),
            }
            # The first half warms up.
            orbcalc.train(
                config.model_copy(update=update), lambda _: times.append(time.monotonic())
            )
        return (times[1] - times[0]) / steps * _batches(config)

    def train(self, settings: str, seconds: float, path: str) -> dict[str, Any]:
        """Train, or go on training, and write the best model.

        Parameters
        ----------
        settings
            File with a `TrainConfig`.
        seconds
            After which the training is left at a validation.
        path
            Where the model is written.
        """
        start = time.monotonic()
        config = load_config(settings, TrainConfig)
        deadline = _Deadline(start + seconds)
        batches = _batches(config)
        before = _saved_step(config)
        try:
            orbcalc.train(config, deadline.report)
            step = config.optimizer.steps
            shutil.copyfile(config.output, path)
        except _Left:
            state = TrainState.load(_state(config), config.optimizer, torch.device("cpu"))
            step = state.step
            save_model(path, Committee([state.result()]))
        return {
            "seconds": time.monotonic() - start,
            "epochs": (step - before) / batches,
            "at_epoch": step / batches,
            "complete": step == config.optimizer.steps,
        }

    def _use(self, committee: Committee, device: str) -> dict[str, Any]:
        self.device = device
        self.committee = committee.to(device).requires_grad_(False).eval()
        return {
            "parameters": sum(p.numel() for p in committee.parameters()),
            "cutoff": committee.cutoff,
        }

    def _predictions(self) -> Iterable[tuple[float, np.ndarray]]:
        for result in orbcalc.predict(self._model(), self.structures):
            yield result["energy"], result["forces"]

    def _model(self) -> Committee:
        if self.committee is None:
            raise RuntimeError("there is no model yet")
        return self.committee

    def _evaluation(self, atoms: Atoms) -> Callable[[], object]:
        model = self._model()
        graph = AtomGraph.from_atoms(atoms, model.cutoff).to(self.device)
        if self.compiled:
            model = compiled(model, graph)
        return lambda: model(graph, ("energy", "forces"))

    def _calculator(self) -> OrbcalcCalculator:
        return OrbcalcCalculator(self._model(), device=self.device, compile=self.compiled)


class _Left(Exception):  # noqa: N818  (no error: the way out of a training)
    pass


class _Deadline:
    """Leaves a training when its time is over and its state has been saved."""

    def __init__(self, end: float) -> None:
        self.end = end
        self.reports = 0

    def report(self, record: Mapping[str, Any]) -> None:
        # The state is saved after a report, so the first one of a call is too early.
        if self.reports and time.monotonic() > self.end and record["step"] < record["steps"]:
            raise _Left
        self.reports += 1


def _state(config: TrainConfig) -> Path:
    return config.output.with_name(f"{config.output.name}.training") / "member_0.state"


def _saved_step(config: TrainConfig) -> int:
    if not _state(config).exists():
        return 0
    return TrainState.load(_state(config), config.optimizer, torch.device("cpu")).step


def _batches(config: TrainConfig) -> int:
    """Return the number of batches of an epoch: once through the reference labels."""
    count = sum(REF_ENERGY in atoms.info for atoms in read_structures(config.train))
    assert config.optimizer.batch_size is not None
    return math.ceil(count / config.optimizer.batch_size)


if __name__ == "__main__":
    serve(OrbcalcWorker())
