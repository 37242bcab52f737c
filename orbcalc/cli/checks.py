"""`orbcalc check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orbcalc.cli.console import ConfigFile, output
from orbcalc.errors import OrbcalcError

if TYPE_CHECKING:
    from orbcalc.config import RunConfig, TrainConfig

__all__ = ["check"]


def check(config_file: ConfigFile) -> None:
    """Check a configuration and its data, and time one label, before anything is started."""
    from orbcalc.config import RunConfig, TrainConfig, load_config

    text = config_file.read_text(encoding="utf-8") if config_file.exists() else ""
    if "\npool:" in f"\n{text}":
        _check_run(load_config(config_file, RunConfig))
    else:
        _check_training(load_config(config_file, TrainConfig))


def _check_run(config: RunConfig) -> None:
    from orbcalc.active.inputs import Inputs, check_inputs
    from orbcalc.labels.process import WorkerProcess, label_structure
    from orbcalc.labels.sources import read_sources
    from orbcalc.structures import unique_structures

    source = config.pool
    read, starts = read_sources(source.structures), read_sources(source.start)
    structures = list(unique_structures(read).values())
    output.print(f"pool: {len(structures)} structures from files, {len(starts)} to start MD from")
    if config.certificate.by_audit:
        md = source.md
        sampled = 0 if md is None else md.rounds * md.walkers * (md.steps // md.every)
        output.print(_first_look(config, len(structures) + sampled))
    check_inputs(config, Inputs(read, starts))
    probe = max(structures or starts, key=len)
    with WorkerProcess() as process:
        for item in label_structure(process, probe, config.labels):
            output.print(
                f"{item.kind} label of {probe.get_chemical_formula()}: {item.status} in "
                f"{item.wall_time_s:.2f} s by {item.provenance} {item.message}",
            )
            if item.status != "ok":
                raise OrbcalcError("the largest structure could not be labelled")


def _first_look(config: RunConfig, n_pool: int) -> str:
    """Say what the first look takes, at best."""
    from bisect import bisect_left

    import numpy as np

    from orbcalc.active.certificate import PoolCounts
    from orbcalc.active.decisions import take_look

    sizes, options = config.selection, config.certificate
    n_known = min(sizes.initial, n_pool)
    counts = PoolCounts(n_pool, n_known, 0)

    def proves(n_hits: int) -> bool:
        none = np.zeros(n_hits)
        return take_look(counts, none, none > 0, options, number=1).certified

    needed = bisect_left(range(n_pool - n_known), True, key=proves)
    advice = "" if needed <= sizes.audit else ": raise it to certify at the first look"
    most = config.stop.max_labels
    if most is not None and n_known + needed > most:
        advice += f"; stop.max_labels, {most}, ends the run before that"
    return (
        f"certificate: with {n_known} of {n_pool} structures labelled, {needed} in an audit "
        f"without a miss prove that {100 * options.accuracy:g} % are right; selection.audit is "
        f"{sizes.audit}{advice}"
    )


def _check_training(config: TrainConfig) -> None:
    from orbcalc.model.checkpoint import load_model
    from orbcalc.training.run import prepared
    from orbcalc.training.statistics import given_energies
    from orbcalc.training.trainer import Trainer

    config, _, train_set, valid_set = prepared(config)
    census, n_train, judged = train_set.census(), len(train_set), "each left out in turn"
    if valid_set is not None:
        census = {task: n + valid_set.census()[task] for task, n in census.items()}
        n_train, judged = n_train + len(valid_set), f"{len(valid_set)} of them held out"
    output.print(f"{n_train} structures, labels: {census}; {judged}")
    Trainer(train_set, valid_set, config, seed=0)  # which refuses what it cannot learn from
    if config.reference_energies is not None:
        given_energies(config.reference_energies, train_set.elements)
    if config.start_from is not None:
        load_model(config.start_from)
