"""Files: written whole or not at all, and recognised by their content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["Fingerprints", "changed_files", "file_sha256", "fingerprints", "replace_file"]

#: Stamp and hash of files, by path.
Fingerprints = dict[str, dict[str, Any]]

_CHUNK = 1 << 20


def replace_file(path: str | Path, data: bytes | str) -> None:
    """Write a file beside its place and move it there, so that readers see all of it or none.

    Parameters
    ----------
    path
        In a folder that exists; what is there is replaced at the very end.
    data
        Text is written as UTF-8.

    Raises
    ------
    OSError
        If it cannot be written: a full disk, no permission. What was there stays.
    """
    path = Path(path)
    # Several processes may write the same file: each has a temporary one of its own.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # The system names the temporary file, or none where the disk is full.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprints(paths: Iterable[Path]) -> Fingerprints:
    """Return what tells later whether files have changed, as plain JSON.

    Parameters
    ----------
    paths
        Of files; what is none (a folder, something that is not there) is left out. A choice of
        structures as ASE reads it, ``name.xyz@:100``, stands for its file.
    """
    return {
        str(path): {"stamp": _stamp(file), "sha256": file_sha256(file)}
        for path in paths
        if (file := _file_of(path)) is not None
    }


def changed_files(paths: Iterable[Path], known: Fingerprints) -> list[Path]:
    """Return those paths whose files no longer hold what they held.

    A file is read only if its size or times are others than before, so that large ones cost
    nothing. One that is not there any more, or was not there before, is not among the changed.

    Parameters
    ----------
    paths
        As they were given to :func:`fingerprints`.
    known
        What that returned.
    """
    changed = []
    for path in paths:
        file, before = _file_of(path), known.get(str(path))
        if file is None or before is None or _stamp(file) == before["stamp"]:
            continue
        if file.stat().st_size != before["stamp"][0] or file_sha256(file) != before["sha256"]:
            changed.append(path)
    return changed


def _file_of(path: Path) -> Path | None:
    without_choice = Path(str(path).rpartition("@")[0])
    return next((file for file in (path, without_choice) if file.is_file()), None)


def _stamp(file: Path) -> list[int]:
    """Return size and times; the last one cannot be set back, as the time of writing can."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
