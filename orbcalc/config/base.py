"""What all configurations share: the strict model, and the reader and writer of YAML files."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from orbcalc.errors import ConfigError

__all__ = ["Paths", "StrictModel", "dump_config", "load_config", "parse_config", "resolve_paths"]


def _as_tuple(value: Any) -> Any:
    """Let a list of paths be written as a single path."""
    return (value,) if isinstance(value, str | Path) else value


Paths = Annotated[tuple[Path, ...], BeforeValidator(_as_tuple)]


class StrictModel(BaseModel):
    """Base of all configurations: immutable, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Loader(yaml.SafeLoader):
    """As YAML 1.2 has it, 1e-3 is a number."""


class _Dumper(yaml.SafeDumper):
    """Quotes a text that the loader would take for a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+"),
        list("-+.0123456789"),
    )


# ------------------------------------------------------------------------------- files
Config = TypeVar("Config", bound=StrictModel)


def load_config(path: str | Path, model: type[Config]) -> Config:
    """Read a YAML file into a configuration; relative paths start at the file's folder.

    Raises
    ------
    ConfigError
        If the file cannot be read, is not YAML, or holds unknown or invalid keys.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(data).__name__}")
    return parse_config(data, model, source=str(path), folder=path.parent)


def parse_config(
    data: dict[str, Any], model: type[Config], *, source: str = "config", folder: Path | None = None
) -> Config:
    """Validate a dictionary; errors name the key, the nearest known key and the source.

    Raises
    ------
    ConfigError
        If a key is unknown or a value is invalid; all problems are listed.
    """
    try:
        config = model.model_validate(data)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(item, model)}" for item in error.errors())
        raise ConfigError(f"{source}:\n{problems}") from error
    return resolve_paths(config, folder) if folder is not None else config


def dump_config(config: StrictModel) -> str:
    """Write a configuration as YAML, with every default spelled out."""
    tree = config.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _explain(item: Any, model: type[BaseModel]) -> str:
    location = [str(part) for part in item["loc"]]
    where = f" in [{'.'.join(location[:-1])}]" if location[:-1] else ""
    if item["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key '{location[-1]}'{where}; {hint}"
    if item["type"] == "missing":
        return f"missing key '{location[-1]}'{where}"
    name = ".".join(location) or "config"
    return f"{name}: {item['msg'].removeprefix('Value error, ')}"


def _fields_at(model: type[BaseModel], location: list[str]) -> list[str]:
    """Return the keys of the nested model at a location."""
    for part in location:
        field = model.model_fields.get(part)
        if field is None:
            continue
        kinds = (field.annotation, *get_args(field.annotation))
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if nested:
            model = nested[0]
    return list(model.model_fields)


def resolve_paths(config: Config, folder: Path) -> Config:
    """Return a copy whose relative *input* paths start at a folder; outputs start where we run."""
    update: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, StrictModel):
            update[name] = resolve_paths(value, folder)
        elif isinstance(value, Path) and name != "output":
            update[name] = (folder / value).resolve()
        elif isinstance(value, tuple) and value and all(isinstance(v, Path) for v in value):
            update[name] = tuple((folder / v).resolve() for v in value)
    return config.model_copy(update=update)
