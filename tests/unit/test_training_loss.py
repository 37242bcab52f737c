"""The loss: only labels that are there count, and NaN predictions are never a success."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from conftest import MakePotential
from scipy.spatial.transform import Rotation

from orbcalc.config import TaskWeights
from orbcalc.model.committee import CommitteePrediction
from orbcalc.model.potential import Potential, Prediction
from orbcalc.properties import REF_ENERGY, REF_FORCES, XTB_BLOCKS, XTB_ENERGY, XTB_FORCES
from orbcalc.training.dataset import LabelDataset
from orbcalc.training.loss import (
    ErrorSums,
    LossScales,
    active_properties,
    multitask_loss,
    on_labelled_baseline,
)

TASKS = TaskWeights(energy=1, forces=1, charges=1)


def without(atoms: Atoms, *keys: str) -> Atoms:
    """Return a copy that lacks some labels."""
    copy = atoms.copy()
    for key in keys:
        copy.info.pop(key, None)
        copy.arrays.pop(key, None)
    return copy


@pytest.fixture
def parts(labelled: list[Atoms], potential: Potential) -> tuple[LabelDataset, Potential]:
    """A mixed data set, and a potential with each head."""
    first, *rest = labelled
    mixed = [first, without(rest[0], REF_ENERGY, REF_FORCES), without(rest[1], XTB_BLOCKS)]
    return LabelDataset(mixed, potential.config.cutoff), potential


def predict(potential: Potential, dataset: LabelDataset) -> tuple:
    """Return graph, targets and prediction of a whole data set."""
    graph, targets = dataset.batch(range(len(dataset)))
    return graph, targets, potential(graph, active_properties(TASKS), create_graph=True)


def test_only_the_needed_properties_are_asked_for() -> None:
    assert active_properties(TaskWeights(forces=0, charges=0)) == ["energy"]
    assert active_properties(TaskWeights(stress=1)) == ["energy", "forces", "stress", "charges"]


def test_absent_labels_have_no_gradient_and_no_nan(
    parts: tuple[LabelDataset, Potential],
) -> None:
    dataset, potential = parts
    graph, targets, prediction = predict(potential, dataset)
    scales = LossScales(potential, dataset.graphs, dataset.targets, TASKS)
    loss, terms = multitask_loss(potential, prediction, graph, targets, TASKS, scales)
    gradients = torch.autograd.grad(
        loss, [p for p in potential.parameters() if p.requires_grad], allow_unused=True
    )
    assert math.isfinite(float(loss.detach()))
    assert all(math.isfinite(term) and term > 0 for term in terms.values())
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)
    (energy,) = torch.autograd.grad(
        multitask_loss(
            potential,
            replace(prediction, energy=(raw := prediction.energy.detach().requires_grad_())),
            graph,
            targets,
            TaskWeights(forces=0, charges=0),
            scales,
        )[0],
        raw,
    )
    assert (energy != 0).tolist() == [True, False, True]


def test_a_task_without_labels_in_the_batch_contributes_nothing(
    labelled: list[Atoms], potential: Potential
) -> None:
    bare = [without(labelled[0], REF_ENERGY, REF_FORCES, XTB_BLOCKS)]
    dataset = LabelDataset(bare, potential.config.cutoff)
    graph, targets, prediction = predict(potential, dataset)
    scales = LossScales(potential, dataset.graphs, dataset.targets, TASKS)
    loss, _ = multitask_loss(potential, prediction, graph, targets, TASKS, scales)
    assert float(loss.detach()) == 0.0


@pytest.mark.parametrize(
    ("learns_forces", "is_varied", "knee"),
    [(False, False, 1.0), (True, False, 0.01), (True, True, 1.0)],
)
def test_the_loss_is_quadratic_below_the_knee_and_linear_above_it(
    labelled: list[Atoms], potential: Potential, learns_forces: bool, is_varied: bool, knee: float
) -> None:
    """Beside forces of one composition nearly all errors count by their size."""
    dataset = LabelDataset(labelled[:1], potential.config.cutoff)
    graph, targets = dataset.batch([0])
    tasks = TaskWeights(forces=float(learns_forces), charges=0)
    scales = LossScales(potential, dataset.graphs, dataset.targets, tasks, is_varied=is_varied)
    assert scales.knee == knee
    scales.energy = 0.5

    def loss(error_per_atom: float) -> float:
        prediction = Prediction(targets.energy + error_per_atom * graph.n_atoms)
        return float(multitask_loss(potential, prediction, graph, targets, tasks, scales)[0])

    assert loss(0.0) == 0.0
    assert loss(0.005 * knee) == pytest.approx(0.5 * 0.01**2 * knee, rel=1e-3)
    assert loss(500.0) == pytest.approx(1000.0, rel=2e-3)


def test_the_loss_of_forces_does_not_depend_on_the_frame(
    labelled: list[Atoms], potential: Potential
) -> None:
    dataset = LabelDataset(labelled, potential.config.cutoff)
    graph, targets = dataset.batch(range(len(dataset)))
    scales = LossScales(potential, dataset.graphs, dataset.targets, TASKS, is_varied=False)
    tasks = TaskWeights(energy=0, forces=1, charges=0)
    rng = np.random.default_rng(1)
    error = torch.from_numpy(rng.normal(size=targets.forces.shape))
    turn = torch.from_numpy(Rotation.from_euler("xyz", [0.3, 1.1, -2.0]).as_matrix())

    def loss(error: torch.Tensor) -> float:
        prediction = Prediction(targets.energy, forces=targets.forces + error)
        return float(multitask_loss(potential, prediction, graph, targets, tasks, scales)[0])

    assert loss(error @ turn.T) == pytest.approx(loss(error), rel=1e-12)
    norms = error.norm(dim=1) / scales.forces
    expected = ((1e-4 + norms**2).sqrt() - 0.01).sum() / error.numel()
    assert loss(error) == pytest.approx(float(expected), rel=1e-12)


def test_only_the_ratio_of_weights_counts(parts: tuple[LabelDataset, Potential]) -> None:
    dataset, potential = parts
    graph, targets, prediction = predict(potential, dataset)
    scales = LossScales(potential, dataset.graphs, dataset.targets, TASKS)
    losses = [
        float(
            multitask_loss(
                potential,
                prediction,
                graph,
                targets,
                TaskWeights(energy=f, forces=2 * f, charges=3 * f),
                scales,
            )[0].detach()
        )
        for f in (1.0, 10.0)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_difference_is_learned_from_differences_of_labels(
    labelled: list[Atoms], make_potential: MakePotential
) -> None:
    """Errors of the GFN1-xTB head are its own, where its label is known."""
    potential = make_potential("none", xtb_head="baseline")
    assert potential.xtb_head is not None
    dataset = LabelDataset([labelled[0], without(labelled[1], XTB_ENERGY, XTB_FORCES)], 4.0)
    graph, targets = dataset.batch([0, 1])
    prediction = potential(graph, ["forces", "xtb_energy", "xtb_forces"], create_graph=True)
    found = on_labelled_baseline(prediction, targets)
    heads = [potential.xtb_head.readout.weight, potential.energy_head.readout.weight]
    owners = {"energy": torch.arange(2), "forces": graph.structure_index}
    for name, owner in owners.items():
        own, xtb = getattr(prediction, name), getattr(prediction, f"xtb_{name}")
        label, value = getattr(targets, f"xtb_{name}"), getattr(found, name)
        first, second = owner == 0, owner == 1
        torch.testing.assert_close(value[first], (own - xtb + label)[first])
        torch.testing.assert_close(value[second], own[second])
        for part, reaches in ((first, False), (second, True)):
            size = value[part].pow(2).sum()
            gradients = torch.autograd.grad(size, heads, retain_graph=True)
            moved = [bool((gradient.abs() > 1e-6).any()) for gradient in gradients]
            assert moved == [reaches, True]
    without_head = make_potential("none")(graph, [])
    assert on_labelled_baseline(without_head, targets) == without_head


def test_scales_are_those_of_the_labels(labelled: list[Atoms], potential: Potential) -> None:
    dataset = LabelDataset(labelled, potential.config.cutoff)
    scales = LossScales(potential, dataset.graphs, dataset.targets, TASKS)
    forces = np.concatenate([atoms.arrays[REF_FORCES].ravel() for atoms in labelled])
    assert scales.forces == pytest.approx(np.sqrt((forces**2).mean()))
    bare = LabelDataset([without(labelled[0], REF_ENERGY, REF_FORCES)], 4.0)
    empty = LossScales(potential, bare.graphs, bare.targets, TASKS)
    assert (empty.energy, empty.forces, empty.stress) == (1.0, 1.0, 1.0)


def test_forces_above_a_baseline_have_the_size_of_the_differences(
    labelled: list[Atoms], make_potential: MakePotential
) -> None:
    dataset = LabelDataset(labelled, 4.0)
    sizes = {
        head: LossScales(
            make_potential("none", xtb_head=head), dataset.graphs, dataset.targets, TASKS
        )
        for head in ("task", "baseline")
    }
    left = [atoms.arrays[REF_FORCES] - atoms.arrays[XTB_FORCES] for atoms in labelled]
    rms = np.sqrt((np.concatenate(left) ** 2).mean())
    assert sizes["baseline"].forces == pytest.approx(rms)
    assert sizes["task"].forces > 2 * rms
    assert sizes["task"].xtb_forces == sizes["baseline"].xtb_forces


def test_the_energy_above_a_baseline_has_the_size_of_the_differences(
    labelled: list[Atoms], make_potential: MakePotential
) -> None:
    """But methods that agree do not make the loss of the energy huge."""
    energies_alone = [without(atoms, REF_FORCES) for atoms in labelled]
    n_atoms = np.array([len(atoms) for atoms in labelled])
    own = np.array([atoms.info[XTB_ENERGY] for atoms in labelled])

    def scale(differences: np.ndarray, head: str) -> float:
        structures = [atoms.copy() for atoms in energies_alone]
        for atoms, energy in zip(structures, own + differences, strict=True):
            atoms.info[REF_ENERGY] = energy
        potential = make_potential("none", xtb_head=head)
        potential._reference_energies = potential.xtb_reference_energies
        dataset = LabelDataset(structures, 4.0)
        return LossScales(potential, dataset.graphs, dataset.targets, TASKS).energy

    differences = n_atoms * np.linspace(-1, 1, len(labelled))
    assert scale(differences, "baseline") == pytest.approx((differences / n_atoms).std())
    assert scale(0 * differences, "baseline") == pytest.approx(0.1 * scale(0 * differences, "task"))


def test_beside_forces_the_size_of_the_energy_follows_them(
    labelled: list[Atoms], make_potential: MakePotential
) -> None:
    """However far apart energies are; but without forces to learn, it is their spread."""

    def scales(spread: float, forces: float, tasks: TaskWeights) -> LossScales:
        structures = [atoms.copy() for atoms in labelled]
        steps = np.linspace(-1, 1, len(labelled))
        for atoms, step in zip(structures, steps / steps.std() * spread, strict=True):
            for energy, key in ((REF_ENERGY, REF_FORCES), (XTB_ENERGY, XTB_FORCES)):
                atoms.info[energy] = len(atoms) * step
                atoms.arrays[key] = np.full((len(atoms), 3), forces)
        potential = make_potential("none", xtb_head="task")
        for buffer in (potential._reference_energies, potential._xtb_reference_energies):
            buffer.zero_()
        dataset = LabelDataset(structures, 4.0)
        return LossScales(potential, dataset.graphs, dataset.targets, tasks)

    learned = TaskWeights(forces=1, xtb_forces=1, charges=0)
    for spread in (0.01, 0.1, 0.9):
        found = scales(spread, 2.0, learned)
        assert found.energy == found.xtb_energy == pytest.approx(0.1 * 2.0)
    relaxed = scales(0.5, 0.01, learned)
    assert relaxed.energy == relaxed.xtb_energy == pytest.approx(0.1 * 0.5)
    unlearned = scales(0.5, 2.0, TaskWeights(forces=0, xtb_forces=0))
    assert unlearned.energy == unlearned.xtb_energy == pytest.approx(0.5)


def test_errors_are_means_over_the_labels_that_are_there(
    parts: tuple[LabelDataset, Potential],
) -> None:
    dataset, potential = parts
    graph, targets, prediction = predict(potential, dataset)
    sums = ErrorSums()
    for index in range(len(dataset)):
        one, target = dataset.batch([index])
        sums.add(potential, potential(one, active_properties(TASKS)), one, target)
    found = sums.result()
    error = (prediction.energy - targets.energy).detach() / graph.n_atoms_of_structure
    assert found["energy_mae"] == pytest.approx(float(error[[0, 2]].abs().mean()))
    force_errors = (prediction.forces - targets.forces).detach()
    labelled_rows = torch.isfinite(targets.forces)
    assert found["forces_rmse"] == pytest.approx(
        float(force_errors[labelled_rows].pow(2).mean().sqrt())
    )
    assert ("charges_mae" in found) == (potential.charge_head is not None)
    assert "stress_mae" not in found


def test_a_nan_prediction_makes_loss_and_errors_nan(
    parts: tuple[LabelDataset, Potential],
) -> None:
    dataset, potential = parts
    graph, targets, prediction = predict(potential, dataset)
    broken = replace(prediction, energy=prediction.energy * torch.nan)
    scales = LossScales(potential, dataset.graphs, dataset.targets, TASKS)
    loss, _ = multitask_loss(potential, broken, graph, targets, TASKS, scales)
    assert math.isnan(float(loss.detach()))
    sums = ErrorSums()
    sums.add(potential, broken, graph, targets)
    assert math.isnan(sums.result()["energy_mae"])


@pytest.mark.parametrize("forces_are_known", [True, False])
def test_shares_count_labels_and_nan_is_never_inside(
    parts: tuple[LabelDataset, Potential], forces_are_known: bool
) -> None:
    """The energy of one structure has no label, the force on one atom is NaN."""
    dataset, potential = parts
    graph, targets = dataset.batch(range(len(dataset)))
    energy = torch.nan_to_num(targets.energy) + torch.tensor([0.5, 0.5, -3.0])
    forces = torch.nan_to_num(targets.forces)
    forces[0] = torch.nan
    limits = {
        "energy_uncertainty": torch.ones(3),
        "energy_interval_95": torch.full((3,), 4.0),
        "forces_uncertainty": torch.full((graph.n_atoms,), 0.1),
    }
    committee = CommitteePrediction(energy, forces=forces if forces_are_known else None, **limits)
    sums = ErrorSums(shares=True)
    sums.add(potential, committee, graph, targets)
    found = {name: value for name, value in sums.result().items() if "within" in name}
    expected = {"energy_within_68": 0.5, "energy_within_95": 1.0}
    if forces_are_known:
        n_labelled = int(torch.isfinite(targets.forces).all(1).sum())
        expected["forces_within_68"] = (n_labelled - 1) / n_labelled
    assert found == pytest.approx(expected)
    plain = ErrorSums()
    plain.add(potential, committee, graph, targets)
    assert not any("within" in name for name in plain.result())


def test_forces_that_symmetry_makes_zero_do_not_count_as_covered(
    parts: tuple[LabelDataset, Potential],
) -> None:
    dataset, potential = parts
    graph, targets = dataset.batch(range(len(dataset)))
    wanted = torch.ones(graph.n_atoms, 3, dtype=torch.float64)
    wanted[:, 0] = 0.0
    found = torch.where(wanted == 0, 1e-6, wanted + 5.0)  # all that could be wrong is wrong
    committee = CommitteePrediction(
        targets.energy, forces=found, forces_uncertainty=torch.ones(graph.n_atoms)
    )
    sums = ErrorSums(shares=True)
    sums.add(potential, committee, graph, replace(targets, forces=wanted))
    assert sums.result()["forces_within_68"] == 0.0
