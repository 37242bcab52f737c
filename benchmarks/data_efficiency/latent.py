"""What charges teach a potential about metals: where metal atoms lie in its latent space.

Potentials are trained on the charge blocks of tmQM complexes, on their GFN1-xTB energies, or not
at all. A metal atom of other complexes is embedded by the scalars of the last layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from labelling import add_labels
from rich.console import Console
from scipy.spatial import cKDTree
from sets import read_tmqm

from orbcalc.config import TrainConfig, parse_config
from orbcalc.files import replace_file, write_json
from orbcalc.model.potential import Potential
from orbcalc.properties import REF_ENERGY, XTB_BLOCKS, XTB_ENERGY
from orbcalc.report.style import new_figure, png, set_legend, set_title, style_axes
from orbcalc.training.dataset import LabelDataset, on_device
from orbcalc.training.statistics import fit_statistics
from orbcalc.training.trainer import Trainer

console = Console(soft_wrap=True, highlight=False)

NEIGHBOURS = 10

#: First element of the d block of each row, group 3; lanthanum stands for lutetium as well.
_ROWS = {4: 21, 5: 39, 6: 71}


def main() -> None:
    """Read the command line; train, embed, judge, draw."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    complexes = _complexes(options)
    n_held_out = len(complexes) // 5
    judged, taught = complexes[:n_held_out], complexes[n_held_out:]
    config = _config(options, "charges")
    potentials = {
        "charges": _trained(taught, config, options, "charges"),
        "GFN1-xTB energies": _trained(taught, _config(options, "energy"), options, "energies"),
        "untrained": _untrained(taught, config, options.seed),
    }
    judged = _covered(judged, potentials["charges"])
    embedded = {name: _embed(potential, judged) for name, potential in potentials.items()}
    purity = {name: _purities(*pair, options.seed) for name, pair in embedded.items()}
    result = {"complexes": len(complexes), "judged": len(judged), "purity": purity}
    write_json(options.out / "latent.json", result, allow_nan=True)
    replace_file(options.out / "latent.png", _figure(embedded))
    for name, found in purity.items():
        console.print(f"{name}: {found}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--complexes", type=int, default=3000, help="of tmQM, at random")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--preset", default="small", choices=["small", "medium", "large"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


# -------------------------------------------------------------------------- structures
def _complexes(options: argparse.Namespace) -> list[Atoms]:
    """Read tmQM complexes with one metal, and label them."""
    structures = [atoms for atoms in read_tmqm(options.data) if len(_metals(atoms)) == 1]
    order = np.random.default_rng(options.seed).permutation(len(structures))
    chosen = [structures[i] for i in order[: options.complexes]]
    labels = add_labels(chosen, options.out / "tmqm.db", options.threads)
    console.print(f"{len(chosen)} complexes of tmQM, {labels.failed} labels failed")
    known = [atoms for atoms in chosen if XTB_BLOCKS in atoms.arrays]
    for atoms in known:
        atoms.info[REF_ENERGY] = atoms.info[XTB_ENERGY]
    return known


def _covered(structures: Sequence[Atoms], potential: Potential) -> list[Atoms]:
    """Return the structures whose elements a potential knows."""
    known = set(potential.elements)
    return [atoms for atoms in structures if set(atoms.numbers.tolist()) <= known]


def _metals(atoms: Atoms) -> list[int]:
    """Return the atoms of the d block, and lanthanum."""
    numbers = atoms.numbers
    is_metal = np.isin(numbers, [57, *(first + k for first in _ROWS.values() for k in range(10))])
    return np.flatnonzero(is_metal).tolist()


def _row_and_group(number: int) -> tuple[int, int]:
    """Return row and group of a metal.

    Examples
    --------
    >>> _row_and_group(77)  # iridium
    (6, 9)
    """
    if number == 57:
        return 6, 3
    row = max(row for row, first in _ROWS.items() if number >= first)
    return row, 3 + number - _ROWS[row]


