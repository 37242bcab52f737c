"""The multitask loss, and the errors that are reported."""

from __future__ import annotations

import torch
from torch import Tensor

from orbcalc.config import TaskWeights
from orbcalc.graph import AtomGraph
from orbcalc.model.potential import Potential, Prediction
from orbcalc.training.dataset import Targets
from orbcalc.training.statistics import charge_targets

__all__ = ["ErrorSums", "LossScales", "active_properties", "multitask_loss"]

#: Å; docs/architecture.md shows what weights of the energy of this size do to force errors.
ENERGY_LENGTH = 0.1


class LossScales:
    """Sizes that bring the errors of all tasks to order one.

    Energies are compared per atom: their error is divided by the spread of the energy per atom
    in the training set, that of forces by their RMS, that of stress likewise. Where there are
    forces, the energy's size is at least what they do over `ENERGY_LENGTH`: energies of one
    molecule in motion differ so little that their noisy gradient would drown the forces.
    """

    def __init__(self, potential: Potential, graphs: list[AtomGraph], targets: list[Targets]):
        per_atom, stresses = [], []
        for graph, target in zip(graphs, targets, strict=True):
            reference = potential.reference_energies[potential.element_index[graph.numbers]].sum()
            per_atom.append((target.energy - reference) / graph.n_atoms)
            stresses.append(target.stress.flatten())
        forces = torch.cat([target.forces.flatten() for target in targets])
        self.energy = _spread(torch.cat(per_atom), centred=True)
        self.forces = _spread(forces)
        if torch.isfinite(forces).any():
            self.energy = max(self.energy, ENERGY_LENGTH * self.forces)
        self.stress = _spread(torch.cat(stresses))


def active_properties(tasks: TaskWeights) -> list[str]:
    """Return the properties that a loss needs."""
    return ["energy"] + [t for t in ("forces", "stress", "charges") if getattr(tasks, t) > 0]


def multitask_loss(
    potential: Potential,
    prediction: Prediction,
    graph: AtomGraph,
    targets: Targets,
    tasks: TaskWeights,
    scales: LossScales,
) -> tuple[Tensor, dict[str, float]]:
    """Return the weighted loss of a batch, and the loss of each task.

    Each task is the mean of ``sqrt(1 + x²) - 1`` over the labels that are there, x being the
    scaled error: quadratic near zero, linear for outliers. A task without labels in this batch
    contributes nothing.
    """
    terms: dict[str, Tensor] = {}
    n_atoms = graph.n_atoms_of_structure
    if tasks.energy > 0:
        terms["energy"] = _mean_error(prediction.energy, targets.energy, n_atoms * scales.energy)
    if tasks.forces > 0 and prediction.forces is not None:
        terms["forces"] = _mean_error(prediction.forces, targets.forces, scales.forces)
    if tasks.stress > 0 and prediction.stress is not None:
        terms["stress"] = _mean_error(prediction.stress, targets.stress, scales.stress)
    if tasks.charges > 0 and potential.charge_head is not None:
        output, wanted = _charges(potential, prediction, targets)
        scale = potential.charge_head.get_buffer("scale")[potential.element_index[graph.numbers]]
        terms["charges"] = _mean_error(output, wanted.to(output.dtype), scale)
    weights = {task: getattr(tasks, task) for task in terms}
    loss = sum(weight * terms[task].double() for task, weight in weights.items())
    loss = torch.as_tensor(loss) / sum(weights.values())
    return loss, {task: float(term.detach()) for task, term in terms.items()}


class ErrorSums:
    """Errors gathered over batches: energy per atom, force components, stress, charges."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(
        self, potential: Potential, prediction: Prediction, graph: AtomGraph, targets: Targets
    ) -> None:
        """Add a batch; missing labels do not count, NaN predictions make the errors NaN."""
        n_atoms = graph.n_atoms_of_structure
        self._add("energy", prediction.energy / n_atoms, targets.energy / n_atoms)
        if prediction.forces is not None:
            self._add("forces", prediction.forces, targets.forces)
        if prediction.stress is not None:
            self._add("stress", prediction.stress, targets.stress)
        if prediction.orbital_charges is not None:
            self._add("charges", *_charges(potential, prediction, targets))

    def result(self) -> dict[str, float]:
        """Return MAE and RMSE of each quantity that had labels; eV/atom, eV/Å, eV/Å³, e."""
        found: dict[str, float] = {}
        for name, (count, absolute, squared) in self._sums.items():
            if count > 0:
                found[f"{name}_mae"] = float(absolute / count)
                found[f"{name}_rmse"] = float((squared / count).sqrt())
        return found

    def _add(self, name: str, output: Tensor, targets: Tensor) -> None:
        labelled = torch.isfinite(targets)
        error = output.detach()[labelled].double() - targets[labelled]
        count = error.new_tensor(float(len(error)))
        sums = torch.stack([count, error.abs().sum(), (error**2).sum()])
        self._sums[name] = self._sums.get(name, torch.zeros_like(sums)) + sums


def _charges(
    potential: Potential, prediction: Prediction, targets: Targets
) -> tuple[Tensor, Tensor]:
    wanted = charge_targets(targets.charges, potential.config)
    blocks = prediction.orbital_blocks
    output = blocks if blocks is not None else prediction.orbital_charges
    assert output is not None
    return output, wanted


def _mean_error(output: Tensor, targets: Tensor, scale: Tensor | float) -> Tensor:
    labelled = torch.isfinite(targets)
    # Select, do not multiply by zero: NaN times zero is NaN in the gradient.
    scaled = ((output - targets) / scale)[labelled]
    return (torch.sqrt(1 + scaled**2) - 1).sum() / max(len(scaled), 1)


def _spread(values: Tensor, *, centred: bool = False) -> float:
    values = values[torch.isfinite(values)]
    if len(values) == 0:
        return 1.0
    values = values - values.mean() if centred else values
    return max(float(values.pow(2).mean().sqrt()), 1e-4)
