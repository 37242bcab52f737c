"""One run: train an arm with some expensive labels, test it, write down what came out."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import ARMS, Arm, shuffle_blocks
from ase import Atoms
from labelling import Labelling
from locks import try_lock
from reading import ReadingPotential, states_of_reading_potentials
from sets import DataSet, barrier_pairs
from torch import Tensor

from orbcalc.active.prediction import functions_chunk
from orbcalc.active.prior import process_columns, select_informative
from orbcalc.config import PotentialConfig, TrainConfig, parse_config
from orbcalc.files import file_sha256, read_json, replace_file, write_json
from orbcalc.model.checkpoint import load_model, save_model
from orbcalc.model.committee import Committee
from orbcalc.model.potential import Potential
from orbcalc.properties import REF_ENERGY
from orbcalc.structures import structure_key
from orbcalc.training.dataset import LabelDataset, on_device
from orbcalc.training.initial import initial_potential
from orbcalc.training.statistics import charge_targets
from orbcalc.training.trainer import Trainer

__all__ = ["Run", "Settings", "feature_config", "learn_features", "perform"]

#: Structures of the batch whose inference is timed, and how often.
_TIMED_STRUCTURES, _REPEATS = 64, 10

#: Columns of the ten orbitals of an atom, by kind of shell.
_ORBITALS = {"s": [0, 1], "p": [2, 3, 4], "d": [5, 6, 7, 8, 9]}


@dataclass(frozen=True)
class Settings:
    """What all runs of a folder have in common."""

    steps: int
    preset: str
    batch_size: int
    cheap_batch_size: int
    learning_rate: float
    draw: str
    """How the labelled structures are chosen."""
    device: str
    start: str | None = None
    """Model whose features arm 13 trains on, instead of beginning afresh."""


@dataclass(frozen=True)
class Run:
    """One point of a learning curve."""

    arm: str
    size: int
    """Structures with expensive labels that are trained on."""
    seed: int
    weight: float
    """Of each cheap task; that of the energy is 1."""

    def folder(self, out: Path) -> Path:
        """Return where it is kept."""
        weight = f"_w{self.weight:g}" if ARMS[self.arm].tasks else ""
        return out / "runs" / f"{self.arm}_n{self.size}_s{self.seed}{weight}"

    def result(self, out: Path) -> dict[str, Any] | None:
        """Return what came out; None if it is not done."""
        path = self.folder(out) / "result.json"
        return read_json(path) if path.exists() else None


def perform(
    run: Run, out: Path, features: Path, data: DataSet, labels: Labelling, settings: Settings
) -> bool:
    """Train and test unless that is done; tells whether it is.

    A run that was killed goes on where its state was last saved. What another process works on
    is left alone, and runs that need its features, which are kept in a folder.
    """
    folder = run.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with try_lock(folder / "lock") as mine:
        if mine and run.result(out) is None:
            start = None
            if ARMS[run.arm].is_process:
                start = _learned_features(run, features, data, settings)
                if start is None:
                    return False
            result = _train_and_test(run, folder, start, data, labels, settings)
            write_json(folder / "result.json", result, allow_nan=True)
            (folder / "state").unlink(missing_ok=True)
    return run.result(out) is not None


def _learned_features(run: Run, out: Path, data: DataSet, settings: Settings) -> Path | None:
    """Train on the cheap labels of the pool, once for all sizes and draws; None elsewhere."""
    arm, cheap = ARMS[run.arm], [*data.pool, *data.larger]
    n_batch = settings.batch_size + settings.cheap_batch_size
    content = hashlib.sha256("".join(map(structure_key, cheap)).encode()).hexdigest()[:8]
    start = "" if settings.start is None else f"_from_{file_sha256(Path(settings.start))[:8]}"
    folder = out / (
        f"{data.name}_{content}_{run.arm}_{settings.preset}_{settings.steps}x{n_batch}"
        f"_lr{settings.learning_rate:g}_w{run.weight:g}_s{run.seed}{start}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.orbcalc"
    if not path.exists():
        with try_lock(folder / "lock") as mine:
            if not mine:
                return None
            if not path.exists():  # nor has it come since
                learn_features(path, cheap, data.validation(0), feature_config(run, settings), arm)
    return path


def feature_config(run: Run, settings: Settings) -> TrainConfig:
    """Return how features are learned from cheap labels alone."""
    config = _config(run, ARMS[run.arm], settings)
    start = None if settings.start is None else Path(settings.start)
    tasks = config.tasks.model_copy(update={"energy": 0.0})
    return config.model_copy(update={"tasks": tasks, "start_from": start})


def learn_features(
    path: Path, cheap: Sequence[Atoms], valid: Sequence[Atoms], config: TrainConfig, arm: Arm
) -> None:
    """Learn features from the cheap labels of structures, or go on; write the model."""
    log, state = _Log(path.with_name("log.jsonl")), path.with_name("state")
    train = _dataset([_prepared(a, arm, cheap_only=True) for a in cheap], config.potential)
    held_out = _dataset(valid, config.potential)  # the same for all sizes
    trainer = Trainer(train, held_out, config, seed=config.seed, state_path=state, report=log)
    potential = trainer.fit(lambda: initial_potential(config, 0, config.seed, train))
    save_model(path, Committee([potential]), {"seconds_per_step": log.seconds_per_step()})
    state.unlink(missing_ok=True)


def _informative(run: Run, features: Path, data: DataSet, device: str) -> list[int]:
    """Choose what is labelled as `orbcalc run` chooses its first structures."""
    rows = functions_chunk(features, device, data.pool)
    functions, counts = (np.array(column) for column in zip(*rows, strict=True))
    columns = process_columns(functions, counts)
    return select_informative(columns, run.size, rng=np.random.default_rng(run.seed)).tolist()


def _train_and_test(
    run: Run,
    folder: Path,
    features: Path | None,
    data: DataSet,
    labels: Labelling,
    settings: Settings,
) -> dict[str, Any]:
    arm = ARMS[run.arm]
    config = _config(run, arm, settings).model_copy(update={"start_from": features})
    order = list[int]()
    if settings.draw == "informative":
        assert features is not None
        order = _informative(run, features, data, settings.device)
    chosen = data.labelled(run.size, run.seed, settings.draw, order)
    structures, used = _training_structures(run, arm, data, chosen)
    train = _dataset(structures, config.potential)
    valid = _dataset([_prepared(a, arm) for a in data.validation(run.size)], config.potential)
    seed = int(np.random.SeedSequence([run.seed, run.size]).generate_state(1)[0])
    log = _Log(folder / "log.jsonl")
    state = folder / "state"
    trainer = Trainer(train, valid, config, seed=seed, state_path=state, report=log)
    with states_of_reading_potentials() if arm.reads_charges else nullcontext():
        potential = trainer.fit(lambda: _initial(config, arm, train, seed))
    census = train.census()
    seconds_per_step = log.seconds_per_step()
    if features is not None:
        census |= dict.fromkeys(arm.tasks, len(used))
        seconds_per_step = load_model(features)[1]["seconds_per_step"]
    return {
        **asdict(run),
        "text": arm.text,
        "set": data.name,
        "settings": asdict(settings),
        "config": config.model_dump(mode="json", include={"potential", "tasks", "optimizer"}),
        "labels": {task: census[task] for task in ("energy", *arm.tasks)},
        "seconds_of_labels": sum(labels.seconds[key] for key in used),
        "parameters": sum(p.numel() for p in potential.parameters()),
        "seconds_of_training": seconds_per_step * config.optimizer.steps,
        "ms_per_step": 1e3 * seconds_per_step,
        "valid": _errors(potential, arm, data.validation(run.size)),
        "test": _errors(potential, arm, data.test),
        "inference": _inference(potential, arm, data.test, labels),
    }


class _Log:
    """Validations of a training, a line each, with the time since the call began."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = path.read_text().splitlines() if path.exists() else []
        self._call, self._start = len(self._lines), time.monotonic()

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Add a validation."""
        seconds = time.monotonic() - self._start
        self._lines.append(json.dumps({"call": self._call, "seconds": seconds, **record}))
        replace_file(self.path, "\n".join(self._lines) + "\n")

    def seconds_per_step(self) -> float:
        """Return the mean, validations included, between those of one call; NaN if none."""
        seconds = steps = 0.0
        records = [json.loads(line) for line in self._lines]
        for before, after in pairwise(records):
            if before["call"] == after["call"]:
                seconds += after["seconds"] - before["seconds"]
                steps += after["step"] - before["step"]
        return seconds / steps if steps else math.nan


# ----------------------------------------------------------------------------- prepare
def _config(run: Run, arm: Arm, settings: Settings) -> TrainConfig:
    tree = {
        "train": "unused",  # structures are given to the trainer
        "seed": run.seed,
        "device": settings.device,
        "potential": {"preset": settings.preset, "charge_head": "none", **arm.potential},
        "tasks": {"forces": 0.0, "charges": 0.0, **dict.fromkeys(arm.tasks, run.weight)},
        "optimizer": {
            "steps": settings.steps,
            "warmup_steps": min(100, settings.steps // 10),
            "evaluate_every": max(settings.steps // 20, 1),
            "batch_size": settings.batch_size,
            "cheap_batch_size": settings.cheap_batch_size,
            "learning_rate": settings.learning_rate,
        },
    }
    return parse_config(tree, TrainConfig, source=f"arm {run.arm}")


def _training_structures(
    run: Run, arm: Arm, data: DataSet, chosen: Sequence[int]
) -> tuple[list[Atoms], list[str]]:
    """Return what is trained on, and whose GFN1 labels are used."""
    labelled, cheap = [data.pool[i] for i in chosen], list[Atoms]()
    if arm.pool:
        others = sorted({*range(len(data.pool))} - {*chosen})
        cheap = [*(data.pool[i] for i in others), *data.larger]
    structures = [_prepared(atoms, arm) for atoms in labelled]
    if not arm.is_process:  # else they have been learned from
        structures += [_prepared(atoms, arm, cheap_only=True) for atoms in cheap]
    if arm.shuffled:
        shuffle_blocks(structures, run.seed)
    uses_gfn1 = arm.needs_xtb or (arm.tasks and not arm.dft)
    used = [structure_key(atoms) for atoms in (*labelled, *cheap)] if uses_gfn1 else []
    return structures, used


def _prepared(atoms: Atoms, arm: Arm, *, cheap_only: bool = False) -> Atoms:
    """Return a copy with the labels that an arm learns."""
    atoms = atoms.copy()
    if cheap_only:
        atoms.info.pop(REF_ENERGY, None)
    if arm.charges is not None:
        arm.charges(atoms)
    return atoms


def _dataset(structures: Sequence[Atoms], config: PotentialConfig) -> LabelDataset:
    return LabelDataset(structures, config.cutoff, config.baseline)


def _initial(config: TrainConfig, arm: Arm, train: LabelDataset, seed: int) -> Potential:
    potential = initial_potential(config, 0, seed, train)
    if not arm.reads_charges:
        return potential
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ReadingPotential.of(potential)


# -------------------------------------------------------------------------------- test
def _errors(potential: Potential, arm: Arm, structures: Sequence[Atoms]) -> dict[str, float]:
    """Return MAE and RMSE: total energies and barriers in meV, charges in e."""
    dataset = _dataset([_prepared(atoms, arm) for atoms in structures], potential.config)
    properties = ["energy", "xtb_energy", "charges"]
    energies, xtb_energies, charges, labels = [], [], [], []
    with torch.no_grad():
        for graph, targets in on_device(dataset, potential):
            prediction = potential(graph, properties)
            energies.append(prediction.energy - targets.energy)
            if prediction.xtb_energy is not None:
                xtb_energies.append(prediction.xtb_energy - targets.xtb_energy)
            if prediction.orbital_charges is not None:
                wanted = charge_targets(targets.charges, PotentialConfig(charge_head="invariant"))
                charges.append(prediction.orbital_charges - wanted)
                labels.append(wanted)
    energy = 1e3 * torch.cat(energies).cpu().numpy()
    found = _mean_errors("energy_meV", energy)
    if pairs := barrier_pairs(structures):
        reactants, states = np.array(pairs).T
        found |= _mean_errors("barrier_meV", energy[states] - energy[reactants])
    if xtb_energies:
        found |= _mean_errors("gfn1_meV", 1e3 * torch.cat(xtb_energies).cpu().numpy())
    if charges:
        found |= _charge_errors(torch.cat(charges).cpu(), torch.cat(labels).cpu())
    return found


def _mean_errors(name: str, errors: np.ndarray) -> dict[str, float]:
    return {
        f"{name}_mae": float(np.abs(errors).mean()),
        f"{name}_rmse": float(np.sqrt((errors**2).mean())),
    }


def _charge_errors(errors: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the MAE of charges of orbitals, and of whole shells, by kind.

    The floor is the error of perfect shell charges that are divided equally among the orbitals:
    that is all of a shell that does not turn with the molecule.
    """
    found = {}
    for kind, columns in _ORBITALS.items():
        own = errors[:, columns]
        if torch.isfinite(own).any():
            shells = own if kind == "s" else own.sum(1)
            found[f"{kind}_orbital_e_mae"] = float(own.abs().nanmean())
            found[f"{kind}_shell_e_mae"] = float(shells.abs().nanmean())
            if kind != "s":
                spread = labels[:, columns] - labels[:, columns].mean(1, keepdim=True)
                found[f"{kind}_orbital_e_floor"] = float(spread.abs().nanmean())
    return found


def _inference(
    potential: Potential, arm: Arm, structures: Sequence[Atoms], labels: Labelling
) -> dict[str, Any]:
    """Time energies of one batch, and what xTB takes for it where an arm needs that."""
    batch = structures[:_TIMED_STRUCTURES]
    dataset = _dataset(batch, potential.config)
    [(graph, _)] = on_device(dataset, potential, size=len(dataset))
    wanted = {"energy": ["energy"]}
    if potential.charge_head is not None:
        wanted["energy_and_charges"] = ["energy", "charges"]
    found: dict[str, Any] = {"structures": len(batch), "atoms": graph.n_atoms}
    with torch.no_grad():
        for name, properties in wanted.items():
            times = []
            for _ in range(_REPEATS):
                start = time.perf_counter()
                potential(graph, properties).energy.cpu()
                times.append(time.perf_counter() - start)
            found[f"{name}_ms"] = 1e3 * float(np.median(times))
    if arm.needs_xtb:
        found["xtb_ms"] = 1e3 * sum(labels.seconds[structure_key(atoms)] for atoms in batch)
    return found
