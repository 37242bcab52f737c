"""Train potentials: `train` for a configuration, `Trainer` for one potential."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orbcalc.config import TaskWeights, TrainConfig
from orbcalc.errors import CheckpointError, ConfigError, MissingLabelError
from orbcalc.graph import AtomGraph
from orbcalc.model.potential import Potential
from orbcalc.training.dataset import LabelDataset, Targets
from orbcalc.training.loss import ErrorSums, LossScales, active_properties, multitask_loss
from orbcalc.training.state import TrainState

__all__ = ["Report", "Trainer", "evaluate", "on_device", "resolve_device"]

logger = logging.getLogger(__name__)

#: Receives one record per validation: step, steps, losses and errors.
Report = Callable[[Mapping[str, Any]], None]

#: The state is saved at validations, and at least this often.
SAVE_EVERY_S = 30.0


class Trainer:
    """Fit one potential to labelled structures.

    The order of batches follows from the seed and the step alone, so a run that goes on from
    its saved state ends, on a CPU, with the same bits as one that was never stopped.

    Parameters
    ----------
    train, valid
        Structures to learn from, and to choose the best weights by.
    config
        Optimiser and tasks are used.
    seed
        Of the order of batches.
    state_path
        Where the state is kept; without it nothing is saved.
    report
        Called at every validation.
    """

    def __init__(
        self,
        train: LabelDataset,
        valid: LabelDataset,
        config: TrainConfig,
        *,
        seed: int,
        state_path: Path | None = None,
        report: Report | None = None,
    ) -> None:
        train.require(config.tasks)
        if len(valid) == 0:
            raise ConfigError("the validation set is empty; give more structures, or `valid`")
        census = valid.census()
        if not any(getattr(config.tasks, task) > 0 and count for task, count in census.items()):
            raise MissingLabelError(
                f"the validation set ({len(valid)} structures) has no label of any task with "
                f"weight ({census}): the best weights could not be told. Label it, or leave "
                f"`valid` out."
            )
        self.train, self.valid, self.config, self.seed = train, valid, config, seed
        self.state_path, self.report = state_path, report
        self.device = resolve_device(config.device)
        self.properties = active_properties(config.tasks)
        self.batches_per_epoch = math.ceil(len(train) / config.optimizer.batch_size)

    def fit(self, make_potential: Callable[[], Potential]) -> Potential:
        """Train, or go on training, to the last step or an early stop.

        Parameters
        ----------
        make_potential
            Gives the potential to begin with, where there is no saved state.

        Raises
        ------
        CheckpointError
            If a saved state is damaged, or the loss becomes NaN.
        """
        options = self.config.optimizer
        if self.state_path is not None and self.state_path.exists():
            state = TrainState.load(self.state_path, options, self.device)
            logger.info("going on from step %d of %s", state.step, self.state_path)
        else:
            state = TrainState.start(make_potential().to(self.device), options)
        scales = LossScales(state.potential, self.train.graphs, self.train.targets)
        saved = time.monotonic()
        while state.step < options.steps and not self._is_over(state):
            self._step(state, scales)
            if state.step % options.evaluate_every == 0 or state.step == options.steps:
                self._validate(state, scales)
            elif time.monotonic() - saved < SAVE_EVERY_S:
                continue
            if self.state_path is not None:
                state.save(self.state_path)
                saved = time.monotonic()
        return state.result()

    def _is_over(self, state: TrainState) -> bool:
        patience = self.config.optimizer.patience
        return patience > 0 and state.stale >= patience

    def _step(self, state: TrainState, scales: LossScales) -> None:
        options = self.config.optimizer
        graph, targets = self.train.batch(self._indices(state.step))
        graph, targets = graph.to(self.device), targets.to(self.device)
        for group in state.optimizer.param_groups:
            group["lr"] = options.learning_rate * group["factor"] * self._schedule(state.step)
        prediction = state.potential(graph, self.properties, create_graph=True)
        loss, terms = multitask_loss(
            state.potential, prediction, graph, targets, self.config.tasks, scales
        )
        if not math.isfinite(sum(terms.values())):
            raise CheckpointError(
                f"the loss is not finite at step {state.step} ({terms}). Lower "
                f"optimizer.learning_rate, or look for wrong labels."
            )
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state.potential.parameters(), options.gradient_clip)
        state.optimizer.step()
        state.step += 1
        state.average(options.ema_decay)

    def _indices(self, step: int) -> list[int]:
        """Return the structures of a step: a new random order in each epoch."""
        epoch, position = divmod(step, self.batches_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.train))
        size = self.config.optimizer.batch_size
        chosen: list[int] = order[position * size : (position + 1) * size].tolist()
        return chosen

    def _schedule(self, step: int) -> float:
        """Return the factor of the learning rate: linear warm-up, then half a cosine to 1 %."""
        options = self.config.optimizer
        if step < options.warmup_steps:
            return (step + 1) / options.warmup_steps
        progress = (step - options.warmup_steps) / max(options.steps - options.warmup_steps, 1)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))

    def _validate(self, state: TrainState, scales: LossScales) -> None:
        loss, errors = evaluate(
            state.averaged, self.valid, self.config.tasks, scales, self.config.optimizer.batch_size
        )
        if not math.isfinite(loss):
            raise CheckpointError(
                f"the validation loss is not finite at step {state.step} ({errors}). Lower "
                f"optimizer.learning_rate, or look for wrong labels."
            )
        state.keep_if_best(loss)
        record = {"step": state.step, "valid_loss": loss, **errors}
        state.history.append(record)
        logger.info("step %d: %s", state.step, record)
        if self.report is not None:
            self.report({**record, "steps": self.config.optimizer.steps})


def evaluate(
    potential: Potential,
    dataset: LabelDataset,
    tasks: TaskWeights,
    scales: LossScales,
    batch_size: int,
) -> tuple[float, dict[str, float]]:
    """Return the mean loss on a data set (reference labels if there are any), and all errors."""
    dear = tasks.model_copy(update={"charges": 0.0})
    if tasks.energy + tasks.forces + tasks.stress > 0 and any(
        dataset.census()[task] for task in ("energy", "forces", "stress") if getattr(tasks, task)
    ):
        judged = dear
    else:
        judged = tasks
    sums, total, weight = ErrorSums(), 0.0, 0
    for graph, targets in on_device(dataset, batch_size, potential):
        prediction = potential(graph, active_properties(tasks))
        loss, _ = multitask_loss(potential, prediction, graph, targets, judged, scales)
        total += float(loss.detach()) * graph.n_structures
        weight += graph.n_structures
        sums.add(potential, prediction, graph, targets)
    return total / weight, sums.result()


def on_device(
    dataset: LabelDataset, size: int, potential: Potential
) -> Iterator[tuple[AtomGraph, Targets]]:
    """Go through a data set in batches, on the device of a potential."""
    device = potential.element_index.device
    for graph, targets in dataset.batches(size):
        yield graph.to(device), targets.to(device)


def resolve_device(name: str) -> torch.device:
    """Return a device; "auto" is the GPU where there is one.

    Raises
    ------
    ConfigError
        If the device is unknown or absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {error}") from error
    return device
