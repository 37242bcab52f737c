"""Model files, ``.orbcalc``: everything needed to predict, and what the model was made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from orbcalc.config import PotentialConfig, parse_config
from orbcalc.errors import CheckpointError, ConfigError
from orbcalc.model.archive import read_archive, write_archive
from orbcalc.model.committee import Calibration, Committee
from orbcalc.model.potential import Potential, Statistics

__all__ = [
    "electrons_seen", "learned_charges", "load_model", "potential_content", "potential_from",
    "save_model",
]  # fmt: skip

_KIND, _VERSION = "model", 4
_UNITS = {"energy": "eV", "length": "Å", "charge": "e", "stress": "eV/Å³"}


class _TrainingSet(BaseModel):
    electrons: list[tuple[int, int]] = []


class _Tasks(BaseModel):
    charges: float = 1.0


class _TrainConfig(BaseModel):
    tasks: _Tasks = _Tasks()


class _Metadata(BaseModel):
    """What is read of the metadata; there may be more."""

    config: _TrainConfig = _TrainConfig()
    labels: dict[str, str] = {}
    training_set: _TrainingSet = _TrainingSet()
    valid_errors: dict[str, float] = {}


def save_model(
    path: str | Path, committee: Committee, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a model file.

    Parameters
    ----------
    path
        Ends in ``.orbcalc`` by custom.
    committee
        One potential is a committee of one.
    metadata
        JSON values: label methods and versions, metrics, hash of the training set.

    Raises
    ------
    CheckpointError
        If it cannot be written, or a weight is not finite; an older file at the place stays.
    """
    content = {
        "members": [potential_content(member) for member in _members(committee)],
        "calibration": asdict(committee.calibration),
        "units": _UNITS,
        "metadata": dict(metadata or {}),
    }
    tensors = {
        f"{number}.{name}": tensor
        for number, member in enumerate(_members(committee))
        for name, tensor in member.state_dict().items()
    }
    _refuse_not_finite(tensors)
    write_archive(path, kind=_KIND, version=_VERSION, content=content, tensors=tensors)


