"""The label store: an ``ase.db`` file with one row for each structure.

``ase db labels.db`` and ``ase.db.connect`` work on it: a row shows the reference energy, forces
and stress as ASE's own, and the key-value pairs ``structure_key``, ``<kind>_status``,
``<kind>_values`` and ``<kind>_wall_s``. The GFN1 label is in the row's data.

Every method of :class:`LabelStore` that writes is one transaction: a reader, or whoever comes
after a killed writer, sees all of it or nothing.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from orbcalc.errors import LabelConflictError, LabelError, MissingLabelError
from orbcalc.labels.database import (
    key_value_pairs,
    new_row,
    plain_arrays,
    plain_info,
    reading,
    transaction,
)
from orbcalc.labels.label import KINDS, Kind, Label, LabelStatus, Provenance, Values
from orbcalc.orbitals import shells_from_table
from orbcalc.properties import (
    REF_ENERGY,
    REF_FORCES,
    REF_METHOD,
    REF_STRESS,
    XTB_BLOCKS,
    XTB_ENERGY,
    XTB_FORCES,
    XTB_METHOD,
    XTB_SHELLS,
)
from orbcalc.structures import structure_key

__all__ = [
    "LABEL_KEYS",
    "STRUCTURE_KEY",
    "SUFFIXES",
    "LabelStore",
]

#: Key of ``atoms.info``, and of the database, with the name of a structure.
STRUCTURE_KEY = "structure_key"

#: Where our part of the database's metadata is.
METADATA = "orbcalc"
FORMAT = 2
SUFFIXES = (".db", ".aselmdb")

#: Where the values of a label go in an Atoms object: (kind, value) -> (per atom?, key).
FILE_KEYS: dict[tuple[Kind, str], tuple[bool, str]] = {
    ("reference", "energy"): (False, REF_ENERGY),
    ("reference", "forces"): (True, REF_FORCES),
    ("reference", "stress"): (False, REF_STRESS),
    ("charges", "energy"): (False, XTB_ENERGY),
    ("charges", "forces"): (True, XTB_FORCES),
    ("charges", "orbital_blocks"): (True, XTB_BLOCKS),
    ("charges", "shells"): (True, XTB_SHELLS),
}
METHOD_KEYS: dict[Kind, str] = {"reference": REF_METHOD, "charges": XTB_METHOD}
#: All that this module writes into an Atoms object.
LABEL_KEYS = {*METHOD_KEYS.values(), STRUCTURE_KEY, *(key for _, key in FILE_KEYS.values())}


@dataclass(frozen=True)
class _State:
    """What the index knows of one label."""

    status: LabelStatus
    values: frozenset[str]
    wall_time_s: float

    @classmethod
    def after(cls, old: _State | None, label: Label) -> _State:
        """Return what is known when a label has come.

        An ok label stays unless a later one has values that it lacks: then all of these are taken
        and its others kept. A failure is replaced, by another one too, so that the last is seen.
        """
        if old is None or old.status != LabelStatus.ok:
            return cls(label.status, frozenset(label.values), label.wall_time_s)
        values = old.values.union(label.values)
        if label.status != LabelStatus.ok or values == old.values:
            return old
        return cls(old.status, values, old.wall_time_s + label.wall_time_s)


@dataclass
class _Row:
    """What the index knows of one row."""

    id: int
    states: dict[Kind, _State]


class LabelStore:
    """Labels by structure, in one file, of one method for each kind.

    An index of keys and statuses is held in memory, so look-ups cost nothing. Several processes
    may write the same file: a writer reads what others have added before it decides.

    Parameters
    ----------
    path
        ``.db`` (SQLite), or ``.aselmdb`` (LMDB, needs ``ase-db-backends``).
    create
        Make the file if there is none.

    Raises
    ------
    LabelError
        If the file is missing, unreadable, no label store, or of a newer format.
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        if self.path.suffix not in SUFFIXES:
            raise LabelError(f"label store {path}: the name must end in {' or '.join(SUFFIXES)}")
        if not create and not self.path.is_file():
            raise LabelError(f"label store {path} does not exist")
        self._rows: dict[str, _Row] = {}
        self._metadata: dict[str, Any] = {}
        self._open()

    # -------------------------------------------------------------------------- write
    def add(self, atoms: Atoms, labels: Sequence[Label]) -> None:
        """Add labels of one structure; see :meth:`add_many`."""
        self.add_many([(atoms, labels)])

    def add_many(self, items: Iterable[tuple[Atoms, Sequence[Label]]]) -> None:
        """Add labels of many structures, in one transaction.

        Adding again changes nothing. An ok label is kept until one comes that has values which it
        lacks; its others stay. A failure is kept until another label of that kind comes. Of
        ``atoms``, the structure and the plain entries of ``info`` and ``arrays`` are kept.

        Raises
        ------
        LabelConflictError
            If the store holds labels of that kind from another method, version or settings.
        LabelError
            If a label belongs to another structure, or the file cannot be written.
        """
        staged: dict[str, _Row] = {}
        with transaction(self.path) as database:
            self._load(database)
            before = copy.deepcopy(self._metadata)
            try:
                for atoms, labels in items:
                    key = structure_key(atoms)
                    known = staged.get(key) or self._rows.get(key)
                    useful = self._select(key, labels, known)
                    if useful:
                        staged[key] = self._write(database, atoms, key, useful, known)
                        database.change_count = 0  # else ase.db commits after each 5000 rows
                if staged:
                    self._metadata["revision"] += 1
                    database.metadata = {METADATA: self._metadata}
            finally:
                after, self._metadata = self._metadata, before
        self._rows.update(staged)
        self._metadata = after

    def _select(self, key: str, labels: Sequence[Label], known: _Row | None) -> list[Label]:
        """Check labels; return those that change what is known, in their order."""
        states: dict[Kind, _State] = dict(known.states) if known else {}
        useful = []
        for label in labels:
            if label.key != key:
                raise LabelError(f"a label of structure {label.key} was added to {key}")
            self._fix_provenance(label)
            old = states.get(label.kind)
            states[label.kind] = _State.after(old, label)
            if states[label.kind] != old:
                useful.append(label)
        return useful

    def _fix_provenance(self, label: Label) -> None:
        """Let the first label of a kind decide where labels of that kind come from."""
        self.refuse_other(label.kind, label.provenance)
        if self.provenance(label.kind) is None:
            self._metadata["provenance"][label.kind] = label.provenance.to_dict()

    def _write(
        self, database: Any, atoms: Atoms, key: str, labels: list[Label], known: _Row | None
    ) -> _Row:
        """Write the row of a structure, with the labels it has already."""
        if known is None:
            row = new_row(atoms, key)
            pairs: dict[str, Any] = {STRUCTURE_KEY: key}
            data: dict[str, Any] = {
                "info": plain_info(atoms, LABEL_KEYS),
                "arrays": plain_arrays(atoms, LABEL_KEYS),
            }
            states: dict[Kind, _State] = {}
        else:
            row = database.get(id=known.id)
            pairs, data, states = row.key_value_pairs, dict(row.data), dict(known.states)
        for label in labels:
            old = states.get(label.kind)
            state = states[label.kind] = _State.after(old, label)
            pairs[f"{label.kind}_status"] = state.status.value
            pairs[f"{label.kind}_values"] = " ".join(sorted(state.values)) or "none"
            pairs[f"{label.kind}_wall_s"] = state.wall_time_s
            stored = data.get(label.kind, {}).get("values", {})
            data[label.kind] = {"message": label.message}
            if label.kind == "reference":
                row.calculator, row.calculator_parameters = label.provenance.method.lower(), {}
                for name, value in label.values.items():
                    row[name] = value
            else:
                data[label.kind]["values"] = {**stored, **label.values}
        row_id = database.write(row, pairs, data, known.id if known else None)
        for element, shells in _element_shells(atoms, labels).items():
            self._metadata["shells"].setdefault(element, shells)
        return _Row(row_id, states)

    # --------------------------------------------------------------------------- read
    def __len__(self) -> int:
        """Count the structures."""
        return len(self._rows)

    def status(self, key: str, kind: Kind) -> LabelStatus | None:
        """Return how the label of a structure ended; None if there is none."""
        state = self._state(key, kind)
        return state.status if state else None

    def has(self, key: str, kind: Kind, values: Iterable[str] = ()) -> bool:
        """Tell whether a structure has an ok label, with at least these values ("forces", ..)."""
        state = self._state(key, kind)
        return state is not None and state.status == LabelStatus.ok and state.values >= set(values)

    def keys(self, kind: Kind | None = None, status: LabelStatus | None = None) -> list[str]:
        """Return the keys of all structures in the order they were added.

        With ``kind``, only those with such a label; with ``status``, only if it (or, without
        ``kind``, any) ended like this.
        """
        kinds = KINDS if kind is None else (kind,)
        if kind is None and status is None:
            return list(self._rows)
        return [
            key
            for key, row in self._rows.items()
            if any(k in row.states and status in (None, row.states[k].status) for k in kinds)
        ]

    def get(self, key: str, kind: Kind) -> Label | None:
        """Read one label; None if there is none."""
        state = self._state(key, kind)
        if state is None:
            return None
        with reading(self.path) as database:
            row = database.get(id=self._rows[key].id)
        provenance = self.provenance(kind)
        assert provenance is not None
        message = row.data[kind]["message"]
        values = _read_values(row, kind, state)
        return Label(key, kind, state.status, provenance, values, state.wall_time_s, message)

    def labelled_atoms(self, keys: Iterable[str] | None = None) -> list[Atoms]:
        """Return structures with their ok labels in ``info`` and ``arrays``.

        The keys are those of :mod:`orbcalc.properties`, and ``info["structure_key"]``. Without
        ``keys``, all structures are returned.

        Raises
        ------
        MissingLabelError
            If a key is not in the store.
        """
        wanted = self._rows if keys is None else list(keys)
        unknown = [key for key in wanted if key not in self._rows]
        if unknown:
            raise MissingLabelError(
                f"label store '{self.path}' does not hold structure {unknown[0]}"
                f" ({len(unknown)} of {len(wanted)} are missing)"
            )
        with reading(self.path) as database:
            return [self._atoms(database.get(id=self._rows[key].id)) for key in wanted]

    def provenance(self, kind: Kind) -> Provenance | None:
        """Return where the labels of a kind come from; None if there are none."""
        data = self._metadata["provenance"].get(kind)
        return Provenance.from_dict(data) if data else None

    def refuse_other(self, kind: Kind, provenance: Provenance) -> None:
        """Refuse labels of a kind that come from elsewhere than those that are here.

        Raises
        ------
        LabelConflictError
            If method, program, version or settings differ.
        """
        fixed = self.provenance(kind)
        if fixed not in (None, provenance):
            raise LabelConflictError(
                f"label store '{self.path}' holds {kind} labels of {fixed}, and those asked for "
                f"are of {provenance}. Labels of both would differ: open a new store."
            )

    def failures(self, keys: Iterable[str] | None = None) -> Counter[str]:
        """Count why labels failed, in words; of all structures, or of those of some keys.

        Parameters
        ----------
        keys
            Of structures, in the store or not.
        """
        found: Counter[str] = Counter()
        with reading(self.path) as database:
            for key in self._rows if keys is None else self._rows.keys() & set(keys):
                states = self._rows[key].states.items()
                failed = {kind: s.status for kind, s in states if s.status != LabelStatus.ok}
                if failed:
                    data = database.get(id=self._rows[key].id).data
                    found.update(f"{k}, {s}: {data[k]['message']}" for k, s in failed.items())
        return found

    def shells(self) -> dict[int, tuple[int, ...]]:
        """Return the angular momenta of the GFN1 shells of each element with an ok label."""
        return {int(number): tuple(shells) for number, shells in self._metadata["shells"].items()}

    def census(self) -> dict[Kind, dict[str, float]]:
        """Count labels: for each kind the number of each status, and the sum ``wall_time_s``."""
        census: dict[Kind, dict[str, float]] = {}
        for row in self._rows.values():
            for kind, state in row.states.items():
                counts = census.setdefault(kind, {"wall_time_s": 0.0})
                counts[state.status.value] = counts.get(state.status.value, 0) + 1
                counts["wall_time_s"] += state.wall_time_s
        return census

    def wall_times(self, kind: Kind) -> dict[str, float]:
        """Return the seconds that each ok label of a kind took, by structure key."""
        return {
            key: self._rows[key].states[kind].wall_time_s for key in self.keys(kind, LabelStatus.ok)
        }

    def refresh(self) -> None:
        """Read what other processes have added."""
        with reading(self.path) as database:
            self._load(database)

    def _state(self, key: str, kind: Kind) -> _State | None:
        row = self._rows.get(key)
        return row.states.get(kind) if row else None

    def _atoms(self, row: Any) -> Atoms:
        atoms: Atoms = row.toatoms()
        atoms.calc = None
        atoms.info = {**row.data["info"], STRUCTURE_KEY: row[STRUCTURE_KEY]}
        for key, array in row.data.get("arrays", {}).items():  # absent from older stores
            atoms.set_array(key, np.array(array))
        for kind, state in self._rows[row[STRUCTURE_KEY]].states.items():
            for name, value in _read_values(row, kind, state).items():
                per_atom, key = FILE_KEYS[kind, name]
                place: dict[str, Any] = atoms.arrays if per_atom else atoms.info
                place[key] = value
            if state.status is LabelStatus.ok:
                atoms.info[METHOD_KEYS[kind]] = str(self.provenance(kind))
        return atoms

    # --------------------------------------------------------------------------- file
    def _open(self) -> None:
        """Read the index; set up a new file."""
        with reading(self.path) as database:
            is_new = len(database) == 0 and METADATA not in database.metadata
            if not is_new:
                self._load(database)
        if is_new:
            with transaction(self.path) as database:
                if METADATA not in database.metadata:  # nobody was faster
                    empty = {"format": FORMAT, "revision": 0, "provenance": {}, "shells": {}}
                    database.metadata = {METADATA: empty}
            self.refresh()

    def _load(self, database: Any) -> None:
        """Bring metadata and index up to date with the file."""
        metadata = database.metadata.get(METADATA)
        if metadata is None:
            raise LabelError(f"{self.path} is a database of ASE, but no label store")
        if metadata["format"] != FORMAT:
            remedy = "update orbcalc" if metadata["format"] > FORMAT else "label again"
            raise LabelError(
                f"label store '{self.path}' has format {metadata['format']}; this version reads "
                f"{FORMAT}: {remedy}"
            )
        if metadata["revision"] != self._metadata.get("revision"):
            self._rows = {
                pairs[STRUCTURE_KEY]: _row(row_id, pairs)
                for row_id, pairs in key_value_pairs(database)
            }
        self._metadata = metadata


def _row(row_id: int, pairs: dict[str, Any]) -> _Row:
    states = {
        kind: _State(
            LabelStatus(pairs[f"{kind}_status"]),
            frozenset(pairs[f"{kind}_values"].split()) - {"none"},
            pairs[f"{kind}_wall_s"],
        )
        for kind in KINDS
        if f"{kind}_status" in pairs
    }
    return _Row(row_id, states)


def _read_values(row: Any, kind: Kind, state: _State) -> Values:
    source = row if kind == "reference" else row.data[kind].get("values", {})
    values: Values = {}
    for name in sorted(state.values):
        # what comes out of the file may be a read-only view of its bytes
        values[name] = float(source[name]) if name == "energy" else np.array(source[name])
    return values


def _element_shells(atoms: Atoms, labels: Iterable[Label]) -> dict[str, tuple[int, ...]]:
    """Return the shells of each element that labels tell of, as JSON wants them."""
    tables = [np.asarray(label.values["shells"]) for label in labels if "shells" in label.values]
    return {
        str(number): shells
        for table in tables
        for number, shells in zip(atoms.numbers, shells_from_table(table), strict=True)
    }
