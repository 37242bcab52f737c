"""Strict configuration models: one per layer, and the reader of their YAML files.

Unknown keys are errors that name the nearest known key. Relative paths in a file are taken
from the folder of that file.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from orbcalc.errors import ConfigError

__all__ = [
    "CertificateConfig", "DaskConfig", "LabelConfig", "MDConfig", "OptimizerConfig", "PoolConfig",
    "PotentialConfig", "ReferenceConfig", "RunConfig", "SelectionConfig", "StopConfig",
    "TaskWeights", "TrainConfig", "dump_config", "load_config", "parse_config",
]  # fmt: skip


def _as_tuple(value: Any) -> Any:
    """Let a list of paths be written as a single path."""
    return (value,) if isinstance(value, str | Path) else value


Paths = Annotated[tuple[Path, ...], BeforeValidator(_as_tuple)]


class StrictModel(BaseModel):
    """Base of all configurations: immutable, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# ------------------------------------------------------------------------------ labels
class ReferenceConfig(StrictModel):
    """The expensive method: where reference energies and forces come from."""

    calculator: str = Field(
        default="GFN2-xTB",
        description="'GFN2-xTB' (built in), 'pyscf' (DFT, needs the extra), 'file' (REF_ keys of "
        "the structures themselves), or the import path of any ASE calculator class or factory, "
        "'package.module:Name'",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the calculator"
    )
    version: str | None = Field(
        default=None, description="version string of the external program, recorded with each label"
    )


class LabelConfig(StrictModel):
    """How labels are computed."""

    reference: ReferenceConfig = ReferenceConfig()
    forces: bool = Field(default=True, description="ask the reference for forces as well")
    stress: bool = Field(default=False, description="ask the reference for stress as well")
    charges: bool = Field(default=True, description="compute GFN1-xTB orbital charges")
    timeout_s: float = Field(
        default=600.0, gt=0, description="wall time after which one label is given up"
    )
    chunk_s: float = Field(
        default=1.0, gt=0, description="wall time that one task should gather from small structures"
    )


# ------------------------------------------------------------------------------- model
#: Sizes of potentials; docs/architecture.md has their speeds.
PRESETS: dict[str, dict[str, int]] = {
    "small": {"channels": 32, "message_l_max": 0, "message_channels": 16},
    "medium": {"channels": 64, "message_l_max": 1, "message_channels": 16},
    "large": {"channels": 128, "message_l_max": 1, "message_channels": 32},
}
_PRESET: Literal["medium"] = "medium"


class PotentialConfig(StrictModel):
    """Architecture of the potential; elements and statistics come from the training data."""

    preset: Literal["small", "medium", "large"] = Field(
        default=_PRESET,
        description="channels, message_l_max and message_channels, where they are not given: "
        + "; ".join(f"{name} {', '.join(map(str, p.values()))}" for name, p in PRESETS.items()),
    )
    cutoff: float = Field(default=5.0, gt=0.5, le=20, description="Å")
    channels: int = Field(
        default=PRESETS[_PRESET]["channels"],
        ge=4,
        le=1024,
        description="feature channels per irrep component",
    )
    layers: int = Field(default=2, ge=1, le=4, description="rounds of message passing")
    l_max: int = Field(
        default=3, ge=0, le=4, description="highest spherical harmonic of the neighbour density"
    )
    message_l_max: int = Field(
        default=PRESETS[_PRESET]["message_l_max"],
        ge=0,
        le=2,
        description="highest degree of the features that neighbours pass on",
    )
    message_channels: int = Field(
        default=PRESETS[_PRESET]["message_channels"],
        ge=1,
        le=1024,
        description="channels of the features that neighbours pass on",
    )
    radial_functions: int = Field(default=8, ge=2, le=64)
    radial_hidden: int = Field(default=32, ge=4, le=1024)
    charge_head: Literal["equivariant", "invariant", "none"] = Field(
        default="equivariant",
        description="equivariant: on-site blocks; invariant: AO charges from scalars (a baseline)",
    )
    xtb_head: Literal["none", "task", "baseline"] = Field(
        default="none",
        description="learn the GFN1-xTB energy as well; task: beside the energy; baseline: the "
        "energy is the learned GFN1-xTB energy plus a learned difference (no xTB at inference)",
    )

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, data: Any) -> Any:
        if isinstance(data, dict) and (sizes := PRESETS.get(data.get("preset", _PRESET))):
            return {**sizes, **data}
        return data

    @model_validator(mode="after")
    def _degrees(self) -> PotentialConfig:
        if self.message_l_max > self.l_max:
            raise ValueError(f"message_l_max {self.message_l_max} exceeds l_max {self.l_max}")
        if self.charge_head == "equivariant" and self.l_max < 1:
            raise ValueError(
                "charge_head: equivariant needs l_max >= 1 (p shells hold a 2e block); "
                "raise l_max or choose charge_head: invariant or none"
            )
        return self


