"""The models that are compared, by name.

``orbcalc:medium`` and ``mace:128x0e+128x1o`` are architectures, with random weights or to be
trained; ``orbcalc:FILE.orbcalc`` and ``mace:FILE.model`` are trained models. Those of orbcalc may
have ``:compiled`` behind them, and are then compiled before they are timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from orbcalc.config import PRESETS

__all__ = ["CUTOFF", "Model", "parse_model"]

Package = Literal["orbcalc", "mace"]

#: Å, of every architecture: what MACE's README recommends.
CUTOFF = 5.0


@dataclass(frozen=True)
class Model:
    """A model as it is named on the command line."""

    name: str
    package: Package
    spec: str
    """Preset, hidden irreps or file."""
    compiled: bool = False

    @property
    def is_file(self) -> bool:
        """Whether it is a trained model, not an architecture."""
        return self.spec.endswith((".orbcalc", ".model"))

    @property
    def architecture(self) -> dict[str, Any]:
        """What a worker builds it from."""
        if self.package == "orbcalc":
            return {"cutoff": CUTOFF, "preset": self.spec}
        return {"hidden_irreps": self.spec, "r_max": CUTOFF}

    @property
    def label(self) -> str:
        """Its name in tables and figures."""
        if not self.is_file:
            return self.name
        return f"{self.package}:{Path(self.spec).stem}" + ":compiled" * self.compiled


def parse_model(name: str) -> Model:
    """Read the name of a model.

    Raises
    ------
    ValueError
        If there is no such model.
    """
    package, _, spec = name.partition(":")
    compiled = package == "orbcalc" and spec.endswith(":compiled")
    spec = spec.removesuffix(":compiled")
    if package not in get_args(Package) or not spec:
        raise ValueError(f"{name!r} names no model: give orbcalc:PRESET or mace:HIDDEN_IRREPS")
    model = Model(name, package, spec, compiled)  # type: ignore[arg-type]
    if package == "orbcalc" and not model.is_file and spec not in PRESETS:
        raise ValueError(f"there is no preset {spec!r}; there are {', '.join(PRESETS)}")
    if model.is_file and not Path(spec).is_file():
        raise ValueError(f"there is no file {spec}")
    return model
