"""What :mod:`orbcalc.labels.store` needs of ``ase.db``: transactions that hold, and fast reading.

Two backends of ``ase.db`` serve: SQLite (``.db``) and LMDB (``.aselmdb``, from
``ase-db-backends``). The file is open only during each operation.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.db import connect
from ase.db.core import now
from ase.db.row import AtomsRow

from orbcalc.errors import LabelError, OrbcalcError

__all__ = [
    "key_value_pairs",
    "new_row",
    "plain_arrays",
    "plain_info",
    "reading",
    "transaction",
]

#: Arrays of a structure that ``ase.db`` keeps by itself.
_COLUMNS = frozenset(
    {"numbers", "positions", "tags", "momenta", "masses", "initial_magmoms", "initial_charges"}
)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Any]:
    """Open a database for reading; it is made if there is none.

    Raises
    ------
    LabelError
        If the file cannot be read.
    """
    with _named_errors(path):
        database = _connect(path)
        if database.type == "db":
            with database:  # one connection for all that follows
                yield database
            return
        try:
            yield database
        finally:
            database.close()


@contextlib.contextmanager
def transaction(path: Path) -> Iterator[Any]:
    """Open a database for one transaction: on any exception nothing is changed.

    Nobody else can write between what is read and what is written here.

    Raises
    ------
    LabelError
        If the file cannot be written.
    """
    with _named_errors(path):
        database = _connect(path)
        database.__enter__()
        try:
            if database.type == "db":
                database.connection.execute("BEGIN IMMEDIATE")
            yield database
            database.__exit__(None, None, None)
        except BaseException as error:
            _roll_back(database, error)
            raise


def key_value_pairs(database: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read id and key-value pairs of all rows, by id.

    For SQLite this goes past ``database.select``, which takes 0.2 ms for each row.
    """
    if database.type == "db":
        query = "SELECT id, key_value_pairs FROM systems ORDER BY id"
        for row_id, pairs in database.connection.execute(query):
            yield row_id, json.loads(pairs)
    else:
        for row in database.select(include_data=False):
            yield row.id, row.key_value_pairs


def new_row(atoms: Atoms, key: str) -> Any:
    """Make the row of a structure, without results; ``key`` must be unique in the database."""
    row: Any = AtomsRow(atoms.copy())
    row.unique_id = key
    row.ctime = now()
    row.user = os.environ.get("USER")
    return row


def plain_info(atoms: Atoms, leave_out: set[str]) -> dict[str, Any]:
    """Return the entries of ``atoms.info`` that are text, numbers or arrays of numbers."""
    info: dict[str, Any] = {}
    for key, value in atoms.info.items():
        if not isinstance(key, str) or key in leave_out:
            continue
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, str | int | float):
            info[key] = value
        elif isinstance(value, np.ndarray | list | tuple):
            array = np.asarray(value)
            if array.dtype.kind in "bif":
                info[key] = array
    return info


def plain_arrays(atoms: Atoms, leave_out: set[str]) -> dict[str, np.ndarray]:
    """Return the entries of ``atoms.arrays`` that are numbers, and that a row lacks."""
    return {
        key: array
        for key, array in atoms.arrays.items()
        if array.dtype.kind in "bif" and key not in _COLUMNS | leave_out
    }


def _connect(path: Path) -> Any:
    if path.suffix == ".db":
        # ASE's lock file would outlive a killed writer; SQLite has locks of its own, as has LMDB
        return connect(str(path.absolute()), serial=True, use_lock_file=False)
    database = connect(str(path.absolute()), serial=True)
    database.type = "aselmdb"
    return database


def _roll_back(database: Any, error: BaseException) -> None:
    with contextlib.suppress(Exception):  # the first error is the one to tell
        if database.type == "db":
            database.__exit__(type(error), error, None)
        else:  # its __exit__ would commit
            open_transaction = database.__dict__.pop("txn", None)
            if open_transaction is not None:
                open_transaction.abort()
            database.close()


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Name the file in whatever a backend raises: a full disk, a lock, a corrupt file."""
    try:
        yield
    except OrbcalcError:
        raise
    except ImportError as error:
        raise LabelError(
            f"label store '{path}': .aselmdb needs pip install ase-db-backends lmdb ({error})"
        ) from error
    except Exception as error:
        raise LabelError(
            f"label store '{path}' cannot be read or written ({type(error).__name__}: {error})"
        ) from error