# ------------------------------------------------------------------------------- train
class TaskWeights(StrictModel):
    """Weight of each task in the loss, on errors scaled to be of order one; 0 switches it off.

    Only their ratios count. A task with weight that no structure has a label for is an error.
    Labels of the cheap tasks (charges, xtb_energy, xtb_forces) may also cover structures that
    have no reference label.
    """

    energy: float = Field(default=1.0, ge=0)
    forces: float = Field(default=30.0, ge=0)
    stress: float = Field(default=0.0, ge=0)
    charges: float = Field(default=1.0, ge=0)
    xtb_energy: float = Field(default=0.0, ge=0)
    xtb_forces: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _some_task(self) -> TaskWeights:
        if not self.active:
            raise ValueError("all weights are 0: nothing would be learned")
        return self

    @property
    def active(self) -> tuple[str, ...]:
        """Tasks that have weight."""
        return tuple(task for task, weight in self if weight > 0)

    @property
    def reference(self) -> tuple[str, ...]:
        """Those of them that are learned from reference labels."""
        return tuple(task for task in self.active if task in ("energy", "forces", "stress"))


class OptimizerConfig(StrictModel):
    """Adam with a cosine schedule and an exponential moving average (EMA) of the weights."""

    learning_rate: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(
        default=0.01,
        ge=0,
        description="of matrices; each step they lose learning_rate x weight_decay of their size",
    )
    batch_size: int = Field(
        default=8, ge=1, description="structures with reference labels in each step"
    )
    cheap_batch_size: int = Field(
        default=16,
        ge=0,
        description="structures with cheap labels only that join each step, if there are any",
    )
    max_edges: int = Field(
        default=20_000,
        ge=1,
        description="(padded) edges that are evaluated at once: a larger step is taken in parts, "
        "whose gradients are added",
    )
    steps: int = Field(default=10_000, ge=1, description="optimiser steps in all")
    warmup_steps: int = Field(default=100, ge=0)
    ema_decay: float = Field(default=0.995, ge=0, lt=1)
    gradient_clip: float = Field(default=10.0, gt=0)
    evaluate_every: int = Field(default=500, ge=1, description="steps between validations")
    patience: int = Field(
        default=0, ge=0, description="validations without improvement before an early stop; 0: off"
    )


