"""Configuration of `orbcalc run`: pool, MD, selection, certificate, ends of the loop, Dask."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from orbcalc.config.base import Paths, StrictModel
from orbcalc.config.labels import LabelConfig
from orbcalc.config.training import OptimizerConfig, PotentialConfig, TaskWeights

__all__ = [
    "CertificateConfig", "DaskConfig", "MDConfig", "PoolConfig", "RunConfig", "SelectionConfig",
    "StopConfig",
]  # fmt: skip


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
        description="uncertainty of the energy, eV/atom, at which a walker is stopped",
    )
    max_force_uncertainty: float | None = Field(
        default=0.5,
        gt=0,
        description="the same of the force on any atom, eV/Å, however large the system is",
    )
    rounds: int = Field(
        default=2,
        ge=1,
        description="rounds that enlarge the pool, if it is not certified before; afterwards it is "
        "fixed",
    )

    @model_validator(mode="after")
    def _proposes(self) -> MDConfig:
        if self.steps < self.every:
            raise ValueError(
                f"{self.steps} steps end before the first structure, after {self.every}"
            )
        return self


class PoolConfig(StrictModel):
    """Where candidate structures come from: a file, MD, or both."""

    structures: Paths = Field(
        default=(), description="structures that belong to the pool as they are"
    )
    start: Paths = Field(default=(), description="starting structures of the MD walkers")
    md: MDConfig | None = None
    charges: bool = Field(
        default=False,
        description="compute the cheap labels (GFN1-xTB) of the whole pool, to learn from them "
        "(potential.xtb_head: baseline by default); otherwise those of structures with reference "
        "labels only",
    )
    features: Path | None = Field(
        default=None,
        description="a model with energy_head: process, which the cheap labels of other structures "
        "have taught: those of the pool train its features on (its elements must hold the pool's)",
    )

    @model_validator(mode="after")
    def _some_source(self) -> PoolConfig:
        if not self.structures and self.md is None:
            raise ValueError("the pool is empty: give `structures`, or `start` with `md`")
        if self.md is not None and not (self.start or self.structures):
            raise ValueError("md needs starting structures: give `start` (or `structures`)")
        if self.md is None and self.start:
            raise ValueError(
                "`start` is where MD walkers begin, but there is no `md`: give that, or "
                "`structures` if these belong to the pool"
            )
        return self

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read."""
        starts = self.start if self.md is not None else ()
        return (*self.structures, *starts, *((self.features,) if self.features else ()))


class SelectionConfig(StrictModel):
    """How many structures are labelled in each round, and how they are chosen."""

    method: Literal["uncertainty", "determinant", "diversity", "random"] = Field(
        default="uncertainty",
        description="uncertainty: the least certain of what the certificate is about, spread out",
    )
    initial: int = Field(
        default=50,
        ge=2,
        description="structures of the first round: those that tell most about the pool, where a "
        "process is fitted to energies (see potential.energy_head), otherwise, and with method: "
        "random, a random sample",
    )
    batch: int = Field(default=40, ge=1, description="hardest structures of each later round")
    audit: int = Field(
        default=200, ge=1, description="most random structures labelled before they are trained on"
    )
    audit_step: int = Field(
        default=20,
        ge=1,
        description="as many of them at a time, until the look is decided (method: sequential)",
    )
    diversity: float = Field(
        default=2.0,
        ge=1,
        description="choose a spread-out batch among this many times as many (method: uncertainty)",
    )
    cost_aware: bool = Field(default=False, description="prefer uncertainty per second of label")
    valid_fraction: float = Field(
        default=0.1, gt=0, lt=0.5, description="share of the labelled structures held out"
    )

    @model_validator(mode="after")
    def _scores_to_divide(self) -> SelectionConfig:
        if self.cost_aware and self.method in ("diversity", "random"):
            raise ValueError(f"cost_aware divides scores by costs, and {self.method} has no scores")
        return self


class CertificateConfig(StrictModel):
    """What is certified of the whole pool, and how surely."""

    method: Literal["sequential", "hypergeometric", "kl_batch"] = "sequential"
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
        if self.mean_error is not None and not self.by_audit:
            raise ValueError(f"mean_error needs a random audit, which {self.method} has not")
        return self

    @property
    def by_audit(self) -> bool:
        """Whether looks are taken at random audits, not at the batch."""
        return self.method != "kl_batch"


class StopConfig(StrictModel):
    """Ends of the loop other than a certificate; they are reported as such."""

    max_rounds: int = Field(default=10, ge=1)
    max_labels: int | None = Field(
        default=None,
        ge=1,
        description="reference labels in all; where they end, the last model has no audit",
    )


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
    committee: int = Field(
        default=1,
        ge=1,
        le=16,
        description="members, whose mean predicts; their last layers and spread say how sure it is",
    )
    device: str = "auto"
    warm_start: bool = Field(
        default=True,
        description="train on from the committee of the last round; features that a process is "
        "fitted on are learned once in any case",
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
        self.tasks.check_heads(self.potential)
        for task, labels in (
            ("charges", "charges"),
            ("xtb_energy", "charges"),
            ("xtb_forces", "charges"),
            ("forces", "forces"),
            ("stress", "stress"),
        ):
            if task in self.tasks.active and not getattr(self.labels, labels):
                raise ValueError(f"tasks.{task} has weight, but labels.{labels} is false")
        if self.potential.energy_head == "process" and not self.tasks.energy:
            raise ValueError(
                "potential.energy_head: process is fitted to energies, but tasks.energy is 0: give "
                "it a weight (the run learns features before in any case)"
            )
        if self.potential.energy_head == "process" and not self.pool.charges:
            raise ValueError(
                "potential.energy_head: process learns from the cheap labels of the whole pool in "
                "the first round: set pool.charges: true, or choose energy_head: network"
            )
        if self.potential.energy_head == "process" and self.pool.md is not None:
            raise ValueError(
                "potential.energy_head: process keeps the features of the first round, which a "
                "pool that pool.md enlarges outgrows: choose energy_head: network"
            )
        if self.pool.features is not None and self.potential.energy_head != "process":
            raise ValueError(
                "pool.features are what a process is fitted on: set potential.energy_head: process"
            )
        if self.potential.xtb_head not in (None, "none") and not self.labels.charges:
            raise ValueError(
                f"potential.xtb_head: {self.potential.xtb_head} learns GFN1-xTB energies, but "
                f"labels.charges is false"
            )
        if self.pool.charges and not self.labels.charges:
            raise ValueError("pool.charges is true, but labels.charges is false")
        if self.potential.baseline != "none" and not self.pool.charges:
            raise ValueError(
                f"potential.baseline: {self.potential.baseline} is needed for predictions of the "
                f"whole pool: set pool.charges: true"
            )
        if self.certificate.quantity == "forces" and not self.labels.forces:
            raise ValueError("certificate.quantity is forces, but labels.forces is false")
        if self.labels.reference.calculator == "file" and self.pool.md is not None:
            raise ValueError("reference labels from a file cannot label structures made by md")
        return self
