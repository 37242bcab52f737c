"""The run folder: what is in which file."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import ase.io
from ase import Atoms
from ase.io.extxyz import key_val_dict_to_str, key_val_str_to_dict
from filelock import FileLock, Timeout

from orbcalc.config import RunConfig, dump_config, load_config
from orbcalc.errors import ConfigError
from orbcalc.files import append_json, changed_files, read_json, write_text
from orbcalc.structures import read_structures, unique_structures

__all__ = ["RoundFiles", "RunFolder", "bare", "write_structures"]

#: What spoils more than the text itself, in the header of an extxyz structure.
_SPOILS_OTHERS = re.compile(r"^$|[\n\r]")


@dataclass(frozen=True)
class RoundFiles:
    """Files of one round; ``round.json`` is written last, so its presence completes the round.

    Features that are learned before the first one have those of a training.
    """

    folder: Path

    @property
    def pool(self) -> Path:
        """Structures that came to the pool in this round; in the first one, as in its files."""
        return self.folder / "pool.extxyz"

    @property
    def selection(self) -> Path:
        """What was drawn and selected, with the predictions made before labelling."""
        return self.folder / "selection.json"

    @property
    def train(self) -> Path:
        """Configuration of the training, usable with `orbcalc train`."""
        return self.folder / "train.yaml"

    @property
    def model(self) -> Path:
        """Committee trained in this round."""
        return self.folder / "model.orbcalc"

    @property
    def summary(self) -> Path:
        """What the round came to."""
        return self.folder / "round.json"


class RunFolder:
    """A folder with one run of the loop.

    Parameters
    ----------
    path
        Made if it is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.inputs = self.path / "inputs.json"
        self.labels = self.path / "labels.db"
        self.model = self.path / "model.orbcalc"
        self.features = RoundFiles(self.path / "features")
        self.certificate = self.path / "certificate.json"
        self.results = self.path / "pool.extxyz"
        self.events = self.path / "events.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.report = self.path / "report.html"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out, which would count a look over what they have not drawn from.

        The system takes the lock back when its holder dies. The folder is made if it is not there.

        Raises
        ------
        ConfigError
            If another process is at work in the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ConfigError(
                f"another process is at work in {self.path}: wait until it has ended, or choose "
                f"another `output`."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def prepare(self, config: RunConfig) -> None:
        """Make the folder, or check that it belongs to this configuration and its files.

        Raises
        ------
        ConfigError
            If the folder holds a run of another configuration, or of files that have changed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.round(0).pool.exists():  # nothing was done that another one could spoil
            write_text(self.config_file, dump_config(config))
            return
        if not self.config_file.exists():
            write_text(self.config_file, dump_config(config))
        earlier = load_config(self.config_file, RunConfig)
        known = read_json(self.inputs) if self.inputs.exists() else {}
        files, as_before = config.pool.files, earlier.pool.files
        is_moved = files != as_before
        is_other = _outcome_relevant(earlier) != _outcome_relevant(config)
        if is_other or (is_moved and len(known) != len(files)):
            raise ConfigError(
                f"{self.path} holds a run of another configuration ({self.config_file}). "
                f"Choose another `output`, or go back to that configuration to resume it."
            )
        if is_moved:  # each must hold what the one at its place in the list held
            known = dict(zip(map(str, files), known.values(), strict=True))
        changed = changed_files(files, known)
        if changed:
            raise ConfigError(
                f"{changed[0]} has changed since the run in {self.path} read it. Restore it to "
                f"go on with that run, or choose another `output` for a run with the new file."
            )

    def round(self, number: int) -> RoundFiles:
        """Return the files of a round."""
        return RoundFiles(self.path / "rounds" / f"{number:03d}")

    def arrivals(self, n_rounds: int) -> list[Atoms]:
        """Read what came to the pool in the first rounds, in order and with duplicates."""
        paths = [self.round(number).pool for number in range(n_rounds)]
        return read_structures(p for p in paths if p.exists() and p.stat().st_size > 0)

    def pool(self, n_rounds: int) -> dict[str, Atoms]:
        """Read the pool as it is in the first rounds, by structure key, in order of arrival.

        Each structure is there once, and bare.
        """
        found = unique_structures(self.arrivals(n_rounds))
        return {key: bare(atoms) for key, atoms in found.items()}

    def event(self, name: str, **details: Any) -> dict[str, Any]:
        """Append a decision to ``events.jsonl``; returns it."""
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": name, **details}
        append_json(self.events, record)
        return record


def bare(atoms: Atoms) -> Atoms:
    """Copy a structure: no calculator, nothing of dynamics; labels and constraints are kept.

    Initial charges and moments are kept as well: reference calculators may read them.
    """
    copy: Atoms = atoms.copy()
    copy.arrays.pop("momenta", None)
    return copy


def write_structures(path: Path, structures: Sequence[Atoms]) -> None:
    """Write an extxyz file, whole or not at all, that reads back as it was."""
    buffer = StringIO()
    if structures:
        ase.io.write(buffer, [_quoted(atoms) for atoms in structures], format="extxyz")
    write_text(path, buffer.getvalue())


def _quoted(atoms: Atoms) -> Atoms:
    """Return a structure whose information ASE's extxyz does not spoil.

    Empty strings swallow what follows them (the periodicity), line breaks end the header,
    backslashes are dropped, "007" is read as a number and "T" as a truth, and names that are no
    strings cannot be written.
    """
    info = {}
    for name, value in atoms.info.items():
        if value is None or (isinstance(value, str) and _is_spoiled(value)):
            value = "_JSON " + json.dumps(value).replace("\\", "\\\\")
        info[str(name)] = value
    if info == atoms.info:
        return atoms
    copy: Atoms = atoms.copy()
    copy.calc, copy.info = atoms.calc, info
    return copy


def _is_spoiled(text: str) -> bool:
    """Tell whether ASE's extxyz reads a text otherwise than it was written."""
    if _SPOILS_OTHERS.search(text):
        return True
    found = key_val_str_to_dict(key_val_dict_to_str({"text": text})).get("text")
    return not (isinstance(found, str) and found == text)


def _outcome_relevant(config: RunConfig) -> dict[str, Any]:
    """Return what decides the outcome: not where tasks run, where files lie, or when it ends."""
    tree = config.model_dump(mode="json", exclude={"dask", "stop", "output", "device"})
    for name in ("structures", "start"):
        tree["pool"][name] = len(tree["pool"][name])
    tree["pool"]["features"] = config.pool.features is not None
    return tree
