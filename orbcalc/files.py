"""Files: written whole or not at all, JSON among them, and recognised by their content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "Fingerprints",
    "append_json",
    "changed_files",
    "file_sha256",
    "fingerprints",
    "read_json",
    "read_jsonl",
    "replace_file",
    "write_json",
    "write_text",
]

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


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; its folder is made if it is not there.

    Raises
    ------
    OSError
        As :func:`replace_file`, or if the folder cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)


# --------------------------------------------------------------------------------- JSON
def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, data: Mapping[str, Any], *, allow_nan: bool = False) -> None:
    """Write a JSON file as :func:`write_text` does.

    Parameters
    ----------
    path, data
        What to write, and where.
    allow_nan
        Write NaN and infinity, as Python reads them; strictly, they are no JSON.

    Raises
    ------
    ValueError
        If the data hold NaN or infinity, unless these are allowed.
    """
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=allow_nan)
    write_text(path, f"{text}\n")


def append_json(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line in a single write, so that several writers do not mix."""
    line = (json.dumps(record) + "\n").encode()
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a kill cut the last line off: it must not spoil this one
                line = b"\n" + line
        file.write(line)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


# ------------------------------------------------------------------------------ content
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
