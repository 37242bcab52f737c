"""Which score ranks errors best, and are uncertainties of the size of the errors? Real data.

A few potentials of the smallest preset are trained on each problem; one alone, pairs and all
together are judged by structures that none has seen. What is done is not repeated: trained
potentials, their predictions and labels are kept in the folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from common import machine
from ranking import nearest_distances
from rich.console import Console
from torch import Tensor
from uncertainty_report import figures, table
from uncertainty_scores import GROUPS, Answers, judge
from uncertainty_sets import PROBLEMS, Problem, Source, label

from orbcalc.active.folder import write_structures
from orbcalc.config import TrainConfig, parse_config
from orbcalc.files import read_json, write_json, write_text
from orbcalc.model.checkpoint import load_model
from orbcalc.model.committee import Committee
from orbcalc.model.potential import Potential
from orbcalc.structures import read_structures
from orbcalc.training.calibration import calibrate
from orbcalc.training.dataset import LabelDataset, on_device
from orbcalc.training.run import train
from orbcalc.training.statistics import charge_targets

console = Console(soft_wrap=True, highlight=False)

#: Of each problem and seed.
MEMBERS = 4


# ------------------------------------------------------------------------------- inputs
def structures_of(source: Source, data: Path, folder: Path, store: Path, seed: int) -> Problem:
    """Read the labelled structures of a problem, or make their labels first."""
    names = folder / "judged.json"
    if not names.exists():
        problem = source.make(data, seed)
        parts = {"train": problem.train, "valid": problem.valid, "spare": problem.spare}
        for name, structures in (parts | problem.judged).items():
            write_structures(folder / f"{name}.extxyz", label(structures, source.labels, store))
        write_json(names, {"names": list(problem.judged)})
    return Problem(
        *(_read(folder / f"{name}.extxyz") for name in ("train", "valid")),
        {name: _read(folder / f"{name}.extxyz") for name in read_json(names)["names"]},
        _read(folder / "spare.extxyz"),
    )


def _read(path: Path) -> list[Atoms]:
    return read_structures(path) if path.stat().st_size else []


def train_members(source: Source, folder: Path, seed: int, device: str) -> list[Committee]:
    """Train each member as a single potential, which calibrates its last layer."""
    members = []
    for number in range(MEMBERS):
        steps = source.optimizer["steps"]
        config = parse_config(
            {
                "train": str(folder / "train.extxyz"),
                "valid": [str(folder / "valid.extxyz")],
                "output": str(folder / f"member_{number}.orbcalc"),
                "seed": 100 * seed + number,
                "device": device,
                "potential": {"preset": "small"},
                "tasks": {} if source.forces else {"forces": 0.0},
                "optimizer": {**source.optimizer, "evaluate_every": max(steps // 10, 1)},
            },
            TrainConfig,
            source="uncertainty",
        )
        if not config.output.exists():
            console.print(f"{folder}: training of member {number}")
            train(config)
        members.append(load_model(config.output)[0])
    return members


# ----------------------------------------------------------------------------- questions
@dataclass(frozen=True)
class _Latent:
    """Features of a set, as one potential sees it."""

    structures: np.ndarray
    """(n, channels), mean over the atoms of each."""
    atoms: np.ndarray
    """(n_atoms, channels)."""
    numbers: np.ndarray
    """(n_atoms,) atomic numbers."""


def ask(potential: Potential, dataset: LabelDataset, forces: bool) -> tuple[dict, _Latent]:
    """Return what a potential says about labelled structures, and how it sees them."""
    seen: list[Tensor] = []
    hook = potential.energy_head.register_forward_hook(
        lambda _module, arguments, _output: seen.append(arguments[0].updates[-1].detach())
    )
    columns: dict[str, list[Tensor]] = {}
    properties = ["rigidity", "features", "charges", *(["forces"] if forces else [])]
    for graph, targets in on_device(dataset, potential):
        with torch.no_grad():
            found = potential(graph, properties)
        charges = found.orbital_blocks - charge_targets(targets.charges, potential.config)
        atom_charge_error = charges.square().nanmean(1).sqrt()
        rows = {
            "energy": found.energy,
            "energy_rigidity": found.energy_rigidity,
            "features": found.features,
            "charge_error": graph.sum_over_atoms(atom_charge_error.square()).sqrt(),
            "atom_charge_error": atom_charge_error,
            "atom_rigidity": found.atom_rigidity,
            "numbers": graph.numbers,
            **({"forces": found.forces} if forces else {}),
        }
        for name, values in rows.items():
            columns.setdefault(name, []).append(values.detach().cpu())
    hook.remove()
    arrays = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
    latent = _Latent(arrays.pop("features"), torch.cat(seen).cpu().numpy(), arrays.pop("numbers"))
    return arrays, latent


def answers_of(members: Sequence[Committee], problem: Problem, forces: bool) -> dict[str, Answers]:
    """Ask all members about all structures that they were not trained on."""
    cutoff = members[0].cutoff
    train_set = LabelDataset(problem.train, cutoff)
    parts = {"valid": problem.valid, "spare": problem.spare, **problem.judged}
    datasets = {name: LabelDataset(part, cutoff) for name, part in parts.items() if part}
    rows: dict[str, list[dict]] = {name: [] for name in datasets}
    for member in members:
        _, known = ask(member.first, train_set, forces)
        for name, dataset in datasets.items():
            found, latent = ask(member.first, dataset, forces)
            found["distance"] = nearest_distances(latent.structures, known.structures)
            if forces:
                found["atom_distance"] = nearest_distances(
                    latent.atoms, known.atoms, latent.numbers, known.numbers
                )
            rows[name].append(found)
    answers = {}
    for name, dataset in datasets.items():
        targets = dataset.targets
        answers[name] = Answers(
            n_atoms=np.array([graph.n_atoms for graph in dataset.graphs]),
            energies=torch.cat([target.energy for target in targets]).numpy(),
            forces=torch.cat([target.forces for target in targets]).numpy(),
            members={key: np.stack([row[key] for row in rows[name]]) for key in rows[name][0]},
        )
    return answers


def factors_of(members: Sequence[Committee], problem: Problem) -> dict[str, dict[str, float]]:
    """Calibrate one, pairs and all of the members with the package; factors by their numbers."""
    cutoff = members[0].cutoff
    sets = LabelDataset(problem.train, cutoff), LabelDataset(problem.valid, cutoff)
    found = {}
    for chosen in chain(*GROUPS.values()):
        committee = Committee([members[k].first for k in chosen])
        found[str(chosen)] = asdict(calibrate(committee, *sets).calibration)
    return found


def perform(name: str, data: Path, out: Path, seed: int, device: str) -> None:
    """Train, ask and judge, unless that is done."""
    source, folder = PROBLEMS[name], out / name / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    answers_file, factors_file = folder / "answers.npz", folder / "factors.json"
    if not factors_file.exists():
        problem = structures_of(source, data, folder, out / name / "labels.db", seed)
        members = train_members(source, folder, seed, device)
        Answers.save(answers_file, answers_of(members, problem, source.forces))
        write_json(factors_file, factors_of(members, problem))


def main() -> None:
    """Read the command line, do what is not done, and report on all that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        for name in options.problems:
            perform(name, options.data, options.out, seed, options.device)
    result = {"machine": machine(options.threads), "problems": {}}
    for name, source in PROBLEMS.items():
        folders = sorted(path.parent for path in (options.out / name).glob("*/factors.json"))
        if folders:
            runs = [
                (Answers.load(f / "answers.npz"), read_json(f / "factors.json")) for f in folders
            ]
            result["problems"][name] = {"says": source.says, **judge(runs, source.forces)}
    write_json(options.out / "uncertainty.json", result)
    write_text(options.out / "uncertainty.md", table(result))
    for figure_name, content in figures(result).items():
        (options.out / f"{figure_name}.png").write_bytes(content)


if __name__ == "__main__":
    main()
