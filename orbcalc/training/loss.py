"""The multitask loss, and the errors that are reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from orbcalc.config import PotentialConfig, TaskWeights
from orbcalc.graph import AtomGraph
from orbcalc.model.committee import CommitteePrediction
from orbcalc.model.potential import Potential, Prediction
from orbcalc.training.dataset import Targets
from orbcalc.training.statistics import charge_targets, is_wild

__all__ = [
    "ErrorSums",
    "LossScales",
    "active_properties",
    "label_counts",
    "multitask_loss",
    "on_labelled_baseline",
    "tells_forces",
]

#: Å; docs/architecture.md shows what weights of the energy of this size do to force errors.
ENERGY_LENGTH = 0.1

#: Scaled error from which on errors count by their size, not by their square, where forces of a
#: single composition are learned. docs/architecture.md has the measurements: energies alone gain
#: nothing by it, and forces of unlike crystals become worse.
_KNEE = 0.01

#: eV/Å: what is smaller in the label and in the prediction is zero by symmetry.
_NO_FORCE = 1e-4


class LossScales:
    """Sizes that bring the errors of all tasks to order one.

    Energies are compared per atom: their error is divided by the spread of the energy per atom
    in the training set, that of forces by their RMS, that of stress likewise; with a learned
    baseline, by those of what is left above it. Where forces are learned too, the size of the
    energy is what they do over `ENERGY_LENGTH`. Its spread is no measure there: energies of one
    molecule in motion differ so little that their noisy gradient would drown the forces, those
    of unlike cells so much that nothing would be learned from them.

    `knee` is the scaled error from which on errors count by their size, not by their square;
    `is_varied` tells whether structures differ in composition.
    """

    def __init__(
        self,
        potential: Potential,
        graphs: list[AtomGraph],
        targets: list[Targets],
        tasks: TaskWeights,
        *,
        is_varied: bool = True,
    ):
        def joined(name: str) -> Tensor:
            return torch.cat([getattr(target, name).flatten() for target in targets])

        n_atoms = torch.tensor([graph.n_atoms for graph in graphs])
        elements = [potential.element_index[graph.numbers].cpu() for graph in graphs]

        def bound(name: str, references: Tensor) -> Tensor:
            """Return the mean energy of an atom beyond that of lone ones."""
            lone = torch.stack([references.cpu()[own].sum() for own in elements])
            return (joined(name) - lone) / n_atoms

        energies = bound("energy", potential.reference_energies)
        xtb_energies = bound("xtb_energy", potential.xtb_reference_energies)
        self.energy, self.forces = _spread(energies, centred=True), _spread(joined("forces"))
        if potential.config.xtb_head == "baseline":
            self.energy = _spread_above(energies, xtb_energies, centred=True)
            self.forces = _spread_above(joined("forces"), joined("xtb_forces"))
        self.xtb_energy = _spread(xtb_energies, centred=True)
        self.xtb_forces = _spread(joined("xtb_forces"))
        beside_forces = 1.0 if is_varied else _KNEE
        self.knee = 1.0
        if "forces" in tasks.active and torch.isfinite(joined("forces")).any():
            self.energy, self.knee = _beside_forces(self.energy, self.forces), beside_forces
        if "xtb_forces" in tasks.active and torch.isfinite(joined("xtb_forces")).any():
            self.xtb_energy = _beside_forces(self.xtb_energy, self.xtb_forces)
            self.knee = beside_forces
        self.stress = _spread(joined("stress"))


def active_properties(tasks: TaskWeights) -> list[str]:
    """Return the properties that a loss needs."""
    return ["energy", *(task for task in tasks.active if task != "energy")]


def label_counts(targets: Targets, config: PotentialConfig) -> dict[str, int]:
    """Count the numbers that each task is to learn."""
    wanted = {**vars(targets), "charges": charge_targets(targets.charges, config)}
    return {task: int(torch.isfinite(values).sum()) for task, values in wanted.items()}


def on_labelled_baseline(prediction: Prediction, targets: Targets) -> Prediction:
    """Return energies and forces above the labelled GFN1-xTB ones instead of the predicted ones.

    For training with a learned baseline: the difference head then learns the difference, and not
    the errors that the GFN1-xTB head makes on these structures, which are others elsewhere.
    Where a GFN1-xTB label is missing nothing changes.
    """
    found = {}
    for name in ("energy", "forces"):
        own, xtb = getattr(prediction, name), getattr(prediction, f"xtb_{name}")
        if own is not None and xtb is not None:
            label = getattr(targets, f"xtb_{name}")
            found[name] = own - torch.where(torch.isfinite(label), xtb - label, 0.0)
    return replace(prediction, **found)


def tells_forces(
    graph: AtomGraph, found: Float[Tensor, "n_atoms 3"], labels: Float[Tensor, "n_atoms 3"]
) -> Bool[Tensor, "n_atoms 3"]:
    """Tell which components of forces say how good a potential is.

    Those that are zero by symmetry, as all of a lone atom are, every potential has right.
    """
    is_none = (found.abs() < _NO_FORCE) & (labels.abs() < _NO_FORCE)
    return ~is_none & graph.mask.any(1, keepdim=True)


def multitask_loss(
    potential: Potential,
    prediction: Prediction,
    graph: AtomGraph,
    targets: Targets,
    tasks: TaskWeights,
    scales: LossScales,
    counts: Mapping[str, int] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return the weighted loss of a batch, and the loss of each task.

    Each task is the sum of ``sqrt(knee² + |x|²) - knee`` over structures or atoms by the number of
    labels that are there, x being the scaled error: the energy's, or the vector of those of a
    force, a stress or the charges of an atom, so that it does not depend on the frame. It is
    quadratic near zero, and linear beyond the knee. A task without labels in this batch
    contributes nothing. Where the batch is a part of a larger one, `counts` are the labels of
    the whole (`label_counts`), so that the losses of its parts add up.
    """
    terms: dict[str, Tensor] = {}
    for task in tasks.active:
        output, wanted = getattr(prediction, task), getattr(targets, task)
        if output is None:
            continue
        scale = getattr(scales, task, 1.0)
        if task.endswith("energy"):
            scale = graph.n_atoms_of_structure * scale
        elif task == "charges":
            assert potential.charge_head is not None
            elements = potential.element_index[graph.numbers]
            output, wanted = _charges(potential, prediction, elements, targets)
            scale = potential.charge_head.get_buffer("scale")[elements]
        count = None if counts is None else counts[task]
        terms[task] = _mean_error(output, wanted.to(output.dtype), scale, scales.knee, count)
    weights = {task: getattr(tasks, task) for task in terms}
    loss = sum(weight * terms[task].double() for task, weight in weights.items())
    loss = torch.as_tensor(loss) / sum(weights.values())
    values = torch.stack([term.detach().double() for term in terms.values()] or [loss]).tolist()
    return loss, dict(zip(terms, values, strict=False))