# ---------------------------------------------------------------------------- training
def _config(options: argparse.Namespace, task: str) -> TrainConfig:
    tree = {
        "train": "unused",  # structures are given to the trainer
        "seed": options.seed,
        "device": options.device,
        "potential": {
            "preset": options.preset,
            "charge_head": "equivariant" if task == "charges" else "none",
        },
        "tasks": {"energy": 0.0, "forces": 0.0, "charges": 0.0, task: 1.0},
        "optimizer": {
            "steps": options.steps,
            "warmup_steps": min(100, options.steps // 10),
            "evaluate_every": max(options.steps // 20, 1),
        },
    }
    return parse_config(tree, TrainConfig, source="the command line")


def _trained(
    structures: Sequence[Atoms], config: TrainConfig, options: argparse.Namespace, name: str
) -> Potential:
    """Train a potential, or go on with it; a twentieth is for validation."""
    n_valid = max(len(structures) // 20, 1)
    valid, train = (
        LabelDataset(part, config.potential.cutoff)
        for part in (structures[:n_valid], structures[n_valid:])
    )
    path = options.out / f"{name}.state"
    trainer = Trainer(train, valid, config, seed=options.seed, state_path=path)
    return trainer.fit(lambda: _initial(train, config, options.seed))


def _untrained(structures: Sequence[Atoms], config: TrainConfig, seed: int) -> Potential:
    return _initial(LabelDataset(structures, config.potential.cutoff), config, seed).eval()


def _initial(train: LabelDataset, config: TrainConfig, seed: int) -> Potential:
    statistics = fit_statistics(train, config.potential)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Potential(config.potential, train.elements, train.shells, statistics)


# ------------------------------------------------------------------------------- judge
def _embed(potential: Potential, structures: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """Return the atomic number and the standardised scalars of each metal atom."""
    scalars: list[torch.Tensor] = []
    hook = potential.backbone.register_forward_hook(
        lambda _module, _inputs, nodes: scalars.append(nodes.updates[-1].cpu())
    )
    dataset = LabelDataset(structures, potential.config.cutoff)
    with torch.no_grad():
        for graph, _ in on_device(dataset, potential):
            potential(graph)
    hook.remove()
    ends = np.cumsum([0, *(len(atoms) for atoms in structures)])
    rows = [end + i for end, atoms in zip(ends, structures, strict=False) for i in _metals(atoms)]
    numbers = np.concatenate([atoms.numbers for atoms in structures])
    vectors = torch.cat(scalars).numpy()[rows]
    return numbers[rows], (vectors - vectors.mean(0)) / np.maximum(vectors.std(0), 1e-9)


def _purities(metals: np.ndarray, vectors: np.ndarray, seed: int) -> dict[str, float]:
    """Return how many of the nearest atoms of other elements share the group, or the row.

    Atoms of the same element do not count: they are alike by construction. Random is what
    shuffled labels give.
    """
    row, group = np.array([_row_and_group(int(number)) for number in metals]).T
    shuffled = np.random.default_rng(seed).permutation(len(metals))
    found: dict[str, float] = {"atoms": len(metals)}
    for name, labels in (("group", group), ("row", row)):
        found[name] = _purity(vectors, metals, labels)
        found[f"{name}_random"] = _purity(vectors[shuffled], metals, labels)
    return found


def _purity(vectors: np.ndarray, metals: np.ndarray, labels: np.ndarray) -> float:
    shares = []
    for number in np.unique(metals):
        own, others = np.flatnonzero(metals == number), np.flatnonzero(metals != number)
        k = min(NEIGHBOURS, len(others))
        if k == 0:
            continue
        _, nearest = cKDTree(vectors[others]).query(vectors[own], k)
        same = labels[others][nearest.reshape(len(own), k)] == labels[own][:, None]
        shares.append(same.mean())
    return float(np.mean(shares)) if shares else float("nan")


def _figure(embedded: dict[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    """Draw the first two principal components of each embedding, coloured by group."""
    figure = new_figure(5.0)
    panels = figure.subplots(1, len(embedded), squeeze=False)[0]
    for axes, (name, (metals, vectors)) in zip(panels, embedded.items(), strict=True):
        _, _, axis = np.linalg.svd(vectors, full_matrices=False)
        x, y = (vectors @ axis[:2].T).T
        groups = np.array([_row_and_group(int(number))[1] for number in metals])
        axes.scatter(x, y, c=groups, cmap="viridis", vmin=3, vmax=12, s=6, alpha=0.6)
        for number in np.unique(metals):
            own = metals == number
            axes.annotate(chemical_symbols[number], (np.median(x[own]), np.median(y[own])))
        axes.set_xlim(*np.percentile(x, [1, 99]))  # a few atoms lie far outside
        axes.set_ylim(*np.percentile(y, [1, 99]))
        style_axes(axes)
        set_title(axes, name)
        set_legend(axes, "best")
    return png(figure)


if __name__ == "__main__":
    main()
