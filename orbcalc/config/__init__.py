"""Strict configuration models: one per layer, and the reader of their YAML files.

Unknown keys are errors that name the nearest known key. Relative paths in a file are taken
from the folder of that file.
"""

from __future__ import annotations

from orbcalc.config.base import dump_config, load_config, parse_config, resolve_paths
from orbcalc.config.labels import LabelConfig, ReferenceConfig
from orbcalc.config.run import (
    CertificateConfig,
    DaskConfig,
    MDConfig,
    PoolConfig,
    RunConfig,
    SelectionConfig,
    StopConfig,
)
from orbcalc.config.training import (
    PRESETS,
    PROCESS_LABELS,
    REFERENCE_TASKS,
    OptimizerConfig,
    PotentialConfig,
    TaskWeights,
    TrainConfig,
)

__all__ = [
    "PRESETS", "PROCESS_LABELS", "REFERENCE_TASKS",
    "CertificateConfig", "DaskConfig", "LabelConfig", "MDConfig", "OptimizerConfig", "PoolConfig",
    "PotentialConfig", "ReferenceConfig", "RunConfig", "SelectionConfig", "StopConfig",
    "TaskWeights", "TrainConfig", "dump_config", "load_config", "parse_config",
    "resolve_paths",
]  # fmt: skip