class ErrorSums:
    """Errors gathered over batches: energy per atom, force components, stress, charges.

    Parameters
    ----------
    shares
        Count what is within the uncertainties of energies and forces, too.
    """

    def __init__(self, *, shares: bool = False) -> None:
        self._shares = shares
        self._sums: dict[str, Tensor] = {}
        self._within: dict[str, Tensor] = {}

    def add(
        self, potential: Potential, prediction: Prediction, graph: AtomGraph, targets: Targets
    ) -> None:
        """Add a batch; missing labels do not count, NaN predictions make the errors NaN."""
        n_atoms = graph.n_atoms_of_structure
        for name in ("energy", "xtb_energy") if potential.has_energies else ("xtb_energy",):
            if (output := getattr(prediction, name)) is not None:
                self._add(name, output / n_atoms, getattr(targets, name) / n_atoms)
        for name in ("forces", "stress", "xtb_forces"):
            if (output := getattr(prediction, name)) is not None:
                self._add(name, output, getattr(targets, name))
        if prediction.orbital_charges is not None:
            elements = potential.element_index[graph.numbers]
            self._add("charges", *_charges(potential, prediction, elements, targets))
        if self._shares and isinstance(prediction, CommitteePrediction):
            self._add_shares(prediction, graph, targets)

    def _add_shares(
        self, prediction: CommitteePrediction, graph: AtomGraph, targets: Targets
    ) -> None:
        limits = {"68": prediction.energy_uncertainty, "95": prediction.energy_interval_95}
        self._count_within("energy", prediction.energy[:, None], targets.energy[:, None], limits)
        if prediction.forces is not None:
            limits = {"68": prediction.forces_uncertainty, "95": prediction.forces_interval_95}
            is_told = tells_forces(graph, prediction.forces, targets.forces)
            wanted = torch.where(is_told, targets.forces, torch.nan)
            self._count_within("forces", prediction.forces, wanted, limits)

    def _count_within(
        self, name: str, output: Tensor, targets: Tensor, limits: Mapping[str, Tensor | None]
    ) -> None:
        labelled = torch.isfinite(targets)
        for share, limit in limits.items():
            if limit is None:
                continue
            inside = ((output - targets).abs() <= limit[:, None])[labelled].double()  # NaN is not
            counts = torch.stack([inside.sum(), inside.new_tensor(float(len(inside)))])
            key = f"{name}_within_{share}"
            self._within[key] = self._within.get(key, torch.zeros_like(counts)) + counts

    def result(self) -> dict[str, float]:
        """Return MAE and RMSE of each quantity that had labels; eV/atom, eV/Å, eV/Å³, e.

        With `shares`, ``energy_within_68``, ``forces_within_95`` and so on as well, from 0 to 1.
        """
        found = {
            name: float(inside / count)
            for name, (inside, count) in self._within.items()
            if count > 0
        }
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
    potential: Potential, prediction: Prediction, elements: Tensor, targets: Targets
) -> tuple[Tensor, Tensor]:
    """Return predicted and labelled charges; no label counts of what training had none of."""
    assert potential.charge_head is not None
    is_learned = potential.charge_head.get_buffer("present")[elements].any(1)
    wanted = charge_targets(targets.charges, potential.config)
    wanted = torch.where(is_learned[:, None], wanted, torch.nan)
    blocks = prediction.orbital_blocks
    output = blocks if blocks is not None else prediction.orbital_charges
    assert output is not None
    return output, wanted


