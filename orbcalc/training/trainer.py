"""Train potentials: `train` for a configuration, `Trainer` for one potential."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols

from orbcalc.config import TaskWeights, TrainConfig
from orbcalc.config.training import PASSES, STEPS
from orbcalc.errors import CheckpointError, ConfigError, MissingLabelError
from orbcalc.model.potential import Potential
from orbcalc.training.dataset import LabelDataset, Targets, on_device
from orbcalc.training.loss import (
    ErrorSums,
    LossScales,
    active_properties,
    label_counts,
    multitask_loss,
    on_labelled_baseline,
)
from orbcalc.training.process import fit_process, left_out, place_process
from orbcalc.training.state import TrainState

__all__ = ["Report", "Trainer", "evaluate", "resolve_device"]

logger = logging.getLogger(__name__)

#: Receives one record per validation: step, steps, losses and errors.
Report = Callable[[Mapping[str, Any]], None]

#: The state is saved at validations, and at least this often.
SAVE_EVERY_S = 30.0

#: From this part of the steps on, `optimizer.late_energy` counts.
LATE = 0.7

#: Edges that are evaluated at once: few enough for the caches of a CPU. What a GPU takes for a
#: step of such sizes is the number of operations.
MAX_EDGES = {"cpu": 20_000, "cuda": 100_000}


class Trainer:
    """Fit one potential to labelled structures.

    The order of batches follows from the seed and the step alone, so a run that goes on from
    its saved state ends, on a CPU, with the same bits as one that was never stopped.

    Parameters
    ----------
    train, valid
        Structures to learn from, and to choose the best weights by. Without the latter a process on
        features of a potential to start from is judged by leaving out each structure in turn.
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
        valid: LabelDataset | None,
        config: TrainConfig,
        *,
        seed: int,
        state_path: Path | None = None,
        report: Report | None = None,
    ) -> None:
        self.is_process = config.potential.energy_head == "process"
        # A process is fitted to energies alone, if features come with the potential to start from.
        train.require(config.tasks.reference if config.keeps_features else config.tasks.active)
        valid = train if valid is None and config.keeps_features else valid
        if not valid:
            raise ConfigError("the validation set is empty; give more structures, or `valid`")
        if unknown := sorted({*valid.elements} - {*train.elements}):
            symbols = " ".join(chemical_symbols[z] for z in unknown)
            raise ConfigError(
                f"the validation set has {symbols}, which no training structure has. Add some to "
                f"the training set, or leave them out."
            )
        #: What is learned in steps: all tasks, or the cheap ones, if a process learns the energy.
        tasks = config.tasks.model_copy(update={"energy": 0.0} if self.is_process else {})
        judging = config.tasks if config.keeps_features else tasks
        census = valid.census()
        if not any(getattr(judging, task) > 0 and count for task, count in census.items()):
            raise MissingLabelError(
                f"the validation set ({len(valid)} structures) has no label of any task with "
                f"weight ({census}): the best weights could not be told. Label it, or leave "
                f"`valid` out."
            )
        self.train, self.valid, self.config, self.seed = train, valid, config, seed
        self.tasks = tasks
        self.state_path, self.report = state_path, report
        self.device = resolve_device(config.device)
        self.properties = active_properties(tasks)
        reference = train.labelled(tasks.reference)
        cheap = sorted({*train.labelled(tasks.active)} - {*reference})
        drawn = reference or cheap
        self.is_varied, n_atoms = train.is_varied(drawn), train.mean_n_atoms(drawn)
        self.late_tasks = config.late_tasks(tasks, is_varied=self.is_varied)
        n_reference, n_cheap = config.batch_sizes(is_varied=self.is_varied, n_atoms=n_atoms)
        #: What the structures of a step are drawn from, and how many from each.
        self.sources = [(reference, n_reference), (cheap, n_cheap)]
        if not reference:
            self.sources = [(cheap, n_reference + (n_cheap if self.is_process else 0))]
        one_pass = max((math.ceil(len(part) / n) for part, n in self.sources if n), default=0)
        options = config.optimizer
        self.steps = options.steps or max(STEPS, PASSES * one_pass)
        self.evaluate_every = options.evaluate_every or math.ceil(self.steps / 20)
        usual = MAX_EDGES.get(self.device.type, MAX_EDGES["cpu"])
        self.max_edges = options.max_edges or usual
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def fit(self, make_potential: Callable[[], Potential]) -> Potential:
        """Train, or go on training, to the last step or an early stop; then fit a process.

        Parameters
        ----------
        make_potential
            Gives the potential to begin with, where there is no saved state. One that has a
            process is not trained: the process is fitted again.

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
            potential = make_potential().to(self.device)
            if potential.n_inducing > 0:
                logger.info("features are kept as they are")
                return self._with_process(potential)
            state = TrainState.start(potential, options)
        scales = self._scales(state.potential, self.tasks)
        saved = time.monotonic()
        while state.step < self.steps and not self._is_over(state):
            self._step(state, scales)
            if state.step % self.evaluate_every == 0 or state.step == self.steps:
                self._validate(state, scales)
            elif time.monotonic() - saved < SAVE_EVERY_S:
                continue
            if self.state_path is not None:
                state.save(self.state_path)
                saved = time.monotonic()
        potential = state.result()
        return self._with_process(potential) if self.is_process else potential

    def _with_process(self, potential: Potential) -> Potential:
        """Fit the process to the energies, if they are learned; features stay as they are."""
        tasks = self.config.tasks
        if not tasks.energy:
            place_process(potential, self.train)
            return potential
        fit_process(potential, self.train)
        scales = self._scales(potential, tasks)
        judged = left_out(potential, self.train) if self.valid is self.train else self.valid
        loss, errors = evaluate(potential, judged, tasks, scales)
        if self.report is not None:
            self.report({"step": self.steps, "valid_loss": loss, **errors, "steps": self.steps})
        return potential

    def _scales(self, potential: Potential, tasks: TaskWeights) -> LossScales:
        known = self.train
        return LossScales(potential, known.graphs, known.targets, tasks, is_varied=self.is_varied)

    def _is_over(self, state: TrainState) -> bool:
        patience = self.config.optimizer.patience
        return patience > 0 and state.stale >= patience

    def _step(self, state: TrainState, scales: LossScales) -> None:
        options = self.config.optimizer
        state.optimizer.zero_grad()
        parts = [self.train.batch(part) for part in self.parts(self.indices(state.step))]
        whole = Targets.batch([targets for _, targets in parts])
        counts = label_counts(whole, state.potential.config)
        tasks = self.late_tasks if state.step >= LATE * self.steps else self.tasks
        for graph, targets in parts:
            graph, targets = graph.to(self.device), targets.to(self.device)
            prediction = state.potential(graph, self.properties, create_graph=True)
            if state.potential.config.xtb_head == "baseline":
                prediction = on_labelled_baseline(prediction, targets)
            loss, terms = multitask_loss(
                state.potential, prediction, graph, targets, tasks, scales, counts
            )
            if not math.isfinite(sum(terms.values())):
                raise CheckpointError(
                    f"the loss is not finite at step {state.step} ({terms}). Lower "
                    f"optimizer.learning_rate, or look for wrong labels."
                )
            loss.backward()
        torch.nn.utils.clip_grad_norm_(state.potential.parameters(), options.gradient_clip)
        state.optimizer.step(self._schedule(state.step))
        state.step += 1
        state.average(options.ema_decay)

    def indices(self, step: int) -> list[int]:
        """Return the structures of a step: each source in a new random order in each epoch."""
        chosen: list[int] = []
        for number, (source, size) in enumerate(self.sources):
            if not source or size == 0:
                continue
            epoch, position = divmod(step, math.ceil(len(source) / size))
            chosen += self._order(number, epoch)[position * size : (position + 1) * size]
        return chosen

    def _order(self, number: int, epoch: int) -> list[int]:
        """Return a source in the order of an epoch; the last is kept, as there are many steps."""
        if self._orders.get(number, (None,))[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch, number])
            order = generator.permutation(self.sources[number][0]).tolist()
            self._orders[number] = epoch, order
        return self._orders[number][1]

    def parts(self, indices: Sequence[int]) -> list[list[int]]:
        """Divide the structures of a step into parts that are evaluated one after another.

        Structures with similar numbers of neighbours go together, so that little is padded, and
        no part has more edges than `max_edges`, unless it is a single structure.
        """
        slots = {i: self.train.graphs[i].mask.shape for i in indices}
        parts: list[list[int]] = []
        n_atoms = 0
        for i in sorted(indices, key=lambda i: (slots[i][1], i)):
            n_atoms += slots[i][0]
            if not parts or n_atoms * slots[i][1] > self.max_edges:
                parts.append([])
                n_atoms = slots[i][0]
            parts[-1].append(i)
        return parts

    def _schedule(self, step: int) -> float:
        """Return the factor of the learning rate: linear warm-up, then half a cosine to 1 %."""
        options = self.config.optimizer
        if step < options.warmup_steps:
            return (step + 1) / options.warmup_steps
        progress = (step - options.warmup_steps) / max(self.steps - options.warmup_steps, 1)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))

    def _validate(self, state: TrainState, scales: LossScales) -> None:
        loss, errors = evaluate(state.averaged, self.valid, self.late_tasks, scales)
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
            self.report({**record, "steps": self.steps})


def evaluate(
    potential: Potential,
    dataset: LabelDataset,
    tasks: TaskWeights,
    scales: LossScales,
) -> tuple[float, dict[str, float]]:
    """Return the mean loss on a data set (reference labels if there are any), and all errors."""
    judged = tasks
    if dataset.labelled(tasks.reference):
        judged = tasks.model_copy(update=dict.fromkeys(set(tasks.active) - {*tasks.reference}, 0.0))
    sums, total, weight = ErrorSums(), 0.0, 0
    for graph, targets in on_device(dataset, potential):
        prediction = potential(graph, active_properties(tasks))
        loss, _ = multitask_loss(potential, prediction, graph, targets, judged, scales)
        total += float(loss.detach()) * graph.n_structures
        weight += graph.n_structures
        sums.add(potential, prediction, graph, targets)
    return total / weight, sums.result()


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
