"""Train all arms with few expensive labels; the same call again goes on.

Several calls may work in one folder at a time: each takes runs that nobody has.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import ARMS, WEIGHT
from labelling import Labelling, add_labels
from report import write_report
from rich.console import Console
from sets import DRAWS, SETS, WITH_DFT_CHARGES, DataSet, Limits, load_set
from training import Run, Settings, perform

from orbcalc.errors import OrbcalcError
from orbcalc.files import read_json, write_json
from orbcalc.properties import XTB_ENERGY

console = Console(soft_wrap=True, highlight=False)

#: Those that `--sweep` tries.
SWEEP = (3.0, 10.0, 30.0, 100.0)

#: ms per structure of a step where nothing was measured yet.
_GUESS_MS = 1.5


def main() -> None:
    """Read the command line; label, train, report."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.report:
        write_report(options.out)
        return
    settings = _settings(options)
    runs = _runs(options)
    for option, is_given in (
        ("--draw informative", options.draw == "informative"),
        ("--start", options.start is not None),
    ):
        if is_given and not all(ARMS[run.arm].is_process for run in runs):
            raise SystemExit(f"{option} needs the features of arm 13: give --arms 13")
    if options.plan:
        _print_plan(runs, options.out, settings)
        return
    torch.set_num_threads(options.threads)
    helpers = [subprocess.Popen(_command(options)) for _ in range(options.jobs - 1)]
    data, labels = _labelled_set(options)
    features = options.features or options.out / "features"
    _perform(runs, options.out, features, data, labels, settings)
    for helper in helpers:
        helper.wait()
    if options.helper:
        return
    if options.sweep:
        _choose_weights(options.out, runs)
    else:
        write_report(options.out)
    if left := sum(run.result(options.out) is None for run in runs):
        console.print(f"{left} of {len(runs)} runs failed, or other calls are still at them")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sets")
    parser.add_argument("--set", required=True, choices=SETS)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs of the set")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[300, 1000], help="numbers of expensive labels"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--preset", default="small", choices=["small", "medium", "large"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cheap-batch-size", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--pool", type=int, default=12_000, help="structures at most")
    parser.add_argument("--test", type=int, default=2_000, help="structures at most")
    parser.add_argument("--max-atoms", type=int, help="leave larger structures out")
    parser.add_argument(
        "--larger",
        type=int,
        default=0,
        help="structures above --max-atoms, of other catalysts, that get cheap labels only",
    )
    parser.add_argument("--catalysts", type=int, help="of hydroform22, at random; default: all")
    parser.add_argument(
        "--draw",
        choices=DRAWS,
        default="group",
        help="which structures are labelled: all of a few catalysts, a few of all, or those that "
        "tell most about all by the features of arm 13 (for that arm only)",
    )
    parser.add_argument("--labels", type=Path, help="label store; default: labels.db in --out")
    parser.add_argument(
        "--features",
        type=Path,
        help="folder of what arm 13 learns before all energies; default: features in --out",
    )
    parser.add_argument(
        "--start", help="model of pretrain.py, whose features arm 13 trains on; default: none"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--jobs", type=int, default=1, help="processes that train")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="say what would be run, and stop")
    what.add_argument("--report", action="store_true", help="report on what is there, and stop")
    what.add_argument(
        "--sweep",
        action="store_true",
        help="choose the weight of the cheap tasks for the first size and seed, for later calls",
    )
    parser.add_argument("--helper", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _command(options: argparse.Namespace) -> list[str]:
    """Return the command of one more process that does the same runs."""
    return [sys.executable, *sys.argv, "--jobs", "1", "--helper"]


def _settings(options: argparse.Namespace) -> Settings:
    """Return the settings of all runs of the folder, and refuse others than those of before."""
    settings = Settings(
        steps=options.steps,
        preset=options.preset,
        batch_size=options.batch_size,
        cheap_batch_size=options.cheap_batch_size,
        learning_rate=options.learning_rate,
        draw=options.draw,
        device=options.device,
        start=options.start,
    )
    given = {"set": options.set, **asdict(settings), **asdict(_limits(options))}
    path = options.out / "settings.json"
    if path.exists():
        known = read_json(path)
        changed = [key for key, value in given.items() if known.get(key) != value]
        if changed:
            raise SystemExit(f"{options.out} holds runs of other settings: {', '.join(changed)}")
    elif not options.plan:
        write_json(path, given)
    return settings


def _limits(options: argparse.Namespace) -> Limits:
    return Limits(options.pool, options.test, options.max_atoms, options.catalysts, options.larger)


# -------------------------------------------------------------------------------- runs
def _runs(options: argparse.Namespace) -> list[Run]:
    """List the runs, those of a seed together: the first results show all arms."""
    arms = [a for a in options.arms if options.set in WITH_DFT_CHARGES or not ARMS[a].dft]
    if options.sweep:
        return [
            Run(arm, options.sizes[0], options.seeds[0], weight)
            for arm in arms
            if ARMS[arm].tasks
            for weight in SWEEP
        ]
    weights = _weights(options.out)
    return [
        Run(arm, size, seed, weights.get(arm, WEIGHT))
        for seed in options.seeds
        for size in options.sizes
        for arm in arms
    ]


def _perform(
    runs: Sequence[Run],
    out: Path,
    features: Path,
    data: DataSet,
    labels: Labelling,
    settings: Settings,
) -> None:
    """Do all runs that nobody else does; one that fails does not stop the others."""
    for number, run in enumerate(runs):
        console.print(
            f"{number + 1}/{len(runs)}: arm {run.arm} ({ARMS[run.arm].text}), {run.size} labels, "
            f"seed {run.seed}, weight {run.weight:g}"
        )
        try:
            perform(run, out, features, data, labels, settings)
        except OrbcalcError as error:
            console.print(f"    failed: {error}")
        if (result := run.result(out)) is not None:
            console.print(f"    test MAE {result['test']['energy_meV_mae']:.4g} meV")


def _labelled_set(options: argparse.Namespace) -> tuple[DataSet, Labelling]:
    """Read the set with its GFN1 labels; all arms are judged by structures that have them."""
    data = load_set(options.data, options.set, _limits(options))
    valid = data.validation(max(options.sizes))
    store = options.labels or options.out / "labels.db"
    labels = add_labels([*data.pool, *valid, *data.test, *data.larger], store, options.threads)
    judging = {
        name: [atoms for atoms in structures if XTB_ENERGY in atoms.info]
        for name, structures in (("valid", valid), ("test", data.test))
    }
    left_out = len(valid) + len(data.test) - sum(map(len, judging.values()))
    console.print(
        f"{data.name}, {data.split}: {len(data.pool)} in the pool and {len(data.larger)} larger "
        f"ones, {len(judging['valid'])} for validation at most, {len(judging['test'])} for the "
        f"test; {labels.failed} GFN1-xTB labels failed, {left_out} of them for validation or "
        "test, which go without"
    )
    return replace(data, **judging), labels


# ----------------------------------------------------------------------------- weights
def _weights(out: Path) -> dict[str, float]:
    """Read the weight of the cheap tasks of each arm, where one was chosen."""
    path = out / "weights.json"
    return read_json(path)["weights"] if path.exists() else {}


def _choose_weights(out: Path, runs: Iterable[Run]) -> None:
    """Keep, for each arm, the weight with the lowest validation error."""
    errors: dict[str, dict[float, float]] = {}
    for run in runs:
        if (result := run.result(out)) is not None:
            error = result["valid"]["energy_meV_mae"]
            errors.setdefault(run.arm, {})[run.weight] = error
    chosen = {arm: min(own, key=own.__getitem__) for arm, own in errors.items()}
    tried: dict[str, Any] = {
        arm: {f"{weight:g}": error for weight, error in own.items()} for arm, own in errors.items()
    }
    known = read_json(out / "weights.json") if _weights(out) else {"weights": {}, "valid_meV": {}}
    content = {
        "weights": {**known["weights"], **chosen},
        "valid_meV": {**known["valid_meV"], **tried},
    }
    write_json(out / "weights.json", content, allow_nan=True)
    for arm, weight in chosen.items():
        console.print(f"arm {arm}: weight {weight:g}, of {tried[arm]} (validation MAE, meV)")


# -------------------------------------------------------------------------------- plan
def _print_plan(runs: Sequence[Run], out: Path, settings: Settings) -> None:
    """Say what is left to do, and how long that takes as far as is known."""
    measured: dict[str, list[float]] = {}
    for path in out.glob("runs/*/result.json"):
        result = read_json(path)
        if math.isfinite(result["ms_per_step"]):
            measured.setdefault(result["arm"], []).append(result["ms_per_step"])
    total = 0.0
    for run in runs:
        if run.result(out) is not None:
            continue
        arm = ARMS[run.arm]
        n_structures = settings.batch_size + settings.cheap_batch_size * arm.pool
        own = measured.get(run.arm)
        ms = float(np.mean(own)) if own else _GUESS_MS * n_structures
        seconds = 1e-3 * ms * settings.steps
        total += seconds
        source = "measured" if own else "a guess"
        console.print(
            f"arm {run.arm} ({arm.text}), {run.size} labels, seed {run.seed}, weight "
            f"{run.weight:g}: {seconds / 60:.1f} minutes ({source})"
        )
    console.print(f"in all {total / 3600:.2f} hours in one process, and the labels before")


if __name__ == "__main__":
    main()
