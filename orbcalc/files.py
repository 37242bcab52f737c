"""Files: written whole or not at all, and recognised by their content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path

__all__ = ["file_sha256", "replace_file"]

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
