"""What a run begins with: the structures of the files that its configuration names."""

from __future__ import annotations

from typing import NamedTuple

from ase import Atoms

from orbcalc.active.folder import RunFolder
from orbcalc.active.modelling import check_features
from orbcalc.config import RunConfig
from orbcalc.errors import ConfigError
from orbcalc.files import fingerprints, write_json
from orbcalc.labels.reference import check_file_labels, refuse_unlike_copies
from orbcalc.labels.sources import look_over, read_sources
from orbcalc.structures import has_volume

__all__ = ["Inputs", "check_inputs", "read_inputs"]


class Inputs(NamedTuple):
    """Structures of files."""

    pool: list[Atoms]
    """Belong to the pool as they are."""
    starts: list[Atoms]
    """Where MD begins."""


def read_inputs(config: RunConfig, folder: RunFolder) -> Inputs:
    """Read every input file once, check what it holds, and write down which content that was.

    Raises
    ------
    StructureError
        If a file cannot be read, or holds a structure that cannot be computed.
    MissingLabelError
        If labels should come from the files, and are not there.
    LabelConflictError
        If copies of a structure came with unlike labels.
    ConfigError
        If stresses should be learned, and no structure has any, or features be trained on that
        do not fit.
    CheckpointError
        If the model that has them cannot be read.
    """
    source = config.pool
    seen = fingerprints(source.files)  # before they are read: whatever changes later has changed
    pool = read_sources(source.structures)
    starts = pool if source.md is None or not source.start else read_sources(source.start)
    check_inputs(config, Inputs(pool, starts))
    write_json(folder.inputs, seen)
    return Inputs(pool, starts)


def check_inputs(config: RunConfig, inputs: Inputs) -> None:
    """Refuse structures that a run cannot go on with; see `read_inputs`."""
    both = list({id(atoms): atoms for atoms in (*inputs.pool, *inputs.starts)}.values())
    if config.labels.reference.calculator == "file":
        check_file_labels(inputs.pool, config.labels)
        refuse_unlike_copies(inputs.pool, config.labels)
    look_over(both, config.labels)
    check_features(config, both)
    if config.tasks.stress and not any(has_volume(atoms) for atoms in both):
        raise ConfigError("tasks.stress has weight, but no structure of the pool has a volume")
