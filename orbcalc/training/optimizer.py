"""The optimiser: Muon for matrices, Adam for all other weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orbcalc.config import OptimizerConfig
from orbcalc.model.products import DegreeLinear

__all__ = ["Muon", "Optimizer", "orthogonalized"]

#: Matrices with a shorter side, such as readouts, are left to Adam.
_MIN_SIDE = 4

#: Learning rate of Muon for a learning rate of 1 of Adam; docs/architecture.md has others.
_MUON_RATE = 0.5

_MOMENTUM = 0.95

#: Of the quintic whose iterates bring singular values near 1 (Jordan 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Optimizer:
    """Update the weights of a potential.

    The step of a matrix is orthogonal, of size sqrt(n_out / n_in): it changes every direction
    of the output by the same part, whatever the width and however weak the gradient there
    (Jordan 2024, kellerjordan.github.io/posts/muon; sizes after Bernstein 2024, 2409.20325).
    Biases, embeddings and thin matrices take steps of Adam (Kingma 2014, 1412.6980), which fall
    with the root of the number of inputs (Yang 2022, 2203.03466). Matrices lose learning rate x
    weight decay of their size in each step (Loshchilov 2019, 1711.05101).

    Parameters
    ----------
    potential
        Its weights are changed in place.
    config
        Learning rate and weight decay.
    """

    def __init__(self, potential: nn.Module, config: OptimizerConfig) -> None:
        self._learning_rate = config.learning_rate
        linear = {
            module.weight: module
            for module in potential.modules()
            if isinstance(module, (nn.Linear, DegreeLinear))
        }
        matrices: dict[bool, list[nn.Parameter]] = {}
        others: dict[int, list[nn.Parameter]] = {}
        for weight in potential.parameters():
            module = linear.get(weight)
            inputs_first = isinstance(module, DegreeLinear)
            if module is not None and min(weight.shape[-2:]) >= _MIN_SIDE:
                matrices.setdefault(inputs_first, []).append(weight)
            else:
                n_inputs = 1 if module is None else weight.shape[-2 if inputs_first else -1]
                others.setdefault(n_inputs, []).append(weight)
        self._parts: dict[str, torch.optim.Optimizer] = {
            "adam": torch.optim.AdamW(
                [
                    {
                        "params": weights,
                        "factor": 1 / math.sqrt(n),
                        "weight_decay": config.weight_decay * math.sqrt(n) if n > 1 else 0.0,
                    }
                    for n, weights in sorted(others.items())
                ],
                betas=(0.9, 0.99),
                foreach=True,
            )
        }
        if matrices:
            self._parts["muon"] = Muon(matrices, weight_decay=config.weight_decay / _MUON_RATE)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts.values():
            part.zero_grad(set_to_none=True)

    def step(self, schedule: float) -> None:
        """Update all weights that have a gradient, with this part of the learning rate."""
        for part in self._parts.values():
            for group in part.param_groups:
                group["lr"] = self._learning_rate * schedule * group["factor"]
            part.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments, by name."""
        return {
            f"{name}.{index}.{moment}": value
            for name, part in self._parts.items()
            for index, moments in part.state_dict()["state"].items()
            for moment, value in moments.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over moments that `tensors` gave."""
        states: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in self._parts}
        for key, value in tensors.items():
            name, index, moment = key.split(".")
            states[name].setdefault(int(index), {})[moment] = value
        for name, part in self._parts.items():
            part.load_state_dict({**part.state_dict(), "state": states[name]})


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (Jordan 2024).

    PyTorch's own takes single matrices only; here a parameter may be a stack of them, and all of
    one shape are treated at once.

    Parameters
    ----------
    matrices
        Parameters (..., n, m) whose rows are the inputs (True), and the outputs (False).
    weight_decay
        Part of a matrix that it loses in a step with a learning rate of 1.
    """

    def __init__(
        self, matrices: Mapping[bool, Sequence[nn.Parameter]], weight_decay: float
    ) -> None:
        groups = [{"params": weights, "inputs_first": key} for key, weights in matrices.items()]
        super().__init__(groups, {"lr": 0.0, "factor": _MUON_RATE, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; `closure` is not used.

        A matrix whose gradient is zero stays as it is: a batch said nothing about it (no ions for
        the weights of the charge, no charge labels for their head), and a step along its old mean
        would be as large as any.
        """
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    shape = weight.shape[-2:]
                    matrices = weight.detach().view(-1, *shape)
                    gradient = weight.grad.reshape(-1, *shape)
                    mean = self._momentum(weight).reshape(-1, *shape)
                    shapes.setdefault(shape, []).append((matrices, gradient, mean))
            for (n, m), own in shapes.items():
                size = math.sqrt(m / n if group["inputs_first"] else n / m)
                weights, gradients, means = zip(*own, strict=True)
                told = (torch.cat(gradients) != 0).any(-1).any(-1)
                rates = group["lr"] * told[:, None, None]
                steps = size * rates * orthogonalized(torch.cat(means))
                counts = [len(mean) for mean in means]
                moves = zip(weights, steps.split(counts), rates.split(counts), strict=True)
                for matrices, step, rate in moves:
                    matrices.mul_(1 - group["weight_decay"] * rate).sub_(step)

    def _momentum(self, weight: nn.Parameter) -> Tensor:
        """Return the mean gradient, as it will be after one more like the last (Nesterov)."""
        assert weight.grad is not None
        if "mean" not in self.state[weight]:
            self.state[weight]["mean"] = torch.zeros_like(weight)
        mean: Tensor = self.state[weight]["mean"].lerp_(weight.grad, 1 - _MOMENTUM)
        ahead: Tensor = weight.grad.lerp(mean, _MOMENTUM)
        return ahead


def orthogonalized(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices (k, n, m) near 1 (0.7 to 1.2), but zero ones.

    Five steps of a Newton-Schulz iteration, whose products cost less than a decomposition.
    """
    a, b, c = _QUINTIC
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    found: Tensor = matrices.mT if is_tall else matrices
    largest = found.abs().amax((-2, -1), keepdim=True)  # or squares of small numbers vanish
    found = found / torch.where(largest > 0, largest, 1.0)
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp_min(1.0)
    for _ in range(_ITERATIONS):
        gram = found @ found.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        found = torch.baddbmm(found, factor, found, beta=a)
    return found.mT if is_tall else found
