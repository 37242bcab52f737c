"""The file format of models and training states: JSON and safetensors in one zip, with SHA-256.

An archive holds exactly three stored (uncompressed) members: ``manifest.json`` with the format,
its version and the hashes of the other two, ``content.json`` and ``tensors.safetensors``. Nothing
in it is ever executed or unpickled, and nothing is unpacked to disk.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from orbcalc.errors import CheckpointError
from orbcalc.files import replace_file

__all__ = ["read_archive", "write_archive"]

_MANIFEST, _CONTENT, _TENSORS = "manifest.json", "content.json", "tensors.safetensors"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal contents give equal files


def write_archive(
    path: str | Path,
    *,
    kind: str,
    version: int,
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write an archive; the file appears whole or not at all.

    Raises
    ------
    CheckpointError
        If it cannot be written, because the disk is full, say, or because the content is no
        plain JSON. What was there stays.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"cannot write {path}: its content is no JSON: {error}") from error
    members = {
        _CONTENT: text.encode(),
        _TENSORS: safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}),
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    manifest = {"format": f"orbcalc {kind}", "format_version": version, "sha256": hashes}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in {_MANIFEST: json.dumps(manifest, indent=1).encode(), **members}.items():
            archive.writestr(zipfile.ZipInfo(name, date_time=_EPOCH), data)
    try:
        replace_file(path, buffer.getvalue())
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def read_archive(
    path: str | Path, *, kind: str, version: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an archive and verify it.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, altered, of another kind, or of a newer version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {
                name: _read_member(archive, name) for name in (_MANIFEST, _CONTENT, _TENSORS)
            }
        _verify(path, _parse(members[_MANIFEST]), members, f"orbcalc {kind}", version)
        return _parse(members[_CONTENT]), safetensors.torch.load(members[_TENSORS])
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    # RuntimeError: encryption or deep nesting.
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, EOFError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is no orbcalc {kind}, or it is damaged ({error}). Pickled files are never "
            f"opened. Copy the file again, or train again."
        ) from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"the tensors of {path} are damaged: {error}") from error


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:  # a small file cannot unfold into a large one
        raise ValueError(f"{name} is compressed")
    return archive.read(info)


def _parse(data: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    value = json.loads(data, parse_constant=refuse)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, not {type(value).__name__}")
    return value


def _verify(
    path: str | Path, manifest: Any, members: Mapping[str, bytes], form: str, version: int
) -> None:
    if manifest["format"] != form:
        raise CheckpointError(f"{path} is of format {manifest['format']!r}, expected {form!r}")
    if manifest["format_version"] != version:
        raise CheckpointError(
            f"{path} has format version {manifest['format_version']!r}, this orbcalc reads "
            f"{version}. Update orbcalc, or train again."
        )
    for name in (_CONTENT, _TENSORS):
        found = hashlib.sha256(members[name]).hexdigest()
        if found != manifest["sha256"][name]:
            raise CheckpointError(
                f"{name} in {path} was altered: its SHA-256 is {found[:12]}..., the manifest says "
                f"{str(manifest['sha256'][name])[:12]}.... Get the original file."
            )
