"""JSON files, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orbcalc.files import replace_file

__all__ = ["read_json", "write_json"]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    replace_file(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
