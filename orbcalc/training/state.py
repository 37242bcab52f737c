"""The whole state of a training run, saved so that going on gives what never stopping gives."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from orbcalc.config import OptimizerConfig
from orbcalc.model.archive import read_archive, write_archive
from orbcalc.model.checkpoint import load_weights, potential_content, potential_from
from orbcalc.model.potential import Potential
from orbcalc.model.products import DegreeLinear

__all__ = ["TrainState"]

_KIND, _VERSION = "training state", 1


@dataclass
class TrainState:
    """Weights, their moving average, the best average so far, and Adam's moments."""

    potential: Potential
    optimizer: torch.optim.Optimizer
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
        return cls(potential, _adam(potential, config), averaged, _copy(averaged))

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
        }
        tensors = {f"{group}.{k}": v for group, named in groups.items() for k, v in named.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in moments.items()}
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
        groups: dict[str, dict[str, Tensor]] = {"weights": {}, "averaged": {}, "best": {}}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, rest = name.split(".", 1)
            if group == "adam":
                index, moment = rest.split(".")
                moments.setdefault(int(index), {})[moment] = tensor
            else:
                groups[group][rest] = tensor
        dtype = getattr(torch, content["dtype"])
        potential = potential_from(content["potential"], dtype)
        load_weights(potential, groups["weights"])
        averaged = copy.deepcopy(potential).requires_grad_(False)
        load_weights(averaged, groups["averaged"])
        potential, averaged = potential.to(device), averaged.to(device)
        optimizer = _adam(potential, config)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
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


def _adam(potential: Potential, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return Adam with a step for each matrix that falls with the root of its inputs.

    A step of Adam changes every weight alike, so the change of an output grows with the number
    of inputs; this keeps one learning rate good for all widths (Yang 2022, 2203.03466). Matrices
    decay (Loshchilov 2019, 1711.05101), all at the same rate; biases and embeddings do not.
    """
    fan_in = {}
    for module in potential.modules():
        if isinstance(module, nn.Linear):
            fan_in[module.weight] = module.in_features
        elif isinstance(module, DegreeLinear):
            fan_in[module.weight] = module.fan_in
    groups: dict[int, list[nn.Parameter]] = {}
    for parameter in potential.parameters():
        groups.setdefault(fan_in.get(parameter, 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": group,
                "factor": 1 / math.sqrt(n),
                "weight_decay": config.weight_decay * math.sqrt(n) if n > 1 else 0.0,
            }
            for n, group in sorted(groups.items())
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.99),
        foreach=True,
    )


def _copy(potential: Potential) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in potential.state_dict().items()}
