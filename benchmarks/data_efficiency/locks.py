"""Locks between processes that work in one folder.

The lock is the kernel's, not the presence of the file: it ends with the process that holds it,
also after ``kill -9``, so no lock is ever stale. All processes must run on one machine, or on a
file system that shares such locks.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["try_lock", "waiting_lock"]


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold a lock if nobody else does; tells whether it is held."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold a lock as soon as nobody else does."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
