"""Configuration of `orbcalc train`: the potential, its tasks, the optimiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from orbcalc.config.base import Paths, StrictModel

__all__ = [
    "PRESETS",
    "PROCESS_LABELS",
    "OptimizerConfig",
    "PotentialConfig",
    "TaskWeights",
    "TrainConfig",
]


# ------------------------------------------------------------------------------- model
#: Sizes of potentials; docs/architecture.md has their speeds.
PRESETS: dict[str, dict[str, int]] = {
    "small": {"channels": 32, "message_l_max": 0, "message_channels": 16},
    "medium": {"channels": 64, "message_l_max": 1, "message_channels": 16},
    "large": {"channels": 64, "message_l_max": 2, "message_channels": 16},
}
_PRESET: Literal["medium"] = "medium"


#: Energies up to which a process is the default; measured in docs/data-efficiency-study.md.
PROCESS_LABELS = 1_000


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
    baseline: Literal["none", "GFN1-xTB"] = Field(
        default="none",
        description="GFN1-xTB: the network learns the difference from it only (Δ-learning), and "
        "tblite computes it at every prediction: on QM9 fewer labels, and slower predictions",
    )
    xtb_head: Literal["none", "task", "baseline"] | None = Field(
        default=None,
        description="learn the GFN1-xTB energy as well; task: beside the energy; baseline: the "
        "energy is the learned GFN1-xTB energy plus a learned difference (no xTB at inference); "
        "default: baseline (beside a computed one: task) if structures that have cheap labels only "
        "are trained on, or if tasks.xtb_energy or tasks.xtb_forces has weight, otherwise none",
    )

    energy_head: Literal["network", "process"] | None = Field(
        default=None,
        description="what the energy, or its difference from the learned GFN1-xTB energy, is made "
        "of; network: trained with all else; process: a Gaussian process on features that cheap "
        "labels alone have taught, fitted in closed form, which serves few labels best and needs "
        "xtb_head: baseline (with tasks: {energy: 0, forces: 0} only the features are learned, to "
        "start_from); lone atoms are not learned; default: process where no forces are learned, "
        f"there are at most {PROCESS_LABELS:,} energies, none of a lone atom, and as many "
        "structures or more with cheap labels only, or where start_from has features (in "
        "`orbcalc run`: pool.charges, without md, no lone atom in the pool); otherwise network",
    )

    @property
    def learns_xtb_energy(self) -> bool:
        """Whether there is a head for the GFN1-xTB energy."""
        return self.xtb_head in ("task", "baseline")

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, data: Any) -> Any:
        if isinstance(data, dict) and (sizes := PRESETS.get(data.get("preset", _PRESET))):
            return {**sizes, **data}
        return data

    @model_validator(mode="after")
    def _one_baseline(self) -> PotentialConfig:
        if self.baseline != "none" and self.xtb_head == "baseline":
            raise ValueError(
                f"baseline: {self.baseline} is computed and xtb_head: baseline is learned: one "
                f"energy cannot have both. Leave one of them out."
            )
        return self

    @model_validator(mode="after")
    def _features_from_cheap_labels(self) -> PotentialConfig:
        if self.energy_head == "process" and self.xtb_head not in (None, "baseline"):
            raise ValueError(
                f"energy_head: process learns what is left above a learned GFN1-xTB energy, but "
                f"xtb_head is {self.xtb_head}. Leave it out, or choose xtb_head: baseline."
            )
        if self.energy_head == "process" and self.baseline != "none":
            raise ValueError(
                f"energy_head: process has a learned GFN1-xTB energy below it, and baseline: "
                f"{self.baseline} a computed one. Leave one of them out."
            )
        return self

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
#: Tasks whose labels are expensive.
REFERENCE_TASKS = ("energy", "forces", "stress")


#: Weight of charges and of the GFN1-xTB energy where no forces are learned: energies alone say
#: little about atoms. docs/data-efficiency-study.md has the measurements.
_CHEAP_WEIGHT_WITHOUT_FORCES = 30.0


class TaskWeights(StrictModel):
    """Weight of each task in the loss, on errors scaled to be of order one; 0 switches it off.

    Only their ratios count. A task with weight that no structure has a label for is an error.
    Labels of the cheap tasks (charges, xtb_energy, xtb_forces) may also cover structures that
    have no reference label.
    """

    energy: float = Field(default=1.0, ge=0)
    forces: float = Field(default=30.0, ge=0)
    stress: float = Field(default=0.0, ge=0)
    charges: float = Field(
        default=1.0,
        ge=0,
        description=f"default: 1, or {_CHEAP_WEIGHT_WITHOUT_FORCES:g} where that of forces is 0",
    )
    xtb_energy: float | None = Field(
        default=None,
        ge=0,
        description="default: that of charges by default with potential.xtb_head, otherwise 0",
    )
    xtb_forces: float | None = Field(
        default=None, ge=0, description="default: that of forces with potential.xtb_head, or 0"
    )

    @model_validator(mode="before")
    @classmethod
    def _without_forces(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("forces") == 0:
            return {"charges": _CHEAP_WEIGHT_WITHOUT_FORCES, **data}
        return data

    @model_validator(mode="after")
    def _some_task(self) -> TaskWeights:
        if not self.active:
            raise ValueError("all weights are 0: nothing would be learned")
        return self

    def check_heads(self, potential: PotentialConfig) -> None:
        """Raise ValueError if a task has weight that the potential cannot learn."""
        for task, head in (
            ("charges", "charge_head"),
            ("xtb_energy", "xtb_head"),
            ("xtb_forces", "xtb_head"),
        ):
            if task in self.active and getattr(potential, head) == "none":
                raise ValueError(f"tasks.{task} has weight, but potential.{head} is none")
        if potential.energy_head == "process":
            if self.forces or self.stress:
                raise ValueError(
                    f"potential.energy_head: process is fitted to energies alone, but tasks learn "
                    f"{' and '.join(self.reference)}: set tasks.forces and tasks.stress to 0, or "
                    f"choose energy_head: network"
                )
            if self.xtb_energy == 0:
                raise ValueError(
                    "potential.energy_head: process needs a learned GFN1-xTB energy below it, but "
                    "tasks.xtb_energy is 0"
                )
        if self.stress and potential.baseline != "none":
            raise ValueError(
                f"tasks.stress has weight, but labels of potential.baseline: {potential.baseline} "
                f"hold no stress. Learn energy and forces: the stress follows from them."
            )

    @property
    def active(self) -> tuple[str, ...]:
        """Tasks that have weight."""
        return tuple(task for task, weight in self if weight)

    @property
    def reference(self) -> tuple[str, ...]:
        """Those of them that are learned from reference labels."""
        return tuple(task for task in self.active if task in REFERENCE_TASKS)


#: Structures of a step. Where forces are learned, those of two tell enough if all structures are
#: of one composition, and noisy steps then generalise better. docs/architecture.md has the
#: measurements. Large structures tell more each.
_BATCH_SIZE, _BATCH_SIZE_OF_ONE_COMPOSITION, _BATCH_ATOMS = 8, 2, 512

#: How much more energies weigh at the end of a training. Beside forces they say what those do not:
#: how the energies of different compositions compare.
_LATE_ENERGY = 16.0

#: Steps of a training, and passes over its structures, of which the larger number is made: few
#: structures need steps, many need passes. docs/architecture.md has the measurements.
STEPS, PASSES = 10_000, 20


class OptimizerConfig(StrictModel):
    """Muon and Adam with a cosine schedule and a moving average (EMA) of the weights."""

    learning_rate: float = Field(default=1e-2, gt=0, description="of Adam; Muon has half of it")
    weight_decay: float = Field(
        default=0.01,
        ge=0,
        description="of matrices; each step they lose learning_rate x weight_decay of their size",
    )
    batch_size: int | None = Field(
        default=None,
        ge=1,
        description=f"structures with reference labels in each step; default: {_BATCH_SIZE}; "
        f"where forces are learned, {_BATCH_SIZE_OF_ONE_COMPOSITION} of a single composition, and "
        f"no more atoms than {_BATCH_ATOMS} on average",
    )
    cheap_batch_size: int | None = Field(
        default=None,
        ge=0,
        description="structures with cheap labels only that join each step, if there are any; "
        "default: twice batch_size",
    )
    max_edges: int | None = Field(
        default=None,
        ge=1,
        description="(padded) edges that are evaluated at once: a larger step is taken in parts, "
        "whose gradients are added; default: 20,000, on a GPU 100,000",
    )
    steps: int | None = Field(
        default=None,
        ge=1,
        description=f"optimiser steps in all; default: {STEPS:,}, or as many as show each "
        f"structure {PASSES} times, where that is more",
    )
    late_energy: float | None = Field(
        default=None,
        gt=0,
        description="factor of the weights of energies in the last three tenths of the steps, "
        f"where forces are learned; default: {_LATE_ENERGY:g}, or 1 if all structures are of a "
        "single composition",
    )
    warmup_steps: int = Field(default=100, ge=0)
    ema_decay: float = Field(default=0.995, ge=0, lt=1)
    gradient_clip: float = Field(default=10.0, gt=0)
    evaluate_every: int | None = Field(
        default=None, ge=1, description="steps between validations; default: a twentieth of all"
    )
    patience: int = Field(
        default=0, ge=0, description="validations without improvement before an early stop; 0: off"
    )


class TrainConfig(StrictModel):
    """`orbcalc train`: one potential, or a committee of them, from labelled structures."""

    train: Paths = Field(description="labelled structures: files that ASE reads, or label stores")
    valid: Paths | float = Field(
        default=0.1,
        description="the same, or the fraction of the training structures to hold out; with a "
        "process on features of start_from none is: each is left out in turn (not in a committee)",
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
        "elements and number of members; its scales are kept, and its reference energies moved "
        "where others are given or the labels are of another method; of one with energy_head: "
        "process the features stay, whatever cheap labels are new, and the process is fitted anew "
        "(to structures of its elements); with tasks: {energy: 0, forces: 0} its features are "
        "trained on with the cheap labels instead",
    )
    reference_energies: dict[str, float] | None = Field(
        default=None,
        description="energy of each isolated atom, eV, by symbol; default: least squares",
    )

    @model_validator(mode="after")
    def _fraction(self) -> TrainConfig:
        if isinstance(self.valid, float) and not 0 < self.valid < 1:
            raise ValueError(f"valid: {self.valid} is not a fraction between 0 and 1")
        self.tasks.check_heads(self.potential)
        if self.potential.energy_head == "process" and self.reference_energies is not None:
            raise ValueError(
                "reference_energies are those of lone atoms, which potential.energy_head: process "
                "does not learn. Leave them out, or choose energy_head: network."
            )
        if self.potential.baseline != "none" and self.reference_energies is not None:
            raise ValueError(
                f"reference_energies are total ones, but above baseline: {self.potential.baseline} "
                f"differences are learned. Leave them out: they are fitted."
            )
        return self

    def resolved(self, *, cheap_only: bool, few_energies: bool = False) -> TrainConfig:
        """Decide what was left to the structures: both heads for energies, and weights.

        Parameters
        ----------
        cheap_only
            Whether there are structures with a GFN1-xTB energy and no reference label.
        few_energies
            Whether there are so few energies that a process serves them best, and all that it
            needs.
        """
        potential, tasks = self.potential, self.tasks
        if potential.xtb_head is None:
            asked_for = tasks.xtb_energy or tasks.xtb_forces or potential.energy_head == "process"
            wanted = asked_for or (cheap_only and tasks.xtb_energy != 0)
            learned = "baseline" if potential.baseline == "none" else "task"
            head = learned if wanted else "none"
            potential = potential.model_copy(update={"xtb_head": head})
        if potential.energy_head is None:
            suits = few_energies and cheap_only and tasks.reference == ("energy",)
            suits = suits and self.reference_energies is None and tasks.xtb_energy != 0
            is_process = suits and potential.xtb_head == "baseline"
            head = "process" if is_process else "network"
            potential = potential.model_copy(update={"energy_head": head})
        weights = {"xtb_energy": 0.0, "xtb_forces": 0.0}
        if potential.learns_xtb_energy:
            energy = 1.0 if tasks.forces else _CHEAP_WEIGHT_WITHOUT_FORCES
            weights = {"xtb_energy": energy, "xtb_forces": tasks.forces}
        left_open = {name: w for name, w in weights.items() if getattr(tasks, name) is None}
        tasks = tasks.model_copy(update=left_open)
        return self.model_copy(update={"potential": potential, "tasks": tasks})

    def batch_sizes(self, *, is_varied: bool, n_atoms: float) -> tuple[int, int]:
        """Return the structures of a step: with reference labels, and with cheap ones only.

        Parameters
        ----------
        is_varied
            Whether structures differ in composition.
        n_atoms
            Of a structure, on average.
        """
        labelled, cheap = self.optimizer.batch_size, self.optimizer.cheap_batch_size
        if labelled is None:
            labelled = _BATCH_SIZE
            if self.tasks.forces or self.tasks.xtb_forces:
                most = _BATCH_SIZE if is_varied else _BATCH_SIZE_OF_ONE_COMPOSITION
                few = int(_BATCH_ATOMS / n_atoms)
                labelled = min(most, max(few, _BATCH_SIZE_OF_ONE_COMPOSITION))
        return labelled, 2 * labelled if cheap is None else cheap

    def late_tasks(self, tasks: TaskWeights, *, is_varied: bool) -> TaskWeights:
        """Return the weights at the end of a training: energies beside forces weigh more."""
        factor = self.optimizer.late_energy or (_LATE_ENERGY if is_varied else 1.0)
        return tasks.model_copy(
            update={
                energy: factor * (getattr(tasks, energy) or 0.0)
                for energy, forces in (("energy", "forces"), ("xtb_energy", "xtb_forces"))
                if getattr(tasks, forces)
            }
        )

    @property
    def keeps_features(self) -> bool:
        """Whether a process is fitted on the features of the model to start from, as they are.

        Where no energy is learned, features alone are, and those of the model are trained on.
        """
        is_process = self.potential.energy_head == "process"
        return is_process and self.start_from is not None and self.tasks.energy > 0

    @property
    def leaves_one_out(self) -> bool:
        """Whether errors are those of each structure left out in turn, and none is held out.

        That is so for a process on known features, unless structures to validate with are given.
        The spread of several members is known for structures held out only.
        """
        return self.keeps_features and self.committee == 1 and isinstance(self.valid, float)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read."""
        valid = self.valid if isinstance(self.valid, tuple) else ()
        return (*self.train, *valid, *((self.start_from,) if self.start_from else ()))
