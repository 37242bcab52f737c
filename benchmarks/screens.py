"""Retrospective screens: pools whose labels are all known, certified as `orbcalc run` would.

How many labels does a certificate cost, against random acquisition with the same certificate and
an oracle that sees all errors, and is it ever false? Every screen is a file; what is done is not
repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.units import kcal, mol
from common import machine
from data_efficiency.sets import Limits, load_set
from ranking import ideal_spearman, spearman
from rich.console import Console
from screen_models import RECIPES, GaussianProcess, Guess, PotentialOnPool, random_features
from screen_report import ACCURACY, DELTA, figure, table
from uncertainty_sets import ENERGIES, label

from orbcalc.active.design import InferenceSetDesign
from orbcalc.config import CertificateConfig, SelectionConfig, StopConfig
from orbcalc.files import read_json, write_json, write_text
from orbcalc.properties import REF_ENERGY, XTB_ENERGY
from orbcalc.structures import structure_key

console = Console(soft_wrap=True, highlight=False)

KCAL_MOL = kcal / mol
GAUSSIAN_PROCESS = "Gaussian process"
#: The tolerance is the error that this share of a pilot pool is within, after training on this
#: share of it, rounded up to whole kcal/mol. No screen uses structures of the pilot.
PILOT_HITS, PILOT_LABELLED = 0.9, 0.2

#: From the labelled indices and their energies (eV) to energies and scores of the pool.
Model = Callable[[np.ndarray, np.ndarray], Guess]
#: From the pool's place in the set, a folder and a seed to a model that knows no label yet.
MakeModel = Callable[[np.ndarray, Path, int], Model]


@dataclass(frozen=True)
class Screen:
    """A set, the models that screen it, and the sizes of the rounds."""

    energies: np.ndarray
    """(n,) reference energies of the set, eV."""
    models: Mapping[str, MakeModel]
    n_pool: int
    selection: SelectionConfig
    kcal_mol: float | None = None
    """The tolerance; by the rule, on a pilot pool, where there is none."""
    max_rounds: int = 30

    @property
    def n_pilot(self) -> int:
        """Structures that no screen uses."""
        return self.n_pool if self.kcal_mol is None else 0


# --------------------------------------------------------------------------------- sets
def labelled_qm9(data: Path, store: Path, n_pool: int, max_atoms: int | None = None) -> list[Atoms]:
    """Return molecules of QM9 with both labels; GFN1-xTB labels that the store lacks are made."""
    found = load_set(data, "qm9", Limits(pool=n_pool, test=2_000))
    known = {
        structure_key(atoms): atoms
        for atoms in (*found.pool, *found.valid, *found.test)
        if max_atoms is None or len(atoms) <= max_atoms
    }
    return label([known[key] for key in sorted(known)], ENERGIES, store)


def gaussian_processes(
    structures: Sequence[Atoms], n_pool: int, selection: SelectionConfig
) -> Screen:
    """Screen with a Gaussian process, on top of GFN1-xTB energies where all have one."""
    counts, features = random_features(structures)
    baseline = np.array([atoms.info.get(XTB_ENERGY, np.nan) for atoms in structures])
    if not np.isfinite(baseline).all():
        baseline = np.zeros(len(structures))

    def make(pool: np.ndarray, _folder: Path, _seed: int) -> Model:
        return GaussianProcess(counts[pool], features[pool], baseline[pool])

    return Screen(_energies(structures), {GAUSSIAN_PROCESS: make}, n_pool, selection)


def potentials(structures: Sequence[Atoms], optimizer: Mapping[str, int]) -> dict[str, MakeModel]:
    """Return makers of potentials, one for each recipe."""
    bare = [atoms.copy() for atoms in structures]
    for atoms in bare:
        del atoms.info[REF_ENERGY]

    def make(recipe: str, pool: np.ndarray, folder: Path, seed: int) -> Model:
        own = [bare[i] for i in pool]
        return PotentialOnPool(own, folder, recipe=recipe, optimizer=optimizer, seed=seed)

    return {recipe: partial(make, recipe) for recipe in RECIPES}


def _energies(structures: Sequence[Atoms]) -> np.ndarray:
    return np.array([atoms.info[REF_ENERGY] for atoms in structures])


def load_screen(name: str, options: argparse.Namespace) -> Screen:
    """Read a set and say how it is screened."""
    sizes = SelectionConfig(initial=100, batch=100, audit=400, diversity=1)  # best on the pilot
    if name == "hydroform22":
        found = load_set(options.data, name, Limits(pool=10_000, test=10_000))
        return gaussian_processes([*found.pool, *found.valid, *found.test], 2000, sizes)
    if name == "qm9":
        found = labelled_qm9(options.data, options.labels, 12_000)
        screen = gaussian_processes(found, 2000, sizes)
        optimizer = {"steps": options.steps or 4000, "batch_size": 16}
        return replace(screen, models={**screen.models, **potentials(found, optimizer)})
    if name == "qm9-large":
        n_pool = options.pool or 20_000
        sizes = SelectionConfig(
            initial=n_pool // 10, batch=n_pool // 10, audit=3 * n_pool // 100, diversity=1
        )
        optimizer = {"steps": options.steps or 8000, "batch_size": 32}
        found = labelled_qm9(options.data, options.labels, max(n_pool, 20_000))
        models = potentials(found, optimizer)
        return Screen(_energies(found), models, n_pool, sizes, kcal_mol=1)
    sizes = SelectionConfig(initial=60, batch=40, diversity=1)
    small = labelled_qm9(options.data, options.labels, 12_000, max_atoms=14)
    models = potentials(small, {"steps": options.steps or 500})
    return Screen(_energies(small), models, options.pool or 600, sizes)


# ------------------------------------------------------------------------------- screens
def run(
    screen: Screen, model: Model, pool: np.ndarray, method: str, tolerance: float, seed: int
) -> dict[str, Any]:
    """Let a design label a pool; what it came to, and whether its certificate is true."""
    truth = screen.energies[pool]
    design = InferenceSetDesign(
        len(pool),
        selection=screen.selection.model_copy(update={"method": method}),
        certificate=CertificateConfig(
            quantity="energy", tolerance=tolerance, accuracy=ACCURACY, delta=DELTA
        ),
        stop=StopConfig(max_rounds=screen.max_rounds),
        seed=seed,
    )
    guess = np.full(len(pool), np.nan), np.full(len(pool), np.nan)
    looks = []
    while not design.is_done:
        if design.awaits_model:
            guess = model(design.labelled, truth[design.labelled])
        indices = design.ask(*guess)
        look = design.tell(indices, truth[indices])
        if look is not None:
            right = np.abs(guess[0] - truth) <= tolerance
            right[design.labelled] = True
            looks.append(
                {
                    "labels": len(design.labelled),
                    "accuracy": float(right.mean()),
                    "bound": look.accuracy_bound,
                }
            )
    certified = design.looks[-1].certified
    return {
        "reason": design.certificate.reason,
        "certified": certified,
        "false": certified and looks[-1]["accuracy"] < ACCURACY,
        "labels": looks[-1]["labels"] if certified else len(pool),
        "looks": looks,
    }


def oracle(
    screen: Screen, model: Model, pool: np.ndarray, tolerance: float, seed: int
) -> dict[str, Any]:
    """Count the labels of one who sees all errors, labels the worst, and stops when it is true."""
    truth, sizes = screen.energies[pool], screen.selection
    step = sizes.batch + sizes.audit_step
    is_open = np.ones(len(pool), dtype=bool)
    is_open[np.random.default_rng(seed).permutation(len(pool))[: sizes.initial]] = False
    while is_open.any():
        known = np.flatnonzero(~is_open)
        errors = np.nan_to_num(np.abs(model(known, truth[known])[0] - truth), nan=np.inf)
        errors[~is_open] = 0.0
        excess = int((errors > tolerance).sum() - np.floor((1 - ACCURACY) * len(pool) + 1e-9))
        if excess <= step:
            return {"labels": len(known) + max(excess, 0)}
        is_open[np.argsort(-errors)[:step]] = False
    return {"labels": len(pool)}


def pilot(screen: Screen, order: np.ndarray, folder: Path) -> dict[str, Any]:
    """Choose the tolerance, by the rule, with the first of the models; how its scores rank."""
    pool, known = order[: screen.n_pool], np.arange(round(PILOT_LABELLED * screen.n_pool))
    truth = screen.energies[pool]
    make = next(iter(screen.models.values()))
    guess, scores = make(pool, folder, 0)(known, truth[known])
    errors = np.delete(np.abs(guess - truth), known) / KCAL_MOL
    scores = np.delete(scores, known)
    return {
        "kcal_mol": int(np.ceil(np.quantile(errors, PILOT_HITS))),
        "mae_kcal_mol": float(errors.mean()),
        "within_1_kcal_mol": float((errors <= 1).mean()),
        "spearman": float(spearman(scores, errors)),
        "ideal_spearman": float(ideal_spearman(scores, width=1)[0]),
    }


def perform(name: str, options: argparse.Namespace) -> None:
    """Do all screens of a set that are not done."""
    folder = options.out / name
    (folder / "screens").mkdir(parents=True, exist_ok=True)
    screen = load_screen(name, options)
    order = np.random.default_rng(0).permutation(len(screen.energies))
    if not (folder / "pilot.json").exists():
        found = {"pool": screen.n_pool, "kcal_mol": screen.kcal_mol}
        if screen.n_pilot:
            found |= pilot(screen, order, folder / "models" / "pilot")
        write_json(folder / "pilot.json", found)
        console.print(f"{name}: {found}")
    rule = read_json(folder / "pilot.json")["kcal_mol"]
    for seed in range(options.first, options.first + options.screens):
        others = np.sort(order[screen.n_pilot :])
        pool = np.random.default_rng([seed, 1]).choice(others, screen.n_pool, replace=False)
        for tolerance in options.tolerances or [rule]:
            for arm in options.models or _defaults(screen):
                for method in options.methods:
                    label = arm.replace(" ", "-")
                    path = folder / "screens" / f"{label}_{method}_{tolerance:g}_{seed}.json"
                    if path.exists() or (method == "oracle" and arm != GAUSSIAN_PROCESS):
                        continue  # a potential would be trained for it alone
                    model = screen.models[arm](pool, folder / "models" / str(seed), seed)
                    limit = tolerance * KCAL_MOL
                    if method == "oracle":
                        result = oracle(screen, model, pool, limit, seed)
                    else:
                        result = run(screen, model, pool, method, limit, seed)
                    terms = {"model": arm, "method": method, "kcal_mol": tolerance, "seed": seed}
                    write_json(path, {**terms, "pool": len(pool), **result})


def _defaults(screen: Screen) -> list[str]:
    """Name the Gaussian process where there is one, otherwise all models."""
    return [name for name in screen.models if name == GAUSSIAN_PROCESS] or list(screen.models)


def main() -> None:
    """Read the command line, do what is not done, and report on all that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sets")
    parser.add_argument("--labels", type=Path, help="store for GFN1-xTB labels of QM9")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--set", choices=["qm9", "qm9-large", "qm9-potential", "hydroform22"])
    parser.add_argument("--screens", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first screen")
    parser.add_argument("--tolerances", type=float, nargs="*", help="kcal/mol; default: the rule")
    parser.add_argument("--models", nargs="*", help="by name; default: the cheap one, or all")
    parser.add_argument("--methods", nargs="+", default=["uncertainty", "random", "oracle"])
    parser.add_argument("--pool", type=int, help="molecules, where a potential screens them")
    parser.add_argument("--steps", type=int, help="of each training of a potential")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.set:
        perform(options.set, options)
    result: dict[str, Any] = {"machine": machine(options.threads), "sets": {}}
    for path in sorted(options.out.glob("*/pilot.json")):
        files = sorted((path.parent / "screens").glob("*.json"))
        result["sets"][path.parent.name] = {
            "pilot": read_json(path),
            "screens": [read_json(file) for file in files],
        }
    write_json(options.out / "screens.json", result)
    write_text(options.out / "screens.md", table(result))
    (options.out / "screens.png").write_bytes(figure(result))


if __name__ == "__main__":
    main()