def _mean_error(
    output: Tensor, targets: Tensor, scale: Tensor | float, knee: float, count: int | None
) -> Tensor:
    labelled = torch.isfinite(targets)
    # Select, do not multiply by zero: NaN times zero is NaN in the gradient.
    scaled = torch.where(labelled, (output - targets) / scale, 0.0)
    squares = scaled.square().flatten(1).sum(1) if scaled.dim() > 1 else scaled.square()
    number = int(labelled.sum()) if count is None else count
    return ((knee**2 + squares).sqrt() - knee).sum() / max(number, 1)


def _spread_above(values: Tensor, baseline: Tensor, *, centred: bool = False) -> float:
    """Return the spread of what is left above a baseline, where both are known."""
    own, left = _spread(values, centred=centred), values - baseline
    if not torch.isfinite(left).any():
        return own
    # Methods that agree leave little to learn, which must not make its error huge.
    return max(_spread(left, centred=centred), 0.1 * own)


def _beside_forces(energy: float, forces: float) -> float:
    # Relaxed structures alone have next to no forces, which must not make the error huge.
    return max(ENERGY_LENGTH * forces, 0.1 * energy)


def _spread(values: Tensor, *, centred: bool = False) -> float:
    values = values[torch.isfinite(values)]
    if len(values) == 0:
        return 1.0
    values = values - values.median() if centred else values
    values = values[~is_wild(values)]
    values = values - values.mean() if centred else values
    return max(float(values.pow(2).mean().sqrt()), 1e-4)
