"""The whole state of a training run, saved so that going on gives what never stopping gives."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from orbcalc.config import OptimizerConfig
from orbcalc.model.archive import read_archive, write_archive
from orbcalc.model.checkpoint import load_weights, potential_content, potential_from
from orbcalc.model.potential import Potential
from orbcalc.training.optimizer import Optimizer

__all__ = ["TrainState"]

_KIND, _VERSION = "training state", 4


@dataclass
class TrainState:
    """Weights, their moving average, the best average so far, and the optimiser's moments."""

    potential: Potential
    optimizer: Optimizer
    averaged: Potential
    best: dict[str, Tensor]
    step: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    stale: int = 0
    """Validations since the best one."""
    history: list[dict[str, int | float]] = field(default_factory=list)

    @classmethod
    def start(cls, potential: Potential, config: OptimizerConfig) -> TrainState:
        """Begin from the weights of a potential."""
        averaged = copy.deepcopy(potential).requires_grad_(False)
        return cls(potential, Optimizer(potential, config), averaged, _copy(averaged))

    def save(self, path: Path) -> None:
        """Write the state; the file appears whole or not at all."""
        content = {
            "potential": potential_content(self.potential),
            "dtype": str(self.potential.dtype).removeprefix("torch."),
            "step": self.step,
            "best_step": self.best_step,
            "best_loss": self.best_loss if self.best_step else None,
            "stale": self.stale,
            "history": self.history,
        }
        groups = {
            "weights": self.potential.state_dict(),
            "averaged": self.averaged.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.tensors(),
        }
        tensors = {f"{group}.{k}": v for group, named in groups.items() for k, v in named.items()}
        write_archive(path, kind=_KIND, version=_VERSION, content=content, tensors=tensors)

    @classmethod
    def load(cls, path: Path, config: OptimizerConfig, device: torch.device) -> TrainState:
        """Read a state.

        Raises
        ------
        CheckpointError
            If the file is damaged.
        """
        content, tensors = read_archive(path, kind=_KIND, version=_VERSION)
        groups: dict[str, dict[str, Tensor]] = {
            "weights": {}, "averaged": {}, "best": {}, "optimizer": {}
        }  # fmt: skip
        for name, tensor in tensors.items():
            group, rest = name.split(".", 1)
            groups[group][rest] = tensor
        dtype = getattr(torch, content["dtype"])
        potential = potential_from(content["potential"], dtype)
        load_weights(potential, groups["weights"])
        averaged = copy.deepcopy(potential).requires_grad_(False)
        load_weights(averaged, groups["averaged"])
        potential, averaged = potential.to(device), averaged.to(device)
        optimizer = Optimizer(potential, config)
        optimizer.load(groups["optimizer"])
        best_loss = content["best_loss"]
        return cls(
            potential,
            optimizer,
            averaged,
            {name: tensor.to(device) for name, tensor in groups["best"].items()},
            step=content["step"],
            best_step=content["best_step"],
            best_loss=float("inf") if best_loss is None else best_loss,
            stale=content["stale"],
            history=content["history"],
        )

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the averaged weights towards the present ones."""
        # Early on the average is short, so that it forgets where it began.
        decay = min(decay, (1 + self.step) / (10 + self.step))
        averages: list[Tensor] = list(self.averaged.parameters())
        weights: list[Tensor] = list(self.potential.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def keep_if_best(self, loss: float) -> None:
        """Remember the averaged weights if their validation loss is the lowest so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.stale = loss, self.step, 0
            self.best = _copy(self.averaged)
        else:
            self.stale += 1

    def result(self) -> Potential:
        """Return the best averaged potential."""
        self.averaged.load_state_dict(self.best)
        return self.averaged.eval()


def _copy(potential: Potential) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in potential.state_dict().items()}
