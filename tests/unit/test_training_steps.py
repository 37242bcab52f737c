"""What a step of training sees: which structures, in which parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import molecule
from conftest import MakePotential

from orbcalc.config import PotentialConfig, TrainConfig
from orbcalc.config.training import PASSES, STEPS
from orbcalc.model.potential import Potential
from orbcalc.properties import REF_ENERGY, REF_FORCES, REF_STRESS
from orbcalc.training.dataset import LabelDataset
from orbcalc.training.loss import LossScales, multitask_loss
from orbcalc.training.state import TrainState
from orbcalc.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer]


@pytest.fixture(scope="module")
def dataset(labelled: list[Atoms]) -> LabelDataset:
    """Four structures with all labels, five with cheap ones only."""
    found = []
    for number, atoms in enumerate(labelled):
        atoms = atoms.copy()
        if number >= 4:
            del atoms.info[REF_ENERGY], atoms.arrays[REF_FORCES]
            atoms.info.pop(REF_STRESS, None)
        found.append(atoms)
    return LabelDataset(found, 4.0)


@pytest.fixture
def make_trainer(dataset: LabelDataset) -> MakeTrainer:
    """Return a maker of trainers with some options."""

    def make(tasks: dict[str, float] | None = None, **optimizer: float) -> Trainer:
        config = TrainConfig(
            train="unused",
            potential=PotentialConfig(cutoff=4.0, channels=6, xtb_head="baseline"),
            tasks={"xtb_energy": 1.0, "xtb_forces": 1.0} if tasks is None else tasks,
            optimizer=optimizer,
        )
        return Trainer(dataset, dataset, config, seed=3)

    return make


def test_each_step_draws_from_both_sources(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(batch_size=2, cheap_batch_size=3)
    seen = set()
    for step in range(4):
        drawn = trainer.indices(step)
        assert sum(i < 4 for i in drawn) == 2
        assert 2 <= sum(i >= 4 for i in drawn) <= 3
        assert len(set(drawn)) == len(drawn)
        seen |= set(drawn)
    assert seen == set(range(9))
    assert trainer.indices(1) == trainer.indices(1)


def test_cheap_structures_can_be_left_out(make_trainer: MakeTrainer) -> None:
    for trainer in (
        make_trainer(batch_size=4, cheap_batch_size=0),
        make_trainer({"energy": 1.0, "charges": 0.0}, batch_size=4),  # without a task for them
    ):
        assert sorted(trainer.indices(0)) == [0, 1, 2, 3]


def test_cheap_tasks_alone_use_the_batch_size(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"energy": 0.0, "forces": 0.0, "charges": 1.0}, batch_size=9)
    assert sorted(trainer.indices(0)) == list(range(9))


def test_parts_hold_every_structure_once_and_few_edges(
    make_trainer: MakeTrainer, dataset: LabelDataset
) -> None:
    whole = make_trainer(max_edges=10**6).parts(range(9))
    assert [sorted(part) for part in whole] == [list(range(9))]
    limit = 120
    parts = make_trainer(max_edges=limit).parts(range(9))
    assert sorted(i for part in parts for i in part) == list(range(9))
    assert 1 < len(parts) < 9
    for part in parts:
        graph, _ = dataset.batch(part)
        assert graph.mask.numel() <= limit or len(part) == 1


def test_parts_add_up_to_the_whole_step(
    make_trainer: MakeTrainer, make_potential: MakePotential
) -> None:
    """The same step, at once and one structure at a time, changes the weights alike."""
    found = []
    for max_edges in (10**6, 1):
        trainer = make_trainer(
            batch_size=4, cheap_batch_size=5, max_edges=max_edges, warmup_steps=0
        )
        potential = make_potential(xtb_head="baseline").requires_grad_(True)
        state = TrainState.start(potential, trainer.config.optimizer)
        train, tasks = trainer.train, trainer.config.tasks
        trainer._step(state, LossScales(potential, train.graphs, train.targets, tasks))
        found.append([p.grad for p in state.potential.parameters() if p.grad is not None])
    assert max(float(gradient.abs().max()) for gradient in found[0]) > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


def test_few_structures_get_steps_and_many_get_passes(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = make_trainer(batch_size=2)
    assert (few.steps, few.evaluate_every) == (STEPS, STEPS / 20)
    monkeypatch.setattr("orbcalc.training.trainer.STEPS", 30)
    for cheap_batch_size, one_pass in ((0, 2), (1, 5), (4, 2)):  # 4 structures and 5 cheap ones
        many = make_trainer(batch_size=2, cheap_batch_size=cheap_batch_size)
        assert many.steps == PASSES * one_pass
        seen = [i for step in range(many.steps) for i in many.indices(step)]
        assert min(seen.count(i) for i in set(seen)) >= PASSES
    asked = make_trainer(steps=7)
    assert (asked.steps, asked.evaluate_every) == (7, 1)


def test_energies_weigh_more_in_the_last_steps(
    make_trainer: MakeTrainer, make_potential: MakePotential, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []

    def spied(*args: Any) -> Any:
        weights.append(args[4].energy)
        return multitask_loss(*args)

    monkeypatch.setattr("orbcalc.training.trainer.multitask_loss", spied)
    trainer = make_trainer(steps=10, batch_size=4, cheap_batch_size=0, evaluate_every=10)
    trainer.fit(lambda: make_potential(xtb_head="baseline").requires_grad_(True))
    assert weights == [1.0] * 7 + [16.0] * 3 + [16.0]  # and of the validation


def test_lone_atoms_do_not_make_a_set_varied() -> None:
    waters = [molecule("H2O"), molecule("H2O"), Atoms("H"), Atoms("O")]
    assert not LabelDataset(waters, 4.0).is_varied(range(4))
    assert LabelDataset([*waters, molecule("H2O2")], 4.0).is_varied(range(5))
    assert not LabelDataset([*waters, molecule("H2O2")], 4.0).is_varied(range(4))


@pytest.mark.parametrize(("is_varied", "knee"), [(True, 1.0), (False, 0.01)])
def test_errors_count_by_their_size_beside_forces_of_one_composition(
    make_trainer: MakeTrainer,
    potential: Potential,
    monkeypatch: pytest.MonkeyPatch,
    is_varied: bool,
    knee: float,
) -> None:
    assert make_trainer().is_varied
    monkeypatch.setattr(LabelDataset, "is_varied", lambda *_: is_varied)
    trainer = make_trainer()
    assert trainer._scales(potential, trainer.tasks).knee == knee