class TrainConfig(StrictModel):
    """`orbcalc train`: one potential, or a committee of them, from labelled structures."""

    train: Paths = Field(description="labelled structures: files that ASE reads, or label stores")
    valid: Paths | float = Field(
        default=0.1, description="the same, or the fraction of the training structures to hold out"
    )
    output: Path = Field(default=Path("model.orbcalc"), description="where the model is written")
    seed: int = Field(default=0, ge=0)
    committee: int = Field(default=1, ge=1, le=16, description="members, trained independently")
    device: str = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    potential: PotentialConfig = PotentialConfig()
    tasks: TaskWeights = TaskWeights()
    optimizer: OptimizerConfig = OptimizerConfig()
    start_from: Path | None = Field(
        default=None,
        description="a model whose weights to begin with, if it has the same architecture, "
        "elements and number of members; its reference energies and scales are kept",
    )
    reference_energies: dict[str, float] | None = Field(
        default=None,
        description="energy of each isolated atom, eV, by symbol; default: least squares",
    )

    @model_validator(mode="after")
    def _fraction(self) -> TrainConfig:
        if isinstance(self.valid, float) and not 0 < self.valid < 1:
            raise ValueError(f"valid: {self.valid} is not a fraction between 0 and 1")
        if self.tasks.charges > 0 and self.potential.charge_head == "none":
            raise ValueError("tasks.charges has weight, but potential.charge_head is none")
        for task in ("xtb_energy", "xtb_forces"):
            if task in self.tasks.active and self.potential.xtb_head == "none":
                raise ValueError(f"tasks.{task} has weight, but potential.xtb_head is none")
        return self

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read."""
        valid = self.valid if isinstance(self.valid, tuple) else ()
        return (*self.train, *valid, *((self.start_from,) if self.start_from else ()))


# -------------------------------------------------------------------------------- loop
class MDConfig(StrictModel):
    """Langevin MD that proposes structures for the pool."""

    temperature_K: float = Field(default=500.0, gt=0)  # noqa: N815  (ASE's name)
    timestep_fs: float = Field(default=0.5, gt=0)
    friction_per_fs: float = Field(default=0.02, gt=0)
    walkers: int = Field(default=4, ge=1, description="independent trajectories")
    steps: int = Field(default=1000, ge=1, description="steps of each walker in each round")
    every: int = Field(default=20, ge=1, description="steps between proposed structures")
    bootstrap: Literal["GFN1-xTB"] = Field(
        default="GFN1-xTB", description="drives the walkers before there is a committee"
    )
    max_uncertainty: float | None = Field(
        default=0.05,
        gt=0,
        description="energy spread of the committee, eV/atom, at which a walker is stopped",
    )
    rounds: int = Field(
        default=2, ge=1, description="rounds that enlarge the pool; afterwards it is fixed"
    )


class PoolConfig(StrictModel):
    """Where candidate structures come from: a file, MD, or both."""

    structures: Paths = Field(
        default=(), description="structures that belong to the pool as they are"
    )
    start: Paths = Field(default=(), description="starting structures of the MD walkers")
    md: MDConfig | None = None

    @model_validator(mode="after")
    def _some_source(self) -> PoolConfig:
        if not self.structures and self.md is None:
            raise ValueError("the pool is empty: give `structures`, or `start` with `md`")
        if self.md is not None and not (self.start or self.structures):
            raise ValueError("md needs starting structures: give `start` (or `structures`)")
        return self

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read."""
        return (*self.structures, *(self.start if self.md is not None else ()))


class SelectionConfig(StrictModel):
    """How many structures are labelled in each round, and how they are chosen."""

    method: Literal["uncertainty", "determinant", "diversity", "random"] = "uncertainty"
    initial: int = Field(default=50, ge=2, description="random structures of the first round")
    batch: int = Field(default=40, ge=1, description="hardest structures of each later round")
    audit: int = Field(
        default=40, ge=1, description="random structures labelled before they are trained on"
    )
    diversity: float = Field(
        default=2.0, ge=1, description="choose a spread-out batch among this many times as many"
    )
    cost_aware: bool = Field(default=False, description="prefer uncertainty per second of label")
    valid_fraction: float = Field(
        default=0.1, gt=0, lt=0.5, description="share of the labelled structures held out"
    )


