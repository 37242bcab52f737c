"""How each package is trained: its own defaults and what its README recommends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml
from ase.data import atomic_numbers
from datasets import DataSet
from models import CUTOFF, Model

from orbcalc.config import TrainConfig, parse_config

__all__ = ["Recipe", "mace_arguments", "orbcalc_config"]

#: orbcalc is validated at least so many times in a training.
VALIDATIONS = 20


@dataclass(frozen=True)
class Recipe:
    """What is chosen for one training."""

    seed: int
    device: str
    charges: bool
    """Whether orbcalc learns orbital charges as well."""
    pool: bool
    """Whether it learns from a pool of structures that have cheap labels only."""
    options: tuple[str, ...] = ()
    """KEY=VALUE, of a configuration of orbcalc or a command line of MACE."""

    @property
    def above_xtb(self) -> bool:
        """Whether orbcalc learns the difference from computed GFN1-xTB."""
        return "potential.baseline=GFN1-xTB" in self.options


def orbcalc_config(model: Model, data: DataSet, recipe: Recipe, epochs: int) -> TrainConfig:
    """Return the defaults of orbcalc, with as many steps as the epochs have."""
    tree: dict[str, Any] = {
        "train": ["train.extxyz", "pool.extxyz"] if recipe.pool else "train.extxyz",
        "valid": "valid.extxyz",
        "output": "model.orbcalc",
        "seed": recipe.seed,
        "device": recipe.device,
        "potential": model.architecture,
        "tasks": {} if recipe.charges else {"charges": 0.0},
        "optimizer": {},
        "reference_energies": data.atom_energies,
    }
    for option in recipe.options:
        key, value = option.split("=", 1)
        *parents, last = key.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = yaml.safe_load(value)
    if recipe.above_xtb:
        del tree["reference_energies"]  # total ones; those of differences are fitted
    config = parse_config(tree, TrainConfig, source="--option")
    default = config.optimizer
    formulas = {atoms.get_chemical_formula() for atoms in data.train if len(atoms) > 1}
    n_atoms = sum(map(len, data.train)) / len(data.train)
    batch_size, _ = config.batch_sizes(is_varied=len(formulas) > 1, n_atoms=n_atoms)
    steps = epochs * -(-len(data.train) // batch_size)
    tree["optimizer"] = {
        "steps": steps,
        "batch_size": batch_size,
        "warmup_steps": min(default.warmup_steps, steps // 10),
        "evaluate_every": max(min(500, steps // VALIDATIONS), 1),
        **tree["optimizer"],
    }
    return parse_config(tree, TrainConfig, source="--option")


def mace_arguments(model: Model, data: DataSet, recipe: Recipe, epochs: int) -> list[str]:
    """Return the arguments of the example in MACE's README, for as many epochs.

    Its learning rate and weights of energy and forces are defaults, spelled out here. Its second
    stage takes the last fifth of the epochs.
    """
    energies = {atomic_numbers[s]: energy for s, energy in (data.atom_energies or {}).items()}
    arguments: dict[str, Any] = {
        "name": "mace",
        "seed": recipe.seed,
        "train_file": "train.extxyz",
        "valid_file": "valid.extxyz",
        "E0s": str(dict(sorted(energies.items()))) if energies else "average",
        "model": "MACE",
        "hidden_irreps": model.spec,
        "r_max": CUTOFF,
        "batch_size": 10,
        "lr": 0.01,
        "energy_weight": 1.0,
        "forces_weight": 100.0,
        "max_num_epochs": epochs,
        "start_swa": max(round(0.8 * epochs), 1),
        "swa_energy_weight": 1000.0,
        "swa_forces_weight": 100.0,
        "ema_decay": 0.99,
        "default_dtype": "float32",
        "device": recipe.device,
        "checkpoints_dir": "checkpoints",
        "plot": False,
    }
    arguments |= dict(option.split("=", 1) for option in recipe.options)
    switches = ["--swa", "--ema", "--amsgrad", "--restart_latest"]
    return [*(f"--{key}={value}" for key, value in arguments.items()), *switches]