@torch.inference_mode(False)  # of tensors made within it nothing could be derived
def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Committee, dict[str, Any]]:
    """Read a model file and its metadata.

    Raises
    ------
    CheckpointError
        If the file is damaged, altered, not a model, or its parts contradict each other.
    """
    content, tensors = read_archive(path, kind=_KIND, version=_VERSION)
    try:
        members = []
        for number, member in enumerate(content["members"]):
            start = f"{number}."
            weights = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            _check_sizes(member, weights)
            potential = potential_from(member, dtype)
            load_weights(potential, weights)
            members.append(potential.requires_grad_(False).eval())
        committee = Committee(members, Calibration(**content["calibration"]))
        _Metadata.model_validate(content["metadata"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"the model in {path} contradicts itself: {e}") from e
    return committee.to(device), content["metadata"]


def electrons_seen(metadata: Mapping[str, Any]) -> set[tuple[int, int]]:
    """Return charge and multiplicity of the training structures, as far as a file says them."""
    return set(_Metadata.model_validate(metadata).training_set.electrons)


def learned_charges(committee: Committee, metadata: Mapping[str, Any]) -> bool:
    """Tell whether a model has charges that its training, as far as a file says it, gave weight."""
    has_weight = _Metadata.model_validate(metadata).config.tasks.charges > 0
    return committee.first.charge_head is not None and has_weight


def potential_content(potential: Potential) -> dict[str, Any]:
    """Return what builds a potential, without its weights, as JSON values."""
    return {
        "config": potential.config.model_dump(mode="json"),
        "elements": list(potential.elements),
        "shells": {str(z): list(shells) for z, shells in potential.shells.items()},
        "reference_energies": potential.reference_energies.tolist(),
        "energy_scale": potential.energy_scale,
        "xtb_reference_energies": potential.xtb_reference_energies.tolist(),
        "xtb_energy_scale": potential.xtb_energy_scale,
        "neighbor_scale": potential.backbone.neighbor_scale,
        "n_charge_components": potential.n_charge_components,
        "n_inducing": potential.n_inducing,
    }


def potential_from(content: Mapping[str, Any], dtype: torch.dtype) -> Potential:
    """Build a potential from its content; its weights are still to be loaded."""
    config = parse_config(content["config"], PotentialConfig, source="model file")
    elements = [int(z) for z in content["elements"]]
    if not elements or not all(1 <= z <= 118 for z in elements) or len({*elements}) < len(elements):
        raise ConfigError(f"elements {elements} are not atomic numbers, each once")
    energies, xtb_energies = (
        torch.tensor(content[key], dtype=torch.float64)
        for key in ("reference_energies", "xtb_reference_energies")
    )
    if energies.shape != (len(elements),) or xtb_energies.shape != (len(elements),):
        raise ConfigError(f"{len(elements)} elements need as many reference energies")
    scales = [content[key] for key in ("energy_scale", "xtb_energy_scale", "neighbor_scale")]
    if not all(0 < float(scale) < math.inf for scale in scales):
        raise ConfigError(f"scales {scales} are not all finite and above zero")
    for references in (energies, xtb_energies):
        if not torch.isfinite(references).all():
            raise ConfigError(f"reference energies {references.tolist()} are not all finite")
    width = min(int(content["n_charge_components"]), 23)
    statistics = Statistics(
        reference_energies=energies,
        energy_scale=float(content["energy_scale"]),
        xtb_reference_energies=xtb_energies,
        xtb_energy_scale=float(content["xtb_energy_scale"]),
        neighbor_scale=float(content["neighbor_scale"]),
        charge_shift=torch.zeros(len(elements), width),
        charge_scale=torch.ones(len(elements), width),
        n_inducing=int(content.get("n_inducing", 0)),
    )
    shells = {int(z): tuple(map(int, shells)) for z, shells in content["shells"].items()}
    with torch.random.fork_rng(devices=[]):
        return Potential(config, elements, shells, statistics, dtype)


def load_weights(potential: Potential, weights: Mapping[str, Tensor]) -> None:
    """Load weights, all of them, and refuse any that are not finite."""
    _refuse_not_finite(weights)
    potential.load_state_dict(dict(weights), strict=True)


def _check_sizes(content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuse sizes that the weights do not have, before memory is taken for them."""
    config = parse_config(content["config"], PotentialConfig, source="model file")
    n_shown = config.message_l_max + 1
    mixed = config.radial_functions * config.message_channels * n_shown
    shapes: dict[str, tuple[int, ...]] = {}
    if config.energy_head == "process":
        shapes["energy_head.factor"] = (content["n_inducing"],) * 2
        shapes["energy_head.size"] = ((config.layers + 1) * config.channels,)
        if content["n_inducing"] and not (weights["energy_head.size"] > 0).all():
            raise ConfigError("energy_head.size must be above zero")
    else:
        shapes["energy_head.hidden.weight"] = (config.channels, config.channels)
    for layer in range(config.layers):
        start = f"backbone.densities.{layer}"
        shapes[f"{start}.radial.first.weight"] = (config.radial_hidden, config.radial_functions)
        if layer:
            shown = n_shown, config.channels, config.message_channels
            shapes[f"backbone.shown.{layer - 1}.weight"] = shown
            shapes[f"{start}.mix.weight"] = config.l_max + 1, mixed, config.channels
    for name, shape in shapes.items():
        found = tuple(weights[name].shape)
        if found != shape:
            raise ConfigError(f"{name} has shape {found}, its configuration says {shape}")


def _members(committee: Committee) -> list[Potential]:
    return [member for member in committee.members if isinstance(member, Potential)]


def _refuse_not_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(f"weight {bad[0]} holds NaN or infinity: the training failed")