class CertificateConfig(StrictModel):
    """What is certified of the whole pool, and how surely."""

    method: Literal["hypergeometric", "kl_batch"] = "hypergeometric"
    quantity: Literal["energy_per_atom", "energy", "forces"] = "energy_per_atom"
    tolerance: float = Field(
        default=0.005, gt=0, description="largest error of a hit: eV/atom, eV, or eV/Å of an atom"
    )
    accuracy: float = Field(
        default=0.95, gt=0, lt=1, description="share of the pool that must be inside (gamma)"
    )
    delta: float = Field(
        default=0.05, gt=0, lt=1, description="probability that the certificate may be false"
    )
    mean_error: float | None = Field(
        default=None, gt=0, description="largest mean |error|, clipped at the tolerance; or unasked"
    )

    @model_validator(mode="after")
    def _mean_error(self) -> CertificateConfig:
        if self.mean_error is not None and self.mean_error > self.tolerance:
            raise ValueError("mean_error exceeds the tolerance, at which errors are clipped")
        if self.mean_error is not None and self.method != "hypergeometric":
            raise ValueError(f"mean_error needs a random audit, which {self.method} has not")
        return self


class StopConfig(StrictModel):
    """Ends of the loop other than a certificate; they are reported as such."""

    max_rounds: int = Field(default=10, ge=1)
    max_labels: int | None = Field(default=None, ge=1, description="reference labels in all")


class DaskConfig(StrictModel):
    """Where tasks run: an existing scheduler, or a LocalCluster of two kinds of workers."""

    address: str | None = Field(default=None, description="address of a running scheduler")
    label_workers: int | None = Field(default=None, ge=1, description="default: one per core")
    model_workers: int | None = Field(
        default=None, ge=1, description="default: one per GPU, else as many as members, cores"
    )
    retries: int = Field(
        default=2, ge=0, description="of tasks that fail, unless the configuration is wrong"
    )
    worker_timeout_s: float = Field(
        default=600.0, gt=0, description="how long a run waits while no worker could go on with it"
    )


class RunConfig(StrictModel):
    """`orbcalc run`: the whole active-learning loop."""

    output: Path = Field(default=Path("run"), description="the run folder")
    seed: int = Field(default=0, ge=0)
    committee: int = Field(default=2, ge=2, le=16)
    device: str = "auto"
    warm_start: bool = Field(
        default=True, description="train on from the committee of the last round"
    )
    pool: PoolConfig
    labels: LabelConfig = LabelConfig()
    potential: PotentialConfig = PotentialConfig()
    tasks: TaskWeights = TaskWeights()
    optimizer: OptimizerConfig = OptimizerConfig()
    selection: SelectionConfig = SelectionConfig()
    certificate: CertificateConfig = CertificateConfig()
    stop: StopConfig = StopConfig()
    dask: DaskConfig = DaskConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.tasks.charges > 0 and not self.labels.charges:
            raise ValueError("tasks.charges has weight, but labels.charges is false")
        if self.tasks.forces > 0 and not self.labels.forces:
            raise ValueError("tasks.forces has weight, but labels.forces is false")
        if self.tasks.stress > 0 and not self.labels.stress:
            raise ValueError("tasks.stress has weight, but labels.stress is false")
        if self.certificate.quantity == "forces" and not self.labels.forces:
            raise ValueError("certificate.quantity is forces, but labels.forces is false")
        if self.labels.reference.calculator == "file" and self.pool.md is not None:
            raise ValueError("reference labels from a file cannot label structures made by md")
        return self


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
        data = yaml.safe_load(text)
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
    return _resolve_paths(config, folder) if folder is not None else config


def dump_config(config: StrictModel) -> str:
    """Write a configuration as YAML, with every default spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


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


def _resolve_paths(config: Config, folder: Path) -> Config:
    """Return a copy whose relative *input* paths start at a folder; outputs start where we run."""
    update: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, StrictModel):
            update[name] = _resolve_paths(value, folder)
        elif name == "start_from" and isinstance(value, Path):
            update[name] = (folder / value).resolve()
        elif isinstance(value, tuple) and value and all(isinstance(v, Path) for v in value):
            update[name] = tuple((folder / v).resolve() for v in value)
    return config.model_copy(update=update)
