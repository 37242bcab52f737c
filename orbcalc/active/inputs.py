"""What a run begins with: the structures of the files that its configuration names."""

from __future__ import annotations

from typing import NamedTuple

from ase import Atoms

from orbcalc.active.folder import RunFolder
from orbcalc.config import RunConfig
from orbcalc.files import fingerprints, write_json
from orbcalc.labels.reference import check_file_labels
from orbcalc.labels.store import read_sources

__all__ = ["Inputs", "read_inputs"]


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
    """
    source = config.pool
    seen = fingerprints(source.files)  # before they are read: whatever changes later has changed
    pool = read_sources(source.structures)
    starts = pool if source.md is None or not source.start else read_sources(source.start)
    check_file_labels(pool, config.labels)
    write_json(folder.inputs, seen)
    return Inputs(pool, starts)
